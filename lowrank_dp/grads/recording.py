"""Record the input and the output gradient of each trained layer."""

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
from lowrank_dp.grads.microbatch import MicroBatch, refuse, width


@dataclass
class Tape:
    """Per parameter: its factors, how many are still to come, and its squared norms."""

    factors: dict[str, list[Factor]] = field(default_factory=lambda: defaultdict(list))
    pending: Counter[str] = field(default_factory=Counter)
    squares: dict[str, Squares] = field(default_factory=dict)

    def add(self, name: str, factor: Factor) -> None:
        """Keep one factor; the last one that was announced settles the parameter."""
        if name in self.squares:
            refuse([name], "are used in more than one gradient checkpoint")
        self.factors[name].append(factor)
        self.pending[name] -= 1
        if not self.pending[name]:
            self.close(name)

    def close(self, name: str) -> None:
        """Settle a parameter's factors and take their norms."""
        self.pending.pop(name)
        self.factors[name] = materialize_if_cheaper(self.factors[name])
        self.squares[name] = squared_norms(self.factors[name])

    def close_all(self) -> None:
        """Settle what has only part of its factors: some outputs did not reach the loss."""
        for name in [name for name in self.pending if name in self.factors]:
            self.close(name)


Sites = list[tuple[nn.Module, dict[str, str]]]


def trained_layers(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Sites:
    """Layers with trained parameters, each with those parameters: attribute to full name."""
    names = {id(p): name for name, p in trained.items()}
    sites = []
    for module in model.modules():
        rules = rules_for(module)
        own = {
            key: names[id(p)]
            for key, p in module._parameters.items()
            if id(p) in names and key in rules
        }
        sites += [(module, own)] if own else []
    unknown = set(trained).difference(*(own.values() for _, own in sites))
    if unknown:
        refuse(
            [name for name in trained if name in unknown],
            "are in layers without a book-keeping rule",
        )
    return sites


@contextmanager
def recording(work: MicroBatch) -> Iterator[Tape]:
    """Hooks on every layer with trained parameters, all of which must have a rule.

    A trained parameter does not require gradients while its own layer's forward runs, so autograd
    skips its gradient; a use elsewhere still reaches its ``.grad``, which gives it away.
    """
    sites = trained_layers(work.model, work.trained)
    tape, handles = Tape(), []
    try:
        for module, own in sites:
            before, after = _hooks(module, own, work, tape)
            handles += [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after, prepend=True, with_kwargs=True),
            ]
        yield tape
    finally:
        for handle in handles:
            handle.remove()
        for parameter in work.trained.values():
            parameter.requires_grad_(True)


def _hooks(
    module: nn.Module, own: dict[str, str], work: MicroBatch, tape: Tape
) -> tuple[Callable, Callable]:
    """The hooks of one layer: one before its forward, one after."""
    rules, num_rows = rules_for(module), work.num_rows

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
        if not output.requires_grad:
            output = output.requires_grad_().clone()
        elif output._is_view():
            # a view loses its hook when it is changed in place; this shares memory and is no view
            output = torch.ops.aten._unsafe_view(output, output.shape)
        layout = ROWS_FIRST
        if num_rows > 1:
            if isinstance(module, nn.Embedding) and x.ndim == 2 and len(x) == 1:
                x = x.expand(num_rows, -1)  # position ids that all examples share
                output = output.expand(num_rows, -1, -1)
            layout = batch_axis(module, x, work.layouts, num_rows, width(work.batch), own.values())
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
