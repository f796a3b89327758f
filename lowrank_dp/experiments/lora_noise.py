"""Claim: LoRA's projection adds nearly Gaussian noise of variance |q|^2 / rank (arXiv 2409.17538).

The claimed variance is exact up to the coordinate's own share of |q|^2. The distribution is not
Gaussian: its kurtosis is 3 + 6/rank or more, at any width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_dp import lora
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import (
    GradientConfig,
    GradientSource,
    largest_rows,
    prepare,
    rows_of,
    spread_layers,
)
from lowrank_dp.mechanism import NON_PRIVATE
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
    """Measured models, layers and ranks.

    Attributes:
        gradients: model, task and clipping; cold by default, since the distribution does not
            depend on how far the model is trained.
        more_models: further backbones on the same task; ``Result.skipped`` names the ones that
            are not installed.
        batch_size: examples whose clipped gradients are summed.
        ranks: ranks of A.
        num_layers: largest number of layers per model, no two of one shape.
        num_rows: largest number of rows per layer.
        num_draws: draws of A per layer and rank.
        vector_size: length n of the fixed vector.
        vector_draws: draws of A for the fixed vector.
        density_ranks: ranks of the exact densities.
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
    """Moments of the noise: (sources, ranks), in the order of ``sources`` and ``config.ranks``."""

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
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
    density_x: np.ndarray  # (X,) points, in standard deviations of the noise
    density: np.ndarray  # (density_ranks, X) of the standardised noise


def run(config: Config, source: GradientSource | None = None) -> Result:
    """Measure the moments; a missing ``source`` is prepared."""
    generator = torch.Generator().manual_seed(config.gradients.seed + 1)
    vector = torch.randn(1, config.vector_size, generator=generator, dtype=torch.float64)
    measured = {f"fixed vector, n={config.vector_size}": (vector, config.vector_draws)}
    sources, skipped = _prepare_all(config, source)
    for each in sources:
        clean = each.clean_sum(each.sample(config.batch_size, generator))
        model = each.description.split()[0]
        for name in spread_layers(each.model, clean, config.num_layers):
            matrix = rows_of(each.model, clean, name)
            rows = largest_rows(matrix, config.num_rows).cpu()
            measured[_label(model, name, matrix)] = rows, config.num_draws

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
    x = np.linspace(-6, 6, 800)  # an even number of points avoids the pole at 0
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        description="; ".join(each.description for each in sources),
        skipped=tuple(skipped),
        sources=tuple(measured),
        variance=_collect(moments, "variance"),
        variance_ci=_collect(moments, "variance_ci"),
        variance_exact=_collect(moments, "variance_exact"),
        kurtosis=_collect(moments, "kurtosis"),
        kurtosis_ci=_collect(moments, "kurtosis_ci"),
        kurtosis_exact=_collect(moments, "kurtosis_exact"),
        one_hot_inits=inits,
        one_hot_variance=_collect(one_hot, "variance"),
        one_hot_variance_ci=_collect(one_hot, "variance_ci"),
        one_hot_variance_exact=_collect(one_hot, "variance_exact"),
        density_x=x,
        density=np.array(
            [_density(x, rank, 1 / config.vector_size) for rank in config.density_ranks]
        ),
    )


def _prepare_all(
    config: Config, source: GradientSource | None
) -> tuple[list[GradientSource], list[str]]:
    """Prepare every model; return the sources, and an error message per missing model."""
    sources, skipped = [source or prepare(config.gradients)], []
    for name in config.more_models:
        try:
            sources.append(prepare(replace(config.gradients, model=name)))
        except ValueError as error:
            skipped.append(str(error))
    return sources, skipped


def _density(x: np.ndarray, rank: int, beta2: float) -> np.ndarray:
    """Return the density of the noise, standardised to variance 1, at ``x``."""
    sd = np.sqrt((1 + beta2) / rank)
    return np.exp(noise_logpdf(x * sd, rank, beta2=beta2)) * sd


def headline(result: Result) -> dict[str, str]:
    """Summarise the result in a few numbers."""
    ratio = result.variance / result.variance_exact
    inside = np.abs(result.variance - result.variance_exact) <= result.variance_ci
    excess = result.kurtosis[0] - 3
    left_out = {"models left out": "; ".join(result.skipped)} if result.skipped else {}
    return left_out | {
        "measured variance / formula": f"{ratio.min():.3f} to {ratio.max():.3f}",
        "95% intervals that hold the formula": f"{inside.sum()} of {inside.size}",
        "excess kurtosis, fixed vector": ", ".join(
            f"rank {rank}: {value:.2f}"
            for rank, value in zip(result.config.ranks, excess, strict=True)
        ),
    }


def _label(model: str, name: str, matrix: Tensor) -> str:
    """Label a layer by model, shortened name and shape: ``minilm 3.attention.query 384x384``."""
    parts = re.sub(r"^.*?\.(?=\d)|(\.dense)?\.weight$|\.(self|self_attn|mlp)(?=\.)", "", name)
    return f"{model} {parts} {matrix.shape[0]}x{matrix.shape[1]}"


def _collect(moments: Sequence[Sequence[lora.NoiseMoments]], key: str) -> np.ndarray:
    return np.array([[getattr(point, key) for point in row] for row in moments])
