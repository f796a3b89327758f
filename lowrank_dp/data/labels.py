"""Read the labels of a user's own data: classes or scores, by the values of a column."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowrank_dp.data.examples import bad_cell, cell, check_unicode
from lowrank_dp.data.formats import Table

MAX_CLASSES = 1000
MAX_SHOWN = 10  # largest number of classes that a message lists
_LABEL_LIMIT = 2**63
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def labels_alike(column: str, tables: Mapping[str, Table]) -> Mapping[str, Table]:
    """Return the tables with labels of one type, if only some of them write numbers as strings.

    CSV has strings alone: "1" in a CSV file and 1 in a JSON Lines file of another split are one
    label.
    """
    cells = {split: [row.get(column) for _, row in table.rows] for split, table in tables.items()}
    if all(isinstance(value, str) for values in cells.values() for value in values):
        return tables
    alike = dict(tables)
    for split, values in cells.items():
        numbers = [_number(value) if isinstance(value, str) else None for value in values]
        if all(isinstance(number, int | float) for number in numbers):
            rows = [
                (where, row | {column: number})
                for (where, row), number in zip(tables[split].rows, numbers, strict=True)
            ]
            alike[split] = replace(tables[split], rows=rows)
    return alike


def read_labels(
    column: str, tables: Mapping[str, Table], path: Path
) -> tuple[tuple[str, ...], Mapping[Any, int | float]]:
    """Map the values of the label column, over all splits, to numbers of classes or to scores.

    Strings and truth values are classes in sorted order. Integers >= 0 are classes in numeric
    order, whether or not they start at 0. Floats are classes if all are whole numbers, and scores
    otherwise. A column that holds numbers as strings is read like the numbers. The classes of
    a ``datasets.ClassLabel`` keep their order.

    Returns:
        The names of the classes, () for scores; and the number or score of each value.

    Raises ValueError, which names the file, the row and the column, for a label that is empty, not
    finite, a negative class, or of another type than the first label; and for too many classes.
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
            if isinstance(read[value], str) and not (value.isdecimal() and value.isascii()):
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
            if not 0 <= read[value] < _LABEL_LIMIT:
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
                where, column, f"a class from 0 to {len(names) - 1} ({in_words(names)})", value
            )
    return names, {place: place for place in range(len(names))}


def is_empty(value: Any) -> bool:
    """Tell whether a cell is null, NaN or blank."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def is_missing(value: Any) -> bool:
    """Tell whether a label's cell is empty or holds -1, which GLUE writes for a secret label."""
    return is_empty(value) or value in (-1, "-1", "-1.0")


def _check_label(where: str, column: str, value: Any, first: Any) -> None:
    """Raise ValueError for an empty or non-finite label, or one unlike ``first`` in its type."""
    if is_empty(value):
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
    if isinstance(value, int) and abs(value) >= _LABEL_LIMIT:
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
    if re.fullmatch(r"0|[+-]?[1-9]\d{0,17}", text):
        return int(text)
    if (
        _NUMBER.fullmatch(text)
        and math.isfinite(number := float(text))
        and re.search(r"[.eE]", text)
    ):
        return number
    return text


def in_words(names: Sequence[str]) -> str:
    """List class names for a message, shortened, with unprintable ones escaped."""
    shown = [name if name.isprintable() else repr(name) for name in names[:MAX_SHOWN]]
    return ", ".join([*(name[:40] for name in shown), *(["..."] if len(names) > MAX_SHOWN else [])])
