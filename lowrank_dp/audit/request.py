"""Request for an audit: the run's configuration and the audit's design; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowrank_dp import _validate
from lowrank_dp._options import option
from lowrank_dp.train.config import TrainConfig

DESIGNS = ("sums", "weights", "runs")
CANARIES = {"sums": 4, "weights": 200, "runs": 1}  # default number of canaries by design
RUNS = {"sums": 2, "weights": 1, "runs": 200}  # default number of runs by design


@dataclass(frozen=True)
class Design:
    """Design of an audit and its sizes: number of canaries and runs, confidence, test level.

    Raises ValueError for a value out of its range, and for a number of canaries or runs that the
    design does not allow.
    """

    design: str = option(
        "sums",
        "Design of the audit: sums (tests the released noisy sum of every step against its known "
        "law), weights (one run, in which a fair coin per canary decides whether the canary is "
        "trained on) or runs (many runs, each with or without one canary).",
        choices=DESIGNS,
    )
    canaries: int | None = option(
        None,
        "Number of canaries, rows of random tokens that are added to the records. Default: 4 "
        "(sums), 200 (weights), 1 (runs).",
    )
    runs: int | None = option(
        None, "Number of training runs. Default: 2 (sums), 1 (weights), 200 (runs)."
    )
    confidence: float = option(
        0.95, "Confidence, between 0 and 1, of the lower bound on epsilon; one-sided."
    )
    level: float = option(
        1e-3,
        "Largest probability with which the tests of the design sums, all together, reject a "
        "correct run.",
    )

    def __post_init__(self) -> None:
        _validate.choice("design", self.design, DESIGNS)
        if self.canaries is not None:
            least = 20 if self.design == "weights" else 1
            most = 1 if self.design == "runs" else 100_000
            _validate.integer("canaries", self.canaries, low=least, high=most)
        if self.runs is not None:
            least, most = {"sums": (2, 1000), "weights": (1, 1), "runs": (8, 1_000_000)}[
                self.design
            ]
            _validate.integer("runs", self.runs, low=least, high=most)
        for name in ("confidence", "level"):
            _validate.real(name, getattr(self, name), low=0, high=1, low_open=True, high_open=True)

    @property
    def num_canaries(self) -> int:
        """Number of canaries: the given number, or the default of the design."""
        return CANARIES[self.design] if self.canaries is None else self.canaries

    @property
    def num_runs(self) -> int:
        """Number of training runs: the given number, or the default of the design."""
        return RUNS[self.design] if self.runs is None else self.runs


@dataclass(frozen=True)
class Request:
    """Configuration of the audited run, and design of the audit."""

    run: TrainConfig = field(default_factory=TrainConfig)
    design: Design = field(default_factory=Design)
