"""Book-keeping on a graph of ``torch.compile``.

Hooks would break the graph at every layer. Instead, the forward adds a tensor of zeros to the
output of each trained layer: the gradient of the loss in these zeros is the gradient in the output.
The graph returns the layers' inputs beside the logits, and the loss is computed outside of the
graph. No weight requires a gradient meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lowrank_dp.grads.axes import layer_input
from lowrank_dp.grads.layers import rules_for
from lowrank_dp.grads.microbatch import Batch, refuse
from lowrank_dp.grads.recording import Tape, TrainedLayers


class Call(NamedTuple):
    """One call of a trained layer.

    Attributes:
        module: the layer.
        own: its trained parameters, attribute to full name.
        axes: number of axes of its output.
        width: last size of its output.
        dtype: dtype of its output.
    """

    module: nn.Module
    own: dict[str, str]
    axes: int
    width: int
    dtype: torch.dtype


class Graph:
    """Compiled forward of one model in one mode.

    Args:
        calls: the calls of trained layers, in the order of the forward.
    """

    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls
        self._inputs: list[Tensor] = []
        self._zeros: list[Tensor] = []
        # the same function objects in every run: torch.compile guards the graph by their identity
        self._forwards = {
            module: self._with_zero(module.forward)
            for module in dict.fromkeys(call.module for call in calls)
        }

        def forward(
            model: nn.Module, zeros: list[Tensor], batch: dict[str, Any]
        ) -> tuple[Tensor, list[Tensor]]:
            self._inputs, self._zeros = [], zeros
            return model(**batch).logits, self._inputs

        self._compiled = torch.compile(forward, dynamic=True, fullgraph=True)

    def _with_zero(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a ``forward`` that records its input and adds a tensor of zeros to its output."""

        def changed(*args: Any, **kwargs: Any) -> Tensor:
            output = forward(*args, **kwargs)
            zero = self._zeros[len(self._inputs)]
            self._inputs.append(layer_input(args, kwargs).detach())
            return output.expand(zero.shape) + zero  # shared position ids give one row

        return changed

    def run(
        self, model: nn.Module, batch: Batch, num_rows: int
    ) -> tuple[Tensor, Callable[[Tensor, Tape], None]]:
        """Run the forward on a batch of ``num_rows`` rows.

        Returns:
            The logits, and a function ``fill(total, tape)`` that adds the factors of a total loss
            to a tape.
        """
        length = batch["input_ids"].shape[1]
        device = batch["input_ids"].device
        zeros = [
            torch.zeros((), dtype=call.dtype, device=device)
            .expand((num_rows, length, call.width) if call.axes == 3 else (num_rows, call.width))
            .requires_grad_()
            for call in self._calls
        ]
        with self._replaced():
            logits, inputs = self._compiled(
                model, zeros, {name: value for name, value in batch.items() if name != "labels"}
            )

        @torch.no_grad()
        def fill(total: Tensor, tape: Tape) -> None:
            gradients = torch.autograd.grad(total, zeros, allow_unused=True)
            reached = [
                (call, x, b)
                for call, x, b in zip(self._calls, inputs, gradients, strict=True)
                if b is not None
            ]
            for call, _, _ in reached:
                tape.pending.update(call.own.values())
            for call, x, b in reached:
                rules = rules_for(call.module)
                x = x.expand(num_rows, *x.shape[1:])
                for key, name in call.own.items():
                    tape.add(name, rules[key](call.module, x, b))

        return logits, fill

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        """Use the changed forwards inside the context, in which no weight requires a gradient."""
        parameters = [
            p
            for module in self._forwards
            for p in module.parameters(recurse=False)
            if p.requires_grad
        ]
        try:
            for module, forward in self._forwards.items():
                module.forward = forward
            for p in parameters:
                p.requires_grad_(False)
            yield
        finally:
            for module in self._forwards:
                vars(module).pop("forward", None)
            for p in parameters:
                p.requires_grad_(True)


def trace_calls(model: nn.Module, layers: TrainedLayers, batch: Batch) -> tuple[list[Call], Any]:
    """Run an ordinary forward; return the calls of ``layers`` in order, and the model's output.

    Raises:
        UnsupportedParameters: for a layer whose output is neither (B, T, d) nor (B, d).
    """
    calls, handles = [], []
    try:
        for module, own in layers:

            def look(
                module: nn.Module, args: Any, output: Tensor, own: dict[str, str] = own
            ) -> None:
                if output.ndim not in (2, 3):
                    refuse(
                        own.values(),
                        f"give an output of shape {tuple(output.shape)}, which "
                        "the compiled backend does not take",
                        ("bookkeeping",),
                    )
                calls.append(Call(module, own, output.ndim, output.shape[-1], output.dtype))

            handles.append(module.register_forward_hook(look))
        with torch.no_grad():
            output = model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


_GRAPHS: WeakKeyDictionary[nn.Module, dict[Any, tuple[Graph, str]]] = WeakKeyDictionary()


def compiled_graphs(model: nn.Module) -> dict[Any, tuple[Graph, str]]:
    """Graphs of a model, each with its kind of loss.

    The key of the dict holds everything else that a graph depends on: trained names, mode and
    autocast.
    """
    return _GRAPHS.setdefault(model, {})
