"""Checks that stop a run whose numbers would mean nothing: each names what it saw and the fix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowrank_dp.spectrum.random_matrix import bulk_edge

EXPLODED = 20.0  # times the loss before the first step
DEVIATIONS = 6.0  # a false alarm of either noise check: at most 1 in 10^8


def check_covered(model: nn.Module, optimizer: torch.optim.Optimizer,
                  sums: Iterable[str]) -> None:
    """Refuse a parameter that the optimizer would move but the mechanism does not cover."""
    names = {id(p): name for name, p in model.named_parameters()}
    covered = set(sums)
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names.get(id(p), "a parameter outside the model")
            if name not in covered:
                raise ValueError(f"{name} would be trained but is neither clipped nor noised: "
                                 "freeze it, or leave it out of the optimizer")


def check_loss(loss: float, first: float, step: int) -> None:
    """Refuse an evaluation loss that is not finite or has exploded."""
    if not math.isfinite(loss) or loss > EXPLODED * max(first, 0.1):
        raise ValueError(f"loss on the validation split is {loss:.4g} after {step} steps ("
                         f"{first:.4g} before the first): lower the learning rate or the noise")


@contextmanager
def diverging(step: int) -> Iterator[None]:
    """What a gradient that is not finite means, and what to do about it."""
    try:
        yield
    except ValueError as error:
        if "not finite" not in str(error):
            raise
        raise ValueError(f"{error}, in step {step + 1}: lower the learning rate or the noise"
                         ) from error


@contextmanager
def memory(micro_batch_size: int) -> Iterator[None]:
    """What to do about a device that is too small."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the device ran out of memory with micro_batch_size {micro_batch_size}: "
                         "lower it (the result stays the same), or max_length") from error


def check_noise(clean: Mapping[str, Tensor], noisy: Mapping[str, Tensor], noise_std: float) -> None:
    """Refuse noise whose size or spectrum is not that of independent N(0, noise_std^2) entries.

    What was added must have the nominal standard deviation over all entries (chi-squared), and in
    one matrix a top singular value at the bulk edge: at most ``noise_std *
    (sqrt(m) + sqrt(n) + t)`` but for a probability of exp(-t^2/2) (Gordon's bound with Gaussian
    concentration), which correlated noise of the right size exceeds.
    """
    def added(name: str) -> Tensor:
        return noisy[name].double() - clean[name].double()

    if not clean:  # of shards, there may be fewer than processes
        return
    count = sum(total.numel() for total in clean.values())
    std = math.sqrt(sum(float(added(name).square().sum()) for name in clean) / count)
    # float32 sums are exact to about 1e-6 of their largest entry
    rounding = 1e-6 * max(float(total.abs().max()) for total in clean.values()) / noise_std
    allowed = DEVIATIONS / math.sqrt(2 * count) + rounding
    if not abs(std / noise_std - 1) <= allowed:
        raise ValueError(f"noise has standard deviation {std:.4g} over {count:,} entries, and must "
                         f"have {noise_std:.4g} within {allowed:.2%}: the privacy stated would not "
                         "hold")
    matrices = [name for name, total in clean.items() if total.ndim == 2]
    if not matrices:
        return
    # the smallest of those large enough for the edge to be sharp
    name = max(matrices, key=lambda name: (min(*clean[name].shape, 256), -clean[name].numel()))
    noise = added(name)
    short = noise if noise.shape[0] <= noise.shape[1] else noise.mT
    top = math.sqrt(float(torch.linalg.eigvalsh(short @ short.mT)[-1]))
    most = bulk_edge((noise.shape[0], noise.shape[1]), noise_std) + DEVIATIONS * noise_std
    if top > most * (1 + rounding):
        raise ValueError(f"noise of {name} has a singular value of {top:.4g}, and independent "
                         f"noise stays below {most:.4g}: its entries are correlated")


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
        self._pushed |= {name for name, p in self._parameters.items()
                         if p.grad is not None and bool((_here(p.grad) != 0).any())}

    def check(self, steps: int) -> None:
        """Raise if a parameter that was pushed has not moved; then forget the start."""
        still = [name for name in self._parameters if name in self._pushed
                 and torch.equal(_here(self._parameters[name].detach()), self._start[name])]
        self._start.clear()
        if still:
            raise ValueError(f"{still[0]} (one of {len(still)}) has not moved in {steps} steps "
                             "though it has gradients: the optimizer holds other tensors than the "
                             "model (moved or wrapped after it was made?), or the learning rate is "
                             "too small for float32")


def _here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
