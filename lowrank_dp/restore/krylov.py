"""Leading singular triplets of a noisy matrix by block Krylov, without a full SVD.

Only values above the bulk edge matter to a restoration, and next to the edge their weight goes to
zero, so the subspace is grown just until the weight of what it holds stops changing (randomised
block Lanczos; Musco & Musco, NeurIPS 2015). The start is a fixed seed of its own: the result is a
function of the matrix alone, and the global random state is never read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SIDE = 128  # below this an exact SVD costs no more
_BLOCK, _MIN_BLOCKS, _MAX_BLOCKS = 16, 3, 12


@dataclass(frozen=True)
class Leading:
    """Ritz approximation of the leading singular triplets of a matrix (..., m, n), m <= n.

    ``u_i = basis @ rotation[:, i]`` and ``s_i * v_i^T = rotation[:, i]^T @ image``.
    """

    basis: Tensor  # (..., m, k), orthonormal columns
    image: Tensor  # (..., k, n) = basis^T matrix
    rotation: Tensor  # (..., k, k), orthogonal
    s: Tensor  # (..., k), descending

    def combine(self, gains: Tensor, *, transpose: bool = False) -> Tensor:
        """``sum_i gains_i * s_i * u_i v_i^T`` over the first ``gains.shape[-1]`` triplets."""
        rotation = self.rotation[..., : gains.shape[-1]]
        left = self.basis @ (rotation * gains.unsqueeze(-2))  # (..., m, count)
        right = rotation.mT @ self.image  # (..., count, n)
        return right.mT @ left.mT if transpose else left @ right


def leading_triplets(matrix: Tensor, weight: Callable[[Tensor], Tensor], *,
                     level: float | None, tolerance: float = 0.02) -> Leading | None:
    """Triplets of ``matrix`` (..., m, n), m <= n, until the sum of ``weight(s)`` has settled.

    Args:
        matrix: float32 or float64.
        weight: what a singular value contributes to the result, >= 0, vectorised.
        level: values at or below it contribute nothing; None when there is no such level.
        tolerance: largest relative change of the total weight in the last step.

    Returns:
        The triplets; where nothing is above ``level`` only their values, with the identity for a
        rotation, since there is nothing to combine. None if there are too many values above
        ``level`` for the subspace: then the matrix is not "few spikes and a bulk", and an exact
        SVD should be taken.
    """
    m, n = matrix.shape[-2:]
    width = min(_BLOCK, m // 16)
    start = torch.randn(width, n, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    block = torch.linalg.qr((start.to(matrix.device) @ matrix.mT).mT)[0]
    basis, image = block, block.mT @ matrix
    gram = image @ image.mT
    total, top = torch.zeros(()), torch.zeros(())
    for blocks in range(2, _MAX_BLOCKS + 1):
        # matrix matrix^T times the last block, orthogonalised twice for stability
        block = (image[..., -width:, :] @ matrix.mT).mT
        block = block - basis @ (basis.mT @ block)
        block = torch.linalg.qr(block - basis @ (basis.mT @ block))[0]
        basis = torch.cat([basis, block], -1)
        image = torch.cat([image, block.mT @ matrix], -2)
        new = image @ image[..., -width:, :].mT
        gram = torch.cat([torch.cat([gram, new[..., :-width, :]], -1), new.mT], -2)

        s = torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0).sqrt()
        last_total, last_top, top = total, top, s[..., 0]
        empty = level is not None and bool((top <= level).all())
        total = torch.zeros_like(top) if empty else weight(s).sum(-1)
        settled = (total - last_total).abs() <= tolerance * total
        if level is not None:
            # Ritz values rise towards the singular values in shrinking steps: when one more step
            # of the same size would not reach the level, nothing stands above it
            settled = torch.where(top > level, settled, 2 * top - last_top <= level)
        full = blocks == _MAX_BLOCKS or 2 * (basis.shape[-1] + width) > m
        if full or (blocks >= _MIN_BLOCKS and bool(settled.all())):
            break
    if level is not None:
        # with the room used up, a subspace half full of values above the level may miss others
        most = s.shape[-1] // 2 if full else s.shape[-1] - 1
        if bool(((s > level).sum(-1) > most).any()):
            return None
    if empty:
        return Leading(basis, image, torch.eye(s.shape[-1]).to(matrix).expand_as(gram), s)
    # once more in float64: a float32 Gram matrix loses values 1e-4 times the largest
    exact = image.double()
    squares, rotation = torch.linalg.eigh(exact @ exact.mT)
    s = squares.flip(-1).clamp(min=0).sqrt()
    return Leading(basis, image, rotation.flip(-1).to(matrix.dtype), s.to(matrix.dtype))
