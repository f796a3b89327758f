"""Reference for a restoration: singular values from the clean gradient. NON-PRIVATE."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.spectrum.decomposition import to_unit


def oracle_values(noisy: Tensor, clean: Tensor, kind: str = "weights") -> Tensor:
    """NON-PRIVATE: compute the option ``values`` of the scheme "oracle" from the clean gradient.

    Args:
        noisy, clean: (..., m, n); ``clean`` is converted to the type and device of ``noisy``.
        kind: "weights" for ``diag(u^T clean v)`` in the noisy singular vectors, the best values
            that any scheme can reach; "profile" for the clean singular values.

    Returns:
        Values (..., min(m, n)).

    Raises:
        ValueError: on unequal shapes, a bad matrix or an unknown kind.
    """
    _validate.matrix("noisy", noisy)
    if _validate.matrix("clean", clean).shape != noisy.shape:
        _validate.fail("clean", f"a tensor of shape {tuple(noisy.shape)}", tuple(clean.shape))
    clean = clean.to(noisy)
    if _validate.choice("kind", kind, ["weights", "profile"]) == "profile":
        unit, scale = to_unit(clean)
        return torch.linalg.svdvals(unit) * scale
    u, _, vh = torch.linalg.svd(to_unit(noisy)[0], full_matrices=False)
    return ((u.mT @ clean) * vh).sum(-1)
