"""Gap in steps between training with and without noise, from short trainings on public text.

Each arm trains the same initial weights on public text with clipped gradients. The noisy arm adds
the noise that the private run adds to its mean gradient; the noise-free arm adds none. After each
step, held-out public rows give a score. For classes, the score is the mean of ``1 - p(label)``,
which stays bounded even if the model is overconfident; for other tasks, the score is the loss. The
ratio is the number of steps of the noisy arm divided by the number of steps in which the noise-free
arm reaches the same score.

No quantity is fitted. The model, the trained part, the clipping norm and the noise are those of
the run. The text, the labels and the number of rows per step differ. The optimizers are SGD with
momentum 0.9, and Adam with torch's defaults, whatever beta1 and weight decay the run has.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp._terminal import progress
from lowrank_dp.grads import Batch
from lowrank_dp.models.targets import row_losses
from lowrank_dp.plan.public_text import PublicText

FACTOR = 10**0.5  # ratio of neighbouring learning rates in the grid
# (adaptive, noisy) -> learning rates that are tried first; for a clipping norm of 1
RATES = {
    (True, False): (3e-4, 1e-3, 3e-3),
    (True, True): (3e-3, 1e-2, 3e-2),
    (False, False): (1.0, 3.0, 10.0),
    (False, True): (1.0, 3.0, 10.0),
}
HELD_OUT = 128  # number of held-out rows that give the score
SHARE = 0.9  # share of the smaller gain at which the steps of two arms are compared
WINDOW = 3  # number of steps in the running median
MIN_GAIN = 0.01  # least fall of the score of an arm whose steps can be compared


@dataclass(frozen=True)
class Trial:
    """One arm of the comparison, at its best learning rate.

    Attributes:
        name: the arm in words.
        rate: learning rate with the lowest mean score over the run.
        rates: all learning rates that were tried.
        scores: (steps + 1,) held-out score before the first step and after each step; lower is
            better.
    """

    name: str
    rate: float
    rates: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def is_inside(self) -> bool:
        """Whether the best rate lies between two others; a rate at an end may not be the best."""
        return min(self.rates) < self.rate < max(self.rates)

    @property
    def gain(self) -> float:
        """Decrease of the smoothed score over the training, >= 0."""
        return self.scores[0] - _smooth(self.scores)[-1]


@dataclass(frozen=True)
class Gap:
    """Gap in steps between training with and without noise, predicted on public text.

    Attributes:
        trials: the arms. For SGD: with noise, without noise. For any other optimizer: SGD without
            noise, Adam with noise, Adam without noise.
        ratio: number of steps of the noisy arm, divided by the number of steps in which the
            noise-free arm reaches the same score. A perfect denoiser could save the share
            ``1 - 1 / ratio`` of the steps. None if an arm's score falls by less than ``MIN_GAIN``.
        adaptivity: number of steps of SGD, divided by the number of steps in which Adam reaches
            the same score, both without noise. None if the optimizer is SGD, or if an arm's score
            falls by less than ``MIN_GAIN``.
    """

    trials: tuple[Trial, ...]
    ratio: float | None
    adaptivity: float | None

    @property
    def saved(self) -> float | None:
        """Share of the steps that training without noise would save; None without a ratio."""
        return None if self.ratio is None else max(0.0, 1 - 1 / self.ratio)


@dataclass(frozen=True)
class Arm:
    """Optimizer and noise of one arm.

    Attributes:
        name: the arm in words.
        optimizer: "sgd" (momentum 0.9), or the name of an adaptive optimizer.
        noise_std: standard deviation of the noise on an entry of the mean gradient, absolute.
    """

    name: str
    optimizer: str
    noise_std: float

    @property
    def adaptive(self) -> bool:
        """Whether the optimizer divides each coordinate by the root of its second moment."""
        return self.optimizer != "sgd"


def measure_gap(
    text: PublicText,
    optimizer: str,
    noise_std: float,
    max_grad_norm: float,
    *,
    steps: int,
    rows: int | None = None,
    seed: int = 0,
) -> Gap:
    """Train on public text with and without noise, and compare the numbers of steps to one score.

    At the end, ``text.model`` has the weights that the noise-free arm reached.

    Args:
        text: public text and model.
        optimizer: "sgd", "adam" or "adamw"; the trainings use Adam for the latter two.
        noise_std: standard deviation of the noise on an entry of the *mean* gradient, absolute:
            ``noise_multiplier * max_grad_norm / batch_size``.
        max_grad_norm: clipping norm C of one row, absolute.
        steps: number of steps of each training, >= 1.
        rows: number of rows per step. None takes 128 if the blocks below the first trained block
            are frozen, else 32.
        seed: random seed of the rows and of the noise.

    Raises:
        ValueError: if an argument is out of range, or the text has too few rows.
    """
    steps = _validate.integer("steps", steps)
    rows = _validate.integer("rows", rows or (128 if text.prefix else 32))
    held = range(min(HELD_OUT, len(text.rows) // 2))
    if len(text.rows) - len(held) < rows:
        _validate.fail("public", f"text of at least {rows + len(held)} rows", len(text.rows))
    kind = "sgd" if optimizer == "sgd" else "adam"
    name = {"sgd": "SGD", "adam": "Adam"}[kind]
    arms = [
        Arm(f"{name} with noise", kind, noise_std),
        Arm(f"{name} without noise", kind, 0.0),
    ]
    if kind != "sgd":
        arms.insert(0, Arm("SGD without noise", "sgd", 0.0))
    start = _weights(text)
    held_batches = [*text.batches(held)]
    ends: dict[float, dict[str, Tensor]] = {}

    def scores(rate: float, arm: Arm) -> list[float]:
        _assign(text, start)
        draws = torch.Generator().manual_seed(seed)
        found = [_held_out_score(text, held_batches)]
        for _ in _steps(text, arm, rate, max_grad_norm, steps, rows, len(held), draws):
            found.append(_held_out_score(text, held_batches))
        ends[rate] = _weights(text) if arm.noise_std == 0 else {}
        return found

    trials = []
    for arm in progress(arms, "short trainings on public text"):
        ends.clear()
        unit = 1.0 if arm.adaptive else 1.0 / max_grad_norm
        first = [rate * unit for rate in RATES[arm.adaptive, arm.noise_std > 0]]
        rate, curves = best_rate(partial(scores, arm=arm), first)
        trials.append(Trial(arm.name, rate, tuple(sorted(curves)), tuple(curves[rate])))
    _assign(text, ends[trials[-1].rate])
    *slow, noisy, clean = trials
    return Gap(
        tuple(trials),
        steps_ratio(noisy.scores, clean.scores),
        steps_ratio(slow[0].scores, clean.scores) if slow else None,
    )


def best_rate(
    scores: Callable[[float], Sequence[float]], first: Sequence[float], *, most: int = 5
) -> tuple[float, dict[float, Sequence[float]]]:
    """Find the learning rate with the lowest mean score over a run.

    While the best rate is at an end of the grid and fewer than ``most`` rates were tried, the grid
    is extended at this end by one rate, by ``FACTOR``.

    Args:
        scores: function from a learning rate to the scores of a run; lower is better. A run with a
            score that is not finite is never the best.
        first: learning rates that are tried first.
        most: largest number of tried rates.

    Returns:
        The best rate, and the scores of every rate that was tried.
    """
    curves = {rate: scores(rate) for rate in first}

    def mean(rate: float) -> float:
        value = sum(curves[rate]) / len(curves[rate])
        return value if math.isfinite(value) else math.inf

    best = min(curves, key=mean)
    while len(curves) < most and best in (min(curves), max(curves)):
        new = best / FACTOR if best == min(curves) else best * FACTOR
        curves[new] = scores(new)
        best = min(curves, key=mean)
    return best, curves


def steps_ratio(slow: Sequence[float], fast: Sequence[float], share: float = SHARE) -> float | None:
    """Return the ratio of the numbers of steps in which ``slow`` and ``fast`` reach one score.

    The compared score is that of ``share`` of the smaller gain of the two arms. Scores are running
    minima of running medians of ``WINDOW`` values, interpolated linearly between steps. The ratio
    is below 1 if ``slow`` needs fewer steps. The ratio is None if an arm gains less than
    ``MIN_GAIN``.

    Args:
        slow, fast: (steps + 1,) scores before the first step and after each step; lower is better.
        share: share of the gain, in (0, 1].
    """
    slow, fast = _smooth(slow), _smooth(fast)
    start = slow[0]
    gain = min(start - slow[-1], start - fast[-1])
    if not gain >= MIN_GAIN:
        return None
    target = start - share * gain
    return _crossing(slow, target) / _crossing(fast, target)


def _smooth(scores: Sequence[float]) -> list[float]:
    """Return the running minimum of the running median; the first score is kept unchanged."""
    medians = [scores[0]]
    medians += [
        statistics.median(scores[max(0, i - WINDOW + 1) : i + 1]) for i in range(1, len(scores))
    ]
    return list(itertools.accumulate(medians, min))


def _crossing(scores: Sequence[float], target: float) -> float:
    """Return the interpolated number of steps after which decreasing scores reach ``target``."""
    last = next(i for i, score in enumerate(scores) if score <= target)
    before, after = scores[last - 1], scores[last]
    return last - 1 + (before - target) / (before - after)


def _steps(
    text: PublicText,
    arm: Arm,
    rate: float,
    max_grad_norm: float,
    steps: int,
    rows: int,
    held: int,
    draws: torch.Generator,
) -> Iterator[None]:
    """Take the steps of one training on all rows of the text except the first ``held`` rows."""
    trained = text.trained
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(trained.values(), lr=rate)
        if arm.adaptive
        else torch.optim.SGD(trained.values(), lr=rate, momentum=0.9)
    )
    for _ in range(steps):
        chosen = torch.randperm(len(text.rows) - held, generator=draws)[:rows] + held
        sums = text.clipped_sum(chosen.tolist(), max_grad_norm)
        for name, p in trained.items():
            noise = torch.randn(p.shape, generator=draws).to(p) * arm.noise_std
            p.grad = (sums[name] / rows).to(p) + noise
        optimizer.step()
        optimizer.zero_grad()
        yield


def _weights(text: PublicText) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in text.trained.items()}


@torch.no_grad()
def _assign(text: PublicText, weights: dict[str, Tensor]) -> None:
    for name, p in text.trained.items():
        p.copy_(weights[name])


@torch.no_grad()
def _held_out_score(text: PublicText, batches: Sequence[Batch]) -> float:
    """Return the mean score of the rows: ``1 - p(label)`` for classes, else the loss."""
    total, rows = 0.0, 0
    for batch in batches:
        if text.kind == "classification":
            p = text.model(**batch).logits.softmax(-1).gather(1, batch["labels"][:, None])
            total += float((1 - p).sum())
        else:
            total += float(row_losses(text.model, batch, text.kind).sum())
        rows += len(batch["input_ids"])
    return total / rows
