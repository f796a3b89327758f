"""Measures of sample efficiency: steps to a target, share of a gap closed, paired differences.

All functions take scores of every step. The last axis holds the score before training and the score
after each step, so the index is the number of steps. NaN stands for a run that stopped.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lowrank_dp.experiments.intervals import mean_and_interval, with_interval

MIN_GAP = 1.0  # smallest gap, in steps, of which a closed share is computed

# definition for captions
GAIN = (
    "A running median is the median of a step's score and the scores of its two neighbours; the "
    "last step has none. A gain is the difference between the score before training and the best "
    "running median of the mean curve over seeds."
)


def running_median(scores: np.ndarray) -> np.ndarray:
    """Return the median of each step and its two neighbours (..., steps + 1); NaN at both ends."""
    medians = np.full(scores.shape, np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(scores, 3, axis=-1)
    medians[..., 1:-1] = np.median(windows, axis=-1)
    return medians


def target_score(baselines: np.ndarray, share: float, *, higher_is_better: bool) -> float:
    """Return the score at ``share`` of the gain of the weaker baseline.

    The gain of a baseline is the difference between the score before training and the best
    running median of the mean curve over seeds. The target is that of the weaker baseline, so that
    every baseline reaches the target.

    Args:
        baselines: (baselines, seeds, steps + 1) scores.
        share: share of the gain, in (0, 1].
        higher_is_better: whether a higher score is better than a lower score.

    Returns:
        The score; NaN if the gain of a baseline is not above 0, or if every run of a baseline
        stopped.
    """
    stopped = np.isnan(baselines).any(axis=-1)
    if stopped.all(axis=-1).any():
        return float("nan")
    sign = 1.0 if higher_is_better else -1.0
    curves = np.nanmean(baselines, axis=1)
    start = float(curves[:, 0].mean())
    gain = float((np.nanmax(sign * running_median(curves), axis=-1) - sign * start).min())
    return start + sign * share * gain if gain > 0 else float("nan")


def steps_to(scores: np.ndarray, target: float, *, higher_is_better: bool) -> np.ndarray:
    """Return the first step (...,) at which the running median reaches ``target``, or infinity.

    The number is NaN for a run that stopped or does not exist, whose scores hold NaN: such a run
    did not miss the target. All numbers are NaN for a target that is NaN, which no run can miss.
    The running median is over 3 steps. The last step has only one neighbour, and is never returned.
    """
    sign = 1.0 if higher_is_better else -1.0
    reached = sign * running_median(scores) >= sign * target  # a comparison with NaN is false
    steps = np.where(reached.any(axis=-1), reached.argmax(axis=-1), np.inf)
    return np.where(np.isnan(scores).any(axis=-1) | np.isnan(target), np.nan, steps)


def by_seed(steps: np.ndarray, target: float) -> str:
    """Format one number per seed; a mean would hide runs that did not reach the target.

    ``steps`` (seeds,) are numbers of :func:`steps_to` for ``target``, or times of these steps.
    """
    if np.isnan(target):
        return "no target"
    return ", ".join(
        "no run" if np.isnan(value) else "not reached" if np.isinf(value) else f"{value:.0f}"
        for value in steps
    )


def unless_stopped(values: np.ndarray, text: Callable[[np.ndarray], str] = with_interval) -> str:
    """Format ``values`` (seeds,) by ``text``, or state how many are NaN: those of stopped runs."""
    stopped = int(np.isnan(values).sum())
    if stopped == len(values):
        return "no run"
    return f"{stopped} of {len(values)} runs stopped" if stopped else text(values)


def censored(steps: np.ndarray, budget: int) -> np.ndarray:
    """Return ``steps``, with ``budget + 1`` for runs that did not reach the target.

    A difference or a ratio of censored numbers is a bound, not a measurement. NaN, which stands for
    a run that stopped, stays NaN.
    """
    return np.where(np.isinf(steps), budget + 1.0, steps)


def gap_share(
    steps_dp: np.ndarray, steps_arm: np.ndarray, steps_ceiling: np.ndarray
) -> tuple[float, float]:
    """Return the share of the gap that an arm closes, and the half-width of its 95% interval.

    The share is (steps_dp - steps_arm) / (steps_dp - steps_ceiling), each a mean over seeds. The
    interval is Student's t for the jackknife's pseudo-values, which leave out one seed each.

    Args:
        steps_dp, steps_arm, steps_ceiling: (seeds,) censored numbers of steps to one target, of
            plain DP training, of the arm, and of training without noise (NON-PRIVATE).

    Returns:
        The share and the half-width. The share is 1 for an arm as fast as training without noise,
        0 for an arm as fast as plain DP training, and negative for a slower arm. The share is NaN
        if the gap is less than ``MIN_GAP`` steps. The half-width is infinite if the gap is less
        than ``MIN_GAP`` steps when one of the seeds is left out.

    Source of the interval: Tukey, Annals of Mathematical Statistics 29 (1958), p. 614.
    """
    steps = np.stack([steps_dp, steps_arm, steps_ceiling]).astype(float)
    count = steps.shape[-1]

    def share(kept: np.ndarray) -> float:
        dp, arm, ceiling = steps[:, kept].mean(axis=-1)
        return float((dp - arm) / (dp - ceiling)) if dp - ceiling >= MIN_GAP else float("nan")

    whole = share(np.arange(count))
    without = np.array([share(np.arange(count) != seed) for seed in range(count)])
    _, half = mean_and_interval(count * whole - (count - 1) * without)
    return whole, float("inf") if np.isnan(half) and not np.isnan(whole) else float(half)


def paired(first: np.ndarray, second: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the mean of ``first - second``, both (seeds,), and the half-width of its interval.

    The differences are taken within each seed. The interval is Student's t with seeds - 1 degrees
    of freedom, and contains the true mean with probability ``level``, in (0, 1).
    """
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    mean, half = mean_and_interval(differences, level=level)
    return float(mean), float(half)


def is_larger(first: np.ndarray, second: np.ndarray, level: float) -> bool:
    """Return whether the paired interval of ``first - second`` at a level lies above 0.

    If all differences are equal, Student's interval has no width and says nothing. The exact sign
    test then decides, at the same one-sided level ``(1 - level) / 2``. NaN gives False.
    """
    mean, half = paired(first, second, level)
    if half == 0 and mean > 0:
        return 0.5 ** len(first) <= (1 - level) / 2
    return mean > half
