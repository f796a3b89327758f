"""A user's own data as a task: the role of each column, and the classes of the labels."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lowrank_dp import _validate
from lowrank_dp._options import option
from lowrank_dp.data.examples import bad_cell, cell, check_unicode
from lowrank_dp.data.formats import Table
from lowrank_dp.data.readers import read_tables, stem_of, unread_splits
from lowrank_dp.data.rows import Row, to_examples
from lowrank_dp.data.task import Task, TaskSpec, build_task

MAX_CLASSES = 1000
_SHOWN = 10  # classes that a message lists
_LARGEST = 2**63
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
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a user's own data; None is found by the column's own name.

    The help texts document the fields. A label is a class (a string, a truth value or an integer
    >= 0) or a score (a float). ``group`` None: the source text of a record to generate.
    """

    text: str | None = option(
        None,
        "Column of own data with the text of a labelled record, or with plain texts (attacks).",
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
        "Column of own data that rows of one person share: the groups of --unit group.",
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
    """Declare the option of a column in another dataclass, with the help text that Columns has."""
    return option(None, next(f.metadata["help"] for f in fields(Columns) if f.name == role))


def own_task(path: Path, columns: Columns) -> Task:
    """Make a task of a user's own file or folder.

    The task's ``warning`` lists what is not read and which classes look wrong. Raises ValueError
    in one line that names file, row and column.
    """
    tables = read_tables(path)
    if not any(table.rows for table in tables.values()):
        raise ValueError(f"{path} must hold records, all its files are empty")
    available = tuple(dict.fromkeys(name for table in tables.values() for name in table.columns))
    first = next(row for table in tables.values() for row in table.rows)
    roles = _roles(columns, available, path, first[0])
    ignored = tuple(name for name in available if name not in {*asdict(roles).values(), "idx"})
    unread = [f"column {name!r:.60}" for name in ignored]
    if roles.label and "test" in tables and roles.label not in tables["test"].columns:
        del tables["test"]  # competitions publish the test split without its labels
        unread.append(f"the test split, which has no column {roles.label!r}")
    unread += [
        f"the split {name!r:.60}, which is called neither train, validation nor test"
        for name in unread_splits(path)
    ]
    task = _build(path, roles, tables)
    remarks = _doubtful_classes(task)
    if unread:
        remarks.insert(
            0,
            f"not read: {', '.join(unread[:20])}; name a column by an option such as "
            "--text-column or --group-column to read it",
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
            remarks.append(f"no row of the train split has the class {_in_words(absent)}")
    folded = [" ".join(name.casefold().split()) for name in names]
    if alike := [name for name, key in zip(names, folded, strict=True) if folded.count(key) > 1]:
        remarks.append(
            f"the classes {', '.join(map(repr, alike[:_SHOWN]))} differ only in case or "
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
    rows = {split: [_checked(row, texts) for row in table.rows] for split, table in tables.items()}
    classes: tuple[str, ...] = ()
    if roles.label:
        classes, values = _labels(roles.label, tables, path)
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
    count = f"{len(classes)} class{'es' * (len(classes) != 1)}: {_in_words(classes)}"
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
                "and sentence2, ..., with label) or source and target, or be named "
                f"by text_column, label_column and the like, got {shown}"
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
                f"{path}: label_column must name the column with the labels, there is "
                f"none called 'label' among {shown}"
            )
        found = replace(found, label="label")
    used = [name for name in asdict(found).values() if name]
    if twice := next((name for name in used if used.count(name) > 1), None):
        raise ValueError(f"column {twice!r} of {path} must have one role, it was given several")
    return found


def _check_given(given: Columns, available: tuple[str, ...], path: Path) -> None:
    """Raise ValueError if the user names a column that is missing, or roles that contradict."""
    shown = ", ".join(map(repr, available))
    for role, name in asdict(given).items():
        if name is not None and name not in available:
            near = difflib.get_close_matches(name, available, n=1)
            raise ValueError(
                f"{role}_column must be a column of {path} ({shown}), got {name!r}"
                + (f" (did you mean {near[0]!r}?)" if near else "")
            )
    if (given.prompt or given.target) and (given.text or given.pair or given.label):
        raise ValueError(
            "prompt_column and target_column must go without text_column, "
            "pair_column and label_column: a record is to generate, or has a label"
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
        if _is_empty(value):
            bad_cell(
                where, column, "a text that is not empty: fill it in or leave the row out", value
            )
    index = cells.get("idx")
    if (isinstance(index, str) and re.fullmatch(r"\d{1,18}", index, re.ASCII)) or (
        isinstance(index, float) and index.is_integer()
    ):
        return where, cells | {"idx": int(index)}
    return row


def _labels(
    column: str, tables: Mapping[str, Table], path: Path
) -> tuple[tuple[str, ...], Mapping[Any, int | float]]:
    """Map the values of the label column, over all splits, to numbers of classes or to scores.

    Strings and truth values are classes in sorted order. Integers >= 0 are classes in numeric
    order, whether or not they start at 0. Floats are classes if all are whole numbers, and scores
    otherwise. A column that holds such numbers as strings is read like the numbers. The classes of
    a ``datasets.ClassLabel`` keep their order.

    Returns:
        The names of the classes, () for scores; and the number or score of each value.
    """
    found = [
        (where, cell(where, row, column)) for table in tables.values() for where, row in table.rows
    ]
    declared = {
        table.class_names[column] for table in tables.values() if column in table.class_names
    }
    if declared:
        return _declared_classes(column, path, declared, found)
    for where, value in found:
        _check_label(where, column, value, found[0][1])
    read = {value: _number(value) if isinstance(value, str) else value for _, value in found}
    numbers = [number for number in read.values() if not isinstance(number, str)]
    if isinstance(found[0][1], str) and len(numbers) < len(read):
        for where, value in found if numbers else ():
            if isinstance(read[value], str) and not value.isdigit():
                bad_cell(
                    where,
                    column,
                    "a number like other labels in this column: fill it in, or "
                    "write every label as a word",
                    value,
                )
        read = {value: value for value in read}
    elif any(isinstance(number, float) and not number.is_integer() for number in numbers):
        return (), {value: float(number) for value, number in read.items()}
    else:
        for where, value in found:
            if not 0 <= read[value] < _LARGEST:
                bad_cell(
                    where,
                    column,
                    "a class: an integer >= 0, or a name (-1 often stands for a missing label)",
                    value,
                )
    classes = sorted(set(read.values()))
    if len(classes) > MAX_CLASSES:
        raise ValueError(
            f"{path}: column {column!r} must hold at most {MAX_CLASSES:,} classes, or "
            f"floats that are not all whole, got {len(classes):,} different values"
        )
    places = {value: place for place, value in enumerate(classes)}
    return (
        tuple(str(int(c)) if isinstance(c, float) else str(c) for c in classes),
        {value: places[number] for value, number in read.items()},
    )


def _declared_classes(
    column: str, path: Path, declared: set[tuple[str, ...]], found: Sequence[tuple[str, Any]]
) -> tuple[tuple[str, ...], Mapping[Any, int | float]]:
    """Take the classes that ``datasets.ClassLabel`` declares; raise ValueError if splits differ."""
    if len(declared) > 1:
        raise ValueError(f"{path}: column {column!r} must have the same class names in every split")
    names = next(iter(declared))
    for where, value in found:
        if type(value) is not int or not 0 <= value < len(names):
            bad_cell(
                where, column, f"a class from 0 to {len(names) - 1} ({_in_words(names)})", value
            )
    return names, {place: place for place in range(len(names))}


def _is_empty(value: Any) -> bool:
    """Tell whether a cell is null, NaN or blank."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _check_label(where: str, column: str, value: Any, first: Any) -> None:
    """Raise ValueError for an empty or non-finite label, or one unlike ``first`` in its type."""
    if _is_empty(value):
        bad_cell(where, column, "a label that is not empty: fill it in or leave the row out", value)
    if type(value) not in (str, int, float, bool):
        bad_cell(
            where,
            column,
            "a class (a string, a truth value or an integer) or a score (a float)",
            value,
        )
    if isinstance(value, float) and not math.isfinite(value):
        bad_cell(where, column, "a finite number", value)
    if isinstance(value, int) and abs(value) >= _LARGEST:
        bad_cell(where, column, "below 2^63", value)
    if isinstance(value, str):
        check_unicode(where, column, value)
    kind = type(first) if isinstance(first, (str, bool)) else (int, float)
    if not isinstance(value, kind) or isinstance(value, bool) != isinstance(first, bool):
        bad_cell(
            where, column, f"of one type in all rows, like {first!r:.40} in the first row", value
        )


def _number(text: str) -> Any:
    """Return the number that a string spells, or the string if the spelling is unusual ("007")."""
    if re.fullmatch(r"0|-?[1-9]\d{0,17}", text):
        return int(text)
    if (
        _NUMBER.fullmatch(text)
        and math.isfinite(number := float(text))
        and re.search(r"[.eE]", text)
    ):
        return number
    return text


def _in_words(names: Sequence[str]) -> str:
    """List class names for a message, shortened, with unprintable ones escaped."""
    shown = [name if name.isprintable() else repr(name) for name in names[:_SHOWN]]
    return ", ".join([*(name[:40] for name in shown), *(["..."] if len(names) > _SHOWN else [])])
