"""Leading singular triplets of a noisy matrix by block Krylov iteration, without a full SVD.

A restoration depends on the singular values above the bulk edge only, and the weight of a value
goes to zero next to the edge. So a Krylov subspace is grown until the total weight of its singular
values stops changing (randomised block Lanczos; Musco & Musco, NeurIPS 2015). On a matrix of
exactly low rank, or with a spike far above the others, a block of the Krylov sequence can depend on
the blocks before it. Random directions then replace the dependent ones, and the part of the matrix
outside the subspace decides whether every value was found. The random start has a fixed seed: the
result is a function of the matrix alone, and the global random state is never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SIDE = 128  # below this side an exact SVD costs no more
_BLOCK, _MIN_BLOCKS, _MAX_BLOCKS = 16, 3, 12
MAX_COUNT = _BLOCK * _MAX_BLOCKS // 2  # largest number of triplets that a caller can ask for
_DEPENDENT = 1e-4  # norm outside a subspace below which a unit column counts as inside


@dataclass(frozen=True)
class Leading:
    """Ritz approximation of the leading singular triplets of l matrices (m, n) of a batch; m <= n.

    ``u_i = basis @ rotation[:, i]`` and ``s_i * v_i^T = rotation[:, i]^T @ image``.

    Attributes:
        index: (l,), positions of the matrices in the batch.
        basis: (l, m, k), orthonormal columns.
        image: (l, k, n), ``basis^T matrix``.
        rotation: (l, k, k), orthogonal.
        s: (l, k), descending Ritz values.
    """

    index: Tensor
    basis: Tensor
    image: Tensor
    rotation: Tensor
    s: Tensor

    def combine(self, gains: Tensor, *, transpose: bool = False) -> Tensor:
        """Return ``sum_i gains_i * s_i * u_i v_i^T`` over the first triplets, one per gain."""
        rotation = self.rotation[..., : gains.shape[-1]]
        left = self.basis @ (rotation * gains.unsqueeze(-2))  # (l, m, count)
        right = rotation.mT @ self.image  # (l, count, n)
        return right.mT @ left.mT if transpose else left @ right


def leading_triplets(
    matrices: Tensor,
    weight: Callable[[Tensor], Tensor],
    *,
    level: float | None,
    count: int = 1,
    tolerance: float = 0.02,
) -> list[Leading]:
    """Find triplets of every matrix (m, n), m <= n, until the sum of ``weight(s)`` has settled.

    A matrix leaves the batch as soon as its sum has settled, so that a few slow matrices do not
    delay all.

    Args:
        matrices: (L, m, n), float32 or float64.
        weight: contribution of singular values (l, k), descending, to the sum, >= 0. No
            contribution should be far above the others, which it would hide.
        level: values at or below this level contribute nothing; None if the first ``count`` values
            contribute, whatever their size.
        count: number of triplets that are needed, at most ``MAX_COUNT`` and m / 8.
        tolerance: largest relative change of the total weight in the last step.

    Returns:
        The triplets, in groups of matrices. Where no value is above ``level``, only ``s`` has a
        meaning: the rotation is the identity. No group holds a matrix whose subspace is too small
        for the values above ``level``, or was exhausted before all of them were found, or of which
        the first ``count`` values did not settle. The matrix is then not "few spikes and a bulk",
        and an exact SVD should be taken.
    """
    subspace = _Subspace(matrices)
    least = max(_MIN_BLOCKS, math.ceil(count / subspace.width) + 1)
    total = top = matrices.new_zeros(len(matrices))
    found = torch.zeros_like(top, dtype=torch.bool)
    # number of blocks from which on the total weight can have settled
    earliest = torch.full_like(top, least, dtype=torch.int64)
    groups = []
    for blocks in range(2, _MAX_BLOCKS + 1):
        block, exhausted = subspace.next_block()
        if exhausted is not None:
            found = found | (exhausted & subspace.leaves_nothing(level))
            # the new directions find what is left one block later
            earliest = torch.where(exhausted & ~found, max(blocks + 2, least), earliest)
        subspace.append(block)
        s = subspace.singular_values()
        last_total, last_top, top = total, top, s[:, 0]
        above = top > (0.0 if level is None else level)
        total = torch.zeros_like(top)
        if bool(above.any()):
            total = torch.where(above, weight(s).sum(-1), total)
        settled = (total - last_total).abs() <= tolerance * total
        if level is not None:
            # Ritz values rise towards the singular values in shrinking steps: if one more step of
            # the same size would not reach the level, no singular value stands above the level
            settled = torch.where(above, settled, 2 * top - last_top <= level)
        done = found | (settled & (blocks >= earliest))
        full = blocks == _MAX_BLOCKS or subspace.is_full
        if full and level is not None:
            done = done | (earliest == least)
        usable = done & _has_room(s, level, full)
        if bool((spiked := usable & above).any()):
            groups.append(subspace.triplets(spiked))
        if bool((nothing := usable & ~above).any()):
            groups.append(subspace.without_rotation(nothing, s))
        if full or bool(done.all()):
            break
        if bool(done.any()):
            subspace.keep(~done)
            total, top, found, earliest = (x[~done] for x in (total, top, found, earliest))
    return groups


def _has_room(s: Tensor, level: float | None, full: bool) -> Tensor:
    """Return (l,), whether the subspace was large enough for the values above ``level``.

    A full subspace of which an eighth lies above the level may have missed other values, or have
    found them roughly: 22 of 27 values in a full subspace of 64 dimensions.
    """
    if level is None:
        return torch.ones_like(s[:, 0], dtype=torch.bool)
    return (s > level).sum(-1) <= (s.shape[-1] // 8 if full else s.shape[-1] - 1)


class _Subspace:
    """Block Krylov subspace of matrices (l, m, n): orthonormal basis, image and Gram matrix."""

    def __init__(self, matrix: Tensor) -> None:
        m, n = matrix.shape[-2:]
        self._index = torch.arange(len(matrix), device=matrix.device)
        self._matrix, self.width = matrix, min(_BLOCK, m // 16)
        self._generator = torch.Generator().manual_seed(0)
        start = torch.randn(self.width, n, generator=self._generator, dtype=matrix.dtype)
        self._basis = torch.linalg.qr((start.to(matrix.device) @ matrix.mT).mT)[0]
        self._image = self._basis.mT @ matrix
        self._gram = self._image @ self._image.mT

    @property
    def is_full(self) -> bool:
        """Whether one more block would take more than half of the dimensions."""
        return 2 * (self._basis.shape[-1] + self.width) > self._matrix.shape[-2]

    def next_block(self) -> tuple[Tensor, Tensor | None]:
        """Next block, ``matrix matrix^T`` times the last one: see :func:`_orthonormal_outside`."""
        block = (self._image[..., -self.width :, :] @ self._matrix.mT).mT
        return _orthonormal_outside(block, self._basis, self._generator)

    def keep(self, chosen: Tensor) -> None:
        """Drop the matrices outside of a mask (l,)."""
        self._index, self._matrix = self._index[chosen], self._matrix[chosen]
        self._basis, self._image = self._basis[chosen], self._image[chosen]
        self._gram = self._gram[chosen]

    def append(self, block: Tensor) -> None:
        """Extend the subspace by orthonormal columns (l, m, w) orthogonal to the subspace."""
        self._basis = torch.cat([self._basis, block], -1)
        self._image = torch.cat([self._image, block.mT @ self._matrix], -2)
        new = self._image @ self._image[..., -self.width :, :].mT
        upper = torch.cat([self._gram, new[..., : -self.width, :]], -1)
        self._gram = torch.cat([upper, new.mT], -2)

    def singular_values(self) -> Tensor:
        """Ritz values (l, k), descending."""
        return _eigenvalues(self._gram).flip(-1).clamp(min=0).sqrt()

    def leaves_nothing(self, level: float | None) -> Tensor:
        """Return whether the matrices less their projections are rounding, or below ``level``."""
        norm = torch.linalg.matrix_norm(self._matrix)
        rounding = 10 * torch.finfo(self._matrix.dtype).eps * norm
        least = rounding if level is None else rounding.clamp(min=level)
        return torch.linalg.matrix_norm(self._matrix - self._basis @ self._image) <= least

    def triplets(self, chosen: Tensor) -> Leading:
        """Ritz triplets of the matrices in a mask (l,), from a decomposition in float64.

        A Gram matrix in float32 loses the values below 1e-4 times the largest one.
        """
        basis, image = (_chosen(x, chosen) for x in (self._basis, self._image))
        exact = image.double()
        squares, rotation = torch.linalg.eigh(exact @ exact.mT)
        s = squares.flip(-1).clamp(min=0).sqrt()
        dtype = self._matrix.dtype
        return Leading(self._index[chosen], basis, image, rotation.flip(-1).to(dtype), s.to(dtype))

    def without_rotation(self, chosen: Tensor, s: Tensor) -> Leading:
        """Ritz values alone, for matrices of which nothing will be combined."""
        basis, image = (_chosen(x, chosen) for x in (self._basis, self._image))
        identity = torch.eye(s.shape[-1]).to(self._gram).expand(len(basis), -1, -1)
        return Leading(self._index[chosen], basis, image, identity, s[chosen])


def _chosen(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return the entries in a mask; the tensor itself, without a copy, if the mask is all true."""
    return tensor if bool(mask.all()) else tensor[mask]


def _eigenvalues(gram: Tensor) -> Tensor:
    """Eigenvalues, ascending.

    For a matrix of low rank a float32 Gram matrix holds denormals, on which LAPACK may fail.
    """
    try:
        return torch.linalg.eigvalsh(gram)
    except torch.linalg.LinAlgError:
        return torch.linalg.eigvalsh(gram.double()).to(gram.dtype)


def _orthonormal_outside(
    block: Tensor, basis: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Orthonormal columns (l, m, w) that span the part of ``block`` outside ``basis``.

    If ``basis`` holds a column of ``block`` up to rounding, or the columns depend on each other, QR
    would return arbitrary directions, which may lie in ``basis``. Random directions replace them.

    Returns:
        The columns; and per matrix whether no column of ``block`` was left, or None if every column
        of every matrix was.
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
    # small relative to a column that is left, large relative to rounding in a dependent column
    replaced = torch.linalg.qr(outside(block + 0.1 * _DEPENDENT * random))[0]
    replaced = torch.linalg.qr(outside(replaced))[0]
    return torch.where(left.all(-1)[:, None, None], columns, replaced), ~left.any(-1)
