"""DP-AdamBC: Adam whose second moment is corrected for the known variance of the noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lowrank_dp import _validate
from lowrank_dp.optim.noise_level import NOISE_LEVEL, require_full_precision

NOISE_FLOOR = 0.3  # default of `floor`


class AdamBC(torch.optim.Optimizer):
    """Adam with the noise variance subtracted from its second moment (DP-AdamBC, arXiv 2312.14334).

    Let m and v be Adam's bias-corrected moments of the noisy mean gradient, and phi the variance of
    its noise. A step is ``- lr * m / (sqrt(max(v - phi, floor * phi)) + eps)``. This is Algorithm 1
    of Tang et al. (AAAI 2024), with the paper's gamma' = ``floor * phi``. If the noise level
    changes, phi is the mean of the variances with the weights that v gives to the gradients.
    Without noise, the optimizer is Adam. The noise level is public, so the correction is
    post-processing.

    The paper tunes gamma' per data set as an absolute number; the authors' scripts give 1e-9 to
    7e-9. Here the floor is relative to phi, because the error of v - phi is relative to phi: its
    standard deviation is about ``phi * sqrt(2 / t)`` after t steps, for t below
    ``1 / (1 - beta2)``. With a floor far below this error, noise would be divided by a number near
    zero.

    Args:
        params: parameters or groups of parameters, as for any torch optimizer; float32 or float64.
        lr: learning rate, > 0.
        betas: decay of the first and of the second moment, each in [0, 1).
        mean_noise_std: standard deviation of the noise on each entry of ``p.grad``, absolute, in
            the units of ``p.grad``, >= 0. For a mean over a batch, this is ``noise_multiplier *
            max_grad_norm / batch_size``. Each parameter group has an entry ``mean_noise_std``;
            assign a new value before a step if the noise level changes.
        floor: lower limit of the corrected second moment, relative to the noise variance, > 0.
        eps: term added to the denominator, as in Adam, > 0.
        weight_decay: L2 penalty, which is added to the gradient as in Adam, >= 0.

    Raises:
        ValueError: on a bad argument.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        mean_noise_std: float,
        floor: float = NOISE_FLOOR,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        given = {"lr": lr, "betas": betas, "floor": floor, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, _options(given | {NOISE_LEVEL: mean_noise_std}))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, whose entries replace the arguments of the constructor.

        Raises ValueError on a bad entry.
        """
        super().add_param_group(param_group | _options(self.defaults | param_group))
        require_full_precision("params", self.param_groups[-1]["params"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step along the gradients in ``.grad``; a closure is not accepted."""
        if closure is not None:
            raise ValueError("step must be called without a closure: .grad must contain the noise")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)

    def _move(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state |= {"step": torch.zeros(()), "noise_variance": torch.zeros((), device=p.device)}
            state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        grad = p.grad if p.grad is not None else torch.zeros_like(p)
        if group["weight_decay"]:
            grad = grad.add(p, alpha=group["weight_decay"])
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        state["noise_variance"].mul_(beta2).add_((1 - beta2) * group[NOISE_LEVEL] ** 2)
        steps = float(state["step"])
        seen1, seen2 = 1 - beta1**steps, 1 - beta2**steps
        phi = float(state["noise_variance"]) / seen2
        corrected = (state["exp_avg_sq"] / seen2 - phi).clamp_(min=group["floor"] * phi)
        p.addcdiv_(
            state["exp_avg"], corrected.sqrt_().add_(group["eps"]), value=-group["lr"] / seen1
        )


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked options of a group of parameters, as floats; ``betas`` as a pair."""
    betas = given["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        _validate.fail("betas", "a pair of numbers", betas)
    return {
        "betas": tuple(_validate.real("betas", b, low=0, high=1, high_open=True) for b in betas),
        **{name: _validate.positive(name, given[name]) for name in ("lr", "floor", "eps")},
        **{
            name: _validate.real(name, given[name], low=0) for name in (NOISE_LEVEL, "weight_decay")
        },
    }
