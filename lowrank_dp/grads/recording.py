"""Hooks that record the input and the output gradient of each trained layer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dp.grads.axes import ROWS_FIRST, batch_axis, layer_input, rows_first
from lowrank_dp.grads.factors import Factor, Squares, materialize_if_cheaper, squared_norms
from lowrank_dp.grads.layers import RULES, is_rms_norm, rules_for
from lowrank_dp.grads.microbatch import MicroBatch, num_positions_of, refuse


@dataclass
class Tape:
    """Factors and squared norms of each parameter, filled during one forward and backward.

    Attributes:
        factors: the factors of each parameter.
        pending: the number of factors of each parameter that the backward has yet to add.
        squares: the squared norms of the parameters that are complete.
    """

    factors: dict[str, list[Factor]] = field(default_factory=lambda: defaultdict(list))
    pending: Counter[str] = field(default_factory=Counter)
    squares: dict[str, Squares] = field(default_factory=dict)

    def add(self, name: str, factor: Factor) -> None:
        """Add one factor of a parameter; the last pending one closes the parameter."""
        if name in self.squares:
            refuse([name], "are used in more than one gradient checkpoint")
        self.factors[name].append(factor)
        self.pending[name] -= 1
        if not self.pending[name]:
            self.close(name)

    def close(self, name: str) -> None:
        """Choose the form of a parameter's complete factors and compute their squared norms."""
        self.pending.pop(name)
        self.factors[name] = materialize_if_cheaper(self.factors[name])
        self.squares[name] = squared_norms(self.factors[name])

    def close_all(self) -> None:
        """Close parameters with missing factors: some of their outputs did not reach the loss."""
        for name in [name for name in self.pending if name in self.factors]:
            self.close(name)


TrainedLayers = list[tuple[nn.Module, dict[str, str]]]


def trained_layers(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> TrainedLayers:
    """Layers with trained parameters, each with a map from attribute to full parameter name.

    Raises:
        UnsupportedParameters: naming the parameters that are in layers without a rule.
    """
    names = {id(p): name for name, p in trained.items()}
    layers = []
    for module in model.modules():
        rules = rules_for(module)
        own = {
            key: names[id(p)]
            for key, p in module._parameters.items()
            if id(p) in names and key in rules
        }
        layers += [(module, own)] if own else []
    unknown = set(trained).difference(*(own.values() for _, own in layers))
    if unknown:
        refuse(
            [name for name in trained if name in unknown],
            "are in layers without a book-keeping rule",
        )
    return layers


@contextmanager
def recording(micro_batch: MicroBatch) -> Iterator[Tape]:
    """Record every layer with trained parameters while the model runs inside the context.

    A trained parameter does not require gradients while the forward of its own layer runs, so
    autograd never computes its unclipped gradient. A use outside of the layer still reaches the
    parameter's ``.grad``, by which the caller detects this use.

    Raises:
        UnsupportedParameters: for a parameter in a layer without a rule.
    """
    layers = trained_layers(micro_batch.model, micro_batch.trained)
    tape, handles = Tape(), []
    try:
        for module, own in layers:
            before, after = _hooks(module, own, micro_batch, tape)
            handles += [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after, prepend=True, with_kwargs=True),
            ]
        yield tape
    finally:
        for handle in handles:
            handle.remove()
        for parameter in micro_batch.trained.values():
            parameter.requires_grad_(True)


def _hooks(
    module: nn.Module, own: dict[str, str], micro_batch: MicroBatch, tape: Tape
) -> tuple[Callable[..., None], Callable[..., Tensor]]:
    """Forward pre-hook and forward hook of one layer, which add its factors to ``tape``."""
    rules, num_rows = rules_for(module), micro_batch.num_rows

    def require_grad(required: bool) -> None:
        for key in own:  # looked up each time: while a sharded layer runs, it has other tensors
            module.get_parameter(key).requires_grad_(required)

    def before(module: nn.Module, args: Any) -> None:
        require_grad(False)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        require_grad(True)
        if not torch.is_grad_enabled():
            return output
        x = layer_input(args, kwargs).detach()
        version = x._version
        if type(module) not in RULES and not is_rms_norm(module, x, output.detach()):
            refuse(own.values(), f"are in a {type(module).__name__} that is no RMSNorm")
        output = _with_gradient_hook(output)
        layout = ROWS_FIRST
        if num_rows > 1:
            if isinstance(module, nn.Embedding) and x.ndim == 2 and len(x) == 1:
                x = x.expand(num_rows, -1)  # position ids that all examples share
                output = output.expand(num_rows, -1, -1)
            positions = num_positions_of(micro_batch.batch)
            layout = batch_axis(module, x, micro_batch.layouts, num_rows, positions, own.values())
        tape.pending.update(own.values())

        def keep(b: Tensor) -> None:
            if x._version != version:
                refuse(own.values(), "had their layer's input changed in place")
            rows = (
                (x[None], b[None])
                if num_rows == 1
                else (rows_first(x, layout, num_rows), rows_first(b, layout, num_rows))
            )
            with torch.no_grad(), torch.autocast(b.device.type, enabled=False):
                for key, name in own.items():
                    tape.add(name, rules[key](module, *rows))

        output.register_hook(keep)
        return output

    return before, after


def _with_gradient_hook(output: Tensor) -> Tensor:
    """Return a layer's output as a tensor whose gradient hook survives a change in place."""
    if not output.requires_grad:
        return output.requires_grad_().clone()
    if output._is_view():
        # a view loses its hook when it is changed in place; this shares memory and is no view
        return torch.ops.aten._unsafe_view(output, output.shape)
    return output
