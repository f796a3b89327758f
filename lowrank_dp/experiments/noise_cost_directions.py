"""Directions of one step, computed from the clean and the noisy gradient sum.

Sums and directions are dicts from the name of a trained matrix to a tensor (m, n). NON-PRIVATE:
most directions are computed from the clean sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lowrank_dp.experiments.scheme_scores import Scheme
from lowrank_dp.restore import restored_values

# schemes that restore the noisy sum; matrices without a value above the edge are kept, or zeroed
SCHEMES: dict[str, Scheme] = {
    "optimal": ("optimal", {}),
    "optimal, zeroed": ("optimal", {"below": "zero"}),
    "denoise": ("denoise", {}),
    "hard, zeroed": ("hard", {"below": "zero"}),
    "partial(0.5)": ("partial", {"alpha": 0.5}),
    "partial(0.9)": ("partial", {"alpha": 0.9}),
    "partial(0.5), power law": ("partial", {"alpha": 0.5, "target": "power-law"}),
    "partial(0.9), power law": ("partial", {"alpha": 0.9, "target": "power-law"}),
}
ONCE = ("clean", "clean, noisy norms", "clean, flattened")  # directions without a noise draw
PER_DRAW = (
    "noisy",
    *SCHEMES,
    "noisy, optimal's norms",
    "noisy, flattened",
    "removed",
    "noise",
    "loud",
    "loud, flattened",
)
DIRECTIONS = (*ONCE, *PER_DRAW)
LAYER_DIRECTIONS = ("clean", "noisy", "optimal, zeroed", "removed", "noise")


def once(clean: Mapping[str, Tensor], noise_std: float) -> dict[str, dict[str, Tensor]]:
    """Return the directions ``ONCE``, in this order, computed from the clean sum.

    ``noise_std`` is the standard deviation of the noise on an entry of the noisy sum, absolute. The
    direction "clean, noisy norms" gets the expected norm of each noisy matrix.
    """
    noisy_norm = {
        name: (float(c.double().square().sum()) + noise_std**2 * c.numel()) ** 0.5
        for name, c in clean.items()
    }
    return {
        "clean": dict(clean),
        "clean, noisy norms": {n: _with_norm(c, noisy_norm[n]) for n, c in clean.items()},
        "clean, flattened": {n: _with_norm(_flat(c), float(c.norm())) for n, c in clean.items()},
    }


def per_draw(
    clean: Mapping[str, Tensor],
    noisy: Mapping[str, Tensor],
    noise_std: float,
    loud: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """Return the directions ``PER_DRAW`` of one noise draw.

    Args:
        clean, noisy: sums without and with noise: name -> matrix (m, n).
        noise_std: standard deviation of the noise on every entry of ``noisy``, absolute.
        loud: sums with more noise: name -> matrix (m, n).

    Returns:
        Each direction by its name, and the number of matrices with a singular value above the bulk
        edge.
    """
    made: dict[str, dict[str, Tensor]] = {name: {} for name in PER_DRAW}
    above = 0
    for name, x in noisy.items():
        for direction, matrix in _of_matrix(clean[name], x, noise_std, loud[name]):
            made[direction][name] = matrix
        above += bool(made["optimal, zeroed"][name].any())
    return made, above


def _of_matrix(
    clean: Tensor, noisy: Tensor, noise_std: float, loud: Tensor
) -> Iterator[tuple[str, Tensor]]:
    u, s, vh = torch.linalg.svd(noisy, full_matrices=False)
    restored = {}
    for label, (scheme, options) in SCHEMES.items():
        new = restored_values(s, (noisy.shape[0], noisy.shape[1]), noise_std, scheme, **options)
        restored[label] = noisy if torch.equal(new, s) else (u * new) @ vh
    yield from restored.items()
    yield "noisy", noisy
    yield "noisy, optimal's norms", _with_norm(noisy, float(restored["optimal"].norm()))
    yield "noisy, flattened", _with_norm(u @ vh, float(noisy.norm()))
    yield "removed", noisy - restored["optimal, zeroed"]
    yield "noise", noisy - clean
    yield "loud", loud
    yield "loud, flattened", _with_norm(_flat(loud), float(loud.norm()))


def _flat(matrix: Tensor) -> Tensor:
    """Return the polar factor ``u v^T``: every singular value becomes 1."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def _with_norm(matrix: Tensor, norm: float) -> Tensor:
    """Scale a matrix to the Frobenius norm ``norm``; a matrix of zeros is returned unchanged."""
    return matrix * (norm / (float(matrix.norm()) or 1.0))
