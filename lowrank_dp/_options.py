"""Dataclass fields that carry the help text of their command-line option."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any

from lowrank_dp._json import parse_json


def option(
    default: Any,
    help: str,
    *,
    name: str = "",
    choices: Iterable[str] = (),
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """Declare a dataclass field with its option's help text.

    Args:
        default: the field's default; a dict stands for a new dict per instance.
        help: the help text; ``choices`` are appended to the text.
        name: the option's name, if it differs from the field's.
        choices: the values that the dataclass accepts; the dataclass checks them.
        parse: function from the option's text (or texts, if the option may be repeated) to the
            field's value.
    """
    listed = ", ".join(choices)
    text = f"{help} One of {listed}." if listed else help
    metadata = {"help": text, "name": name, "parse": parse}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def name_value_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` pairs; a value that is JSON (a number, true) is read as JSON.

    Raises ValueError for a text without ``=``, and for a name that is given twice.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--option must be NAME=VALUE, got {pair!r}")
        if name in found:
            raise ValueError(f"--option must give {name} once, got it twice")
        try:
            found[name] = parse_json(value)
        except ValueError:
            found[name] = value
    return found


def number_or_text(text: str) -> int | str:
    """Read a text of digits as an integer, and leave any other text as it is."""
    return int(text) if text.isdecimal() and text.isascii() else text
