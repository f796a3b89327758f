"""Means over seeds with their uncertainty."""

from __future__ import annotations

import numpy as np
from scipy import stats


def mean_and_interval(values: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds, which lie along ``axis``, and half-width of its 95% t-interval."""
    count = values.shape[axis]
    half = stats.t.ppf(0.975, count - 1) * values.std(axis=axis, ddof=1) / np.sqrt(count)
    return values.mean(axis=axis), half


def with_interval(values: np.ndarray) -> str:
    """``mean ± half-width`` of ``values`` (seeds,) to three decimals, as the tables have it."""
    mean, half = mean_and_interval(values)
    return f"{mean:.3f} ± {half:.3f}"


def _interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the last axis and half-width of its 95% t-interval (zero for one value)."""
    count = values.shape[-1]
    if count < 2:
        return values.mean(-1), np.zeros(values.shape[:-1])
    half = stats.t.ppf(0.975, count - 1) * values.std(-1, ddof=1) / np.sqrt(count)
    return values.mean(-1), half
