"""State that a forward may change on a model: attributes, submodules, buffers and parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lowrank_dp.grads.frequencies import chooses_frequencies


@dataclass(frozen=True)
class _Kept:
    """A module's state.

    Attributes:
        name: the module's name in the model; "" for the model itself.
        module: the module.
        attributes: its attributes, as references.
        submodules: its own submodules, as references.
        buffers: its own buffers, as references.
        values: copies of these buffers.
    """

    name: str
    module: nn.Module
    attributes: dict[str, Any]
    submodules: dict[str, nn.Module | None]
    buffers: dict[str, Tensor | None]
    values: dict[str, Tensor]


class ModelState:
    """State of a model at one moment.

    Attributes are kept as references: the contents of a list, a dict, or a tensor that is no buffer
    are not restored. Parameters are not copied, and a write through ``.data`` is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            _Kept(
                name,
                module,
                dict(vars(module)),
                dict(module._modules),
                dict(module._buffers),
                {key: b.detach().clone() for key, b in module._buffers.items() if b is not None},
            )
            for name, module in model.named_modules()
        ]
        self._versions = [
            (name, p, p._version) for name, p in model.named_parameters() if not p.is_inference()
        ]

    def restore(self) -> None:
        """Give the model the attributes, submodules and buffers that it had.

        Attributes of a model that wrote to its parameters stay, except for the mode: they may
        describe the parameters.
        """
        written = self._written() is not None
        for kept in self._kept:
            kept.module.training = kept.attributes["training"]
            if not written:
                _replace(vars(kept.module), kept.attributes)
                _replace(kept.module._modules, kept.submodules)
            _replace(kept.module._buffers, kept.buffers)
            with torch.no_grad():
                for key, value in kept.values.items():
                    here = kept.buffers[key]
                    if here is not None and not torch.equal(here, value):
                        here.copy_(value)

    def require_same(self) -> None:
        """Refuse a model that has written to its parameters, kept values or changed its way to run.

        Accepted are changes of whole numbers, which are lengths and counters; buffers and
        attributes that were None or missing before; buffers of another shape, which are tables that
        grow with the length of a batch; and rotary frequencies, which
        :mod:`lowrank_dp.grads.frequencies` checks. :meth:`restore` undoes these changes.

        Raises:
            ValueError: for a parameter that was written to; for a floating-point buffer or a float
                with other values, which are statistics of rows; and for a bool or str with another
                value, which chooses how the model runs. The message names it.
        """
        written = self._written()
        if written is not None:
            raise ValueError(
                f"model must leave its parameters to the optimizer, and a forward writes to "
                f"parameter {written}: switch off what writes to it"
            )
        for kept in self._kept:
            if not chooses_frequencies(kept.module):
                _require_same_buffers(kept)
                _require_same_attributes(kept)

    def _written(self) -> str | None:
        """Return the name of a parameter that was written to in place, or None."""
        return next((name for name, p, version in self._versions if p._version != version), None)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[ModelState]:
    """Restore the model's attributes, submodules and buffers afterwards."""
    state = ModelState(model)
    try:
        yield state
    finally:
        state.restore()


def _replace(here: dict[str, Any], kept: dict[str, Any]) -> None:
    """Make ``here`` the same dict as ``kept``, in the order of ``kept``."""
    if here.keys() != kept.keys() or any(here[key] is not value for key, value in kept.items()):
        here.clear()
        here.update(kept)


def _require_same_buffers(kept: _Kept) -> None:
    for key, before in kept.values.items():
        after = kept.module._buffers.get(key)
        if (
            after is not None
            and before.is_floating_point()
            and after.shape == before.shape
            and not torch.equal(after.to(before), before)
            and not torch.allclose(after.to(before), before, rtol=0.0, atol=0.0, equal_nan=True)
        ):
            _refuse_values(kept, f"buffer {_path(kept, key)}")


def _require_same_attributes(kept: _Kept) -> None:
    for key, before in kept.attributes.items():
        after = vars(kept.module).get(key)
        if (
            not isinstance(before, bool | str | float)
            or type(after) is not type(before)
            or after == before
            or key == "training"
        ):
            continue
        if isinstance(before, float) and before == before:  # a NaN differs from itself
            _refuse_values(kept, f"attribute {_path(kept, key)}")
        if not isinstance(before, float):
            raise ValueError(
                f"model must run every batch in the same way, and a forward changes "
                f"{_path(kept, key)} from {before!r} to {after!r}: set it to {after!r} before "
                "(train: in config.json)"
            )


def _refuse_values(kept: _Kept, what: str) -> NoReturn:
    eval_mode = "put the module in eval mode (train: leave dropout out), or "
    raise ValueError(
        f"model must keep nothing of the rows that it has seen, and a forward changes {what}: "
        f"{eval_mode if kept.attributes['training'] else ''}switch off what it keeps "
        "(nn.InstanceNorm1d: track_running_stats=False)"
    )


def _path(kept: _Kept, key: str) -> str:
    return f"{kept.name}.{key}" if kept.name else key
