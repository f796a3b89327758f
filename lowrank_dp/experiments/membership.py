"""Claim: LoRA resists membership inference, more so at a smaller rank (arXiv 2409.17538).

All methods fine-tune on the same records with the same membership bits, for several numbers of
steps, and are attacked by one attack that is named beforehand. A method that learns less leaks
less, so AUCs are compared at equal steps, at matched training loss and at matched utility. The
variance of the projection noise, on which the claim rests, is shown beside the AUCs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowrank_dp import _validate, engines
from lowrank_dp._rounding import rounded_up
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.intervals import mean_and_interval, reached_with_interval
from lowrank_dp.experiments.membership_configs import Config, arms
from lowrank_dp.mia.attack import Options, attack, open_target
from lowrank_dp.mia.compare import utility_metric
from lowrank_dp.mia.rendering import LABEL
from lowrank_dp.sweep import run_folder, sweep
from lowrank_dp.theory import noise_variance
from lowrank_dp.train import TrainConfig

CAPTION = (
    "Membership inference on one task and pool of records, mean over seeds (each with its own "
    "coins) with 95% t-intervals. (a) AUC of the primary attack at the largest number of steps "
    "against rank, beside full fine-tuning (where it was run, with DP too), and the projection "
    "noise's variance per coordinate (dashed, right axis). (b) Its TPR at 1% FPR; dotted, chance. "
    "(c) AUC against the training loss, a point for each number of steps: at one loss, methods can "
    "be compared. (d) Against held-out utility. "
    "NON-PRIVATE: computed from membership bits."
)


@dataclass(frozen=True)
class Result:
    """Attack results of every arm, seed and number of steps.

    ``auc`` and ``tpr`` (at 1% FPR) of the primary attack, ``train_loss``, ``utility`` and
    ``untuned`` are (arms, seeds, steps); ``untuned`` is the AUC on the model before fine-tuning, a
    check for distribution shift. ``epsilon`` (arms,) is the accountant's, infinite without
    privacy. ``noise_variance`` (ranks,) is in units of |q|^2.
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    arms: tuple[str, ...]
    utility_name: str
    shift: tuple[str, ...]  # verdicts other than "ok", with their runs
    epsilon: np.ndarray
    auc: np.ndarray
    tpr: np.ndarray
    train_loss: np.ndarray
    utility: np.ndarray
    untuned: np.ndarray
    noise_variance: np.ndarray

    def band(self, values: np.ndarray, arm: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean over seeds per number of steps, and the half-width of its t-interval."""
        return mean_and_interval(values[arm])

    def at(self, by: str) -> np.ndarray:
        """Return the AUC (arms, seeds) at one value of "train_loss" or "utility": `at_matched`."""
        return at_matched(self, by)


def run(config: Config, folder: str | Path = Path("runs") / "membership") -> Result:
    """Train and attack every arm; a run that is finished in ``folder`` is not repeated.

    Raises ValueError for fewer than 2 seeds, or if a run failed.
    """
    table = arms(config.ranks, config.frozen_ranks, config.with_dp)
    _validate.integer("num_seeds", config.num_seeds, low=2)
    configs = [
        _arm_config(config, changes, steps, seed)
        for changes in table.values()
        for seed in range(config.num_seeds)
        for steps in config.steps
    ]
    outcomes = sweep(configs, folder, num_workers=config.num_workers, keep_model=True)
    if failed := [outcome.error for outcome in outcomes if outcome.result is None]:
        raise ValueError(f"{len(failed)} of {len(outcomes)} runs failed: {failed[0]}")
    options = Options(
        attacks=(config.attack,),
        primary=config.attack,
        seed=config.base.data_seed,
        device=config.base.device,
        batch_size=config.base.micro_batch_size,
        precision=config.base.precision,
    )
    workers = engines.workers_of(config.num_workers, config.base.device)
    attacked = _attack_runs(configs, folder, options, workers)
    shape = len(table), config.num_seeds, len(config.steps)

    def column(name: str) -> np.ndarray:
        return np.array([getattr(run, name) for run in attacked]).reshape(shape)

    claimed = [outcome.result.epsilon for outcome in outcomes if outcome.result is not None]
    per_arm = np.array([np.inf if value is None else value for value in claimed])
    width = _width(config)
    return Result(
        config=config,
        privacy=LABEL,
        description=attacked[-1].description,
        arms=tuple(table),
        utility_name=attacked[-1].utility_name,
        shift=tuple(run.shift for run in attacked if run.shift),
        epsilon=per_arm.reshape(shape)[:, 0, -1],
        auc=column("auc"),
        tpr=column("tpr"),
        train_loss=column("train_loss"),
        utility=column("utility"),
        untuned=column("untuned"),
        noise_variance=np.array([noise_variance(rank, width) for rank in config.ranks]),
    )


@dataclass(frozen=True)
class _AttackedRun:
    auc: float
    tpr: float
    train_loss: float
    utility: float
    untuned: float
    utility_name: str
    description: str
    shift: str  # a verdict other than "ok", with its run; else ""


def _attack_runs(
    configs: list[TrainConfig], folder: str | Path, options: Options, workers: int
) -> list[_AttackedRun]:
    """Attack all runs, ``workers`` at a time, each with its share of the CPU's cores."""
    job = partial(_attack_alone, folder=folder, options=options, workers=workers)
    engine = "loky" if workers > 1 else "sequential"
    results = engines.run(job, configs, engine, workers)
    done = dict(progress(results, "attacks", total=len(configs)))
    attacked = [done[i] for i in range(len(configs))]
    if None in attacked:
        raise ValueError("an attack's process died (out of memory?): repeat it with fewer workers")
    return [run for run in attacked if run is not None]


def _attack_alone(
    config: TrainConfig, folder: str | Path, options: Options, workers: int
) -> _AttackedRun:
    if workers > 1:
        torch.set_num_threads(engines.threads_of(workers))
    return _attack_run(config, folder, options)


def _attack_run(config: TrainConfig, folder: str | Path, options: Options) -> _AttackedRun:
    target = open_target(run_folder(config, folder), options)
    found = attack(target, options, Path(folder) / "cache")
    best = next(one for one in found.attacks if one.name == options.primary)
    rate, utility_name = best.tpr["0.01"], utility_metric(target)
    return _AttackedRun(
        auc=best.auc.value,
        tpr=np.nan if rate is None else rate.tpr,
        train_loss=target.trained.train_loss,
        utility=target.trained.curve[-1][utility_name],
        untuned=np.nan if found.base is None else found.base.value,
        utility_name=utility_name,
        description=target.trained.description,
        shift=""
        if found.shift == "ok"
        else f"{config.method} r={config.rank} seed {config.seed} steps {config.steps}: "
        f"{found.shift}",
    )


def plan(config: Config) -> str:
    """Describe what :func:`run` will do: numbers of runs and steps, and the attack."""
    names = arms(config.ranks, config.frozen_ranks, config.with_dp)
    runs = len(names) * config.num_seeds * len(config.steps)
    return (
        f"{len(names)} methods x {config.num_seeds} seeds x steps {config.steps}: {runs} runs, "
        f"{runs // len(config.steps) * sum(config.steps):,} training steps of batch "
        f"{config.base.batch_size}; attack {config.attack!r}, calibrated by the base model: "
        "each shadow model would take all of this once more; finished runs are not repeated"
    )


def _arm_config(config: Config, changes: Mapping[str, Any], steps: int, seed: int) -> TrainConfig:
    rates = {
        "full": config.full_learning_rate,
        "lora": config.lora_learning_rate,
        "lora-frozen-a": config.frozen_learning_rate,
    }
    return replace(
        config.base,
        learning_rate=rates[changes.get("method", "full")],
        steps=steps,
        seed=seed,
        **changes,
    )


def _width(config: Config) -> int:
    """Return the width of the model: the length n of the rows that LoRA's A projects."""
    from lowrank_dp.models import load_model

    model, _ = load_model(config.base.model, num_labels=2)
    return int(model.config.hidden_size)


def matched_value(result: Result, by: str) -> float:
    """Return the value of ``by`` that the most non-private arms pass on average.

    ``by`` is "train_loss" or "utility". If equally many arms pass several values, the lowest of
    these values is returned.
    """
    values = result.train_loss if by == "train_loss" else result.utility
    means = values[["DP" not in arm for arm in result.arms]].mean(axis=1)  # (arms, steps)
    low, high = means.min(axis=1)[:, None], means.max(axis=1)[:, None]
    ends = np.unique([low, high])
    # if the values of all arms are equal, there is one end and no middle
    middles = (ends[1:] + ends[:-1]) / 2 if len(ends) > 1 else ends
    return float(middles[((low <= middles) & (middles <= high)).sum(axis=0).argmax()])


def at_matched(result: Result, by: str) -> np.ndarray:
    """Return the AUC at :func:`matched_value` of ``by``, "train_loss" or "utility".

    The AUC (arms, seeds) is interpolated within each seed over the numbers of steps, and never
    extrapolated. The AUC is NaN for a seed that has not passed the value.
    """
    values = result.train_loss if by == "train_loss" else result.utility
    value = matched_value(result, by)
    read = np.full(result.auc.shape[:2], np.nan)
    for i, seed in np.ndindex(*read.shape):
        order = np.argsort(values[i, seed])
        x = values[i, seed][order]
        if x[0] <= value <= x[-1]:
            read[i, seed] = np.interp(value, x, result.auc[i, seed][order])
    return read


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate each arm: AUC at equal steps, at matched loss and at matched utility.

    Differences from full fine-tuning are taken within seeds, whose records and membership bits
    are the same.
    """
    columns = [
        "method",
        "epsilon",
        f"AUC at {result.config.steps[-1]} steps",
        "less full's",
        "TPR@1% FPR",
        "train loss",
        f"held-out {result.utility_name}",
        "AUC at matched train loss",
        "less full's",
        f"AUC at matched held-out {result.utility_name}",
    ]
    last, by_loss, by_utility = result.auc[..., -1], result.at("train_loss"), result.at("utility")
    rows = []
    for i, arm in enumerate(result.arms):
        rows.append(
            [
                arm,
                "none" if np.isinf(result.epsilon[i]) else rounded_up(result.epsilon[i], 3),
                reached_with_interval(last[i]),
                reached_with_interval(last[i] - last[0]) if i else "",
                *(
                    reached_with_interval(values[i, :, -1])
                    for values in (result.tpr, result.train_loss, result.utility)
                ),
                reached_with_interval(by_loss[i]),
                reached_with_interval(by_loss[i] - by_loss[0]) if i else "",
                reached_with_interval(by_utility[i]),
            ]
        )
    return columns, rows


def headline(result: Result) -> Mapping[str, str]:
    """Summarise: AUC of each arm at equal steps and at matched loss."""
    by_loss = result.at("train_loss")
    return {
        f"AUC, {arm}: at {result.config.steps[-1]} steps; at matched train loss": (
            f"{reached_with_interval(result.auc[i, :, -1])}; {reached_with_interval(by_loss[i])}"
        )
        for i, arm in enumerate(result.arms)
    }
