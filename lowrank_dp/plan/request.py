"""Request for a plan: a run's configuration and the measurements; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowrank_dp import _validate
from lowrank_dp._options import option
from lowrank_dp.train.config import TrainConfig


@dataclass(frozen=True)
class Measurement:
    """What a plan measures, beside the configuration of the run.

    Raises ValueError for a value out of its range, and if both ``public`` and ``own_records`` are
    given.
    """

    public: str = option(
        "",
        "Public text whose gradients stand in for those of the task: a task name, or own data with "
        "the column names of --task. Default: generated text.",
    )
    own_records: bool = option(
        False, "Measure the task's own records in place of public text; marks the plan NON-PRIVATE."
    )
    public_rows: int = option(
        512, "Largest number of rows whose gradients are summed; a larger batch is extrapolated."
    )
    trial_steps: int = option(
        24,
        "Steps of each short training on public text that predicts the gap in steps; 0 omits the "
        "trainings.",
    )
    trial_rows: int | None = option(
        None,
        "Rows per step of the short trainings. Default: 128 with frozen blocks below the trained "
        "ones, else 32.",
    )

    def __post_init__(self) -> None:
        _validate.integer("public_rows", self.public_rows)
        _validate.integer("trial_steps", self.trial_steps, low=0)
        if self.trial_rows is not None:
            _validate.integer("trial_rows", self.trial_rows)
        if self.public and self.own_records:
            raise ValueError("public must be left out beside own_records, got both")


@dataclass(frozen=True)
class Request:
    """The run that is planned, and what is measured for the plan."""

    run: TrainConfig = field(default_factory=TrainConfig)
    measurement: Measurement = field(default_factory=Measurement)
