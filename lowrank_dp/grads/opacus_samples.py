"""Per-example gradients by Opacus's hooks, for layers without a rule of this package."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dp.grads.factors import upcast
from lowrank_dp.grads.losses import forward_losses
from lowrank_dp.grads.microbatch import MicroBatch, refuse
from lowrank_dp.grads.tolerances import is_half
from lowrank_dp.models.scaled import ScaledConv1D, ScaledLinear


def per_example_gradients(micro_batch: MicroBatch) -> dict[str, Tensor]:
    """Per-example gradients (B, ``*parameter.shape``) by name, checked against autograd's sum.

    A parameter that the loss does not depend on has no entry. Everything that Opacus's hooks leave
    on the model is removed.

    Raises:
        UnsupportedParameters: for a parameter whose gradients do not add up to autograd's.
    """
    attributes = [(module, set(vars(module))) for module in micro_batch.model.modules()]
    register_scaled_layers(ScaledLinear, ScaledConv1D)
    try:
        _hooks_class()(micro_batch.model, loss_reduction="sum", strict=False)
        losses = forward_losses(micro_batch)
        if losses.requires_grad:
            losses.sum().backward()
        return _checked_samples(micro_batch)
    finally:
        for handle in getattr(micro_batch.model, "autograd_grad_sample_hooks", []):
            handle.remove()
        for p in micro_batch.model.parameters():
            for attribute in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                vars(p).pop(attribute, None)
        for module, before in attributes:
            for attribute in set(vars(module)) - before:
                delattr(module, attribute)


def register_scaled_layers(*kinds: type) -> None:
    """Register the rules of scaled layers with Opacus, for per-example gradients and for norms.

    Opacus looks up rules by the exact type of a layer. The rule of a scaled layer applies Opacus's
    rule for ``nn.Linear`` to the scaled input and the scaled output gradient.

    Args:
        kinds: subclasses of ``ScaledLinear`` and ``ScaledConv1D``.
    """
    from opacus.grad_sample import register_grad_sampler, register_norm_sampler
    from opacus.grad_sample.linear import compute_linear_grad_sample, compute_linear_norm_sample

    def scaled(rule: Any) -> Any:
        def sample(
            layer: Any, activations: list[Tensor], backprops: Tensor
        ) -> dict[nn.Parameter, Tensor]:
            x, conv = activations[0].to(backprops.dtype), isinstance(layer, ScaledConv1D)
            into, out = layer.row_scale, layer.col_scale
            if not conv:
                into, out = out, into
            found = rule(_weight_only(layer), [x * into], backprops * out)
            if conv and (matrices := found.get(layer.weight)) is not None and matrices.ndim == 3:
                found[layer.weight] = matrices.mT
            return found | rule(_bias_only(layer), [x], backprops)

        return sample

    for kind in kinds:
        register_grad_sampler(kind)(scaled(compute_linear_grad_sample))
        register_norm_sampler(kind)(scaled(compute_linear_norm_sample))


def _weight_only(layer: Any) -> Any:
    return SimpleNamespace(weight=layer.weight, bias=None)


def _bias_only(layer: Any) -> Any:
    return SimpleNamespace(weight=SimpleNamespace(requires_grad=False), bias=layer.bias)


def _hooks_class() -> Any:
    """Return Opacus's class of hooks, changed to record layers in eval mode too."""
    from opacus.grad_sample import GradSampleHooks

    class Hooks(GradSampleHooks):
        def capture_activations_hook(
            self, module: Any, forward_input: Any, forward_output: Any
        ) -> None:
            # Opacus ignores layers in eval mode. The layer's forward is over, so the mode that is
            # set here changes no result.
            mode, module.training = module.training, True
            try:
                super().capture_activations_hook(module, forward_input, forward_output)
            finally:
                module.training = mode

    return Hooks


def _checked_samples(micro_batch: MicroBatch) -> dict[str, Tensor]:
    """Return the gradients that the hooks left on the parameters; check their sums."""
    trained = micro_batch.trained
    device = next(iter(trained.values())).device.type
    half = (
        torch.is_autocast_enabled(device)
        or not isinstance(micro_batch.autocast, nullcontext)
        or is_half(micro_batch.model)
    )
    largest = max(
        (p.grad.abs().max().item() for p in trained.values() if p.grad is not None), default=0.0
    )
    samples = {}
    for name, p in trained.items():
        sample: Tensor | None = p.grad_sample  # type: ignore[attr-defined]
        if sample is None and p.grad is None:
            continue
        if (
            sample is None
            or p.grad is None
            or len(sample) != micro_batch.num_rows
            or not _adds_up(upcast(sample), p.grad, largest, half)
        ):
            refuse([name], "have no exact per-example gradients in Opacus", ("loop",))
        samples[name] = upcast(sample)
    return samples


def _adds_up(sample: Tensor, gradient: Tensor, largest: float, half: bool) -> bool:
    """Return whether per-example gradients sum to autograd's gradient.

    A difference means that the hooks missed a use of the parameter. ``largest`` is the largest
    gradient entry of all parameters.
    """
    allowed = (3e-2 if half else 1e-3) * float(gradient.abs().max()) + 1e-6 * largest
    return bool(((sample.sum(0) - gradient).abs() <= allowed).all())
