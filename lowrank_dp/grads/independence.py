"""Whether a model and a backend keep the rows of a batch apart, against an ordinary loop.

A clipped sum is private only if one row moves it by at most C, so the gradient of a row must
depend on nothing beside that row. :func:`examine` takes a few rows of a batch and compares three
runs of the model in its own precision:

- the rows together, through the backend;
- each row alone, through autograd;
- each row alone at its own length, without the padding that longer neighbours give it.

The model is left as it was found: mode, buffers and the generators that dropout draws from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lowrank_dp.grads.factors import wide
from lowrank_dp.grads.losses import (
    APART,
    first_line,
    forward,
    forward_losses,
    loss_tolerance,
    no_loss,
)
from lowrank_dp.grads.microbatch import Batch, MicroBatch, copied, refuse, width
from lowrank_dp.grads.undisturbed import WithoutDropout, in_float64, undisturbed
from lowrank_dp.losses import IGNORED

PADDINGS = ("longest", "max-length")
ROWS = 3  # that are looked at
FIXED = 'pad every row to one public length (padding="max-length"; training: --padding max-length)'
# how far rounding moves a gradient, relative to the gradient, and what of a parameter's is rounding
# of the whole gradient
TOLERANCE = {torch.float64: (1e-7, 1e-10), torch.float32: (1e-4, 2e-5)}
HALF = (1e-1, 2e-2)
VANISHING = 1e-7  # a gradient norm of which nothing is asked
FADING = 1e-3  # a loss below it has a gradient of differences, which rounding moves further

SumOf = Callable[[str], Tensor | None]
Backend = Callable[[MicroBatch], tuple[Tensor, SumOf]]
Backends = Mapping[str, Backend]


@dataclass(frozen=True)
class Alone:
    """What rows give by themselves: each one's loss and gradient norm, and their clipped sum."""

    losses: dict[int, float]
    norms: dict[int, float]
    sums: dict[str, Tensor]
    bound: float


def verified(
    work: MicroBatch, backend: str, backends: Backends, padding: str, fingerprint: int
) -> bool:
    """Examine a model when it is first met in a situation; whether its forward is repeatable.

    The situation is the model, its trained parameters, its mode, the backend and the layout of the
    batch. ``fingerprint`` stands for the model's layers and their modes. Raises as
    :func:`examine` does.
    """
    whole = (0, width(work.batch))
    padded = padding == "longest" and any(
        own != whole for own in _own_lengths(work.model, work.batch)
    )
    layout = tuple(
        (name, value.ndim, value.dtype)
        for name, value in work.batch.items()
        if isinstance(value, Tensor)
    )
    key = (
        fingerprint,
        tuple(work.trained),
        backend,
        layout,
        work.num_rows > 1,
        _square(work),
        padded,
        padding,
    )
    known = _KNOWN.setdefault(work.model, {})
    if key not in known:
        found = examine(work, backend, backends, padding)
        if found is None:  # rows without a finite loss, which the backend will name
            return False
        known[key] = found
    return known[key]


def known_repeatable(model: nn.Module, fingerprint: int) -> bool:
    """Whether the model was examined with these layers and modes, and its forward is repeatable."""
    found = [
        repeatable for key, repeatable in _KNOWN.get(model, {}).items() if key[0] == fingerprint
    ]
    return bool(found) and all(found)


_KNOWN: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()


def examine(work: MicroBatch, backend: str, backends: Backends, padding: str) -> bool | None:
    """Compare a few rows of ``work`` together, alone, and alone at their own lengths.

    Returns whether the model's forward is repeatable in its mode, or None if a row has no finite
    loss or gradient.

    Raises:
        ValueError: for a model that mixes the rows of a batch; for a backend that gives another
            gradient than the loop, naming parameters and the backends that give it; and for a
            model that minds padding, with the remedy.
    """
    work = replace(work, autocast=nullcontext(), alone=None)
    with undisturbed(work.model, work.device):
        repeatable, quiet = _repeatable(work)
        if quiet is None and backend == "loop":
            return False
        if quiet is None:
            raise ValueError(
                "model must give a row the same loss twice in eval mode, so that rows "
                'can be compared: use backend="loop", which runs them apart'
            )
        with quiet:
            try:
                found = _agreeing(work, backend, backends, padding)
            except ValueError as error:  # it may be rounding, as where a gradient cancels
                with in_float64(work.model):
                    if backend == "compiled" or not _agree_in_float64(
                        work, backend, backends, padding
                    ):
                        raise error from error.__cause__
                found = True
    return repeatable if found else None


def _agree_in_float64(work: MicroBatch, backend: str, backends: Backends, padding: str) -> bool:
    """Whether rows agree once the model computes in float64."""
    batch = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in work.batch.items()
    }
    try:
        return _agreeing(replace(work, batch=batch), backend, backends, padding)
    except (RuntimeError, ValueError):
        return False


def _agreeing(work: MicroBatch, backend: str, backends: Backends, padding: str) -> bool:
    """True if rows agree, False if a row has no finite loss or gradient; else ``ValueError``."""
    lengths = _own_lengths(work.model, work.batch)
    chosen = _chosen(lengths)
    # as many rows as positions, where that is what the batch has
    order = [
        chosen[i % len(chosen)] for i in range(work.num_rows if _square(work) else len(chosen))
    ]
    try:
        alone = _alone(work, order, lengths if padding == "longest" else None)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        with torch.no_grad():  # which names the row, if a row is to blame
            forward(replace(work, batch=copied(work.batch, range(work.num_rows))))
        _run(work, 1.0, order, backends[backend])  # which may say more about the model
        raise ValueError(
            f"model cannot be run on one row by itself ({first_line(error)}), which "
            "is how rows are compared"
        ) from error
    if alone is not None:
        _require_no_memory(work, order[0], alone.losses[order[0]])
    if alone is not None and backend != "loop":
        _compare(work, alone, order, backend, backends)
    return alone is not None


def _alone(
    work: MicroBatch,
    order: Sequence[int],
    lengths: Sequence[tuple[int, int]] | None,
    bound: float = 0.0,
) -> Alone | None:
    """Each row through autograd, and again at its own length, which must change nothing.

    Without a bound, one that clips the first row, and most likely the others, is taken.
    """
    losses, norms = {}, {}
    sums: dict[str, Tensor] = {}
    for row in dict.fromkeys(order):
        batch = copied(work.batch, [row])
        loss, gradient = gradient_alone(work, batch)
        norm = _norm(gradient.values())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return None
        if lengths is not None and lengths[row] != (0, width(batch)):
            _require_own_length(work, row, lengths[row], loss, gradient)
        bound = bound or 0.1 * norm
        weight = min(1.0, bound / norm) * order.count(row) if norm else 0.0
        for name, g in gradient.items():
            sums[name] = sums[name].add_(g, alpha=weight) if name in sums else g.mul_(weight)
        losses[row], norms[row] = loss, norm
    return Alone(losses, norms, sums, bound or 1.0)


def _require_own_length(
    work: MicroBatch, row: int, own: tuple[int, int], loss: float, gradient: Mapping[str, Tensor]
) -> None:
    """Refuse a model to which padding is more than nothing."""
    trouble = f"model must take no notice of padding, and row {work.first_row + row} "
    try:
        loss_own, gradient_own = gradient_alone(work, _trimmed(copied(work.batch, [row]), *own))
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{trouble}cannot be run without its padding ({first_line(error)}): {FIXED}"
        ) from error
    zero, norm = torch.zeros((), device=work.device), _norm(gradient.values())
    moved = _norm(
        [
            gradient.get(name, zero) - gradient_own.get(name, zero)
            for name in {**gradient, **gradient_own}
        ]
    )
    if abs(loss - loss_own) > _loss_allowed(work, loss) or not (
        moved <= _allowed(work, loss) * norm + VANISHING
    ):
        raise ValueError(
            f"{trouble}has loss {loss:.6g} and gradient norm {norm:.6g} with padding, "
            f"{loss_own:.6g} and {_norm(gradient_own.values()):.6g} without, so that longer rows "
            f"beside a row change its gradient: {FIXED}"
        )


def _require_no_memory(work: MicroBatch, row: int, loss: float) -> None:
    """Refuse a model whose loss of a row depends on the rows that it saw before."""
    with torch.no_grad():
        again = float(work.model(**copied(work.batch, [row])).loss)
    if abs(loss - again) > _loss_allowed(work, loss):
        raise ValueError(
            f"model must keep no memory of the rows that it has seen, and the loss of "
            f"row {work.first_row + row} is {loss:.6g} before other rows and "
            f"{again:.6g} after them: switch off what it keeps between calls"
        )


def _compare(
    work: MicroBatch, alone: Alone, order: Sequence[int], backend: str, backends: Backends
) -> None:
    """Refuse a model that mixes rows, and a backend that is wrong about the model."""
    with torch.no_grad():
        losses = forward_losses(_together(work, order)).tolist()
    for row, loss in zip(order, losses, strict=True):
        if abs(loss - alone.losses[row]) > _loss_allowed(work, loss):
            raise ValueError(
                f"model must keep the rows of a batch apart, and the loss of row "
                f"{work.first_row + row} is {alone.losses[row]:.6g} alone and "
                f"{loss:.6g} beside other rows: {APART}"
            )
    wrong = _differing(work, alone, order, backends[backend])
    if wrong:  # by a wrong norm all of them may be: without clipping it is seen which
        plain = _alone(work, order, None, math.inf)
        wrong = (_differing(work, plain, order, backends[backend]) if plain else []) or wrong
        able = [
            name
            for name in ("bookkeeping", "opacus")
            if name != backend and _gives(work, alone, order, backends[name])
        ]
        refuse(
            wrong,
            f"get another gradient by backend {backend!r} than from autograd on each row",
            (*able, "loop"),
        )


def _gives(work: MicroBatch, alone: Alone, order: Sequence[int], run: Backend) -> bool:
    """Whether a backend is right about the model."""
    try:
        return not _differing(work, alone, order, run)
    except ValueError:
        return False


def _together(work: MicroBatch, order: Sequence[int]) -> MicroBatch:
    return replace(work, num_rows=len(order), batch=copied(work.batch, order))


def _differing(work: MicroBatch, alone: Alone, order: Sequence[int], run: Backend) -> list[str]:
    """The parameters whose clipped sum is not the loop's; all where only the norms differ."""
    norms, sum_of = _run(work, alone.bound, order, run)
    wrong, zero = [], torch.zeros((), device=work.device)
    # of all clipped rows: their norms, and what is rounding of them
    whole = sum(min(alone.norms[row], alone.bound) for row in order)
    share = max(_allowed(work, alone.losses[row]) for row in order)
    floor = _tolerance(work)[1] * whole + VANISHING * sum(
        min(1.0, alone.bound / max(alone.norms[row], VANISHING)) for row in order
    )
    for name in work.trained:
        found, true = sum_of(name), alone.sums.get(name, zero)
        found = zero if found is None else found
        if not _norm([found - true]) <= share * _norm([true]) + floor:
            wrong.append(name)
    off = any(
        not abs(norm - alone.norms[row])
        <= (_allowed(work, alone.losses[row]) * alone.norms[row] + VANISHING)
        for norm, row in zip(norms.tolist(), order, strict=True)
    )
    return wrong or (list(work.trained) if off else [])


def _run(
    work: MicroBatch, bound: float, order: Sequence[int], run: Backend
) -> tuple[Tensor, SumOf]:
    """The backend on the rows together; ``ValueError`` where it fails."""
    try:
        return run(replace(_together(work, order), bound=bound))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f'model cannot be run by this backend ({first_line(error)}): use backend="loop"'
        ) from error
    finally:
        for p in work.trained.values():
            p.grad = None


def gradient_alone(work: MicroBatch, row: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the model on one row, as any training loop has them.

    A parameter that the loss does not depend on has no gradient. ``.grad`` must be None before.
    """
    with work.autocast:
        loss = getattr(work.model(**row), "loss", None)
    if loss is None:
        no_loss()
    if loss.requires_grad:
        loss.backward()
    gradient = {}
    for name, p in work.trained.items():
        if p.grad is not None:
            gradient[name], p.grad = wide(p.grad), None
    return float(loss.detach()), gradient


def _norm(tensors: Any) -> float:
    return math.sqrt(
        sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors)
    )


def _half(work: MicroBatch) -> bool:
    return any(p.dtype in (torch.bfloat16, torch.float16) for p in work.model.parameters())


def _tolerance(work: MicroBatch) -> tuple[float, float]:
    return HALF if _half(work) else TOLERANCE[next(iter(work.trained.values())).dtype]


def _allowed(work: MicroBatch, loss: float) -> float:
    """How far rounding may move a gradient, relative to its norm."""
    return _tolerance(work)[0] * max(1.0, FADING / max(abs(loss), 1e-30))


def _loss_allowed(work: MicroBatch, loss: float) -> float:
    """How far rounding may move a loss."""
    return loss_tolerance(_half(work)) * max(1.0, abs(loss))


# Rows: which, and how long each is by itself.


def _square(work: MicroBatch) -> bool:
    """Whether the batch has as many rows as some tensor in it has positions."""
    return work.num_rows > 1 and any(
        isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == work.num_rows
        for value in work.batch.values()
    )


def _own_lengths(model: Any, batch: Batch) -> list[tuple[int, int]]:
    """The first position of each row that is no padding, and the one after the last.

    By ``attention_mask``, or without one by the padding token of the model's configuration; a
    target is never padding.
    """
    length = width(batch)
    mask, ids, labels = (batch.get(key) for key in ("attention_mask", "input_ids", "labels"))
    rows = next(len(value) for value in batch.values() if isinstance(value, Tensor))
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == length:
        real = mask != 0
    elif mask is None and isinstance(ids, Tensor) and ids.ndim == 2:
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        real = ids != (-1 if pad is None else pad)
    else:
        return [(0, length)] * rows
    if isinstance(labels, Tensor) and labels.shape == real.shape and not labels.is_floating_point():
        real = real | (labels != IGNORED)
    if bool(real.all()):
        return [(0, length)] * rows
    first = real.int().argmax(1)
    last = length - real.flip(1).int().argmax(1)
    found = real.any(1)
    return [
        (a, b) if some else (0, length)
        for a, b, some in zip(first.tolist(), last.tolist(), found.tolist(), strict=True)
    ]


def _chosen(lengths: Sequence[tuple[int, int]]) -> list[int]:
    """The longest row, the shortest, and one between."""
    by_length = sorted(range(len(lengths)), key=lambda row: lengths[row][0] - lengths[row][1])
    return [*dict.fromkeys((by_length[0], by_length[-1], by_length[len(by_length) // 2]))][:ROWS]


def _trimmed(row: Batch, first: int, last: int) -> Batch:
    """A row at its own length: every tensor whose second axis is the positions."""
    length = width(row)
    if (first, last) == (0, length):
        return row
    return {
        name: value[:, first:last]
        if isinstance(value, Tensor)
        and value.ndim > 1
        and value.shape[1] == length
        and not (name == "labels" and value.is_floating_point())
        else value
        for name, value in row.items()
    }


def _repeatable(work: MicroBatch) -> tuple[bool, Any]:
    """Whether a row has the same loss twice, and a context in which it has; None if there is none.

    The mode of the model is left where it must be for that: eval, if dropout is not all.
    """

    def same() -> bool:
        with torch.no_grad():
            one, two = (
                getattr(work.model(**copied(work.batch, [0])), "loss", None) for _ in range(2)
            )
        if one is None or two is None:
            no_loss()
        return bool(torch.isclose(one, two, rtol=1e-5, atol=1e-7, equal_nan=True))

    if same():
        return True, nullcontext()
    with WithoutDropout():
        if same():
            return False, WithoutDropout()
    work.model.eval()
    return False, nullcontext() if same() else None
