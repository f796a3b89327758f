"""Design ``runs``: many short runs, each with or without one canary by a fair coin.

The score of a run is the likelihood ratio of its releases, with the canary to without. The auditor
knows the sums of the other rows. One half of the runs selects a threshold; the other half gives
Clopper-Pearson bounds. The bounds make no assumption on the noise.
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
    """Audit ``design.num_runs`` runs, each with or without the canary. NON-PRIVATE."""
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
        scores: (R,) one finite score per run; a run with the canary has higher scores.
        coins: (R,) whether each run contained the canary; at least 2 runs with and 2 without.
        generator: random generator that splits the runs into halves.
        delta: delta of the claim, in [0, 1).
        confidence: confidence of the bound, one-sided, in (0, 1).

    Raises ValueError if an argument is out of range.
    """
    finite = np.clip(np.asarray(scores, dtype=float), -1e300, 1e300)
    return split_epsilon(finite, coins, generator, delta=delta, confidence=confidence).epsilon


class RatioObserver(Observer):
    """Observer of the releases of one run along the canary's gradient.

    Attributes:
        values: per step, the component of the release, minus the sum of the other rows, along the
            canary's clipped gradient; in units of sigma C.
        shifts: per step, the norm of the canary's clipped gradient; in units of sigma C.
    """

    def __init__(self, audited: Audited) -> None:
        self._audited = audited
        self._taken = False
        self._own: Sums = {}
        self._clean: Sums = {}
        self.values: list[float] = []
        self.shifts: list[float] = []

    def sampled(self, rows: list[int], sampler: object) -> None:  # type: ignore[override]
        """Note whether the canary is in the sample."""
        self._taken = self._audited.canaries[0] in rows

    def clipped(self, sums: Sums, norms: Tensor, clip: Clip, step: int) -> None:
        """Compute the canary's contribution."""
        batches = self._audited.batches(self._audited.canaries)
        self._own = clip(batches, self._audited.setup.mechanism.max_grad_norm)[0]

    def noised(self, clean: Sums, noisy: Sums, noise: object, step: int) -> None:
        """Keep the clean sums until the gradients are assigned."""
        self._clean = {name: total.clone() for name, total in clean.items()}

    def assigned(self, noisy: Sums, step: int) -> None:
        """Append the step's value and shift."""
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
