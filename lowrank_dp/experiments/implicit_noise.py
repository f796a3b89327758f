"""Claim: LoRA's implicit noise protects against membership inference (arXiv 2409.17538, version 7).

With a frozen Gaussian A, scaling 1 and SGD, LoRA is exactly full fine-tuning of the same matrices
in which ``G A^T A = G + noise`` replaces the gradient G, with the same A in every step. Momentum
does not change this, because momentum is linear in the gradients. Two controls are full fine-tuning
with fresh noise in each step: the exact noise of a new A, and Gaussian noise of the same variance.
If the noise protects, the controls leak less than full fine-tuning at equal training loss and at
equal held-out loss. Each arm and rank has its own learning rate, which is chosen with another seed,
so that the rank is not confounded with the step size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_dp import _validate
from lowrank_dp._terminal import progress
from lowrank_dp.experiments import implicit_noise_runs as runs
from lowrank_dp.experiments import tuning
from lowrank_dp.experiments.implicit_noise_configs import (
    DROPOUT,
    FAMILIES,
    SMALL,
    SST2,
    Config,
    arm_config,
    arms,
)
from lowrank_dp.experiments.intervals import mean_and_interval, reached_with_interval
from lowrank_dp.experiments.matched import at_level, common_level
from lowrank_dp.mia.rendering import LABEL
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.guards import Diverged

__all__ = [
    "CAPTION", "FAMILIES", "SMALL", "SST2", "Config", "Result", "headline", "plan", "run", "table",
]  # fmt: skip
FOLDER = Path("runs") / "implicit_noise"
CAPTION = (
    "Membership inference after SGD on the same matrices, records and coins, mean over "
    "seeds with 95% t-intervals: full fine-tuning (band), LoRA, LoRA with a frozen A, and full "
    "fine-tuning with the noise of such a projection drawn anew in each step, exactly (fresh A) "
    "or as Gaussian noise of the same variance. Each arm and rank has its own learning rate, "
    "tuned on another seed. (a) AUC after the last step against rank. (b) AUC where the "
    "training loss first falls to one level. (c) The same for the held-out loss. (d) AUC "
    "against the training loss over the run. The attack is the loss before fine-tuning minus "
    "the loss. NON-PRIVATE: computed from membership bits."
)


@dataclass(frozen=True)
class Result:
    """Losses and attack results of every arm. NON-PRIVATE.

    ``auc``, ``tpr`` (at 1% FPR), ``train_loss``, ``held_out_loss`` and ``accuracy`` are (arms,
    seeds, steps + 1): before training, and after each number of steps. NaN stands for a run that
    stopped. ``tuned`` holds the grid of learning rates of each arm without dropout; an arm with
    dropout has the rate of the same arm without dropout. ``failures`` lists the runs that stopped
    and the arms without a learning rate. The attack with shadow models was made on ``shadow_arms``
    after ``shadow_steps`` (arms,) steps, at which the training losses of the arms are nearest to
    each other. The results of this attack are (arms, seeds): ``lira``, ``lira_base`` (the attack
    without shadow models) and ``lira_train_loss``. ``shift`` lists the verdicts of this attack on
    distribution shift, except "ok".
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    criterion: str
    arms: tuple[str, ...]
    tuned: tuple[tuning.Tuned, ...]
    failures: tuple[str, ...]
    shift: tuple[str, ...]
    auc: np.ndarray
    tpr: np.ndarray
    train_loss: np.ndarray
    held_out_loss: np.ndarray
    accuracy: np.ndarray
    shadow_arms: tuple[str, ...]
    shadow_steps: np.ndarray
    lira: np.ndarray
    lira_base: np.ndarray
    lira_train_loss: np.ndarray

    @property
    def train_level(self) -> float:
        """Training loss, in nats, at which arms are compared."""
        return common_level(self.train_loss, self.config.train_levels)

    @property
    def held_out_level(self) -> float:
        """Held-out loss, in nats, at which arms are compared."""
        return common_level(self.held_out_loss, self.config.held_out_levels)

    @property
    def readings(self) -> dict[str, np.ndarray]:
        """AUC (arms, seeds) after the last step, and where each loss first falls to its level."""
        return {
            f"{self.config.steps[-1]} steps": self.auc[..., -1],
            f"train loss {self.train_level:g}": at_level(
                self.train_loss, self.auc, self.train_level
            ),
            f"held-out loss {self.held_out_level:g}": at_level(
                self.held_out_loss, self.auc, self.held_out_level
            ),
        }

    def rate(self, arm: str) -> float | None:
        """Return the chosen learning rate of an arm, or None."""
        name = arm.removesuffix(DROPOUT)
        return next(tuned.chosen for tuned in self.tuned if tuned.arm == name)

    def band(self, values: np.ndarray, arm: str) -> tuple[float, float]:
        """Return the mean of ``values`` (arms, seeds) over seeds, and its interval's half-width."""
        mean, half = mean_and_interval(values[self.arms.index(arm)])
        return float(mean), float(half)


def plan(config: Config) -> str:
    """Describe the work of :func:`run`: numbers of runs, steps and attacks."""
    names = arms(config)
    tuned = sum(not name.endswith(DROPOUT) for name in names)
    reported = len(names) * config.num_seeds
    trials = tuned * tuning.TYPICAL_RATES
    text = (
        f"{tuned} arms are tuned by about {trials} runs of {config.tuning_steps} steps with seed "
        f"{config.tuning_seed}; {len(names)} arms x {config.num_seeds} seeds: {reported} runs of "
        f"{config.steps[-1]} steps, each attacked after {len(config.steps)} numbers of steps"
    )
    if config.num_shadows:
        count = len(_shadow_arms(config))
        text += (
            f"; {count} arms x ({config.num_seeds} targets + {config.num_shadows} shadows): "
            f"{count * (config.num_seeds + config.num_shadows)} runs of at most "
            f"{config.steps[-1]} steps"
        )
    return f"{text}; one run at a time; finished runs are not repeated"


def run(config: Config, folder: str | Path = FOLDER) -> Result:
    """Tune, train and attack every arm; a run that is finished in ``folder`` is not repeated.

    Raises ValueError for a config that cannot be run, or if full fine-tuning has no learning rate.
    """
    _check(config)
    folder = Path(folder)
    tuned, failures = _tune(config, folder / "tuning")
    rates = {arm: one.chosen for arm, one in tuned.items()}
    if rates["full"] is None:
        raise ValueError(f"full fine-tuning has no learning rate: {tuned['full'].failure}")
    failures += [one.failure for one in tuned.values() if one.failure]
    table = arms(config)
    jobs = [(arm, seed) for arm in table for seed in range(config.num_seeds)]
    measured: dict[tuple[str, int], runs.Curves] = {}
    description = ""
    for arm, seed in progress(jobs, "runs of the implicit noise"):
        rate = rates[arm.removesuffix(DROPOUT)]
        if rate is None:
            continue
        one = arm_config(config, table[arm], rate, seed, config.steps[-1])
        try:
            runs.train_observed(one, config.steps, folder)
        except Diverged as error:
            failures.append(f"{arm}, learning rate {rate:g}, seed {seed}: {error}")
            continue
        found = runs.observed(one, config.steps, folder)
        measured[arm, seed] = runs.curves(found)
        description = description or found[0].description

    stopped = np.full(len(config.steps) + 1, np.nan)

    def column(name: str) -> np.ndarray:
        rows = [getattr(measured[job], name) if job in measured else stopped for job in jobs]
        return np.array(rows).reshape(len(table), config.num_seeds, -1)

    train_loss = column("train_loss")
    level = common_level(train_loss, config.train_levels)
    shadows = _attack_with_shadows(config, rates, train_loss, level, folder)
    return Result(
        config=config,
        privacy=LABEL,
        description=description,
        criterion=f"lowest loss on held-out training examples after {config.tuning_steps} steps, "
        f"seed {config.tuning_seed}",
        arms=tuple(table),
        tuned=tuple(tuned.values()),
        failures=tuple(failures),
        shift=tuple(dict.fromkeys(one.shift for row in shadows.values() for one in row[1])),
        auc=column("auc"),
        tpr=column("tpr"),
        train_loss=train_loss,
        held_out_loss=column("held_out_loss"),
        accuracy=column("accuracy"),
        shadow_arms=tuple(shadows),
        shadow_steps=np.array([steps for steps, _ in shadows.values()], dtype=int),
        lira=_shadow_column(shadows, "lira", config),
        lira_base=_shadow_column(shadows, "base", config),
        lira_train_loss=_shadow_column(shadows, "train_loss", config),
    )


def _check(config: Config) -> None:
    _validate.integer("num_seeds", config.num_seeds, low=2)
    if config.tuning_seed < config.num_seeds:
        raise ValueError(f"tuning_seed must not be one of the {config.num_seeds} reported seeds")
    if config.base.optimizer != "sgd" or config.base.schedule != "constant":
        raise ValueError(
            "base must train by SGD at a constant learning rate, got optimizer "
            f"{config.base.optimizer!r} and schedule {config.base.schedule!r}"
        )
    if wrong := [step for step in config.steps if step % config.base.eval_every]:
        raise ValueError(
            f"steps must be multiples of eval_every {config.base.eval_every}, got {wrong[0]}"
        )


def _tune(config: Config, folder: Path) -> tuple[dict[str, tuning.Tuned], list[str]]:
    table = {arm: changes for arm, changes in arms(config).items() if not arm.endswith(DROPOUT)}
    steps, holdout = config.tuning_steps, config.tuning_holdout

    def config_of(arm: str, rate: float, seed: int) -> TrainConfig:
        one = arm_config(config, table[arm], rate, seed, steps)
        return replace(one, holdout=holdout, eval_every=steps)

    starts = dict.fromkeys(table, config.start)
    seeds = (config.tuning_seed,)
    return tuning.tune_by_sweep(starts, config_of, seeds, "loss", folder, 1, engine="sequential")


def _shadow_arms(config: Config) -> tuple[str, ...]:
    """Return the arms that are attacked with shadow models: full, Gaussian noise, frozen A."""
    rank, known = config.main_rank, arms(config)
    names = ("full", f"Gaussian noise r={rank}", f"frozen A r={rank}")
    return tuple(name for name in names if name in known)


def _attack_with_shadows(
    config: Config,
    rates: Mapping[str, float | None],
    train_loss: np.ndarray,
    level: float,
    folder: Path,
) -> dict[str, tuple[int, list[runs.ShadowAttack]]]:
    """Attack each arm after the number of steps whose mean training loss is nearest the level."""
    table = arms(config)
    chosen = _shadow_arms(config) if config.num_shadows else ()
    found = {}
    for arm in chosen:
        rate, mean = rates[arm], train_loss[list(table).index(arm), :, 1:].mean(axis=0)
        if rate is None or not np.isfinite(mean).all():
            continue
        steps = config.steps[int(np.abs(mean - level).argmin())]
        found[arm] = (
            steps,
            [
                runs.attack_with_shadows(
                    arm_config(config, table[arm], rate, seed, steps), config.num_shadows, folder
                )
                for seed in range(config.num_seeds)
            ],
        )
    return found


def _shadow_column(
    shadows: Mapping[str, tuple[int, list[runs.ShadowAttack]]], name: str, config: Config
) -> np.ndarray:
    rows = [[getattr(one, name) for one in row] for _, row in shadows.values()]
    return np.array(rows, dtype=float).reshape(len(rows), config.num_seeds)


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate each arm: losses after the last step, AUC at equal steps and at equal losses.

    Differences from full fine-tuning are taken within seeds, whose records and membership bits
    are the same.
    """
    columns = ["arm", "learning rate", "train loss", "held-out loss", "held-out accuracy", "TPR@1%"]
    for name in result.readings:
        columns += [f"AUC at {name}", "less full's"]
    columns += ["LiRA: AUC", "less full's", "steps", "train loss there"]
    rows = []
    for i, arm in enumerate(result.arms):
        rate = result.rate(arm)
        row = [arm, "none" if rate is None else f"{rate:g}"]
        for values in (result.train_loss, result.held_out_loss, result.accuracy):
            row.append(reached_with_interval(values[i, :, -1]))
        row.append(
            "" if np.isnan(result.tpr[i]).any() else reached_with_interval(result.tpr[i, :, -1])
        )
        for values in result.readings.values():
            row += [
                reached_with_interval(values[i]),
                reached_with_interval(values[i] - values[0]) if i else "",
            ]
        rows.append(row + _shadow_cells(result, arm))
    return columns, rows


def _shadow_cells(result: Result, arm: str) -> list[str]:
    if arm not in result.shadow_arms:
        return [""] * 4
    i = result.shadow_arms.index(arm)
    return [
        reached_with_interval(result.lira[i]),
        reached_with_interval(result.lira[i] - result.lira[0])
        if i and result.shadow_arms[0] == "full"
        else "",
        str(result.shadow_steps[i]),
        reached_with_interval(result.lira_train_loss[i]),
    ]


def headline(result: Result) -> Mapping[str, str]:
    """Summarise AUC differences: each arm and full fine-tuning; by rank, frozen A and noise."""
    lines = {}
    for name, values in result.readings.items():
        for i, arm in enumerate(result.arms[1:], start=1):
            lines[f"AUC at {name}, {arm} less full"] = reached_with_interval(values[i] - values[0])
        for rank in result.config.ranks:
            frozen, *controls = (
                values[result.arms.index(f"{family} r={rank}")] for family in FAMILIES[1:]
            )
            for family, control in zip(FAMILIES[2:], controls, strict=True):
                lines[f"AUC at {name}, rank {rank}: frozen A less {family}"] = (
                    reached_with_interval(frozen - control)
                )
    for arm in result.shadow_arms:
        cells = _shadow_cells(result, arm)
        lines[f"LiRA with {result.config.num_shadows} shadows, {arm}, {cells[2]} steps"] = (
            f"AUC {cells[0]} at train loss {cells[3]}"
            + (f"; less full {cells[1]}" if cells[1] else "")
        )
    return lines
