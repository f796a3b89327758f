"""Convert dataclasses to JSON's own types and back."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from lowrank_dp import _validate


def to_jsonable(value: Any) -> Any:
    """Convert dataclasses, tuples, mappings, paths and numpy scalars to JSON's own types.

    A value of any other type is returned unchanged.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def from_jsonable(name: str, value: Any, hint: Any) -> Any:
    """Convert a value that was read from JSON to the type that the annotation ``hint`` states.

    Objects become dataclasses, and lists become tuples. Numbers and text are never converted into
    each other. Where ``hint`` is Any or object, every value is accepted.

    Args:
        name: name of the value in error messages.
        value: the value, in JSON's own types; the arrays of a result may be among them.
        hint: a type annotation.

    Raises:
        ValueError: if the value does not fit ``hint``, or an object has a field that its dataclass
            lacks; the message is one line that names the field.
    """
    try:
        return _convert(name, value, hint)
    except RecursionError:
        raise ValueError(f"{name} must have fewer levels of nesting") from None


def _convert(name: str, value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _to_dataclass(name, value, hint)
    origin, inside = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in inside:
            with contextlib.suppress(ValueError):
                return _convert(name, value, option)
    elif origin is tuple and isinstance(value, list):
        hints = inside if inside and inside[-1] is not ... else inside[:1] * len(value)
        if len(hints or value) == len(value):
            return tuple(
                _convert(name, item, of_item)
                for item, of_item in zip(value, hints or [Any] * len(value), strict=True)
            )
    elif origin in (dict, Mapping) and isinstance(value, dict):
        return {key: _convert(name, item, (*inside, Any, Any)[1]) for key, item in value.items()}
    elif origin in (Any, object):
        if isinstance(value, list):
            return tuple(_convert(name, item, Any) for item in value)
        return value
    elif type(value) in ((int, float) if origin is float else (origin,)) or (
        value is None and origin is types.NoneType
    ):
        return value
    shown = value if isinstance(value, int | float | None) else type(value).__name__
    _validate.fail(name, f"of the type {getattr(hint, '__name__', hint)}", shown)


def _to_dataclass(name: str, value: dict[str, Any], kind: type) -> Any:
    hints = get_type_hints(kind)
    if unknown := value.keys() - hints.keys():
        _validate.fail(
            name, f"a {kind.__name__} of the fields {', '.join(hints)}", ", ".join(sorted(unknown))
        )
    values = {key: _convert(f"{name}: {key}", item, hints[key]) for key, item in value.items()}
    try:
        return kind(**values)
    except TypeError as error:  # the dataclass has a field without default that ``value`` lacks
        raise ValueError(f"{name} must be a whole {kind.__name__} ({error})") from None
