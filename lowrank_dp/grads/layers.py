"""Per-example gradient rules of the layers that book-keeping knows.

A rule takes a layer, its input ``x`` and its output gradient ``b``, and returns the per-example
gradients of one of its parameters as a factor of ``lowrank_dp.grads.factors``. B is examples, T
positions, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lowrank_dp.grads.factors import HALF_DTYPES, Factor, Outer, upcast
from lowrank_dp.models.scaled import ScaledConv1D, ScaledLinear

Rule = Callable[[Any, Tensor, Tensor], Factor]


def _tokens(tensor: Tensor) -> Tensor:
    """Reshape (B, ..., d) to (B, T, d)."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _row_sums(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum (B, ..., *shape) to (B, *shape), in float32 or wider."""
    return upcast(tensor).reshape(len(tensor), -1, *shape).sum(1)


def _linear_weight(module: nn.Linear, x: Tensor, b: Tensor) -> Factor:
    return Outer(_tokens(b), _tokens(x))


def _conv1d_weight(module: Conv1D, x: Tensor, b: Tensor) -> Factor:
    return Outer(_tokens(x), _tokens(b))


def _scaled_linear_weight(module: ScaledLinear, x: Tensor, b: Tensor) -> Factor:
    return Outer(_tokens(b) * module.row_scale, _tokens(x) * module.col_scale)


def _scaled_conv1d_weight(module: ScaledConv1D, x: Tensor, b: Tensor) -> Factor:
    return Outer(_tokens(x) * module.row_scale, _tokens(b) * module.col_scale)


def _bias(module: Any, x: Tensor, b: Tensor) -> Factor:
    return _row_sums(b, module.bias.shape)


def _embedding_weight(module: nn.Embedding, x: Tensor, b: Tensor) -> Factor:
    if module.padding_idx is not None:
        b = b.masked_fill((x == module.padding_idx).unsqueeze(-1), 0)
    return Outer(x.reshape(len(x), -1), _tokens(b))


def _layer_norm_weight(module: nn.LayerNorm, x: Tensor, b: Tensor) -> Factor:
    unit = functional.layer_norm(upcast(x), module.normalized_shape, eps=module.eps)
    return _row_sums(unit.mul_(upcast(b)), module.normalized_shape)


def _rms_norm_weight(module: Any, x: Tensor, b: Tensor) -> Factor:
    return _row_sums(_rms_unit(module, x).mul_(upcast(b)), module.weight.shape)


def _rms_unit(module: Any, x: Tensor) -> Tensor:
    """Divide ``x`` by its root mean square, in float32 or wider."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return functional.rms_norm(upcast(x), module.weight.shape, eps=eps)


_LINEAR: dict[str, Rule] = {"weight": _linear_weight, "bias": _bias}
_RMS_NORM: dict[str, Rule] = {"weight": _rms_norm_weight}

RULES: dict[type[nn.Module], dict[str, Rule]] = {
    nn.Linear: _LINEAR,
    Conv1D: {"weight": _conv1d_weight, "bias": _bias},
    ScaledLinear: {"weight": _scaled_linear_weight, "bias": _bias},
    ScaledConv1D: {"weight": _scaled_conv1d_weight, "bias": _bias},
    nn.Embedding: {"weight": _embedding_weight},
    nn.LayerNorm: {"weight": _layer_norm_weight, "bias": _bias},
    nn.RMSNorm: _RMS_NORM,
}


def rules_for(module: nn.Module) -> Mapping[str, Rule]:
    """Rules of a layer by parameter name; empty if the layer's forward is not a known one.

    Types are matched exactly, since a subclass may scale or shift the result of its parent. Most
    architectures define an RMSNorm of their own: this function matches the layer by name, and
    ``is_rms_norm`` then checks the layer's output.
    """
    if "forward" in vars(module):
        return {}
    if isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq
    ):
        return {}
    if type(module).__name__.endswith("RMSNorm") and [*module._parameters] == ["weight"]:
        return _RMS_NORM
    return RULES.get(type(module), {})


def is_rms_norm(module: Any, x: Tensor, y: Tensor) -> bool:
    """Return whether ``y`` is ``w u`` or ``(1 + w) u`` (Gemma), with ``u = x / rms(x)``.

    Rounding errors are allowed for. Only the first example is compared. In both forms, the weight
    gradient of an example is ``sum_t b_t u_t``.
    """
    unit, given, weight = _rms_unit(module, x[:1]), upcast(y[:1]), upcast(module.weight)
    half = x.dtype in HALF_DTYPES or y.dtype in HALF_DTYPES
    allowed = (3e-2 if half else 1e-4) * given.abs().amax()
    return any(
        bool(((scale * unit - given).abs() <= allowed).all()) for scale in (weight, 1 + weight)
    )
