"""Clipped gradient sums: the public functions of this package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_dp import _validate
from lowrank_dp.grads.alone import gradient_alone
from lowrank_dp.grads.backends import BACKENDS
from lowrank_dp.grads.microbatch import (
    Batch,
    MicroBatch,
    SumOf,
    copy_rows,
    num_rows_of,
    slice_rows,
    upcast_dtype,
)
from lowrank_dp.grads.model_state import state_kept
from lowrank_dp.grads.precheck import Precheck, trained_parameters
from lowrank_dp.grads.undisturbed import gradients_set_aside
from lowrank_dp.models.names import PADDINGS
from lowrank_dp.models.precision import autocast

Sums = dict[str, Tensor]
Reduce = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class PaddingBatch:
    """Micro-batch whose rows do not count in the sums.

    A process runs a padding batch when another process of a sharded model has one micro-batch more.
    """

    batch: Batch


def clipped_sum(
    model: nn.Module,
    batch: Batch,
    max_grad_norm: float,
    *,
    micro_batch_size: int | None = None,
    autocast_dtype: torch.dtype | None = None,
    backend: str = "bookkeeping",
    padding: str = "longest",
    check_rows: bool = True,
) -> tuple[Sums, Tensor]:
    """Sum of the per-example gradients, each clipped to Euclidean norm ``max_grad_norm``.

    With the gradient g_i of example i over all trained parameters together, the sum is
    ``sum_i min(1, C / |g_i|) g_i``. The model keeps its mode, ``.grad``, ``requires_grad`` and
    hooks. After each micro-batch, its attributes and submodules are the same objects as before, and
    its buffers have the same values; the contents of other objects (a list that is an attribute)
    are not restored. Gradient checkpointing works, but saves less memory than usual, since layer
    inputs are kept.

    Args:
        model: called as ``model(**batch)``. Its output has ``.loss``, and ``.logits`` unless the
            backend is ``"loop"``.
        batch: tensors with one example per row, among them ``labels``; other values are passed on.
            The loss of an example is the model's own loss on its row alone. For a causal language
            model, this is the mean over the row's own target tokens.
        max_grad_norm: C > 0, absolute, in the units of the gradient; ``inf`` gives the plain sum.
        micro_batch_size: number of rows in memory at a time; None takes all. The result does not
            depend on the number.
        autocast_dtype: ``torch.bfloat16`` for mixed precision. Sums are accumulated in float32.
        backend: method of computing per-example gradients.
            ``"bookkeeping"``: from layer inputs and output gradients, in one backward pass.
            ``"compiled"``: the same on a graph of ``torch.compile``. The graph is made at the first
            micro-batch of a model and checked against ``"bookkeeping"``.
            ``"opacus"``: by Opacus's hooks, for layers without a rule in this package.
            ``"loop"``: one example at a time, for any model.
        padding: ``"longest"``: padding is not part of a row and must not change its gradient, since
            the length depends on the longest row in the micro-batch. ``"max-length"``: every row
            is padded to one public length, and padding is part of a row; micro-batches of
            different lengths are refused.
        check_rows: whether to examine a model on a few of the given rows when the model is new, in
            another mode or in another layout (see below). With False, only the loss of the first
            row is compared, and no message names a loss or a norm of a row. False is for callers
            whose model was examined on public rows.

    Returns:
        The sums, by ``named_parameters()`` name and in the parameter's shape, for every parameter
        that requires gradients; and the per-example norms before clipping, (B,). Both are float32,
        or float64 for float64 models. A parameter that the loss does not depend on has a sum of
        zeros.

    Raises:
        ValueError: for bad input, naming the argument.
        ValueError: for labels that are no classes of the model or ids out of range, naming the row.
        ValueError: for a parameter in a layer without a rule, used outside of its own layer, or
            with a gradient hook, naming the parameter.
        ValueError: for a loss that is not a mean of one term per example (for instance with an
            auxiliary loss).
        ValueError: for a model that mixes rows, whose gradients depend on padding, or whose
            gradients differ from the backend's.
        ValueError: unless ``check_rows`` is False, for a model whose forward or backward writes to
            a parameter, changes a floating-point buffer or a float attribute (statistics of rows),
            or changes a bool or str attribute (another way to run), naming it.
        ValueError: for a micro-batch so long that its longest row decides the rotary frequencies of
            all its rows (rope types "longrope" and "dynamic"), unless every row is padded to one
            public length and the rope type is "longrope".
        ValueError: for a loss or gradient that is not finite, naming the row. This error depends
            on private data: an observer of it learns one bit about a record. It is raised all the
            same, since such a gradient has no clipped form, and omitting the row would hide
            divergence or a broken record.

    Formal guarantees:
        Sensitivity: adding or removing one row changes the sums of all parameters, concatenated,
            by at most C in Euclidean norm; replacing one row changes them by at most 2C.
        Unit: one row of ``batch``. A record that contributes k rows changes the sums by up to k C.
        Neighbouring relation: add or remove one row.
        Premise: the gradient of a row depends on that row and public values alone.
        Checked: up to three rows of the first micro-batch of a model, per mode and layout, run
            together through the backend, alone through autograd, and alone without padding, in the
            model's own precision; losses, norms and the clipped sum must agree within rounding. In
            every call, the loss of the first row alone must equal its loss in the batch, and the
            longest row must not decide the rotary frequencies of a batch. The input of a trained
            layer must be (B, ..., d), or with book-keeping (T, B, ..., d) or the tokens of all rows
            as one list (B T, d); position ids (1, T) may be shared.
        Assumed: the other rows, and later batches in the same situation, behave as the rows that
            were compared.
        Rounding: norms and clip factors are float64 functions of gradients in the model's
            precision. A norm has a relative error of at most about 1e-4, so a row contributes at
            most about ``C (1 + 1e-4)``. The accumulation of the sum, and a dependence of a row's
            last bits on the batch size, are not covered by the bound.
        Not private: the returned norms, and errors that name a row.
    """
    num_rows = num_rows_of(batch)
    size = (
        num_rows
        if micro_batch_size is None
        else _validate.integer("micro_batch_size", micro_batch_size)
    )
    parts = (slice_rows(batch, start, start + size) for start in range(0, num_rows, size))
    return clipped_sum_over(
        model,
        parts,
        max_grad_norm,
        autocast_dtype=autocast_dtype,
        backend=backend,
        padding=padding,
        check_rows=check_rows,
    )


def clipped_sum_over(
    model: nn.Module,
    batches: Iterable[Batch | PaddingBatch],
    max_grad_norm: float,
    *,
    autocast_dtype: torch.dtype | None = None,
    backend: str = "bookkeeping",
    padding: str = "longest",
    check_rows: bool = True,
    reduce: Reduce | None = None,
) -> tuple[Sums, Tensor]:
    """``clipped_sum`` of a logical batch that arrives in micro-batches, one in memory at a time.

    Micro-batches may differ in size and padding. A Poisson sample can be empty: without a
    micro-batch, the sums are zeros and the norms have shape (0,). Arguments, results, errors and
    guarantees are those of :func:`clipped_sum`; messages count rows from the first micro-batch.

    A model that is sharded over processes (FSDP2's ``fully_shard``, ``reshard_after_forward=True``)
    needs the backend ``"bookkeeping"`` and equally many micro-batches on every process; a process
    that has no more rows passes a :class:`PaddingBatch`.

    Args:
        model: as in :func:`clipped_sum`.
        batches: micro-batches.
        max_grad_norm: as in :func:`clipped_sum`.
        autocast_dtype: as in :func:`clipped_sum`.
        backend: as in :func:`clipped_sum`.
        padding: as in :func:`clipped_sum`.
        check_rows: as in :func:`clipped_sum`.
        reduce: called as ``reduce(name, part)`` with this process's sum of a parameter over one
            micro-batch, in the same order on each process; its result is accumulated instead.
    """
    max_grad_norm = _validate.clip_bound("max_grad_norm", max_grad_norm)
    run = BACKENDS[_validate.choice("backend", backend, BACKENDS)]
    _validate.choice("padding", padding, PADDINGS)
    trained = trained_parameters(model)
    first = next(iter(trained.values()))
    sharded = hasattr(first, "full_tensor")
    if sharded and (reduce is None or backend != "bookkeeping"):
        raise ValueError(
            "model is sharded over processes: it needs backend 'bookkeeping', got "
            f"{backend!r}, and reduce to add up the processes' sums"
        )
    mixed = autocast(first.device, autocast_dtype)
    precheck = Precheck(
        backend, padding, check_rows, sharded, reduce is not None, _fingerprint(model)
    )
    totals: Sums = {}
    norms = [torch.zeros(0, dtype=upcast_dtype(first), device=first.device)]
    rows_before = 0
    for batch in batches:
        counts = not isinstance(batch, PaddingBatch)
        batch = batch.batch if isinstance(batch, PaddingBatch) else batch
        clip = max_grad_norm if counts else 0.0
        rows = num_rows_of(batch)
        micro_batch = MicroBatch(model, trained, batch, rows, rows_before, clip, mixed)
        with torch.enable_grad(), gradients_set_aside(trained), state_kept(model):
            part_norms, sum_of = run(precheck(micro_batch))
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            _accumulate(totals, trained, sum_of, reduce)
        if counts:
            norms.append(part_norms)
            rows_before += rows
    if not totals:
        _accumulate(totals, trained, lambda name: None, reduce)
    return totals, torch.cat(norms)


def _accumulate(
    totals: Sums, trained: dict[str, nn.Parameter], sum_of: SumOf, reduce: Reduce | None
) -> None:
    """Add one micro-batch's clipped sums to ``totals``."""
    for name, p in trained.items():
        part = sum_of(name)
        if part is None:  # the loss does not depend on the parameter
            part = torch.zeros(p.shape, dtype=upcast_dtype(p), device=p.device)
        part = reduce(name, part) if reduce else part
        totals[name] = totals[name].add_(part) if name in totals else part


def _fingerprint(model: nn.Module) -> int:
    """Return a number that identifies the model's layers, their classes and their modes.

    A layer that gets a preconditioner's scales stays the same object, in another class.
    """
    return hash(
        tuple(
            (id(m), type(m), m.training, m.__dict__.get("gradient_checkpointing"))
            for m in model.modules()
        )
    )


def row_gradients(
    model: nn.Module, batch: Batch, *, autocast_dtype: torch.dtype | None = None
) -> list[Sums]:
    """Unclipped gradient of each row, as an ordinary training loop has it from that row alone.

    No backend takes part, so the gradients can serve to check a backend.

    Args:
        model: as in :func:`clipped_sum`.
        batch: as in :func:`clipped_sum`.
        autocast_dtype: as in :func:`clipped_sum`.

    Returns:
        For each row the gradients by parameter name; a parameter that the row's loss does not
        depend on has no entry.
    """
    trained = trained_parameters(model)
    mixed = autocast(next(iter(trained.values())).device, autocast_dtype)
    rows = num_rows_of(batch)
    micro_batch = MicroBatch(model, trained, batch, rows, 0, math.inf, mixed)
    gradients = []
    for row in range(rows):
        with torch.enable_grad(), gradients_set_aside(trained), state_kept(model):
            gradients.append(gradient_alone(micro_batch, copy_rows(batch, [row]))[1])
    return gradients
