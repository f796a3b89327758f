"""Per-example gradients in factored form: their norms and their weighted sum.

The per-example gradients of one parameter are a *factor*, which is one of

- ``Outer(left, right)``: the gradient of example i is ``left_i^T right_i`` and is never formed
  (a Linear weight: ``b`` and ``x``; an Embedding: token ids, as one-hot rows, and ``b``);
- a tensor of shape ``(B, *parameter.shape)``: the gradients themselves (biases, norm layers).

A parameter used several times (re-use, tied weights) has a list of factors whose sum is meant.
``squared_norms`` works by inner products of T x T Gram matrices (ghost norm: Li et al. 2021, arXiv
2110.05679), ``weighted_sum`` in one matrix product (book-keeping: Bu et al. 2022, arXiv
2210.00038). B is examples, T positions.

A Gram matrix squares what it is given, so a ghost norm is lost where positions cancel, and where a
square leaves the range of float32. ``squared_norms`` therefore states its doubt, and
``careful_norm`` takes the norm of a doubtful row again, by orthogonal factors in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

GRAM_ELEMENTS = 1 << 24  # largest Gram matrix held at once, in elements; more rows go in chunks
# A ghost norm is doubted where its square is below these parts of the sum over positions of their
# squared norms, and of the square of the sum of their norms: its relative error stays below 1e-4.
OF_DIAGONAL, OF_SPREAD = 1e-2, 4e-4
# Squares of float32 are inexact below this size, relative to a row's largest position.
UNDERFLOW = 1e-12


class Outer(NamedTuple):
    """Per-example matrices ``left_i^T right_i``, not formed.

    ``left`` is (B, T, rows), or integer ids (B, T) that stand for one-hot rows; ``right`` is
    (B, T, cols).
    """

    left: Tensor
    right: Tensor


Factor = Outer | Tensor


class Squares(NamedTuple):
    """Squared norms of one parameter's per-example gradients.

    ``squared`` is (B,) float64. ``doubt`` is (B,) float64: 0 where ``squared`` is exact to 1e-4,
    else a bound on the square of what may have been lost.
    """

    squared: Tensor
    doubt: Tensor


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 if it is in half precision, else unchanged."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def materialize_if_cheaper(factors: Sequence[Factor]) -> list[Factor]:
    """The cheaper form of a parameter's complete list of factors.

    ``rows * cols <= T (rows + cols)`` makes forming the gradients cheaper than their Gram
    matrices in arithmetic (T rows cols against T^2 (rows + cols)) and in memory alike. What is
    formed is one tensor, so that its norm is that of what ``weighted_sum`` adds up.
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
        torch.bmm(wide(f.left).mT, wide(f.right)) if isinstance(f, Outer) else f for f in factors
    ]
    return [torch.stack(formed).sum(0) if len(formed) > 1 else formed[0]]


def squared_norms(factors: Sequence[Factor]) -> Squares:
    """Squared norm of each example's summed gradient, for factors that ``materialize_if_cheaper`` has settled."""
    if isinstance(factors[0], Tensor):
        flat = factors[0].flatten(1)
        squared = flat.square().sum(1).double()
        low = 1e-30 * flat.shape[1]  # below it squares of float32 may have vanished
        doubt = squared.clamp(min=low).nan_to_num(torch.inf, torch.inf)
        return Squares(squared, doubt.masked_fill((squared > low) & squared.isfinite(), 0.0))
    return _ghost([f for f in factors if isinstance(f, Outer)])


def _ghost(outer: Sequence[Outer]) -> Squares:
    """By Gram matrices, which also covers a weight that is both embedding and output layer.

    The norm of a sum of outer products needs each pair's inner product,
    ``<l^T r, l'^T r'> = sum((l l'^T) * (r r'^T))``: no vocabulary x width per example is formed.
    """
    first = outer[0].right
    squared, diagonal, spread = torch.zeros(3, len(first), device=first.device, dtype=torch.float64)
    for i, one in enumerate(outer):
        for other in outer[: i + 1]:
            cells = max(1, one.right.shape[1] * other.right.shape[1])
            for chunk in torch.arange(len(first)).split(max(1, GRAM_ELEMENTS // cells)):
                rows = slice(int(chunk[0]), int(chunk[-1]) + 1)
                left = _gram(one.left[rows], other.left[rows])
                right = _gram(one.right[rows], other.right[rows])
                if one is other:
                    sizes = (
                        torch.stack(
                            [
                                left.diagonal(dim1=1, dim2=2).to(right),
                                right.diagonal(dim1=1, dim2=2),
                            ]
                        )
                        .double()
                        .sqrt()
                    )
                    parts = sizes.prod(0)
                    diagonal[rows] += parts.square().sum(1)
                    spread[rows] += (parts + UNDERFLOW * sizes.amax(2).sum(0)[:, None]).sum(1)
                inner = left.mul(right).sum((1, 2))
                squared[rows] += inner if one is other else 2 * inner
    doubt = spread.square().nan_to_num(torch.inf, torch.inf)
    sure = squared >= torch.maximum(OF_DIAGONAL * diagonal, OF_SPREAD * doubt)
    return Squares(squared.clamp_(min=0), doubt.masked_fill(sure & squared.isfinite(), 0.0))


def careful_norm(factors: Sequence[Factor], row: int) -> float:
    """Norm of one example's summed gradient, and of what its float32 contribution may be off by.

    With ``left^T = Q A`` and ``right^T = P B`` for orthonormal Q and P, the norm of
    ``left^T right`` is that of ``A B^T``, in which nothing is squared before it has cancelled.
    """
    if isinstance(factors[0], Tensor):
        return float(factors[0][row].double().norm())
    outer = [f for f in factors if isinstance(f, Outer)]
    right = torch.cat([wide(f.right[row]) for f in outer])
    unit = torch.finfo(right.dtype).eps
    widths = [f.left.shape[-1] for f in outer if f.left.is_floating_point()]
    if not widths:  # only the ids that occur
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
    """Inner products of positions, (B, T, d) and (B, S, d) to (B, T, S); ids count as one-hot."""
    if one.is_floating_point() and other.is_floating_point():
        return torch.bmm(wide(one), wide(other).mT)
    if one.is_floating_point():
        return _gram(other, one).mT
    if other.is_floating_point():
        index = one[:, None, :].expand(-1, other.shape[1], -1)
        return wide(other.gather(2, index)).mT
    return one[:, :, None] == other[:, None, :]


def weighted_sum(factors: Sequence[Factor], weights: Tensor, shape: torch.Size) -> Tensor:
    """``sum_i weights_i gradient_i`` of ``shape``, from (B,) weights."""
    total = torch.zeros(0)
    for factor in factors:
        if isinstance(factor, Tensor):
            part = (weights.to(factor) @ factor.flatten(1)).view(shape)
        else:
            part = _weighted_outer(factor, weights, shape)
        total = part if factor is factors[0] else total.add_(part)
    return total


def _weighted_outer(factor: Outer, weights: Tensor, shape: torch.Size) -> Tensor:
    left, right = factor.left, wide(factor.right)
    scale = weights.to(right)[:, None, None]
    if not left.is_floating_point():
        return right.new_zeros(shape).index_add_(0, left.flatten(), (right * scale).flatten(0, 1))
    left = wide(left)
    if left.shape[-1] < right.shape[-1]:
        left = left * scale
    else:
        right = right * scale
    return left.flatten(0, 1).T @ right.flatten(0, 1)
