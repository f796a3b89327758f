"""Make a task of a user's own data: find the role of each column."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lowrank_dp import _validate
from lowrank_dp._options import option
from lowrank_dp.data.examples import bad_cell, cell
from lowrank_dp.data.formats import Table
from lowrank_dp.data.labels import (
    MAX_SHOWN,
    in_words,
    is_empty,
    is_missing,
    labels_alike,
    read_labels,
)
from lowrank_dp.data.readers import read_tables, stem_of, unread_splits
from lowrank_dp.data.rows import Row, to_examples
from lowrank_dp.data.task import Task, TaskSpec, build_task

# (text or source, pair, target): columns that are found by their own names
_KNOWN = (
    ("meaning_representation", None, "human_reference"),
    ("tripleset", None, "annotations"),
    ("source", None, "target"),
    ("prompt", None, "target"),
    ("sentence1", "sentence2", None),
    ("question1", "question2", None),
    ("premise", "hypothesis", None),
    ("question", "sentence", None),
    ("sentence", None, None),
    ("text", None, None),
)


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a user's own data, by the role of the column.

    The help texts document the roles. For a role that is None, a column with a known name is taken,
    such as "sentence" or "label". A label is a class (a string, a truth value or an integer >= 0)
    or a score (a float). Without ``group``, the records with a target that share one source text
    form a group.
    """

    text: str | None = option(
        None,
        "Column of own data with the text of a labelled record or, for an attack, with plain text.",
        name="text_column",
    )
    pair: str | None = option(
        None, "Column of own data with the second text of a labelled record.", name="pair_column"
    )
    label: str | None = option(
        None,
        "Column of own data with classes (strings, integers) or scores (floats).",
        name="label_column",
    )
    prompt: str | None = option(
        None,
        "Column of own data with the source that a text is generated from.",
        name="prompt_column",
    )
    target: str | None = option(
        None, "Column of own data with the text to generate.", name="target_column"
    )
    group: str | None = option(
        None,
        "Column of own data with one value per person; --unit group makes the rows with one "
        "value one unit of privacy.",
        name="group_column",
    )

    def __post_init__(self) -> None:
        for role, name in asdict(self).items():
            if name is not None and not isinstance(name, str):
                _validate.fail(f"{role}_column", "the name of a column", name)

    @classmethod
    def of(cls, config: Any) -> Columns:
        """Read the fields ``text_column``, ... of a configuration or of its JSON object."""
        found = config if isinstance(config, Mapping) else vars(config)
        return cls(**{f.name: found.get(f"{f.name}_column") for f in fields(cls)})

    def __bool__(self) -> bool:
        return any(asdict(self).values())


def own_column(role: str) -> Any:
    """Declare a column's option in another dataclass, with the help text of ``Columns``."""
    return option(None, next(f.metadata["help"] for f in fields(Columns) if f.name == role))


def own_task(path: Path, columns: Columns) -> Task:
    """Make a task of a user's own file or folder.

    The task's ``warning`` lists the columns and splits that are not read and the classes that look
    wrong. Raises ValueError in one line that names file, row and column.
    """
    tables = read_tables(path)
    if not any(table.rows for table in tables.values()):
        raise ValueError(f"{path} must hold records, all its files are empty")
    available = tuple(dict.fromkeys(name for table in tables.values() for name in table.columns))
    first = next(row for table in tables.values() for row in table.rows)
    roles = _roles(columns, available, path, first[0])
    ignored = tuple(name for name in available if name not in {*asdict(roles).values(), "idx"})
    unread = [f"column {name!r:.60}" for name in ignored]
    if roles.label and len(tables) > 1 and "test" in tables:
        cells = [row.get(roles.label) for _, row in tables["test"].rows]
        if all(map(is_missing, cells)):  # competitions publish the test split without its labels
            del tables["test"]
            unread.append(f"the test split, which has no labels in column {roles.label!r}")
    unread += [
        f"the split {name!r:.60}, which is called neither train, validation nor test"
        for name in unread_splits(path)
    ]
    task = _build(path, roles, tables)
    remarks = _doubtful_classes(task)
    if unread:
        remarks.insert(
            0,
            f"not read: {', '.join(unread[:20])}; a command that has options such as --text-column "
            "and --group-column reads the columns that they name",
        )
    warning = f"{path}: {'; '.join(remarks)}" if remarks else ""
    return replace(task, unused=ignored, warning=warning)


def _doubtful_classes(task: Task) -> list[str]:
    """List remarks on classes that the train split lacks, and on classes spelt almost alike."""
    remarks, names = [], task.label_names
    if names and "train" in task.splits:
        used = {example.label for examples in task.splits.values() for example in examples}
        used -= {example.label for example in task.train}
        if absent := [name for place, name in enumerate(names) if place in used]:
            remarks.append(f"no row of the train split has the class {in_words(absent)}")
    folded = [" ".join(name.casefold().split()) for name in names]
    if alike := [name for name, key in zip(names, folded, strict=True) if folded.count(key) > 1]:
        remarks.append(
            f"the classes {', '.join(map(repr, alike[:MAX_SHOWN]))} differ only in case or "
            "white space: write them alike if they are the same"
        )
    return remarks


def _build(path: Path, roles: Columns, tables: Mapping[str, Table]) -> Task:
    """Make the task of tables whose columns have been given their roles."""
    texts = [
        name
        for name in (roles.text, roles.pair, roles.prompt, roles.target)
        if name and name not in ("tripleset", "annotations")
    ]
    if roles.label:
        tables = labels_alike(roles.label, tables)
    rows = {split: [_checked(row, texts) for row in table.rows] for split, table in tables.items()}
    classes: tuple[str, ...] = ()
    if roles.label:
        classes, values = read_labels(roles.label, tables, path)
        rows = {
            split: [(where, row | {roles.label: values[row[roles.label]]}) for where, row in found]
            for split, found in rows.items()
        }
    metrics = ("accuracy",) if classes else ("pearson", "spearman")
    spec = TaskSpec(
        folder="",
        hub_id="",
        config=None,
        text=roles.prompt or roles.text or "",
        pair=roles.pair,
        target=roles.target,
        label=roles.label or "label",
        group=roles.group,
        labels=classes,
        metrics=("bleu", "rouge_l") if roles.target else metrics,
    )
    name = stem_of(path.absolute()) if path.is_file() else path.resolve().name
    splits = {}
    for split, found in rows.items():
        # a group is a unit of privacy, so a split that is not trained on needs no group column
        needed = split == "train" or roles.group in tables[split].columns
        splits[split] = to_examples(
            found, name, split, spec if needed else replace(spec, group=None)
        )
    return build_task(name, spec, splits, f"local files {path}: {_roles_in_words(roles, classes)}")


def _roles_in_words(roles: Columns, classes: tuple[str, ...]) -> str:
    """Write which column has which role, for the ``source`` of a task."""
    count = f"{len(classes)} class{'es' * (len(classes) != 1)}: {in_words(classes)}"
    labels = f" ({count})" if classes else " (a score)"
    return ", ".join(
        f"{role} from {name!r}{labels if role == 'label' else ''}"
        for role, name in asdict(roles).items()
        if name
    )


def _roles(given: Columns, available: tuple[str, ...], path: Path, first: str) -> Columns:
    """Find the column of each role; raise ValueError if a role that is needed has none.

    Args:
        given: the columns that the user names.
        available: all columns, in order.
        first: the place of the first row, for messages.
    """
    _check_given(given, available, path)
    shown = ", ".join(map(repr, available))
    labelled = given.text or given.pair or given.label
    found = given
    if not (given.text or given.prompt):
        known = next(
            (c for c in _KNOWN if {*filter(None, c)} <= {*available} and not (c[2] and labelled)),
            None,
        )
        if known is None:
            raise ValueError(
                f"{first}: columns must be like GLUE's (sentence or text, sentence1 "
                "and sentence2, ..., with label) or source and target, or be named by "
                "text_column, label_column and the like where the command has these options, got "
                f"{shown}: rename or name the columns"
            )
        text, pair, target = known
        found = (
            replace(given, prompt=text, target=target)
            if target
            else replace(given, text=text, pair=pair)
        )
    if found.text and not found.label:
        if "label" not in available:
            raise ValueError(
                f"{path}: the column with the labels must be called 'label', or be named by "
                f"label_column where the command has this option, got {shown}"
            )
        found = replace(found, label="label")
    used = [name for name in asdict(found).values() if name]
    if twice := next((name for name in used if used.count(name) > 1), None):
        raise ValueError(f"column {twice!r} of {path} must have one role, it was given several")
    return found


def _check_given(given: Columns, available: tuple[str, ...], path: Path) -> None:
    """Raise ValueError if a named column is missing, or if the named roles exclude each other."""
    shown = ", ".join(map(repr, available))
    for role, name in asdict(given).items():
        if name is not None and name not in available:
            raise ValueError(
                f"{role}_column must be a column of {path} ({shown}), got {name!r}"
                f"{_validate.did_you_mean(name, available)}"
            )
    if (given.prompt or given.target) and (given.text or given.pair or given.label):
        raise ValueError(
            "prompt_column and target_column must go without text_column, "
            "pair_column and label_column: a record has either a target to generate or a label"
        )
    for role, other in (("pair", "text"), ("prompt", "target"), ("target", "prompt")):
        if getattr(given, role) and not getattr(given, other):
            raise ValueError(
                f"{role}_column must come with {other}_column, which names one of {shown}"
            )


def _checked(row: Row, texts: Iterable[str]) -> Row:
    """Return the row with its ``idx`` as an integer; raise ValueError if a text is empty."""
    where, cells = row
    for column in texts:
        value = cell(where, cells, column)
        if is_empty(value):
            bad_cell(
                where, column, "a text that is not empty: fill it in or leave the row out", value
            )
    index = cells.get("idx")
    if (isinstance(index, str) and re.fullmatch(r"\d{1,18}", index, re.ASCII)) or (
        isinstance(index, float) and index.is_integer()
    ):
        return where, cells | {"idx": int(index)}
    return row
