"""Choice of learning rates: grids that grow until the best rate lies inside, for many arms at once.

A grid begins with three rates, a factor of ``COARSE`` apart. While the best rate is at an end, the
grid is extended there by ``COARSE``. Then a rate is put between the best rate and each neighbour
that is more than a factor of ``FINE`` away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowrank_dp.evaluation import HIGHER_IS_BETTER
from lowrank_dp.sweep import Outcome, sweep
from lowrank_dp.train import TrainConfig

COARSE = math.sqrt(10)
FINE = 2.0
MAX_EXTENSIONS = 6  # three decades
# numbers that a text about a sweep's cost assumes: a grid has 5 to 11 rates
TYPICAL_RATES = 6

# (arm, learning rate) of many runs -> scores of each by tuning seed, NaN for a run that stopped
Measure = Callable[[list[tuple[str, float]]], list[Sequence[float]]]


@dataclass(frozen=True)
class Tuned:
    """Learning rates that were tried for an arm, and the chosen one.

    Attributes:
        arm: name of the arm.
        rates: the grid, in rising order.
        scores: the criterion by rate and tuning seed; None for a run that stopped.
        chosen: the best rate, which lies inside the grid; None if there is none.
        failure: why no rate was chosen; empty otherwise.
    """

    arm: str
    rates: tuple[float, ...]
    scores: tuple[tuple[float | None, ...], ...]
    chosen: float | None
    failure: str = ""

    @property
    def means(self) -> np.ndarray:
        """Mean of the criterion over the tuning seeds, (rates,); NaN if one of the runs stopped."""
        return np.array(self.scores, dtype=float).mean(axis=1)  # None becomes NaN

    @property
    def is_inside(self) -> bool:
        """Whether the chosen rate has a neighbour within a factor of ``FINE`` on both sides."""
        if self.chosen not in self.rates[1:-1]:
            return False
        i = self.rates.index(self.chosen)
        ratios = (self.rates[i] / self.rates[i - 1], self.rates[i + 1] / self.rates[i])
        return max(ratios) <= FINE


def criterion(metric: str) -> str:
    """Describe what a learning rate is chosen by."""
    kind = "highest" if HIGHER_IS_BETTER[metric] else "lowest"
    return (
        f"{kind} {metric} on held-out training examples, mean over all steps after the first "
        "evaluation and over the tuning seeds"
    )


def best_index(means: Sequence[float]) -> int:
    """Return the index of the highest number; of equal ones, the index nearest to the middle.

    NaN is lower than every number. If all numbers are NaN, the index is 0: every run stopped, so
    the rates are too high.
    """
    values = np.where(np.isnan(means), -np.inf, means)
    if np.isneginf(values).all():
        return 0
    tied = np.flatnonzero(values == values.max())
    return int(tied[np.argmin(np.abs(tied - (len(values) - 1) / 2))])


def next_rates(rates: Sequence[float], means: Sequence[float]) -> list[float]:
    """Return the rates to try next; none once the best one is inside a fine enough grid.

    Args:
        rates: two or more rates, in rising order.
        means: score of each rate; higher is better, and NaN is worst.
    """
    best = best_index(means)
    if best == 0:
        return [_rounded(rates[0] / COARSE)]
    if best == len(rates) - 1:
        return [_rounded(rates[-1] * COARSE)]
    return [
        _rounded(math.sqrt(low * high))
        for low, high in ((rates[best - 1], rates[best]), (rates[best], rates[best + 1]))
        if high / low > FINE
    ]


def tune(
    starts: Mapping[str, float],
    measure: Measure,
    *,
    higher_is_better: bool = True,
    max_extensions: int = MAX_EXTENSIONS,
) -> dict[str, Tuned]:
    """Choose a learning rate for each arm; all arms are measured together, round by round.

    An arm whose best rate is still at an end of its grid after ``max_extensions`` extensions has no
    chosen rate, and a ``failure`` that says so.

    Args:
        starts: middle of the first grid, > 0, by arm.
        measure: function that trains; each (arm, rate) is asked for once.
        higher_is_better: whether a higher score is better than a lower one.
        max_extensions: largest number of extensions of a grid.
    """
    sign = 1.0 if higher_is_better else -1.0
    grids: dict[str, dict[float, Sequence[float]]] = {arm: {} for arm in starts}
    extensions, failed = dict.fromkeys(starts, 0), dict[str, str]()
    wanted = {
        arm: [_rounded(start / COARSE), _rounded(start), _rounded(start * COARSE)]
        for arm, start in starts.items()
    }
    while asked := [(arm, rate) for arm, rates in wanted.items() for rate in rates]:
        for (arm, rate), scores in zip(asked, measure(asked), strict=True):
            grids[arm][rate] = scores
        wanted = {arm: [] for arm in starts if arm not in failed}
        for arm in wanted:
            rates = sorted(grids[arm])
            means = [sign * float(np.mean(grids[arm][rate])) for rate in rates]
            wanted[arm] = next_rates(rates, means)
            if best_index(means) not in (0, len(rates) - 1):
                continue
            extensions[arm] += 1
            if extensions[arm] > max_extensions:
                wanted[arm] = []
                failed[arm] = (
                    f"{arm}: the best learning rate, {rates[best_index(means)]:g}, is still at an "
                    f"end of the grid {rates[0]:g} to {rates[-1]:g} after {max_extensions} "
                    "extensions"
                )
    return {arm: _tuned(arm, grids[arm], sign, failed.get(arm, "")) for arm in starts}


def _tuned(arm: str, grid: Mapping[float, Sequence[float]], sign: float, failure: str) -> Tuned:
    rates = sorted(grid)
    best = best_index([sign * float(np.mean(grid[rate])) for rate in rates])
    scores = tuple(
        tuple(None if math.isnan(score) else float(score) for score in grid[rate]) for rate in rates
    )
    return Tuned(arm, tuple(rates), scores, None if failure else rates[best], failure)


def _rounded(rate: float) -> float:
    """Return the rate to three significant digits, so that it can be read and found again."""
    return float(f"{rate:.3g}")


def tune_by_sweep(
    starts: Mapping[str, float],
    config_of: Callable[[str, float, int], TrainConfig],
    seeds: Sequence[int],
    metric: str,
    folder: str | Path,
    num_workers: int | None,
) -> tuple[dict[str, Tuned], list[str]]:
    """Choose a learning rate for each arm by :func:`criterion`, and list the runs that stopped.

    Args:
        starts: middle of the first grid by arm.
        config_of: (arm, learning rate, seed) -> configuration, with held-out units to evaluate on.
        seeds: tuning seeds.
        metric: name in ``evaluation.HIGHER_IS_BETTER``.
        folder: folder of the sweep, whose finished runs are not repeated.
        num_workers: number of concurrent runs; None means one per CPU core.
    """
    stopped: list[str] = []

    def measure(asked: list[tuple[str, float]]) -> list[Sequence[float]]:
        configs = [config_of(arm, rate, seed) for arm, rate in asked for seed in seeds]
        outcomes = sweep(configs, folder, num_workers=num_workers)
        stopped.extend(
            describe_failure(asked[i // len(seeds)][0], outcome)
            for i, outcome in enumerate(outcomes)
            if outcome.error
        )
        means = [float(curve(outcome, metric)[1:].mean()) for outcome in outcomes]
        return [means[i : i + len(seeds)] for i in range(0, len(means), len(seeds))]

    tuned = tune(starts, measure, higher_is_better=HIGHER_IS_BETTER[metric])
    return tuned, stopped


def curve(outcome: Outcome, metric: str) -> np.ndarray:
    """Return the metric at each evaluation, or NaN for a run that stopped."""
    steps, every = outcome.config.steps, outcome.config.eval_every
    if outcome.result is None:
        return np.full(-(-steps // every) + 1, np.nan)
    return np.array([entry[metric] for entry in outcome.result.curve])


def stack(
    outcomes: Mapping[tuple[str, int], Outcome],
    arms: Sequence[str],
    num_seeds: int,
    steps: int,
    metric: str,
) -> np.ndarray:
    """Return the metric of each arm and seed after every step: (arms, seeds, steps + 1).

    NaN stands for a run that stopped, and for an arm that was not run.
    """
    values = np.full((len(arms), num_seeds, steps + 1), np.nan)
    for (arm, seed), outcome in outcomes.items():
        values[list(arms).index(arm), seed] = curve(outcome, metric)
    return values


def describe_failure(arm: str, outcome: Outcome) -> str:
    """Describe a run that stopped."""
    config = outcome.config
    held_out = " (tuning)" if config.holdout else ""
    return (
        f"{arm}, learning rate {config.learning_rate:g}, seed {config.seed}{held_out}: "
        f"{outcome.error}"
    )
