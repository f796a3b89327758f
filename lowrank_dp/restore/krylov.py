"""Leading singular triplets of a noisy matrix by block Krylov, without a full SVD.

Only values above the bulk edge matter to a restoration, and next to the edge their weight goes to
zero, so the subspace is grown just until the weight of what it holds stops changing (randomised
block Lanczos; Musco & Musco, NeurIPS 2015). Where a block of the sequence depends on the blocks
before it (a matrix of exactly low rank, a spike far above the others), random directions replace
what is missing, and what the subspace leaves of the matrix decides whether all was found. The
start is a fixed seed of its own: the result is a
function of the matrix alone, and the global random state is never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SIDE = 128  # below this an exact SVD costs no more
_BLOCK, _MIN_BLOCKS, _MAX_BLOCKS = 16, 3, 12
_DEPENDENT = 1e-4  # share of a unit column outside of a subspace, below which it counts as inside


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


def leading_triplets(
    matrix: Tensor,
    weight: Callable[[Tensor], Tensor],
    *,
    level: float | None,
    tolerance: float = 0.02,
) -> Leading | None:
    """Triplets of ``matrix`` (..., m, n), m <= n, until the sum of ``weight(s)`` has settled.

    Args:
        matrix: float32 or float64.
        weight: what a singular value contributes to the result, >= 0, vectorised.
        level: values at or below it contribute nothing; None when there is no such level.
        tolerance: largest relative change of the total weight in the last step.

    Returns:
        The triplets; where nothing is above ``level`` only their values, with the identity for a
        rotation, since there is nothing to combine. None if there are too many values above
        ``level`` for the subspace, or if it was exhausted before all of them were found: then the
        matrix is not "few spikes and a bulk", and an exact SVD should be taken.
    """
    m, n = matrix.shape[-2:]
    width = min(_BLOCK, m // 16)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(width, n, generator=generator, dtype=matrix.dtype).to(matrix.device)
    block = torch.linalg.qr((start @ matrix.mT).mT)[0]
    basis, image = block, block.mT @ matrix
    gram = image @ image.mT
    total, top = torch.zeros(()), torch.zeros(())
    found = torch.zeros(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
    earliest = _MIN_BLOCKS  # number of blocks from which on the total weight can have settled
    for blocks in range(2, _MAX_BLOCKS + 1):
        # matrix matrix^T times the last block
        block, exhausted = _next_block((image[..., -width:, :] @ matrix.mT).mT, basis, generator)
        if exhausted is not None:
            found = found | (exhausted & _nothing_left(matrix, basis, image, level))
            if bool((exhausted & ~found).any()):
                earliest = blocks + 2  # the new directions find what is left one block later
        basis = torch.cat([basis, block], -1)
        image = torch.cat([image, block.mT @ matrix], -2)
        new = image @ image[..., -width:, :].mT
        gram = torch.cat([torch.cat([gram, new[..., :-width, :]], -1), new.mT], -2)

        s = _eigenvalues(gram).flip(-1).clamp(min=0).sqrt()
        last_total, last_top, top = total, top, s[..., 0]
        empty = level is not None and bool((top <= level).all())
        total = torch.zeros_like(top) if empty else weight(s).sum(-1)
        settled = (total - last_total).abs() <= tolerance * total
        if level is not None:
            # Ritz values rise towards the singular values in shrinking steps: when one more step
            # of the same size would not reach the level, nothing stands above it
            settled = torch.where(top > level, settled, 2 * top - last_top <= level)
        done = bool(found.all()) or (blocks >= earliest and bool((settled | found).all()))
        full = blocks == _MAX_BLOCKS or 2 * (basis.shape[-1] + width) > m
        if done or full:
            break
    if earliest > _MIN_BLOCKS and not done:
        return None
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


def _eigenvalues(gram: Tensor) -> Tensor:
    """Ascending; of a matrix of low rank, float32 leaves denormals, on which LAPACK may fail."""
    try:
        return torch.linalg.eigvalsh(gram)
    except torch.linalg.LinAlgError:
        return torch.linalg.eigvalsh(gram.double()).to(gram.dtype)


def _next_block(
    block: Tensor, basis: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Orthonormal columns (..., m, w) that span ``block`` outside of ``basis``.

    Where ``basis`` already holds a column of ``block`` to rounding, or the columns depend on each
    other, QR would return arbitrary directions, which may lie in ``basis``. Random directions take
    their place.

    Returns:
        The columns; and for each matrix whether *no* column of ``block`` was left, or None if
        every column of every matrix was.
    """

    def outside(columns: Tensor) -> Tensor:
        return columns - basis @ (basis.mT @ columns)

    size = torch.linalg.vector_norm(block, dim=-2, keepdim=True)
    block = outside(outside(block / torch.where(size > 0, size, 1.0)))
    columns, triangle = torch.linalg.qr(block)
    left = triangle.diagonal(dim1=-2, dim2=-1).abs() > _DEPENDENT
    if bool(left.all()):
        return columns, None
    random = torch.randn(block.shape[-2:], generator=generator, dtype=block.dtype)
    random = random.to(block.device) / math.sqrt(block.shape[-2])
    # small beside a column that is left, and large beside the rounding of one that is not
    columns = torch.linalg.qr(outside(block + 0.1 * _DEPENDENT * random))[0]
    return torch.linalg.qr(outside(columns))[0], ~left.any(-1)


def _nothing_left(matrix: Tensor, basis: Tensor, image: Tensor, level: float | None) -> Tensor:
    """Whether what ``basis`` leaves of each matrix is rounding, or too small to reach ``level``."""
    norm = torch.linalg.matrix_norm(matrix)
    rounding = 10 * torch.finfo(matrix.dtype).eps * norm
    least = rounding if level is None else rounding.clamp(min=level)
    return torch.linalg.matrix_norm(matrix - basis @ image) <= least
