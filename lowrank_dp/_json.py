"""Strict JSON (no repeated names in an object, limited nesting), and digests of documents."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """Parse a JSON document, strictly.

    ``finite=True`` also refuses NaN, infinities and numbers that overflow a float.

    Raises ValueError for text that is not JSON or not UTF-8, for a name that occurs twice in an
    object, and for a document that is nested too deeply. The message gives the reason, but not the
    name of the file.
    """
    numbers: dict[str, Any] = {}
    if finite:
        numbers = {"parse_constant": _finite, "parse_float": _finite}
    try:
        return json.loads(text, object_pairs_hook=without_repeats, **numbers)
    except RecursionError:
        raise ValueError("the document is nested too deeply") from None


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of ``pairs``; meant as ``object_pairs_hook`` of ``json.loads``.

    Raises ValueError if a name occurs twice.
    """
    if len(found := dict(pairs)) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {twice[:80]!r} occurs twice")
    return found


def json_digest(document: Any, *, default: Callable[[Any], Any] | None = None) -> str:
    """Return the SHA-256 of a JSON document's content, in hexadecimal.

    ``default`` converts values that JSON lacks, as in ``json.dumps``.
    """
    text = json.dumps(document, sort_keys=True, default=default)
    return hashlib.sha256(text.encode()).hexdigest()


def _finite(token: str) -> float:
    if not math.isfinite(value := float(token)):
        raise ValueError(f"{token[:20]} is not a finite number")
    return value
