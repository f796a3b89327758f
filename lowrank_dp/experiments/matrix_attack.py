"""Claim: LoRA's projection hides a record like privacy noise does (2409.17538).

For a matrix it does not (2601.21719): rows that share A make R G^T symmetric for the true gradient
G alone, and two rows of a real layer suffice, at every rank. One row, a vector query, has no such
test: there the likelihood ratio is the best there is. Independent noise added to the release is
what ends the attack.

The two worlds differ in one record: G0 is some rows of a layer's clipped gradient sum over a batch
without it, G1 = G0 + the record's own clipped gradient. The adversary sees R = G A^T A + noise for
a fresh, secret A, knows both candidates, and scores R; a higher score says "the record is in".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from lowrank_dp import _validate, artifacts, lora, theory
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import GradientConfig, Source, prepare, spread_layers
from lowrank_dp.mia.metrics import auc

Array = NDArray[np.float64]

CAPTION = (
    "Rows of G A^T A from a real layer: can an adversary tell whether one record's clipped "
    "gradient is in the batch's sum G? Measured AUC with 95% intervals (DeLong; Clopper-Pearson at "
    "0 and 1) against Gaussian noise added to the release, its standard deviation in units of the "
    "clipping norm C. One row: exact likelihood ratio; 2 and 8 rows that share A: symmetry "
    "score T0 - T1. Hollow markers: the AUC that the reading of the projection as independent "
    "Gaussian noise (2409.17538) promises without added noise. Dotted: the noise is as large as "
    "the release's entries. Each trial has a record, an A and noise of its own; batch, layer and "
    "rows are fixed. The noise levels and numbers of rows of a trial share its draws, so where an "
    "interval misses by chance, as one in 20 does, its neighbours do too. Limits: the adversary "
    "knows all other records and the weights, so G0 and G1; under noise the symmetry score is not "
    "the best attack (where it falls below one row's curve the adversary would use that row), so "
    "its AUC does not bound what leaks; 0.5 C is the level of DP-SGD's noise but no guarantee "
    "here, for A^T A lengthens a row by about sqrt(1 + n/r). NON-PRIVATE: the gradients are "
    "clean."
)


@dataclass(frozen=True)
class Config:
    """What is attacked, and how often.

    Attributes:
        gradients: the real model and task, cold by default.
        batch_size: records behind G0.
        num_trials: with the record, and as many without; each has its own record.
        ranks: of A.
        rows: numbers of released rows, those of largest norm in G0; one row is attacked by the
            likelihood ratio, several by the symmetry score.
        noise_multipliers: standard deviation of the noise added to each entry of the release, in
            units of C; rising, 0 allowed.
    """

    gradients: GradientConfig = field(
        default_factory=lambda: GradientConfig(warm_loss=None, max_length=64)
    )
    batch_size: int = 32
    num_trials: int = 1000
    ranks: tuple[int, ...] = (1, 8, 64)
    rows: tuple[int, ...] = (1, 2, 8)
    noise_multipliers: tuple[float, ...] = (0.0, 1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 1e-2, 0.1, 0.5)


SMALL = Config(num_trials=100)


@dataclass(frozen=True)
class Result:
    """K ranks, M numbers of rows, L noise levels, in the order of the config.

    Scores are ``(K, M, L, N)``: N = 2 num_trials, the first half with the record in.
    """

    config: Config
    provenance: dict[str, Any]
    privacy: str
    description: str
    layer: str
    shape: tuple[int, ...]  # (m, n) of the whole layer
    noise_std: Array  # (L,) absolute, on the release: noise_multipliers x C
    release_rms: Array  # (K,) root-mean-square entry of the noise-free releases
    relative_size: Array  # (N,) |record| / |G0| over the rows taken
    scores: Array
    auc: Array  # (K, M, L, 3): value, lower and upper end of 95 % intervals
    gaussian_reading: Array  # (K, M): AUC promised without added noise


def run(config: Config, source: Source | None = None) -> Result:
    """Attack, on ``source`` (of ``config.gradients``) if it was prepared already.

    Raises ``ValueError`` for a config that cannot be run, before any gradient is computed where
    the model is not needed to tell.
    """
    _check(config)
    source = source or prepare(config.gradients)
    generator = torch.Generator().manual_seed(config.gradients.seed + 1)
    layer, shape, rest, records = real_rows(source, config, generator)
    member = np.arange(len(records)) < config.num_trials
    noise_std = np.array(config.noise_multipliers) * config.gradients.max_grad_norm

    scores = np.empty((len(config.ranks), len(config.rows), len(noise_std), len(records)))
    release_rms = np.empty(len(config.ranks))
    for k, rank in progress(list(enumerate(config.ranks)), "attacks"):
        released = release(rest, records, member, rank, generator)
        noise = torch.randn(released.shape, generator=generator, dtype=released.dtype)
        release_rms[k] = released.square().mean().sqrt()
        for i, rows in enumerate(config.rows):
            without, with_ = rest[:rows].numpy(), (rest + records)[:, :rows].numpy()
            for j, std in enumerate(noise_std):
                seen = (released + std * noise)[:, :rows].numpy()
                scores[k, i, j] = score(seen, without, with_, rank, float(std))
    sizes = torch.linalg.vector_norm(records, dim=2) / torch.linalg.vector_norm(rest, dim=1)
    return Result(
        config=config,
        provenance=artifacts.provenance(seed=config.gradients.seed, device=config.gradients.device),
        privacy=artifacts.NON_PRIVATE,
        description=source.description,
        layer=layer,
        shape=shape,
        noise_std=noise_std,
        release_rms=release_rms,
        relative_size=(torch.linalg.vector_norm(records, dim=(1, 2)) / rest.norm()).numpy(),
        scores=scores,
        auc=np.apply_along_axis(lambda s: _auc(s, member), -1, scores),
        gaussian_reading=np.array(
            [
                [gaussian_reading(sizes[:, :rows].numpy(), member, rank) for rows in config.rows]
                for rank in config.ranks
            ]
        ),
    )


def headline(result: Result) -> dict[str, str]:
    """The result in a few numbers."""
    config = result.config
    which = ", ".join(map(str, config.rows))
    numbers = {}
    for k, rank in enumerate(config.ranks):
        for j in (0, len(config.noise_multipliers) - 1):
            noise = config.noise_multipliers[j]
            numbers[f"AUC, rank {rank}, noise {noise:g} C; {which} rows"] = ", ".join(
                f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in result.auc[k, :, j]
            )
        numbers[f"Gaussian reading's AUC, rank {rank}, no noise; {which} rows"] = ", ".join(
            f"{value:.3f}" for value in result.gaussian_reading[k]
        )
    numbers["release's rms entry, in C"] = ", ".join(
        f"rank {rank}: {rms / config.gradients.max_grad_norm:.1e}"
        for rank, rms in zip(config.ranks, result.release_rms, strict=True)
    )
    numbers["record's norm / rest's, median"] = f"{np.median(result.relative_size):.3f}"
    return numbers


def real_rows(
    source: Source,
    config: Config,
    generator: torch.Generator,
) -> tuple[str, tuple[int, ...], Tensor, Tensor]:
    """A middle layer's name and shape, and of its largest rows G0 and every record's own part.

    The rows are chosen by G0 alone, the largest first, and there are max(rows) = m of them. G0 is
    (m, n) and the records are (N, m, n) for N = 2 num_trials; float64 on the CPU, clipped, as
    summed in training.
    """
    needed = config.batch_size + 2 * config.num_trials
    if needed > len(source.rows):
        _validate.fail(
            "batch_size and num_trials",
            f"such that batch_size + 2 num_trials <= {len(source.rows)} records",
            needed,
        )
    chosen = source.sample(needed, generator)
    rest = source.clean_sum(chosen[: config.batch_size])
    name = spread_layers(rest, 1)[0]
    matrix = rest[name]
    m = _validate.integer("rows", max(config.rows), high=len(matrix))
    top = torch.linalg.vector_norm(matrix, dim=1).topk(m).indices
    records = [
        source.clean_sum([i])[name][top] for i in progress(chosen[config.batch_size :], "records")
    ]
    return (
        name,
        tuple(matrix.shape),
        matrix[top].double().cpu(),
        torch.stack(records).double().cpu(),
    )


def release(
    rest: Tensor, records: Tensor, member: NDArray[np.bool_], rank: int, generator: torch.Generator
) -> Tensor:
    """(N, m, n): for each trial G A^T A with its own A; G has the record in it iff ``member``.

    Args:
        rest: G0 (m, n).
        records: (N, m, n), one a trial.
        member: (N,).
        rank: of A, rank x n with independent N(0, 1/rank) entries.
        generator: of A, on the CPU.
    """
    return torch.stack(
        [
            lora.project(rest + record if inside else rest, rank, generator=generator)
            for record, inside in zip(records, member, strict=True)
        ]
    )


def score(released: Array, without: Array, with_: Array, rank: int, noise_std: float) -> Array:
    """(N,) one score a trial, higher = the record is in.

    One row: the log-likelihood ratio, the best test there is. Several: the difference of symmetry
    scores T0 - T1, where the true candidate has T = 0 up to rounding if there is no noise; it uses
    neither rank nor noise level.

    Args:
        released: R (N, m, n), noise included.
        without, with_: the candidates G0 and G1, (m, n) or (N, m, n), no row of them zero.
        rank: of A.
        noise_std: standard deviation of the noise in each entry of R, >= 0.
    """
    without, with_ = (np.broadcast_to(g, released.shape) for g in (without, with_))
    if released.shape[1] == 1:
        y, q0, q1 = released[:, 0], without[:, 0], with_[:, 0]
        return row_logpdf(y, q1, rank, noise_std) - row_logpdf(y, q0, rank, noise_std)
    return np.array(
        [
            theory.symmetry_score(y, g0) - theory.symmetry_score(y, g1)
            for y, g0, g1 in zip(released, without, with_, strict=True)
        ]
    )


def row_logpdf(y: Array, q: Array, rank: int, noise_std: float) -> Array:
    """Log-density of A^T A q + N(0, noise_std^2 I) at ``y``; both (..., n), result (...).

    Without noise that is `theory.projection_logpdf`, -inf off its support. With it, given
    s = |A q|^2 / |q|^2 (chi^2_rank / rank), y is Gaussian: along q with mean s |q| and variance
    noise_std^2, in each direction across q with mean 0 and variance s |q|^2 / rank + noise_std^2.
    What remains is one integral over s, taken in t = ln s by the trapezoidal rule on the part of
    the axis that holds all but e^-40 of it, and so exact to about 1e-7.
    """
    if noise_std == 0:
        return np.asarray(theory.projection_logpdf(y, q, rank))
    n, norm = q.shape[-1], np.linalg.norm(q, axis=-1)
    along = np.sum(y * q, axis=-1) / norm
    across2 = np.square(y - (along / norm)[..., None] * q).sum(axis=-1)

    def log_integrand(t: Array) -> Array:
        s = np.exp(t)
        variance = s * norm**2 / rank + noise_std**2
        return (
            rank / 2 * (t - s)
            - ((along - s * norm) / noise_std) ** 2 / 2
            - ((n - 1) * np.log(variance) + across2 / variance) / 2
        )

    # every factor falls beyond the largest of 1 and the two estimates of s
    largest = np.maximum(np.maximum(1.0, along / norm), across2 * rank / (max(n - 1, 1) * norm**2))
    low, high = np.full_like(norm, -70.0), np.log(largest) + 6
    for points in (200, 200, 200, 200, 1000):
        t = np.linspace(low, high, points)  # (points, ...)
        values = log_integrand(t)
        matters = values > values.max(axis=0) - 40
        first = np.maximum(matters.argmax(axis=0) - 1, 0)
        last = np.minimum(points - matters[::-1].argmax(axis=0), points - 1)
        low, high = (np.take_along_axis(t, end[None], axis=0)[0] for end in (first, last))
    integral = special.logsumexp(values, axis=0) + np.log(t[1] - t[0])
    constant = (
        rank / 2 * np.log(rank / 2)
        - special.gammaln(rank / 2)
        - np.log(noise_std)
        - n / 2 * np.log(2 * np.pi)
    )
    return integral + constant


def gaussian_reading(sizes: Array, member: NDArray[np.bool_], rank: int) -> float:
    """AUC of the best attack without added noise, were the projection's noise Gaussian.

    Reads row i of G A^T A as g_i + N(0, |g_i|^2 I / rank), independent of the others and the same
    in both worlds (2409.17538). The log-likelihood ratio of a record is then N(+-mu^2 / 2, mu^2)
    with mu^2 = rank sum_i ``sizes``_i^2, so that a member with mu beats a non-member with mu' with
    probability Phi(sqrt(mu^2 + mu'^2) / 2); averaged over all pairs.

    Args:
        sizes: (N, m), |row i of the record| / |row i of G0|.
        member: (N,).
        rank: of A.
    """
    mu2 = rank * np.square(sizes).sum(axis=1)
    return float(special.ndtr(np.sqrt(mu2[member][:, None] + mu2[~member]) / 2).mean())


def _auc(scores: Array, member: NDArray[np.bool_]) -> tuple[float, float, float]:
    measured = auc(scores, member)
    return measured.value, *measured.ci


def _check(config: Config) -> None:
    """Refuse a config that no model could run."""
    _validate.integer("num_trials", config.num_trials, low=2)
    for name, values in (("ranks", config.ranks), ("rows", config.rows)):
        if not values:
            _validate.fail(name, "at least one integer", values)
        for value in values:
            _validate.integer(name, value)
    levels = [_validate.real("noise_multipliers", x, low=0) for x in config.noise_multipliers]
    if not levels or sorted(set(levels)) != levels:
        _validate.fail(
            "noise_multipliers", "rising numbers, at least one", config.noise_multipliers
        )
