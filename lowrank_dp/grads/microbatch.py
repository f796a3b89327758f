"""One micro-batch and what a backend is to do with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lowrank_dp import _validate

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch and what to do with it.

    ``first_row`` counts rows for messages. ``bound`` is C; 0 for rows that do not count.
    ``alone`` is the loss of the first row by itself, where the loss in the batch must equal it.
    ``layouts`` are what each layer may see, by ``lowrank_dp.grads.axes``; batches narrow it.
    """

    model: nn.Module
    trained: dict[str, nn.Parameter]
    batch: Batch
    num_rows: int
    first_row: int
    bound: float
    autocast: AbstractContextManager
    alone: Tensor | None = None
    layouts: dict[nn.Module, tuple[str, ...]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(iter(self.trained.values())).device

    def clip(self, squared: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Norms (B,) and clip factors ``min(1, C / norm)`` from squared norms of each parameter.

        All in float64, in which the square of no float32 norm overflows or vanishes.
        """
        start = torch.zeros(self.num_rows, device=self.device, dtype=torch.float64)
        norms = sum((part.to(start) for part in squared), start).sqrt()
        given = norms.to(wide_dtype(next(iter(self.trained.values()))))
        self.require(given.isfinite(), "has a gradient that is not finite")
        return given, (self.bound / norms).clamp(max=1) if self.bound else torch.zeros_like(norms)

    def require(self, good: Tensor, problem: str) -> None:
        """Refuse the first row that is not ``good`` (B,)."""
        if not bool(good.all()):
            row = self.first_row + int(good.logical_not().nonzero()[0])
            raise ValueError(f"batch row {row} {problem}")


class UnsupportedParameters(ValueError):
    """Trained parameters that a backend cannot or must not take."""


def refuse(
    names: Iterable[str], problem: str, backends: Iterable[str] = ("opacus", "loop")
) -> NoReturn:
    """One ``ValueError`` that names the parameters and the backends that may do."""
    listed = [*dict.fromkeys(names)]
    shown = ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
    offered = " or ".join(f'backend="{backend}"' for backend in backends)
    raise UnsupportedParameters(
        f"model parameters {shown} {problem}: freeze them (training: "
        f"--train-layers) or use {offered}"
    )


def num_rows_of(batch: Batch) -> int:
    """The number of examples in ``batch``, whose tensors must agree on it."""
    if not isinstance(batch, Mapping):
        _validate.fail("batch", "the dict that model(**batch) takes", type(batch).__name__)
    sizes = {
        name: value.shape[0] if value.ndim else 0
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    if not sizes or 0 in sizes.values():
        _validate.fail(
            "batch",
            "tensors with one example a row and at least one row",
            {n: tuple(v.shape) for n, v in batch.items() if isinstance(v, Tensor)},
        )
    if len(set(sizes.values())) > 1:
        _validate.fail("batch", "tensors with equally many rows", sizes)
    return next(iter(sizes.values()))


def width(batch: Batch) -> int:
    """Positions in a row of the batch; 0 if it has no tensor of positions."""
    for name in ("input_ids", "attention_mask", "inputs_embeds"):
        value = batch.get(name)
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[1]
    return 0


def rows_of(batch: Batch, start: int, stop: int) -> dict[str, Any]:
    """Some rows of every tensor, and the other values as they are."""
    return {
        name: value[start:stop].detach() if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def copied(batch: Batch, rows: Sequence[int]) -> dict[str, Any]:
    """``rows`` of every tensor, as copies that a model may change in place."""
    return {
        name: value.detach()[list(rows)] if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def wide_dtype(parameter: Tensor) -> torch.dtype:
    """Of sums and norms: float32, or the parameter's own if that is wider."""
    return torch.promote_types(torch.float32, parameter.dtype)
