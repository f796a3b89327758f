"""Preconditioner of a run: scaled layers, updates of their scales, and their part of a snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_dp.data import Task
from lowrank_dp.models.heads import final_layer, without_adapter
from lowrank_dp.models.scaled import (
    Scale,
    scalable_layers,
    scale_layers,
    scaled_layers,
    set_scale,
    unit_scale,
)
from lowrank_dp.precondition import (
    Moment,
    NoisyMoments,
    joint_scales,
    model_moments,
    public_rows,
    refresh_scales,
)
from lowrank_dp.train.config import TrainConfig

_SCALES, _MOMENTS = "scale.", "noisy_moment."  # prefixes of tensors in a snapshot


def add_preconditioner(
    model: Any, tokenizer: Any, task: Task, max_length: int | None, config: TrainConfig
) -> str:
    """Give the trained matrices of linear layers their scales; skip vectors and embeddings.

    A trained vector or embedding has the scale 1: its unscaled gradient counts in the clipping
    norm.

    Args:
        model: the model before its first step, not sharded.
        tokenizer: tokenizer of the model.
        task: the private task. Its kind, name and classes are read. Its training texts are compared
            with the public texts, to refuse a copy.
        max_length: number of tokens that texts are cut to; None does not cut.
        config: configuration of the run, with a preconditioner.

    Returns:
        The source of the moments, in words.

    Raises:
        ValueError: if no trained matrix can be scaled; if the public task can't be used; or if the
            public task is a copy of the private task and the run is not marked as diagnostic.
    """
    layers = scalable_layers(model)
    if not layers:
        raise ValueError(
            "precondition must go with trained linear layers, and the model has none with a weight "
            "that is not shared with another layer: leave precondition out"
        )
    if config.precondition_freeze_vectors:
        for p in model.parameters():
            p.requires_grad_(p.requires_grad and p.ndim > 1)
    if config.precondition == "noisy":
        scale_layers(model, {name: unit_scale(layer.weight) for name, layer in layers.items()})
        return "the run's own noisy sums"
    rows = public_rows(config.precondition, task, config.precondition_rows)
    if rows.copy and not config.diagnostic:
        raise ValueError(
            f"precondition must name a public task, got one ({rows.source}) that holds the private "
            f"training texts of {task.name}: choose another"
        )
    moments = model_moments(
        model,
        tokenizer,
        rows,
        task.kind,
        steps=config.precondition_steps,
        batch_size=config.batch_size,
        learning_rate=config.precondition_rate,
        max_grad_norm=config.max_grad_norm,
        max_length=max_length,
        pad_to=max_length if config.padding == "max-length" else None,
        micro_batch_size=config.micro_batch_size,
    )
    own: dict[str, Moment] = {name: moments[f"{name}.weight"] for name in layers}
    scale_layers(model, joint_scales(own, config.precondition_power, equal_rows=class_rows(model)))
    return f"text that must be public: {rows.source}"


def refresh(
    model: Any,
    optimizer: torch.optim.Optimizer,
    moments: NoisyMoments,
    noisy: Mapping[str, Tensor],
    noise_std: float,
    config: TrainConfig,
) -> None:
    """Add a step's noisy sums, and update the scales every ``precondition_every`` steps.

    Args:
        model: model with scaled layers.
        optimizer: optimizer of the stored weights, after its step.
        moments: second moments of the run so far; updated.
        noisy: the step's releases, by parameter name.
        noise_std: standard deviation of the noise on each entry of ``noisy``, absolute.
        config: configuration of the run.
    """
    layers = scaled_layers(model)
    moments.add(
        {name: noisy[f"{name}.weight"] for name in layers},
        {name: Scale(layer.row_scale, layer.col_scale) for name, layer in layers.items()},
        noise_std,
    )
    if moments.steps % config.precondition_every == 0:
        refresh_scales(
            model,
            optimizer,
            moments.moments(),
            config.precondition_power,
            class_rows(model),
        )


def snapshot_tensors(model: Any, moments: NoisyMoments | None) -> dict[str, Tensor]:
    """Return the scales and the moments as tensors under flat names; empty without scales."""
    found: dict[str, Tensor] = {}
    for name, layer in scaled_layers(model).items():
        found[f"{_SCALES}{name}:row"] = layer.row_scale
        found[f"{_SCALES}{name}:col"] = layer.col_scale
    if moments is not None:
        found |= {f"{_MOMENTS}{name}": value for name, value in moments.tensors().items()}
    return found


def load_snapshot_tensors(
    model: Any, moments: NoisyMoments | None, tensors: Mapping[str, Tensor]
) -> None:
    """Set the scales and the moments to those of a snapshot (:func:`snapshot_tensors`)."""
    for name, layer in scaled_layers(model).items():
        set_scale(layer, Scale(*(tensors[f"{_SCALES}{name}:{side}"] for side in ("row", "col"))))
    if moments is not None:
        device = next(model.parameters()).device
        moments.load_tensors(
            {
                name.removeprefix(_MOMENTS): value.to(device)
                for name, value in tensors.items()
                if name.startswith(_MOMENTS)
            }
        )


def class_rows(model: Any) -> tuple[str, ...]:
    """Return the name of the layer whose rows are a classifier's classes; () without a layer."""
    base = without_adapter(model)
    if not (last := final_layer(base)):
        return ()
    layer = base.get_submodule(last)
    return tuple(name for name, module in model.named_modules() if module is layer)
