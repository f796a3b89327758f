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


def plain(value: Any) -> Any:
    """``value`` in JSON's own types: dataclasses, tuples, mappings, paths and numpy scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def typed(name: str, value: Any, hint: Any) -> Any:
    """A value read from JSON as the annotation ``hint`` says; ``ValueError`` if it does not fit.

    Lists become tuples and objects dataclasses; where ``hint`` says nothing, anything passes.
    """
    try:
        return _typed(name, value, hint)
    except RecursionError:
        raise ValueError(f"{name} must not be nested so deeply") from None


def _typed(name: str, value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        inner = get_type_hints(hint)
        if unknown := value.keys() - inner.keys():
            _validate.fail(hint.__name__, f"one with fields {', '.join(inner)}", sorted(unknown))
        values = {key: _typed(f"{name}: {key}", item, inner[key]) for key, item in value.items()}
        try:
            return hint(**values)
        except TypeError as error:  # a field is missing
            raise ValueError(f"{name} must be a whole {hint.__name__} ({error})") from None
    origin, inside = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in inside:
            with contextlib.suppress(ValueError):
                return _typed(name, value, option)
    elif origin is tuple and isinstance(value, list):
        hints = inside if inside and inside[-1] is not ... else inside[:1] * len(value)
        if len(hints or value) == len(value):
            return tuple(
                _typed(name, item, one)
                for item, one in zip(value, hints or [Any] * len(value), strict=True)
            )
    elif origin in (dict, Mapping) and isinstance(value, dict):
        return {key: _typed(name, item, (*inside, Any, Any)[1]) for key, item in value.items()}
    elif origin in (Any, object):
        if isinstance(value, list):
            return tuple(_typed(name, item, Any) for item in value)
        return value
    elif type(value) in ((int, float) if origin is float else (origin,)) or (
        value is None and origin is types.NoneType
    ):
        return value
    _validate.fail(name, f"of the type {getattr(hint, '__name__', hint)}", _short(value))


def _short(value: object) -> object:
    return value if isinstance(value, int | float | None) else type(value).__name__
