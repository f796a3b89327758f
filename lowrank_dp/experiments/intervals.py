"""Confidence intervals of results: Student's t for means over seeds, and the interval of an AUC."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lowrank_dp.mia.metrics import auc


def mean_and_interval(
    values: np.ndarray, axis: int = 0, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean along ``axis`` and the half-width of its t-interval.

    ``axis`` is the axis of the seeds (or noise draws), of length 2 or more. The interval contains
    the true mean with probability ``level``, in (0, 1). Both results have the shape of ``values``
    without ``axis``.
    """
    count = values.shape[axis]
    quantile = stats.t.ppf((1 + level) / 2, count - 1)
    return values.mean(axis=axis), quantile * values.std(axis=axis, ddof=1) / np.sqrt(count)


def with_interval(values: np.ndarray) -> str:
    """Format the mean over ``values`` (seeds,) as ``mean ± half-width``, to three decimals."""
    mean, half = mean_and_interval(values)
    return f"{mean:.3f} ± {half:.3f}"


def reached_with_interval(values: np.ndarray) -> str:
    """Format :func:`with_interval`; NaN stands for a seed whose run did not reach a level."""
    missed = int(np.isnan(values).sum())
    return f"not reached by {missed} of {len(values)}" if missed else with_interval(values)


def auc_with_interval(scores: ArrayLike, is_member: ArrayLike) -> tuple[float, float, float]:
    """Return an attack's AUC, and both ends of its 95% interval."""
    measured = auc(scores, is_member)
    return measured.value, *measured.ci
