"""References for a restoration: the clean gradient, or a subspace chosen beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.spectrum.decomposition import to_unit


def oracle_values(noisy: Tensor, clean: Tensor, kind: str = "weights") -> Tensor:
    """NON-PRIVATE: compute the option ``values`` of the scheme "oracle" from the clean gradient.

    Args:
        noisy, clean: (..., m, n).
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
    if _validate.choice("kind", kind, ["weights", "profile"]) == "profile":
        unit, scale = to_unit(clean)
        return torch.linalg.svdvals(unit) * scale
    u, _, vh = torch.linalg.svd(to_unit(noisy)[0], full_matrices=False)
    return ((u.mT @ clean) * vh).sum(-1)


def project(noisy: Tensor, basis: Tensor) -> Tensor:
    """Project gradients on a subspace chosen beforehand, ``basis basis^T noisy``, as GaLore does.

    Noise and signal outside the subspace are removed. GaLore is due to Zhao et al., arXiv
    2403.03507. For DP-SGD with a public subspace see GEP (Yu et al., arXiv 2102.12677), which also
    changes what is clipped.

    Args:
        noisy: (..., m, n).
        basis: (..., m, k) with orthonormal columns, from public data or from gradients already
            released.

    Returns:
        The projected gradients, (..., m, n).

    Raises:
        ValueError: on a bad matrix, or if the numbers of rows differ.
    """
    _validate.matrix("noisy", noisy)
    _validate.matrix("basis", basis)
    if basis.shape[-2] != noisy.shape[-2]:
        _validate.fail("basis", f"a tensor with {noisy.shape[-2]} rows", tuple(basis.shape))
    return basis @ (basis.mT @ noisy)
