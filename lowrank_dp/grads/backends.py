"""Backends: functions from a micro-batch to its per-example norms and clipped sums.

A backend returns the norms (B,), and a function from a parameter's name to its clipped sum, or to
None if the loss does not depend on the parameter. The function is called once per parameter, so
that the sums of all parameters need not be in memory together.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowrank_dp._terminal import first_line
from lowrank_dp.grads.axes import (
    ONE_LIST,
    POSITIONS_FIRST,
    ROWS_FIRST,
    Layouts,
    reading_layouts,
)
from lowrank_dp.grads.compiled import Graph, compiled_graphs, trace_calls
from lowrank_dp.grads.factors import careful_norm, squared_norms, upcast, weighted_sum
from lowrank_dp.grads.losses import (
    fail_without_loss,
    forward,
    forward_losses,
    match_loss,
    require_loss_alone,
    row_losses,
)
from lowrank_dp.grads.microbatch import (
    Backend,
    MicroBatch,
    SumOf,
    copy_rows,
    num_positions_of,
    refuse,
    slice_rows,
)
from lowrank_dp.grads.opacus_samples import per_example_gradients
from lowrank_dp.grads.recording import Tape, recording, trained_layers

_PLAIN = 'backend="bookkeeping" (training: no --compile)'


def run_first_alone(micro_batch: MicroBatch, backend: str) -> tuple[Tensor | None, Layouts]:
    """Run the first row by itself; return its loss and the layouts of the trained layers' inputs.

    The run takes no random numbers. For the loop backend, which needs
    neither result, the function returns None and {}.

    Raises:
        UnsupportedParameters: for a layer in whose input the backend finds no axis of rows.
    """
    if backend == "loop":
        return None, {}
    allowed, problem, others = [ROWS_FIRST], "", ["bookkeeping", "loop"]
    if backend == "opacus":
        layers, others = _opacus_layers(micro_batch), ["loop"]
        problem = "have no exact per-example gradients in Opacus: they "
    else:
        layers = [
            (module, [*own.values()])
            for module, own in trained_layers(micro_batch.model, micro_batch.trained)
        ]
    if backend == "bookkeeping":
        allowed, others = [ROWS_FIRST, POSITIONS_FIRST, ONE_LIST], ["opacus", "loop"]
    one = replace(micro_batch, batch=copy_rows(micro_batch.batch, [0]), num_rows=1)
    positions = num_positions_of(micro_batch.batch)
    with (
        reading_layouts(layers, positions, allowed, problem, others) as layouts,
        torch.no_grad(),
        torch.random.fork_rng([micro_batch.device] if micro_batch.device.type == "cuda" else []),
    ):
        return getattr(forward(one), "loss", None), layouts


def _opacus_layers(micro_batch: MicroBatch) -> list[tuple[nn.Module, list[str]]]:
    """Layers whose rows Opacus takes from the first axis, with their trained parameters' names."""
    names = {id(p): name for name, p in micro_batch.trained.items()}
    layers = [
        (module, [names[id(p)] for p in module.parameters(recurse=False) if id(p) in names])
        for module in micro_batch.model.modules()
        if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm))
    ]
    return [(module, own) for module, own in layers if own]


def _bookkeeping(micro_batch: MicroBatch) -> tuple[Tensor, SumOf]:
    """Norms and clipped sums from the layers' inputs and output gradients, in one backward pass."""
    with recording(micro_batch) as tape:
        losses = forward_losses(micro_batch)
        if losses.requires_grad:
            losses.sum().backward()
    outside = [name for name, p in micro_batch.trained.items() if p.grad is not None]
    if outside:
        refuse(outside, "are used outside of their own layer's forward")
    return _clipped(micro_batch, tape)


def _clipped(micro_batch: MicroBatch, tape: Tape) -> tuple[Tensor, SumOf]:
    """Norms and clipped sums from the factors of a completed forward and backward pass."""
    with torch.no_grad(), torch.autocast(micro_batch.device.type, enabled=False):
        tape.close_all()
        recheck_norms(tape)
        norms, weights = micro_batch.clip(squares.squared for squares in tape.squares.values())

    def sum_of(name: str) -> Tensor | None:
        if name not in tape.squares:
            return None
        return weighted_sum(tape.factors.pop(name), weights, micro_batch.trained[name].shape)

    return norms, sum_of


def recheck_norms(tape: Tape) -> None:
    """Recompute inexact norms, unless the row's other parameters make the error negligible."""
    if not tape.squares:
        return
    names = list(tape.squares)
    doubt = torch.stack([tape.squares[name].doubt for name in names])
    squared = torch.stack([tape.squares[name].squared for name in names])
    total = squared.nan_to_num(0.0, 0.0).sum(0)
    inexact = (doubt > 0) & (~(doubt < total) | ~squared.isfinite())
    for index, row in inexact.nonzero().tolist():
        name = names[index]
        tape.squares[name].squared[row] = careful_norm(tape.factors[name], row) ** 2


def require_compilable(micro_batch: MicroBatch) -> None:
    """Raise ``ValueError`` for a batch or a mode that the compiled backend does not take."""
    if not isinstance(micro_batch.batch.get("input_ids"), Tensor):
        raise ValueError(
            "batch must hold a tensor 'input_ids' for the compiled backend, got "
            f"{', '.join(map(str, micro_batch.batch))}: use {_PLAIN}"
        )
    if micro_batch.model.training and any(
        isinstance(m, nn.Dropout) and m.p for m in micro_batch.model.modules()
    ):
        raise ValueError(
            f"model must be without dropout to be compiled: call .eval(), or use {_PLAIN}"
        )


def _compiled(micro_batch: MicroBatch) -> tuple[Tensor, SumOf]:
    """Book-keeping on a compiled graph, made and checked at the first micro-batch."""
    model, autocast = micro_batch.model, micro_batch.autocast
    graphs, full_precision = compiled_graphs(model), isinstance(autocast, nullcontext)
    # mode and autocast determine the graph's layers and dtypes, the trained names its outputs
    key = tuple(micro_batch.trained), model.training, full_precision
    known, expected = graphs.get(key), None
    if known is None:  # for the refusals of book-keeping, and for norms to compare with
        expected, _ = _bookkeeping(micro_batch)
        with autocast:
            calls, output = trace_calls(
                model, trained_layers(model, micro_batch.trained), micro_batch.batch
            )
        known = Graph(calls), match_loss(micro_batch, output.loss, output.logits)[0]
    (graph, kind), tape = known, Tape()
    try:
        with autocast:
            logits, fill = graph.run(model, micro_batch.batch, micro_batch.num_rows)
        losses = row_losses(micro_batch, kind, upcast(logits))[0]
        require_loss_alone(micro_batch, losses)
        total = losses.sum()
        with torch.autocast(micro_batch.device.type, enabled=False):
            fill(total, tape)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ValueError(
            f"model could not be compiled ({first_line(error)}): use {_PLAIN}"
        ) from error
    norms, sum_of = _clipped(micro_batch, tape)
    if expected is not None and not torch.allclose(
        norms,
        expected,
        rtol=1e-3 if full_precision else 5e-2,
        atol=1e-6 * float(expected.max()),
    ):
        raise ValueError(
            "model must give gradients of the same norms when compiled, and gives "
            f"others: use {_PLAIN}"
        )
    graphs[key] = known
    return norms, sum_of


def _opacus(micro_batch: MicroBatch) -> tuple[Tensor, SumOf]:
    """Per-example gradients by Opacus's hooks, for layers without a book-keeping rule."""
    tape = Tape()
    for name, sample in per_example_gradients(micro_batch).items():
        tape.factors[name] = [sample]
        tape.squares[name] = squared_norms([sample])
    return _clipped(micro_batch, tape)


def _loop(micro_batch: MicroBatch) -> tuple[Tensor, SumOf]:
    """Forward and backward of each row by itself, for any model."""
    sums: dict[str, Tensor] = {}
    norms = []
    for row in range(micro_batch.num_rows):
        one = replace(
            micro_batch,
            num_rows=1,
            first_row=micro_batch.first_row + row,
            batch=slice_rows(micro_batch.batch, row, row + 1),
        )
        loss = getattr(forward(one), "loss", None)
        if loss is None:
            fail_without_loss()
        one.require(loss.detach().isfinite().view(1), "has a loss that is not finite")
        if loss.requires_grad:
            loss.backward()
        grads = {
            name: upcast(p.grad) for name, p in micro_batch.trained.items() if p.grad is not None
        }
        norm, weight = one.clip(
            torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in grads.values()
        )
        norms.append(norm)
        for name, g in grads.items():
            part = g * weight.to(g.dtype)
            sums[name] = sums[name].add_(part) if name in sums else part
            micro_batch.trained[name].grad = None
    return torch.cat(norms), sums.get


BACKENDS: dict[str, Backend] = {
    "bookkeeping": _bookkeeping,
    "compiled": _compiled,
    "opacus": _opacus,
    "loop": _loop,
}
