"""Linear layers whose weight is a stored matrix times fixed scales of its rows and columns.

A layer with scales r (one per row) and c (one per column) stores W' and computes with the *full
weight* ``diag(r) W' diag(c)``. The gradient of W' is ``r c^T`` times the gradient of the full
weight, entry by entry. A mechanism that clips the gradient of W' and adds noise therefore acts on a
preconditioned gradient. The sensitivity is the clipping norm, as without scales.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


class Scale(NamedTuple):
    """Scales of the rows and columns of one weight (m, n); without a unit.

    Attributes:
        row: (m,), above 0.
        col: (n,), above 0.
    """

    row: Tensor
    col: Tensor


class ScaledLinear(nn.Linear):
    """``nn.Linear`` that stores its weight divided by its scales."""

    row_scale: Tensor
    col_scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Apply the full weight and the bias."""
        return functional.linear(input, full_weight(self), self.bias)


class ScaledConv1D(Conv1D):
    """GPT-2's ``Conv1D`` that stores its weight (in, out) divided by its scales."""

    row_scale: Tensor
    col_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Apply the full weight and the bias."""
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), full_weight(self))
        return flat.view(*x.size()[:-1], self.nf)


def unit_scale(weight: Tensor) -> Scale:
    """Return scales of 1 for a weight (m, n), in its type and on its device."""
    return Scale(weight.new_ones(weight.shape[0]), weight.new_ones(weight.shape[1]))


_SCALED: dict[type, type] = {nn.Linear: ScaledLinear, Conv1D: ScaledConv1D}


def full_weight(layer: Any) -> Tensor:
    """Return the full weight ``diag(r) W' diag(c)`` of a scaled layer, (m, n)."""
    return layer.row_scale[:, None] * layer.weight * layer.col_scale


def scalable_layers(model: nn.Module) -> dict[str, Any]:
    """Return the linear layers with a trained weight that no other layer shares, by name.

    A layer is left out if its forward method is not that of ``nn.Linear`` or ``Conv1D``, if
    another layer shares its weight (such as an output layer that is tied to the embedding), or if
    it is part of an ``nn.TransformerEncoderLayer``, which may read the weight without the layer.
    """
    read_by_parent = {
        id(module)
        for parent in model.modules()
        if isinstance(parent, nn.TransformerEncoderLayer)
        for module in parent.modules()
    }
    uses = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in _SCALED
        and "forward" not in vars(module)
        and module.weight.requires_grad
        and uses[id(module.weight)] == 1
        and id(module) not in read_by_parent
    }


def scaled_layers(model: nn.Module) -> dict[str, Any]:
    """Return the scaled layers of a model, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (ScaledLinear, ScaledConv1D))
    }


def scale_layers(model: nn.Module, scales: Mapping[str, Scale]) -> None:
    """Give layers scales; the outputs of the model stay the same up to rounding.

    Layers and parameters stay the same objects under the same names. The class of a layer changes,
    as in ``torch.nn.utils.parametrize``. The scales become buffers that a state dict leaves out.

    Args:
        model: a model without scaled layers.
        scales: name of a layer of :func:`scalable_layers` -> scales of its weight.
    """
    for name, scale in scales.items():
        layer: Any = model.get_submodule(name)
        layer.__class__ = _SCALED[type(layer)]
        for key, ones in zip(("row_scale", "col_scale"), unit_scale(layer.weight), strict=True):
            layer.register_buffer(key, ones, persistent=False)
        change_scale(layer, scale)


@torch.no_grad()
def change_scale(layer: Any, scale: Scale) -> Scale:
    """Give a scaled layer new scales, and change its stored weight so that its outputs stay.

    Returns:
        The factors ``new / old`` of rows and columns. The gradient of the stored weight changes by
        the outer product of these factors.
    """
    before = Scale(layer.row_scale.clone(), layer.col_scale.clone())
    set_scale(layer, scale)
    factor = Scale(layer.row_scale / before.row, layer.col_scale / before.col)
    layer.weight.div_(factor.row[:, None]).div_(factor.col)
    return factor


@torch.no_grad()
def set_scale(layer: Any, scale: Scale) -> None:
    """Set the scales of a layer without changing its stored weight."""
    layer.row_scale.copy_(scale.row)
    layer.col_scale.copy_(scale.col)


def full_weights(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of the model with the full weight of each scaled layer."""
    full = dict(state)
    for name, layer in scaled_layers(model).items():
        if (key := f"{name}.weight") in full:
            stored = full[key]
            row, col = layer.row_scale.to(stored), layer.col_scale.to(stored)
            full[key] = row[:, None] * stored * col
    return full


@torch.no_grad()
def remove_scales(model: nn.Module) -> None:
    """Turn scaled layers back into ordinary layers that store their full weight."""
    plain = {scaled: kind for kind, scaled in _SCALED.items()}
    for layer in scaled_layers(model).values():
        layer.weight.copy_(full_weight(layer))
        layer.__class__ = next(plain[kind] for kind in type(layer).__mro__ if kind in plain)
        del layer.row_scale, layer.col_scale
