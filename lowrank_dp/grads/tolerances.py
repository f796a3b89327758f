"""Tolerances for rounding in a comparison of the losses or gradients of two runs."""

from __future__ import annotations

import torch
from torch import nn

from lowrank_dp.grads.factors import HALF_DTYPES
from lowrank_dp.grads.microbatch import MicroBatch

# Rounding of a gradient in a dtype: the first number is relative to the gradient; the second is
# the part of one parameter's gradient that is relative to the gradient of all parameters.
_GRADIENT = {torch.float64: (1e-7, 1e-10), torch.float32: (1e-4, 2e-5)}
_GRADIENT_HALF = (1e-1, 2e-2)
VANISHING = 1e-7  # absolute norm below which a gradient counts as zero
_SMALL_LOSS = 1e-3  # the gradient of a smaller loss is a difference, with a larger relative error


def is_half(model: nn.Module) -> bool:
    """Return whether a parameter of the model is in half precision."""
    return any(p.dtype in HALF_DTYPES for p in model.parameters())


def loss_tolerance(half: bool) -> float:
    """Rounding error of a loss in half precision or not, relative to max(1, loss)."""
    return 5e-2 if half else 1e-4


def loss_allowance(micro_batch: MicroBatch, loss: float) -> float:
    """Rounding error of ``loss``, absolute."""
    return loss_tolerance(is_half(micro_batch.model)) * max(1.0, abs(loss))


def gradient_tolerance(micro_batch: MicroBatch) -> tuple[float, float]:
    """Rounding errors of a gradient, relative to itself and to the gradient of all parameters."""
    if is_half(micro_batch.model):
        return _GRADIENT_HALF
    return _GRADIENT[micro_batch.rounding or next(iter(micro_batch.trained.values())).dtype]


def gradient_allowance(micro_batch: MicroBatch, loss: float) -> float:
    """Rounding error of the gradient of ``loss``, relative to its norm."""
    return gradient_tolerance(micro_batch)[0] * max(1.0, _SMALL_LOSS / max(abs(loss), 1e-30))
