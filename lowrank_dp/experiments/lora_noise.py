"""Claim: LoRA's projection adds nearly Gaussian noise of variance |q|^2 / rank (2409.17538).

The variance is right up to the coordinate's own share of q. The law is not Gaussian: its kurtosis
is 3 + 6/rank and more, at any width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_dp import artifacts, lora
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import (
    GradientConfig,
    Source,
    largest_rows,
    prepare,
    spread_layers,
)
from lowrank_dp.theory import noise_logpdf

CAPTION = (
    "LoRA's implicit noise u = q(A^T A - I), in units of |q|. (a) Variance against rank: points "
    "are measured over draws that form A, with 95% intervals, for a fixed vector and for rows of "
    "real layers' gradients; lines are the formula (1 + beta^2)/r, and for the one nonzero "
    "coordinate of a one-hot vector (1 + beta^2 (kurtosis(A) - 2))/r: 2/r for a Gaussian A, 0.8/r "
    "for PEFT's uniform A rescaled. (b) Exact density of one coordinate (solid) against the "
    "Gaussian of the same variance (black). (c) Kurtosis: measured points, exact lines. The claim "
    "of Gaussian noise (2409.17538) holds for one coordinate as the rank grows, not as the width "
    "does. NON-PRIVATE: the rows are clean gradients."
)


@dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
        gradients: the model and task; the law does not depend on how far it is trained, so by
            default it is measured cold.
        more_models: further backbones on the same task; one that is not installed is left out,
            and ``Result.skipped`` says so.
        batch_size: examples whose clipped gradients are summed.
        ranks: of A.
        num_layers, num_rows: of each model at most so many layers, of different shapes, and so
            many rows of each.
        num_draws: of A, for each layer and rank.
        vector_size, vector_draws: n of the fixed vector, and its draws.
        density_ranks: of the exact densities.
    """

    gradients: GradientConfig = field(
        default_factory=lambda: GradientConfig(warm_loss=None, max_length=64)
    )
    more_models: tuple[str, ...] = ("smollm2",)
    batch_size: int = 64
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    num_layers: int = 3
    num_rows: int = 64
    num_draws: int = 400
    vector_size: int = 768
    vector_draws: int = 4000
    density_ranks: tuple[int, ...] = (1, 4, 16, 64)


SMALL = Config(
    more_models=(),
    batch_size=32,
    ranks=(1, 2, 4, 8, 16, 64),
    num_rows=32,
    num_draws=200,
    vector_size=256,
    vector_draws=1000,
)


@dataclass(frozen=True)
class Result:
    """Moments are (sources, ranks), in the order of ``sources`` and ``config.ranks``."""

    config: Config
    provenance: dict[str, Any]
    privacy: str
    description: str
    skipped: tuple[str, ...]
    sources: tuple[str, ...]  # the fixed vector first, then real layers
    variance: np.ndarray  # in units of |q|^2, mean over coordinates
    variance_ci: np.ndarray  # half-widths of 95 % intervals over draws of A
    variance_exact: np.ndarray
    kurtosis: np.ndarray
    kurtosis_ci: np.ndarray
    kurtosis_exact: np.ndarray
    one_hot_inits: tuple[str, ...]
    one_hot_variance: np.ndarray  # (inits, ranks): the coordinate that carries all of q
    one_hot_variance_ci: np.ndarray
    one_hot_variance_exact: np.ndarray
    density_x: np.ndarray  # (X,) in standard deviations
    density: np.ndarray  # (density_ranks, X) of the standardised noise


def run(config: Config, source: Source | None = None) -> Result:
    """Measure, on ``source`` (of ``config.gradients``) if it was prepared already."""
    seed, device = config.gradients.seed, config.gradients.device
    generator = torch.Generator().manual_seed(seed + 1)
    vector = torch.randn(1, config.vector_size, generator=generator, dtype=torch.float64)
    measured = {f"fixed vector, n={config.vector_size}": (vector, config.vector_draws)}
    sources, skipped = [source or prepare(config.gradients)], []
    for name in config.more_models:
        try:
            sources.append(prepare(replace(config.gradients, model=name)))
        except ValueError as error:
            skipped.append(str(error))
    for each in sources:
        clean = each.clean_sum(each.sample(config.batch_size, generator))
        model = each.description.split()[0]
        for name in spread_layers(clean, config.num_layers):
            rows = largest_rows(clean[name], config.num_rows).cpu()
            measured[_label(model, name, clean[name])] = rows, config.num_draws

    moments = [
        [lora.measure_noise(matrix, rank, draws, generator=generator) for rank in config.ranks]
        for matrix, draws in progress(list(measured.values()), "projection noise")
    ]
    inits = tuple(lora.ENTRY_KURTOSIS)
    one_hot = [
        [
            lora.measure_noise(
                torch.ones(1, 1), rank, config.vector_draws, init=init, generator=generator
            )
            for rank in config.ranks
        ]
        for init in inits
    ]
    x = np.linspace(-6, 6, 800)  # an even number of points: none at the pole near 0
    beta2 = 1 / config.vector_size

    def density(rank: int) -> np.ndarray:
        sd = np.sqrt((1 + beta2) / rank)
        return np.exp(noise_logpdf(x * sd, rank, beta2=beta2)) * sd

    return Result(
        config=config,
        provenance=artifacts.provenance(seed=seed, device=device),
        privacy=artifacts.NON_PRIVATE,
        description="; ".join(each.description for each in sources),
        skipped=tuple(skipped),
        sources=tuple(measured),
        **{
            key: _table(moments, key)
            for key in (
                "variance",
                "variance_ci",
                "variance_exact",
                "kurtosis",
                "kurtosis_ci",
                "kurtosis_exact",
            )
        },
        one_hot_inits=inits,
        one_hot_variance=_table(one_hot, "variance"),
        one_hot_variance_ci=_table(one_hot, "variance_ci"),
        one_hot_variance_exact=_table(one_hot, "variance_exact"),
        density_x=x,
        density=np.array([density(rank) for rank in config.density_ranks]),
    )


def headline(result: Result) -> dict[str, str]:
    """The result in a few numbers."""
    ratio = result.variance / result.variance_exact
    inside = np.abs(result.variance - result.variance_exact) <= result.variance_ci
    excess = result.kurtosis[0] - 3
    return {
        "measured variance / formula": f"{ratio.min():.3f} to {ratio.max():.3f}",
        "95% intervals that hold the formula": f"{inside.sum()} of {inside.size}",
        "excess kurtosis, fixed vector": ", ".join(
            f"rank {rank}: {value:.2f}"
            for rank, value in zip(result.config.ranks, excess, strict=True)
        ),
    }


def _label(model: str, name: str, matrix: Tensor) -> str:
    """``minilm 3.attention.query 384x384``: the model, what tells the layer, m x n."""
    parts = re.sub(r"^.*?\.(?=\d)|(\.dense)?\.weight$|\.(self|self_attn|mlp)(?=\.)", "", name)
    return f"{model} {parts} {matrix.shape[0]}x{matrix.shape[1]}"


def _table(moments: Sequence[Sequence[lora.NoiseMoments]], key: str) -> np.ndarray:
    return np.array([[getattr(point, key) for point in row] for row in moments])
