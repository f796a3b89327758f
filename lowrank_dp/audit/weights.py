"""Design ``weights``: one run, in which a fair coin per canary decides whether it is trained on.

A canary has two scores. The first is the canary's loss before the training minus its loss after the
training, which needs the final weights alone. The second is white box: the sum, over the steps, of
the released update along the canary's gradient. The bound is theorem 5.2 of Steinke, Nasr &
Jagielski 2023 (arXiv 2305.08846), which makes no assumption on the noise.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from lowrank_dp.audit.bounds import LowerBound
from lowrank_dp.audit.canaries import Audited, Clip, Observer, Sums, take_steps
from lowrank_dp.audit.request import Design
from lowrank_dp.audit.sums import Outcome
from lowrank_dp.evaluation.inference import evaluating
from lowrank_dp.losses import LOSS_OF_KIND, LOSSES
from lowrank_dp.mia.epsilon import one_run_correct, one_run_epsilon
from lowrank_dp.train.look_ahead import LookAhead
from lowrank_dp.train.state import State

GUESSED = 0.25  # share of the canaries that the attacker guesses, fixed beforehand
_SHIFT = 1e-2  # step of the finite difference: Euclidean norm of the change of the weights


def audit_weights(audited: Audited, design: Design) -> Outcome:
    """Audit one run; a fair coin includes each of ``design.num_canaries`` canaries. NON-PRIVATE.

    Each of the two scores gets half of 1 - confidence. A guess about one canary does not use the
    coins of the other canaries.
    """
    generator = audited.generator
    coins = generator.random(len(audited.canaries)) < 0.5
    others = audited.setup.unit_rows[: len(audited.setup.unit_rows) - len(coins)]
    units = [*others, *([row] for row in np.array(audited.canaries)[coins].tolist())]
    projection = ProjectionObserver(audited)
    before: list[np.ndarray] = []

    def observer_of(setup: object, state: State) -> Observer:
        before.append(_losses(audited))  # at the weights before the first step
        projection.look_ahead = state.look_ahead
        return projection

    take_steps(audited, observer_of, 0, units=units)
    scores = {
        "loss before minus after": before[0] - _losses(audited),
        "released sums along each canary's gradient": projection.scores,
    }
    tail = (1 - design.confidence) / len(scores)
    return Outcome(
        bounds=tuple(
            LowerBound(
                f"{name}: {guesses_of(len(coins))} guesses in one run (theorem 5.2)",
                one_run_bound(values, coins, generator, delta=audited.delta, tail=tail),
            )
            for name, values in scores.items()
        ),
        lines=(),
    )


def guesses_of(num_canaries: int) -> int:
    """Return the number of guesses of an audit with ``num_canaries`` canaries."""
    return max(1, round(GUESSED * num_canaries))


def one_run_bound(
    scores: ArrayLike,
    coins: ArrayLike,
    generator: np.random.Generator,
    *,
    delta: float,
    tail: float,
) -> float:
    """Lower bound on epsilon from the scores of one run.

    Args:
        scores: (K,) one score per canary; a canary that was trained on has higher scores.
        coins: (K,) whether each canary was trained on, by independent fair coins.
        generator: random generator that breaks ties.
        delta: delta of the claim, in [0, 1).
        tail: largest probability, in (0, 1), that the bound exceeds the epsilon of an
            (epsilon, delta)-DP training.

    Raises ValueError if an argument is out of range.
    """
    values = np.asarray(scores, dtype=float)
    guesses = guesses_of(len(values))
    correct = one_run_correct(values, np.asarray(coins, dtype=bool), guesses, generator)
    return one_run_epsilon(len(values), guesses, correct, delta=delta, confidence=1 - tail)


class ProjectionObserver(Observer):
    """Observer that adds up, over the steps, the release along each canary's gradient.

    The inner product of a canary's gradient with a release is the derivative of the canary's loss
    along the release. The derivative is a central difference of two forward passes over all
    canaries. Both passes run without dropout, around the weights at which the step takes gradients.

    Attributes:
        look_ahead: look-ahead of the run, which gives these weights.
        scores: (K,) sum of each canary over the steps.
    """

    def __init__(self, audited: Audited) -> None:
        self._audited = audited
        self._norms = np.zeros(len(audited.canaries))
        self.look_ahead = LookAhead(None)
        self.scores = np.zeros(len(audited.canaries))

    def clipped(self, sums: Sums, norms: Tensor, clip: Clip, step: int) -> None:
        """Compute the norm of every canary's gradient."""
        audited = self._audited
        batches = audited.batches(audited.canaries)
        self._norms = clip(batches, audited.setup.mechanism.max_grad_norm)[1].double().cpu().numpy()

    def assigned(self, noisy: Sums, step: int) -> None:
        """Add the step's scores: <clipped gradient, release> / C."""
        audited = self._audited
        release = {name: p.grad for name, p in audited.setup.trained.items() if p.grad is not None}
        with self.look_ahead.applied(audited.setup.trained):
            along = _derivatives(audited, release) * audited.setup.config.batch_size
        norms = np.maximum(self._norms, 1e-30)
        self.scores += along / norms * np.minimum(1.0, norms / audited.max_grad_norm)


def _derivatives(audited: Audited, direction: Mapping[str, Tensor]) -> np.ndarray:
    """Return the derivative of each canary's loss (K,) along a direction of the parameters."""
    trained = audited.setup.trained
    length = float(
        torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(d) for d in direction.values()])
        )
    )
    if length == 0:
        return np.zeros(len(audited.canaries))
    kept = {name: trained[name].detach().clone() for name in direction}
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, d in direction.items():
                trained[name].copy_(kept[name]).add_(d, alpha=sign * _SHIFT / length)
        losses.append(_losses(audited))
    with torch.no_grad():
        for name, value in kept.items():
            trained[name].copy_(value)
    return (losses[0] - losses[1]) / (2 * _SHIFT) * length


def _losses(audited: Audited) -> np.ndarray:
    """Return the loss of each canary (K,), in the given order; all have the same length."""
    setup, found = audited.setup, []
    loss_of = LOSSES[LOSS_OF_KIND[setup.task.kind]]
    with evaluating(setup.model):
        for batch in setup.batches(audited.canaries):
            logits = setup.model(**batch).logits.double()
            found.append(loss_of(logits, batch["labels"])[0])
    return torch.cat(found).cpu().numpy()
