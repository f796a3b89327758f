"""Epsilon of sampled Gaussian steps by their privacy-loss distribution (PLD).

The distribution of one step is discretised so that the bound holds at every interval (connect the
dots, Doroshenko et al. 2022), and is composed by a Fourier transform.

The Fourier transform of the distribution itself has an absolute error near 1e-13, which exceeds a
delta below about 1e-10 and can put epsilon below the truth. The distribution is therefore tilted:
multiplied by exp(theta * loss), with the theta of Chernoff's bound, before the transform, and
divided by the same factor afterwards. The error is then relative to delta, unless the tilted
distribution is not centred near epsilon, as after a few steps at a small sampling rate. The error
is therefore estimated and added to the distribution, so that epsilon is too large rather than too
small there. One step is composed without a transform.
"""

from __future__ import annotations

import math

import numpy as np
from dp_accounting.pld import common
from scipy import fft, optimize, signal, special

INTERVAL = 1e-3  # largest interval of the discretised privacy loss, for an epsilon up to 200
_CELLS = 200_000  # number of intervals up to epsilon; the interval grows past epsilon 200
_MOST_COMPOSED = 1 << 24  # largest number of composed losses, which take about 1 GB
_TRUNCATED = 1e-15  # mass of the tilted distribution that may be cut off
_ERROR = 8  # bound on the error of a transform, relative to the error that its values show


def loss_epsilon(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, interval: float
) -> float:
    """Epsilon at ``delta`` by the privacy-loss distribution, discretised with ``interval``.

    The other arguments are those of :func:`lowrank_dp.accounting.bound`. Losses whose probability
    over all steps is below a thousandth of delta count as infinite. The result is the larger of the
    two epsilons, for adding and for removing a unit.
    """
    reach = math.sqrt(2 * (math.log(steps / delta) + 7))  # standard deviations of the noise
    if (reach + 0.5 / noise_multiplier) / noise_multiplier > 700:
        return math.inf  # the exponential of the largest loss would overflow
    return max(
        _composed_epsilon(
            *_one_step(noise_multiplier, sample_rate, interval, reach, sign), interval, steps, delta
        )
        for sign in (1, -1)
    )


def loss_interval(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, epsilon: float
) -> float:
    """Interval of the discretised loss that leaves epsilon within a percent of its limit.

    Discretisation splits a loss between its two neighbouring points, which adds about
    E|loss| * interval to the variance of one step. The interval keeps this addition small
    relative to the variance, or too small to change epsilon. The interval is larger past epsilon
    200, to limit memory.
    """
    spread = sample_rate * math.sqrt(math.expm1(min(noise_multiplier**-2, 700.0)))
    mean = 2 * sample_rate * math.erf(noise_multiplier**-1 / math.sqrt(8))
    enough = max(0.1 * spread, 0.05 * epsilon**2 / (steps * mean * math.log(1 / delta)))
    return max(epsilon / _CELLS, 1e-9, min(INTERVAL, enough, max(epsilon / 50, 0.02 * spread)))


def _one_step(
    noise_multiplier: float, sample_rate: float, interval: float, reach: float, sign: int
) -> tuple[int, np.ndarray, float]:
    """Discretised privacy loss of one step, for a removed (``sign`` 1) or an added unit (-1).

    Returns:
        The lowest loss in units of ``interval``; the probabilities of this loss and the following
        ones; and the probability of an infinite loss. The hockey-stick divergence delta(epsilon) of
        the distribution is exact at every multiple of the interval and linear in exp(epsilon)
        between two of them, which is an upper bound (Doroshenko et al. 2022).
    """

    def loss(x: float) -> float:
        log_ratio = (x - 0.5) / noise_multiplier**2
        return sign * float(
            np.logaddexp(math.log1p(-sample_rate), math.log(sample_rate) + log_ratio)
        )

    # the range of losses within ``reach`` standard deviations under either neighbour
    ends = sorted([loss(-reach * noise_multiplier), loss(1 + reach * noise_multiplier)])
    lowest, highest = math.floor(ends[0] / interval), math.ceil(ends[1] / interval)
    epsilon = interval * np.arange(lowest, max(highest, lowest + 1) + 1)
    growth = np.expm1(sign * epsilon) + sample_rate  # exp(sign * epsilon) - (1 - sample_rate)
    inside = growth > 0
    x = noise_multiplier * np.log(growth[inside] / sample_rate) + 0.5 / noise_multiplier
    weight = sign * (1.0 if sign > 0 else np.exp(epsilon[inside]))
    above, below = np.zeros(len(epsilon)), np.zeros(len(epsilon))
    above[inside] = weight * (
        sample_rate * special.ndtr(sign * (1 / noise_multiplier - x))
        - growth[inside] * special.ndtr(-sign * x)
    )
    below[inside] = weight * (
        growth[inside] * special.ndtr(sign * x)
        - sample_rate * special.ndtr(sign * (x - 1 / noise_multiplier))
    )
    # delta(epsilon) equals ``above``, and 1 - exp(epsilon) + ``below``. For epsilon < 0 the second
    # form avoids a difference of numbers near 1. Both have the same second differences, from which
    # the probabilities follow, since 1 - exp(epsilon) is linear in exp(epsilon).
    negative = epsilon < 0
    delta = np.where(negative, below - np.expm1(epsilon), above)
    rest = np.where(negative, below, above + np.expm1(epsilon))
    scale = math.expm1(interval)
    bends = [(np.diff(f)[1:] - np.diff(f)[:-1] * math.exp(interval)) / scale for f in (delta, rest)]
    probabilities = np.concatenate(
        [
            [(rest[1] - rest[0]) / scale - rest[0]],
            np.where(negative[1:-1], bends[1], bends[0]),
            [(delta[-1] - delta[-2]) / math.expm1(-interval)],
        ]
    )
    return lowest, np.maximum(probabilities, 0.0), max(float(delta[-1]), 0.0)


def _composed_epsilon(
    lowest: int,
    probabilities: np.ndarray,
    infinite: float,
    interval: float,
    steps: int,
    delta: float,
) -> float:
    """Epsilon at ``delta`` of the sum of ``steps`` independent losses of one distribution.

    The first four arguments are a result of :func:`_one_step` and its interval. The result is
    infinite if the sum takes over ``_MOST_COMPOSED`` values: their number grows with ``steps``.
    """
    lost = -math.expm1(steps * math.log1p(-infinite))
    if lost >= delta:
        return math.inf
    with np.errstate(divide="ignore"):
        log_one = np.log(probabilities)
    tilt = _tilt(log_one, interval, lowest, steps, delta)
    log_tilted = log_one + tilt * interval * (lowest + np.arange(len(log_one)))
    log_mass = log_sum(log_tilted)
    tilted = np.exp(log_tilted - log_mass)
    lower, composed = _self_convolve(tilted, steps)
    if not len(composed):
        return math.inf
    losses = interval * (steps * lowest + lower + np.arange(len(composed)))
    centre = float(losses[np.argmax(composed)])
    kept = tilt * (losses - centre) > -600
    losses = losses[kept]
    weights = composed[kept] * np.exp(-tilt * (losses - centre))
    log_goal = math.log(delta - lost) - (steps * log_mass - tilt * centre)
    goal = math.exp(min(log_goal, 600.0))
    largest = max(0.0, interval * steps * (lowest + len(tilted) - 1))
    if steps > 1:  # losses above the last one, which were cut off, count as infinite
        goal -= _TRUNCATED * math.exp(-tilt * (losses[-1] - centre))
    return min(largest, _crossing(losses, weights, goal, interval)) if goal > 0 else largest


def _self_convolve(tilted: np.ndarray, steps: int) -> tuple[int, np.ndarray]:
    """Upper bounds on the probabilities of the sum of ``steps`` draws of an index of ``tilted``.

    Returns:
        The lowest index, and the probabilities of it and the following ones. Indices of probability
        ``_TRUNCATED`` together are left out. The array is empty if over ``_MOST_COMPOSED`` remain.
    """
    if steps == 1:
        return 0, tilted
    with np.errstate(over="ignore"):  # orders that overflow are never the best
        lower, upper = common.compute_self_convolve_bounds(tilted, steps, _TRUNCATED)
    if upper - lower >= _MOST_COMPOSED:
        return lower, np.empty(0)
    size = fft.next_fast_len(max(upper - lower + 1, len(tilted)), real=True)
    composed = np.roll(fft.irfft(fft.rfft(tilted, size) ** steps, size), -lower)
    # a probability is not negative, so that a negative value shows the error of the transform
    error = _ERROR * max(-float(composed.min()), np.finfo(float).eps * float(composed.max()))
    return lower, np.maximum(composed[: upper - lower + 1], 0.0) + error


def _tilt(log_one: np.ndarray, interval: float, lowest: int, steps: int, delta: float) -> float:
    """Theta of Chernoff's bound, which centres the tilted distribution near epsilon.

    The bound is quasi-convex in theta. Epsilon is an upper bound for any theta, and is closest near
    the best theta.
    """
    losses = interval * (lowest + np.arange(len(log_one)))

    def chernoff(log_theta: float) -> float:
        theta = math.exp(log_theta)
        return (steps * log_sum(log_one + theta * losses) - math.log(delta)) / theta

    ends, options = (math.log(1e-3), math.log(1e9)), {"xatol": 0.02}
    found = optimize.minimize_scalar(chernoff, bounds=ends, method="bounded", options=options)
    return math.exp(found.x)


def _crossing(losses: np.ndarray, weights: np.ndarray, goal: float, interval: float) -> float:
    """Epsilon at which the sum of ``weights * (1 - exp(epsilon - loss))`` equals ``goal``.

    The sum is over losses above epsilon, and is linear in exp(epsilon) between two losses.
    """
    above = np.cumsum(weights[::-1])[::-1]
    shrink = -math.expm1(-interval)
    # the sum at loss j - 1 is at[j] exp(-interval) + above[j] (1 - exp(-interval)): no differences
    at = signal.lfilter([0.0, shrink], [1.0, shrink - 1], above[::-1])[::-1]
    over = np.flatnonzero(at > goal)
    if not len(over):
        return max(0.0, float(losses[0]))
    j = int(over[-1])
    if j + 1 == len(losses):
        return math.inf
    share = (goal - at[j + 1]) / (at[j] - at[j + 1])
    return max(0.0, float(losses[j + 1]) + math.log1p(-share * shrink))


def log_sum(logs: np.ndarray, signs: np.ndarray | float = 1.0) -> float:
    """Logarithm of the sum of ``signs * exp(logs)``; -inf if the sum is not positive."""
    largest = float(logs.max())
    total = float((signs * np.exp(logs - largest)).sum())
    return largest + math.log(total) if total > 0 else -math.inf
