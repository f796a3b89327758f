"""Contexts that change how a model runs, and restore its state at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lowrank_dp.grads.model_state import ModelState, state_kept


class WithoutDropout(TorchFunctionMode):
    """Context in which dropout does nothing, whatever the model's mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is nn.functional.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


class FixedDraws(WithoutDropout):
    """Context without dropout in which all uniform random numbers have one place in their ranges.

    A ``share`` of 0 gives the lower end of each range, and 1 the upper end. Other random numbers
    are drawn as usual.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.rand, torch.rand_like):
            kwargs = {name: value for name, value in kwargs.items() if name != "generator"}
            made = torch.zeros if func is torch.rand else torch.zeros_like
            return made(*args, **kwargs).fill_(self._share)
        if func is torch.Tensor.uniform_:
            low = args[1] if len(args) > 1 else kwargs.get("from", 0.0)
            high = args[2] if len(args) > 2 else kwargs.get("to", 1.0)
            return args[0].fill_(low + self._share * (high - low))
        return super().__torch_function__(func, types, args, kwargs)


_DROPOUTS = {
    nn.functional.dropout,
    nn.functional.dropout1d,
    nn.functional.dropout2d,
    nn.functional.dropout3d,
    nn.functional.alpha_dropout,
    nn.functional.feature_alpha_dropout,
    torch.dropout,
    torch.dropout_,
    torch.feature_dropout,
}


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Run the model with parameters and buffers in float64; restore them afterwards."""
    kept = [
        (tensor, tensor.data)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point()
    ]
    try:
        for tensor, values in kept:
            tensor.data = values.double()
        yield
    finally:
        for tensor, values in kept:
            tensor.data = values


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[ModelState]:
    """Restore torch's generators and what ``state_kept`` restores; autocast is off inside."""
    with (
        state_kept(model) as state,
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),
    ):
        yield state


@contextmanager
def gradients_set_aside(trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Set every ``.grad`` to None inside, and restore the gradients afterwards."""
    kept = {name: p.grad for name, p in trained.items()}
    try:
        for p in trained.values():
            p.grad = None
        yield
    finally:
        for name, p in trained.items():
            p.grad = kept[name]
