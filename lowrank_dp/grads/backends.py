"""Backends: one micro-batch to per-example norms and clipped sums.

Each gives the norms (B,), and a function that gives the clipped sum of one parameter, once, or None
if the loss does not depend on it: so none needs all sums in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowrank_dp.grads.axes import (
    ONE_LIST,
    POSITIONS_FIRST,
    ROWS_FIRST,
    Layouts,
    reading_layouts,
)
from lowrank_dp.grads.compiled import Graph, compiled_graphs, trace_calls
from lowrank_dp.grads.factors import careful_norm, squared_norms, weighted_sum, wide
from lowrank_dp.grads.losses import (
    forward,
    forward_losses,
    losses_of,
    no_loss,
    require_alone,
    row_losses,
)
from lowrank_dp.grads.microbatch import MicroBatch, copied, refuse, rows_of, width
from lowrank_dp.grads.recording import Tape, recording, trained_layers

SumOf = Callable[[str], Tensor | None]
PLAIN = 'backend="bookkeeping" (training: no --compile)'


def first_alone(work: MicroBatch, backend: str) -> tuple[Tensor | None, Layouts]:
    """The model's loss of the first row by itself, and where its trained layers have the rows.

    Takes no random numbers. Raises ``UnsupportedParameters`` for a layer in whose input the backend
    finds no axis of rows. Of the loop nothing is asked.
    """
    if backend == "loop":
        return None, {}
    allowed, problem, others = [ROWS_FIRST], "", ["loop"]
    if backend == "opacus":
        names = {id(p): name for name, p in work.trained.items()}
        layers: list[nn.Module] = [
            module
            for module in work.model.modules()
            if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm))
        ]
        modules = [
            (module, own)
            for module in layers
            if (own := [names[id(p)] for p in module.parameters(recurse=False) if id(p) in names])
        ]
        problem = "have no exact per-example gradients in Opacus: they "
    else:
        modules = [
            (module, [*own.values()]) for module, own in trained_layers(work.model, work.trained)
        ]
        others = ["bookkeeping", "loop"]
        if backend == "bookkeeping":
            allowed, others = [ROWS_FIRST, POSITIONS_FIRST, ONE_LIST], ["opacus", "loop"]
    one = replace(work, batch=copied(work.batch, [0]), num_rows=1)
    with (
        reading_layouts(modules, width(work.batch), allowed, problem, others) as layouts,
        torch.no_grad(),
        torch.random.fork_rng([work.device] if work.device.type == "cuda" else []),
    ):
        return getattr(forward(one), "loss", None), layouts


def _bookkeeping(work: MicroBatch) -> tuple[Tensor, SumOf]:
    with recording(work) as tape:
        losses = forward_losses(work)
        if losses.requires_grad:
            losses.sum().backward()
    outside = [name for name, p in work.trained.items() if p.grad is not None]
    if outside:
        refuse(outside, "are used outside of their own layer's forward")
    return _clipped(work, tape)


def _clipped(work: MicroBatch, tape: Tape) -> tuple[Tensor, SumOf]:
    """What a tape gives when forward and backward are over."""
    with torch.no_grad(), torch.autocast(work.device.type, enabled=False):
        tape.close_all()
        recheck_norms(tape)
        norms, weights = work.clip(squares.squared for squares in tape.squares.values())
    return (
        norms,
        lambda name: (
            None
            if name not in tape.squares
            else weighted_sum(tape.factors.pop(name), weights, work.trained[name].shape)
        ),
    )


def recheck_norms(tape: Tape) -> None:
    """Take again the norms that are in doubt, where a row's other parameters leave it open."""
    if not tape.squares:
        return
    names = list(tape.squares)
    doubt = torch.stack([tape.squares[name].doubt for name in names])
    squared = torch.stack([tape.squares[name].squared for name in names])
    total = squared.nan_to_num(0.0, 0.0).sum(0)
    open_ = (doubt > 0) & (~(doubt < total) | ~squared.isfinite())
    for index, row in open_.nonzero().tolist():
        name = names[index]
        tape.squares[name].squared[row] = careful_norm(tape.factors[name], row) ** 2


def require_compilable(work: MicroBatch) -> None:
    """Refuse a batch or a mode that no graph is made for."""
    if not isinstance(work.batch.get("input_ids"), Tensor):
        raise ValueError(
            "batch must hold a tensor 'input_ids' to be compiled for, got "
            f"{', '.join(map(str, work.batch))}: use {PLAIN}"
        )
    if work.model.training and any(isinstance(m, nn.Dropout) and m.p for m in work.model.modules()):
        raise ValueError(
            f"model must be without dropout to be compiled: call .eval(), or use {PLAIN}"
        )


def _compiled(work: MicroBatch) -> tuple[Tensor, SumOf]:
    graphs, plain = compiled_graphs(work.model), isinstance(work.autocast, nullcontext)
    # the mode and autocast decide the layers and types of a graph, trained names where it is read
    key = tuple(work.trained), work.model.training, plain
    known, expected = graphs.get(key), None
    if known is None:  # every refusal of book-keeping, and the norms to be found again
        expected, _ = _bookkeeping(work)
        with work.autocast:
            calls, output = trace_calls(
                work.model, trained_layers(work.model, work.trained), work.batch
            )
        known = Graph(calls), losses_of(work, output.loss, output.logits)[0]
    (graph, kind), tape = known, Tape()
    try:
        with work.autocast:
            logits, fill = graph.run(work.model, work.batch, work.num_rows)
        losses = row_losses(work, kind, wide(logits))[0]
        require_alone(work, losses)
        total = losses.sum()
        with torch.autocast(work.device.type, enabled=False):
            fill(total, tape)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model could not be compiled ({reason}): use {PLAIN}") from error
    norms, sum_of = _clipped(work, tape)
    if expected is not None and not torch.allclose(
        norms, expected, rtol=1e-3 if plain else 5e-2, atol=1e-6 * float(expected.max())
    ):
        raise ValueError(
            "model must compute the same when compiled, and gives gradients of other "
            f"norms: use {PLAIN}"
        )
    graphs[key] = known
    return norms, sum_of


def _opacus(work: MicroBatch) -> tuple[Tensor, SumOf]:
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
    half = (
        torch.is_autocast_enabled(device)
        or not isinstance(work.autocast, nullcontext)
        or any(p.dtype == torch.bfloat16 for p in work.model.parameters())
    )
    clean = {id(module): set(vars(module)) for module in work.model.modules()}
    try:
        Hooks(work.model, loss_reduction="sum", strict=False)
        losses = forward_losses(work)
        if losses.requires_grad:
            losses.sum().backward()
        samples = {}
        largest = max(
            (p.grad.abs().max().item() for p in work.trained.values() if p.grad is not None),
            default=0.0,
        )
        for name, p in work.trained.items():
            sample = p.grad_sample  # type: ignore[attr-defined]
            if sample is None and p.grad is None:
                continue
            if (
                sample is None
                or p.grad is None
                or len(sample) != work.num_rows
                or not _adds_up(wide(sample), p.grad, largest, half)
            ):
                refuse([name], "have no exact per-example gradients in Opacus", ("loop",))
            samples[name] = wide(sample)
    finally:
        for handle in getattr(work.model, "autograd_grad_sample_hooks", []):
            handle.remove()
        for p in work.model.parameters():
            for attribute in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                vars(p).pop(attribute, None)
        for module in work.model.modules():
            for attribute in set(vars(module)) - clean[id(module)]:
                delattr(module, attribute)
    tape = Tape(squares={name: squared_norms([s]) for name, s in samples.items()})
    with torch.no_grad():
        tape.factors.update({name: [sample] for name, sample in samples.items()})
        recheck_norms(tape)
        norms, weights = work.clip(squares.squared for squares in tape.squares.values())
    return (
        norms,
        lambda name: (
            None
            if name not in samples
            else weighted_sum([samples[name]], weights, samples[name].shape[1:])
        ),
    )


def _adds_up(sample: Tensor, gradient: Tensor, largest: float, half: bool) -> bool:
    """Whether per-example gradients sum to autograd's: no use of the parameter was missed."""
    allowed = (3e-2 if half else 1e-3) * float(gradient.abs().max()) + 1e-6 * largest
    return bool(((sample.sum(0) - gradient).abs() <= allowed).all())


def _loop(work: MicroBatch) -> tuple[Tensor, SumOf]:
    sums: dict[str, Tensor] = {}
    norms = []
    for row in range(work.num_rows):
        one = replace(
            work,
            num_rows=1,
            first_row=work.first_row + row,
            batch=rows_of(work.batch, row, row + 1),
        )
        loss = getattr(forward(one), "loss", None)
        if loss is None:
            no_loss()
        one.require(loss.detach().isfinite().view(1), "has a loss that is not finite")
        if loss.requires_grad:
            loss.backward()
        grads = {name: wide(p.grad) for name, p in work.trained.items() if p.grad is not None}
        norm, weight = one.clip(
            torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in grads.values()
        )
        norms.append(norm)
        for name, g in grads.items():
            part = g * weight.to(g.dtype)
            sums[name] = sums[name].add_(part) if name in sums else part
            work.trained[name].grad = None
    return torch.cat(norms), sums.get


BACKENDS: dict[str, Callable[[MicroBatch], tuple[Tensor, SumOf]]] = {
    "bookkeeping": _bookkeeping,
    "compiled": _compiled,
    "opacus": _opacus,
    "loop": _loop,
}
