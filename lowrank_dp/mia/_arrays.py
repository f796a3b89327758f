"""Check the arguments of scores and metrics: arrays of numbers and of membership bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowrank_dp._validate import fail, real

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def real_array(
    name: str,
    value: ArrayLike,
    *,
    ndim: int = 1,
    or_more: bool = False,
    shape: tuple[int, ...] | None = None,
    low: float = -np.inf,
    finite: bool = True,
) -> Array:
    """Return ``value`` as a non-empty float64 array of numbers >= ``low``.

    The array must have ``shape`` if given, else ``ndim`` axes; with ``or_more``, more than ``ndim``
    axes are accepted as well. NaN is always refused, infinities unless ``finite`` is False. Raises
    ValueError that says how many entries are bad and where the first one is.

    >>> real_array("loss", [0.5, float("nan")])
    Traceback (most recent call last):
    ValueError: loss must be finite, got 1 bad of 2, first at index 1: nan
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        fail(name, "an array of numbers", type(value).__name__)
    if array.dtype.kind not in "iuf":
        fail(name, "an array of numbers", f"dtype {array.dtype}")
    enough = array.ndim >= ndim if or_more else array.ndim == ndim
    if array.shape != shape if shape is not None else not enough:
        fail(
            name,
            f"of shape {shape}"
            if shape is not None
            else f"an array with {ndim} axes{' or more' if or_more else ''}",
            f"shape {array.shape}",
        )
    if array.size == 0:
        fail(name, "non-empty", f"shape {array.shape}")
    array = array.astype(np.float64, copy=False)
    good = (np.isfinite(array) if finite else ~np.isnan(array)) & (array >= low)
    if not good.all():
        first = np.unravel_index(np.argmin(good), array.shape)
        where = int(first[0]) if array.ndim == 1 else tuple(map(int, first))
        kind = ("finite" if finite else "a number") + (f" and >= {low:g}" if low > -np.inf else "")
        raise ValueError(
            f"{name} must be {kind}, got {(~good).sum()} bad of {array.size}, "
            f"first at index {where}: {array[first]}"
        )
    return array


def boolean_array(name: str, value: ArrayLike, shape: tuple[int, ...]) -> Mask:
    """Return ``value`` as a boolean array of ``shape``; accept the numbers 0 and 1 as well.

    Raises ValueError for another shape and for other values.
    """
    array = np.asarray(value)
    if array.shape != shape:
        fail(name, f"of shape {shape}", f"shape {array.shape}")
    if array.dtype != np.bool_ and (
        array.dtype.kind not in "iuf" or not np.isin(array, (0, 1)).all()
    ):
        fail(name, "True and False, or 1 and 0", f"dtype {array.dtype}")
    return array.astype(np.bool_, copy=False)


def both_sides(
    scores: ArrayLike, is_member: ArrayLike, *, at_least: int = 1, name: str = "scores"
) -> tuple[Array, Array]:
    """Return the members' scores (n1,) and the non-members' scores (n0,).

    Raises ValueError if there are fewer than ``at_least`` of either, or if a score is NaN.
    """
    values = real_array(name, scores, finite=False)
    truth = boolean_array("is_member", is_member, values.shape)
    members, others = values[truth], values[~truth]
    if min(len(members), len(others)) < at_least:
        fail(
            "is_member",
            f"at least {at_least} True and {at_least} False",
            f"{len(members)} and {len(others)}",
        )
    return members, others


def confidence_level(value: float) -> float:
    """Return ``value``; raise ValueError unless the value is in (0, 1)."""
    return real("confidence", value, low=0, high=1, low_open=True, high_open=True)
