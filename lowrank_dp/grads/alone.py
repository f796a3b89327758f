"""Gradients of rows that run through the model one by one, as an ordinary training loop has them.

These gradients are the reference for a backend: no hook and no rule of this package takes part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_dp._terminal import first_line
from lowrank_dp.grads.factors import upcast
from lowrank_dp.grads.losses import fail_without_loss
from lowrank_dp.grads.microbatch import Batch, MicroBatch, copy_rows, num_positions_of
from lowrank_dp.grads.own_length import trim
from lowrank_dp.grads.tolerances import VANISHING, gradient_allowance, loss_allowance

PAD_PUBLICLY = (
    'pad every row to one public length (padding="max-length"; training: --padding max-length)'
)


@dataclass(frozen=True)
class RowsAlone:
    """Results of rows that ran one by one.

    Attributes:
        losses: the loss of each row, by its index in the micro-batch.
        norms: the gradient norm of each row before clipping.
        sums: the sum of the clipped gradients, by parameter name.
        max_grad_norm: the clip norm C of ``sums``, absolute.
    """

    losses: dict[int, float]
    norms: dict[int, float]
    sums: dict[str, Tensor]
    max_grad_norm: float


def gradient_alone(micro_batch: MicroBatch, row: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the model on one row.

    A parameter that the loss does not depend on has no entry. Every ``.grad`` must be None
    before the call.
    """
    with micro_batch.autocast:
        loss = getattr(micro_batch.model(**row), "loss", None)
    if loss is None:
        fail_without_loss()
    if loss.requires_grad:
        loss.backward()
    gradient = {}
    for name, p in micro_batch.trained.items():
        if p.grad is not None:
            gradient[name], p.grad = upcast(p.grad), None
    return float(loss.detach()), gradient


def rows_alone(
    micro_batch: MicroBatch,
    order: Sequence[int],
    lengths: Sequence[tuple[int, int]] | None,
    max_grad_norm: float = 0.0,
) -> RowsAlone | None:
    """Run each row alone through autograd, and compare its results with and without padding.

    Args:
        micro_batch: the rows and their model.
        order: indices of the rows; a row that occurs twice counts twice in the sum.
        lengths: each row's own first and last position; None omits the comparison.
        max_grad_norm: C; 0 takes a tenth of the first row's norm, which clips that row and most
            likely the others.

    Returns:
        The rows' results, or None if a row has no finite loss or gradient.

    Raises:
        ValueError: if padding changes the loss or the gradient of a row.
    """
    losses, norms = {}, {}
    sums: dict[str, Tensor] = {}
    for row in dict.fromkeys(order):
        batch = copy_rows(micro_batch.batch, [row])
        loss, gradient = gradient_alone(micro_batch, batch)
        norm = norm_of(gradient.values())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return None
        if lengths is not None and lengths[row] != (0, num_positions_of(batch)):
            _require_same_at_own_length(micro_batch, row, lengths[row], loss, gradient)
        max_grad_norm = max_grad_norm or 0.1 * norm
        weight = min(1.0, max_grad_norm / norm) * order.count(row) if norm else 0.0
        for name, g in gradient.items():
            sums[name] = sums[name].add_(g, alpha=weight) if name in sums else g.mul_(weight)
        losses[row], norms[row] = loss, norm
        gradient = {}  # free the memory before the next row's gradient is computed
    return RowsAlone(losses, norms, sums, max_grad_norm or 1.0)


def _require_same_at_own_length(
    micro_batch: MicroBatch,
    row: int,
    own: tuple[int, int],
    loss: float,
    gradient: Mapping[str, Tensor],
) -> None:
    """Refuse a model whose loss or gradient of a row depends on the row's padding."""
    trouble = f"model must take no notice of padding, and row {micro_batch.first_row + row} "
    trimmed = trim(copy_rows(micro_batch.batch, [row]), *own)
    try:
        loss_own, gradient_own = gradient_alone(micro_batch, trimmed)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{trouble}cannot be run without its padding ({first_line(error)}): {PAD_PUBLICLY}"
        ) from error
    zero, norm = torch.zeros((), device=micro_batch.device), norm_of(gradient.values())
    moved = norm_of(
        gradient.get(name, zero) - gradient_own.get(name, zero)
        for name in {**gradient, **gradient_own}
    )
    if abs(loss - loss_own) > loss_allowance(micro_batch, loss) or not (
        moved <= gradient_allowance(micro_batch, loss) * norm + VANISHING
    ):
        raise ValueError(
            f"{trouble}has loss {loss:.6g} and gradient norm {norm:.6g} with padding, "
            f"{loss_own:.6g} and {norm_of(gradient_own.values()):.6g} without, so that longer rows "
            f"beside a row change its gradient: {PAD_PUBLICLY}"
        )


def norm_of(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all tensors together, in float64."""
    return math.sqrt(
        sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors)
    )
