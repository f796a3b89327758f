"""Ablation of restoration: kappa, norm correction, the threshold, and zeroing.

The scheme ``denoise`` (arXiv 2510.01137, version 1) has three parts. The scheme (A) keeps a layer
whose top singular value is at most kappa times the bulk edge, (B) shrinks the values of the other
layers, and (C) rescales to the noisy norm. The experiment varies one part at a time, on the noisy
gradients of ``alignment``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_dp import _validate
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import GradientConfig, GradientSource, add_noise, prepare
from lowrank_dp.experiments.intervals import with_interval
from lowrank_dp.experiments.scheme_scores import Array, Scheme, cosine, distance, measure_schemes
from lowrank_dp.mechanism import NON_PRIVATE

# label -> scheme and options; a layer with no value above the edge is kept, or zeroed as labelled
VARIANTS: dict[str, Scheme] = {
    "noisy": ("none", {}),
    "hard(edge), zeroed": ("hard", {"threshold": "edge", "below": "zero"}),
    "hard, zeroed": ("hard", {"below": "zero"}),
    "soft, zeroed": ("soft", {"below": "zero"}),
    "soft(optimal), zeroed": ("soft", {"threshold": "optimal", "below": "zero"}),
    "optimal, zeroed": ("optimal", {"below": "zero"}),
    "the same, 1% false spikes": ("optimal", {"below": "zero", "false_spike_rate": 0.01}),
    "optimal": ("optimal", {}),
    "denoise, zeroed": ("denoise", {"below": "zero"}),
    "denoise": ("denoise", {}),
}
CAPTION = (
    "Parts of restoring, varied one at a time; means over noise draws with 95% t-intervals. (a, b) "
    "denoise (2510.01137) against kappa: only a layer whose top value exceeds kappa times the bulk "
    "edge is restored, the others are kept as they are. (a) Mean over layers of the cosine with "
    "the clean gradient; rescaling a layer does not change it. (b) Distance to the clean gradient "
    "over all layers, with the rescaling to the noisy norm and without. (c, d) At the largest "
    "batch, thresholds and shrinkers; layers with nothing above the edge are zeroed (their cosine "
    "counts as 0) or kept, and denoise is `optimal` with norm correction. (c) Cosine, mean over "
    "layers (filled) and of all layers as one vector (hollow). (d) Distance; dotted, that of no "
    "gradient at all. NON-PRIVATE: a diagnosis."
)


@dataclass(frozen=True)
class Config:
    """Batches, noise level and kappas of the ablation.

    Attributes:
        gradients: model, task and clipping.
        batch_sizes: numbers of examples; smaller batches are prefixes of the largest.
        noise_multiplier: sigma, relative to ``gradients.max_grad_norm``.
        kappas: thresholds of ``denoise`` in units of the bulk edge, 1 or more.
        noise_seeds: number of noise draws, 2 or more.
    """

    gradients: GradientConfig = field(default_factory=GradientConfig)
    batch_sizes: tuple[int, ...] = (512, 1024, 2048, 4000)
    noise_multiplier: float = 0.6
    kappas: tuple[float, ...] = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
    noise_seeds: int = 5


SMALL = Config(batch_sizes=(512, 2048), kappas=(1.0, 1.25, 1.5, 2.0, 3.0, 5.0), noise_seeds=3)


@dataclass(frozen=True)
class Result:
    """Alignment and error of every variant.

    Arrays are (batch sizes, variants, noise seeds), batch sizes in rising order. ``alignment`` is
    the mean cosine over layers (0 for a zeroed layer), ``overall`` the cosine of all layers as one
    vector, ``error`` the distance relative to the clean norm, and ``restored`` the number of
    layers that were neither kept nor zeroed. The last variants are ``denoise`` at every kappa, with
    norm correction and then without; :meth:`by_kappa` returns these.
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    loss: float
    variants: tuple[str, ...]
    layers: tuple[str, ...]
    alignment: Array
    overall: Array
    error: Array
    restored: NDArray[np.int64]

    def by_kappa(self, values: np.ndarray) -> np.ndarray:
        """Select ``denoise``: (batch sizes, norm correction on and off, kappas, noise seeds)."""
        count = len(self.config.kappas)
        return values[:, -2 * count :].reshape(len(values), 2, count, -1)


def run(config: Config, source: GradientSource | None = None) -> Result:
    """Measure every variant; a missing ``source`` is prepared.

    Raises ValueError if ``noise_seeds`` is below 2 or a kappa below 1.
    """
    _validate.integer("noise_seeds", config.noise_seeds, low=2)
    kappas = [_validate.real("kappas", kappa, low=1) for kappa in config.kappas]
    source = source or prepare(config.gradients, max(config.batch_sizes))
    sums = source.nested_sums(config.batch_sizes)
    noise_std = config.noise_multiplier * config.gradients.max_grad_norm
    variants = VARIANTS | {
        f"denoise, kappa {kappa:g}, norm correction {'on' if correct else 'off'}": (
            "denoise",
            {"kappa": kappa, "norm_correction": correct},
        )
        for correct in (True, False)
        for kappa in kappas
    }
    shape = len(sums), len(variants), config.noise_seeds
    products = np.zeros((*shape, len(source.matrices), 3))
    restored = np.zeros(shape, dtype=int)
    cells = [(i, seed) for i in range(len(sums)) for seed in range(config.noise_seeds)]
    for i, seed in progress(cells, "variants"):
        clean = sums[sorted(sums)[i]]
        noisy = add_noise(clean, noise_std, config.gradients.seed + seed)
        for layer, (name, target) in enumerate(clean.items()):
            products[i, :, seed, layer], acted = measure_schemes(
                noisy[name], target, noise_std, variants.values()
            )
            restored[i, :, seed] += acted
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        description=source.description,
        loss=source.loss,
        variants=tuple(variants),
        layers=tuple(source.matrices),
        alignment=cosine(products).mean(-1),
        overall=cosine(products.sum(-2)),
        error=distance(products.sum(-2)),
        restored=restored,
    )


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate each variant at every batch size."""
    sizes = sorted(result.config.batch_sizes)
    columns = ["variant"] + [
        f"{what}, batch {size}"
        for size in sizes
        for what in ("alignment, mean over layers", "alignment, all layers as one", "error")
    ]
    rows = [
        [
            variant,
            *(
                with_interval(values[i, j])
                for i in range(len(sizes))
                for values in (result.alignment, result.overall, result.error)
            ),
        ]
        for j, variant in enumerate(result.variants)
    ]
    return columns, rows


def headline(result: Result) -> dict[str, str]:
    """Summarise the effect of each part of ``denoise`` at the largest batch size."""
    aligned, error, restored = (
        result.by_kappa(values)[-1].mean(-1)
        for values in (result.alignment, result.error, result.restored)
    )
    kappas = result.config.kappas
    numbers = {
        f"kappa {kappas[k]:g}: layers restored; mean alignment": (
            f"{restored[0, k]:.1f} of {len(result.layers)}; {aligned[0, k]:.3f}"
        )
        for k in (0, len(kappas) - 1)
    }
    numbers[f"error at kappa {kappas[0]:g}, norm correction on; off"] = (
        f"{error[0, 0]:.2f}; {error[1, 0]:.2f}"
    )
    for variant in ("denoise", "optimal", "optimal, zeroed"):
        j = result.variants.index(variant)
        numbers[f"{variant}: alignment of all layers as one; error"] = (
            f"{result.overall[-1, j].mean():.3f}; {result.error[-1, j].mean():.2f}"
        )
    return numbers
