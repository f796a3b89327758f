"""Request for an audit: a run's configuration and the design; importable without torch."""

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
    """Design of an audit, and its sizes.

    Raises ValueError for a value out of its range, and for a size that the design does not have.
    """

    design: str = option(
        "sums",
        "Design of the audit: sums (the released noisy sums of every step, whose law is known), "
        "weights (one run, in which a fair coin decides on each of many canaries) or runs (many "
        "runs, with or without one canary).",
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
    confidence: float = option(0.95, "Confidence of the lower bound on epsilon, one-sided.")
    level: float = option(
        1e-3,
        "Probability that the tests of the laws, all together, reject a correct run (sums).",
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
    """The run that is audited, and the design of the audit."""

    run: TrainConfig = field(default_factory=TrainConfig)
    design: Design = field(default_factory=Design)
