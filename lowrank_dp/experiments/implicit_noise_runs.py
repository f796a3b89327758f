"""Runs of the experiment on LoRA's implicit noise: trained once, attacked at each number of steps.

With a constant learning rate, the first 40 of 120 steps equal a run of 40 steps. One run of
:func:`lowrank_dp.train.loop.train` can therefore be attacked after each of several numbers of
steps. The measured losses are saved beside the runs, so that a finished run is not repeated.
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

LOSSES = "losses"  # folder of the measured losses, beside the runs


@dataclass(frozen=True)
class Losses:
    """Losses of all members and non-members of a run after some number of steps. NON-PRIVATE.

    Attributes:
        loss: (N,) loss of each record in nats, in evaluation mode.
        is_member: (N,) membership bit of each record.
        held_out_loss, accuracy: loss in nats, and accuracy, on the validation split.
        description: model and data of the run, in words.
    """

    loss: np.ndarray
    is_member: np.ndarray
    held_out_loss: float
    accuracy: float
    description: str


@dataclass(frozen=True)
class Curves:
    """Attack and losses of a run after 0 steps and each number of steps, (T,) each. NON-PRIVATE.

    Attributes:
        auc: AUC of the attack "base" (loss before fine-tuning minus loss); 1/2 after 0 steps.
        tpr: true-positive rate of the attack "base" at 1% FPR; NaN for fewer than 100 non-members.
        train_loss: mean loss of all members, in nats.
        held_out_loss, accuracy: loss in nats, and accuracy, on the validation split.
    """

    auc: np.ndarray
    tpr: np.ndarray
    train_loss: np.ndarray
    held_out_loss: np.ndarray
    accuracy: np.ndarray


@dataclass(frozen=True)
class ShadowAttack:
    """Attack on a checkpoint with shadow models of the same configuration. NON-PRIVATE.

    Attributes:
        lira: AUC of the attack "lira-offline", which uses for each record only the shadow models
            that were not trained on the record.
        base: AUC of the attack "base", without shadow models.
        train_loss: mean loss of the members, in nats.
        shift: verdict on distribution shift; "" for the verdict "ok".
    """

    lira: float
    base: float
    train_loss: float
    shift: str


def train_observed(config: TrainConfig, steps: Sequence[int], folder: Path) -> None:
    """Train a run if it is not finished, and save its losses after 0 and after ``steps`` steps.

    Raises :class:`lowrank_dp.train.guards.Diverged` if the run diverges, and ValueError if it stops
    for another reason.
    """
    run = run_folder(config, folder)
    train(
        _with_cache(config, folder),
        run,
        resume=True,
        keep_model=False,
        show_progress=False,
        on_evaluation=partial(_observe, (0, *steps), folder / LOSSES / run.name),
    )


def observed(config: TrainConfig, steps: Sequence[int], folder: Path) -> list[Losses]:
    """Return the losses that :func:`train_observed` saved.

    Raises ValueError if losses are missing, since the finished run had other ``steps``.
    """
    run = run_folder(config, folder)
    try:
        return [
            artifacts.load_result(folder / LOSSES / run.name, _name(step), Losses)
            for step in (0, *steps)
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
        precision=setup.config.precision,
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
    """Attack a checkpoint with shadow models; train the checkpoint and the models if missing.

    Checkpoints that differ in the seed alone share their shadow models. Raises ValueError if a run
    stops, or if a record is in the training set of every shadow model.
    """
    targets = folder / "targets"  # runs directly in ``folder`` keep no checkpoint
    (outcome,) = sweep([_with_cache(config, folder)], targets, engine="sequential", keep_model=True)
    if outcome.result is None:
        raise ValueError(outcome.error)
    options = Options(
        primary="lira-offline",
        num_shadows=num_shadows,
        seed=config.data_seed,
        device=config.device,
        precision=config.precision,
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
