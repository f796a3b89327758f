"""Argument checks with messages of one form: ``<name> must be <requirement>, got <value>``.

The module imports nothing heavy, so that every other module can import it. Tensors and arrays are
checked by the methods that torch and numpy share.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn


def fail(name: str, requirement: str, value: object) -> NoReturn:
    """Raise ``ValueError``: ``<name> must be <requirement>, got <value>``."""
    raise ValueError(f"{name} must be {requirement}, got {value!r:.300}")


def real(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> float:
    """Convert ``value`` to a finite float in the interval from ``low`` to ``high``.

    Raises ``ValueError`` for any other value, bools and strings included. An end of the interval is
    excluded if ``low_open`` or ``high_open`` is true.

    >>> real("noise_std", 0.5, low=0)
    0.5
    >>> real("noise_std", -1.0, low=0)
    Traceback (most recent call last):
    ValueError: noise_std must be a finite number >= 0, got -1.0
    """
    interval = [f"{'>' if low_open else '>='} {low:g}"] if low > -math.inf else []
    interval += [f"{'<' if high_open else '<='} {high:g}"] if high < math.inf else []
    requirement = " ".join(["a finite number", " and ".join(interval)]).strip()
    if isinstance(value, (bool, str)):
        fail(name, requirement, value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        fail(name, requirement, value)
    inside = (number > low if low_open else number >= low) and (
        number < high if high_open else number <= high
    )
    if not (math.isfinite(number) and inside):
        fail(name, requirement, value)
    return number


def positive(name: str, value: Any) -> float:
    """Convert ``value`` to a finite float above zero, or raise ``ValueError``."""
    return real(name, value, low=0, low_open=True)


def integer(name: str, value: Any, *, low: int = 1, high: float = math.inf) -> int:
    """Convert ``value`` to an integer in ``[low, high]``.

    8.0 is accepted; ``ValueError`` is raised for 8.5, True and strings.

    >>> integer("rank", 8.5)
    Traceback (most recent call last):
    ValueError: rank must be an integer >= 1, got 8.5
    """
    requirement = f"an integer >= {low}" + (f" and <= {high}" if high < math.inf else "")
    if isinstance(value, (bool, str)):
        fail(name, requirement, value)
    try:
        number = int(value)
        exact = number == value
    except (TypeError, ValueError, OverflowError, RuntimeError):
        fail(name, requirement, value)
    if not (exact and low <= number <= high):
        fail(name, requirement, value)
    return number


def boolean(name: str, value: Any) -> bool:
    """Return a value that is True or False; raise ``ValueError`` for any other value.

    A text such as "False", which Python counts as true, is refused.

    >>> boolean("norm_correction", "False")
    Traceback (most recent call last):
    ValueError: norm_correction must be true or false, got 'False'
    """
    if not isinstance(value, bool):
        fail(name, "true or false", value)
    return value


def choice(name: str, value: Any, options: Iterable[str]) -> str:
    """Return a value that is among ``options``; raise ``ValueError`` for any other value.

    The message suggests the most similar option.

    >>> choice("scheme", "optmal", ["none", "optimal"])
    Traceback (most recent call last):
    ValueError: scheme must be one of none, optimal, got 'optmal' (did you mean 'optimal'?)
    """
    options = list(options)
    if isinstance(value, str) and value in options:
        return value
    raise ValueError(
        f"{name} must be one of {', '.join(options)}, got {value!r:.300}"
        f"{did_you_mean(value, options)}"
    )


def expanded(name: str, path: str | PathLike[str]) -> Path:
    """Return a path in which the user's home folder replaces a leading ``~`` or ``~user``.

    Raises ``ValueError`` for a user who has no home folder on this machine.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:  # what pathlib raises
        fail(name, "a path without ~, or with ~ of a user of this machine", str(path))


def listed(names: Sequence[str], most: int = 4) -> str:
    """List at most ``most`` names, and the number of the others, for a message.

    >>> listed(["a", "b", "c", "d"])
    'a, b, c, d'
    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c, d and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def did_you_mean(value: Any, options: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the option most similar to ``value``, or ""."""
    near = difflib.get_close_matches(str(value), list(options), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def floating(name: str, value: Any, *, min_ndim: int = 0, check_finite: bool = True) -> Any:
    """Return a value that is a non-empty float32 or float64 tensor of finite entries.

    Raises ``ValueError`` for another value, and for a tensor of fewer than ``min_ndim`` axes.
    ``check_finite=False`` accepts any entries.
    """
    if not hasattr(value, "is_floating_point"):
        fail(name, "a torch tensor", type(value).__name__)
    if str(value.dtype) not in ("torch.float32", "torch.float64"):
        fail(name, "a float32 or float64 tensor", str(value.dtype))
    if value.ndim < min_ndim:
        fail(name, f"a tensor with at least {min_ndim} axes", f"shape {tuple(value.shape)}")
    if value.numel() == 0:
        fail(name, "a non-empty tensor", f"shape {tuple(value.shape)}")
    if check_finite and not bool(value.isfinite().all()):
        raise ValueError(f"{name} must have finite entries, got NaN or infinity")
    return value


def matrix(name: str, value: Any, *, check_finite: bool = True) -> Any:
    """Return a value that is a float32 or float64 tensor (..., m, n) of finite entries.

    Raises ``ValueError`` as :func:`floating` does.
    """
    return floating(name, value, min_ndim=2, check_finite=check_finite)


def clip_bound(name: str, value: Any) -> float:
    """Convert ``value`` to a float above zero, or raise ``ValueError``.

    Infinity is accepted and clips nothing.

    >>> clip_bound("max_grad_norm", 0)
    Traceback (most recent call last):
    ValueError: max_grad_norm must be a number > 0 (inf clips nothing), got 0
    """
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not number > 0:
        fail(name, "a number > 0 (inf clips nothing)", value)
    return number
