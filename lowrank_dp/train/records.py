"""Records of a run: its task, its units of privacy, and which are held out or trained on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

from lowrank_dp.data import Columns, Example, Task, encode, load_task
from lowrank_dp.data.selection import has_group, partition, require_alone, threshold, unit_content
from lowrank_dp.membership.units import draw_members, group_units
from lowrank_dp.train.config import TrainConfig

LABELLED_LENGTH = 128  # default number of tokens that a text with a label is cut to


def load_records(config: TrainConfig, data_dir: str | None = None) -> Task:
    """Load the task of a run, or its subset of ``max_examples``; raise as ``load_task`` does."""
    return load_task(
        config.task,
        data_dir=data_dir,
        max_examples=config.max_examples,
        seed=config.data_seed,
        columns=Columns.of(config),
        warn=False,
    )


def select_units(
    config: TrainConfig, seed: int, data_dir: str | None = None
) -> tuple[Task, list[list[Example]], list[bool]]:
    """Load the task, and draw which of its units of privacy are trained on.

    Args:
        config: configuration of the run.
        seed: seed of the membership bits.
        data_dir: folder of a named task, in place of ``LOWRANK_DP_DATA``.

    Returns:
        The task, with held-out units in place of its validation split if the run has a holdout;
        every unit of the train split; and for every unit whether the run
        trains on the unit.

    Raises:
        ValueError: if the units do not fit the configuration, or can't be trained on.
    """
    task = load_records(config, data_dir)
    _check_unit(config, task)
    task = hold_out(task, config.holdout, config.unit) if config.holdout else task
    units = group_units(task.train, config.unit)
    members = _draw_members(units, config.membership, seed)
    _check_members(config, task, [*compress(units, members)])
    return task, units, members


def hold_out(task: Task, count: int, unit: str) -> Task:
    """Return the task with about ``count`` units of its train split as the validation split.

    The held-out units are the same for every seed. Each group is held out on its own, with all its
    rows, by comparing a keyed hash with a threshold (``data.selection``). An additional unit in the
    train split therefore changes the side of no other unit, and ``count`` is an expectation.

    Raises:
        ValueError: if ``count`` is not below the number of units, or chooses all or none of them.
    """
    units = len(group_units(task.train, unit))
    if not count < units:
        raise ValueError(
            f"holdout must be below the {units:,} {unit}s of {task.name}'s train "
            f"split, got {count:,}"
        )
    share = threshold(count, units)
    held_out, rest = partition(task.train, share, "holdout", "")
    require_alone(
        lambda rows: partition(rows, share, "holdout", "")[0], task.train, repr, "holdout"
    )
    if not held_out or not rest:
        raise ValueError(
            f"holdout {count:,} chose {'all' if held_out else 'none'} of the "
            f"{units:,} {unit}s of {task.name}'s train split (their number is "
            f"random): give a {'smaller' if held_out else 'larger'} one"
        )
    return replace(task, splits={"train": rest, "validation": held_out})


def token_limit(config: TrainConfig, task: Task, tokenizer: Any) -> int | None:
    """Return the number of tokens that texts are cut to, or None if texts are not cut.

    Raises ValueError for rows that are padded to a length that is not given.
    """
    found = length_of_texts(config, task.kind, lambda: tokenizer)
    if found is None and config.padding == "max-length":
        raise ValueError(
            "max_length must be given to pad every row to it (padding 'max-length') "
            f"for {task.name}, a generation task: give --max-length"
        )
    return found


def length_of_texts(config: TrainConfig, kind: str, tokenizer: Callable[[], Any]) -> int | None:
    """Return the number of tokens that a run of a task of a kind cuts texts to, or None.

    ``tokenizer`` returns the run's tokenizer, and is called only if the default length of texts
    with labels, which the model's context limits, is needed.
    """
    if config.max_length is not None:
        return config.max_length
    return None if kind == "generation" else min(LABELLED_LENGTH, tokenizer().model_max_length)


def check_room(config: TrainConfig, task: Task, tokenizer: Any, max_length: int | None) -> None:
    """Refuse prompts that leave no room for ``max_new_tokens`` in the model's context.

    Without this check, the last evaluation would fail once the privacy is spent.
    """
    prompts = encode(
        task.validation, tokenizer, kind=task.kind, max_length=max_length, with_target=False
    )
    room = tokenizer.model_max_length - max(len(prompt["input_ids"]) for prompt in prompts)
    if config.max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens must be <= {room}, what the longest prompt of "
            f"{task.name}'s validation split leaves of the model's context of "
            f"{tokenizer.model_max_length}, got {config.max_new_tokens}; or cut the "
            "prompts by a max_length, or leave generate out"
        )


def _draw_members(units: list[list[Example]], membership: str, seed: int) -> list[bool]:
    """Draw for each unit whether the run trains on the unit.

    For Bernoulli membership, verify that each bit depends on its own unit alone.
    """

    def choose(some: Sequence[list[Example]]) -> list[list[Example]]:
        return [*compress(some, draw_members(some, membership, seed))]

    if membership == "bernoulli":
        require_alone(choose, units, unit_content, "membership 'bernoulli'")
    return draw_members(units, membership, seed)


def _check_unit(config: TrainConfig, task: Task) -> None:
    """Refuse groups where none are known, and warn where every group is a single row."""
    if config.unit != "group":
        return
    if not any(map(has_group, task.train)):
        could = ", ".join(map(repr, task.unused[:10]))
        fix = (
            f"name their column by group_column (not read so far: {could})"
            if could
            else "use unit 'example', or own data with a group_column"
        )
        raise ValueError(
            f"unit 'group' must come with groups of rows, {task.name} has none that "
            f"are known: {fix}"
        )
    if len(group_units(task.train, "group")) == len(task.train) > 1:
        warnings.warn(
            f"each of the {len(task.train):,} groups of {task.name} is a single row: "
            "unit 'group' protects no more than unit 'example'",
            stacklevel=4,
        )


def _check_members(config: TrainConfig, task: Task, members: list[list[Example]]) -> None:
    """Refuse too few units, a single class, and a task without a validation split."""
    if config.batch_size > len(members):
        raise ValueError(
            f"batch_size must be at most the {len(members):,} {config.unit}s that "
            f"are trained on, got {config.batch_size:,}"
        )
    if task.kind == "classification":
        labels = {example.label for unit in members for example in unit}
        if len(labels) < 2:
            name = task.label_names[int(labels.pop() or 0)]
            raise ValueError(
                f"{task.name} must have training examples of two classes or more, all "
                f"have label {name:.80}"
            )
    task.split("validation")
