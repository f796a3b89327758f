"""Collate token rows into padded batches, and sort rows of similar length into one batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from lowrank_dp import _validate
from lowrank_dp.losses import IGNORE


def collate(
    rows: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    *,
    side: str = "right",
    length: int | None = None,
) -> dict[str, torch.Tensor]:
    """Collate token rows into one batch, padded to one length.

    Args:
        rows: token rows of :func:`encode`, all with the same keys.
        pad_token_id: the token that fills the padding.
        side: the side of the padding: "right", or "left" for prompts to generate from.
        length: number of tokens per row; None takes the length of the longest row.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, T); ``token_type_ids`` (B, T) if the rows have
        them; ``labels``: (B,) int64 classes, (B,) float32 scores or, for generation, (B, T) int64
        with -100 on padding.

    Raises ValueError for no rows, rows with different keys, and a row longer than ``length``.
    """
    _validate.choice("side", side, ("right", "left"))
    if not rows:
        _validate.fail("rows", "non-empty", rows)
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError("rows must all have the same keys")
    longest = max(len(row["input_ids"]) for row in rows)
    if length is not None and longest > length:
        raise ValueError(
            f"rows must have at most the {length} tokens that they are padded to, got "
            f"{longest}: give a max_length to cut them"
        )
    length = longest if length is None else length

    def padded(sequences: Iterable[Sequence[int]], fill: int) -> torch.Tensor:
        tensors = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
        together = pad_sequence(tensors, True, fill, padding_side=side)
        left_over = length - together.shape[1]
        ends = (0, left_over) if side == "right" else (left_over, 0)
        return functional.pad(together, ends, value=fill)

    batch = {
        "input_ids": padded((row["input_ids"] for row in rows), pad_token_id),
        "attention_mask": padded(([1] * len(row["input_ids"]) for row in rows), 0),
    }
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = padded((row["token_type_ids"] for row in rows), 0)
    if "labels" in rows[0]:
        labels = [row["labels"] for row in rows]
        if isinstance(labels[0], Sequence):
            batch["labels"] = padded(labels, IGNORE)
        else:
            score = any(isinstance(label, float) for label in labels)
            batch["labels"] = torch.tensor(labels, dtype=torch.float32 if score else torch.int64)
    return batch


def micro_batches(
    rows: Sequence[Mapping[str, Any]],
    batch_size: int,
    pad_token_id: int,
    *,
    side: str = "right",
    length: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield ``(indices, batch)`` over all rows, with rows of similar length in one batch.

    ``indices[j]`` is the position in ``rows`` of the batch's row ``j``. Each batch is padded to its
    longest row, or to ``length``, and is on ``device``. The longest rows come first, so that a
    batch too large for the memory fails at once. No rows give no batch. The other arguments, the
    form of a batch and the errors are those of :func:`collate`; ``batch_size`` below 1 raises
    ValueError as well.
    """
    batch_size = _validate.integer("batch_size", batch_size)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = collate([rows[i] for i in indices], pad_token_id, side=side, length=length)
        yield indices, {name: tensor.to(device) for name, tensor in batch.items()}
