"""Inspection of an optimizer for a restoration: wrappers, noise level, momentum, shards."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_dp import _validate

# key of the running means in an optimizer's state; also the attribute that holds the handle
STATE = "lowrank_dp.restoration"
HANDLE = "_lowrank_dp_restoration"
_OPACUS = ("original_optimizer", "noise_multiplier", "max_grad_norm", "expected_batch_size")


def is_opacus(optimizer: Any) -> bool:
    """Return whether an optimizer is a ``DPOptimizer`` of Opacus, by its attributes."""
    return all(hasattr(optimizer, name) for name in _OPACUS)


def is_adaclip(opacus: Any) -> bool:
    """Return whether a ``DPOptimizer`` adapts its clipping bound (AdaClip)."""
    return hasattr(opacus, "unclipped_num_std")


def watch_bound(opacus: Any, record: Callable[[float], None]) -> None:
    """Call ``record`` with AdaClip's clipping bound just before AdaClip replaces the bound.

    AdaClip replaces the bound between the noise and the step. A hook of the step would therefore
    read the bound of the next step. :func:`unwatch_bound` undoes this function.
    """
    update = opacus.update_max_grad_norm

    def update_max_grad_norm() -> None:
        record(float(opacus.max_grad_norm))
        update()

    vars(opacus)["update_max_grad_norm"] = update_max_grad_norm


def unwatch_bound(opacus: Any) -> None:
    """Undo :func:`watch_bound`."""
    vars(opacus).pop("update_max_grad_norm", None)


def opacus_noise_std(opacus: Any, clip_bound: float) -> float:
    """Return the noise level of the noisy ``p.grad`` of a ``DPOptimizer``, absolute.

    ``clip_bound`` is the clipping bound of the step, absolute.
    """
    std = effective_multiplier(opacus) * clip_bound
    if opacus.loss_reduction == "mean":
        std /= opacus.expected_batch_size * opacus.accumulated_iterations
        std /= getattr(opacus, "world_size", 1)  # under DDP the batch size is per worker
    return std


def unwrap(optimizer: Any) -> Any:
    """Return the optimizer inside Accelerate's wrappers."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def effective_multiplier(opacus: Any) -> float:
    """Return sigma: the noise on an entry of the clipped sum, relative to the clipping bound."""
    sigma = float(getattr(opacus, "_adjusted_noise_multiplier", opacus.noise_multiplier))
    if not sigma > 0:
        raise ValueError(
            f"noise_multiplier of the DPOptimizer must be > 0, got {sigma:g}: without "
            "noise there is nothing to restore, and no privacy"
        )
    if is_adaclip(opacus):  # AdaClip spends a part of the budget on its noisy count
        sigma = (sigma**-2 - (2 * opacus.unclipped_num_std) ** -2) ** -0.5
    return sigma


def require_whole(index: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` if a parameter or gradient is a shard, or is not dense."""
    if hasattr(tensor, "full_tensor") or tensor.layout != torch.strided:
        _validate.fail(
            f"parameter {index}",
            "one dense tensor (a shard's singular values are not "
            "the matrix's: use DDP, or train --shard)",
            type(tensor).__name__,
        )


def warn_of_other_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Warn if an optimizer averages gradients: if Adam's beta1, or a momentum, is above 0."""
    for group in optimizer.param_groups:
        betas = group.get("betas") or (0.0,)
        for name, value in (("betas[0]", betas[0]), ("momentum", group.get("momentum"))):
            if value:
                warnings.warn(
                    f"{name} of {type(optimizer).__name__} should be 0 with a running mean of "
                    f"gradients (momentum_beta or low_pass), got {float(value):g}: the gradients "
                    "are averaged twice",
                    stacklevel=4,
                )
                return


def warn_if_not_restored(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Warn before a step of an optimizer that loaded running means and has no restoration.

    This function is a hook for ``torch.optim.optimizer.register_optimizer_step_pre_hook``.
    """
    if STATE in optimizer.state and HANDLE not in vars(optimizer):
        warnings.warn(
            f"the loaded state of {type(optimizer).__name__} holds the running means of a "
            "restoration, and no restoration is attached: the steps use their gradients "
            "unchanged; call attach_restoration, or delete "
            f"optimizer.state[{STATE!r}]",
            stacklevel=4,
        )
