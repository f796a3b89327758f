"""Design ``runs``: many short runs in one process, with or without one canary by a fair coin.

The score of a run is the likelihood ratio of its releases with the canary to those without. The
auditor knows the sums of the other rows. A threshold from one half of the runs gives
Clopper-Pearson bounds on the other half, without an assumption on the noise.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from lowrank_dp._terminal import progress
from lowrank_dp.audit.bounds import LowerBound, run_log_ratio
from lowrank_dp.audit.canaries import Audited, Clip, Observer, Sums, released, take_steps
from lowrank_dp.audit.request import Design
from lowrank_dp.audit.sums import Outcome
from lowrank_dp.mia.epsilon import split_epsilon
from lowrank_dp.restore import SCHEMES
from lowrank_dp.restore.gradients import is_matrix


def audit_runs(audited: Audited, design: Design) -> Outcome:
    """Audit ``design.num_runs`` runs, each with the canary by a fair coin. NON-PRIVATE."""
    generator = audited.generator
    coins = generator.random(design.num_runs) < 0.5
    coins[:4] = [True, True, False, False]  # the threshold needs two runs of each kind
    scores = []
    for run in progress(range(design.num_runs), "audited runs"):
        observer = RatioObserver(audited)
        units = audited.setup.unit_rows if coins[run] else audited.setup.unit_rows[:-1]
        take_steps(audited, partial(_given, observer), run, units=units)
        scores.append(run_log_ratio(observer.values, observer.shifts, audited.sample_rate))
    bound = split_bound(scores, coins, generator, delta=audited.delta, confidence=design.confidence)
    method = (
        f"likelihood ratio of {design.num_runs} runs (Clopper-Pearson, threshold from one half)"
    )
    return Outcome(bounds=(LowerBound(method, bound),), lines=())


def _given(observer: Observer, setup: object, state: object) -> Observer:
    return observer


def split_bound(
    scores: ArrayLike,
    coins: ArrayLike,
    generator: np.random.Generator,
    *,
    delta: float,
    confidence: float,
) -> float:
    """Lower bound on epsilon from one score per run, by :func:`mia.epsilon.split_epsilon`.

    Args:
        scores: (R,) one finite score per run; a higher score speaks for "with the canary".
        coins: (R,) whether each run had the canary; at least 2 of each kind.
        generator: splits the runs.
        delta: delta of the claim, in [0, 1).
        confidence: confidence of the bound, one-sided, in (0, 1).

    Raises ValueError if an argument is out of range.
    """
    finite = np.clip(np.asarray(scores, dtype=float), -1e300, 1e300)
    return split_epsilon(finite, coins, generator, delta=delta, confidence=confidence).epsilon


class RatioObserver(Observer):
    """Takes the releases of a run along the canary's gradient, and the canary's contributions.

    Attributes:
        values, shifts: of each step, in units of sigma C: the release without the other rows' sums
            along the canary's clipped gradient, and the norm of that gradient.
    """

    def __init__(self, audited: Audited) -> None:
        self._audited = audited
        self._taken = False
        self._own: Sums = {}
        self._clean: Sums = {}
        self.values: list[float] = []
        self.shifts: list[float] = []

    def sampled(self, rows: list[int], sampler: object) -> None:  # type: ignore[override]
        """Note whether the canary takes part."""
        self._taken = self._audited.canaries[0] in rows

    def clipped(self, sums: Sums, norms: Tensor, clip: Clip, step: int) -> None:
        """Take the canary's contribution."""
        batches = self._audited.batches(self._audited.canaries)
        self._own = clip(batches, self._audited.setup.mechanism.max_grad_norm)[0]

    def noised(self, clean: Sums, noisy: Sums, noise: object, step: int) -> None:
        """Keep the clean sums until the gradients are assigned."""
        self._clean = {name: total.clone() for name, total in clean.items()}

    def assigned(self, noisy: Sums, step: int) -> None:
        """Add the step."""
        audited, config = self._audited, self._audited.setup.config
        plain = SCHEMES[config.scheme].is_identity
        release, _ = released(
            audited, noisy, lambda t: config.low_pass is None and (plain or not is_matrix(t))
        )
        std = audited.noise_multiplier * audited.max_grad_norm
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in self._own.values()))
        inner = sum(
            float(((release[n] - self._clean[n]).double() * self._own[n].double()).sum())
            for n in self._clean
        )
        along = inner / norm if norm > 0 else 0.0
        self.values.append((along + self._taken * norm) / std)
        self.shifts.append(norm / std)
