"""Exact confidence bounds of a binomial proportion such as a rate (Clopper and Pearson)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from lowrank_dp._validate import integer
from lowrank_dp.mia._arrays import Array, confidence_level

Interval = tuple[float, float]


def clopper_pearson(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Compute the exact two-sided interval (low, high) of a binomial proportion.

    Clopper & Pearson, Biometrika 26, 1934. Raises ValueError unless 0 <= ``successes`` <=
    ``trials``, ``trials`` >= 1 and ``confidence`` in (0, 1).

    >>> clopper_pearson(0, 10, confidence=0.95)[0]
    0.0
    """
    trials = integer("trials", trials)
    successes = integer("successes", successes, low=0, high=trials)
    tail = (1 - confidence_level(confidence)) / 2
    return (
        float(lower_bound(successes, trials, tail)),
        float(upper_bound(successes, trials, tail)),
    )


def lower_bound(successes: ArrayLike, trials: int, tail: float) -> Array:
    """Compute the one-sided bound that is below the true rate with probability >= 1 - ``tail``.

    The result has the shape of ``successes`` and is in [0, 1].
    """
    k = np.asarray(successes, dtype=np.float64)
    return np.where(k > 0, special.betaincinv(np.maximum(k, 1), trials - k + 1, tail), 0.0)


def upper_bound(successes: ArrayLike, trials: int, tail: float) -> Array:
    """Compute the one-sided bound that is above the true rate with probability >= 1 - ``tail``.

    The result has the shape of ``successes`` and is in [0, 1].
    """
    k = np.asarray(successes, dtype=np.float64)
    failures = np.maximum(trials - k, 1)
    return np.where(k < trials, special.betainccinv(k + 1, failures, tail), 1.0)
