"""Read the user's own files of members, of non-members, and of records that are in no model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank_dp import _validate
from lowrank_dp.data import Columns, Example, Task, load_task
from lowrank_dp.data.examples import bad_cell, cell, record_group
from lowrank_dp.data.readers import read_tables, stem_of
from lowrank_dp.mia.checkpoint import Checkpoint

_TARGETS = ("target", "human_reference", "annotations")  # columns of texts after a prompt


@dataclass(frozen=True)
class Reading:
    """Settings of reading: the user's names of columns, and the head of the attacked checkpoint."""

    columns: Columns
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Given:
    """The records of one file.

    Attributes:
        path: the file.
        task: the file's task; labels of the records are positions in ``task.label_names``.
        examples: the records.
        columns: the role of each column, in words.
    """

    path: Path
    task: Task
    examples: tuple[Example, ...]
    columns: str


def read_file(path: Path, side: str, reading: Reading, name: str = "") -> Given:
    """Read a user's file.

    The ids start with ``side``; the groups agree with those of task ``name`` (default: the file's
    own name). If the checkpoint is a causal language model, a file without prompts and targets is
    read as plain texts, each an example without a target. Raises ValueError for a missing file, for
    several splits, and as ``data.load_task`` does.
    """
    path = _validate.expanded(side, path)
    if not path.exists():
        _validate.fail(side, "an existing file of records (JSON Lines or another table)", str(path))
    task = _task(path, reading)
    if len(task.splits) > 1:
        raise ValueError(
            f"{side} must be one table, {path} has {', '.join(task.splits)}: give the "
            "file of one of them"
        )
    examples = []
    for example in next(iter(task.splits.values())):
        unique = f"{side}/{example.id.rsplit('/', 1)[1]}"
        group = (
            record_group(name or task.name, example.text) if task.kind == "generation" else unique
        )
        examples.append(replace(example, id=unique, group=group))
    columns = task.source.removeprefix(f"local files {path.absolute()}: ")
    return Given(path, task, tuple(examples), columns)


def _task(path: Path, reading: Reading) -> Task:
    columns, absolute = reading.columns, path.absolute()
    if reading.checkpoint.kind == "generation" and not (
        columns.prompt or columns.target or columns.label
    ):
        if columns.text is not None:
            return _plain_texts(absolute, columns.text)
        there = {name for table in read_tables(absolute).values() for name in table.columns}
        if "text" in there and not there & {"label", *_TARGETS}:
            return _plain_texts(absolute, "text")
    return load_task(str(absolute), columns=columns)


def _plain_texts(path: Path, column: str) -> Task:
    """Read the texts of one column as examples without label and target."""
    name, splits = stem_of(path), {}
    for split, table in read_tables(path).items():
        examples = []
        for number, (where, row) in enumerate(table.rows):
            text = cell(where, row, column)
            if not isinstance(text, str) or not text.strip():
                bad_cell(
                    where, column, "a text that is not empty: fill it in or leave the row out", text
                )
            examples.append(Example(f"{name}/{split}/{number}", text))
        if not examples:
            raise ValueError(f"{path} must hold records, got none: it is empty")
        splits[split] = tuple(examples)
    return Task(name, "generation", 0, (), (), splits, f"local files {path}: text from {column!r}")


# --- classes ---------------------------------------------------------------------------------


def in_common_classes(
    given: Sequence[Given], checkpoint: Checkpoint
) -> tuple[Task, list[tuple[Example, ...]]]:
    """Number the labels of several files by the model's classes; return task and records.

    Labels that are integers are the model's own class numbers. Labels that are words are matched
    with the names of the model's classes or, if these have no names, numbered in sorted order over
    all files. Raises ValueError for a label that is none of the model's.
    """
    task = given[0].task
    if task.kind != "classification" or any(one.task.kind != task.kind for one in given):
        return replace(task, splits={"train": given[0].examples}), [one.examples for one in given]
    words = sorted({name for one in given for name in one.task.label_names})
    known = checkpoint.label_names
    if not known and not all(map(_is_number, words)):
        known = tuple(words)
    count = checkpoint.num_labels or (len(known) if known else None)
    found = [_numbered(one, known, count, "the model") for one in given]
    highest = max(int(e.label or 0) for examples in found for e in examples)
    own_names = all(map(_is_number, words)) and not _all_in(words, known)
    task = replace(
        task,
        num_labels=count or max(2, highest + 1),
        label_names=() if own_names else known,
        splits={"train": found[0]},
    )
    return task, found


def in_classes_of(given: Given, task: Task) -> tuple[Example, ...]:
    """Number the labels of a file by the classes of ``task``; ValueError for another label."""
    if given.task.kind != "classification":
        return given.examples
    return _numbered(given, task.label_names, task.num_labels, task.name)


def _numbered(
    given: Given, known: Sequence[str], count: int | None, whose: str
) -> tuple[Example, ...]:
    names = given.task.label_names
    if known and _all_in(names, known):
        exact = {name: i for i, name in enumerate(known)}  # classes may fold alike, as US and us
        place = {_folded(name): i for i, name in enumerate(known)}
        numbers = [exact.get(name, place[_folded(name)]) for name in names]
    elif all(map(_is_number, names)):
        numbers = [int(name) for name in names]
        used = {numbers[int(e.label or 0)] for e in given.examples}
        if min(used) < 0 or (count is not None and max(used) >= count):
            wrong = max(used) if min(used) >= 0 else min(used)
            raise ValueError(
                f"{given.path}: labels must be below {count}, as in {whose}, got {wrong}"
            )
    else:
        raise ValueError(
            f"{given.path}: labels must be among {', '.join(known)}, those of "
            f"{whose}, got {', '.join(names)}"
        )
    return tuple(replace(e, label=numbers[int(e.label or 0)]) for e in given.examples)


def _all_in(names: Sequence[str], known: Sequence[str]) -> bool:
    return {_folded(name) for name in names} <= {_folded(name) for name in known}


def _folded(name: str) -> str:
    """Remove case, hyphens, underscores and blanks from a class's name; leave numbers unchanged."""
    return name if _is_number(name) else re.sub(r"[-_ ]", "", name.casefold())


def _is_number(name: str) -> bool:
    return re.fullmatch(r"-?\d{1,18}", name) is not None
