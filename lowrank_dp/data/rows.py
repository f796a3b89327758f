"""Make examples of a split's rows, with checked text, pair, label, reference and group."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lowrank_dp.data.examples import (
    Example,
    bad_cell,
    cell,
    check_unicode,
    column_group,
    record_group,
)
from lowrank_dp.data.task import TaskSpec

Row = tuple[str, dict[str, Any]]  # the place of the row ("file line n"), its cells by column


def to_examples(rows: Iterable[Row], task: str, split: str, spec: TaskSpec) -> tuple[Example, ...]:
    """Make the examples of one split, in the order of its rows.

    A column ``idx`` numbers the rows; without such a column, the rows are numbered from 0. Raises
    ValueError, which names the place and the column, for a bad cell.
    """
    examples: list[Example] = []
    seen: set[str] = set()
    for number, (where, row) in enumerate(rows):
        index = row.get("idx", number)
        if type(index) is not int or index < 0:
            bad_cell(
                where, "idx", "an integer >= 0, the row's number: rename another column", index
            )
        base = f"{task}/{split}/{index}"
        if base in seen:
            raise ValueError(
                f"{where}: idx {index} occurs twice: number the rows, or leave the column out"
            )
        seen.add(base)
        group = column_group(task, where, row, spec.group) if spec.group else None
        if spec.text == "tripleset":
            examples += _dart_examples(where, row, task, base, group)
            continue
        text = _text(where, row, spec.text)
        if spec.target:
            target = _text(where, row, spec.target)
            group = group or record_group(task, text)
            examples.append(Example(base, text, target=target, group=group))
        else:
            pair = _text(where, row, spec.pair) if spec.pair else None
            label = _label(where, row, spec)
            examples.append(Example(base, text, pair, label, group=group or base))
    return tuple(examples)


def _dart_examples(
    where: str, row: dict[str, Any], task: str, base: str, group: str | None
) -> list[Example]:
    """Make one example per reference; its source is ``subject : predicate : object | ...``."""
    triples = cell(where, row, "tripleset")
    if (
        not isinstance(triples, list)
        or not triples
        or not all(
            isinstance(t, list) and len(t) == 3 and all(isinstance(p, str) for p in t)
            for t in triples
        )
    ):
        bad_cell(where, "tripleset", "a list of [subject, predicate, object]", triples)
    notes = cell(where, row, "annotations")
    texts = notes.get("text") if isinstance(notes, dict) else None
    if not isinstance(texts, list) or not texts:
        bad_cell(where, "annotations", "an object with a list 'text'", notes)
    source = check_unicode(where, "tripleset", " | ".join(" : ".join(triple) for triple in triples))
    return [
        Example(
            f"{base}-{i}",
            source,
            target=_text(where, {"text": text}, "text"),
            group=group or record_group(task, source),
        )
        for i, text in enumerate(texts)
    ]


def _label(where: str, row: dict[str, Any], spec: TaskSpec) -> int | float:
    value = cell(where, row, spec.label)
    if spec.labels:
        if type(value) is not int or not 0 <= value < len(spec.labels):
            bad_cell(where, spec.label, f"an integer from 0 to {len(spec.labels) - 1}", value)
        return value
    low, high = spec.score_range
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        bad_cell(
            where,
            spec.label,
            "a finite number" + (f" from {low:g} to {high:g}" if low > -math.inf else ""),
            value,
        )
    return float(value)


def _text(where: str, row: dict[str, Any], column: str) -> str:
    value = cell(where, row, column)
    if not isinstance(value, str):
        bad_cell(where, column, "a string", value)
    return check_unicode(where, column, value)
