"""Measures of a result of :mod:`lowrank_dp.experiments.steps`: steps to a target, and differences.

The measures are those of :mod:`lowrank_dp.experiments.protocol`, for the arms of a result by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lowrank_dp.experiments import protocol
from lowrank_dp.experiments.arms import BASELINES, CEILINGS, PLAIN

if TYPE_CHECKING:
    from lowrank_dp.experiments.steps import Result

SHARES = (0.9, 0.95)  # shares of the weaker baseline's gain that are targets


def steps_to(result: Result, share: float) -> np.ndarray:
    """Return :func:`protocol.steps_to` for a share of the weaker baseline's gain: (arms, seeds)."""
    return protocol.steps_to(
        result.score, result.target(share), higher_is_better=result.higher_is_better
    )


def seconds_to(result: Result, share: float) -> np.ndarray:
    """Return the seconds of training (arms, seeds) that the steps of :func:`steps_to` took.

    The number is infinity or NaN where that of :func:`steps_to` is.
    """
    steps = steps_to(result, share)
    reached = np.isfinite(steps)
    index = np.where(reached, steps, 0).astype(int)[..., None]
    return np.where(reached, np.take_along_axis(result.seconds, index, axis=-1)[..., 0], steps)


def steps_saved(result: Result, arm: str, baseline: str, share: float) -> tuple[float, float]:
    """Return the mean number of steps that an arm saves against a baseline, and its half-width.

    Differences are paired by seed, and steps are censored. The half-width is that of the 95%
    t-interval.
    """
    steps = protocol.censored(steps_to(result, share), result.budget)
    return protocol.paired(result.of(baseline, steps), result.of(arm, steps))


def bound(result: Result, arm: str, baseline: str, share: float) -> str:
    """Return the sign of :func:`steps_saved`, if runs that miss the target make it a bound.

    The sign is "≥" if only runs of the baseline miss the target, "≤" if only runs of the arm miss
    the target, "?" if runs of both do, and "" if no run does.
    """
    missed = np.isinf(steps_to(result, share)).any(axis=-1)
    pair = bool(result.of(baseline, missed)), bool(result.of(arm, missed))
    return {(True, False): "≥", (False, True): "≤", (True, True): "?"}.get(pair, "")


def faster_arms(result: Result, share: float = SHARES[0]) -> list[str]:
    """List the arms with noise that take significantly fewer steps than both baselines.

    Each paired t-interval has the level ``1 - 0.05 / n`` for the n compared arms (Bonferroni). The
    probability that any listed arm saves no steps is therefore at most 5%. If the difference is
    the same in every seed, the t-interval has no width, and the exact sign test decides instead. An
    arm whose difference is an upper bound is not listed.
    """
    steps = protocol.censored(steps_to(result, share), result.budget)
    compared = [
        found.arm for found in result.tuned if found.chosen is not None and found.arm not in PLAIN
    ]

    def is_faster(arm: str, baseline: str) -> bool:
        level = 1 - 0.05 / len(compared)
        first, second = result.of(baseline, steps), result.of(arm, steps)
        return protocol.is_larger(first, second, level) and (
            bound(result, arm, baseline, share) in ("", "≥")
        )

    if np.isnan(result.target(share)):
        return []
    return [arm for arm in compared if all(is_faster(arm, baseline) for baseline in BASELINES)]


def mean_above(result: Result, arm: str, baseline: str) -> tuple[float, float]:
    """Return the paired difference of the mean score over the run, and its 95% half-width."""
    return protocol.paired(mean_over_steps(result.of(arm)), mean_over_steps(result.of(baseline)))


def gap_share(result: Result, arm: str, baseline: str, share: float) -> tuple[float, float]:
    """Return the share of a baseline's gap to the faster ceiling that an arm closes.

    The second number is the half-width of the 95% interval of :func:`protocol.gap_share`.
    """
    steps = protocol.censored(steps_to(result, share), result.budget)
    ceiling = _faster_ceiling(result, share)
    return protocol.gap_share(
        result.of(baseline, steps), result.of(arm, steps), result.of(ceiling, steps)
    )


def bound_of_share(result: Result, arm: str, baseline: str, share: float) -> str:
    """Return the sign of :func:`gap_share`, if runs that miss the target make it a bound.

    The sign is "≤" if only runs of the arm miss the target, "?" if runs of the baseline or of the
    faster ceiling do, and "" if no run does.
    """
    missed = np.isinf(steps_to(result, share)).any(axis=-1)
    if result.of(baseline, missed) or result.of(_faster_ceiling(result, share), missed):
        return "?"
    return "≤" if result.of(arm, missed) else ""


def _faster_ceiling(result: Result, share: float) -> str:
    """Return the noise-free arm with the lower mean number of censored steps."""
    steps = protocol.censored(steps_to(result, share), result.budget)
    return min(CEILINGS, key=lambda name: result.of(name, steps).mean())


def mean_over_steps(scores: np.ndarray) -> np.ndarray:
    """Return the mean score over all steps (seeds,) of (seeds, steps + 1).

    This mean is the criterion of the tuning.
    """
    return scores[:, 1:].mean(axis=-1)
