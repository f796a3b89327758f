"""Claim: one vector's random projection is private under an angle bound (arXiv 2601.21719).

Theorem 1 of Hu et al. bounds epsilon of q -> A^T A q by the largest angle between neighbouring
vectors. The experiment compares this bound with the exact law and with the Gaussian reading. It
also measures the angles by which one example turns real gradients, and computes the epsilon of many
steps with a fresh A each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_dp import _validate, theory
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import (
    GradientConfig,
    GradientSource,
    prepare,
    rows_of,
    spread_layers,
)
from lowrank_dp.mechanism import NON_PRIVATE
from lowrank_dp.theory.privacy import PROFILE_ERROR

QUANTILES = {"median": 0.5, "95%": 0.95, "largest": 1.0}
CAPTION = (
    "Privacy of one released vector A^T A q against a neighbour q' of the same norm. (a) Epsilon "
    "at the delta of theorem 1 of Hu et al. (arXiv 2601.21719), as its formula was read from a "
    "summary: the theorem, and the exact law at the same delta. (b) Delta at epsilon 1: exact, and "
    "by the Gaussian reading of arXiv 2409.17538. The error of the exact delta is up to "
    f"{PROFILE_ERROR:g}, and a smaller delta is shown as < {PROFILE_ERROR:g}. (c) Angle between a "
    "row of a layer's clipped gradient sum with and without one example, over all rows and "
    "examples. (d) Epsilon of many steps with a fresh A each, by the exact law, composed. A frozen "
    "A, which steps share, and two or more rows that share A have delta 1; a row of a gradient "
    "matrix is no vector query unless it is released alone. NON-PRIVATE: the angles are computed "
    "from clean gradients."
)


@dataclass(frozen=True)
class Config:
    """Grids of the laws, and the measured gradients.

    Attributes:
        gradients: model, task and clipping of panel (c).
        width: length n of the vector.
        ranks: ranks r of A in panels (a) and (b).
        angles: angles between neighbours, in radians, of panels (a) and (b).
        tail: delta' of the theorem, in (0, 1/3).
        composed_rank: rank of A in panel (d).
        composed_angles: angles between neighbours, in radians, of panel (d).
        steps: numbers of steps of panel (d).
        delta: delta of panel (d).
        batch_sizes: numbers of examples in the sums of panel (c), in increasing order.
        num_examples: number of examples that are removed, one at a time; at most the smallest
            batch.
        num_layers: number of measured layers, one of each shape.
    """

    gradients: GradientConfig = field(
        default_factory=lambda: GradientConfig(warm_loss=None, max_length=64)
    )
    width: int = 768
    ranks: tuple[int, ...] = (4, 16, 64)
    angles: tuple[float, ...] = tuple(float(a) for a in np.geomspace(1e-3, 0.3, 13).round(6))
    tail: float = 1e-3
    composed_rank: int = 16
    composed_angles: tuple[float, ...] = (0.003, 0.01, 0.03)
    steps: tuple[int, ...] = (1, 3, 10, 30, 100, 300)
    delta: float = 1e-5
    batch_sizes: tuple[int, ...] = (16, 64, 256, 1024)
    num_examples: int = 16
    num_layers: int = 3


SMALL = Config(
    angles=tuple(float(a) for a in np.geomspace(1e-3, 0.3, 7).round(6)),
    composed_angles=(0.003, 0.01),
    steps=(1, 10, 100),
    batch_sizes=(16, 64, 256),
    num_examples=8,
)


@dataclass(frozen=True)
class Result:
    """Computed epsilons and deltas, and measured angles.

    ``angle`` is in radians, and ``log_ratio`` is |log(|q'| / |q|)|. Both are (layers, batch sizes,
    quantiles): the quantiles ``QUANTILES`` over rows and removed examples.
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    layers: tuple[str, ...]
    hu_epsilon: np.ndarray  # (ranks, angles); infinite where the theorem says nothing
    hu_delta: np.ndarray
    exact_epsilon: np.ndarray  # at hu_delta
    exact_delta: np.ndarray  # at epsilon 1
    gaussian_delta: np.ndarray
    composed: np.ndarray  # (composed angles, steps)
    angle: np.ndarray
    log_ratio: np.ndarray


def run(config: Config, source: GradientSource | None = None) -> Result:
    """Compute the laws and measure the angles; a missing ``source`` is prepared.

    Raises ValueError if ``num_examples`` exceeds the smallest batch.
    """
    sizes = sorted(config.batch_sizes)
    _validate.integer("num_examples", config.num_examples, high=sizes[0])
    source = source or prepare(config.gradients, sizes[-1])
    ranks, angles = np.array(config.ranks)[:, None], np.array(config.angles)
    hu_epsilon, hu_delta = theory.hu_guarantee(ranks, config.width, angle=angles, tail=config.tail)
    exact = np.zeros((len(config.ranks), len(config.angles)))
    for i, j in progress([*np.ndindex(exact.shape)], "exact epsilon"):
        exact[i, j] = theory.projection_epsilon(
            float(np.asarray(hu_delta)[i, j]), config.ranks[i], config.width, angle=angles[j]
        )
    composed = np.zeros((len(config.composed_angles), len(config.steps)))
    for i, j in progress([*np.ndindex(composed.shape)], "composed epsilon"):
        composed[i, j] = theory.projection_epsilon(
            config.delta,
            config.composed_rank,
            config.width,
            angle=config.composed_angles[i],
            steps=config.steps[j],
        )
    layers, angle, log_ratio = _measured(config, source, sizes)
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        description=source.description,
        layers=layers,
        hu_epsilon=np.asarray(hu_epsilon),
        hu_delta=np.asarray(hu_delta),
        exact_epsilon=exact,
        exact_delta=np.asarray(theory.privacy_profile(1.0, ranks, config.width, angle=angles)),
        gaussian_delta=np.asarray(theory.gaussian_privacy_profile(1.0, ranks, angle=angles)),
        composed=composed,
        angle=angle,
        log_ratio=log_ratio,
    )


def _measured(
    config: Config, source: GradientSource, sizes: list[int]
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Measure the change of each row of each sum when one example is removed."""
    sums = source.nested_sums(sizes)
    chosen = source.sample(sizes[-1], torch.Generator().manual_seed(source.config.seed + 1))
    layers = tuple(spread_layers(source.model, sums[sizes[-1]], config.num_layers))
    angles, ratios = ([[list[np.ndarray]() for _ in sizes] for _ in layers] for _ in range(2))
    for k in progress(range(config.num_examples), "angles"):
        own = source.clean_sum(chosen[k : k + 1])
        for i, name in enumerate(layers):
            for j, size in enumerate(sizes):
                whole = rows_of(source.model, sums[size], name)
                record = rows_of(source.model, own, name)
                angle_of_rows, ratio_of_rows = _row_changes(whole, whole - record)
                angles[i][j].append(angle_of_rows)
                ratios[i][j].append(ratio_of_rows)
    quantiles = list(QUANTILES.values())
    angle, log_ratio = (
        np.array([[np.quantile(np.concatenate(one), quantiles) for one in layer] for layer in both])
        for both in (angles, ratios)
    )
    return layers, angle, log_ratio


def _row_changes(matrix: Tensor, other: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return, per row of two matrices, the angle in radians and |log of the ratio of norms|.

    Both results are (rows,). A row that is zero in one of the matrices is left out.
    """
    a, b = matrix.double().cpu(), other.double().cpu()
    norm_a, norm_b = (torch.linalg.vector_norm(x, dim=1) for x in (a, b))
    kept = (norm_a > 0) & (norm_b > 0)
    u, v = a[kept] / norm_a[kept, None], b[kept] / norm_b[kept, None]
    half = torch.atan2(
        torch.linalg.vector_norm(u - v, dim=1), torch.linalg.vector_norm(u + v, dim=1)
    )
    return (2 * half).numpy(), (norm_b[kept] / norm_a[kept]).log().abs().numpy()


def headline(result: Result) -> dict[str, str]:
    """Summarise the result in a few numbers."""
    config = result.config
    known = np.isfinite(result.hu_epsilon) & (result.exact_epsilon > 0)
    ratios = (result.hu_epsilon / np.where(known, result.exact_epsilon, 1.0))[known]
    lines = {
        "theorem's epsilon over the exact one, at the theorem's delta": (
            f"{ratios.min():.1f} to {ratios.max():.0f}"
        ),
        "exact delta at the theorem's epsilon is smaller": (
            "always" if (result.exact_epsilon <= result.hu_epsilon).all() else "not always"
        ),
    }
    for i, size in enumerate(sorted(config.batch_sizes)):
        median, _, largest = result.angle[:, i].max(axis=0)
        lines[f"angle by one example, batch {size} (NON-PRIVATE): median, largest"] = (
            f"{median:.2g}, {largest:.2g} rad"
        )
    for angle, epsilons in zip(config.composed_angles, result.composed, strict=True):
        lines[
            f"epsilon at delta {config.delta:g}, angle {angle:g}, rank {config.composed_rank}"
        ] = ", ".join(f"{e:.3g} after {s}" for s, e in zip(config.steps, epsilons, strict=True))
    return lines


def _exact_cell(delta: float) -> str:
    """Format a computed delta; a delta below its error becomes a bound."""
    return f"< {PROFILE_ERROR:g}" if delta < PROFILE_ERROR else f"{delta:.3g}"


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate, by rank and angle, the theorem and the exact law."""
    columns = [
        "rank",
        "angle",
        "theorem's delta",
        "theorem's epsilon",
        "exact epsilon at that delta",
        "exact delta at epsilon 1",
        "Gaussian reading's delta at epsilon 1",
    ]
    config = result.config
    rows = [
        [
            str(config.ranks[i]),
            f"{config.angles[j]:g}",
            f"{result.hu_delta[i, j]:.3g}",
            f"{result.hu_epsilon[i, j]:.3g}",
            f"{result.exact_epsilon[i, j]:.3g}",
            _exact_cell(float(result.exact_delta[i, j])),
            f"{result.gaussian_delta[i, j]:.3g}",
        ]
        for i, j in np.ndindex(result.hu_epsilon.shape)
    ]
    return columns, rows
