"""Power of an audit: smallest faults of noise, clipping and sampling that a design detects.

A fault of size f is noise of standard deviation sigma C / f, clipping to norm f C, or a sampling
rate f q. Noise divided by f and clipping to f C change the score of a canary by the same factor.
The power follows from the exact law of a released sum, for a canary whose gradient is clipped to
norm C in every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from lowrank_dp.audit import laws
from lowrank_dp.audit.bounds import law_bound, rate_bound, run_epsilon, run_log_ratio
from lowrank_dp.audit.canaries import Audited
from lowrank_dp.audit.request import Design
from lowrank_dp.audit.runs import split_bound
from lowrank_dp.audit.sums import TAILS, rounding_of_clipping
from lowrank_dp.audit.weights import one_run_bound

POWER = 0.8  # probability of detection that defines the smallest detected fault
MOST = 32.0  # largest factor that is considered
_DRAWS = 100  # simulated audits per factor


@dataclass(frozen=True)
class Found:
    """Smallest size of a fault that a design detects with probability ``POWER``.

    Attributes:
        fault: the fault, in words, with its size f.
        by: the test or bound that detects the fault, in words.
        factor: the size f >= 1; None if the design does not detect the fault up to f = ``MOST``.
    """

    fault: str
    by: str
    factor: float | None


def power_of(audited: Audited, design: Design, epsilon: float) -> tuple[Found, ...]:
    """Return the smallest faults that the design detects at its size.

    Args:
        audited: the run.
        design: design of the audit.
        epsilon: the accountant's epsilon. A lower bound above this value detects a fault.
    """
    if design.design == "sums":
        return _power_of_sums(audited, design, epsilon)
    simulate = _simulate_weights if design.design == "weights" else _simulate_runs
    return (
        Found(
            "noise / f, or clipping to f C",
            "the bound, at the best score",
            smallest_factor(lambda f: simulate(audited, design, f) > epsilon),
        ),
    )


def smallest_factor(found: Callable[[float], np.ndarray]) -> float | None:
    """Return the smallest factor in [1, MOST], within 2%, that is detected with probability POWER.

    ``found`` simulates audits at a factor and returns one bool per audit: whether the audit
    detects the fault. The detected share must not decrease in the factor. None if the share is
    below ``POWER`` at ``MOST``.
    """

    def enough(factor: float) -> bool:
        return bool(np.mean(found(factor)) >= POWER)

    if not enough(MOST):
        return None
    low, high = 0.0, math.log(MOST)
    if enough(1.0):
        return 1.0
    while high - low > 0.02:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(math.exp(middle)) else (middle, high)
    return math.exp(high)


def _power_of_sums(audited: Audited, design: Design, epsilon: float) -> tuple[Found, ...]:
    steps = design.num_runs * audited.setup.config.steps
    sizes = np.array([p.numel() for p in audited.setup.trained.values()], dtype=float)
    each = design.level / laws.PARTS / (len(sizes) + 1)
    units = len(audited.setup.unit_rows)
    return (
        Found("noise / f, all tensors", "the law's test", noise_factor(steps * sizes.sum(), each)),
        Found(
            "noise / f, the smallest tensor", "the law's test",
            noise_factor(steps * sizes.min(), each),
        ),
        Found(
            "noise / f, all tensors",
            "the bound",
            _law_bound_factor(audited, design, epsilon, steps * sizes, units * steps),
        ),
        Found(
            "clipping to f C", "the measured contribution",
            1 + rounding_of_clipping(audited.setup.config),
        ),
        Found(
            "sampling rate f q",
            "the law's test",
            rate_factor(units * steps, audited.sample_rate, design.level / laws.PARTS),
        ),
    )  # fmt: skip


def noise_factor(entries: float, level: float) -> float:
    """Factor f at which noise / f fails a two-sided chi-squared test with probability POWER.

    ``entries`` is the number of entries of the noise; ``level`` in (0, 1) is the level of the test.
    """
    return math.sqrt(stats.chi2.ppf(POWER, entries) / stats.chi2.ppf(level / 2, entries))


def rate_factor(trials: int, rate: float, level: float) -> float | None:
    """Factor f at which the rate f q fails a two-sided binomial test with probability POWER.

    ``rate`` is q, and ``level`` in (0, 1) is the level of the test. The result is None if no rate
    up to 1 fails with that probability.
    """
    least = stats.binom.isf(level / 2, trials, rate) + 1

    def excess(factor: float) -> float:
        return float(stats.binom.sf(least - 1, trials, min(1.0, factor * rate))) - POWER

    highest = 1 / rate
    if least > trials or excess(highest) < 0:
        return None
    return float(optimize.brentq(excess, 1.0, highest, xtol=1e-4))


def _law_bound_factor(
    audited: Audited, design: Design, epsilon: float, entries: np.ndarray, trials: int
) -> float | None:
    """Factor f at which noise / f raises the bound of the design ``sums`` above epsilon."""
    tail, q = 1 - design.confidence, audited.sample_rate
    rate = rate_bound(round(q * trials), trials, TAILS["rate"] * tail)
    steps, delta = audited.setup.config.steps, audited.delta

    def excess(log_mu: float) -> float:
        bound = run_epsilon(math.exp(log_mu), rate, steps, delta)
        return math.log(max(bound, 1e-9)) - math.log(max(epsilon, 1e-9))

    low = math.log(1 / audited.noise_multiplier)
    if excess(low + math.log(MOST)) < 0:
        return None
    needed = math.exp(optimize.brentq(excess, low, low + math.log(MOST), xtol=1e-3))
    generator = np.random.default_rng(0)
    squares = generator.chisquare(entries, size=(_DRAWS, len(entries)))
    part = np.sqrt(entries / entries.sum())  # the contribution is spread evenly over the entries
    bounds = [
        law_bound(s, entries, part, audited.noise_multiplier, TAILS["law"] * tail) for s in squares
    ]
    return float(max(1.0, needed / np.quantile(bounds, 1 - POWER)))


def _simulate_weights(audited: Audited, design: Design, factor: float) -> np.ndarray:
    """Simulate audits of the design ``weights`` with noise / ``factor``; return their bounds."""
    generator, bounds = np.random.default_rng(0), []
    steps, tail = audited.setup.config.steps, (1 - design.confidence) / 2
    for _ in range(_DRAWS):
        coins = generator.random(design.num_canaries) < 0.5
        taken = generator.binomial(steps, audited.sample_rate, size=len(coins)) * coins
        noise = generator.normal(size=len(coins)) * math.sqrt(steps)
        scores = taken * factor / audited.noise_multiplier + noise
        bounds.append(one_run_bound(scores, coins, generator, delta=audited.delta, tail=tail))
    return np.array(bounds)


def _simulate_runs(audited: Audited, design: Design, factor: float) -> np.ndarray:
    """Simulate audits of the design ``runs`` with noise / ``factor``; return their bounds."""
    generator, bounds = np.random.default_rng(0), []
    steps, shift = audited.setup.config.steps, 1 / audited.noise_multiplier
    for _ in range(_DRAWS):
        coins = generator.random(design.num_runs) < 0.5
        coins[:4] = [True, True, False, False]
        taken = (generator.random((len(coins), steps)) < audited.sample_rate) * coins[:, None]
        values = taken * shift + generator.normal(size=taken.shape) / factor
        scores = run_log_ratio(values, np.full(steps, shift), audited.sample_rate)
        bounds.append(
            split_bound(scores, coins, generator, delta=audited.delta, confidence=design.confidence)
        )
    return np.array(bounds)
