"""Test that a model and a backend keep the rows of a batch apart.

A clipped sum is private only if one row moves the sum by at most C, so the gradient of a row must
depend on that row alone. :func:`examine` takes a few rows of a batch and compares three runs of the
model in its own precision:

- the rows together, through the backend;
- each row alone, through autograd;
- each row alone without the padding that longer rows in the batch require.

A model that a forward or a backward changes is refused (:mod:`lowrank_dp.grads.model_state`). The
examination restores its mode, attributes, submodules and buffers, and the random generators.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_dp._terminal import first_line
from lowrank_dp.grads.alone import RowsAlone, norm_of, rows_alone
from lowrank_dp.grads.losses import APART, fail_without_loss, forward, forward_losses
from lowrank_dp.grads.microbatch import (
    Backend,
    MicroBatch,
    SumOf,
    copy_rows,
    num_positions_of,
    refuse,
)
from lowrank_dp.grads.own_length import is_square, own_lengths, rows_to_compare
from lowrank_dp.grads.tolerances import (
    VANISHING,
    gradient_allowance,
    gradient_tolerance,
    loss_allowance,
)
from lowrank_dp.grads.undisturbed import FixedDraws, WithoutDropout, in_float64, undisturbed

Backends = Mapping[str, Backend]
OTHERS = ("bookkeeping", "opacus")  # backends that an error may recommend beside the loop


# Results of examinations, by model and by situation.


def verified(
    micro_batch: MicroBatch, backend: str, backends: Backends, padding: str, fingerprint: int
) -> bool:
    """Examine a model that is new in this situation; return whether its forward is repeatable.

    The situation is the model, its trained parameters, its mode, the backend and the layout of the
    batch. ``fingerprint`` identifies the model's layers, their classes and their modes.

    Raises:
        ValueError: as :func:`examine` does.
    """
    whole = (0, num_positions_of(micro_batch.batch))
    padded = padding == "longest" and any(
        own != whole for own in own_lengths(micro_batch.model, micro_batch.batch)
    )
    layout = tuple(
        (name, value.ndim, value.dtype)
        for name, value in micro_batch.batch.items()
        if isinstance(value, Tensor)
    )
    several_rows = micro_batch.num_rows > 1
    key = (
        fingerprint,
        tuple(micro_batch.trained),
        backend,
        layout,
        several_rows,
        is_square(micro_batch),
        padded,
        padding,
    )
    known = _KNOWN.setdefault(micro_batch.model, {})
    if key not in known:
        repeatable = examine(micro_batch, backend, backends, padding)
        if repeatable is None:  # a row has no finite loss: the backend will name the row
            return False
        known[key] = repeatable
    return known[key]


def known_repeatable(model: nn.Module, fingerprint: int) -> bool:
    """Return whether the model was examined with these layers and modes, and is repeatable.

    A model is repeatable if its forward gives a row the same loss twice.
    """
    found = [
        repeatable for key, repeatable in _KNOWN.get(model, {}).items() if key[0] == fingerprint
    ]
    return bool(found) and all(found)


_KNOWN: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()


# The examination.


def examine(micro_batch: MicroBatch, backend: str, backends: Backends, padding: str) -> bool | None:
    """Compare a few rows of the micro-batch together, alone, and alone without their padding.

    Returns:
        Whether the model's forward is repeatable in its mode; None if a row has no finite loss or
        gradient.

    Raises:
        ValueError: for a model that mixes the rows of a batch; for a backend whose gradient differs
            from autograd's, naming the parameters and the backends that agree; for a model whose
            gradient depends on padding, with the remedy; and for a model that a forward changes,
            as ``ModelState.require_same`` says.
    """
    micro_batch = replace(micro_batch, autocast=nullcontext(), loss_alone=None)
    with undisturbed(micro_batch.model, micro_batch.device) as state:
        repeatable, deterministic = _repeatable(micro_batch)
        state.require_same()
        if deterministic is None and backend == "loop":
            return False
        if deterministic is None:
            raise ValueError(
                "model must give a row the same loss twice without dropout, and draw no other "
                "random numbers, which rows may share: put the model in eval mode (train: leave "
                'dropout out), or use backend="loop", which runs rows apart'
            )
        with deterministic:
            try:
                finite = _agree(micro_batch, backend, backends, padding)
            except ValueError as error:  # rounding may be the cause, where a gradient cancels
                if backend == "compiled" or not _agree_in_float64(
                    micro_batch, backend, backends, padding
                ):
                    _agree(micro_batch, backend, backends, padding, others=OTHERS)
                    raise error from error.__cause__
                finite = True
        state.require_same()  # after rows of other lengths, and after a backward
    return repeatable if finite else None


def _repeatable(micro_batch: MicroBatch) -> tuple[bool, AbstractContextManager | None]:
    """Return whether the model gives a row the same loss twice, and a context in which it does so.

    The context is None if the loss varies in every context, or depends on random numbers other than
    those of dropout, which the rows of a micro-batch may share: one coin of layerdrop decides for
    all rows. Where the loss varies even without random numbers, the model is left in eval mode,
    which the caller undoes.
    """

    def loss() -> Tensor:
        with torch.no_grad():
            found = micro_batch.model(**copy_rows(micro_batch.batch, [0]))
        if getattr(found, "loss", None) is None:
            fail_without_loss()
        return found.loss

    def same(*contexts: AbstractContextManager, rtol: float = 1e-5) -> tuple[bool, bool]:
        """Whether a row has the same loss in all contexts, and whether numbers were drawn."""
        before, losses = _generator_states(micro_batch.device), []
        for context in contexts:
            with context:
                losses.append(loss())
        alike = all(
            torch.isclose(losses[0], other, rtol=rtol, atol=rtol / 100, equal_nan=True)
            for other in losses[1:]
        )
        return alike, before != _generator_states(micro_batch.device)

    # losses under dropout may agree by chance; the generators show whether numbers were drawn
    if same(nullcontext(), nullcontext()) == (True, False):
        return True, nullcontext()
    alike, drawn = same(WithoutDropout(), WithoutDropout())
    if drawn:  # the numbers may have no effect, as those of a layerdrop of 0
        limits = FixedDraws(0.0), FixedDraws(1 - 2.0**-24)
        harmless = same(*limits, rtol=0.0) == (True, False)
        return False, WithoutDropout() if harmless else None
    if alike:
        return False, WithoutDropout()
    micro_batch.model.eval()
    return False, nullcontext() if same(nullcontext(), nullcontext())[0] else None


def _generator_states(device: torch.device) -> list[Any]:
    """Return the states of the global generators that a model on ``device`` may use."""
    of_numpy = np.random.get_state(legacy=False)["state"]
    states = [random.getstate(), of_numpy["pos"], of_numpy["key"].tolist()]
    states.append(torch.get_rng_state().tolist())
    return [*states, torch.cuda.get_rng_state(device).tolist()] if device.type == "cuda" else states


def _agree_in_float64(
    micro_batch: MicroBatch, backend: str, backends: Backends, padding: str
) -> bool:
    """Return whether the three runs agree when the model computes in float64.

    They must agree as closely as in float32: many models compute norms and attention in float32,
    whatever the dtype of their parameters.
    """
    batch = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in micro_batch.batch.items()
    }
    precise = replace(micro_batch, batch=batch, rounding=torch.float32)
    try:
        with in_float64(micro_batch.model):
            return _agree(precise, backend, backends, padding)
    except (RuntimeError, ValueError):
        return False


def _agree(
    micro_batch: MicroBatch,
    backend: str,
    backends: Backends,
    padding: str,
    others: Sequence[str] = (),
) -> bool:
    """Require that the three runs agree; return False if a row has no finite loss or gradient.

    Raises:
        ValueError: if they disagree, as :func:`examine` says. The error names those of the backends
            ``others`` that agree with autograd.
    """
    lengths = own_lengths(micro_batch.model, micro_batch.batch)
    chosen = rows_to_compare(lengths)
    # a square batch stays square, so that a mistaken axis shows
    count = micro_batch.num_rows if is_square(micro_batch) else len(chosen)
    order = [chosen[i % len(chosen)] for i in range(count)]
    try:
        alone = rows_alone(micro_batch, order, lengths if padding == "longest" else None)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        with torch.no_grad():  # raises an error that names the row, if one row is the cause
            forward(
                replace(
                    micro_batch, batch=copy_rows(micro_batch.batch, range(micro_batch.num_rows))
                )
            )
        _run(micro_batch, 1.0, order, backends[backend])  # may raise an error that names the cause
        raise ValueError(
            f"model cannot be run on one row by itself ({first_line(error)}), which "
            "is how rows are compared"
        ) from error
    if alone is None:
        return False
    _require_no_memory(micro_batch, order[0], alone.losses[order[0]])
    if backend != "loop":
        _compare(micro_batch, alone, order, backend, backends, others)
    return True


def _require_no_memory(micro_batch: MicroBatch, row: int, loss: float) -> None:
    """Refuse a model whose loss of a row depends on the rows that ran before."""
    with torch.no_grad():
        again = float(micro_batch.model(**copy_rows(micro_batch.batch, [row])).loss)
    if abs(loss - again) > loss_allowance(micro_batch, loss):
        raise ValueError(
            f"model must keep no memory of the rows that it has seen, and the loss of "
            f"row {micro_batch.first_row + row} is {loss:.6g} before other rows and "
            f"{again:.6g} after them: switch off what it keeps between calls"
        )


# Comparison of the rows together with the rows alone.


def _compare(
    micro_batch: MicroBatch,
    alone: RowsAlone,
    order: Sequence[int],
    backend: str,
    backends: Backends,
    others: Sequence[str],
) -> None:
    """Refuse a model that mixes rows, and a backend with other gradients than autograd."""
    with torch.no_grad():
        losses = forward_losses(_together(micro_batch, order)).tolist()
    for row, loss in zip(order, losses, strict=True):
        if abs(loss - alone.losses[row]) > loss_allowance(micro_batch, loss):
            raise ValueError(
                f"model must keep the rows of a batch apart, and the loss of row "
                f"{micro_batch.first_row + row} is {alone.losses[row]:.6g} alone and "
                f"{loss:.6g} beside other rows: {APART}"
            )
    wrong, able = _differing(micro_batch, alone, order, backends[backend]), list[str]()
    if wrong and others:
        # a wrong norm scales the sums of all parameters; the plain sum shows which ones are wrong
        plain = rows_alone(micro_batch, order, None, math.inf)
        wrong = (_differing(micro_batch, plain, order, backends[backend]) if plain else []) or wrong
        able = [
            name
            for name in others
            if name != backend and _is_right(micro_batch, alone, order, backends[name])
        ]
    if wrong:
        refuse(
            wrong,
            f"get another gradient by backend {backend!r} than from autograd on each row",
            (*able, "loop"),
        )


def _is_right(
    micro_batch: MicroBatch, alone: RowsAlone, order: Sequence[int], run: Backend
) -> bool:
    """Return whether a backend runs the model and agrees with the rows alone."""
    try:
        return not _differing(micro_batch, alone, order, run)
    except ValueError:
        return False


def _differing(
    micro_batch: MicroBatch, alone: RowsAlone, order: Sequence[int], run: Backend
) -> list[str]:
    """Parameters whose clipped sum differs from the loop's; all of them if only norms differ."""
    clip = alone.max_grad_norm
    norms, sum_of = _run(micro_batch, clip, order, run)
    wrong, zero = [], torch.zeros((), device=micro_batch.device)
    relative = max(gradient_allowance(micro_batch, alone.losses[row]) for row in order)
    # largest effect on one parameter's sum of rounding in the gradient of all parameters
    total_norm = sum(min(alone.norms[row], clip) for row in order)
    absolute = gradient_tolerance(micro_batch)[1] * total_norm + VANISHING * sum(
        min(1.0, clip / max(alone.norms[row], VANISHING)) for row in order
    )
    for name in micro_batch.trained:
        found, true = sum_of(name), alone.sums.get(name, zero)
        found = zero if found is None else found
        if not norm_of([found - true]) <= relative * norm_of([true]) + absolute:
            wrong.append(name)
    norms_differ = any(
        not abs(norm - alone.norms[row])
        <= gradient_allowance(micro_batch, alone.losses[row]) * alone.norms[row] + VANISHING
        for norm, row in zip(norms.tolist(), order, strict=True)
    )
    return wrong or (list(micro_batch.trained) if norms_differ else [])


def _together(micro_batch: MicroBatch, order: Sequence[int]) -> MicroBatch:
    return replace(micro_batch, num_rows=len(order), batch=copy_rows(micro_batch.batch, order))


def _run(
    micro_batch: MicroBatch, max_grad_norm: float, order: Sequence[int], run: Backend
) -> tuple[Tensor, SumOf]:
    """Run the backend on the rows together; raise ``ValueError`` if that is impossible."""
    try:
        return run(replace(_together(micro_batch, order), max_grad_norm=max_grad_norm))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f'model cannot be run by this backend ({first_line(error)}): use backend="loop"'
        ) from error
    finally:
        for p in micro_batch.trained.values():
            p.grad = None
