"""Gap in steps between training with and without noise, from short trainings on public text.

Each arm trains the same weights on public text with clipped gradients: without noise, and with the
noise that the private run adds to its mean gradient. The loss of held-out public rows is followed.
The gap is the number of steps of the noisy arm over the number of steps in which the noise-free arm
reaches the same loss. Nothing is fitted: the model, the trained part, the optimizer, the clipping
norm and the noise are those of the run, and only text and labels differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lowrank_dp import _validate
from lowrank_dp._terminal import progress
from lowrank_dp.plan.public_text import PublicText

FACTOR = 10**0.5  # between neighbouring learning rates
# (adaptive, noisy) -> learning rates that are tried first, for a clipping norm of 1
RATES = {
    (True, False): (3e-4, 1e-3, 3e-3),
    (True, True): (3e-3, 1e-2, 3e-2),
    (False, False): (1.0, 3.0, 10.0),
    (False, True): (1.0, 3.0, 10.0),
}
HELD_OUT = 256  # rows whose loss is followed
WINDOW = 3  # steps of the running median


@dataclass(frozen=True)
class Trial:
    """One arm of the comparison, at its best learning rate.

    Attributes:
        name: the arm in words.
        rate: learning rate whose mean loss over the run is lowest.
        rates: the learning rates that were tried.
        losses: held-out loss before the first step and after each step, in nats.
    """

    name: str
    rate: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Gap:
    """Steps that noise costs, as predicted by trainings on public text.

    Attributes:
        trials: the arms: noise-free and noisy with the run's optimizer, and noise-free SGD beside
            an adaptive optimizer.
        ratio: steps of the noisy arm per step of the noise-free arm, to one loss. A perfect
            denoiser could save the share ``1 - 1 / ratio`` of the steps.
        adaptivity: steps of noise-free SGD per step of the noise-free optimizer; None for SGD.
    """

    trials: tuple[Trial, ...]
    ratio: float
    adaptivity: float | None

    @property
    def saved(self) -> float:
        """Share of the steps that training without noise would save."""
        return max(0.0, 1 - 1 / self.ratio)


@dataclass(frozen=True)
class Arm:
    """What one arm trains with.

    Attributes:
        name: the arm in words.
        optimizer: "sgd" (momentum 0.9), or an optimizer that adapts to each coordinate.
        noise_std: standard deviation of the noise on an entry of the mean gradient, absolute.
    """

    name: str
    optimizer: str
    noise_std: float

    @property
    def adaptive(self) -> bool:
        """Whether the optimizer divides by a second moment."""
        return self.optimizer != "sgd"


def measure_gap(
    text: PublicText,
    optimizer: str,
    noise_std: float,
    max_grad_norm: float,
    *,
    steps: int,
    rows: int,
    seed: int = 0,
) -> Gap:
    """Train on public text with and without noise, and compare the steps to one loss.

    The weights of ``text.model`` end as the noise-free arm left them.

    Args:
        text: public text and model.
        optimizer: "sgd", or "adam" for any adaptive optimizer.
        noise_std: standard deviation of the noise on an entry of the *mean* gradient, absolute:
            ``noise_multiplier * max_grad_norm / batch_size``.
        max_grad_norm: clipping norm C of one row.
        steps: steps of each training, >= 1.
        rows: rows per step.
        seed: random seed of the rows and of the noise.

    Raises:
        ValueError: if an argument is out of range, or the text has too few rows.
    """
    steps, rows = _validate.integer("steps", steps), _validate.integer("rows", rows)
    held = range(min(HELD_OUT, len(text.rows) // 2))
    if len(text.rows) - len(held) < rows:
        _validate.fail("public", f"text of at least {rows + len(held)} rows", len(text.rows))
    kind = "sgd" if optimizer == "sgd" else "adam"
    arms = [Arm("with noise", kind, noise_std), Arm("without noise", kind, 0.0)]
    if kind != "sgd":
        arms.insert(0, Arm("SGD without noise", "sgd", 0.0))
    start = {name: p.detach().clone() for name, p in text.trained.items()}
    held_batches = [*text.batches(held)]
    found: dict[str, Trial] = {}

    def losses(arm: Arm, rate: float) -> list[float]:
        assign(text, start)
        return _train(text, arm, rate, max_grad_norm, steps, rows, len(held), seed)
    return Gap((), 1.0, None)
