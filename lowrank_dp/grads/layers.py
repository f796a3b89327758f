"""Layers with a rule for their per-example gradients, and the hooks that record them.

For a layer with input ``x`` and output gradient ``b``, a rule gives one trained parameter's
per-example gradients as a factor of ``lowrank_dp.grads.factors``. B is examples, T positions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lowrank_dp.grads.axes import ROWS_FIRST, batch_axis, layer_input, rows_first
from lowrank_dp.grads.factors import Factor, Outer, Squares, settle, squared_norms, wide
from lowrank_dp.grads.work import Work, refuse, width

Rule = Callable[[Any, Tensor, Tensor], Factor]


def _tokens(tensor: Tensor) -> Tensor:
    """(B, ..., d) to (B, T, d)."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _row_sums(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, ..., *shape) summed to (B, *shape), in float32 or wider."""
    return wide(tensor).reshape(len(tensor), -1, *shape).sum(1)


def _linear_weight(module: nn.Linear, x: Tensor, b: Tensor) -> Factor:
    return Outer(_tokens(b), _tokens(x))


def _conv1d_weight(module: Conv1D, x: Tensor, b: Tensor) -> Factor:
    return Outer(_tokens(x), _tokens(b))


def _bias(module: Any, x: Tensor, b: Tensor) -> Factor:
    return _row_sums(b, module.bias.shape)


def _embedding_weight(module: nn.Embedding, x: Tensor, b: Tensor) -> Factor:
    if module.padding_idx is not None:
        b = b.masked_fill((x == module.padding_idx).unsqueeze(-1), 0)
    return Outer(x.reshape(len(x), -1), _tokens(b))


def _layer_norm_weight(module: nn.LayerNorm, x: Tensor, b: Tensor) -> Factor:
    unit = functional.layer_norm(wide(x), module.normalized_shape, eps=module.eps)
    return _row_sums(unit.mul_(wide(b)), module.normalized_shape)


def _rms_norm_weight(module: Any, x: Tensor, b: Tensor) -> Factor:
    return _row_sums(_rms_unit(module, x).mul_(wide(b)), module.weight.shape)


def _rms_unit(module: Any, x: Tensor) -> Tensor:
    """``x`` at unit root mean square, in float32 or wider."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return functional.rms_norm(wide(x), module.weight.shape, eps=eps)


_LINEAR: dict[str, Rule] = {"weight": _linear_weight, "bias": _bias}
_RMS_NORM: dict[str, Rule] = {"weight": _rms_norm_weight}

RULES: dict[type[nn.Module], dict[str, Rule]] = {
    nn.Linear: _LINEAR,
    Conv1D: {"weight": _conv1d_weight, "bias": _bias},
    nn.Embedding: {"weight": _embedding_weight},
    nn.LayerNorm: {"weight": _layer_norm_weight, "bias": _bias},
    nn.RMSNorm: _RMS_NORM,
}


def rules_for(module: nn.Module) -> Mapping[str, Rule]:
    """Parameter name to rule, empty when the layer's forward is not exactly a known one.

    A subclass may scale or shift what its parent computes, so types are matched exactly; the
    RMSNorm that most architectures define for themselves is matched by name and then checked by
    ``is_rms_norm`` on what it computed.
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
    """Whether ``module`` gave ``w u`` or ``(1 + w) u`` (Gemma) for ``u = x / rms(x)``.

    Both have the per-example weight gradient ``sum_t b_t u_t``. Looks at the first example only.
    """
    unit, given, weight = _rms_unit(module, x[:1]), wide(y[:1]), wide(module.weight)
    half = torch.bfloat16 in (x.dtype, y.dtype) or torch.float16 in (x.dtype, y.dtype)
    allowed = (3e-2 if half else 1e-4) * given.abs().amax()
    return any(
        bool(((scale * unit - given).abs() <= allowed).all()) for scale in (weight, 1 + weight)
    )


# Recording: hooks that collect the factors during one forward and backward.


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
        self.factors[name] = settle(self.factors[name])
        self.squares[name] = squared_norms(self.factors[name])

    def close_all(self) -> None:
        """Settle what has only part of its factors: some outputs did not reach the loss."""
        for name in [name for name in self.pending if name in self.factors]:
            self.close(name)


Sites = list[tuple[nn.Module, dict[str, str]]]


def sites_of(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Sites:
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
def recording(work: Work) -> Iterator[Tape]:
    """Hooks on every layer with trained parameters, all of which must have a rule.

    A trained parameter does not require gradients while its own layer's forward runs, so autograd
    skips its gradient; a use elsewhere still reaches its ``.grad``, which gives it away.
    """
    sites = sites_of(work.model, work.trained)
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
    module: nn.Module, own: dict[str, str], work: Work, tape: Tape
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
