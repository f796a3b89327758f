"""Evidence against a distribution, which may be looked at after every step of a run.

Each function gives the logarithm of an e-value for a sum of independent increments, of which the
null distribution is known exactly: the mean over a grid of numbers t of
``exp(t * total) / E exp(t * total)``. Under the null it is a nonnegative martingale that starts at
1, so the probability that it *ever* reaches 1 / a is at most a, however many steps there are
(Ville's inequality; Howard et al., Statist. Sci. 36, 2021). No normal approximation enters.
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
_DEVIATIONS = 12.0  # of a binomial count, beyond which its probability is taken as if at the mean


def _mixture(exponents: np.ndarray) -> np.ndarray:
    """Log of the mean over the last axis."""
    return np.asarray(logsumexp(exponents, axis=-1)) - math.log(exponents.shape[-1])


def normal(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Log evidence that ``total`` is not a sum of ``count`` standard normal numbers."""
    total, count = (np.asarray(x, dtype=float)[..., None] for x in (total, count))
    return _mixture(_TWO_SIDED * total - _TWO_SIDED**2 / 2 * count)


def squares(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The same, if ``total`` were the sum of squares of ``count`` standard normal numbers."""
    total, count = (np.asarray(x, dtype=float)[..., None] for x in (total, count))
    return _mixture(_OF_SQUARES * total + count / 2 * np.log1p(-2 * _OF_SQUARES))


def successes(rate: float, *, more_only: bool = False) -> Evidence:
    """For the number ``total`` of successes among ``count`` independent trials at ``rate``.

    With ``more_only`` the null is every rate up to ``rate``.
    """
    grid = _TWO_SIDED[_TWO_SIDED > 0] if more_only else _TWO_SIDED

    def evidence(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        total, count = (np.asarray(x, dtype=float)[..., None] for x in (total, count))
        return _mixture(grid * total - count * np.log1p(rate * np.expm1(grid)))

    return evidence


def too_even(trials: int, rate: float) -> Evidence:
    """For the sum ``total`` of :func:`spread` over ``count`` steps: evidence that it is too small.

    A sample size that is fixed has no spread; that of a Poisson sample is binomial.
    """
    mean, deviation = trials * rate, math.sqrt(trials * rate * (1 - rate))
    sizes = np.arange(
        max(0, math.floor(mean - _DEVIATIONS * deviation)),
        min(trials, math.ceil(mean + _DEVIATIONS * deviation)) + 1,
    )
    mass = binom.pmf(sizes, trials, rate)
    grid = np.geomspace(1e-3, 100, 32)
    moments = np.exp(-grid[:, None] * spread(sizes, trials, rate)) @ mass + max(0.0, 1 - mass.sum())

    def evidence(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        total, count = (np.asarray(x, dtype=float)[..., None] for x in (total, count))
        return _mixture(-grid * total - count * np.log(moments))

    return evidence


def spread(sizes: np.ndarray, trials: int, rate: float) -> np.ndarray:
    """Squared deviations of binomial counts from their mean, over the variance."""
    return (np.asarray(sizes) - trials * rate) ** 2 / (trials * rate * (1 - rate))


class Watch:
    """One kind of evidence, for several sums at once, by the step and by the run so far.

    Args:
        evidence: a function of this module.
        streams: number of sums that are watched.
        steps: most steps of a run.
        false_alarms: probability with which an honest run is stopped, at most: half of it is for
            the sums of the run, at any time, and half for those of single steps.
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
        """Index of the sum with the most evidence, if that is too much to be chance; else None.

        Args:
            total, count: (streams,) what this step adds to each sum, and to its count.
            mean: of one increment; slack: how far rounding may have moved each ``total``.
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
            if not bool((found < level).all()):  # nor NaN
                return int(np.argmax(np.where(np.isnan(found), np.inf, found)))
        return None


def _towards(total: np.ndarray, mean: np.ndarray, slack: np.ndarray) -> np.ndarray:
    """``total``, moved towards ``mean`` by at most ``slack``."""
    return mean + np.sign(total - mean) * np.maximum(np.abs(total - mean) - slack, 0.0)
