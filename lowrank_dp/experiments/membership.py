"""Claim: LoRA resists membership inference, more so at a smaller rank (2409.17538).

Every method fine-tunes on the same records by the same coins, at several numbers of steps, and is
attacked by one attack named beforehand. A method that fits less leaks less, so AUCs are compared at
equal steps, at matched training loss and at matched utility; and beside the variance of the
projection noise that the claim rests on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_dp import _validate, artifacts
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.intervals import mean_and_interval, with_interval
from lowrank_dp.mia.attack import Options, attack, open_target
from lowrank_dp.mia.compare import utility_metric
from lowrank_dp.sweep import run_folder, sweep
from lowrank_dp.theory import noise_variance
from lowrank_dp.train import TrainConfig

CAPTION = (
    "Membership inference on one task and pool of records, mean over seeds (each with its own "
    "coins) with 95% t-intervals. (a) AUC of the primary attack at the largest number of steps "
    "against rank, beside full fine-tuning and DP, and the projection noise's variance per "
    "coordinate (dashed, right axis). (b) Its TPR at 1% FPR; dotted, chance. (c) AUC against the "
    "training loss, a point for each number of steps: at one loss, methods can be compared. (d) "
    "Against held-out utility. "
    "NON-PRIVATE: computed from membership bits."
)

DP = {"non_private": False, "epsilon": 8.0}
RESTORED = {"scheme": "optimal", "below": "zero", "momentum_beta": 0.9}


def arms(ranks: tuple[int, ...], frozen_ranks: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Name -> what differs from the base configuration."""
    lora = {f"LoRA r={rank}": {"method": "lora", "rank": rank} for rank in ranks}
    frozen = {
        f"frozen A r={rank}": {"method": "lora-frozen-a", "rank": rank} for rank in frozen_ranks
    }
    return {"full": {}, **lora, **frozen, "full, DP": DP, "full, DP restored": {**DP, **RESTORED}}


@dataclass(frozen=True)
class Config:
    """What is trained and attacked.

    Attributes:
        base: shared by all; its method, rank, steps, learning rate and seed are replaced.
        ranks, frozen_ranks: of LoRA, and of LoRA with a frozen A.
        steps: numbers of steps, each a run of its own (with a constant rate, the longer ones pass
            through the shorter ones' states).
        full_learning_rate, lora_learning_rate, frozen_learning_rate: of full fine-tuning, LoRA,
            and LoRA with a frozen A; by a run with another seed, so that the methods' ranges of
            training loss meet.
        num_seeds: from 0, each with its own coins.
        attack: the primary one.
    """

    base: TrainConfig
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    frozen_ranks: tuple[int, ...] = (1, 8, 64)
    steps: tuple[int, ...] = (20, 40, 120)
    full_learning_rate: float = 1e-4
    lora_learning_rate: float = 2e-3
    frozen_learning_rate: float = 5e-3
    num_seeds: int = 3
    attack: str = "base"
    num_workers: int | None = None


SST2 = Config(
    base=TrainConfig(
        model="minilm",
        task="sst2",
        non_private=True,
        delta=1e-3,
        batch_size=32,
        max_examples=1000,
        membership="bernoulli",
        max_length=64,
        eval_every=1000,
        snapshot_every=1000,
    )
)

E2E = Config(
    base=TrainConfig(
        model="tiny-llama",
        task="e2e",
        non_private=True,
        delta=1e-3,
        unit="group",
        batch_size=64,
        max_examples=2000,
        membership="bernoulli",
        eval_every=1000,
        snapshot_every=1000,
        generate=False,
    ),
    steps=(10, 40, 120),
    full_learning_rate=1e-3,
    lora_learning_rate=1e-2,
    frozen_learning_rate=5e-2,
)

# to try in a minute, on generated text with models that are always at hand
SMALL = Config(
    base=replace(SST2.base, model="tiny", task="generated", max_examples=400, max_length=None),
    ranks=(1, 8),
    frozen_ranks=(),
    steps=(15, 45),
    full_learning_rate=1e-3,
    lora_learning_rate=1e-2,
    num_seeds=2,
)
SMALL_TABLES = replace(
    SMALL,
    base=replace(E2E.base, task="generated-table", max_examples=400, batch_size=32),
    ranks=(8,),
    steps=(10, 30),
)


@dataclass(frozen=True)
class Result:
    """Of every arm, seed and number of steps.

    ``auc``, ``tpr`` (at 1% FPR, of the primary attack), ``train_loss``, ``utility`` and
    ``untuned`` (the base's AUC, a check for shift) are (arms, seeds, steps). ``epsilon`` (arms,)
    is the accountant's, infinite without privacy; ``noise_variance`` (ranks,) in units of |q|^2.
    """

    config: Config
    provenance: dict[str, Any]
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
        """Mean over seeds at each number of steps, and half-width of its 95% t-interval."""
        return mean_and_interval(values[arm])

    def at(self, by: str) -> np.ndarray:
        """(arms, seeds) AUC at one value of "train_loss" or "utility", see `at_matched`."""
        return at_matched(self, by)


def run(config: Config, folder: str | Path = Path("runs") / "membership") -> Result:
    """Train and attack every arm; what is there is not repeated."""
    table = arms(config.ranks, config.frozen_ranks)
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
    options = Options(primary=config.attack, seed=config.base.data_seed, device=config.base.device)
    rows, shift, name, description = [], [], "", ""
    for one in progress(configs, "attacks"):
        path = run_folder(one, folder)
        target = open_target(path, options)
        found = attack(target, options, Path(folder) / "cache")
        best = next(a for a in found.attacks if a.name == config.attack)
        name, description = utility_metric(target), target.trained.description
        rate = best.tpr["0.01"]
        rows.append(
            (
                best.auc.value,
                np.nan if rate is None else rate.tpr,
                target.trained.train_loss,
                target.trained.curve[-1][name],
                np.nan if found.base is None else found.base.value,
            )
        )
        if found.shift != "ok":
            shift.append(
                f"{one.method} r={one.rank} seed {one.seed} steps {one.steps}: {found.shift}"
            )
    shape = len(table), config.num_seeds, len(config.steps)
    auc, tpr, loss, utility, untuned = (
        np.array(column).reshape(shape) for column in zip(*rows, strict=True)
    )
    claimed = [outcome.result.epsilon for outcome in outcomes if outcome.result is not None]
    per_arm = np.array([np.inf if value is None else value for value in claimed])
    width = _width(config)
    return Result(
        config=config,
        provenance=artifacts.provenance(seed=0, device=config.base.device),
        privacy="NON-PRIVATE: computed from membership bits",
        description=description,
        arms=tuple(table),
        utility_name=name,
        shift=tuple(shift),
        epsilon=per_arm.reshape(shape)[:, 0, -1],
        auc=auc,
        tpr=tpr,
        train_loss=loss,
        utility=utility,
        untuned=untuned,
        noise_variance=np.array([noise_variance(rank, width) for rank in config.ranks]),
    )


def plan(config: Config) -> str:
    """What :func:`run` will do, before it starts."""
    names = arms(config.ranks, config.frozen_ranks)
    runs = len(names) * config.num_seeds * len(config.steps)
    return (
        f"{len(names)} methods x {config.num_seeds} seeds x steps {config.steps}: {runs} runs, "
        f"{runs // len(config.steps) * sum(config.steps):,} training steps of batch "
        f"{config.base.batch_size}; attack {config.attack!r}, calibrated by the base model: "
        "shadows would take this once more for each of them; what is there is not repeated"
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
    """The model's width: the length n of the rows that LoRA's A projects."""
    from lowrank_dp.models import load_model

    model, _ = load_model(config.base.model, num_labels=2)
    return int(model.config.hidden_size)


def at_matched(result: Result, by: str) -> np.ndarray:
    """(arms, seeds) AUC at the one value of ``by`` that most non-private arms pass on average.

    Of several such values the lowest. Interpolated within each seed over its numbers of steps,
    never extrapolated: NaN for a seed that has not passed the value.
    """
    values = result.train_loss if by == "train_loss" else result.utility
    means = values[["DP" not in arm for arm in result.arms]].mean(axis=1)  # (arms, steps)
    low, high = means.min(axis=1)[:, None], means.max(axis=1)[:, None]
    ends = np.unique([low, high])
    middles = (ends[1:] + ends[:-1]) / 2 if len(ends) > 1 else ends  # every arm's value may agree
    value = middles[((low <= middles) & (middles <= high)).sum(axis=0).argmax()]
    read = np.full(result.auc.shape[:2], np.nan)
    for i, seed in np.ndindex(*read.shape):
        order = np.argsort(values[i, seed])
        x = values[i, seed][order]
        if x[0] <= value <= x[-1]:
            read[i, seed] = np.interp(value, x, result.auc[i, seed][order])
    return read


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """An arm each: AUC at equal steps, at matched loss and at matched utility.

    The differences from full fine-tuning are within seeds, which share records and coins.
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
                "none" if np.isinf(result.epsilon[i]) else f"{result.epsilon[i]:.3g}",
                _pm(last[i]),
                _pm(last[i] - last[0]) if i else "",
                *(
                    _pm(values[i, :, -1])
                    for values in (result.tpr, result.train_loss, result.utility)
                ),
                _pm(by_loss[i]),
                _pm(by_loss[i] - by_loss[0]) if i else "",
                _pm(by_utility[i]),
            ]
        )
    return columns, rows


def headline(result: Result) -> Mapping[str, str]:
    """AUC of each method at equal steps and at matched loss."""
    by_loss = result.at("train_loss")
    return {
        f"AUC, {arm}: at {result.config.steps[-1]} steps; at matched train loss": f"{_pm(result.auc[i, :, -1])}; {_pm(by_loss[i])}"
        for i, arm in enumerate(result.arms)
    }


def _pm(values: np.ndarray) -> str:
    if np.isnan(values).any():
        return f"not reached by {int(np.isnan(values).sum())} of {len(values)}"
    return with_interval(values)
