"""Per-example gradient norms and the clipped gradient sum, in one backward pass.

Book-keeping (Bu et al. 2022, arXiv 2210.00038): hooks keep each trained layer's input and output
gradient, from which the norm of every example's gradient follows (Li et al. 2021, arXiv
2110.05679) and then, in one matrix product a layer, the sum of the clipped gradients. The trained
weights do not require gradients inside their own layers meanwhile, so autograd never computes the
unclipped sum that would be thrown away. The algebra of each layer is in ``layers``.

The model is left as it was found: mode, ``.grad``, ``requires_grad`` and hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from lowrank_dp import _validate
from lowrank_dp.grads.compiled import Graph, calls_of, graphs_of
from lowrank_dp.grads.layers import (
    Tape,
    check_leading_axis,
    recording,
    refuse,
    sites_of,
    squared_norms,
    weighted_sum,
    wide,
)

Batch = Mapping[str, Any]
Sums = dict[str, Tensor]
SumOf = Callable[[str], Tensor | None]
Reduce = Callable[[str, Tensor], Tensor]
PLAIN = 'backend="bookkeeping" (training: no --compile)'
IGNORED = -100  # the label that transformers leaves out of a loss


def clipped_sum(model: nn.Module, batch: Batch, max_grad_norm: float, *,
                micro_batch_size: int | None = None,
                autocast_dtype: torch.dtype | None = None,
                backend: str = "bookkeeping") -> tuple[Sums, Tensor]:
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
            ``"opacus"``, per-example gradients by Opacus's hooks, for
            layers without a rule here; ``"loop"``, one example at a time, for any model.

    Returns:
        The sums, by ``named_parameters()`` name for every parameter that requires gradients and
        in its shape, and the per-example norms before clipping, (B,). Both float32, or float64
        for float64 models. A parameter that the loss does not depend on has a sum of zeros.

    Raises:
        ValueError: naming the argument, for bad input; naming the parameters, for those in layers
            without a rule or used outside of their own layer; and for a loss that is not a mean
            of one term an example (as with an auxiliary loss), or is not finite for some row.

    The leading axis of a trained layer's input must be the examples, which a forward of the first
    example alone verifies; other layouts are refused, except that position ids of shape (1, T)
    may be common to all examples. At batch size one any layout will do.
    Gradient checkpointing works, and saves less than usual because layer inputs are kept.

    """
    num_rows = _num_rows(batch)
    size = num_rows if micro_batch_size is None else _validate.integer(
        "micro_batch_size", micro_batch_size)
    parts = (_rows(batch, start, start + size) for start in range(0, num_rows, size))
    return clipped_sum_over(model, parts, max_grad_norm, autocast_dtype=autocast_dtype,
                            backend=backend)


def clipped_sum_over(model: nn.Module, batches: Iterable[Batch | Idle], max_grad_norm: float, *,
                     autocast_dtype: torch.dtype | None = None, backend: str = "bookkeeping",
                     reduce: Reduce | None = None) -> tuple[Sums, Tensor]:
    """``clipped_sum`` of a logical batch that arrives in micro-batches, one in memory at a time.

    The micro-batches may differ in size and padding. No micro-batch at all, which Poisson sampling
    can draw, gives sums of zeros and no norms. Arguments, results and errors are those of
    ``clipped_sum``; rows in messages are counted from the first micro-batch.

    A model that is sharded over processes (FSDP2's ``fully_shard``, with ``reshard_after_forward``)
    needs book-keeping, as many micro-batches on every process (:class:`Idle` ones where rows run
    out) and ``reduce(name, part)``: called for every parameter in the same order on each process
    with this process's sum over a micro-batch, whole; what it returns is added up in its stead.
    """
    bound = _validate.clip_bound("max_grad_norm", max_grad_norm)
    run = BACKENDS[_validate.choice("backend", backend, BACKENDS)]
    if autocast_dtype not in (None, torch.bfloat16):
        _validate.fail("autocast_dtype", "None or torch.bfloat16 (float16 would need loss scaling)",
                       autocast_dtype)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("model must have at least one parameter with requires_grad, got none")
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(f"model must keep examples apart, got {name!r}: batch normalisation "
                             "in training mode (use .eval() on it, or another norm layer)")
    first = next(iter(trained.values()))
    if hasattr(first, "full_tensor") and (reduce is None or backend != "bookkeeping"):
        raise ValueError("model is sharded over processes: it needs backend 'bookkeeping', got "
                         f"{backend!r}, and reduce to add up the processes' sums")
    autocast = (torch.autocast(first.device.type, autocast_dtype) if autocast_dtype
                else nullcontext())
    totals: Sums = {}
    norms = [torch.zeros(0, dtype=_wide_dtype(first), device=first.device)]

    def add(sum_of: SumOf) -> None:
        for name, p in trained.items():
            part = sum_of(name)
            if part is None:  # the loss does not depend on it
                part = torch.zeros(p.shape, dtype=_wide_dtype(p), device=p.device)
            part = reduce(name, part) if reduce else part
            totals[name] = totals[name].add_(part) if name in totals else part

    for batch in batches:
        idle = isinstance(batch, Idle)
        batch = batch.batch if isinstance(batch, Idle) else batch
        rows, before = _num_rows(batch), [*map(len, norms)]
        # processes that share a model look at the same time, whatever their rows
        unseen = not totals if reduce else rows > 1 >= max(before)
        work = _Work(model, trained, batch, rows, sum(before), unseen, 0.0 if idle else bound,
                     autocast)
        with torch.enable_grad(), _kept_gradients(trained):
            part_norms, sum_of = run(work)
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            add(sum_of)
        norms += [] if idle else [part_norms]
    if not totals:
        add(lambda name: None)
    return totals, torch.cat(norms)


@dataclass(frozen=True)
class Idle:
    """A micro-batch whose rows do not count: run only because other processes have one more."""

    batch: Batch


@dataclass(frozen=True)
class _Work:
    """One micro-batch and what to do with it.

    ``first_row`` counts rows for messages; ``unseen`` marks the first batch of several rows.
    """

    model: nn.Module
    trained: dict[str, nn.Parameter]
    batch: Batch
    num_rows: int
    first_row: int
    unseen: bool
    bound: float
    autocast: AbstractContextManager

    def clip(self, squared: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Norms (B,) and clip factors ``min(1, C / norm)`` from squared norms of each parameter."""
        first = next(iter(self.trained.values()))
        start = torch.zeros(self.num_rows, device=first.device, dtype=_wide_dtype(first))
        norms = sum((part.to(start) for part in squared), start).sqrt()
        self.require(norms.isfinite(), "has a gradient that is not finite")
        return norms, (self.bound / norms).clamp(max=1) if self.bound else torch.zeros_like(norms)

    def require(self, good: Tensor, problem: str) -> None:
        """Refuse the first row that is not ``good`` (B,)."""
        if not bool(good.all()):
            row = self.first_row + int(good.logical_not().nonzero()[0])
            raise ValueError(f"batch row {row} {problem}")


# Backends: one micro-batch to per-example norms (B,) and a function that gives the clipped sum of
# one parameter, once, or None if the loss does not depend on it: so none needs all in memory.

def _bookkeeping(work: _Work) -> tuple[Tensor, SumOf]:
    if work.unseen:
        def forward_one() -> None:
            with work.autocast:
                work.model(**_rows(work.batch, 0, 1))

        check_leading_axis(work.model, work.trained, forward_one)
    with recording(work.model, work.trained, work.num_rows) as tape:
        losses = _forward_losses(work)
        if losses.requires_grad:
            losses.sum().backward()
    outside = [name for name, p in work.trained.items() if p.grad is not None]
    if outside:
        refuse(outside, "are used outside of their own layer's forward")
    with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
        tape.close_all()
        norms, weights = work.clip(tape.squared.values())
    return norms, lambda name: None if name not in tape.squared else weighted_sum(
        tape.factors.pop(name), weights, work.trained[name].shape)


def _compiled(work: _Work) -> tuple[Tensor, SumOf]:
    graphs = graphs_of(work.model)
    # autocast and the mode decide the types and layers of a graph, and its hooks the trained names
    key = (tuple(work.trained), work.model.training, isinstance(work.autocast, nullcontext))
    known = graphs.get(key)
    if work.model.training and any(isinstance(m, nn.Dropout) and m.p for m in work.model.modules()):
        raise ValueError("model must be without dropout to be compiled: call .eval(), or use "
                         f"{PLAIN}")
    if known is None:  # every refusal of book-keeping, and the norms to be found again
        expected, _ = _bookkeeping(work)
        with work.autocast:
            calls, output = calls_of(work.model, sites_of(work.model, work.trained), work.batch)
        known = Graph(calls), _losses(work, output.loss, output.logits)[0]
    (graph, kind), tape = known, Tape()
    try:
        with work.autocast:
            logits, fill = graph.run(work.model, work.batch, work.num_rows)
        total = _row_losses(work, kind, wide(logits))[0].sum()
        with torch.autocast(total.device.type, enabled=False):
            fill(total, tape)
        with torch.no_grad(), torch.autocast(total.device.type, enabled=False):
            tape.close_all()
            norms, weights = work.clip(tape.squared.values())
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model could not be compiled ({reason}): use {PLAIN}") from error
    if key not in graphs:
        tolerance = 1e-3 if key[-1] else 5e-2
        if not torch.allclose(norms, expected, rtol=tolerance, atol=1e-6 * float(expected.max())):
            raise ValueError("model must compute the same when compiled, and gives gradients of "
                             f"norm {norms[0]:.6g} in place of {expected[0]:.6g}: use {PLAIN}")
        graphs[key] = known
    return norms, lambda name: None if name not in tape.squared else weighted_sum(
        tape.factors.pop(name), weights, work.trained[name].shape)


def _opacus(work: _Work) -> tuple[Tensor, SumOf]:
    from opacus.grad_sample import GradSampleHooks

    class Hooks(GradSampleHooks):
        def capture_activations_hook(self, module, forward_input, forward_output):
            # Opacus ignores layers in eval mode; by now the forward is over, so this changes
            # nothing that was computed (dropout stays as the model's mode has it).
            mode, module.training = module.training, True
            try:
                super().capture_activations_hook(module, forward_input, forward_output)
            finally:
                module.training = mode

    device = next(iter(work.trained.values())).device.type
    half = (torch.is_autocast_enabled(device) or not isinstance(work.autocast, nullcontext)
            or any(p.dtype == torch.bfloat16 for p in work.model.parameters()))
    clean = {id(module): set(vars(module)) for module in work.model.modules()}
    hooks = Hooks(work.model, loss_reduction="sum", strict=False)
    try:
        losses = _forward_losses(work)
        if losses.requires_grad:
            losses.sum().backward()
        samples = {}
        largest = max((p.grad.abs().max().item() for p in work.trained.values()
                       if p.grad is not None), default=0.0)
        for name, p in work.trained.items():
            sample = p.grad_sample  # type: ignore[attr-defined]
            if sample is None and p.grad is None:
                continue
            if (sample is None or p.grad is None or len(sample) != work.num_rows
                    or not _adds_up(wide(sample), p.grad, largest, half)):
                refuse([name], "have no exact per-example gradients in Opacus", ("loop",))
            samples[name] = wide(sample)
    finally:
        hooks.cleanup()
        for module in work.model.modules():
            for attribute in set(vars(module)) - clean[id(module)]:
                delattr(module, attribute)
    with torch.no_grad():
        norms, weights = work.clip(squared_norms([s]) for s in samples.values())
    return norms, lambda name: None if name not in samples else weighted_sum(
        [samples[name]], weights, samples[name].shape[1:])


def _adds_up(sample: Tensor, gradient: Tensor, largest: float, half: bool) -> bool:
    """Whether per-example gradients sum to autograd's: no use of the parameter was missed."""
    allowed = (3e-2 if half else 1e-3) * float(gradient.abs().max()) + 1e-6 * largest
    return bool(((sample.sum(0) - gradient).abs() <= allowed).all())


def _loop(work: _Work) -> tuple[Tensor, SumOf]:
    sums: Sums = {}
    norms = []
    for row in range(work.num_rows):
        with work.autocast:
            loss = getattr(work.model(**_rows(work.batch, row, row + 1)), "loss", None)
        if loss is None:
            _no_loss()
        one = replace(work, num_rows=1, first_row=work.first_row + row)
        one.require(loss.detach().isfinite().view(1), "has a loss that is not finite")
        if loss.requires_grad:
            loss.backward()
        grads = {name: wide(p.grad) for name, p in work.trained.items() if p.grad is not None}
        norm, weight = one.clip(g.square().sum() for g in grads.values())
        norms.append(norm)
        for name, g in grads.items():
            part = g * weight.to(g.dtype)
            sums[name] = sums[name].add_(part) if name in sums else part
            work.trained[name].grad = None
    return torch.cat(norms), sums.get


BACKENDS: dict[str, Callable[[_Work], tuple[Tensor, SumOf]]] = {
    "bookkeeping": _bookkeeping, "compiled": _compiled, "opacus": _opacus, "loop": _loop}


# Losses: the model's own, one value an example.

def _token_mean(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over each row's own targets, and their number."""
    losses = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(),
                                      ignore_index=IGNORED, reduction="none")
    counts = targets.ne(IGNORED).view(len(targets), -1).sum(1)
    return losses.view(len(targets), -1).sum(1) / counts, counts


def _next_token(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return _token_mean(logits, functional.pad(labels[:, 1:], (0, 1), value=IGNORED))


def _single_label(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return _token_mean(logits, labels.view(len(logits)))


def _squared_error(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses = functional.mse_loss(logits, labels.view_as(logits).to(logits), reduction="none")
    return losses.view(len(logits), -1).mean(1), labels.new_ones(len(logits))


def _multi_label(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses = functional.binary_cross_entropy_with_logits(logits, labels.to(logits),
                                                         reduction="none")
    return losses.mean(1), labels.new_ones(len(logits))


# logits, labels -> each row's loss (B,) and its weight in the batch's loss (B,)
LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "single_label_classification": _single_label, "multi_label_classification": _multi_label,
    "regression": _squared_error, "next_token": _next_token, "each_token": _token_mean}
# what transformers calls its models -> the loss; None: the config's problem_type says it
LOSS_OF_CLASS = {
    "ForSequenceClassification": None, "ForTokenClassification": "each_token",
    "ForMaskedLM": "each_token", "ForCausalLM": "next_token", "LMHeadModel": "next_token"}


def _forward_losses(work: _Work) -> Tensor:
    """The model's loss on each row alone (B,), from one forward, checked against its own loss."""
    _labels(work)
    with work.autocast:
        output = work.model(**work.batch)
    return _losses(work, getattr(output, "loss", None), getattr(output, "logits", None))[1]


def _losses(work: _Work, own: Any, logits: Any) -> tuple[str, Tensor]:
    """The kind of loss whose mean is the model's ``own``, and each row's (B,)."""
    if own is None:
        _no_loss()
    if not isinstance(logits, Tensor):
        raise ValueError("model must return .logits beside .loss, from which the loss of each "
                         'example follows; backend="loop" needs only .loss')
    logits, labels = wide(logits), _labels(work).to(logits.device)
    matching = []
    for kind in _loss_kinds(work.model, logits, labels):
        losses, weights = _row_losses(work, kind, logits)
        mean = float((losses.detach() * weights).sum() / weights.sum())
        tolerance = 2e-2 if own.dtype in (torch.bfloat16, torch.float16) else 2e-5
        if math.isclose(mean, float(own.detach()), rel_tol=tolerance, abs_tol=1e-6):
            matching.append((kind, losses))
    if len(matching) != 1:
        found = "fits several" if matching else "is another"
        raise ValueError(
            "model must have the plain classification, regression or token loss, a mean of one "
            f"term an example or token; its loss on this batch, {float(own.detach()):.6g}, {found} "
            f'({", ".join(LOSSES)}): switch off what it adds, or use backend="loop"')
    return matching[0]


def _row_losses(work: _Work, kind: str, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and weights (B,), of one kind; refuses rows without a target or a finite loss."""
    losses, weights = LOSSES[kind](logits, _labels(work).to(logits.device))
    work.require(weights > 0, f"has no target: every label is {IGNORED}")
    work.require(losses.detach().isfinite(), "has a loss that is not finite")
    return losses, weights


def _labels(work: _Work) -> Tensor:
    labels = work.batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError("batch must hold a tensor 'labels' for this backend, "
                         f"got {', '.join(map(str, work.batch))}")
    return labels


def _loss_kinds(model: Any, logits: Tensor, labels: Tensor) -> list[str]:
    """The losses that the model may be using, by its class if that tells, and by shapes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    integer, rows = not labels.is_floating_point(), len(labels)
    fitting = {
        "single_label_classification": integer and labels.numel() == rows and logits.ndim == 2,
        "multi_label_classification": logits.ndim == 2 and labels.shape == logits.shape,
        "regression": logits.ndim <= 2 and labels.numel() == logits.numel(),
        "next_token": integer and logits.ndim == 3 and labels.shape == logits.shape[:2],
        "each_token": integer and logits.ndim == 3 and labels.shape == logits.shape[:2]}
    problem = getattr(getattr(base, "config", None), "problem_type", None)
    known = [kind or problem for ancestor in type(base).__mro__
             for part, kind in LOSS_OF_CLASS.items()
             if part in ancestor.__name__ and (kind or problem)][:1]
    return [kind for kind, fits in fitting.items()
            if fits and len(logits) == rows and (not known or kind in known)]


# Small helpers.

def _wide_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, parameter.dtype)


def _num_rows(batch: Batch) -> int:
    """The number of examples in ``batch``, whose tensors must agree on it."""
    if not isinstance(batch, Mapping):
        _validate.fail("batch", "the dict that model(**batch) takes", type(batch).__name__)
    sizes = {name: value.shape[0] if value.ndim else 0
             for name, value in batch.items() if isinstance(value, Tensor)}
    if not sizes or 0 in sizes.values():
        _validate.fail("batch", "tensors with one example a row and at least one row",
                       {n: tuple(v.shape) for n, v in batch.items() if isinstance(v, Tensor)})
    if len(set(sizes.values())) > 1:
        _validate.fail("batch", "tensors with equally many rows", sizes)
    return next(iter(sizes.values()))


def _rows(batch: Batch, start: int, stop: int) -> dict[str, Any]:
    return {name: value[start:stop].detach() if isinstance(value, Tensor) else value
            for name, value in batch.items()}


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


def _no_loss() -> NoReturn:
    raise ValueError("batch must hold the labels (a tensor 'labels') from which the model computes "
                     "its .loss, got an output without loss")
