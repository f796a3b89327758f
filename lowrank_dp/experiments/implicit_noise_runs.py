"""Runs of the experiment on LoRA's implicit noise: trained once, attacked at each number of steps.

With a constant learning rate, the first 40 of 120 steps are a run of 40 steps. So one run of
:func:`lowrank_dp.train.loop.train` is attacked after each of several numbers of steps. What the
attack measures is saved beside the runs, so that a finished run is not repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from lowrank_dp import artifacts
from lowrank_dp.mia import metrics, scores, signals
from lowrank_dp.mia.attack import Options, attack, open_target
from lowrank_dp.sweep import PREFIX_FOLDER, run_folder, sweep
from lowrank_dp.train import Setup, TrainConfig
from lowrank_dp.train.loop import train

LOSSES = "losses"  # folder of what was measured, beside the runs


@dataclass(frozen=True)
class Losses:
    """Losses of every record of a run's pool, after some number of steps. NON-PRIVATE.

    Attributes:
        loss, is_member: (N,) loss in nats in evaluation mode, and the membership bit.
        held_out_loss, accuracy: on the validation split.
        description: model and data of the run, in words.
    """

    loss: np.ndarray
    is_member: np.ndarray
    held_out_loss: float
    accuracy: float
    description: str


@dataclass(frozen=True)
class Curves:
    """A run after 0 steps and after each number of steps in turn: (T,) each. NON-PRIVATE.

    Attributes:
        auc: of the attack "base", the loss before fine-tuning minus the loss; 1/2 after 0 steps.
        tpr: true-positive rate of that attack at 1% FPR; NaN for fewer than 100 non-members.
        train_loss: mean loss of all members, in nats.
        held_out_loss, accuracy: on the validation split.
    """

    auc: np.ndarray
    tpr: np.ndarray
    train_loss: np.ndarray
    held_out_loss: np.ndarray
    accuracy: np.ndarray


@dataclass(frozen=True)
class ShadowAttack:
    """A checkpoint attacked with shadow models of its own recipe. NON-PRIVATE.

    Attributes:
        lira: AUC of LiRA without the shadows that were trained on the record ("lira-offline").
        base: AUC of the attack without shadows.
        train_loss: loss of the members.
        shift: a verdict on distribution shift other than "ok", else "".
    """

    lira: float
    base: float
    train_loss: float
    shift: str


def observed(config: TrainConfig, steps: Sequence[int], folder: Path) -> list[Losses]:
    """Train, unless the run is finished, and return the losses after 0 and after ``steps`` steps.

    Raises ValueError if the run stops, or if a finished run's losses are missing.
    """
    run = run_folder(config, folder)
    wanted = (0, *steps)
    train(
        _with_cache(config, folder),
        run,
        resume=True,
        keep_model=False,
        show_progress=False,
        on_evaluation=partial(_observe, wanted, folder / LOSSES / run.name),
    )
    try:
        return [
            artifacts.load_result(folder / LOSSES / run.name, _name(step), Losses)
            for step in wanted
        ]
    except FileNotFoundError as error:
        raise ValueError(f"{error}: delete {run}, and repeat the command") from None


def _with_cache(config: TrainConfig, folder: Path) -> TrainConfig:
    return replace(config, prefix_cache=str(folder.absolute() / PREFIX_FOLDER))


def _observe(wanted: Sequence[int], folder: Path, setup: Setup, entry: Mapping[str, float]) -> None:
    if entry["step"] not in wanted:
        return
    found = signals.measure(
        setup.model,
        setup.tokenizer,
        setup.task,
        [example for unit in setup.units for example in unit],
        max_length=setup.max_length,
        batch_size=setup.config.micro_batch_size,
        add_inputs=setup.prefix.for_evaluation,
    )
    members = [
        member for unit, member in zip(setup.units, setup.members, strict=True) for _ in unit
    ]
    losses = Losses(
        found.loss,
        np.array(members),
        float(entry["loss"]),
        float(entry["accuracy"]),
        setup.description,
    )
    artifacts.save_result(losses, folder, _name(int(entry["step"])), seed=setup.config.seed)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def curves(measured: Sequence[Losses]) -> Curves:
    """Attack a run at each number of steps; the first entry is the model before fine-tuning."""
    before, bits = measured[0].loss, measured[0].is_member
    calibrated = [scores.calibrated_score(one.loss, before) for one in measured]
    enough = metrics.allowed_false_positives(0.01, int((~bits).sum())) >= 1
    return Curves(
        auc=np.array([metrics.auc(values, bits).value for values in calibrated]),
        tpr=np.array(
            [
                metrics.tpr_at_fpr(values, bits, 0.01).tpr if enough else np.nan
                for values in calibrated
            ]
        ),
        train_loss=np.array([one.loss[bits].mean() for one in measured]),
        held_out_loss=np.array([one.held_out_loss for one in measured]),
        accuracy=np.array([one.accuracy for one in measured]),
    )


def attack_with_shadows(config: TrainConfig, num_shadows: int, folder: Path) -> ShadowAttack:
    """Train a checkpoint and its shadows, as far as they are missing, and attack the checkpoint.

    Checkpoints that differ in their seed only share their shadows. Raises ValueError if a run
    stops, or if some record is in every shadow's training set.
    """
    targets = folder / "targets"  # the runs in the folder itself keep no checkpoint
    (outcome,) = sweep([_with_cache(config, folder)], targets, engine="sequential", keep_model=True)
    if outcome.result is None:
        raise ValueError(outcome.error)
    options = Options(
        primary="lira-offline",
        num_shadows=num_shadows,
        seed=config.data_seed,
        device=config.device,
        engine="sequential",
    )
    target = open_target(run_folder(config, targets), options)
    report = attack(target, options, folder / "cache")
    auc = {one.name: one.auc.value for one in report.attacks}
    return ShadowAttack(
        lira=auc["lira-offline"],
        base=auc["base"],
        train_loss=outcome.result.train_loss,
        shift="" if report.shift == "ok" else report.shift,
    )
