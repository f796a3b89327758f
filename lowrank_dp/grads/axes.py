"""Layouts of a layer's input: the axis that holds the rows of the batch.

The input of most layers is ``(B, ..., d)``. XLNet and Longformer put the positions first,
``(T, B, d)``; OPT runs the tokens of all rows as one list, ``(B T, d)``. In a batch another axis
may have size B by chance. A forward of one example shows the layout, since the axis of the rows
then has size 1. B is rows, T positions, d features (ids have no axis of features).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lowrank_dp.grads.microbatch import refuse

ROWS_FIRST, POSITIONS_FIRST, ONE_LIST = "rows first", "positions first", "one list of tokens"
Layouts = dict[nn.Module, tuple[str, ...]]  # layouts that a layer's input may have


def layouts_of(seen: Tensor, num_rows: int, num_positions: int) -> tuple[str, ...]:
    """Layouts that fit the shape of a layer's input ``seen``.

    ``num_positions`` is the number of positions per row of the batch.
    """
    axes = seen.ndim - seen.is_floating_point()
    fitting = {
        ROWS_FIRST: axes > 0 and seen.shape[0] == num_rows,
        POSITIONS_FIRST: axes > 1 and seen.shape[1] == num_rows,
        ONE_LIST: axes == 1 and seen.shape[0] == num_rows * num_positions,
    }
    return tuple(layout for layout, fits in fitting.items() if fits)


def rows_first(tensor: Tensor, layout: str, num_rows: int) -> Tensor:
    """Bring a layer's input or output gradient from ``layout`` to ``(B, ..., d)``."""
    if layout == POSITIONS_FIRST:
        return tensor.transpose(0, 1)
    return tensor.unflatten(0, (num_rows, -1)) if layout == ONE_LIST else tensor


@contextmanager
def reading_layouts(
    modules: Iterable[tuple[nn.Module, Iterable[str]]],
    num_positions: int,
    allowed: Sequence[str],
    problem: str,
    backends: Sequence[str],
) -> Iterator[Layouts]:
    """Record each layer's layouts while the model runs on one example inside the context.

    Args:
        modules: layers, each with the names of its trained parameters.
        num_positions: positions per row of the batch.
        allowed: the layouts that the backend can take.
        problem: beginning of the message of a refusal.
        backends: backends that a refusal offers instead.

    Raises:
        UnsupportedParameters: for a layer whose input has none of the allowed layouts, for
            instance a table of relative positions ``(T, T)``.
    """
    layouts: Layouts = {}
    handles = []
    try:
        for module, names in modules:
            handles.append(
                module.register_forward_pre_hook(
                    _reader(layouts, [*names], num_positions, allowed, problem, backends),
                    with_kwargs=True,
                )
            )
        yield layouts
    finally:
        for handle in handles:
            handle.remove()


def _reader(
    layouts: Layouts,
    names: Sequence[str],
    num_positions: int,
    allowed: Sequence[str],
    problem: str,
    backends: Sequence[str],
) -> Callable[..., None]:
    """Return a forward pre-hook that narrows ``layouts[module]`` to those that fit the input."""

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen = layer_input(args, kwargs)
        if not isinstance(seen, Tensor):
            return
        found = tuple(
            layout
            for layout in layouts_of(seen, 1, num_positions)
            if layout in allowed and layout in layouts.get(module, allowed)
        )
        if not found:
            refuse(
                names,
                f"{problem}see an input of shape {tuple(seen.shape)} for one example, in "
                "which this backend finds no axis of rows",
                backends,
            )
        layouts[module] = found

    return look


def batch_axis(
    module: nn.Module,
    seen: Tensor,
    layouts: Layouts,
    num_rows: int,
    num_positions: int,
    names: Iterable[str],
) -> str:
    """Layout of a layer's input in a batch, among the layer's known ``layouts``.

    Raises:
        UnsupportedParameters: naming the parameters ``names``, if no layout fits or the axis of the
            rows is ambiguous.
    """
    known = layouts.get(module, (ROWS_FIRST,))
    fitting = layouts_of(seen, num_rows, num_positions)
    found = tuple(layout for layout in fitting if layout in known)
    if not found or {ROWS_FIRST, POSITIONS_FIRST} <= {*found}:
        refuse(
            names,
            f"see an input of shape {tuple(seen.shape)}, in which no axis is that of the "
            f"batch of {num_rows}",
        )
    layouts[module] = found
    return found[0]


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """First argument of a layer's call, positional or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))
