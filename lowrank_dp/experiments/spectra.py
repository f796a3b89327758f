"""Claim: noise inflates every singular value of a gradient that has few large ones (2510.01137).

Singular values of each layer's clipped gradient sum: clean, with DP-SGD's noise, and restored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lowrank_dp import artifacts
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import GradientConfig, Source, add_noise, prepare
from lowrank_dp.restore import restore_with_report
from lowrank_dp.spectrum import Spectrum, alignment, decompose

CAPTION = (
    "Singular values of real layers' clipped gradient sums, in units of each layer's bulk edge "
    "noise_std (sqrt(m) + sqrt(n)): clean, with the Gaussian mechanism's noise, and restored by "
    "the optimal shrinker. The dotted line is the Marchenko-Pastur law of pure noise. "
    "NON-PRIVATE: the clean values are shown for comparison."
)


@dataclass(frozen=True)
class Config:
    """One batch and one noise level; ``noise_multiplier`` is relative to ``max_grad_norm``."""

    gradients: GradientConfig = field(default_factory=GradientConfig)
    batch_size: int = 2048
    noise_multiplier: float = 0.6
    scheme: str = "optimal"


@dataclass(frozen=True)
class Result:
    """Arrays are by layer (L,) or (L, K), padded with NaN to the widest layer's K values."""

    config: Config
    provenance: dict[str, Any]
    privacy: str
    description: str
    loss: float
    noise_std: float
    layers: tuple[str, ...]
    shapes: np.ndarray  # (L, 2)
    edges: np.ndarray
    clean: np.ndarray  # (L, K) singular values
    noisy: np.ndarray
    restored: np.ndarray
    num_above_edge: np.ndarray
    effective_rank_clean: np.ndarray
    effective_rank_noisy: np.ndarray
    stable_rank_clean: np.ndarray
    overlap_left: np.ndarray  # (L, 8) squared cosines, noisy against clean, leading pairs
    overlap_right: np.ndarray
    alignment_noisy: np.ndarray
    alignment_restored: np.ndarray
    actions: tuple[str, ...]


def run(config: Config, source: Source | None = None) -> Result:
    """Measure, on ``source`` if it was prepared already.

    Raises ``ValueError``, naming the layer, if a layer received no gradient at all.
    """
    source = source or prepare(config.gradients, config.batch_size)
    noise_std = config.noise_multiplier * config.gradients.max_grad_norm
    clean = source.nested_sums([config.batch_size])[config.batch_size]
    noisy = add_noise(clean, noise_std, config.gradients.seed)
    rows: list[dict[str, Any]] = []
    for name in progress(list(clean), "singular values"):
        try:
            before: Spectrum = decompose(clean[name], 0.0)
        except ValueError as error:
            raise ValueError(f"gradient of {name}: {error}") from error
        after = decompose(noisy[name], noise_std)
        matrix, (report,) = restore_with_report(noisy[name], noise_std, config.scheme)
        left, right = after.overlap(before)
        rows.append(
            {
                "shapes": after.shape,
                "edges": after.edge,
                "clean": before.s,
                "noisy": after.s,
                "restored": torch.linalg.svdvals(matrix),
                "num_above_edge": after.num_above_edge,
                "effective_rank_clean": before.effective_rank,
                "effective_rank_noisy": after.effective_rank,
                "stable_rank_clean": before.stable_rank,
                "overlap_left": left[:8],
                "overlap_right": right[:8],
                "alignment_noisy": alignment(noisy[name], clean[name]),
                "alignment_restored": (
                    alignment(matrix, clean[name]) if report.action != "zeroed" else 0.0
                ),
                "actions": report.action,
            }
        )
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    actions = tuple(columns.pop("actions"))
    return Result(
        config=config,
        provenance=artifacts.provenance(seed=config.gradients.seed, device=config.gradients.device),
        privacy=artifacts.NON_PRIVATE,
        description=source.description,
        loss=source.loss,
        noise_std=noise_std,
        layers=tuple(clean),
        actions=actions,
        **{key: _stack(values) for key, values in columns.items()},
    )


def headline(result: Result) -> dict[str, str]:
    """The result in a few numbers."""
    return {
        "training loss": f"{result.loss:.2f}",
        "layers with a value above the edge": f"{int((result.num_above_edge > 0).sum())} of {len(result.layers)}",
        "mean alignment, noisy": f"{result.alignment_noisy.mean():.3f}",
        f"mean alignment, {result.config.scheme}": f"{result.alignment_restored.mean():.3f}",
    }


def _stack(values: list[Any]) -> np.ndarray:
    """Numbers to an array; vectors of unequal length to rows padded with NaN."""
    if not isinstance(values[0], torch.Tensor):
        return np.asarray(values)
    out = np.full((len(values), max(len(v) for v in values)), np.nan, dtype=np.float32)
    for row, value in zip(out, values, strict=True):
        row[: len(value)] = value.cpu().numpy()
    return out
