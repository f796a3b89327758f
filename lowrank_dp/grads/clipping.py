"""The clipped gradient sum: the public functions of this package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowrank_dp import _validate
from lowrank_dp.grads import independence
from lowrank_dp.grads.axes import Layouts
from lowrank_dp.grads.backends import BACKENDS, SumOf, first_alone, require_compilable
from lowrank_dp.grads.losses import check_labels
from lowrank_dp.grads.microbatch import (
    Batch,
    MicroBatch,
    copied,
    num_rows_of,
    rows_of,
    wide_dtype,
    width,
)

Sums = dict[str, Tensor]


Reduce = Callable[[str, Tensor], Tensor]


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
    """Sum over examples of their gradients, each clipped to norm ``max_grad_norm``.

    Args:
        model: called as ``model(**batch)``; its output has ``.loss``, and ``.logits`` unless the
            backend is ``"loop"``.
        batch: tensors with one example a row, ``labels`` among them; values that are not tensors
            are passed on. An example's loss is the model's own loss on its row alone (a causal
            language model: the mean over that row's own target tokens).
        max_grad_norm: C > 0. An example's gradient over all trained parameters together is
            multiplied by ``min(1, C / norm)``; ``inf`` gives the plain sum.
        micro_batch_size: rows that are in memory at a time; the result does not depend on it.
        autocast_dtype: ``torch.bfloat16`` for mixed precision; accumulation stays in float32.
        backend: ``"bookkeeping"``; ``"compiled"``, the same on a graph of ``torch.compile``, which
            the first micro-batch of a model makes, in a minute, and checks against book-keeping;
            ``"opacus"``, per-example gradients by Opacus's hooks, for layers without a rule here;
            ``"loop"``, one example at a time, for any model.
        padding: ``"longest"``: the padding of a row is no part of the row, and must not change
            its gradient, since it follows the longest row beside it. ``"max-length"``: every row
            is padded to one length that is public, so that padding is part of a row; micro-batches
            of different lengths are refused.
        check_rows: whether a model that is met for the first time, or in another mode or layout,
            is examined on a few of the given rows, as below. False is for callers who have had
            the same model examined on public rows: then only the first row is looked at, and no
            message names a loss or a norm of a row.

    Returns:
        The sums, by ``named_parameters()`` name for every parameter that requires gradients and
        in its shape, and the per-example norms before clipping, (B,). Both float32, or float64
        for float64 models. A parameter that the loss does not depend on has a sum of zeros.

    Raises:
        ValueError: naming the argument, for bad input; naming the row, for labels that are no
            classes of the model and for ids that it does not know; naming the parameters, for
            those in layers without a rule, used outside of their own layer, or with a gradient
            hook, which no backend would apply to single rows; for a loss that is not a mean of one
            term an example (as with an auxiliary loss); and for a model that mixes rows, minds
            padding, or has other gradients than the backend finds.
        ValueError: naming the row, for a loss or gradient that is not finite. This stop depends on
            the data: whoever sees it learns one bit about a record. It stays, since such a
            gradient has no clipped form, and a run that went on without the row would hide that it
            has diverged or that a record is broken.

    Rows must be independent, or C bounds nothing. So up to three rows of the first micro-batch of
    a model (in each mode and layout) are run together through the backend, alone through
    autograd, and alone without padding, in the model's own precision; losses, norms and the
    clipped sum must agree within rounding. In every call the loss of the first row alone must be
    its loss in the batch. What a trained layer sees must be (B, ..., d), or with book-keeping
    (T, B, ..., d) or the tokens of all rows as one list (B T, d); position ids of shape (1, T) may
    be common to all examples.
    Gradient checkpointing works, and saves less than usual because layer inputs are kept.

    """
    num_rows = num_rows_of(batch)
    size = (
        num_rows
        if micro_batch_size is None
        else _validate.integer("micro_batch_size", micro_batch_size)
    )
    parts = (rows_of(batch, start, start + size) for start in range(0, num_rows, size))
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

    The micro-batches may differ in size and padding. No micro-batch at all, which Poisson sampling
    can draw, gives sums of zeros and no norms. Arguments, results and errors are those of
    ``clipped_sum``; rows in messages are counted from the first micro-batch.

    A model that is sharded over processes (FSDP2's ``fully_shard``, with ``reshard_after_forward``)
    needs book-keeping, as many micro-batches on every process (:class:`PaddingBatch` ones where rows run
    out) and ``reduce(name, part)``: called for every parameter in the same order on each process
    with this process's sum over a micro-batch, whole; what it returns is added up in its stead.
    """
    bound = _validate.clip_bound("max_grad_norm", max_grad_norm)
    run = BACKENDS[_validate.choice("backend", backend, BACKENDS)]
    _validate.choice("padding", padding, independence.PADDINGS)
    trained = _trained(model)
    first = next(iter(trained.values()))
    if sharded := hasattr(first, "full_tensor"):
        if reduce is None or backend != "bookkeeping":
            raise ValueError(
                "model is sharded over processes: it needs backend 'bookkeeping', got "
                f"{backend!r}, and reduce to add up the processes' sums"
            )
    autocast = _autocast(first, autocast_dtype)
    totals: Sums = {}
    norms = [torch.zeros(0, dtype=wide_dtype(first), device=first.device)]

    def add(sum_of: SumOf) -> None:
        for name, p in trained.items():
            part = sum_of(name)
            if part is None:  # the loss does not depend on it
                part = torch.zeros(p.shape, dtype=wide_dtype(p), device=p.device)
            part = reduce(name, part) if reduce else part
            totals[name] = totals[name].add_(part) if name in totals else part

    layers = hash(
        tuple(
            (id(m), m.training, m.__dict__.get("gradient_checkpointing")) for m in model.modules()
        )
    )
    widths: set[int] = set()
    layouts: Layouts | None = None
    narrow = False
    for batch in batches:
        idle = isinstance(batch, PaddingBatch)
        batch = batch.batch if isinstance(batch, PaddingBatch) else batch
        rows, before = num_rows_of(batch), [*map(len, norms)]
        check_labels(model, batch, sum(before))
        widths.add(width(batch))
        if padding == "max-length" and len(widths) > 1:
            raise ValueError(
                "micro-batches must all have one length with padding 'max-length', "
                f"got {' and '.join(map(str, sorted(widths)))} positions"
            )
        work = MicroBatch(
            model, trained, batch, rows, sum(before), 0.0 if idle else bound, autocast
        )
        with torch.enable_grad(), _kept_gradients(trained):
            if backend == "compiled":
                require_compilable(work)
            # processes that share a model look at the same time, whatever their rows; where a row
            # is one position, layouts are alike, and the next micro-batch is looked at as well
            looking = not totals if reduce else rows > 1 and (layouts is None or narrow)
            alone, layouts = first_alone(work, backend) if looking else (None, layouts)
            narrow = (narrow or looking) and width(batch) == 1
            work = replace(work, layouts={} if layouts is None else layouts)
            if not sharded and (
                independence.verified(work, backend, BACKENDS, padding, layers)
                if check_rows
                else independence.known_repeatable(model, layers)
            ):
                work = replace(work, alone=alone)
            part_norms, sum_of = run(work)
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            add(sum_of)
        norms += [] if idle else [part_norms]
    if not totals:
        add(lambda name: None)
    return totals, torch.cat(norms)


def row_gradients(
    model: nn.Module, batch: Batch, *, autocast_dtype: torch.dtype | None = None
) -> list[Sums]:
    """Each row's gradient, unclipped, as an ordinary training loop has it from that row alone.

    No backend takes part, so a backend can be compared with the gradients. Arguments are those of
    ``clipped_sum``. A parameter that a row's loss does not depend on is left out.
    """
    trained = _trained(model)
    rows = num_rows_of(batch)
    work = MicroBatch(
        model,
        trained,
        batch,
        rows,
        0,
        math.inf,
        _autocast(next(iter(trained.values())), autocast_dtype),
    )
    with torch.enable_grad(), _kept_gradients(trained):
        return [independence.gradient_alone(work, copied(batch, [row]))[1] for row in range(rows)]


def _autocast(parameter: Tensor, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast of the parameter's device, or a context that does nothing."""
    if dtype not in (None, torch.bfloat16):
        _validate.fail(
            "autocast_dtype", "None or torch.bfloat16 (float16 would need loss scaling)", dtype
        )
    return torch.autocast(parameter.device.type, dtype) if dtype else nullcontext()


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name; refuses what no backend can clip."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("model must have at least one parameter with requires_grad, got none")
    for name, p in trained.items():
        if not hasattr(p, "full_tensor") and (
            p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
        ):
            raise ValueError(
                f"model parameter {name} has a gradient hook, which would not act on "
                "the gradients of single rows: remove the hook, or freeze the "
                "parameter"
            )
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"model must keep examples apart, got {name!r}: batch normalisation "
                "in training mode (use .eval() on it, or another norm layer)"
            )
    return trained


@dataclass(frozen=True)
class PaddingBatch:
    """A micro-batch whose rows do not count: run only because other processes have one more."""

    batch: Batch


@contextmanager
def _kept_gradients(trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Set ``.grad`` aside, and put it back whatever happens."""
    kept = {name: p.grad for name, p in trained.items()}
    try:
        for p in trained.values():
            p.grad = None
        yield
    finally:
        for name, p in trained.items():
            p.grad = kept[name]
