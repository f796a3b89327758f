"""Result of a finished run: ``training.json``, ``membership.json`` and the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from lowrank_dp import artifacts
from lowrank_dp.artifacts import files, runs
from lowrank_dp.data import SEPARATOR
from lowrank_dp.evaluation.metrics import majority
from lowrank_dp.membership.manifest import Manifest
from lowrank_dp.train.config import TrainConfig

if TYPE_CHECKING:
    from lowrank_dp.train.setup import Setup
    from lowrank_dp.train.state import State


@dataclass(frozen=True)
class TrainResult:
    """Contents of ``training.json``.

    Attributes:
        config: configuration of the run.
        epsilon: privacy spent at ``delta``; None if the run claims no privacy.
        delta: delta at which epsilon is stated.
        releases: number of distinct noisy gradients that may have been drawn: one per step, and
            those of interrupted attempts that could not be replayed exactly.
        privacy: the whole privacy statement.
        noise_multiplier: sigma, relative to the clipping norm C; 0 if the run adds no noise.
        sample_rate: probability with which a unit takes part in a step.
        curve: evaluations on the validation split: step, loss, the task's metrics, and the seconds
            and restore_seconds spent in steps until then, without evaluations.
        seconds, restore_seconds: wall-clock time spent in steps, and the part spent restoring.
        train_loss: loss on at most ``eval_examples`` of the members. NON-PRIVATE.
        majority: accuracy, on the evaluated validation examples, of always answering their most
            frequent label, or None.
        description: model, data and processes, in words.
        provenance: versions, command and machine.
        sensitive: the fields of the file that no mechanism protects, in words.
        schema_version: version of the file's schema.
    """

    config: TrainConfig
    epsilon: float | None
    delta: float
    releases: int
    privacy: str
    noise_multiplier: float
    sample_rate: float
    curve: tuple[Mapping[str, float], ...]
    seconds: float
    restore_seconds: float
    train_loss: float
    majority: float | None
    description: str
    provenance: Mapping[str, Any]
    sensitive: str = "train_loss: NON-PRIVATE, computed from the members without noise"
    schema_version: int = artifacts.SCHEMA_VERSION


def sensitive_fields(config: TrainConfig) -> str:
    """Return which fields of ``training.json`` no mechanism protects, in words, and why."""
    if config.diagnostic or not config.adds_noise:
        return (
            "train_loss, curve, majority, and every other field that depends on records: "
            "NON-PRIVATE, since the run has no privacy guarantee"
        )
    fields = ["train_loss: NON-PRIVATE, computed from the members without noise"]
    if config.holdout:
        fields.append(
            "curve, majority: NON-PRIVATE, computed without noise from the private records that "
            "holdout set aside"
        )
    fields.append("seconds, restore_seconds, also in curve: grow with the sizes of the samples")
    return "; ".join(fields)


def load_result(folder: str | Path) -> TrainResult:
    """Return the result that :func:`train` wrote to a folder.

    Raises:
        ValueError: if the folder holds no finished run, or one of another schema version.
    """
    path = Path(folder) / runs.TRAINING
    try:
        document = files.read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{folder} must hold a finished run, found no {path.name}") from None
    if document.get("schema_version") != artifacts.SCHEMA_VERSION:
        raise ValueError(f"{path} must have schema_version {artifacts.SCHEMA_VERSION}; train again")
    return artifacts.from_jsonable(str(path), document, TrainResult)


def result_of(setup: Setup, state: State, releases: int, train_loss: float) -> TrainResult:
    """Return the result of a run after ``releases`` releases."""
    return TrainResult(
        config=setup.config,
        epsilon=setup.epsilon(releases),
        delta=setup.delta,
        releases=releases,
        privacy=setup.statement(releases),
        noise_multiplier=setup.mechanism.noise_multiplier,
        sample_rate=setup.mechanism.sample_rate,
        curve=tuple(state.curve),
        seconds=state.seconds,
        restore_seconds=state.restore_seconds,
        train_loss=train_loss,
        majority=majority(setup.task.select({e.id for e in setup.evaluated[0]}, "validation")),
        description=setup.description,
        provenance=artifacts.provenance(seed=setup.config.seed, device=setup.config.device),
        sensitive=sensitive_fields(setup.config),
    )


def save_run(
    setup: Setup, result: TrainResult, folder: runs.RunFolder, weights: dict[str, Tensor] | None
) -> None:
    """Write the checkpoint and its manifest; without weights, write ``training.json`` alone."""
    documents = {runs.TRAINING: artifacts.to_jsonable(result)}
    if weights is not None:
        config, task = setup.config, setup.task
        documents[runs.MEMBERSHIP] = Manifest.of(
            setup.units,
            setup.members,
            membership=config.membership,
            sampling_seed=setup.seed,
            task=task.name,
            split="train",
            source=task.source,
            kind=task.kind,
            unit=config.unit,
            template={"separator": SEPARATOR} if task.kind == "generation" else None,
            max_length=setup.max_length,
            base={
                "model": config.model,
                "seed": setup.seed,
                "weights": getattr(setup.model, "lowrank_dp_base_weights", ""),
            },
            recipe=config.recipe(),
            seed=config.seed,
            privacy=result.privacy,
            train_loss=result.train_loss,
            eval_loss=result.curve[-1]["loss"],
        ).as_json()

    def write(aside: Path) -> None:
        if weights is None:
            return
        from lowrank_dp.models import save_model  # imported here, since it imports transformers

        save_model(setup.model, setup.tokenizer, aside, weights)
        if setup.initial_head:
            save_file(setup.initial_head, aside / runs.INITIAL_HEAD)

    folder.save_checkpoint(write, documents)
