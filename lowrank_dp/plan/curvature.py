"""Curvature of the loss along a direction, and loss decrease of a step with and without noise.

The curvature is that of the generalised Gauss-Newton matrix ``H = J^T L J`` (Schraudolph, Neural
Computation 14, 2002), with J the derivative of the logits and L the Hessian of the loss in the
logits. H is positive semidefinite, so the quadratic model has a best step. The trace of the
Hessian, by contrast, can become negative after a few steps of fine-tuning.

Consider a step ``theta - eta (d + s z)``, z ~ N(0, I), along a direction d of slope ``a = g.d``. In
the quadratic model, the step changes the loss by ``-eta a + eta^2 / 2 (d'Hd + s^2 tr H)`` on
average. The best rate eta decreases the loss by ``a^2 / (2 (d'Hd + s^2 tr H))``. Noise therefore
divides the gain of a step by ``1 + s^2 tr H / d'Hd``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowrank_dp import _validate
from lowrank_dp.grads import Batch
from lowrank_dp.losses import LOSS_OF_KIND, LOSSES

Tensors = Mapping[str, Tensor]  # by parameter name


@dataclass(frozen=True)
class StepGain:
    """Decrease of the mean loss of some rows in one step, by the quadratic model.

    Attributes:
        slope: ``g.d``, the decrease of the loss per unit of the learning rate. A step along a
            direction of negative slope raises the loss; its gain is 0.
        curvature: ``d'Hd``, >= 0.
        trace: ``tr H``, estimated, >= 0.
        noise_std: s, standard deviation of the noise on an entry of d, absolute.
    """

    slope: float
    curvature: float
    trace: float
    noise_std: float

    @property
    def clean_gain(self) -> float:
        """Decrease of the loss, in nats, by the best step along d without noise."""
        return _ratio(max(self.slope, 0.0) ** 2, 2 * self.curvature)

    @property
    def noisy_gain(self) -> float:
        """Expected decrease of the loss, in nats, by the best step along d with noise."""
        return _ratio(
            max(self.slope, 0.0) ** 2, 2 * (self.curvature + self.noise_std**2 * self.trace)
        )

    @property
    def noise_cost(self) -> float:
        """``clean_gain / noisy_gain``, >= 1: number of noisy steps that equal one clean step."""
        return 1 + _ratio(self.noise_std**2 * self.trace, self.curvature)


def step_gain(
    model: nn.Module,
    batches: Sequence[Batch],
    kind: str,
    direction: Tensors,
    noise_std: float,
    *,
    probes: int = 4,
    seed: int = 0,
) -> StepGain:
    """Measure the loss decrease of a step along ``direction``, and the cost of noise.

    NON-PRIVATE if the rows are private.

    Args:
        model: model in eval mode. The keys of ``direction`` are the names of its trainable
            parameters.
        batches: batches of rows with labels. The loss is the mean over all rows.
        kind: kind of the task; ``losses.LOSS_OF_KIND`` gives the loss of each kind.
        direction: d, by parameter name, in the shapes of the parameters. A step moves the
            parameters by ``-eta d``.
        noise_std: s >= 0, standard deviation of the noise on an entry of d, absolute (for a
            DP-SGD mean: ``noise_multiplier * max_grad_norm / batch_size``).
        probes: number of random sign vectors for the trace (Hutchinson 1989).
        seed: random seed of the sign vectors.

    Raises:
        ValueError: if an argument is out of range or no row is given.
    """
    noise_std = _validate.real("noise_std", noise_std, low=0)
    probes = _validate.integer("probes", probes)
    generator = torch.Generator().manual_seed(seed)
    signs = [{name: _signs(d, generator) for name, d in direction.items()} for _ in range(probes)]
    slope, (curvature, *traces) = slope_and_curvatures(model, batches, kind, [direction, *signs])
    return StepGain(slope, curvature, sum(traces) / probes, noise_std)


def slope_and_curvatures(
    model: nn.Module, batches: Iterable[Batch], kind: str, directions: Sequence[Tensors]
) -> tuple[float, list[float]]:
    """Compute ``g.d`` of the first direction, and ``d'Hd`` of each direction.

    The loss is the mean over all rows. Arguments and errors are those of :func:`step_gain`. Each
    product costs one backward pass per direction and batch.
    """
    loss_of = LOSSES[LOSS_OF_KIND[_validate.choice("kind", kind, LOSS_OF_KIND)]]
    slope, curvatures, rows = 0.0, [0.0] * len(directions), 0
    for batch in batches:
        changes, logits = _logit_changes(model, batch, directions)
        logits.requires_grad_()
        losses, _ = loss_of(logits, batch["labels"])
        (first,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
        slope += float((first.detach() * changes[0]).sum())
        for i, change in enumerate(changes):
            (second,) = torch.autograd.grad(first, logits, change, retain_graph=True)
            curvatures[i] += float((second * change).sum())
        rows += len(losses)
    if not rows:
        raise ValueError("batches must hold at least one row, got none")
    return slope / rows, [max(value, 0.0) / rows for value in curvatures]


def _logit_changes(
    model: nn.Module, batch: Batch, directions: Sequence[Tensors]
) -> tuple[list[Tensor], Tensor]:
    """Compute ``J d`` for each direction, in the shape of the logits, and the logits.

    ``J^T u`` is linear in u, so the derivative of ``d . J^T u`` in u is J d. This computation is a
    backward pass through a backward pass, which only the "math" attention supports.
    """
    named = dict(model.named_parameters())
    parameters = [named[name] for name in directions[0]]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        logits = model(**batch).logits
        u = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.autograd.grad(
            logits, parameters, u, create_graph=True, materialize_grads=True
        )
        changes = [
            torch.autograd.grad(
                pulled,
                u,
                [d[name].to(p.dtype) for name, p in zip(d, parameters, strict=True)],
                retain_graph=True,
                materialize_grads=True,
            )[0]
            for d in directions
        ]
    return changes, logits.detach()


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return (2 * signs - 1).to(like)


def _ratio(part: float, whole: float) -> float:
    """Return ``part / whole``; 0 for 0 / 0, and infinity for a positive ``part`` over 0."""
    return part / whole if whole > 0 else (math.inf if part > 0 else 0.0)
