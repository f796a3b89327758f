"""Alignment of each scheme's restored gradient with the clean one, by batch size and noise.

Alignment is the cosine with the clean clipped sum, by layer. The cosine ignores scale, so the
error is measured too: the Frobenius distance to the clean sum over all layers together, relative
to the norm of the clean sum. This experiment restores by the exact decomposition; ``spectra`` and
training use the fast path.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lowrank_dp import _validate
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import GradientConfig, GradientSource, add_noise, prepare
from lowrank_dp.experiments.intervals import with_interval
from lowrank_dp.experiments.scheme_scores import Scheme, cosine, distance, measure_schemes
from lowrank_dp.mechanism import NON_PRIVATE
from lowrank_dp.plan import making

# label -> scheme and options; the two oracles are NON-PRIVATE upper limits
SCHEMES: dict[str, Scheme] = {
    **making.SCHEMES,
    "oracle profile": ("oracle", {"values": "profile"}),
    "oracle weights": ("oracle", {"values": "weights"}),
}
CAPTION = (
    "Mean over layers of the cosine between the clean clipped gradient sum and what each scheme "
    "makes of the noisy one, by batch size and by noise multiplier; bars are 95% t-intervals over "
    "noise draws. c: distance to the clean gradient over all layers. Layers with nothing above the "
    "bulk edge are left unchanged, or zeroed where it says so. The oracles use the clean "
    "gradient. NON-PRIVATE: a diagnosis."
)


@dataclass(frozen=True)
class Config:
    """Batch sizes and noise levels of the comparison.

    Attributes:
        gradients: model, task and clipping.
        batch_sizes: batch sizes, measured at the first noise multiplier; smaller batches are
            prefixes of the largest.
        noise_multipliers: sigma, relative to ``gradients.max_grad_norm``; all but the first are
            measured at the largest batch only.
        noise_seeds: number of noise draws, 2 or more.
    """

    gradients: GradientConfig = field(default_factory=GradientConfig)
    batch_sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4000)
    noise_multipliers: tuple[float, ...] = (0.6, 0.3, 1.0, 2.0)
    noise_seeds: int = 3


@dataclass(frozen=True)
class Result:
    """Alignment and error of every scheme.

    ``alignment`` is (settings, schemes, noise seeds, layers), in [-1, 1]; ``error`` (settings,
    schemes, noise seeds) is the distance to the clean sum, relative to the clean norm. A setting is
    a batch size with a noise multiplier.
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    loss: float
    schemes: tuple[str, ...]
    layers: tuple[str, ...]
    batch_size: np.ndarray  # (settings,)
    noise_multiplier: np.ndarray  # (settings,)
    alignment: np.ndarray
    error: np.ndarray
    num_above_edge: np.ndarray  # (settings, noise seeds): layers with a value above the edge


def run(config: Config, source: GradientSource | None = None) -> Result:
    """Measure every scheme at every setting; a missing ``source`` is prepared.

    Raises ValueError if ``noise_seeds`` is below 2.
    """
    _validate.integer("noise_seeds", config.noise_seeds, low=2)
    source = source or prepare(config.gradients, max(config.batch_sizes))
    sizes = sorted(config.batch_sizes)
    sums = source.nested_sums(sizes)
    profiles = {
        (size, name): torch.linalg.svdvals(matrix)
        for size, matrices in sums.items()
        for name, matrix in matrices.items()
    }
    first, *others = config.noise_multipliers
    settings = [(size, first) for size in sizes] + [(sizes[-1], sigma) for sigma in others]
    products = np.zeros((len(settings), len(SCHEMES), config.noise_seeds, len(source.matrices), 3))
    above = np.zeros((len(settings), config.noise_seeds), dtype=int)
    cells = [(i, seed) for i in range(len(settings)) for seed in range(config.noise_seeds)]
    for i, seed in progress(cells, "schemes"):
        size, sigma = settings[i]
        noise_std = sigma * config.gradients.max_grad_norm
        noisy = add_noise(sums[size], noise_std, config.gradients.seed + seed)
        for layer, name in enumerate(source.matrices):
            products[i, :, seed, layer], acted = measure_schemes(
                noisy[name], sums[size][name], noise_std, SCHEMES.values(), profiles[size, name]
            )
            above[i, seed] += acted[list(SCHEMES).index("optimal")]
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        description=source.description,
        loss=source.loss,
        schemes=tuple(SCHEMES),
        layers=tuple(source.matrices),
        batch_size=np.array([size for size, _ in settings]),
        noise_multiplier=np.array([sigma for _, sigma in settings]),
        alignment=cosine(products),
        error=distance(products.sum(-2)),
        num_above_edge=above,
    )


def headline(result: Result) -> dict[str, str]:
    """Summarise: mean alignment per scheme at the largest batch and first noise multiplier."""
    best = np.flatnonzero(
        (result.batch_size == result.batch_size.max())
        & (result.noise_multiplier == result.noise_multiplier[0])
    )[0]
    return {
        f"mean alignment, {scheme}": f"{result.alignment[best, j].mean():.3f}"
        for j, scheme in enumerate(result.schemes)
    }


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate each scheme at each setting, with 95% t-intervals over noise draws."""
    settings = zip(result.batch_size, result.noise_multiplier, strict=True)
    rows = [
        [
            str(size),
            f"{sigma:g}",
            scheme,
            with_interval(result.alignment[i, j].mean(-1)),
            with_interval(result.error[i, j]),
        ]
        for i, (size, sigma) in enumerate(settings)
        for j, scheme in enumerate(result.schemes)
    ]
    return [
        "batch size",
        "noise multiplier",
        "scheme",
        "alignment, mean over layers",
        "error",
    ], rows
