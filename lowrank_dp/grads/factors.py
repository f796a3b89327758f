"""Norms and weighted sums of per-example gradients in factored form.

The per-example gradients of one parameter are a *factor*, which is one of

- ``Outer(left, right)``: the gradient of example i is ``left_i^T right_i``, a product that is
  never formed (a Linear weight: output gradients ``b`` and inputs ``x``; an Embedding: token ids,
  which stand for one-hot rows, and ``b``);
- a tensor of shape ``(B, *parameter.shape)``: the gradients themselves (biases, norm layers).

A parameter that is used several times (a layer called twice, tied weights) has a list of factors;
its gradient is the sum of the list. B is examples, T positions.

``squared_norms`` takes inner products of T x T Gram matrices (ghost norm: Li et al. 2021, arXiv
2110.05679). ``weighted_sum`` is one matrix product (book-keeping: Bu et al. 2022, arXiv
2210.00038).

A Gram matrix squares its entries. A ghost norm in float32 is therefore inexact where the gradients
of positions cancel, and where a square leaves the range of float32. ``squared_norms`` returns a
bound on this error, and ``careful_norm`` recomputes the norm of an inexact row by orthogonal
factors in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

HALF_DTYPES = (torch.bfloat16, torch.float16)
GRAM_ELEMENTS = 1 << 24  # elements of the largest Gram matrices held at once; rows go in chunks
# A ghost norm counts as exact, to a relative error of 1e-4, if its square is at least OF_DIAGONAL
# times the sum of the positions' squared norms, and OF_SPREAD times the square of the sum of their
# norms.
OF_DIAGONAL, OF_SPREAD = 1e-2, 4e-4
# Squares in float32 are inexact below this size, relative to a row's largest position.
UNDERFLOW = 1e-12


class Outer(NamedTuple):
    """Per-example matrices ``left_i^T right_i`` that are not formed.

    Attributes:
        left: (B, T, rows), or integer ids (B, T) that stand for one-hot rows.
        right: (B, T, cols).
    """

    left: Tensor
    right: Tensor


Factor = Outer | Tensor


class Squares(NamedTuple):
    """Squared norms of one parameter's per-example gradients.

    Attributes:
        squared: (B,) float64.
        doubt: (B,) float64; 0 where ``squared`` is exact to a relative error of 1e-4, elsewhere a
            bound on the square of the part that rounding may have lost.
    """

    squared: Tensor
    doubt: Tensor


def upcast(tensor: Tensor) -> Tensor:
    """Convert a half-precision tensor to float32; return another tensor unchanged."""
    return tensor.float() if tensor.dtype in HALF_DTYPES else tensor


def materialize_if_cheaper(factors: Sequence[Factor]) -> list[Factor]:
    """Form the per-example gradients of one parameter where this is cheaper than Gram matrices.

    Forming them is cheaper in arithmetic (T rows cols against T^2 (rows + cols)) and in memory if
    ``rows * cols <= T (rows + cols)``. A list that is formed becomes a single tensor, so that its
    norm is exactly the norm of the summand of ``weighted_sum``.

    Args:
        factors: the complete list of a parameter's factors.
    """
    outer = [f for f in factors if isinstance(f, Outer)]
    if len(outer) == len(factors):
        if any(not f.left.is_floating_point() for f in outer):
            return list(factors)
        positions = sum(f.left.shape[1] for f in outer)
        rows, cols = outer[0].left.shape[-1], outer[0].right.shape[-1]
        if rows * cols > positions * (rows + cols):
            return list(factors)
    formed = [
        torch.bmm(upcast(f.left).mT, upcast(f.right)) if isinstance(f, Outer) else f
        for f in factors
    ]
    return [torch.stack(formed).sum(0) if len(formed) > 1 else formed[0]]


def squared_norms(factors: Sequence[Factor]) -> Squares:
    """Squared norm of each example's summed gradient.

    Args:
        factors: the result of ``materialize_if_cheaper``.
    """
    if isinstance(factors[0], Tensor):
        flat = factors[0].flatten(1)
        squared = flat.square().sum(1).double()
        low = 1e-30 * flat.shape[1]  # a smaller sum may lack squares that underflowed
        doubt = squared.clamp(min=low).nan_to_num(torch.inf, torch.inf)
        return Squares(squared, doubt.masked_fill((squared > low) & squared.isfinite(), 0.0))
    return _ghost([f for f in factors if isinstance(f, Outer)])


def _ghost(outer: Sequence[Outer]) -> Squares:
    """Squared norms by Gram matrices (ghost norm).

    The squared norm of a sum of outer products is the sum over pairs of the inner products
    ``<l^T r, l'^T r'> = sum((l l'^T) * (r r'^T))``. Pairs of two uses cover a weight that is both
    embedding and output layer; no matrix of vocabulary x width per example is formed.
    """
    first = outer[0].right
    # per row: the squared norm, the sum of the positions' squared norms, the sum of their norms
    squared, diagonal, spread = torch.zeros(3, len(first), device=first.device, dtype=torch.float64)
    for i, one in enumerate(outer):
        for other in outer[: i + 1]:
            cells = max(1, one.right.shape[1] * other.right.shape[1])
            for chunk in torch.arange(len(first)).split(max(1, GRAM_ELEMENTS // cells)):
                rows = slice(int(chunk[0]), int(chunk[-1]) + 1)
                left = _gram(one.left[rows], other.left[rows])
                right = _gram(one.right[rows], other.right[rows])
                if one is other:
                    diagonals = [gram.diagonal(dim1=1, dim2=2).to(right) for gram in (left, right)]
                    sizes = torch.stack(diagonals).double().sqrt()
                    parts = sizes.prod(0)
                    diagonal[rows] += parts.square().sum(1)
                    spread[rows] += (parts + UNDERFLOW * sizes.amax(2).sum(0)[:, None]).sum(1)
                inner = left.mul(right).sum((1, 2))
                squared[rows] += inner if one is other else 2 * inner
    doubt = spread.square().nan_to_num(torch.inf, torch.inf)
    sure = squared >= torch.maximum(OF_DIAGONAL * diagonal, OF_SPREAD * doubt)
    return Squares(squared.clamp_(min=0), doubt.masked_fill(sure & squared.isfinite(), 0.0))


def careful_norm(factors: Sequence[Factor], row: int) -> float:
    """Norm of one example's summed gradient, plus the rounding error of its float32 contribution.

    With ``left^T = Q A`` and ``right^T = P B`` for orthonormal Q and P, ``left^T right`` has the
    norm of ``A B^T``, in which positions cancel before anything is squared.
    """
    if isinstance(factors[0], Tensor):
        return float(factors[0][row].double().norm())
    outer = [f for f in factors if isinstance(f, Outer)]
    right = torch.cat([upcast(f.right[row]) for f in outer])
    unit = torch.finfo(right.dtype).eps
    widths = [f.left.shape[-1] for f in outer if f.left.is_floating_point()]
    if not widths:  # one-hot rows of the ids that occur suffice
        left = functional.one_hot(
            torch.cat([f.left[row] for f in outer]).unique(return_inverse=True)[1]
        )
    else:
        left = torch.cat(
            [
                f.left[row]
                if f.left.is_floating_point()
                else functional.one_hot(f.left[row], widths[0])
                for f in outer
            ]
        )
    left, right = left.double(), right.double()
    spread = float((left.norm(dim=1) * right.norm(dim=1)).sum())
    if not math.isfinite(spread):
        return spread
    one, other = (torch.linalg.qr(side.mT, mode="r").R for side in (left, right))
    return float((one @ other.mT).norm()) + unit * math.sqrt(len(left)) * spread


def _gram(one: Tensor, other: Tensor) -> Tensor:
    """Inner products (B, T, S) of positions (B, T, d) and (B, S, d); ids stand for one-hot rows."""
    if one.is_floating_point() and other.is_floating_point():
        return torch.bmm(upcast(one), upcast(other).mT)
    if one.is_floating_point():
        return _gram(other, one).mT
    if other.is_floating_point():
        index = one[:, None, :].expand(-1, other.shape[1], -1)
        return upcast(other.gather(2, index)).mT
    return one[:, :, None] == other[:, None, :]


def weighted_sum(factors: Sequence[Factor], weights: Tensor, shape: torch.Size) -> Tensor:
    """Compute ``sum_i weights_i gradient_i``, a tensor of ``shape``, for weights (B,)."""
    total = torch.zeros(0)
    for factor in factors:
        if isinstance(factor, Tensor):
            part = (weights.to(factor) @ factor.flatten(1)).view(shape)
        else:
            part = _weighted_outer(factor, weights, shape)
        total = part if factor is factors[0] else total.add_(part)
    return total


def _weighted_outer(factor: Outer, weights: Tensor, shape: torch.Size) -> Tensor:
    left, right = factor.left, upcast(factor.right)
    scale = weights.to(right)[:, None, None]
    if not left.is_floating_point():
        return right.new_zeros(shape).index_add_(0, left.flatten(), (right * scale).flatten(0, 1))
    left = upcast(left)
    if left.shape[-1] < right.shape[-1]:
        left = left * scale
    else:
        right = right * scale
    return left.flatten(0, 1).T @ right.flatten(0, 1)
