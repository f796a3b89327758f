"""Claim: DP-SGD with restored singular values needs fewer steps (arXiv 2510.01137).

All arms train with the same data, sampling rate, clipping norm, noise and number of steps, and so
at the same (epsilon, delta). The learning rate of each arm is chosen from one grid, by one seed
that is not reported, on held-out training examples. The reported seeds are scored on the
validation split.

:mod:`lowrank_dp.experiments.steps` replaces this experiment. This module is kept because its saved
results are still drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_dp import _validate
from lowrank_dp.evaluation import HIGHER_IS_BETTER
from lowrank_dp.experiments.efficiency_configs import (
    ARMS,
    BASELINE,
    E2E,
    MNLI,
    SHARES,
    SMALL,
    SMALL_TABLES,
    SMOLLM2,
    SST2,
    Config,
)
from lowrank_dp.experiments.intervals import mean_and_interval, with_interval
from lowrank_dp.sweep import Outcome, sweep
from lowrank_dp.train import TrainConfig

__all__ = [
    "ARMS",
    "BASELINE",
    "CAPTION",
    "E2E",
    "MNLI",
    "SMALL",
    "SMALL_TABLES",
    "SMOLLM2",
    "SST2",
    "Config",
    "Result",
    "headline",
    "run",
    "seconds_to",
    "steps_to",
    "table",
    "tuning_steps_to",
]
CAPTION = (
    "Score on the validation split over steps of DP training, mean over seeds with 95% "
    "t-intervals, every arm at the same epsilon and delta and at the learning rate that did best "
    "for it, by one seed that is not shown, on training examples set aside. Dashed, 90% of the "
    "baseline's (DP-Adam's) best gain over the model before training. Last panel, the tuning runs: "
    "steps to that share of the baseline's best there, at every learning rate of the grid."
)


@dataclass(frozen=True)
class Result:
    """Curves of every arm; NaN for a run that stopped.

    ``score``, ``loss`` and ``seconds`` are (arms, seeds, evaluations). ``tuning`` (arms, learning
    rates, evaluations) are the scores of the tuning runs, and ``learning_rate`` (arms,) has the
    best mean score over them. ``restore_share`` (arms, seeds) is the share of the steps' time
    that restoration takes. ``failures`` states why
    runs stopped.
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    epsilon: float
    delta: float
    description: str
    arms: tuple[str, ...]
    failures: tuple[str, ...]
    final: dict[
        str, dict[str, list[float]]
    ]  # arm -> metric -> one value per seed, at the last step
    steps: np.ndarray  # (evaluations,)
    score: np.ndarray
    loss: np.ndarray
    seconds: np.ndarray
    restore_share: np.ndarray
    learning_rate: np.ndarray
    tuning: np.ndarray

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher ``score`` is better than a lower one."""
        return HIGHER_IS_BETTER[self.config.score]

    @property
    def start(self) -> float:
        """Score before training, mean over the seeds of the baseline."""
        return float(np.nanmean(self.score[self.arms.index(BASELINE), :, 0]))

    @property
    def best(self) -> float:
        """Best score on the baseline's mean curve."""
        curve = np.nanmean(self.score[self.arms.index(BASELINE)], axis=0)
        return float(curve.max() if self.higher_is_better else curve.min())

    @property
    def tuning_steps(self) -> np.ndarray:
        """Steps to 90% of the baseline's best gain in the tuning runs: (arms, learning rates)."""
        return tuning_steps_to(self, 0.9)

    def band(self, arm: int, values: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean curve of an arm over seeds, and the half-width of its 95% t-interval."""
        return mean_and_interval((self.score if values is None else values)[arm])


def run(config: Config, folder: str | Path = Path("runs") / "efficiency") -> Result:
    """Tune and train every arm; a run that is finished in ``folder`` is not repeated.

    Raises ValueError for a config that cannot be run, or if every run of an arm failed.
    """
    _check(config)
    sign = 1.0 if HIGHER_IS_BETTER[config.score] else -1.0
    grid = [
        _arm_config(config, arm, rate, config.tuning_seed, config.tuning_holdout)
        for arm in config.arms
        for rate in config.learning_rates
    ]
    tuned = sweep(grid, folder, num_workers=config.num_workers)
    tuning = np.stack([_curve(outcome, config.score) for outcome in tuned]).reshape(
        len(config.arms), len(config.learning_rates), -1
    )
    means = tuning.mean(axis=-1)
    if np.isnan(means).all(axis=1).any():
        raise ValueError(
            "every learning rate of some arm failed: "
            f"{next(outcome.error for outcome in tuned if outcome.error)}"
        )
    chosen = np.array(config.learning_rates)[np.nanargmax(sign * means, axis=1)]

    wanted = [
        _arm_config(config, arm, rate, seed)
        for arm, rate in zip(config.arms, chosen.tolist(), strict=True)
        for seed in range(config.num_seeds)
    ]
    outcomes = sweep(wanted, folder, num_workers=config.num_workers)
    return _collect(config, tuning, chosen, tuned, outcomes)


def _check(config: Config) -> None:
    for arm in config.arms:
        _validate.choice("arm", arm, ARMS)
    if BASELINE not in config.arms:
        raise ValueError(f"arms must include the baseline {BASELINE!r}")
    _validate.choice("score", config.score, HIGHER_IS_BETTER)
    if config.tuning_seed < _validate.integer("num_seeds", config.num_seeds, low=2):
        raise ValueError(f"tuning_seed must not be one of the {config.num_seeds} reported seeds")


def _arm_config(
    config: Config, arm: str, learning_rate: float, seed: int, holdout: int = 0
) -> TrainConfig:
    return replace(
        config.base, **ARMS[arm], learning_rate=learning_rate, seed=seed, holdout=holdout
    )


def _curve(outcome: Outcome, metric: str) -> np.ndarray:
    """Return the metric at each evaluation, or NaN for a run that stopped."""
    steps, every = outcome.config.steps, outcome.config.eval_every
    count = -(-steps // every) + 1
    if outcome.result is None:
        return np.full(count, np.nan)
    return np.array([entry[metric] for entry in outcome.result.curve])


def _collect(
    config: Config,
    tuning: np.ndarray,
    chosen: np.ndarray,
    tuned: list[Outcome],
    outcomes: list[Outcome],
) -> Result:
    shape = len(config.arms), config.num_seeds, -1
    done = [outcome.result for outcome in outcomes if outcome.result is not None]
    if not done:
        raise ValueError(f"every run failed: {outcomes[0].error}")
    final: dict[str, dict[str, list[float]]] = {}
    for i, arm in enumerate(config.arms):
        results = [o.result for o in outcomes[i * config.num_seeds : (i + 1) * config.num_seeds]]
        last = [result.curve[-1] for result in results if result is not None]
        final[arm] = {
            name: [entry[name] for entry in last]
            for name in (last[0] if last else ())
            if name in HIGHER_IS_BETTER
        }

    def stack(metric: str) -> np.ndarray:
        return np.stack([_curve(outcome, metric) for outcome in outcomes]).reshape(shape)

    seconds, restoring = stack("seconds"), stack("restore_seconds")
    return Result(
        config=config,
        privacy=done[0].privacy,
        epsilon=float(done[0].epsilon or np.inf),
        delta=done[0].delta,
        description=done[0].description,
        arms=config.arms,
        failures=tuple(_failures(config.arms, tuned) + _failures(config.arms, outcomes)),
        final=final,
        steps=np.array([entry["step"] for entry in done[0].curve]),
        score=stack(config.score),
        loss=stack("loss"),
        seconds=seconds,
        restore_share=restoring[..., -1] / seconds[..., -1],
        learning_rate=chosen,
        tuning=tuning,
    )


def _failures(arms: tuple[str, ...], outcomes: list[Outcome]) -> list[str]:
    """Describe each run that stopped; ``outcomes`` has equally many of each arm, arm by arm."""
    each = len(outcomes) // len(arms)
    return [
        f"{arms[i // each]}, learning rate {outcome.config.learning_rate:g}, seed "
        f"{outcome.config.seed}: {outcome.error}"
        for i, outcome in enumerate(outcomes)
        if outcome.error
    ]


def steps_to(result: Result, share: float) -> np.ndarray:
    """Return the step of the first evaluation with ``share`` of the baseline's best gain.

    The gain is the difference from the score before training, and ``share`` is in [0, 1]. The
    result is (arms, seeds), with infinity for a seed that never reaches the share.
    """
    return _first_step(result, result.score, result.start, result.best, share)


def tuning_steps_to(result: Result, share: float) -> np.ndarray:
    """Return :func:`steps_to` for the tuning runs: (arms, learning rates).

    The best score of the baseline is its best at any learning rate of the grid.
    """
    baseline = result.tuning[result.arms.index(BASELINE)]
    best = np.nanmax(baseline) if result.higher_is_better else np.nanmin(baseline)
    return _first_step(result, result.tuning, float(np.nanmean(baseline[:, 0])), float(best), share)


def _first_step(
    result: Result, scores: np.ndarray, start: float, best: float, share: float
) -> np.ndarray:
    target = start + share * (best - start)
    sign = 1.0 if result.higher_is_better else -1.0
    reached = sign * scores >= sign * target
    first = np.where(reached.any(axis=-1), reached.argmax(axis=-1), -1)
    return np.where(first >= 0, result.steps[first], np.inf)


def seconds_to(result: Result, share: float) -> np.ndarray:
    """Return the seconds, on the machine of the runs, of the steps of :func:`steps_to`."""
    steps = steps_to(result, share)
    index = np.searchsorted(result.steps, np.where(np.isinf(steps), 0, steps))
    found = np.take_along_axis(result.seconds, index[..., None], axis=-1)[..., 0]
    return np.where(np.isinf(steps), np.inf, found)


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate each arm: final score, steps to the targets, and time of restoration."""
    columns = [
        "arm",
        "learning rate",
        f"final {result.config.score}",
        f"mean {result.config.score} over the run",
        *(f"steps to {share:.0%} of the baseline's best gain" for share in SHARES),
        "seconds to 90%",
        "restoring, share of step time",
        *(
            f"steps to 90% at learning rate {rate:g} (tuning run)"
            for rate in result.config.learning_rates
        ),
    ]
    rows = []
    for i, arm in enumerate(result.arms):
        cells = [
            arm,
            f"{result.learning_rate[i]:g}",
            _unless_stopped(result.score[i, :, -1]),
            _unless_stopped(result.score[i].mean(axis=-1)),
            *(_each(steps_to(result, share)[i]) for share in SHARES),
            _each(seconds_to(result, SHARES[0])[i]),
            f"{np.nanmean(result.restore_share[i]):.1%}",
            *(
                _each(tuning_steps_to(result, SHARES[0])[i, j : j + 1])
                for j in range(len(result.config.learning_rates))
            ),
        ]
        rows.append(cells)
    return columns, rows


def headline(result: Result) -> Mapping[str, str]:
    """Summarise the figure in a few lines."""
    lines = {
        "epsilon of every arm": f"{result.epsilon:.3g} at delta {result.delta:.3g}",
        f"{result.config.score} before training": f"{result.start:.4g}",
        f"best {result.config.score} of {BASELINE}": f"{result.best:.4g}",
    }
    what = f"final {result.config.score}; steps to 90% of {BASELINE}'s best gain"
    for i, arm in enumerate(result.arms):
        lines[f"{arm}: {what}"] = (
            f"{_unless_stopped(result.score[i, :, -1])}; {_each(steps_to(result, 0.9)[i])}"
        )
    return lines


def _unless_stopped(values: np.ndarray) -> str:
    if np.isnan(values).any():
        return f"{int(np.isnan(values).sum())} of {len(values)} runs stopped"
    return with_interval(values)


def _each(values: np.ndarray) -> str:
    """Format one value per seed; a mean would hide the runs that never reached the target."""
    return ", ".join("not reached" if np.isinf(v) else f"{v:.0f}" for v in values)
