"""Checks that stop a run whose numbers would mean nothing: each names what it saw and the fix.

``checks`` calls those of privacy in each step. They read clean gradients, in the training process
only, and a message says nothing of their values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowrank_dp.grads.clipping import row_gradients
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.restore import SCHEMES
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.noise_checks import NoiseCheck

MAX_LOSS_RATIO = 20.0  # times the loss before the first step
ROUNDING = 1.01  # times the longest a sum may be: clip factors in bfloat16 are off by less
COMPARED_ENTRIES = 128  # number of entries of each gradient that are compared


def check_covered(model: nn.Module, optimizer: torch.optim.Optimizer, sums: Iterable[str]) -> None:
    """Refuse a parameter that the optimizer would move but the mechanism does not cover."""
    names = {id(p): name for name, p in model.named_parameters()}
    covered = set(sums)
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names.get(id(p), "a parameter outside the model")
            if name not in covered:
                raise ValueError(
                    f"{name} would be trained but is neither clipped nor noised: "
                    "freeze it, or leave it out of the optimizer"
                )


def check_loss(loss: float, first: float, step: int) -> None:
    """Refuse an evaluation loss that is not finite or has exploded."""
    if not math.isfinite(loss) or loss > MAX_LOSS_RATIO * max(first, 0.1):
        raise ValueError(
            f"loss on the validation split is {loss:.4g} after {step} steps ("
            f"{first:.4g} before the first): lower the learning rate or the noise"
        )


@contextmanager
def diverging(step: int) -> Iterator[None]:
    """What a gradient that is not finite means, and what to do about it."""
    try:
        yield
    except ValueError as error:
        if "not finite" not in str(error):
            raise
        raise ValueError(
            f"{error}, in step {step + 1}: lower the learning rate or the noise"
        ) from error


@contextmanager
def memory(micro_batch_size: int) -> Iterator[None]:
    """What to do about a device that is too small."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the device ran out of memory with micro_batch_size {micro_batch_size}: "
            "lower it (the result stays the same), or max_length"
        ) from error


def check_noise(clean: Mapping[str, Tensor], noisy: Mapping[str, Tensor], noise_std: float) -> None:
    """Refuse noise of one step that is not independent N(0, noise_std^2) in every entry."""
    NoiseCheck(noise_std, steps=1).check(clean, noisy, spectrum=True)


def check_sum(clean: Mapping[str, Tensor], max_norm: float) -> None:
    """Refuse a clipped sum that is longer, over all parameters, than its rows may make it."""
    norms = torch.stack(
        [torch.linalg.vector_norm(total).double().cpu() for total in clean.values()]
        or [torch.zeros(())]
    )
    if not float(torch.linalg.vector_norm(norms)) <= ROUNDING * max_norm:
        raise ValueError(
            "the clipped sum of a step is longer than the bound max_grad_norm for "
            "each of its rows allows: gradients are not clipped, or a row counts more "
            "than once, and the privacy stated would not hold"
        )


def check_clipping(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    max_grad_norm: float,
    clip: Callable[[Mapping[str, Tensor], float], Mapping[str, Tensor]],
    autocast_dtype: torch.dtype | None = None,
) -> None:
    """Compare ``clip(batch, bound)`` with gradients that autograd takes row by row.

    The clip factors are computed here, so that a fault in the engine's own factors is noticed. The
    bound is ``max_grad_norm``, or less where it would not clip every row of ``batch``. The
    difference may be a hundredth of the bound for each row, and a fifth under autocast.
    """
    gradients = row_gradients(model, batch, autocast_dtype=autocast_dtype)
    norms = [
        math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        for gradient in gradients
    ]
    if not all(0 < norm < math.inf for norm in norms):
        return  # nothing to clip, or a loss that the step itself refuses
    bound = min(max_grad_norm, min(norms) / 2)
    error = 0.0
    for name, total in clip(batch, bound).items():
        want = sum(
            g[name].double() * (bound / norm)
            for g, norm in zip(gradients, norms, strict=True)
            if name in g
        )
        error += float((total.double() - want).square().sum())
    tolerance = 0.01 if autocast_dtype is None else 0.2
    if not math.sqrt(error) <= tolerance * bound * len(gradients):
        raise ValueError(
            "clipped gradients of single rows are not those that autograd gives, each "
            "clipped over all parameters together to max_grad_norm: the privacy "
            "stated would not hold"
        )


def check_gradient(
    parameters: Mapping[str, Tensor], expected: Mapping[str, Tensor], noise_std: float
) -> None:
    """Refuse gradients in ``.grad`` that are not ``expected``, by some entries of each."""
    for name, want in expected.items():
        grad = parameters[name].grad
        some = want.flatten()[:COMPARED_ENTRIES].double()
        found = (
            torch.full_like(some, math.nan)
            if grad is None
            else grad.flatten()[:COMPARED_ENTRIES].double()
        )
        if not bool(((found - some).abs() <= 0.02 * (some.abs() + noise_std)).all()):
            raise ValueError(
                f"the optimizer's gradient of {name} is not what the mechanism "
                "released: it may hold clean gradients, and the privacy stated would "
                "not hold"
            )


def check_mechanism(
    config: TrainConfig, mechanism: GaussianMechanism, num_units: int, delta: float
) -> None:
    """Refuse a mechanism, or a scheme, other than the configuration asks for."""
    if not (SCHEMES[config.scheme].private or config.diagnostic):
        raise ValueError(
            f"scheme {config.scheme!r} reads clean gradients, so the run would not be "
            "private: choose another, or mark the run with diagnostic"
        )
    for name, found, asked in (
        ("sample_rate", mechanism.sample_rate, config.batch_size / num_units),
        ("max_grad_norm", mechanism.max_grad_norm, config.max_grad_norm),
        (
            "noise_multiplier",
            mechanism.noise_multiplier,
            mechanism.noise_multiplier
            if config.noise_multiplier is None
            else config.noise_multiplier,
        ),
    ):
        if not math.isclose(found, asked, rel_tol=1e-9):
            raise ValueError(
                f"{name} of the mechanism is {found:g}, and the configuration gives "
                f"{asked:g}: the privacy stated would not hold"
            )
    if config.epsilon is not None:
        spent = mechanism.epsilon(config.steps, delta)
        if not spent <= config.epsilon * (1 + 1e-6):
            raise ValueError(
                f"noise_multiplier of the mechanism gives epsilon {spent:.6g} after "
                f"{config.steps} steps, more than {config.epsilon:g}"
            )


def check_releases(releases: int, steps: int) -> None:
    """Refuse a ledger with fewer releases than steps were made."""
    if releases < steps:
        raise ValueError(
            f"the ledger holds {releases} releases, and {steps} steps were made: "
            "epsilon would be too small; start afresh in another folder"
        )


class MovementCheck:
    """Refuse weights that stay where they were although they were given gradients.

    Created before the first step; ``note`` sees the gradients of a step, ``check`` looks.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._start = {name: _here(p.detach()).clone() for name, p in parameters.items()}
        self._pushed: set[str] = set()

    def note(self) -> None:
        """Remember which parameters have a gradient that is not zero."""
        self._pushed |= {
            name
            for name, p in self._parameters.items()
            if p.grad is not None and bool((_here(p.grad) != 0).any())
        }

    def check(self, steps: int) -> None:
        """Raise if a parameter that was pushed has not moved; then forget the start."""
        still = [
            name
            for name in self._parameters
            if name in self._pushed
            and torch.equal(_here(self._parameters[name].detach()), self._start[name])
        ]
        self._start.clear()
        if still:
            raise ValueError(
                f"{still[0]} (one of {len(still)}) has not moved in {steps} steps "
                "though it has gradients: the optimizer holds other tensors than the "
                "model (moved or wrapped after it was made?), or the learning rate is "
                "too small for float32"
            )


def _here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
