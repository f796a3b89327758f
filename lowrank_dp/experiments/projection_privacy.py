"""Claim: LoRA's projection is private like Gaussian noise, more so at low rank (arXiv 2409.17538).

The exact privacy profile of one vector query is far worse than its Gaussian reading, and is not
monotone in the rank. Two rows that share A reveal the candidate by symmetry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import special
from sklearn.metrics import roc_curve
from torch import Tensor

from lowrank_dp import _validate, lora, theory
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import (
    GradientConfig,
    GradientSource,
    prepare,
    rows_of,
    spread_layers,
)
from lowrank_dp.experiments.intervals import auc_with_interval
from lowrank_dp.mechanism import NON_PRIVATE

CAPTION = (
    "Privacy of LoRA's projection alone. (a) Exact privacy profile of one vector query (solid) "
    "and its Gaussian reading (dashed). (b) The exact delta at epsilon = 1 against rank, at an "
    "angle of 0.1 rad unless the config says otherwise, is not monotone: the reading that a "
    "smaller rank is more private, which a variance that falls with the rank (2409.17538) "
    "suggests, fails. The rank of the least delta depends on the angle. (c) Measured ROC of the "
    "attack on synthetic gradients (n=64, rank 4, rank-one candidate of relative size 0.1 unless "
    "the config says otherwise): likelihood ratio for one row, symmetry score for 2 and 8 rows "
    "that share A, without access to A; dashed is what the Gaussian reading allows for one row. "
    "(d) Measured AUC with 95% intervals when Gaussian noise is added to the release, synthetic "
    "and for one real example in a real layer's clipped gradient sum. The candidate and the rest "
    "of the batch are known to the attacker. NON-PRIVATE: real gradients are clean."
)
FPR_GRID = np.concatenate([[0.0], np.geomspace(1e-3, 1, 121)])


@dataclass(frozen=True)
class Config:
    """Grids of the profiles, and the attacks on synthetic and on real gradients.

    Attributes:
        gradients: model, task and clipping of the real gradients; cold by default.
        angle: angle between the query and its neighbour, in radians; their norms are equal.
        epsilons: epsilons of panel (a).
        profile_ranks: ranks of panel (a).
        profile_width: length n of the query of panel (a).
        rank_grid: ranks of panel (b), at epsilon 1.
        widths: lengths n of the query of panel (b).
        attack_width: length n of the rows of the synthetic attack.
        attack_rank: rank of the synthetic attack.
        relative_size: |candidate| / |rest| of the synthetic attack.
        rows: numbers of released rows. One row is attacked by the likelihood ratio, several rows
            by the symmetry score.
        noise_levels: standard deviations of added Gaussian noise, relative to the release's
            root-mean-square entry. The first is 0.
        num_trials: trials with the candidate, and as many without.
        real_rank: rank of the attack on real gradients.
        batch_size: batch size of the attack on real gradients.
    """

    gradients: GradientConfig = field(
        default_factory=lambda: GradientConfig(warm_loss=None, max_length=64)
    )
    angle: float = 0.1
    epsilons: tuple[float, ...] = tuple(float(e) for e in np.linspace(0, 8, 33))
    profile_ranks: tuple[int, ...] = (4, 16, 64, 256)
    profile_width: int = 4096
    rank_grid: tuple[int, ...] = (
        1,
        2,
        3,
        4,
        6,
        8,
        12,
        16,
        24,
        32,
        48,
        64,
        96,
        128,
        192,
        256,
        384,
        512,
        1024,
    )
    widths: tuple[int, ...] = (256, 768, 4096)
    attack_width: int = 64
    attack_rank: int = 4
    relative_size: float = 0.1
    rows: tuple[int, ...] = (1, 2, 8)
    noise_levels: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3, 1.0)
    num_trials: int = 2000
    real_rank: int = 8
    batch_size: int = 32


SMALL = Config(
    epsilons=tuple(float(e) for e in np.linspace(0, 8, 9)),
    rank_grid=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    noise_levels=(0.0, 0.1, 1.0),
    num_trials=300,
    batch_size=16,
)


@dataclass(frozen=True)
class Result:
    """Privacy profiles (deltas), and AUCs of the attacks.

    AUCs are (rows, noise_levels, 3): the value and both ends of its 95% interval. One row is
    attacked without added noise only; its other levels are NaN.
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    real_layer: str
    real_relative_size: float  # |candidate| / |rest| over max(rows) rows
    profile: np.ndarray  # (profile_ranks, epsilons)
    profile_gaussian: np.ndarray
    by_rank: np.ndarray  # (widths, rank_grid) at epsilon 1
    by_rank_gaussian: np.ndarray  # (rank_grid,)
    auc: np.ndarray
    auc_gaussian_reading: float  # AUC that the reading allows for one row
    real_auc: np.ndarray
    fpr: np.ndarray  # (F,)
    tpr: np.ndarray  # (rows, F), synthetic, no added noise
    tpr_gaussian_reading: np.ndarray


def run(config: Config, source: GradientSource | None = None) -> Result:
    """Compute the profiles and run the attacks; a missing ``source`` is prepared.

    Raises ValueError if ``noise_levels`` does not begin with 0.
    """
    if not config.noise_levels or config.noise_levels[0] != 0:
        _validate.fail("noise_levels", "a sequence that begins with 0", config.noise_levels)
    source = source or prepare(config.gradients)
    ranks, grid = np.array(config.profile_ranks)[:, None], np.array(config.rank_grid)
    epsilons, widths = np.array(config.epsilons), np.array(config.widths)[:, None]
    mu = np.sqrt(config.attack_rank) * config.relative_size
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        description=source.description,
        profile=np.asarray(
            theory.privacy_profile(epsilons, ranks, config.profile_width, angle=config.angle)
        ),
        profile_gaussian=np.asarray(
            theory.gaussian_privacy_profile(epsilons, ranks, angle=config.angle)
        ),
        by_rank=np.asarray(theory.privacy_profile(1.0, grid, widths, angle=config.angle)),
        by_rank_gaussian=np.asarray(theory.gaussian_privacy_profile(1.0, grid, angle=config.angle)),
        auc_gaussian_reading=float(special.ndtr(mu / np.sqrt(2))),
        fpr=FPR_GRID,
        tpr_gaussian_reading=special.ndtr(special.ndtri(FPR_GRID) + mu),
        **_attacks(config, source),
    )


def _attacks(config: Config, source: GradientSource) -> dict[str, Any]:
    """Attack synthetic and real gradients; return the measured fields of :class:`Result`."""
    generator = torch.Generator().manual_seed(config.gradients.seed + 1)

    def synthetic(rows: int) -> tuple[Tensor, Tensor]:
        rest = torch.randn(rows, config.attack_width, generator=generator, dtype=torch.float64)
        left, right = (torch.randn(k, generator=generator, dtype=torch.float64) for k in rest.shape)
        candidate = torch.outer(left, right)
        return rest, candidate * (config.relative_size * rest.norm() / candidate.norm())

    layer, rest, candidate = _real_pair(source, config, generator)

    def real(rows: int) -> tuple[Tensor, Tensor]:
        return rest[:rows], candidate[:rows]

    shape = len(config.rows), len(config.noise_levels), 3
    measured, real_measured = np.full(shape, np.nan), np.full(shape, np.nan)
    tpr = np.zeros((len(config.rows), len(FPR_GRID)))
    for i, rows in progress(list(enumerate(config.rows)), "attacks"):
        for j, level in enumerate(config.noise_levels if rows > 1 else (0.0,)):
            scores, member = _attack(
                partial(synthetic, rows), config.attack_rank, level, config.num_trials, generator
            )
            measured[i, j] = auc_with_interval(scores, member)
            if level == 0:
                tpr[i] = np.interp(FPR_GRID, *roc_curve(member, scores)[:2])
            real_measured[i, j] = auc_with_interval(
                *_attack(partial(real, rows), config.real_rank, level, config.num_trials, generator)
            )
    return {
        "real_layer": layer,
        "real_relative_size": float(candidate.norm() / rest.norm()),
        "auc": measured,
        "real_auc": real_measured,
        "tpr": tpr,
    }


def headline(result: Result) -> dict[str, str]:
    """Summarise the result in a few numbers."""
    best = result.by_rank.argmin(axis=1)
    numbers = {"Gaussian reading's AUC, 1 row": f"{result.auc_gaussian_reading:.3f}"}
    for i, rows in enumerate(result.config.rows):
        numbers[f"AUC, {rows} row{'s' * (rows > 1)}: synthetic, real"] = (
            f"{result.auc[i, 0, 0]:.4f}, {result.real_auc[i, 0, 0]:.4f}"
        )
    numbers["rank of least exact delta at epsilon 1"] = ", ".join(
        f"n={n}: {result.config.rank_grid[k]}"
        for n, k in zip(result.config.widths, best, strict=True)
    )
    return numbers


def _attack(
    pair: Callable[[], tuple[Tensor, Tensor]],
    rank: int,
    level: float,
    num_trials: int,
    generator: torch.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Score ``num_trials`` releases with the candidate, then as many without the candidate.

    Returns the scores, higher where the candidate is likelier to be in the release, and whether
    the candidate is in the release, both (2 num_trials,). ``level`` is the standard deviation of
    added noise, relative to the release's root-mean-square entry.
    """
    member = np.arange(2 * num_trials) < num_trials
    return np.array(
        [_trial(*pair(), bool(inside), rank, level, generator) for inside in member]
    ), member


def _trial(
    rest: Tensor,
    candidate: Tensor,
    inside: bool,
    rank: int,
    level: float,
    generator: torch.Generator,
) -> float:
    """Release G A^T A, with the candidate in G or not, and score the two hypotheses."""
    both = rest + candidate
    released = lora.project(both if inside else rest, rank, generator=generator)
    if level:
        noise = torch.randn(released.shape, generator=generator, dtype=released.dtype)
        released = released + level * released.square().mean().sqrt() * noise
    y, without, with_ = released.numpy(), rest.numpy(), both.numpy()
    if len(y) == 1:
        log_ratio = theory.projection_logpdf(y, np.stack([with_[0], without[0]]), rank)
        with np.errstate(invalid="ignore"):
            return float(np.nan_to_num(log_ratio[0] - log_ratio[1]))  # type: ignore[index]
    return theory.symmetry_score(y, without) - theory.symmetry_score(y, with_)


def _real_pair(
    source: GradientSource, config: Config, generator: torch.Generator
) -> tuple[str, Tensor, Tensor]:
    """Return a layer's name, the gradient sum without one example, and the example's gradient.

    Both gradients (max(rows), n) are clipped, and consist of the rows in which the example's
    gradient has the largest norm, the largest first.
    """
    indices = source.sample(config.batch_size, generator)
    rest, own = source.clean_sum(indices[1:]), source.clean_sum(indices[:1])
    name = spread_layers(source.model, rest, 1)[0]
    without, record = (rows_of(source.model, one, name) for one in (rest, own))
    top = torch.linalg.vector_norm(record, dim=1).topk(max(config.rows)).indices
    return name, without[top].double().cpu(), record[top].double().cpu()
