"""LoRA's implicit noise in full fine-tuning: what a projection by a new A adds to each gradient.

With a frozen A and plain SGD, LoRA is full fine-tuning whose gradient G of each adapted matrix is
replaced by ``G A^T A``, with one A for all steps. The noise here is drawn anew in each step. The
noise depends on the gradient and is no privacy mechanism.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lowrank_dp import lora
from lowrank_dp.models.trainable import lora_targets
from lowrank_dp.rng import derive_seed
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.processes import world_size


def noisy_matrices(model: Any, config: TrainConfig) -> dict[str, bool]:
    """Return the weights that get implicit noise, and whether each is stored transposed.

    The weights are those of the layers that LoRA would adapt; they must be trained. The result is
    empty for a run without implicit noise. Raises ValueError for a weight that is not trained, and
    for several processes.
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
    return {f"{name}.weight": isinstance(model.get_submodule(name), Conv1D) for name in targets}


def add_implicit_noise(
    gradients: Mapping[str, Tensor],
    matrices: Mapping[str, bool],
    kind: str,
    rank: int,
    *,
    seed: int,
    step: int,
) -> dict[str, Tensor]:
    """Return the gradients with the noise of one step on ``matrices``; the others as they are.

    The noise is a function of the gradients, ``seed`` and ``step``, so that a resumed run draws
    the same noise. The matrices' draws are independent, in the order of ``matrices``.

    Args:
        gradients: mean gradient of each trained parameter, finite.
        matrices: names of the weights, each with whether it is stored as (in, out).
        kind: "gaussian" or "fresh-a", as in ``TrainConfig.implicit_noise``.
        rank: rank of A, whose entries are N(0, 1/rank).
        seed, step: seed of the run, and the number of the step, from 0.
    """
    device = gradients[next(iter(matrices))].device
    generator = torch.Generator(device).manual_seed(derive_seed(seed, f"implicit noise {step}"))
    noisy = dict(gradients)
    for name, transposed in matrices.items():
        gradient = gradients[name].T if transposed else gradients[name]  # (out, in), as A^T A needs
        value = lora.implicit_noise(gradient, rank, kind, generator=generator)
        noisy[name] = value.T if transposed else value
    return noisy
