"""Micro-batch with the settings of its clipped sum, and helpers on batches and their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lowrank_dp import _validate

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class MicroBatch:
    """Rows that run through the model together, and the settings of their clipped sum.

    Attributes:
        model: the model that runs.
        trained: its parameters that require gradients, by name.
        batch: the dict that ``model(**batch)`` takes.
        num_rows: B, the rows of ``batch``.
        first_row: index of the first row in the whole batch; messages count from this index.
        max_grad_norm: C, absolute; 0 for rows that must not count.
        autocast: context in which the forward runs.
        loss_alone: the loss of the first row by itself, which the loss in the batch must equal;
            None where the two are not compared.
        rounding: dtype whose rounding the comparisons of gradients allow; None for that of the
            trained parameters.
        layouts: the layouts that each layer may see (``lowrank_dp.grads.axes``); a batch can rule
            out some of them, so the dict is updated.
    """

    model: nn.Module
    trained: dict[str, nn.Parameter]
    batch: Batch
    num_rows: int
    first_row: int
    max_grad_norm: float
    autocast: AbstractContextManager
    loss_alone: Tensor | None = None
    rounding: torch.dtype | None = None
    layouts: dict[nn.Module, tuple[str, ...]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Device of the trained parameters."""
        return next(iter(self.trained.values())).device

    def clip(self, squared: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Norms (B,) and clip factors ``min(1, C / norm)`` (B,).

        ``squared`` holds the squared gradient norms (B,) of each parameter. The sum and the root
        are in float64, in which the square of no float32 norm overflows or vanishes.

        Raises:
            ValueError: naming the first row whose gradient is not finite.
        """
        start = torch.zeros(self.num_rows, device=self.device, dtype=torch.float64)
        norms = sum((part.to(start) for part in squared), start).sqrt()
        given = norms.to(upcast_dtype(next(iter(self.trained.values()))))
        self.require(given.isfinite(), "has a gradient that is not finite")
        if not self.max_grad_norm:
            return given, torch.zeros_like(norms)
        return given, (self.max_grad_norm / norms).clamp(max=1)

    def require(self, good: Tensor, problem: str) -> None:
        """Raise ``ValueError`` with the index of the first row that is not ``good`` (B,)."""
        if not bool(good.all()):
            row = self.first_row + int(good.logical_not().nonzero()[0])
            raise ValueError(f"batch row {row} {problem}")


SumOf = Callable[[str], Tensor | None]  # parameter name -> clipped sum; None: the loss is constant
Backend = Callable[[MicroBatch], tuple[Tensor, SumOf]]  # -> norms (B,) before clipping, and sums


class UnsupportedParameters(ValueError):
    """Trained parameters whose per-example gradients a backend cannot compute."""


def refuse(
    names: Iterable[str], problem: str, backends: Iterable[str] = ("opacus", "loop")
) -> NoReturn:
    """Raise ``UnsupportedParameters``, naming the parameters and the backends to try instead."""
    shown = _validate.listed([*dict.fromkeys(names)], 5)
    offered = " or ".join(f'backend="{backend}"' for backend in backends)
    raise UnsupportedParameters(
        f"model parameters {shown} {problem}: freeze them (training: "
        f"--train-layers) or use {offered}"
    )


def num_rows_of(batch: Batch) -> int:
    """Number of examples in ``batch``.

    Raises:
        ValueError: if ``batch`` is not a mapping, has no tensor with a row, or has tensors that
            differ in the number of rows.
    """
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
            "tensors with one example per row and at least one row",
            {n: tuple(v.shape) for n, v in batch.items() if isinstance(v, Tensor)},
        )
    if len(set(sizes.values())) > 1:
        _validate.fail("batch", "tensors with equally many rows", sizes)
    return next(iter(sizes.values()))


def num_positions_of(batch: Batch) -> int:
    """Number of positions per row of ``batch``; 0 if no tensor has positions."""
    for name in ("input_ids", "attention_mask", "inputs_embeds"):
        value = batch.get(name)
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[1]
    return 0


def slice_rows(batch: Batch, start: int, stop: int) -> dict[str, Any]:
    """Views of the rows from ``start`` to ``stop`` of every tensor; other values unchanged."""
    return {
        name: value[start:stop].detach() if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def copy_rows(batch: Batch, rows: Sequence[int]) -> dict[str, Any]:
    """Copies of ``rows`` of every tensor, which a model may change in place."""
    return {
        name: value.detach()[list(rows)] if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def upcast_dtype(parameter: Tensor) -> torch.dtype:
    """Dtype of sums and norms: float32, or the parameter's own dtype if that is wider."""
    return torch.promote_types(torch.float32, parameter.dtype)
