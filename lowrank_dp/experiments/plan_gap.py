"""Claim: a plan predicts the gap in steps of a private run, before any privacy is spent.

The plan of :mod:`lowrank_dp.plan` trains for a few steps on public text, with the noise of the
private run and without noise. The predicted ratio of steps is compared with the ratio that
:mod:`lowrank_dp.experiments.gap` measures on the task. A plan from the task's own records, which is
NON-PRIVATE, separates the error of the short trainings from the error of the public text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lowrank_dp import _validate
from lowrank_dp._terminal import progress
from lowrank_dp.experiments import gap, gap_configs
from lowrank_dp.mechanism import NON_PRIVATE
from lowrank_dp.plan import make_plan
from lowrank_dp.plan.request import Measurement
from lowrank_dp.train import TrainConfig

TOLERANCE = 0.3  # largest relative error of a ratio that counts as predicted
OWN = "the task's own records (NON-PRIVATE)"
CAPTION = (
    "Steps of DP-Adam per step of noise-free Adam to 90% of the gain: predicted by python -m "
    "lowrank_dp.plan against measured, one point per setting and seed of the plan. Short trainings "
    "on public text, which spend no privacy, and on the task's own records. The band is a relative "
    "error of 30%. An arrow marks a measured ratio that is a bound. NON-PRIVATE: the measured "
    "ratios and the plans from own records."
)


@dataclass(frozen=True)
class Config:
    """Settings and texts of the comparison.

    Attributes:
        gaps: configs of the gap experiments whose settings are predicted. Finished runs are not
            repeated.
        public: names of public texts; "" is generated text.
        own_records: whether to make plans from the task's own records, too. NON-PRIVATE.
        seeds: seeds of the plans.
        trial_steps: number of steps of each short training, >= 1.
    """

    gaps: tuple[gap_configs.Config, ...]
    public: tuple[str, ...] = ("",)
    own_records: bool = True
    seeds: tuple[int, ...] = (0,)
    trial_steps: int = 24


# four settings with which the lengths of the trainings were chosen, and two later settings
FULL = Config((gap_configs.SST2, gap_configs.SST2_LARGE_BATCH_EPS8, gap_configs.E2E))
# settings that were measured after the plan was fixed, except for epsilon 8, which FULL has too
LARGE_BATCH = Config((gap_configs.SST2_LARGE_BATCH,))
# trial of a few minutes on generated text, with a model that needs no download
SMALL = Config(
    (replace(gap_configs.SMALL, epsilons=(8.0,)),), own_records=False, seeds=(0,), trial_steps=8
)


@dataclass(frozen=True)
class Result:
    """Predicted and measured ratios of steps.

    ``predicted`` is (texts, settings, seeds), NaN where a plan predicts no ratio; ``measured``,
    ``is_lower_bound`` and ``is_upper_bound`` are (settings,).
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    texts: tuple[str, ...]
    settings: tuple[str, ...]
    predicted: np.ndarray
    measured: np.ndarray
    is_lower_bound: np.ndarray
    is_upper_bound: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """Relative errors (texts, settings, seeds): predicted / measured - 1.

        NaN stands for a plan without a ratio, and for a measured ratio that is only a bound.
        """
        measured = np.where(self.is_lower_bound | self.is_upper_bound, np.nan, self.measured)
        return self.predicted / measured[:, None] - 1

    @property
    def tolerance(self) -> float:
        """Largest relative error of a ratio that counts as predicted."""
        return TOLERANCE


def plan(config: Config) -> str:
    """Describe the work of :func:`run`; raise ValueError for a config that cannot be run."""
    check(config)
    plans = (len(config.public) + config.own_records) * len(config.seeds)
    gaps = "; ".join(map(gap.plan, config.gaps))
    return f"{gaps}; then {plans} plans of each setting for DP-Adam"


def check(config: Config) -> None:
    """Raise ValueError if ``trial_steps`` is 0, or for a gap that cannot be measured."""
    _validate.integer("trial_steps", config.trial_steps)
    for one in config.gaps:
        gap.check(one)


def run(config: Config) -> Result:
    """Measure the gaps, or read them from finished runs, and predict each gap by plans.

    Raises ValueError as :func:`check` does, if no setting has a measured ratio, and as
    :func:`lowrank_dp.experiments.gap.run` and :func:`lowrank_dp.plan.make_plan` do.
    """
    check(config)
    return compare(config, [gap.run(one) for one in config.gaps])


def compare(config: Config, measured: Sequence[gap.Result]) -> Result:
    """Predict every setting of the measured gaps."""
    settings = [found for one in measured for found in gap_settings(one)]
    if not settings:
        raise ValueError("no setting of the gap has a measured ratio of steps")
    texts = [Measurement(public=name, trial_steps=config.trial_steps) for name in config.public]
    if config.own_records:
        texts.append(Measurement(own_records=True, trial_steps=config.trial_steps))
    predicted = np.full((len(texts), len(settings), len(config.seeds)), np.nan)
    for i, j, k in progress([*np.ndindex(predicted.shape)], "plans"):
        found = make_plan(replace(settings[j].run, seed=config.seeds[k]), texts[i]).gap
        if found is not None and found.ratio is not None:
            predicted[i, j, k] = found.ratio
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        description="; ".join(dict.fromkeys(one.description for one in measured)),
        texts=(
            *(f"public {name or 'generated text'}" for name in config.public),
            *([OWN] if config.own_records else []),
        ),
        settings=tuple(one.name for one in settings),
        predicted=predicted,
        measured=np.array([one.measured for one in settings]),
        is_lower_bound=np.array([one.is_lower_bound for one in settings]),
        is_upper_bound=np.array([one.is_upper_bound for one in settings]),
    )


@dataclass(frozen=True)
class Measured:
    """Setting for DP-Adam: name, configuration of the run, and measured ratio of steps."""

    name: str
    run: TrainConfig
    measured: float
    is_lower_bound: bool
    is_upper_bound: bool


def gap_settings(result: gap.Result) -> list[Measured]:
    """Return the settings of a measured gap in which DP-Adam has a ratio of steps."""
    ratio, config, found = gap.ratios(result)["noise, DP-Adam"], result.config, []
    for place, words in gap.places(result):
        part, size, epsilon = place
        setting = gap.Setting(
            config.parts[part], config.batch_sizes[size], "DP-Adam", config.epsilons[epsilon]
        )
        if np.isfinite(ratio.value[place]):
            found.append(
                Measured(
                    name=f"{config.base.task}, {words}",
                    run=gap.setting_config(config, setting, 1e-3, 0),
                    measured=float(ratio.value[place]),
                    is_lower_bound=bool(ratio.is_lower_bound[place]),
                    is_upper_bound=bool(ratio.is_upper_bound[place]),
                )
            )
    return found


def headline(result: Result) -> Mapping[str, str]:
    """Summarise the number of settings that are predicted within the tolerance, by text."""
    is_bound = result.is_lower_bound | result.is_upper_bound
    lines = {}
    for i, text in enumerate(result.texts):
        errors = result.errors[i, ~is_bound]
        missing = int(np.isnan(errors).sum())
        mean = "none" if missing == errors.size else f"{np.nanmean(errors):+.0%}"
        lines[f"predictions within {TOLERANCE:.0%}, {text}"] = (
            f"{int((np.abs(errors) <= TOLERANCE).sum())} of {errors.size}"
            + (f", {missing} without a ratio" if missing else "")
            + f"; mean relative error {mean}"
        )
    if is_bound.any():
        lines["settings left out, since the measured ratio is only a bound"] = "; ".join(
            name for name, left_out in zip(result.settings, is_bound, strict=True) if left_out
        )
    return lines


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate measured and predicted ratios, one row per setting."""
    columns = ["setting", "measured (NON-PRIVATE)", *(f"predicted, {t}" for t in result.texts)]
    rows = []
    for j, setting in enumerate(result.settings):
        sign = "≥ " if result.is_lower_bound[j] else "≤ " if result.is_upper_bound[j] else ""
        cells = [setting, f"{sign}{result.measured[j]:.2f}"]
        for text in result.predicted:
            cells.append(", ".join("none" if np.isnan(r) else f"{r:.2f}" for r in text[j]))
        rows.append(cells)
    return columns, rows
