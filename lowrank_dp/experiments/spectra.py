"""Claim: noise inflates every singular value of a low-rank gradient (arXiv 2510.01137).

The experiment measures the singular values of each layer's clipped gradient sum: clean, with
DP-SGD's noise, and restored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import GradientConfig, GradientSource, noisy_matrices, prepare
from lowrank_dp.mechanism import NON_PRIVATE
from lowrank_dp.restore import restored_values
from lowrank_dp.spectrum import alignment, decompose

CAPTION = (
    "Singular values of real layers' clipped gradient sums, in units of each layer's bulk edge "
    "noise_std (sqrt(m) + sqrt(n)): clean, with the Gaussian mechanism's noise, and restored by "
    "the optimal shrinker. The dotted line is the Marchenko-Pastur law of pure noise. (e) Every "
    "layer's top value, and the noisy value that random-matrix theory expects. (f) Effective rank, "
    "with its logarithm, the entropy, on the right; crosses, that of pure noise. (g) Squared "
    "cosines of the eight leading pairs of noisy and clean singular vectors, measured and "
    "expected; the theory is asymptotic, and does not hold for a classifier's head of two rows. "
    "NON-PRIVATE: the clean values are shown for comparison."
)


@dataclass(frozen=True)
class Config:
    """One batch and one noise level.

    Attributes:
        gradients: model, task and clipping.
        batch_size: examples in the gradient sum.
        noise_multiplier: sigma, relative to ``gradients.max_grad_norm``.
        scheme: name in ``restore.SCHEMES``.
    """

    gradients: GradientConfig = field(default_factory=GradientConfig)
    batch_size: int = 2048
    noise_multiplier: float = 0.6
    scheme: str = "optimal"


@dataclass(frozen=True)
class Result:
    """Spectra of L layers.

    Arrays are (L,), or (L, K) padded with NaN, where K is the largest number of singular values.
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    loss: float
    noise_std: float  # absolute, on the clipped sum
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


def run(
    config: Config, source: GradientSource | None = None, say: Callable[[str], None] | None = None
) -> Result:
    """Measure the spectra; a missing ``source`` is prepared.

    ``say`` receives one line after the first micro-batch: an estimate of the time of all.
    Raises ValueError, which names the layer, if a layer received no gradient.
    """
    source = source or prepare(config.gradients, config.batch_size)
    noise_std = config.noise_multiplier * config.gradients.max_grad_norm
    clean = source.nested_sums([config.batch_size], say)[config.batch_size]
    noisy = noisy_matrices(clean, noise_std, config.gradients.seed)
    rows = [
        _measure(name, clean[name], matrix, noise_std, config.scheme)
        for name, matrix in progress(noisy, "singular values", total=len(clean))
    ]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    actions = tuple(columns.pop("actions"))
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        description=source.description,
        loss=source.loss,
        noise_std=noise_std,
        layers=tuple(clean),
        actions=actions,
        **{key: _stack(values) for key, values in columns.items()},
    )


def _measure(
    name: str, clean: Tensor, noisy: Tensor, noise_std: float, scheme: str
) -> dict[str, Any]:
    """Measure one layer: the fields of :class:`Result`, without the axis of the layers."""
    try:
        before = decompose(clean, 0.0)
    except ValueError as error:
        raise ValueError(f"gradient of {name}: {error}") from error
    after = decompose(noisy, noise_std)
    restored = restored_values(after.s, after.shape, noise_std, scheme)
    left, right = after.overlap(before)
    aligned = alignment(noisy, clean)
    if torch.equal(restored, after.s):
        action, aligned_restored = "passed" if scheme == "none" else "kept", aligned
    else:
        action = "restored"
        weights = ((after.u.mT @ clean) * after.vh).sum(-1)
        aligned_restored = float(
            restored.double()
            @ weights.double()
            / torch.linalg.vector_norm(restored, dtype=torch.float64)
            / torch.linalg.vector_norm(clean, dtype=torch.float64)
        )
    return {
        "shapes": after.shape,
        "edges": after.edge,
        "clean": before.s,
        "noisy": after.s,
        "restored": restored,
        "num_above_edge": after.num_above_edge,
        "effective_rank_clean": before.effective_rank,
        "effective_rank_noisy": after.effective_rank,
        "stable_rank_clean": before.stable_rank,
        "overlap_left": left[:8],
        "overlap_right": right[:8],
        "alignment_noisy": aligned,
        "alignment_restored": aligned_restored,
        "actions": action,
    }


def headline(result: Result) -> dict[str, str]:
    """Summarise the result in a few numbers."""
    above = int((result.num_above_edge > 0).sum())
    return {
        "training loss": f"{result.loss:.2f}",
        "layers with a value above the edge": f"{above} of {len(result.layers)}",
        "mean alignment, noisy": f"{result.alignment_noisy.mean():.3f}",
        f"mean alignment, {result.config.scheme}": f"{result.alignment_restored.mean():.3f}",
    }


def _stack(values: list[Any]) -> Any:
    """Stack numbers to an array, and vectors to rows that are padded with NaN to one length."""
    if not isinstance(values[0], Tensor):
        return np.asarray(values)
    out = np.full((len(values), max(len(v) for v in values)), np.nan, dtype=np.float32)
    for row, value in zip(out, values, strict=True):
        row[: len(value)] = value.cpu().numpy()
    return out
