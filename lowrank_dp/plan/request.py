"""Request for a plan: the run's configuration and the plan's measurements; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowrank_dp import _validate
from lowrank_dp._options import option
from lowrank_dp.train.config import TrainConfig


@dataclass(frozen=True)
class Measurement:
    """Measurements of a plan: their text, their number of rows, and the short trainings.

    Raises ValueError for a value out of its range, and if both ``public`` and ``own_records`` are
    given.
    """

    public: str = option(
        "",
        "Public text on which the plan measures gradients in place of the task's records: a task "
        "name, or own data with the column names of --task. Default: generated text.",
    )
    own_records: bool = option(
        False,
        "Measure gradients of the task's own records in place of public text; marks the plan "
        "NON-PRIVATE.",
    )
    public_rows: int = option(
        512,
        "Largest number of rows of which the plan computes gradients. For a larger batch, the plan "
        "extrapolates.",
    )
    trial_steps: int = option(
        24,
        "Number of steps of each short training on public text. The short trainings predict the "
        "gap in steps; 0 omits them.",
    )
    trial_rows: int | None = option(
        None,
        "Number of rows per step of the short trainings. Default: 128 if the blocks below the "
        "first trained block are frozen, else 32.",
    )

    def __post_init__(self) -> None:
        _validate.integer("public_rows", self.public_rows)
        _validate.integer("trial_steps", self.trial_steps, low=0)
        if self.trial_rows is not None:
            _validate.integer("trial_rows", self.trial_rows)
        if self.public and self.own_records:
            raise ValueError("public must be left out if own_records is given, got both")


@dataclass(frozen=True)
class Request:
    """Configuration of the planned run, and measurements of the plan."""

    run: TrainConfig = field(default_factory=TrainConfig)
    measurement: Measurement = field(default_factory=Measurement)
