"""Checks that stop a run whose result would be meaningless; each message names the cause and a fix.

Every check raises ``ValueError``. ``checks`` calls the checks of privacy in every step. These
checks read clean gradients, in the training process only, and their messages reveal nothing about
the gradients' values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowrank_dp._rounding import rounded_up
from lowrank_dp._terminal import is_lack_of_memory
from lowrank_dp.evaluation.inference import NotFinite
from lowrank_dp.grads.clipping import row_gradients
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.restore import SCHEMES
from lowrank_dp.train.config import TrainConfig

MAX_LOSS_RATIO = 20.0  # largest loss, relative to the loss before the first step
ROUNDING = 1.01  # tolerance of a sum's norm; clip factors in bfloat16 are off by less
COMPARED_ENTRIES = 128  # number of entries of each gradient that are compared


class Diverged(ValueError):
    """A run whose loss or gradient is not finite, or whose loss is far above the first loss.

    In half precision, also a run whose gradients are mostly rounding errors. The same configuration
    would diverge again.
    """


def check_covered(model: nn.Module, optimizer: torch.optim.Optimizer, sums: Iterable[str]) -> None:
    """Refuse a parameter that the optimizer moves and the mechanism does not cover.

    Args:
        model: the model; messages use its parameter names.
        optimizer: optimizer of the trained parameters.
        sums: names of the parameters that are clipped and noised.
    """
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
    """Raise :class:`Diverged` for a loss that is not finite, or far above the first loss.

    Args:
        loss: loss on the validation split.
        first: the loss before the first step; less than 0.1 counts as 0.1.
        step: number of steps taken.
    """
    if not math.isfinite(loss) or loss > MAX_LOSS_RATIO * max(first, 0.1):
        raise Diverged(
            f"loss on the validation split is {loss:.4g} after {step} steps ("
            f"{first:.4g} before the first): lower the learning rate or the noise"
        )


@contextmanager
def diverging(step: int) -> Iterator[None]:
    """Turn the error of a gradient or of logits that are not finite into :class:`Diverged`.

    The message gets the step and a remedy, unless it has a remedy.
    """
    try:
        yield
    except NotFinite as error:
        raise Diverged(str(error)) from error
    except ValueError as error:
        if "not finite" not in str(error):
            raise
        raise Diverged(
            f"{error}, in step {step + 1}: lower the learning rate or the noise"
        ) from error


@contextmanager
def memory(micro_batch_size: int) -> Iterator[None]:
    """Turn a lack of memory into a ``ValueError`` that names the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        raise ValueError(
            f"the device ran out of memory with micro_batch_size {micro_batch_size}: "
            "lower it, also to resume a run (the result changes by rounding only), or start a new "
            "run with a smaller max_length"
        ) from error


def check_sum(clean: Mapping[str, Tensor], max_norm: float) -> None:
    """Refuse a clipped sum whose norm over all parameters exceeds ``max_norm``, absolute."""
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
    half: bool = False,
) -> None:
    """Compare ``clip(batch, max_norm)`` with gradients that autograd takes row by row.

    This function computes the clip factors itself, so that a fault in the backend's own factors is
    noticed. The norm is ``max_grad_norm``, or less if ``max_grad_norm`` would not clip every row.
    The largest allowed difference per row is 0.01 times the norm, and 0.2 times the norm in half
    precision. In half precision, the gradient of a row that the model fits almost exactly can be
    mostly rounding error. The difference that rounding makes to the gradients of autograd is
    therefore allowed too, three times. If this is not enough, the weights are so large that
    rounding decides the gradients, and the error is :class:`Diverged`.

    Args:
        model: the model in evaluation mode.
        batch: rows to compare.
        max_grad_norm: clipping norm C > 0, absolute.
        clip: function that returns the clipped sum of a batch, by parameter name.
        autocast_dtype: dtype of mixed precision, or None.
        half: whether ``clip`` rounds to half precision where autograd does not.
    """
    gradients = row_gradients(model, batch, autocast_dtype=autocast_dtype)
    norms = [_norm(gradient) for gradient in gradients]
    if not all(0 < norm < math.inf for norm in norms):
        return  # nothing to clip, or a gradient that the step itself refuses
    max_norm = min(max_grad_norm, min(norms) / 2)
    error = 0.0
    for name, total in clip(batch, max_norm).items():
        want = sum(
            g[name].double() * (max_norm / norm)
            for g, norm in zip(gradients, norms, strict=True)
            if name in g
        )
        error += float((total.double() - want).square().sum())
    found, is_half = math.sqrt(error) / max_norm, half or autocast_dtype is not None
    allowed = (0.2 if is_half else 0.01) * len(gradients)
    rounding = _rounding(model, batch) if is_half and found > allowed else 0.0
    if found > allowed + 3 * rounding and rounding > 0.05 * len(gradients):
        raise Diverged(
            "rounding to half precision turns the gradients of single rows so far that their "
            "clipping cannot be checked: lower the learning rate, or train in float32"
        )
    if not found <= allowed + 3 * rounding:
        raise ValueError(
            "clipped gradients of single rows are not those that autograd gives, each "
            "clipped over all parameters together to max_grad_norm: the privacy "
            "stated would not hold"
        )


def _norm(gradient: Mapping[str, Tensor]) -> float:
    """Return the norm of a row's gradient over all parameters."""
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))


def _rounding(model: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """Return how far bfloat16 turns the gradients of the rows, each scaled to norm 1.

    The number is a sum over rows of distances in [0, 2]; infinite without a direction.
    """
    rounded, exact = (
        row_gradients(model, batch, autocast_dtype=dtype) for dtype in (torch.bfloat16, None)
    )
    total = 0.0
    for one, other in zip(rounded, exact, strict=True):
        norms = [_norm(row) for row in (one, other)]
        if not all(0 < norm < math.inf for norm in norms):
            return math.inf
        apart = sum(
            float((one[n].double() / norms[0] - other[n].double() / norms[1]).square().sum())
            for n in other
        )
        total += math.sqrt(apart)
    return total


def check_gradient(
    parameters: Mapping[str, Tensor], expected: Mapping[str, Tensor], noise_std: float
) -> None:
    """Refuse a ``.grad`` whose first entries differ from those of the expected gradient.

    Args:
        parameters: parameters by name, with their gradients.
        expected: some or all of the expected gradients by parameter name, flattened.
        noise_std: standard deviation of the noise on an entry of a gradient, in the units of the
            gradient.
    """
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
    """Refuse a mechanism or a scheme that differs from what the configuration asks for.

    Args:
        config: configuration of the run.
        mechanism: mechanism of the run.
        num_units: number of units of privacy that are trained on.
        delta: delta at which epsilon is stated.
    """
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
                f"noise_multiplier of the mechanism gives epsilon {rounded_up(spent, 6)} after "
                f"{config.steps} steps, more than {config.epsilon:g}"
            )


def check_releases(releases: int, steps: int) -> None:
    """Refuse a ledger that holds fewer releases than the run has made steps."""
    if releases < steps:
        raise ValueError(
            f"the ledger holds {releases} releases, and {steps} steps were made: "
            "epsilon would be too small; start afresh in another folder"
        )


class MovementCheck:
    """Refuse parameters that do not move although they have gradients.

    A parameter that the optimizer holds may stay unchanged in the first steps while others move:
    its steps may be smaller than the float32 spacing. LoRA's A is an example while B is near 0. In
    a resumed run, all of them may, where a schedule has lowered the learning rate.

    The object is made before the first step of the run or of the resumed part; :meth:`note` is
    called in every step, and :meth:`check` after some steps.

    Args:
        parameters: trained parameters by name.
        optimizer: optimizer of the parameters.
        resumed: whether the run has made steps before.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        resumed: bool = False,
    ) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._not_held = {name for name, p in parameters.items() if id(p) not in held}
        self._parameters, self._resumed = parameters, resumed
        self._start = {name: _local(p.detach()).clone() for name, p in parameters.items()}
        self._with_gradient: set[str] = set()

    def note(self) -> None:
        """Record which parameters have a gradient that is not zero."""
        self._with_gradient |= {
            name
            for name, p in self._parameters.items()
            if p.grad is not None and bool((_local(p.grad) != 0).any())
        }

    def check(self, steps: int) -> None:
        """Raise ``ValueError`` for parameters with gradients that have not moved since the start.

        A parameter has not moved if no entry has changed. If any parameter has clearly moved, or
        the run was resumed, only parameters that the optimizer does not hold are reported. A
        parameter has clearly moved if an entry has changed by more than the float32 spacing at the
        mean size of its entries. A smaller change of an entry near 0 proves nothing, since any step
        changes such an entry. A parameter that starts at 0 is compared with the largest mean size
        of all parameters.

        Args:
            steps: number of steps since the start.
        """
        sizes = {name: float(start.abs().mean()) for name, start in self._start.items()}
        largest, eps = max(sizes.values(), default=0.0), torch.finfo(torch.float32).eps
        moved = {
            name: float((_local(self._parameters[name].detach()) - start).abs().max())
            for name, start in self._start.items()
            if name in self._with_gradient and start.numel()
        }
        self._start.clear()
        still = [name for name, most in moved.items() if most == 0]
        clear = any(most > eps * (sizes[name] or largest) for name, most in moved.items())
        if clear or self._resumed:
            still = [name for name in still if name in self._not_held]
        if still:
            raise ValueError(
                f"{still[0]} (one of {len(still)}) has not moved in {steps} steps "
                "though it has gradients: the optimizer holds other tensors than the "
                "model (moved or wrapped after it was made?), or the learning rate is "
                "too small for float32"
            )


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
