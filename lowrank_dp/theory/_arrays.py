"""Checks and conversions of the arguments and results of the theory functions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowrank_dp._validate import choice, fail

Array = NDArray[np.float64]
FloatOrArray = float | Array
REFERENCES = ("matched", "paper")
MOST = 10**12  # largest rank or length: the numerical results are inaccurate far above it


def reals(
    name: str,
    value: ArrayLike,
    *,
    low: float = -np.inf,
    high: float = np.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> Array:
    """Convert ``value`` to a float64 array with every entry finite and in the interval.

    >>> reals("beta2", [0.5, 1.5], low=0, high=1)
    Traceback (most recent call last):
    ValueError: beta2 must be a finite number >= 0 and <= 1, got 1.5
    """
    bounds = [f"{'>' if low_open else '>='} {low:g}"] if low > -np.inf else []
    bounds += [f"{'<' if high_open else '<='} {high:.6g}"] if high < np.inf else []
    requirement = " ".join(["a finite number", " and ".join(bounds)]).strip()
    array = _numbers(name, value, requirement)
    above = array > low if low_open else array >= low
    below = array < high if high_open else array <= high
    return _all_good(name, requirement, value, array, above & below & np.isfinite(array))


def integers(name: str, value: ArrayLike) -> Array:
    """Convert ``value`` to a float64 array of integers in [1, 1e12].

    Every other value, such as 8.5 or True, raises ValueError.

    >>> integers("rank", [4, 0])
    Traceback (most recent call last):
    ValueError: rank must be an integer >= 1 and <= 1000000000000, got 0
    """
    requirement = f"an integer >= 1 and <= {MOST}"
    array = _numbers(name, value, requirement)
    whole = (np.floor(array) == array) & (array >= 1) & (array <= MOST)
    return _all_good(name, requirement, value, array, whole)


def squared_cosine(n: ArrayLike, beta2: ArrayLike | None) -> Array:
    """Check beta2 = q_j^2 / |q|^2, broadcast against ``n``; the default is 1/n, as for a flat q."""
    n = integers("n", n)
    if beta2 is None:
        return 1 / n
    return np.broadcast_arrays(reals("beta2", beta2, low=0, high=1), n)[0]


def reference_variance(reference: str, beta2: FloatOrArray) -> FloatOrArray:
    """Variance of the reference Gaussian of one coordinate, in units of |q|^2 / rank."""
    matched = choice("reference", reference, REFERENCES) == "matched"
    return 1 + beta2 if matched else np.ones_like(beta2)


def unwrap(array: Any) -> FloatOrArray:
    """Convert a scalar to a Python float; return any other array unchanged."""
    array = np.asarray(array, dtype=np.float64)
    return float(array) if array.ndim == 0 else array


def _numbers(name: str, value: ArrayLike, requirement: str) -> Array:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        fail(name, requirement, value)
    if array.dtype.kind not in "iuf" and array.size:
        fail(name, requirement, value)
    return array.astype(np.float64)


def _all_good(
    name: str, requirement: str, value: ArrayLike, array: Array, good: NDArray[np.bool_]
) -> Array:
    if not good.all():
        # a scalar is shown as it was given, an array by its first bad entry
        entry = value if array.ndim == 0 else np.asarray(value)[~good].flat[0].item()
        fail(name, requirement, entry)
    return array
