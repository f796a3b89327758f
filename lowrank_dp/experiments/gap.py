"""Gap in steps between DP training and noise-free training, by epsilon, batch size, trained part.

DP-SGD, DP-Adam and their noise-free versions train with the same clipping, sampling and number of
steps. Each of the four is tuned separately. Two ratios of steps to one target are reported. The
cost of noise is the ratio of DP-X to noise-free X, for X = SGD or Adam. The cost of lost adaptivity
is the ratio of noise-free SGD to noise-free Adam: noise makes Adam's second moment nearly constant,
so that DP-Adam behaves like SGD.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_dp import _validate
from lowrank_dp._rounding import rounded_up
from lowrank_dp._terminal import progress
from lowrank_dp.engines import workers_of
from lowrank_dp.evaluation import HIGHER_IS_BETTER
from lowrank_dp.experiments import protocol, tuning
from lowrank_dp.experiments.arms import (
    ARMS,
    BASELINES,
    CEILING_OF,
    CEILINGS,
    FOLDER,
    arm_config,
    check_runs,
    check_texts,
    scored_on,
    wanted_runs,
)
from lowrank_dp.experiments.cost import measure_cost
from lowrank_dp.experiments.gap_configs import PARTS, Config
from lowrank_dp.mechanism import NON_PRIVATE
from lowrank_dp.sweep import Outcome
from lowrank_dp.train import TrainConfig

SHARE = 0.9
WORTH = 1.5  # smallest gap at which other experiments compare arms
CAPTION = (
    "Steps to 90% of the gain of the weaker of tuned DP-SGD and tuned DP-Adam, as ratios of means "
    "over seeds, by epsilon, expected batch B and trained part. What noise costs: DP-X over X "
    "with the same clipping and sampling and no noise. What lost adaptivity costs: noise-free SGD "
    "over noise-free Adam. Gap: the faster DP optimizer over the faster noise-free optimizer, the "
    f"most that a perfect denoiser could save. {protocol.GAIN} A step reaches the target if its "
    "running median does. A run that does not reach the target counts as one step more than it "
    "has, which makes the ratio a bound. NON-PRIVATE: the noise-free runs are computed from clean "
    "gradients."
)


@dataclass(frozen=True)
class Setting:
    """Setting of runs: trained part, batch size, arm, and epsilon (None without noise)."""

    part: str
    batch_size: int
    arm: str
    epsilon: float | None = None

    @property
    def name(self) -> str:
        """Name of the setting, in words."""
        noise = "" if self.epsilon is None else f", epsilon {self.epsilon:g}"
        return f"{self.arm}, {self.part}, B = {self.batch_size}{noise}"


@dataclass(frozen=True)
class Result:
    """Curves of the score in every setting.

    NaN stands for a run that stopped, and for a setting without a learning rate. ``private`` is
    (parts, batch sizes, epsilons, optimizers, seeds, steps + 1). ``ceiling`` is (parts, batch
    sizes, optimizers, seeds, steps + 1), and is NON-PRIVATE. The optimizers are those of
    ``arms.BASELINES``. ``noise_multiplier`` (batch sizes, epsilons) is relative to the clipping
    norm. ``tuned`` holds the grid of learning rates of each setting, by the setting's name.
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    criterion: str
    failures: tuple[str, ...]
    tuned: tuple[tuning.Tuned, ...]
    private: np.ndarray
    ceiling: np.ndarray
    noise_multiplier: np.ndarray

    @property
    def budget(self) -> int:
        """Number of steps of every run."""
        return self.private.shape[-1] - 1

    @property
    def ratios(self) -> dict[str, Ratio]:
        """Ratios of steps to ``SHARE`` of the gain: see :func:`ratios`."""
        return ratios(self)


def settings(config: Config) -> list[Setting]:
    """List all settings: settings with noise, and noise-free settings, which have no epsilon."""
    places = [(part, size) for part in config.parts for size in config.batch_sizes]
    return [
        *(
            Setting(*place, arm, epsilon)
            for place in places
            for epsilon in config.epsilons
            for arm in BASELINES
        ),
        *(Setting(*place, arm) for place in places for arm in CEILINGS),
    ]


def setting_config(
    config: Config, setting: Setting, learning_rate: float, seed: int, holdout: int = 0
) -> TrainConfig:
    """Return the configuration of one run of a setting; ``holdout`` > 0 is for tuning."""
    base = replace(config.base, batch_size=setting.batch_size, **PARTS[setting.part])
    if setting.epsilon is not None:
        base = replace(base, epsilon=setting.epsilon)
    return arm_config(base, setting.arm, learning_rate, seed, holdout)


def plan(config: Config) -> str:
    """Describe the work of :func:`run`, with the hours on this machine, from measured steps.

    Raises ValueError for a config that cannot be run.
    """
    check(config)
    number = len(config.epsilons) * len(BASELINES) + len(CEILINGS)
    runs = tuning.TYPICAL_RATES * len(config.tuning_seeds) + config.num_seeds
    hours, words = 0.0, []
    workers = workers_of(config.num_workers, config.base.device)
    places = [(part, size) for part in config.parts for size in config.batch_sizes]
    for part, size in progress(places, "measuring a step of each setting"):
        setting = Setting(part, size, BASELINES[0], config.epsilons[0])
        one = setting_config(config, setting, 1e-6, 0)
        cost = measure_cost(one, FOLDER, config.num_workers)
        reported = number * config.num_seeds
        needed = cost.hours(number * runs, config.base.steps, reported) / workers
        hours += needed
        words.append(
            f"{part}, B = {size}: {cost.step:.2f} s a step, {cost.evaluation:.2f} s an evaluation, "
            f"{needed:.1f} hours"
        )
    return (
        f"{len(settings(config))} settings of about {runs} runs of {config.base.steps} steps each, "
        f"about {hours:.1f} hours here with {workers} runs at a time "
        f"({'; '.join(words)}); finished runs are not repeated"
    )


def check(config: Config) -> None:
    """Raise ValueError for a config that cannot be run."""
    for part in config.parts:
        _validate.choice("part", part, PARTS)
    check_runs(config.base, config)
    check_texts(config.base)


def run(config: Config, folder: str | Path = FOLDER) -> Result:
    """Tune and train every setting; a run that is finished in ``folder`` is not repeated.

    Raises ValueError for a config that cannot be run, or if every run failed.
    """
    check(config)
    by_name = {setting.name: setting for setting in settings(config)}

    def config_of(name: str, learning_rate: float, seed: int, holdout: int = 0) -> TrainConfig:
        return setting_config(config, by_name[name], learning_rate, seed, holdout)

    tuned, failures = tuning.tune_by_sweep(
        {name: ARMS[setting.arm].start for name, setting in by_name.items()},
        partial(config_of, holdout=config.tuning_holdout),
        config.tuning_seeds,
        config.score,
        folder,
        config.num_workers,
    )
    failures += [found.failure for found in tuned.values() if found.failure]
    wanted = wanted_runs(tuned, config.num_seeds, config_of)
    outcomes = tuning.train_all(wanted, folder, config.num_workers)
    return _collect(config, tuned, failures, outcomes)


def _collect(
    config: Config,
    tuned: dict[str, tuning.Tuned],
    failures: list[str],
    outcomes: dict[tuple[str, int], Outcome],
) -> Result:
    done = [o.result for o in outcomes.values() if o.result is not None]
    failures += [tuning.describe_failure(name, o) for (name, _), o in outcomes.items() if o.error]
    if not done:
        raise ValueError(f"every run failed: {failures[0]}")
    scores = tuning.stack(outcomes, [*tuned], config.num_seeds, config.base.steps, config.score)
    shape = (len(config.parts), len(config.batch_sizes))
    split = int(np.prod(shape)) * len(config.epsilons) * len(BASELINES)
    return Result(
        config=config,
        privacy=f"{NON_PRIVATE}: the noise-free runs; the others are (epsilon, "
        f"{rounded_up(done[0].delta, 6)})-DP at the epsilon of their setting, with seeded noise",
        description=f"{done[0].description}; {scored_on(config.base)}",
        criterion=tuning.criterion(config.score),
        failures=tuple(failures),
        tuned=tuple(tuned.values()),
        private=scores[:split].reshape(
            *shape, len(config.epsilons), len(BASELINES), *scores.shape[1:]
        ),
        ceiling=scores[split:].reshape(*shape, len(CEILINGS), *scores.shape[1:]),
        noise_multiplier=_noise_multipliers(config, outcomes),
    )


def _noise_multipliers(config: Config, outcomes: Mapping[tuple[str, int], Outcome]) -> np.ndarray:
    """Return the noise multipliers (batch sizes, epsilons); NaN without a finished run."""
    found = np.full((len(config.batch_sizes), len(config.epsilons)), np.nan)
    for outcome in outcomes.values():
        run = outcome.config
        if outcome.result is not None and run.epsilon is not None:
            place = config.batch_sizes.index(run.batch_size), config.epsilons.index(run.epsilon)
            found[place] = outcome.result.noise_multiplier
    return found


def steps_to(result: Result, share: float = SHARE) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps to a share of the weaker DP optimizer's gain, with and without noise.

    Both arrays are (parts, batch sizes, epsilons, optimizers, seeds). Infinity stands for a run
    that does not reach the target, and NaN for a run that stopped or does not exist, and for every
    run if there is no target. The target depends on epsilon, also for the noise-free runs.
    """
    higher = HIGHER_IS_BETTER[result.config.score]
    private, ceiling = (np.full(result.private.shape[:-1], np.inf) for _ in range(2))
    for place in np.ndindex(*result.private.shape[:3]):
        score = target(result, place, share)
        private[place] = protocol.steps_to(result.private[place], score, higher_is_better=higher)
        ceiling[place] = protocol.steps_to(
            result.ceiling[place[:2]], score, higher_is_better=higher
        )
    return private, ceiling


def target(result: Result, place: tuple[int, ...], share: float = SHARE) -> float:
    """Return the score at a share of the weaker DP optimizer's gain; NaN if there is no gain."""
    return protocol.target_score(
        result.private[place], share, higher_is_better=HIGHER_IS_BETTER[result.config.score]
    )


@dataclass(frozen=True)
class Ratio:
    """Ratios of mean numbers of steps over seeds; a censored run makes a ratio a bound.

    A run is censored if the run does not reach the target. ``value`` is NaN if numerator and
    denominator are censored, if a baseline gained nothing, or if a run stopped or does not exist.
    ``is_lower_bound`` marks values with a censored numerator, and ``is_upper_bound`` values with a
    censored denominator.
    """

    value: np.ndarray
    is_lower_bound: np.ndarray
    is_upper_bound: np.ndarray

    def text(self, place: tuple[int, ...]) -> str:
        """Format one ratio, with ≥ or ≤ for a bound."""
        if np.isnan(self.value[place]):
            return "?"
        sign = "≥ " if self.is_lower_bound[place] else "≤ " if self.is_upper_bound[place] else ""
        return f"{sign}{self.value[place]:.2f}"


def ratio(above: np.ndarray, below: np.ndarray, budget: int) -> Ratio:
    """Return the ratio of mean steps (...); the arguments are numbers of :func:`steps_to`."""
    lower, upper = np.isinf(above).any(axis=-1), np.isinf(below).any(axis=-1)
    means = [protocol.censored(steps, budget).mean(axis=-1) for steps in (above, below)]
    return Ratio(np.where(lower & upper, np.nan, means[0] / means[1]), lower, upper)


def ratios(result: Result, share: float = SHARE) -> dict[str, Ratio]:
    """Return name -> ratio of steps, each of shape (parts, batch sizes, epsilons)."""
    private, ceiling = steps_to(result, share)
    sgd, adam = (BASELINES.index(name) for name in ("DP-SGD", "DP-Adam"))
    cost = partial(ratio, budget=result.budget)
    found = {
        f"noise, {name}": cost(private[..., i, :], ceiling[..., i, :])
        for i, name in enumerate(CEILING_OF)
    }
    found["lost adaptivity"] = cost(ceiling[..., sgd, :], ceiling[..., adam, :])
    found["gap"] = cost(_faster(private, result.budget), _faster(ceiling, result.budget))
    return found


def _faster(steps: np.ndarray, budget: int) -> np.ndarray:
    """Return the steps of the optimizer with the lower mean over seeds: (..., seeds)."""
    best = protocol.censored(steps, budget).mean(axis=-1).argmin(axis=-1)
    return np.take_along_axis(steps, best[..., None, None], axis=-2)[..., 0, :]


def places(result: Result) -> Iterator[tuple[tuple[int, int, int], str]]:
    """Yield the index (part, batch size, epsilon) of every cell, and its setting in words."""
    config = result.config
    for place in np.ndindex(*result.private.shape[:3]):
        part, size, epsilon = place
        yield (
            (part, size, epsilon),
            (
                f"{config.parts[part]}, B = {config.batch_sizes[size]}, "
                f"epsilon {config.epsilons[epsilon]:g}"
            ),
        )


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate each setting: noise multiplier, steps by optimizer, and the ratios."""
    found, (private, ceiling) = ratios(result), steps_to(result)
    columns = [
        "setting",
        "noise multiplier",
        *(f"steps to {SHARE:.0%}, {name}" for name in (*BASELINES, *CEILINGS)),
        *(f"final {result.config.score}, {name}" for name in (*BASELINES, *CEILINGS)),
        *(f"steps, ratio: {name}" for name in found),
    ]
    rows = []
    for place, words in places(result):
        scores = [*result.private[place], *result.ceiling[place[:2]]]
        steps = [*private[place], *ceiling[place]]
        rows.append(
            [
                words,
                f"{result.noise_multiplier[place[1:]]:.3g}",
                *(protocol.by_seed(seeds, target(result, place)) for seeds in steps),
                *(protocol.unless_stopped(curves[:, -1], _mean) for curves in scores),
                *(cost.text(place) for cost in found.values()),
            ]
        )
    return columns, rows


def headline(result: Result) -> Mapping[str, str]:
    """Summarise the figure: the ratios of each setting, and the settings with a large gap."""
    found = ratios(result)
    lines = {
        f"steps, ratio, {words}": ", ".join(f"{name} {r.text(place)}" for name, r in found.items())
        for place, words in places(result)
    }
    gap = found["gap"]
    wide = [p for p, _ in places(result) if gap.value[p] >= WORTH and not gap.is_upper_bound[p]]
    narrow = [p for p, _ in places(result) if gap.value[p] < WORTH and not gap.is_lower_bound[p]]
    for name, chosen in (
        (f"gap of {WORTH:g} or more (NON-PRIVATE)", wide),
        ("gap not known", [p for p, _ in places(result) if p not in (*wide, *narrow)]),
    ):
        lines[name] = "; ".join(words for p, words in places(result) if p in chosen) or "none"
    lines["learning rates chosen by"] = result.criterion
    if missing := [found.arm for found in result.tuned if found.chosen is None]:
        lines["no learning rate inside its grid"] = "; ".join(missing)
    return lines


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.3f}"
