"""LoRA's implicit noise in full fine-tuning: ``G A^T A - G`` with a fresh A, or Gaussian noise.

With a frozen A and plain SGD, LoRA is full fine-tuning in which ``G A^T A`` replaces the gradient G
of each adapted matrix, with one A for all steps. This module draws a fresh A, or fresh Gaussian
noise of the same variance, in each step. The noise depends on the gradient and is no privacy
mechanism.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_dp import lora
from lowrank_dp.models.trainable import is_transposed, lora_targets
from lowrank_dp.rng import derive_seed
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.processes import world_size


def noisy_matrices(model: Any, config: TrainConfig) -> dict[str, bool]:
    """Return name -> whether the weight is stored as (in, out), for weights with implicit noise.

    The weights are those of the layers that LoRA would adapt. All of them must be trained. The
    result is empty for a run without implicit noise. Raises ValueError if a weight is not trained,
    or if several processes share the run.
    """
    if config.implicit_noise == "none":
        return {}
    if world_size() > 1:
        raise ValueError(
            f"implicit_noise must go with one process, got {world_size()} processes: start the "
            "run without torchrun"
        )
    targets = lora_targets(model, list(config.target_modules) or None, config.train_layers)
    frozen = [name for name in targets if not model.get_submodule(name).weight.requires_grad]
    if frozen:
        raise ValueError(
            f"implicit_noise must have trained matrices, but {frozen[0]}.weight is frozen or an "
            "embedding's: choose other target_modules or train_layers"
        )
    return {f"{name}.weight": is_transposed(model.get_submodule(name)) for name in targets}


def add_implicit_noise(
    gradients: Mapping[str, Tensor],
    matrices: Mapping[str, bool],
    kind: str,
    rank: int,
    *,
    seed: int,
    step: int,
) -> dict[str, Tensor]:
    """Return all gradients, with the implicit noise of one step added to those of ``matrices``.

    The noise is a function of the gradients, ``seed`` and ``step``, so that a resumed run draws
    the same noise. The draws of different matrices are independent, in the order of ``matrices``.

    Args:
        gradients: mean gradient of each trained parameter, by name; finite.
        matrices: name of each weight with noise -> whether it is stored as (in, out).
        kind: "gaussian" or "fresh-a", as in ``TrainConfig.implicit_noise``.
        rank: rank of A, >= 1. The entries of A are N(0, 1/rank).
        seed: seed of the run.
        step: number of the step, from 0.
    """
    device = gradients[next(iter(matrices))].device
    generator = torch.Generator(device).manual_seed(derive_seed(seed, f"implicit noise {step}"))
    noisy = dict(gradients)
    for name, transposed in matrices.items():
        gradient = gradients[name].T if transposed else gradients[name]  # (out, in), for A^T A
        value = lora.implicit_noise(gradient, rank, kind, generator=generator)
        noisy[name] = value.T if transposed else value
    return noisy
