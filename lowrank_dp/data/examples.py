"""Records of a task, with content hash and group."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True, slots=True)
class Example:
    """One record: a text or a pair with a label, or a source text with a reference to generate.

    Attributes:
        id: task, split and row, such as "sst2/train/17".
        text: the text, the first text of a pair, or the source of a reference.
        text_pair: the second text of a pair, or None.
        label: number of the class from 0, or the score; None without a label.
        target: the reference to generate, or None.
        group: id of the source record or of the value in a group column; else ``id`` itself.
    """

    id: str
    text: str
    text_pair: str | None = None
    label: int | float | None = None
    target: str | None = None
    group: str = ""

    @property
    def content_hash(self) -> str:
        """SHA-256 of the normalised texts, in hexadecimal.

        Normalisation removes differences in Unicode form, case and white space. The label is left
        out: a copy of a text under another label still reveals that the text was in the data.
        """
        texts = [
            None if text is None else _normalised(text)
            for text in (self.text, self.text_pair, self.target)
        ]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def record_group(task: str, source: str) -> str:
    """Make the group id of all references of one source text; the id does not reveal the text."""
    return f"{task}/record/{hashlib.sha256(_normalised(source).encode()).hexdigest()[:16]}"


def column_group(task: str, where: str, row: Mapping[str, Any], column: str) -> str:
    """Make the group id of all rows with one value in a group column.

    The id does not reveal the value. The value is a string or an integer; 7, 7.0 and "7" are the
    same value. White space at both ends and the Unicode form do not count, so that a stray space
    does not split the rows of one person.

    Raises ValueError, with the place ``where``, for any other value.
    """
    value = row.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) not in (str, int) or not str(value).strip():
        bad_cell(where, column, "a string or an integer that names the row's group", value)
    name = unicodedata.normalize("NFC", check_unicode(where, column, str(value))).strip()
    return f"{task}/group/{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def cell(where: str, row: Mapping[str, Any], column: str) -> Any:
    """Return the cell of a row in a column; raise ValueError if the row lacks the column."""
    if column not in row:
        raise ValueError(f"{where}: column {column!r} is missing (there are {', '.join(row)})")
    return row[column]


def check_unicode(where: str, column: str, value: str) -> str:
    """Return the text; raise ValueError if UTF-8 can't encode the text."""
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON escapes can encode half a surrogate pair
        raise ValueError(f"{where}: column {column!r} must be valid Unicode") from None
    return value


def bad_cell(where: str, column: str, requirement: str, value: object) -> NoReturn:
    """Raise the ValueError of a cell, with its file, row and column."""
    raise ValueError(f"{where}: column {column!r} must be {requirement}, got {value!r:.80}")
