"""Public text of a preconditioner (generated text or a public task), and its second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dp.data import Example, Task, encode, load_task, micro_batches
from lowrank_dp.data import generated as english
from lowrank_dp.data.copies import is_copy
from lowrank_dp.grads import clipped_sum_over
from lowrank_dp.precondition.moments import Moment, public_moments

GENERATED = "generated"
_SEED = 0  # seed of generated text and of the order of public rows; the seed need not be secret


@dataclass(frozen=True)
class PublicRows:
    """Public examples, with labels that the run's model can be trained on.

    Attributes:
        examples: the public examples.
        source: source of the examples, in words.
        copy: whether the public task is a copy of the private task (``data.copies.is_copy``).
    """

    examples: tuple[Example, ...]
    source: str
    copy: bool = False


def public_rows(source: str, task: Task, count: int) -> PublicRows:
    """Return about ``count`` public examples for a model of the private task.

    A public label is mapped to a class of the model's head: the number of the label, modulo the
    number of classes. The public labels serve to compute gradients; they need not mean the same as
    the classes of the private task.

    Args:
        source: "generated" for the package's public sentences or tables, which are disjoint from
            every generated task; or the name or path of a public task.
        task: the private task. Its kind and its number of classes are read. Its training texts are
            compared with the public texts, to recognise a copy.
        count: expected number of rows. Each row of a public task is kept with equal probability
            (``load_task``).

    Raises:
        ValueError: if the public task can't be loaded, or its kind does not fit.
    """
    if source == GENERATED:
        return PublicRows(_generated(task.kind, count), "the package's generated text")
    try:
        whole = load_task(source, warn=False)
        public = load_task(source, max_examples=count, seed=_SEED, warn=False)
    except ValueError as error:
        reason = str(error).replace("max_examples", "precondition_rows")
        if "text_column" in reason:
            reason += "; rename its columns, since those options name columns of the private task"
        raise ValueError(f"precondition {source!r} can't be read: {reason}") from error
    if (task.kind == "generation") != (public.kind == "generation") or (
        task.kind == "classification" and public.kind != "classification"
    ):
        raise ValueError(
            f"precondition must name a public task of kind {task.kind}, as {task.name} is; "
            f"{public.name} is of kind {public.kind}"
        )
    examples = public.train
    if task.kind == "classification":
        examples = tuple(replace(e, label=int(e.label or 0) % task.num_labels) for e in examples)
    copy = is_copy([e for split in whole.splits.values() for e in split], task.train)
    return PublicRows(examples, f"{public.name} from {public.source}", copy)


def _generated(kind: str, count: int) -> tuple[Example, ...]:
    if kind == "generation":
        return tuple(
            Example(f"public/{i}", table, target=text)
            for i, (table, text) in enumerate(english.public_tables(count, _SEED))
        )
    return tuple(
        Example(f"public/{i}", text, label=label)
        for i, (text, label) in enumerate(english.public_sentiment(count, _SEED))
    )


def model_moments(
    model: nn.Module,
    tokenizer: Any,
    rows: PublicRows,
    kind: str,
    *,
    steps: int = 10,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    max_grad_norm: float = 1.0,
    max_length: int | None = None,
    pad_to: int | None = None,
    micro_batch_size: int = 64,
) -> dict[str, Moment]:
    """Return the second moments of clipped public gradient sums along noise-free steps of Adam.

    The model is trained in its present mode (train or eval). At the end, the model gets its initial
    weights back.

    Args:
        model, tokenizer: the model and its tokenizer.
        rows: public rows.
        kind: kind of the private task.
        steps: number of steps, >= 1.
        batch_size: number of rows per step, >= 1; all rows if ``rows`` has fewer. The random order
            of the rows is the same in every run.
        learning_rate: learning rate of Adam, above 0.
        max_grad_norm: clipping norm C of a row, absolute.
        max_length: number of tokens that texts are cut to; None does not cut.
        pad_to: number of tokens that every row is padded to; None pads to the longest row.
        micro_batch_size: number of rows in memory at a time.

    Returns:
        Name of each trained matrix -> moment.

    Raises:
        ValueError: if a public row can't be encoded, or has a gradient that is not finite.
    """
    encoded = encode(list(rows.examples), tokenizer, kind=kind, max_length=max_length)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(trained.values())).device

    def gradient(chosen: Sequence[int]) -> Mapping[str, Tensor]:
        batches = micro_batches(
            [encoded[i] for i in chosen],
            micro_batch_size,
            tokenizer.pad_token_id,
            length=pad_to,
            device=str(device),
        )
        sums, _ = clipped_sum_over(
            model,
            (batch for _, batch in batches),
            max_grad_norm,
            padding="longest" if pad_to is None else "max-length",
            check_rows=False,  # independence of rows was checked before, on random tokens
        )
        return {name: total / len(chosen) for name, total in sums.items()}

    def functions() -> Iterator[Callable[[], Mapping[str, Tensor]]]:
        order = _order(len(encoded), batch_size, steps)
        yield from (partial(gradient, chosen) for chosen in order)

    try:
        return public_moments(trained, functions(), learning_rate=learning_rate)
    except ValueError as error:
        raise ValueError(f"precondition, on {rows.source}: {error}") from error


def _order(count: int, batch_size: int, steps: int) -> list[list[int]]:
    """Return the rows of each step, from consecutive random permutations of all rows."""
    generator = torch.Generator().manual_seed(_SEED)
    size = min(batch_size, count)
    rows: list[int] = []
    while len(rows) < size * steps:
        rows += torch.randperm(count, generator=generator).tolist()
    return [rows[i * size : (i + 1) * size] for i in range(steps)]
