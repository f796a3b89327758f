"""Check, on public rows, that a model keeps rows apart, before a private row reaches the model.

A refusal that private rows cause would depend on private data. :func:`require_independent_rows`
therefore makes rows of random tokens of the vocabulary, and examines the model as
``lowrank_dp.grads`` does: on the rows together, on each row alone, and on each row alone without
padding.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from lowrank_dp._terminal import first_line
from lowrank_dp.data import Example, Task, encode
from lowrank_dp.data.batches import collate
from lowrank_dp.grads.clipping import clipped_sum
from lowrank_dp.train.config import TrainConfig

LENGTHS = (4, 9, 23)  # tokens of the three rows' texts, if the model has room for them


def require_independent_rows(
    model: Any, tokenizer: Any, task: Task, max_length: int | None, config: TrainConfig
) -> None:
    """Raise ``ValueError`` if the gradient of a row depends on another row, or on padding.

    With padding "max-length", every row has ``max_length`` tokens, and padding is part of a row.
    The model is examined in float32, whatever ``config.precision`` is, and is not changed.

    Args:
        model: the model, not sharded yet.
        tokenizer: tokenizer of the model.
        task: task whose kind and labels the rows get.
        max_length: number of tokens that texts are cut to, or None.
        config: configuration of the run.
    """
    mode = model.training
    try:
        model.train(config.dropout)
        device = next(model.parameters()).device
        for batch in public_batches(tokenizer, task, max_length, config.padding):
            clipped_sum(
                model,
                {name: value.to(device) for name, value in batch.items()},
                1.0,
                padding=config.padding,
            )
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's own code may raise anything
        raise ValueError(
            f"model {config.model} cannot be trained on rows of random tokens "
            f"({type(error).__name__}: {first_line(error)}): correct its config.json"
        ) from error
    finally:
        model.train(mode)


def public_batches(
    tokenizer: Any, task: Task, max_length: int | None, padding: str
) -> list[dict[str, torch.Tensor]]:
    """Return batches of rows of random tokens, on the CPU.

    The first batch has three rows of different lengths. With padding "longest", there is a second
    batch, whose number of rows equals its number of tokens per row.
    """
    pad_to = max_length if padding == "max-length" else None
    room = max_length or tokenizer.model_max_length - 8
    lengths = [
        max(1, min(length, room * part // 4))
        for length, part in zip(LENGTHS, (1, 2, 4), strict=True)
    ]

    def rows(lengths: list[int]) -> list[dict[str, Any]]:
        return encode(
            _examples(tokenizer, task, lengths), tokenizer, kind=task.kind, max_length=max_length
        )

    batches = [rows(lengths)]
    if pad_to is None:
        batches += _square(rows(lengths[:1] * 4 * LENGTHS[0]))
    return [collate(batch, tokenizer.pad_token_id, length=pad_to) for batch in batches]


def _square(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return one batch of T rows of T tokens each, or no batch if there are too few rows.

    In such a batch, the layer inputs (positions, rows, ...) and (rows, positions, ...) have the
    same shape.
    """
    counts = Counter(len(row["input_ids"]) for row in rows)
    length = next((length for length, count in counts.items() if 1 < length <= count), 0)
    return [[row for row in rows if len(row["input_ids"]) == length][:length]] if length else []


def _examples(tokenizer: Any, task: Task, lengths: list[int]) -> list[Example]:
    """Return examples of the task's kind made from random tokens, one per length."""
    generator = torch.Generator().manual_seed(0)
    special = set(tokenizer.all_special_ids)
    known = torch.tensor([i for i in range(len(tokenizer)) if i not in special])

    def text(length: int) -> str:
        chosen = known[torch.randint(len(known), (length,), generator=generator)]
        return tokenizer.decode(chosen.tolist())

    paired = any(example.text_pair is not None for example in task.train[:1])
    examples = []
    for i, length in enumerate(lengths):
        label: float | int | None = None
        if task.kind == "classification":
            label = i % task.num_labels
        elif task.kind == "regression":
            label = i / 2
        examples.append(
            Example(
                id=f"public/{i}",
                text=text(length),
                text_pair=text(2) if paired else None,
                label=label,
                target=text(3) if task.kind == "generation" else None,
            )
        )
    return examples
