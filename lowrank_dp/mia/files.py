"""The user's own files of members, of non-members, and of records that are in no model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank_dp import _validate
from lowrank_dp.data import Columns, Example, Task, load_task
from lowrank_dp.data.examples import record_group
from lowrank_dp.mia.checkpoint import Checkpoint


@dataclass(frozen=True)
class Reading:
    """How files are read: the user's names of columns, and the head that decides what is wanted."""

    columns: Columns
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Given:
    """The records of one file; their labels count in ``task.label_names``."""

    path: Path
    task: Task
    examples: tuple[Example, ...]


def read(path: Path, side: str, reading: Reading, name: str = "") -> Given:
    """A user's file: ids start with ``side``, and groups agree with those of task ``name``.

    By default the name is the file's own. For a causal language model, a file without prompts and
    targets is read as plain texts, each an example without a target.
    """
    path = path.expanduser()
    if not path.exists():
        _validate.fail(side, "an existing file of records (JSON Lines or another table)", str(path))
    task = _task(path, reading)
    if len(task.splits) > 1:
        raise ValueError(f"{side} must be one table, {path} has {', '.join(task.splits)}: give the "
                         "file of one of them")
    examples = []
    for example in next(iter(task.splits.values())):
        unique = f"{side}/{example.id.rsplit('/', 1)[1]}"
        group = (record_group(name or task.name, example.text) if task.kind == "generation"
                 else unique)
        examples.append(replace(example, id=unique, group=group))
    return Given(path, task, tuple(examples))


def _task(path: Path, reading: Reading) -> Task:
    columns = reading.columns
    wants_text = reading.checkpoint.kind == "generation" and not (
        columns.prompt or columns.target or columns.label)
    if wants_text and columns.text is not None:
        return _plain(path, columns.text)
    try:
        return load_task(str(path.absolute()), columns=columns)
    except ValueError as error:
        if not wants_text:
            raise
        try:
            return _plain(path, "text")
        except ValueError:
            raise error from None


def _plain(path: Path, column: str) -> Task:
    """Whole texts: read as prompts that are their own targets, then without the targets."""
    task = load_task(str(path.absolute()), columns=Columns(prompt=column, target=column))
    splits = {split: tuple(replace(example, target=None) for example in examples)
              for split, examples in task.splits.items()}
    return replace(task, splits=splits)


# --- classes ---------------------------------------------------------------------------------


def in_common_classes(given: Sequence[Given], checkpoint: Checkpoint
                      ) -> tuple[Task, list[tuple[Example, ...]]]:
    """The files' records with labels that count in the model's classes, and their task.

    Labels that are integers are the model's own class numbers. Labels that are words are mapped by
    name to the model's, or, where the model's have no names, in sorted order over all files.
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
    task = replace(task, num_labels=count or max(2, highest + 1),
                   label_names=() if own_names else known, splits={"train": found[0]})
    return task, found


def in_classes_of(given: Given, task: Task) -> tuple[Example, ...]:
    """The file's records with labels that count in the classes of ``task``."""
    if given.task.kind != "classification":
        return given.examples
    return _numbered(given, task.label_names, task.num_labels, task.name)


def _numbered(given: Given, known: Sequence[str], count: int | None, whose: str
              ) -> tuple[Example, ...]:
    names = given.task.label_names
    if known and _all_in(names, known):
        place = {_folded(name): i for i, name in enumerate(known)}
        numbers = [place[_folded(name)] for name in names]
    elif all(map(_is_number, names)):
        numbers = [int(name) for name in names]
        used = {numbers[int(e.label or 0)] for e in given.examples}
        if min(used) < 0 or (count is not None and max(used) >= count):
            wrong = max(used) if min(used) >= 0 else min(used)
            raise ValueError(f"{given.path}: labels must be below {count}, as in {whose}, got "
                             f"{wrong}")
    else:
        raise ValueError(f"{given.path}: labels must be among {', '.join(known)}, those of "
                         f"{whose}, got {', '.join(names)}")
    return tuple(replace(e, label=numbers[int(e.label or 0)]) for e in given.examples)


def _all_in(names: Sequence[str], known: Sequence[str]) -> bool:
    return {_folded(name) for name in names} <= {_folded(name) for name in known}


def _folded(name: str) -> str:
    return name if _is_number(name) else re.sub(r"[-_ ]", "", name.casefold())


def _is_number(name: str) -> bool:
    return re.fullmatch(r"-?\d{1,18}", name) is not None
