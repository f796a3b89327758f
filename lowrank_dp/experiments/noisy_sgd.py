"""Plain SGD for LoRA, and for full fine-tuning with LoRA's implicit noise on its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dp import lora
from lowrank_dp.lora.noise import NOISE_KINDS
from lowrank_dp.models import matrix_parameters
from lowrank_dp.models.heads import head_modules, without_adapter
from lowrank_dp.models.trainable import as_out_in


def sgd(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    learning_rate: float,
    layers: list[str] | None = None,
    arm: str = "",
    rank: int = 1,
    generator: torch.Generator | None = None,
) -> Iterator[float]:
    """Take one plain SGD step per batch, and yield the loss before the step.

    If ``arm`` is a kind of ``lora.implicit_noise``, this noise of rank ``rank`` is added to the
    gradients of ``layers``. For any other arm, no noise is added.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    noisy = [model.get_submodule(name) for name in layers or ()] if arm in NOISE_KINDS else []
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        with torch.no_grad():
            for layer in noisy:
                weight: Any = layer.weight
                gradient = as_out_in(layer, weight.grad)  # LoRA's A projects the inputs
                gradient = lora.implicit_noise(gradient, rank, arm, generator=generator)
                weight.grad = as_out_in(layer, gradient)
            for p in trained:
                p.sub_(p.grad, alpha=learning_rate)  # type: ignore[arg-type]
        if not bool(loss.isfinite()):
            raise ValueError(
                f"learning_rate must be small enough to train, got {learning_rate} "
                f"and a loss of {loss.item()} ({arm or 'full'}, rank {rank})"
            )
        yield loss.item()


def adapted_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers with a LoRA pair, as in the model without LoRA."""
    modules = without_adapter(model).named_modules()
    return [name for name, module in modules if hasattr(module, "get_delta_weight")]


@torch.no_grad()
def effective_weights(model: nn.Module, layers: list[str]) -> Tensor:
    """Return the adapted layers' weights, W + BA for LoRA, as one vector in float64."""

    def weight(name: str) -> Tensor:
        module = without_adapter(model).get_submodule(name)
        if hasattr(module, "get_delta_weight"):
            return module.base_layer.weight.double() + module.get_delta_weight("default").double()
        return module.weight.double()

    return torch.cat([weight(name).flatten() for name in layers])


def distance_between(a: Tensor, b: Tensor) -> float:
    """Return the Euclidean distance of two vectors."""
    return float(torch.linalg.vector_norm((a - b).double()))


def noise_to_gradient(model: nn.Module, layers: list[str]) -> float:
    """Return E|G A^T A - G|^2 / |G|^2 over all layers at rank 1 (n + 1 if all have width n)."""
    modules: list[Any] = [model.get_submodule(name) for name in layers]
    gradients = [as_out_in(module, module.weight.grad) for module in modules]
    squares = [float(g.square().sum()) for g in gradients]
    return sum(g.shape[1] * s + s for g, s in zip(gradients, squares, strict=True)) / sum(squares)


def train_only(model: nn.Module, layers: list[str]) -> None:
    """Set ``requires_grad`` for the parameters that LoRA trains: the layers' weights and a head."""
    heads = {id(p) for module in head_modules(model).values() for p in module.parameters()}
    wanted = {f"{name}.weight" for name in layers}
    if wanted - set(matrix_parameters(model)):
        raise ValueError("model must also train every adapted layer in full fine-tuning")
    for name, p in model.named_parameters():
        p.requires_grad_(name in wanted or id(p) in heads)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore the trained parameters after the block."""
    kept = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


@contextmanager
def frozen_a(model: nn.Module, freeze: bool) -> Iterator[None]:
    """Freeze LoRA's A inside the block if ``freeze`` is True."""
    a = [p for name, p in model.named_parameters() if "lora_A" in name] if freeze else []
    for p in a:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in a:
            p.requires_grad_(True)


def numerical_rank(update: Tensor, tolerance: float) -> int:
    """Count the singular values of a matrix above ``tolerance`` times the largest one."""
    values = torch.linalg.svdvals(update)
    return int((values > tolerance * values[0]).sum())
