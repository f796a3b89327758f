"""Typed getters for the fields of a JSON object from an untrusted file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

MAX_INTEGER = 2**63


@dataclass(frozen=True)
class CheckedObject:
    """A JSON object whose getters check the type and the range of a field.

    Each getter raises ValueError in one line if the field is missing or does not fit. The line
    starts with ``where``: the file, and the field that holds the object.
    """

    where: str
    values: Mapping[str, Any]

    def fail(self, name: str, requirement: str, value: object) -> NoReturn:
        """Raise ValueError in one line: the field, the requirement and the value found."""
        raise ValueError(f"{self.where}{name} must be {requirement}, got {shown(value)}")

    def get(self, name: str) -> Any:
        """Get a field of any type, which must be present."""
        if name not in self.values:
            raise ValueError(f"{self.where}{name} is missing")
        return self.values[name]

    def object(self, name: str) -> CheckedObject:
        """Get a JSON object."""
        if not isinstance(value := self.get(name), dict):
            self.fail(name, "an object", value)
        return CheckedObject(f"{self.where}{name}.", value)

    def integer(self, name: str, *, low: int = 0) -> int:
        """Get an integer of at least ``low`` that fits in 64 bits."""
        if type(value := self.get(name)) is not int or not low <= value < MAX_INTEGER:
            self.fail(name, f"an integer >= {low}", value)
        return value

    def optional_integer(self, name: str, *, low: int = 0) -> int | None:
        """Get an integer as :meth:`integer` does, or null."""
        return None if self.get(name) is None else self.integer(name, low=low)

    def number(self, name: str) -> float:
        """Get a number of at least 0."""
        if type(value := self.get(name)) not in (int, float) or not 0 <= value < MAX_INTEGER:
            self.fail(name, "a number >= 0", value)
        return float(value)

    def text(self, name: str, options: Iterable[str] = ()) -> str:
        """Get a line of printable text, which is one of ``options`` if any are given."""
        value, options = self.get(name), tuple(options)
        if not is_text(value) or (options and value not in options):
            self.fail(
                name,
                f"one of {', '.join(options)}" if options else "a line of printable text",
                value,
            )
        return value

    def name(self, name: str, *, folders: bool = False) -> str:
        """Get a text that is a plain file name or, with ``folders``, a relative path downwards."""
        parts = re.split(r"[/\\]", value := self.text(name))
        if (
            not parts[0]
            or parts[0][0] == "~"
            or ":" in parts[0]
            or ".." in parts
            or (len(parts) > 1 and not folders)
        ):
            fix = (
                "a hub id or a name, because only the user may give a path, by --base"
                if folders
                else "a plain name and no path"
            )
            self.fail(name, fix, value)
        return value

    def column(
        self, name: str, count: int, requirement: str, valid: Callable[[Any], bool]
    ) -> list[Any]:
        """Get a list of ``count`` entries, each of which is ``valid``."""
        if not isinstance(values := self.get(name), list):
            self.fail(name, "a list", values)
        if len(values) != count:
            self.fail(name, f"a list of {count} entries, as num_records says", len(values))
        for index, value in enumerate(values):
            if not valid(value):
                self.fail(f"{name}[{index}]", requirement, value)
        return values


def is_text(value: Any) -> bool:
    """Tell whether a value is printable text: no control characters, no half surrogate pairs."""
    return isinstance(value, str) and bool(value) and value.isprintable()


def is_hash(value: Any) -> bool:
    """Tell whether a value is a SHA-256 digest in hexadecimal."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def shown(value: object) -> str:
    """Write a value of any size on one short line."""
    if isinstance(value, str):
        return repr(value[:80])
    return repr(value)[:80] if isinstance(value, int | float | None) else type(value).__name__
