"""Audit of a training configuration: lower bounds on epsilon, compared with the accountant's."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from lowrank_dp import accounting
from lowrank_dp._rounding import rounded_down
from lowrank_dp.audit.bounds import LowerBound
from lowrank_dp.audit.canaries import Audited, open_audit
from lowrank_dp.audit.laws import Line
from lowrank_dp.audit.power import Found, power_of
from lowrank_dp.audit.request import Design
from lowrank_dp.audit.runs import audit_runs
from lowrank_dp.audit.sums import audit_sums
from lowrank_dp.audit.weights import audit_weights
from lowrank_dp.train import guards
from lowrank_dp.train.config import TrainConfig

LABEL = (
    "NON-PRIVATE: computed from clean sums, samples and membership bits, which no mechanism "
    "protects; keep a report on real records as private as the records"
)
CONSISTENT, CONTRADICTION = "CONSISTENT", "CONTRADICTION"
_DROPOUT = {  # limits of the measurements of a run with dropout, by design
    "sums": "contributions to a sum with other rows are measured without dropout, and "
    "contributions of single rows are measured with dropout",
    "weights": "losses of canaries are measured without dropout",
    "runs": "the canary's contribution is measured with other dropout masks than in the step",
}
_DESIGNS = {"sums": audit_sums, "weights": audit_weights, "runs": audit_runs}


@dataclass(frozen=True)
class Report:
    """Report of an audit. NON-PRIVATE.

    Attributes:
        privacy: sentence that says why the report is NON-PRIVATE.
        config: configuration of the audited run, as JSON types.
        design: the design and its sizes.
        description: the model, the data and the canaries, in words.
        statement: privacy statement of the run with its canaries, in words.
        epsilon, delta: the audited claim. Epsilon is ``config.epsilon`` if given. Otherwise the
            accountant computes epsilon from the noise multiplier and the sampling rate that the
            configuration states.
        confidence: confidence, in (0, 1), that all lower bounds hold together; one-sided.
        bounds: lower bounds on epsilon.
        lines: comparisons of measurements with their expected values or laws; empty for the
            designs ``weights`` and ``runs``.
        objection: message of the first check of ``train`` that failed. A failed check does not
            stop an audit. "" if no check failed; None if the design does not run these checks.
        power: smallest faults that the design detects at its size; empty if they were not computed.
        contradictions: bounds and comparisons that contradict the claim, in words.
        verdict: "CONSISTENT" or "CONTRADICTION".
        seconds: wall-clock time of the runs.
        provenance: versions, machine, commit and command; empty until the report is saved.
    """

    privacy: str
    config: dict[str, Any]
    design: Design
    description: str
    statement: str
    epsilon: float
    delta: float
    confidence: float
    bounds: tuple[LowerBound, ...]
    lines: tuple[Line, ...]
    objection: str | None
    power: tuple[Found, ...]
    contradictions: tuple[str, ...]
    verdict: str
    seconds: float
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def lower_bound(self) -> float:
        """Largest lower bound on epsilon, at the confidence ``confidence``."""
        return max((bound.epsilon for bound in self.bounds), default=0.0)


def audit(config: TrainConfig, design: Design | None = None, *, power: bool = True) -> Report:
    """Audit the training loop of ``config`` by canaries. NON-PRIVATE.

    The audit trains with :func:`lowrank_dp.train.take_step` on the records of ``config`` and the
    canaries. The audit saves nothing, with one exception: with a prefix cache, the cached outputs
    of the canaries stay in the cache. A failed check of ``train`` is reported and does not stop a
    run.

    Args:
        config: configuration of the run. The run must add noise and use one process.
        design: design and sizes; default: ``Design()``, which tests the released sums.
        power: whether to compute the smallest faults that the design detects.

    Returns:
        The report. If the run is correct, the largest bound exceeds the accountant's epsilon with
        probability at most 1 - ``design.confidence``, and a line fails with probability at most
        ``design.level``.

    Raises:
        ValueError: if the run can't be made or audited, or a step of ``train`` fails.
    """
    design = design or Design()
    return audit_opened(open_audit(config, design.num_canaries), design, power=power)


def claimed_epsilon(audited: Audited) -> float:
    """Return the epsilon that the configuration claims for the run with all canaries."""
    config = audited.setup.config
    if config.epsilon is not None:
        return config.epsilon
    return accounting.bound(
        audited.noise_multiplier, audited.sample_rate, config.steps, audited.delta
    ).epsilon


def audit_opened(audited: Audited, design: Design, *, power: bool = True) -> Report:
    """Audit a run that :func:`lowrank_dp.audit.canaries.open_audit` has prepared; see `audit`."""
    setup, config = audited.setup, audited.setup.config
    claimed = claimed_epsilon(audited)
    started = time.perf_counter()
    with guards.memory(config.micro_batch_size):
        outcome = _DESIGNS[design.design](audited, design)
    seconds = time.perf_counter() - started
    contradictions = [
        f"epsilon is at least {rounded_down(bound.epsilon)} by {bound.method}"
        for bound in outcome.bounds
        if bound.judged and bound.epsilon > claimed
    ]
    contradictions += [line.what for line in outcome.lines if not line.passed]
    return Report(
        privacy=LABEL,
        config=config.as_json(),
        design=design,
        description=describe_audit(audited, design),
        statement=setup.statement(config.steps),
        epsilon=claimed,
        delta=audited.delta,
        confidence=design.confidence,
        bounds=outcome.bounds,
        lines=outcome.lines,
        objection=outcome.objection,
        power=power_of(audited, design, claimed) if power else (),
        contradictions=tuple(contradictions),
        verdict=CONTRADICTION if contradictions else CONSISTENT,
        seconds=seconds,
    )


def describe_audit(audited: Audited, design: Design) -> str:
    """Return a description of the model, the data, the canaries and the runs, in words."""
    canaries = f"{design.num_canaries} canar{'y' if design.num_canaries == 1 else 'ies'}"
    runs = f"{design.num_runs} run{'' if design.num_runs == 1 else 's'}"
    dropout = ""
    if audited.setup.config.dropout:
        dropout = "; " + _DROPOUT[design.design]
    return (
        f"{audited.setup.description}; {canaries} of random tokens; {runs} of "
        f"{audited.setup.config.steps} steps{dropout}"
    )
