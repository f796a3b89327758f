"""Optimizer of a run: construction from the configuration, and one update of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lowrank_dp.models import matrix_parameters
from lowrank_dp.optim import AdamBC, Muon
from lowrank_dp.optim.noise_level import NOISE_LEVEL
from lowrank_dp.restore.gradients import is_matrix
from lowrank_dp.train.config import TrainConfig

_BETA2 = 0.999


def make_optimizer(
    config: TrainConfig, model: nn.Module, trained: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """Make the optimizer of the trained parameters; :func:`update` sets its noise level.

    With muon, Muon updates the matrices of linear layers with both sides above 1, and AdamW updates
    all other parameters, embeddings included.
    """
    rate, decay, beta1 = config.learning_rate, config.weight_decay, config.averaging
    parameters = [*trained.values()]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=beta1, weight_decay=decay)
    betas = (beta1, _BETA2)
    if config.optimizer == "adam-bc":
        return AdamBC(
            parameters,
            rate,
            betas,
            mean_noise_std=0.0,
            floor=config.noise_floor,
            weight_decay=decay,
        )
    if config.optimizer in ("muon", "muon-bc"):
        names = {name for name in matrix_parameters(model) if is_matrix(trained[name])}
        corrects = config.optimizer == "muon-bc"
        return Muon(
            [p for name, p in trained.items() if name in names],
            [p for name, p in trained.items() if name not in names],
            lr=rate,
            momentum=beta1,
            beta2=_BETA2,
            weight_decay=decay,
            bias_correction=corrects,
            mean_noise_std=0.0 if corrects else None,
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(parameters, lr=rate, betas=betas, weight_decay=decay)


def update(
    optimizer: torch.optim.Optimizer, rate: float, mean_noise_std: float, *, skip_zeros: bool
) -> None:
    """Update the weights by the optimizer, from the gradients in ``.grad``.

    Args:
        optimizer: an optimizer of :func:`make_optimizer`.
        rate: learning rate of the step.
        mean_noise_std: standard deviation of the noise on each entry of ``.grad``, absolute.
        skip_zeros: whether to skip parameters whose whole gradient is zero. A skipped parameter
            keeps its value and its optimizer state, and its ``.grad`` is set to None.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
        if NOISE_LEVEL in group:
            group[NOISE_LEVEL] = mean_noise_std
        for p in group["params"] if skip_zeros else ():
            if p.grad is not None and not bool(p.grad.any()):
                p.grad = None
    optimizer.step()
