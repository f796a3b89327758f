"""Length of each row without its padding, and the rows that an examination compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lowrank_dp.grads.microbatch import Batch, MicroBatch, num_positions_of
from lowrank_dp.losses import IGNORE

NUM_COMPARED = 3  # rows that an examination compares at most


def is_square(micro_batch: MicroBatch) -> bool:
    """Return whether the batch has as many rows as one of its tensors has positions.

    In such a batch the axis of the rows cannot be told from the axis of the positions by its size.
    """
    return micro_batch.num_rows > 1 and any(
        isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == micro_batch.num_rows
        for value in micro_batch.batch.values()
    )


def own_lengths(model: Any, batch: Batch) -> list[tuple[int, int]]:
    """First position of each row that is not padding, and the position after the last one.

    ``attention_mask`` marks the padding; without a mask, the padding token of the model's
    configuration does. A position with a target is never padding. A row that consists of
    padding keeps its whole length.
    """
    length = num_positions_of(batch)
    mask, ids, labels = (batch.get(key) for key in ("attention_mask", "input_ids", "labels"))
    rows = next(len(value) for value in batch.values() if isinstance(value, Tensor))
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == length:
        real = mask != 0
    elif mask is None and isinstance(ids, Tensor) and ids.ndim == 2:
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        real = ids != (-1 if pad is None else pad)
    else:
        return [(0, length)] * rows
    if isinstance(labels, Tensor) and labels.shape == real.shape and not labels.is_floating_point():
        real = real | (labels != IGNORE)
    if bool(real.all()):
        return [(0, length)] * rows
    first = real.int().argmax(1)
    last = length - real.flip(1).int().argmax(1)
    found = real.any(1)
    return [
        (a, b) if some else (0, length)
        for a, b, some in zip(first.tolist(), last.tolist(), found.tolist(), strict=True)
    ]


def rows_to_compare(lengths: Sequence[tuple[int, int]]) -> list[int]:
    """Indices of the longest row, the shortest row and one between, without repetition."""
    by_length = sorted(range(len(lengths)), key=lambda row: lengths[row][0] - lengths[row][1])
    chosen = by_length[0], by_length[-1], by_length[len(by_length) // 2]
    return [*dict.fromkeys(chosen)][:NUM_COMPARED]


def trim(row: Batch, first: int, last: int) -> Batch:
    """Cut every tensor of positions of one row to the positions from ``first`` to ``last``."""
    length = num_positions_of(row)
    if (first, last) == (0, length):
        return row
    return {
        name: value[:, first:last]
        if isinstance(value, Tensor)
        and value.ndim > 1
        and value.shape[1] == length
        and not (name == "labels" and value.is_floating_point())
        else value
        for name, value in row.items()
    }
