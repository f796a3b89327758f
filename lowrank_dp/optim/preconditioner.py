"""Rank-one preconditioner for Opacus training loops, from gradients of public batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from lowrank_dp import _validate
from lowrank_dp.grads.opacus_samples import register_scaled_layers
from lowrank_dp.models.scaled import (
    ScaledConv1D,
    ScaledLinear,
    full_weight,
    remove_scales,
    scalable_layers,
    scale_layers,
    scaled_layers,
)
from lowrank_dp.precondition import joint_scales, public_moments


def attach_preconditioner(
    model: nn.Module,
    public_batches: Iterable[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    *,
    power: float = 0.125,
    learning_rate: float = 1e-3,
) -> Preconditioner:
    """Precondition the trained linear layers of a model, before ``PrivacyEngine.make_private``.

    The model takes one noise-free step of Adam per public batch, and then gets its initial weights
    back. The row and column means of the squared gradients determine the scales r and c of each
    weight. Each layer then stores its weight divided by ``r c^T`` and computes the same outputs as
    before. Opacus clips the gradient of the stored weight, which is ``r c^T`` times the gradient of
    the full weight, and adds noise. The sensitivity is ``max_grad_norm``, so epsilon does not
    change. Opacus's modes "hooks" and "ghost" work.

    A state dict of the model holds the full weights, so a model without scales loads it. A model
    with scales divides the weights that it loads by its own scales. To resume a run, attach the
    preconditioner to the initial model, with the same public batches, and then load the states of
    model and optimizer.

    Tune the learning rate anew: the best rate of a run without preconditioner does not apply. The
    method was measured with SGD with momentum 0.9 on the stored weights.

    Args:
        model: the model, in training mode, with at least one trained ``nn.Linear`` (or GPT-2's
            ``Conv1D``) that shares its weight with no other layer. Other parameters are not scaled.
        public_batches: batches of PUBLIC data, one per step. A private batch would make the
            scales, and everything that is computed with them, NON-PRIVATE.
        loss_of: function ``loss_of(model, batch)`` that returns the mean loss of the batch, a
            scalar.
        power: p of the scales ``r_i = a row_i^-p``, in [0, 0.5] (``precondition.joint_scales``).
        learning_rate: learning rate of Adam on the public batches, above 0.

    Returns:
        A handle, with ``remove()``.

    Raises:
        ValueError: if the model has no layer to scale, already has scales, or is wrapped by Opacus;
            if there is no batch; on a number out of range; if the loss is not a scalar tensor with
            a gradient; or if the gradient of a matrix is not float32 or float64, or not finite.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> batch = torch.eye(3), torch.tensor([0, 1, 1])
    >>> loss_of = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> handle = attach_preconditioner(model, [batch], loss_of)
    >>> handle.remove()
    """
    layers = scalable_layers(model)
    if not layers:
        found = ", ".join(scaled_layers(model)) or "none"
        _validate.fail("model", "a model with trained linear layers that have no scales", found)
    if any(hasattr(p, "grad_sample") for p in model.parameters()):
        raise ValueError(
            "model must not be wrapped by Opacus yet, whose hooks would keep the gradients of the "
            "public batches: call attach_preconditioner before make_private"
        )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradient(batch: Any) -> Mapping[str, Tensor]:
        model.zero_grad()
        loss = loss_of(model, batch)
        if not isinstance(loss, Tensor):
            _validate.fail("loss_of", "a function that returns a tensor", type(loss).__name__)
        if loss.numel() != 1 or not loss.requires_grad:
            found = f"shape {tuple(loss.shape)}, requires_grad {loss.requires_grad}"
            _validate.fail("loss_of", "a function that returns a scalar with a gradient", found)
        loss.backward()
        return {n: p.new_zeros(p.shape) if p.grad is None else p.grad for n, p in trained.items()}

    moments = public_moments(
        trained,
        (partial(gradient, batch) for batch in public_batches),
        learning_rate=learning_rate,
    )
    own = {name: moments[_weight(name)] for name in layers}
    scale_layers(model, joint_scales(own, power))
    for layer in layers.values():
        layer.__class__ = _OF_OPACUS[type(layer)]
    register_scaled_layers(*_OF_OPACUS.values())
    return Preconditioner(model)


class Preconditioner:
    """Handle of a model's preconditioner, made by :func:`attach_preconditioner`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def remove(self) -> None:
        """Remove the scales: each layer stores its full weight again.

        The parameters stay the same objects. An optimizer with momentum must not step afterwards,
        because its momentum belongs to the stored weights.
        """
        remove_scales(self._model)


class _WithoutBuffers(nn.Module):
    """Layer that hides its buffers.

    Opacus refuses trained layers with buffers, because the buffers of a batch norm are computed
    from private data. The scales of a layer are public constants.
    """

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        return iter(())


class _FullWeightInState(nn.Module):
    """Layer whose state dict holds the full weight, as that of the layer without scales does."""

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        full = full_weight(self)
        destination[f"{prefix}weight"] = full if keep_vars else full.detach()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *others: Any
    ) -> None:
        key, layer = f"{prefix}weight", cast(ScaledLinear, self)
        full = state_dict.get(key)
        if isinstance(full, Tensor) and full.shape == layer.weight.shape:  # else torch complains
            row, col = layer.row_scale.to(full), layer.col_scale.to(full)
            state_dict = {**state_dict, key: full / row[:, None] / col}
        super()._load_from_state_dict(state_dict, prefix, *others)


class _OpacusLinear(_WithoutBuffers, _FullWeightInState, ScaledLinear):
    pass


class _OpacusConv1D(_WithoutBuffers, _FullWeightInState, ScaledConv1D):
    pass


_OF_OPACUS: dict[type, type] = {ScaledLinear: _OpacusLinear, ScaledConv1D: _OpacusConv1D}


def _weight(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"
