"""Sequential tests against a distribution, valid after every step of a run.

Each function returns the logarithm of an e-value for a sum of independent increments whose null
distribution is known exactly. The e-value is the mean of ``exp(t * total) / E exp(t * total)`` over
a grid of numbers t. Under the null the e-value is a nonnegative martingale that starts at 1, so the
probability that the e-value *ever* reaches 1 / a is at most a, whatever the number of steps
(Ville's inequality; Howard et al., Statist. Sci. 36, 2021). No normal approximation is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import logsumexp
from scipy.stats import binom

Evidence = Callable[[np.ndarray, np.ndarray], np.ndarray]

_TWO_SIDED = np.concatenate([-(grid := np.geomspace(1e-4, 16, 32)), grid])
_OF_SQUARES = np.concatenate(
    [-np.geomspace(1e-6, 1e6, 48), np.geomspace(1e-6, 0.25, 30), [0.35, 0.45, 0.49]]
)
_NUM_SIGMAS = 12.0  # half-width of the sum over binomial counts; rarer counts count as the mean


def _mixture(exponents: np.ndarray) -> np.ndarray:
    """Return the logarithm of the mean of ``exp(exponents)`` over the last axis."""
    return np.asarray(logsumexp(exponents, axis=-1)) - math.log(exponents.shape[-1])


def _as_columns(total: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both arrays as floats with one more axis, for the grid of the mixture."""
    return np.asarray(total, dtype=float)[..., None], np.asarray(count, dtype=float)[..., None]


def normal(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return log evidence that ``total`` is not a sum of ``count`` standard normal numbers.

    Both arguments have one shape, and so has the result.
    """
    total, count = _as_columns(total, count)
    return _mixture(_TWO_SIDED * total - _TWO_SIDED**2 / 2 * count)


def squares(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return log evidence that ``total`` is not chi-squared with ``count`` degrees of freedom.

    The arguments are those of :func:`normal`.
    """
    total, count = _as_columns(total, count)
    return _mixture(_OF_SQUARES * total + count / 2 * np.log1p(-2 * _OF_SQUARES))


def successes(rate: float, *, more_only: bool = False) -> Evidence:
    """Return the evidence that a number of successes is not binomial.

    The returned function takes the number of successes ``total`` and of independent trials
    ``count``. The null is ``rate``, or, with ``more_only``, every rate up to ``rate``.
    """
    grid = _TWO_SIDED[_TWO_SIDED > 0] if more_only else _TWO_SIDED

    def evidence(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        total, count = _as_columns(total, count)
        return _mixture(grid * total - count * np.log1p(rate * np.expm1(grid)))

    return evidence


def too_even(trials: int, rate: float) -> Evidence:
    """Return the evidence that sample sizes vary less than those of a Poisson sample.

    A Poisson sample of ``trials`` units at ``rate`` has a binomial size; a fixed size has no
    spread. The returned function takes the sum ``total`` of :func:`spread` over ``count`` steps.
    """
    mean, deviation = trials * rate, math.sqrt(trials * rate * (1 - rate))
    sizes = np.arange(
        max(0, math.floor(mean - _NUM_SIGMAS * deviation)),
        min(trials, math.ceil(mean + _NUM_SIGMAS * deviation)) + 1,
    )
    mass = binom.pmf(sizes, trials, rate)
    grid = np.geomspace(1e-3, 100, 32)
    moments = np.exp(-grid[:, None] * spread(sizes, trials, rate)) @ mass + max(0.0, 1 - mass.sum())

    def evidence(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        total, count = _as_columns(total, count)
        return _mixture(-grid * total - count * np.log(moments))

    return evidence


def spread(sizes: np.ndarray, trials: int, rate: float) -> np.ndarray:
    """Return the squared deviations of binomial counts from their mean, over the variance."""
    return (np.asarray(sizes) - trials * rate) ** 2 / (trials * rate * (1 - rate))


class Watch:
    """Sequential test of several sums, for single steps and for the run so far.

    Args:
        evidence: a function of this module, or a function that one of them returns.
        streams: number of sums that are watched.
        steps: largest number of steps of the run.
        false_alarms: upper bound on the probability that an honest run is stopped. One half is for
            the sums over the run, at any time, and one half for the sums of single steps.
    """

    def __init__(self, evidence: Evidence, streams: int, steps: int, false_alarms: float) -> None:
        self._evidence = evidence
        self._total, self._count, self._slack = (
            np.zeros(streams),
            np.zeros(streams),
            np.zeros(streams),
        )
        self._run = math.log(2 * streams / false_alarms)
        self._step = self._run + math.log(steps)

    def add(
        self,
        total: np.ndarray,
        count: np.ndarray,
        *,
        mean: float = 0.0,
        slack: np.ndarray | float = 0.0,
    ) -> int | None:
        """Add a step; return the index of a sum that is too unlikely to be chance, or None.

        Args:
            total, count: (streams,) each; the step's increments of the sums and of their counts.
            mean: null expectation of one increment.
            slack: largest rounding error of each ``total``.
        """
        total, count = np.asarray(total, dtype=float), np.asarray(count, dtype=float)
        slack = np.broadcast_to(np.asarray(slack, dtype=float), total.shape)
        self._total += total
        self._count += count
        self._slack += slack
        for sums, level in (
            ((total, count, slack), self._step),
            ((self._total, self._count, self._slack), self._run),
        ):
            found = self._evidence(_towards(sums[0], mean * sums[1], sums[2]), sums[1])
            if not bool((found < level).all()):  # NaN counts as evidence
                return int(np.argmax(np.where(np.isnan(found), np.inf, found)))
        return None


def _towards(total: np.ndarray, mean: np.ndarray, slack: np.ndarray) -> np.ndarray:
    """Return ``total``, moved towards ``mean`` by at most ``slack``."""
    return mean + np.sign(total - mean) * np.maximum(np.abs(total - mean) - slack, 0.0)
