"""What a finished run leaves in ``training.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lowrank_dp import artifacts
from lowrank_dp.artifacts import runs
from lowrank_dp.train.config import TrainConfig


@dataclass(frozen=True)
class TrainResult:
    """What ``training.json`` holds.

    Attributes:
        epsilon: spent at ``delta``, by the PLD accountant; None where nothing is claimed.
        releases: distinct noisy gradients that may have been drawn: ``steps``, and those of
            broken-off attempts that could not be replayed alike.
        privacy: the whole statement.
        noise_multiplier, sample_rate: of the mechanism; sigma relative to C.
        curve: evaluations on the validation split: step, loss, the task's metrics, seconds and
            restore_seconds spent in steps until then (evaluation excluded).
        train_loss: NON-PRIVATE, the loss on at most ``eval_examples`` of the members.
        majority: accuracy of always answering the most frequent validation label, or None.
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
    schema_version: int = artifacts.SCHEMA_VERSION


def load_result(folder: str | Path) -> TrainResult:
    """What :func:`train` left in a folder; ``ValueError`` if it is no finished run."""
    path = Path(folder) / runs.TRAINING
    try:
        document = runs.read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{folder} must hold a finished run, found no {path.name}") from None
    names = {field.name for field in fields(TrainResult)}
    if document.get("schema_version") != artifacts.SCHEMA_VERSION or names != set(document):
        raise ValueError(f"{path} must have schema_version {artifacts.SCHEMA_VERSION} and the "
                         "fields of TrainResult; train again")
    return artifacts.typed(str(path), document, TrainResult)
