"""Where the rows of a batch are in what a layer sees.

Most layers see ``(B, ..., d)``. XLNet and Longformer put the positions first, ``(T, B, d)``, and
OPT runs the tokens of all rows as one list, ``(B T, d)``. A forward of one example tells which of
these a layer sees: there the axis of the rows has size 1, though in a batch another axis may have
the size of the batch. B is rows, T positions, d features (ids have none).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lowrank_dp.grads.microbatch import refuse

ROWS_FIRST, POSITIONS_FIRST, ONE_LIST = "rows first", "positions first", "one list of tokens"
Layouts = dict[nn.Module, tuple[str, ...]]  # what a layer may see


def layouts_of(seen: Tensor, num_rows: int, width: int) -> tuple[str, ...]:
    """The layouts that a layer's input may have, by its shape alone.

    ``width`` is the number of positions in a row of the batch.
    """
    axes = seen.ndim - seen.is_floating_point()
    fitting = {
        ROWS_FIRST: axes > 0 and seen.shape[0] == num_rows,
        POSITIONS_FIRST: axes > 1 and seen.shape[1] == num_rows,
        ONE_LIST: axes == 1 and seen.shape[0] == num_rows * width,
    }
    return tuple(layout for layout, fits in fitting.items() if fits)


def rows_first(tensor: Tensor, layout: str, num_rows: int) -> Tensor:
    """What a layer sees or gives as ``(B, ..., d)``."""
    if layout == POSITIONS_FIRST:
        return tensor.transpose(0, 1)
    return tensor.unflatten(0, (num_rows, -1)) if layout == ONE_LIST else tensor


@contextmanager
def reading_layouts(
    modules: Iterable[tuple[nn.Module, Iterable[str]]],
    width: int,
    allowed: Sequence[str],
    problem: str,
    backends: Sequence[str],
) -> Iterator[Layouts]:
    """Note each layer's layouts while the model runs on one example.

    ``modules`` are layers and the names of their trained parameters; ``allowed`` are the layouts
    that the backend can take. Raises ``UnsupportedParameters`` for a layer that sees another one,
    as a table of relative positions ``(T, T)``: ``problem`` begins the line, which offers
    ``backends``.
    """
    layouts: Layouts = {}
    handles = []
    try:
        for module, names in modules:
            handles.append(
                module.register_forward_pre_hook(
                    _reader(layouts, [*names], width, allowed, problem, backends), with_kwargs=True
                )
            )
        yield layouts
    finally:
        for handle in handles:
            handle.remove()


def _reader(
    layouts: Layouts,
    names: Sequence[str],
    width: int,
    allowed: Sequence[str],
    problem: str,
    backends: Sequence[str],
) -> Callable[..., None]:
    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen = layer_input(args, kwargs)
        if not isinstance(seen, Tensor):
            return
        found = tuple(
            layout
            for layout in layouts_of(seen, 1, width)
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
    width: int,
    names: Iterable[str],
) -> str:
    """The layout of a layer's input in a batch; refuses one that is not the layer's."""
    known = layouts.get(module, (ROWS_FIRST,))
    found = tuple(layout for layout in layouts_of(seen, num_rows, width) if layout in known)
    if not found or {ROWS_FIRST, POSITIONS_FIRST} <= {*found}:
        refuse(
            names,
            f"see an input of shape {tuple(seen.shape)}, in which no axis is that of the "
            f"batch of {num_rows}",
        )
    layouts[module] = found
    return found[0]


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer was called with."""
    return args[0] if args else next(iter(kwargs.values()))
