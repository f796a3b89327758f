"""Frozen prefix of a model: the frozen blocks, run alone or replaced by their stored output."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dp.models.heads import head_modules, without_adapter
from lowrank_dp.models.trainable import blocks

STATES = "prefix_states"  # key of a batch's entry with the output of the frozen prefix


class FrozenPrefix:
    """Transformer blocks below the first trained block, with all layers below them.

    While the object is installed, a batch may hold the prefix's output, (B, T, d), under the key
    ``STATES``. On such a batch, the model skips the blocks of the prefix and runs the rest of its
    forward pass (masks, positions, trained blocks, head and loss). On any other batch, the whole
    model runs. The caller must verify that both results agree, since a model may use the output of
    a frozen block in more places than the next block.

    Args:
        model: a transformers or PEFT model, with ``requires_grad`` set on its trained parameters.

    Raises:
        ValueError: if no block is frozen below the first trained block.
    """

    def __init__(self, model: Any) -> None:
        base = without_adapter(model)
        found = blocks(base)
        modules = [[base.get_submodule(name) for name in names] for names in found]
        self.num_blocks = len(found)
        frozen = [not any(_trains(module) for module in block) for block in modules]
        self.length = frozen.index(False) if False in frozen else len(frozen)
        if not self.length:
            raise ValueError("no transformer block is frozen below the first trained block")
        if any(len(block) > 1 for block in modules[: self.length]):
            raise ValueError(f"a block of {type(base).__name__} consists of several modules")
        self._model = model
        self._blocks = [block[0] for block in modules[: self.length]]
        # the head with PEFT's frozen copy of it, which is drawn anew by each seed
        upper = (*itertools.chain(*modules[self.length :]), *head_modules(base).values())
        above = [m for module in upper for m in module.modules()]
        self._trained = {
            name: module
            for name, module in base.named_modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
        }
        self._above = {id(t) for m in (*above, *self._trained.values()) for t in _own_tensors(m)}
        last = modules[-1][0] if self.length < len(found) else None
        self._attention = getattr(last, "attention", None)
        self._states: Tensor | None = None
        self._wrap: Callable[[Tensor], Any] = lambda states: states
        self._undo: list[Callable[[], Any]] = []

    def tensors(self) -> dict[str, Tensor]:
        """Return the frozen parameters and the buffers that the prefix may use, by name.

        Parameters and buffers of the blocks above, of the head and of trained layers are left out.
        """
        base = without_adapter(self._model)
        named = {**dict(base.named_parameters()), **dict(base.named_buffers())}
        return {
            name: tensor
            for name, tensor in named.items()
            if id(tensor) not in self._above and not tensor.requires_grad
        }

    @torch.no_grad()
    def run(self, batch: Mapping[str, Any]) -> Tensor:
        """Run the prefix alone on a batch, and return its output (B, T, d).

        Raises:
            ValueError: if the model is in training mode, if the output is not one tensor (B, T, d),
                or if a trained layer runs before the last frozen block.
        """
        if self._model.training:
            raise ValueError("model must be in evaluation mode, got training mode")
        handles = [self._blocks[-1].register_forward_hook(_stop)] + [
            module.register_forward_pre_hook(partial(_refuse, name))
            for name, module in self._trained.items()
        ]
        try:
            self._model(**{name: value for name, value in batch.items() if name != STATES})
        except _Reached as reached:
            output = reached.output
        else:
            raise ValueError("the model does not run its last frozen block")
        finally:
            for handle in handles:
                handle.remove()
        states = output[0] if isinstance(output, tuple) else output
        rest = output[1:] if isinstance(output, tuple) else ()
        whole = tuple(batch["input_ids"].shape)
        if not isinstance(states, Tensor) or any(part is not None for part in rest):
            raise ValueError("a frozen block returns more than one tensor")
        if states.ndim != 3 or tuple(states.shape[:2]) != whole:
            raise ValueError(
                f"a frozen block's output has shape {tuple(states.shape)} for a batch {whole}"
            )
        if isinstance(output, tuple):
            self._wrap = lambda given: (given, *rest)
        return states

    def install(self, *, first_position_only: bool = False) -> None:
        """Make the model read the entry ``STATES`` of a batch; :meth:`run` must be called before.

        Args:
            first_position_only: whether the last block computes its layers after the attention at
                the first position only, on a batch with the entry. The result is correct if the
                classifier reads no other position of the last block and the layers after the
                attention treat each position separately.

        Raises:
            ValueError: for ``first_position_only`` if the last block is frozen or has no module
                ``attention``.
        """
        if first_position_only and not isinstance(self._attention, nn.Module):
            raise ValueError("the last block must train and have a module named attention")

        def take(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
            self._states = kwargs.get(STATES)
            return args, {name: value for name, value in kwargs.items() if name != STATES}

        def drop(module: nn.Module, args: Any, output: Any) -> None:
            self._states = None

        hooks = [
            self._model.register_forward_pre_hook(take, with_kwargs=True),
            self._model.register_forward_hook(drop, always_call=True),
        ]
        if first_position_only and self._attention is not None:
            hooks.append(self._attention.register_forward_hook(self._first_position))
        self._undo = [hook.remove for hook in hooks]
        for block in self._blocks:
            block.forward = self._skipping(block, block.forward)
            self._undo.append(partial(block.__dict__.pop, "forward", None))

    def _first_position(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._states is None:
            return output
        # contiguous: torch copies a frozen weight once per row of an input that is a strided slice
        if isinstance(output, tuple):
            return (output[0][:, :1].contiguous(), *output[1:])
        return output[:, :1].contiguous()

    def remove(self) -> None:
        """Undo :meth:`install`."""
        while self._undo:
            self._undo.pop()()

    def _skipping(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward method that returns the stored output, if the batch holds it."""

        def skipping(*args: Any, **kwargs: Any) -> Any:
            if self._states is None:
                return forward(*args, **kwargs)
            dtype = next((p.dtype for p in block.parameters()), self._states.dtype)
            if torch.is_autocast_enabled(self._states.device.type):
                dtype = self._states.dtype
            return self._wrap(self._states.to(dtype))

        return skipping


class _Reached(Exception):
    """Exception that ends a forward pass at the last frozen block, and carries its output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Reached(output)


def _refuse(name: str, module: nn.Module, args: Any) -> None:
    raise ValueError(f"{name or 'the model'} is trained, and runs below the last frozen block")


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
