"""Tuning of learning rates for many arms, by grids that grow until the best rate lies inside.

The rates of a grid are ``start * 10^(k / 4)`` with integers k, the *places* of the grid. A grid
begins with the places -2, 0 and 2, or with -1, 0 and 1 if the start is a good rate of another task.
While the best rate is at an end of the grid, the grid is extended at this end by two places, a
factor of 3.16. Then the places beside the best rate are added, so that both neighbours of the best
rate differ from it by a factor of 1.78.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowrank_dp.evaluation import HIGHER_IS_BETTER
from lowrank_dp.sweep import Outcome, sweep
from lowrank_dp.train import TrainConfig

PER_DECADE = 4  # number of places of a grid per decade
COARSE = 2  # distance, in places, of the rates of the first grid
MAX_RATIO = 2.0  # largest ratio of the chosen rate and a neighbour in the grid
MAX_EXTENSIONS = 6  # largest number of extensions of a grid, which span three decades
# assumed numbers of rates of a grid in an estimate of a sweep's cost: a grid has 5 to 11 rates, and
# 3 to 11 if it begins at a good rate of another task
TYPICAL_RATES = 6
TYPICAL_RATES_IF_KNOWN = 4

# list of (arm, learning rate) -> scores of each, one per tuning seed; NaN for a run that stopped
Measure = Callable[[list[tuple[str, float]]], list[Sequence[float]]]


@dataclass(frozen=True)
class Tuned:
    """Tried learning rates of an arm, and the chosen rate.

    Attributes:
        arm: name of the arm.
        rates: (rates,) the grid, in increasing order.
        scores: (rates, tuning seeds) values of the criterion; None for a run that stopped.
        chosen: the best rate, which lies inside the grid; None if no rate was chosen.
        failure: why no rate was chosen; "" if a rate was chosen.
    """

    arm: str
    rates: tuple[float, ...]
    scores: tuple[tuple[float | None, ...], ...]
    chosen: float | None
    failure: str = ""

    @property
    def means(self) -> np.ndarray:
        """Mean of the criterion over the tuning seeds, (rates,); NaN if a run stopped."""
        return np.array(self.scores, dtype=float).mean(axis=1)  # None becomes NaN

    def mean_at(self, rate: float) -> float:
        """Return the mean of the criterion over the tuning seeds at a rate of the grid.

        The number is NaN if a run stopped. Raises ValueError if the rate is not in the grid.
        """
        if rate not in self.rates:
            raise ValueError(f"rate must be in the grid {self.rates}, got {rate}")
        return float(self.means[self.rates.index(rate)])

    @property
    def is_inside(self) -> bool:
        """Whether the chosen rate has a neighbour within ``MAX_RATIO`` on both sides."""
        if self.chosen not in self.rates[1:-1]:
            return False
        i = self.rates.index(self.chosen)
        ratios = (self.rates[i] / self.rates[i - 1], self.rates[i + 1] / self.rates[i])
        return max(ratios) <= MAX_RATIO


def criterion(metric: str) -> str:
    """Describe the criterion by which learning rates are chosen."""
    kind = "highest" if HIGHER_IS_BETTER[metric] else "lowest"
    return (
        f"{kind} {metric} on held-out training examples, mean over all steps after the first "
        "evaluation and over the tuning seeds"
    )


def best_index(means: Sequence[float]) -> int:
    """Return the index of the highest number; if several are equal, the index nearest the middle.

    NaN counts as lower than every number. If all numbers are NaN, the index is 0: every run
    stopped, so the rates are too high.
    """
    values = np.where(np.isnan(means), -np.inf, means)
    if np.isneginf(values).all():
        return 0
    tied = np.flatnonzero(values == values.max())
    return int(tied[np.argmin(np.abs(tied - (len(values) - 1) / 2))])


def next_places(places: Sequence[int], means: Sequence[float]) -> list[int]:
    """Return the places to try next; empty once the best place has neighbours on both sides.

    Args:
        places: two or more places of a grid, in increasing order.
        means: score of each place; higher is better, and NaN is worst.
    """
    best = best_index(means)
    if best == 0:
        return [places[0] - COARSE]
    if best == len(places) - 1:
        return [places[-1] + COARSE]
    neighbours = (places[best - 1], places[best + 1])
    return [(places[best] + place) // 2 for place in neighbours if abs(place - places[best]) > 1]


def rate_at(start: float, place: int) -> float:
    """Return the learning rate at a place of a grid, rounded to three digits."""
    return float(f"{start * 10 ** (place / PER_DECADE):.3g}")


def tune(
    starts: Mapping[str, float],
    measure: Measure,
    *,
    known: Collection[str] = (),
    higher_is_better: bool = True,
    max_extensions: int = MAX_EXTENSIONS,
) -> dict[str, Tuned]:
    """Choose a learning rate for each arm; in each round, the new rates of all arms are measured.

    If the best rate of an arm is still at an end of the grid after ``max_extensions`` extensions,
    the arm has no chosen rate, and ``failure`` states this reason.

    Args:
        starts: middle of the first grid, > 0, by arm.
        measure: function that trains and returns scores. Each (arm, rate) is requested once.
        known: arms whose start is a good rate of another task. Their first grid is finer.
        higher_is_better: whether a higher score is better than a lower score.
        max_extensions: largest number of extensions of a grid.
    """
    sign = 1.0 if higher_is_better else -1.0
    grids: dict[str, dict[int, Sequence[float]]] = {arm: {} for arm in starts}
    extensions, failed = dict.fromkeys(starts, 0), set[str]()
    wanted = {arm: [-1, 0, 1] if arm in known else [-COARSE, 0, COARSE] for arm in starts}
    while asked := [(arm, place) for arm, places in wanted.items() for place in places]:
        scores = measure([(arm, rate_at(starts[arm], place)) for arm, place in asked])
        for (arm, place), by_seed in zip(asked, scores, strict=True):
            grids[arm][place] = by_seed
        wanted = {}
        for arm in (name for name in starts if name not in failed):
            places = sorted(grids[arm])
            means = [sign * float(np.mean(grids[arm][place])) for place in places]
            if best_index(means) in (0, len(places) - 1):
                extensions[arm] += 1
            if extensions[arm] > max_extensions:
                failed.add(arm)
            else:
                wanted[arm] = next_places(places, means)
    return {arm: _tuned(arm, starts[arm], grids[arm], sign, arm in failed) for arm in starts}


def _tuned(
    arm: str, start: float, grid: Mapping[int, Sequence[float]], sign: float, failed: bool
) -> Tuned:
    places = sorted(grid)
    rates = tuple(rate_at(start, place) for place in places)
    best = rates[best_index([sign * float(np.mean(grid[place])) for place in places])]
    scores = tuple(
        tuple(None if math.isnan(score) else float(score) for score in grid[place])
        for place in places
    )
    if not failed:
        return Tuned(arm, rates, scores, best)
    if all(score is None for by_seed in scores for score in by_seed):
        failure = f"{arm}: every run stopped at the learning rates {rates[0]:g} to {rates[-1]:g}"
        return Tuned(arm, rates, scores, None, failure)
    failure = (
        f"{arm}: the best learning rate, {best:g}, is still at an end of the grid {rates[0]:g} to "
        f"{rates[-1]:g}"
    )
    return Tuned(arm, rates, scores, None, failure)


def tune_by_sweep(
    starts: Mapping[str, float],
    config_of: Callable[[str, float, int], TrainConfig],
    seeds: Sequence[int],
    metric: str,
    folder: str | Path,
    num_workers: int | None,
    engine: str = "loky",
    known: Collection[str] = (),
) -> tuple[dict[str, Tuned], list[str]]:
    """Choose a learning rate for each arm by :func:`criterion`, and list the runs that stopped.

    Args:
        starts: middle of the first grid by arm.
        config_of: function (arm, learning rate, seed) -> configuration with a holdout.
        seeds: tuning seeds.
        metric: name in ``evaluation.HIGHER_IS_BETTER``.
        folder: folder of the sweep. Finished runs in the folder are not repeated.
        num_workers: number of concurrent runs; None means one per CPU core, and 4 on a GPU.
        engine: engine of the sweep.
        known: arms whose start is a good rate of another task, as in :func:`tune`.

    Raises:
        ValueError: as :func:`require_made` does.
    """
    stopped: list[str] = []

    def measure(asked: list[tuple[str, float]]) -> list[Sequence[float]]:
        configs = [config_of(arm, rate, seed) for arm, rate in asked for seed in seeds]
        outcomes = sweep(configs, folder, num_workers=num_workers, engine=engine)
        require_made(outcomes)
        stopped.extend(
            describe_failure(asked[i // len(seeds)][0], outcome)
            for i, outcome in enumerate(outcomes)
            if outcome.error
        )
        means = [float(curve(outcome, metric)[1:].mean()) for outcome in outcomes]
        return [means[i : i + len(seeds)] for i in range(0, len(means), len(seeds))]

    tuned = tune(starts, measure, known=known, higher_is_better=HIGHER_IS_BETTER[metric])
    return tuned, stopped


def train_all(
    configs: Mapping[tuple[str, int], TrainConfig], folder: str | Path, num_workers: int | None
) -> dict[tuple[str, int], Outcome]:
    """Train the reported runs, by arm and seed; finished runs in ``folder`` are not repeated.

    Raises ValueError as :func:`require_made` does.
    """
    outcomes = sweep([*configs.values()], folder, num_workers=num_workers)
    require_made(outcomes)
    return dict(zip(configs, outcomes, strict=True))


def require_made(outcomes: Sequence[Outcome]) -> None:
    """Raise ValueError if a run failed and did not diverge, for example on a full disk.

    A run that diverges says something about its learning rate; any other failure says nothing.
    """
    for outcome in outcomes:
        if outcome.error and not outcome.diverged:
            raise ValueError(
                f"a run of the experiment could not be made: {outcome.error}; remove the cause, or "
                "delete the folder to begin that run again; then repeat the command, which keeps "
                "the finished runs"
            )


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
