"""Per-example gradients of single layers, in factored form: algebra and recording for ``grads``.

For a layer with input ``x`` and output gradient ``b``, a rule gives one trained parameter's
per-example gradients as a *factor*, which is one of

- ``Outer(left, right)``: example i's gradient is ``left_i^T right_i`` and is never formed
  (a Linear weight: ``b`` and ``x``; an Embedding: token ids, as one-hot rows, and ``b``);
- a tensor of shape ``(B, *parameter.shape)``: the gradients themselves (biases, norm layers).

A parameter used several times (re-use, tied weights) has a list of factors whose sum is meant.
Two pure functions finish the job: ``squared_norms`` by inner products of T x T Gram matrices
(ghost norm: Li et al. 2021, arXiv 2110.05679), and ``weighted_sum`` in one matrix product
(book-keeping: Bu et al. 2022, arXiv 2210.00038). B is examples, T positions.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

GRAM_ELEMENTS = 1 << 24  # largest Gram matrix held at once, in elements; more rows go in chunks


class Outer(NamedTuple):
    """Per-example matrices ``left_i^T right_i``, not formed.

    ``left`` is (B, T, rows), or integer ids (B, T) that stand for one-hot rows; ``right`` is
    (B, T, cols).
    """

    left: Tensor
    right: Tensor


Factor = Outer | Tensor
Rule = Callable[[Any, Tensor, Tensor], Factor]


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 if it is in half precision, else unchanged."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


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
            module.max_norm is not None or module.scale_grad_by_freq):
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
    return any(bool(((scale * unit - given).abs() <= allowed).all())
               for scale in (weight, 1 + weight))


def settle(factors: list[Factor]) -> list[Factor]:
    """The cheaper form of a parameter's complete list of factors.

    ``rows * cols <= T (rows + cols)`` makes forming the gradients cheaper than their Gram
    matrices in arithmetic (T rows cols against T^2 (rows + cols)) and in memory alike.
    """
    if any(not isinstance(f, Outer) or not f.left.is_floating_point() for f in factors):
        return factors
    positions = sum(f[0].shape[1] for f in factors)
    rows, cols = (f.shape[-1] for f in factors[0])
    if rows * cols > positions * (rows + cols):
        return factors
    formed = [torch.bmm(wide(f[0]).mT, wide(f[1])) for f in factors]
    return [torch.stack(formed).sum(0) if len(formed) > 1 else formed[0]]


def squared_norms(factors: list[Factor]) -> Tensor:
    """Squared norm of each example's summed gradient: (B,).

    The norm of a sum of outer products needs each pair's inner product,
    ``<l^T r, l'^T r'> = sum((l l'^T) * (r r'^T))``, which also covers a weight that is both
    embedding and output layer without forming vocabulary x width per example.
    """
    formed = [f for f in factors if isinstance(f, Tensor)]
    if formed:
        return sum(formed[1:], formed[0]).flatten(1).square().sum(1)
    outer = [f for f in factors if isinstance(f, Outer)]
    norms = torch.zeros(len(outer[0].left), device=outer[0].right.device,
                        dtype=wide(outer[0].right).dtype)
    for i, one in enumerate(outer):
        for other in outer[:i + 1]:
            cells = one.right.shape[1] * other.right.shape[1]
            for chunk in torch.arange(len(norms)).split(max(1, GRAM_ELEMENTS // cells)):
                rows = slice(int(chunk[0]), int(chunk[-1]) + 1)
                inner = (_gram(one.left[rows], other.left[rows])
                         .mul(_gram(one.right[rows], other.right[rows])).sum((1, 2)))
                norms[rows] += inner if one is other else 2 * inner
    return norms.clamp_(min=0)


def _gram(one: Tensor, other: Tensor) -> Tensor:
    """Inner products of positions, (B, T, d) and (B, S, d) to (B, T, S); ids count as one-hot."""
    if one.is_floating_point() and other.is_floating_point():
        return torch.bmm(wide(one), wide(other).mT)
    if one.is_floating_point():
        return _gram(other, one).mT
    if other.is_floating_point():
        index = one[:, None, :].expand(-1, other.shape[1], -1)
        return wide(other.gather(2, index)).mT
    return one[:, :, None] == other[:, None, :]


def weighted_sum(factors: list[Factor], weights: Tensor, shape: torch.Size) -> Tensor:
    """``sum_i weights_i gradient_i`` of ``shape``, from (B,) weights."""
    total = torch.zeros(0)
    for factor in factors:
        if isinstance(factor, Tensor):
            part = (weights.to(factor) @ factor.flatten(1)).view(shape)
        else:
            part = _weighted_outer(factor, weights, shape)
        total = part if factor is factors[0] else total.add_(part)
    return total


def _weighted_outer(factor: Outer, weights: Tensor, shape: torch.Size) -> Tensor:
    left, right = factor.left, wide(factor.right)
    scale = weights.to(right)[:, None, None]
    if not left.is_floating_point():
        return right.new_zeros(shape).index_add_(0, left.flatten(), (right * scale).flatten(0, 1))
    left = wide(left)
    if left.shape[-1] < right.shape[-1]:
        left = left * scale
    else:
        right = right * scale
    return left.flatten(0, 1).T @ right.flatten(0, 1)


# Recording: hooks that collect the factors during one forward and backward.

@dataclass
class Tape:
    """Per parameter: its factors, how many are still to come, and its squared norms (B,)."""

    factors: dict[str, list[Factor]] = field(default_factory=lambda: defaultdict(list))
    pending: Counter[str] = field(default_factory=Counter)
    squared: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, factor: Factor) -> None:
        """Keep one factor; the last one that was announced settles the parameter."""
        if name in self.squared:
            refuse([name], "are used in more than one gradient checkpoint")
        self.factors[name].append(factor)
        self.pending[name] -= 1
        if not self.pending[name]:
            self.close(name)

    def close(self, name: str) -> None:
        """Settle a parameter's factors and take their norms."""
        self.pending.pop(name)
        self.factors[name] = settle(self.factors[name])
        self.squared[name] = squared_norms(self.factors[name])

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
        own = {key: names[id(p)] for key, p in module._parameters.items()
               if id(p) in names and key in rules}
        sites += [(module, own)] if own else []
    unknown = set(trained).difference(*(own.values() for _, own in sites))
    if unknown:
        refuse([name for name in trained if name in unknown],
               "are in layers without a book-keeping rule")
    return sites


def check_leading_axis(model: nn.Module, trained: Mapping[str, nn.Parameter],
                       forward_one: Callable[[], object]) -> None:
    """Refuse layers whose leading axis is not the examples, though it may have the batch's size.

    In a forward of one example, every trained layer's input must have a leading axis of one. A
    table of relative positions (T, T), say, does not. Takes no random numbers.
    """
    device = next(iter(trained.values())).device
    handles = []
    try:
        for module, own in sites_of(model, trained):
            def look(module: nn.Module, args: Any, kwargs: Any, own: dict[str, str] = own) -> None:
                shape = tuple(layer_input(args, kwargs).shape)
                if shape[0] != 1:
                    refuse(own.values(), f"see an input of shape {shape} for one example, whose "
                           "leading axis is not the batch")
            handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            forward_one()
    finally:
        for handle in handles:
            handle.remove()


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer was called with."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def recording(model: nn.Module, trained: Mapping[str, nn.Parameter], num_rows: int
              ) -> Iterator[Tape]:
    """Hooks on every layer with trained parameters, all of which must have a rule.

    A trained parameter does not require gradients while its own layer's forward runs, so autograd
    skips its gradient; a use elsewhere still reaches its ``.grad``, which gives it away.
    """
    sites = sites_of(model, trained)
    tape, handles = Tape(), []
    try:
        for module, own in sites:
            before, after = _hooks(module, own, num_rows, tape)
            handles += [module.register_forward_pre_hook(before),
                        module.register_forward_hook(after, prepend=True, with_kwargs=True)]
        yield tape
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained.values():
            parameter.requires_grad_(True)


def _hooks(module: nn.Module, own: dict[str, str], num_rows: int, tape: Tape
           ) -> tuple[Callable, Callable]:
    """The hooks of one layer: one before its forward, one after."""
    rules = rules_for(module)

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
        if num_rows > 1:
            if isinstance(module, nn.Embedding) and x.ndim == 2 and len(x) == 1:
                x = x.expand(num_rows, -1)  # position ids that all examples share
                output = output.expand(num_rows, -1, -1)
            if len(x) != num_rows:
                refuse(own.values(), f"see an input of shape {tuple(x.shape)}, whose leading axis "
                       f"is not the batch of {num_rows}")
        tape.pending.update(own.values())

        def keep(b: Tensor) -> None:
            if x._version != version:
                refuse(own.values(), "had their layer's input changed in place")
            rows = (x, b) if num_rows > 1 else (x[None], b[None])
            with torch.no_grad(), torch.autocast(b.device.type, enabled=False):
                for key, name in own.items():
                    tape.add(name, rules[key](module, *rows))

        output.register_hook(keep)
        return output

    return before, after


def refuse(names: Iterable[str], problem: str,
           backends: Iterable[str] = ("opacus", "loop")) -> NoReturn:
    """One ``ValueError`` that names the parameters and the backends that may do."""
    listed = [*dict.fromkeys(names)]
    shown = ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
    offered = " or ".join(f'backend="{backend}"' for backend in backends)
    raise ValueError(f"model parameters {shown} {problem}: freeze them or use {offered}")
