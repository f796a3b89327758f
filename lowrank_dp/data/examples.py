"""Records, and how rows of JSON Lines or of a hub data set become them."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

MAX_LINE_BYTES = 1 << 20  # no example of these tasks comes near; a longer line is not one
MAX_FILE_BYTES = 1 << 30  # unpacked: a small .gz can hold any amount
MAX_ROWS = 5_000_000  # MNLI has 393 thousand


@dataclass(frozen=True, slots=True)
class Example:
    """One record: a text or a pair with a label, or a source text with a reference to generate."""

    id: str  # "sst2/train/17": task, split, row
    text: str
    text_pair: str | None = None
    label: int | float | None = None
    target: str | None = None
    group: str = ""  # of a source record or of a group column's value; else the id itself

    @property
    def content_hash(self) -> str:
        """SHA-256 of the normalised texts, in hexadecimal.

        Unicode form, case and white space don't count, nor does the label: a copy of a text under
        another label still tells that the text was there.
        """
        texts = [
            None if text is None else _normalised(text)
            for text in (self.text, self.text_pair, self.target)
        ]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


@dataclass(frozen=True)
class Spec:
    """Where a task lies and how its columns are read."""

    folder: str  # inside a local data folder
    hub_id: str
    config: str | None
    text: str  # column names
    pair: str | None = None
    target: str | None = None
    label: str = "label"
    group: str | None = None  # of rows that belong to one person or the like
    labels: tuple[str, ...] = ()  # their number bounds the label; () with no target: a score
    score_range: tuple[float, float] = (-math.inf, math.inf)
    metrics: tuple[str, ...] = ("accuracy",)
    # split -> file name locally and split name on the hub
    splits: tuple[tuple[str, str], ...] = (("train", "train"), ("validation", "validation"))
    revision: str | None = None

    @property
    def kind(self) -> str:
        """What the columns make it."""
        return "generation" if self.target else "classification" if self.labels else "regression"


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a JSON Lines file with "file line n"; a ``ValueError`` names both.

    Blank lines are skipped.
    """
    number, size, where = 0, 0, str(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path} line {number}"
                size += len(line)
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes")
                if size > MAX_FILE_BYTES or number > MAX_ROWS:
                    raise ValueError(
                        f"{where}: a file must have at most {MAX_FILE_BYTES:,} bytes "
                        f"(unpacked) and {MAX_ROWS:,} rows: split it"
                    )
                if not line.strip():
                    continue
                try:
                    row = json.loads(line, object_pairs_hook=without_repeats)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    hint = ": call the file .json" if isinstance(row, list) else ""
                    raise ValueError(
                        f"{where}: must be a JSON object, got {type(row).__name__}{hint}"
                    )
                yield where, row
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: unreadable after line {number} ({error})") from None


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of ``pairs``, for ``object_pairs_hook``; ``ValueError`` on a name twice."""
    if len(found := dict(pairs)) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {twice[:80]!r} occurs twice")
    return found


def to_examples(
    rows: Iterable[tuple[str, dict[str, Any]]], task: str, split: str, spec: Spec
) -> tuple[Example, ...]:
    """Checked examples from the rows of one split; errors name the file and line."""
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
            examples.append(
                Example(
                    base,
                    text,
                    target=_text(where, row, spec.target),
                    group=group or record_group(task, text),
                )
            )
            continue
        pair = _text(where, row, spec.pair) if spec.pair else None
        examples.append(Example(base, text, pair, _label(where, row, spec), group=group or base))
    return tuple(examples)


def _dart_examples(
    where: str, row: dict[str, Any], task: str, base: str, group: str | None
) -> list[Example]:
    """One example a reference: ``subject : predicate : object | ...`` to its text."""
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


def _label(where: str, row: dict[str, Any], spec: Spec) -> int | float:
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


def check_unicode(where: str, column: str, value: str) -> str:
    """The text; ``ValueError`` if UTF-8 cannot spell the text."""
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON escapes can spell half a surrogate pair
        raise ValueError(f"{where}: column {column!r} must be valid Unicode") from None
    return value


def cell(where: str, row: Mapping[str, Any], column: str) -> Any:
    """The cell of a row in a column; ``ValueError`` if the row lacks the column."""
    if column not in row:
        raise ValueError(f"{where}: column {column!r} is missing (there are {', '.join(row)})")
    return row[column]


def bad_cell(where: str, column: str, requirement: str, value: object) -> NoReturn:
    """Raise the ``ValueError`` of a cell, with the file, the row and the column."""
    raise ValueError(f"{where}: column {column!r} must be {requirement}, got {value!r:.80}")


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def record_group(task: str, source: str) -> str:
    """An id for everything made from one source record, which doesn't reveal the record."""
    return f"{task}/record/{hashlib.sha256(_normalised(source).encode()).hexdigest()[:16]}"


def column_group(task: str, where: str, row: Mapping[str, Any], column: str) -> str:
    """An id for all rows with one value in a group column, which doesn't spell the value.

    The value is a string or an integer. The values 7, 7.0 and "7" are the same group. White space
    at both ends and the Unicode form do not count, so that no person is split by a space.
    """
    value = row.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) not in (str, int) or not str(value).strip():
        bad_cell(where, column, "a string or an integer that names the row's group", value)
    name = unicodedata.normalize("NFC", check_unicode(where, column, str(value))).strip()
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"{task}/group/{digest[:16]}"
