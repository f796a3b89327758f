"""Style of all figures: sizes, colours, fonts, panels, and the line that states the privacy.

Matplotlib gets the settings directly: seaborn's styles set other values, so each of these lines
would still be needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lowrank_dp import _validate

P = ParamSpec("P")
COLUMN, FULL = 3.4, 7.0  # inches: one and two columns of a paper
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK, GREY = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#7F7F7F",
)
PURPLE, BROWN, OLIVE = "#6A3D9A", "#8C510A", "#7A7A00"  # in addition to Okabe and Ito's colours
COLOURS = (RED, ORANGE, GREEN, BLUE, PINK, SKY, BLACK, GREY)  # of series without a style
MARKERS = "osD^vPX*"
# quantity -> palette, and the value at the end of the palette
_SHADES = {
    "rank": ("viridis", 2**10),
    "width": ("copper", 2**13),
    "angle": ("plasma", 0.1),
    "batch": ("Blues", 2**12),
}

STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "legend.handlelength": 1.8,
    "figure.constrained_layout.use": True,
}
styled = mpl.rc_context(STYLE)


def labelled(
    note: Callable[[Any], str] | str = "", privacy: str | None = None
) -> Callable[[Callable[P, Figure]], Callable[P, Figure]]:
    """Decorate ``plot(result, *, axes=None)`` with the style and a line of text above the panels.

    If the privacy statement of the result says NON-PRIVATE, the line begins with the statement, up
    to its first semicolon. The line ends with ``note``, which says what bars and bands are. In a
    new figure, the line is at the top. On a user's axes, the line is above the first of these axes.

    Args:
        note: the note, or a function from the result to the note.
        privacy: privacy statement; None takes the field ``privacy`` of the result.
    """

    def decorate(plot: Callable[P, Figure]) -> Callable[P, Figure]:
        @functools.wraps(plot)
        def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
            with mpl.rc_context(STYLE):
                figure = plot(*args, **kwargs)
                result: Any = args[0] if args else kwargs["result"]
                said = note(result) if callable(note) else note
                line = _line(result.privacy if privacy is None else privacy, said)
                given: Any = kwargs.get("axes", kwargs.get("ax"))
                _write(figure, given, line)
            return figure

        return drawn

    return decorate


def _line(privacy: str, note: str) -> str:
    """Join privacy statement and note to the text above the panels, of one line or two."""
    mark = privacy.partition(";")[0] if "NON-PRIVATE" in privacy else ""
    parts = [part for part in (mark and f"{mark}.", note) if part]
    return ("   " if sum(map(len, parts)) < 130 else "\n").join(parts)


def _write(figure: Figure, given: Any, line: str) -> None:
    """Write ``line`` at the top of the figure, or above the first of the given axes."""
    if not line:
        return
    colour = "#A00000" if "NON-PRIVATE" in line else "#404040"
    if given is None:
        figure.suptitle(line, x=0.01, ha="left", fontsize=6.5, color=colour)
        return
    first: Axes = np.ravel(np.asarray(given, dtype=object))[0]
    first.annotate(
        line,
        (0, 1),
        (0, 16),  # points above the axes: room for the panel's title
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=6,
        color=colour,
        annotation_clip=False,
    )


def new_figure(
    rows: int,
    columns: int,
    *,
    axes: Sequence[Axes] | None = None,
    width: float = FULL,
    height: float = 2.4,
    **options: Any,
) -> tuple[Figure, Any]:
    """Make a figure of ``width`` by ``height`` inches with an array of axes (rows, columns).

    The figure is made without pyplot, so no global state changes and no figure has to be closed. If
    ``axes`` are given, one per panel in the panels' order, the function returns these axes and
    their figure. Raises ValueError for another number of axes.
    """
    if axes is None:
        figure = Figure(figsize=(width, height))
        return figure, figure.subplots(rows, columns, squeeze=False, **options)
    panels = own_axes(axes, rows * columns)
    return root(panels[0]), panels.reshape(rows, columns)


def own_axes(axes: Sequence[Axes], count: int) -> np.ndarray:
    """Return a user's axes as an array (count,); ValueError for another number of axes."""
    panels = np.ravel(np.asarray(axes, dtype=object))
    if len(panels) != count:
        _validate.fail("axes", f"{count} matplotlib axes, one per panel", len(panels))
    return panels


def root(axes: Axes) -> Figure:
    """Return the figure of a user's axes, also if the axes belong to a subfigure."""
    figure: Any = axes.figure
    while figure is not figure.figure:  # a subfigure belongs to a figure
        figure = figure.figure
    found: Figure = figure
    return found


def legend_below(
    figure: Figure,
    axes: Any,
    own: bool,
    entries: tuple[Sequence[Any], Sequence[str]] | None = None,
    **options: Any,
) -> None:
    """Draw a legend that all panels share.

    Args:
        figure: the figure of the panels.
        axes: array of the panels.
        own: whether the plot made the figure. If so, the legend is below the panels; on a user's
            axes, the legend is inside the first panel.
        entries: handles and labels; None takes the entries of the first panel.
        options: options of matplotlib's ``legend``. On a user's axes, only ``fontsize`` applies.
    """
    first: Axes = np.ravel(axes)[0]
    handles, labels = entries or first.get_legend_handles_labels()
    if own:
        figure.legend(handles, labels, loc="outside lower center", **options)
    else:
        first.legend(handles, labels, fontsize=options.get("fontsize", 6))


def letter(axes: Axes, text: str, size: float = 8) -> None:
    """Write a panel's letter and title above its upper left corner, and label the axes with it."""
    axes.set_title(text, loc="left", fontweight="bold", fontsize=size)
    axes.set_label(text[0])


def panels(figure: Figure) -> list[str]:
    """List the letters of a figure's panels."""
    return [str(axis.get_label()) for axis in figure.axes if _is_panel(axis)]


def _is_panel(axis: Axes) -> bool:
    title, label = axis.get_title(loc="left"), axis.get_label()
    return bool(title) and isinstance(label, str) and title.startswith(label)


def keep_panel(figure: Figure, panel: str) -> None:
    """Remove all panels of a drawn figure except one, and give the page a slide's proportions.

    The figure is changed in place. The line about privacy and intervals is kept. The shared legend
    is kept unless the panel has its own legend. Raises ValueError if the figure has no such panel.
    """
    _validate.choice("panel", panel, panels(figure))
    axis = next(axis for axis in figure.axes if _is_panel(axis) and axis.get_label() == panel)
    place = axis.get_subplotspec()
    beside = [other for other in axis.get_shared_y_axes().get_siblings(axis) if other is not axis]
    label = next((other.get_ylabel() for other in beside if other.get_ylabel()), "")
    alone = figure.add_gridspec(1, 1)[0]
    for other in list(figure.axes):
        if other is axis or other.get_subplotspec() == place:  # the second y-axis of the panel
            other.set_subplotspec(alone)
        else:
            other.remove()
    axis.tick_params(labelleft=True)
    axis.set_ylabel(axis.get_ylabel() or label)
    if axis.get_legend() is not None:
        for legend in list(figure.legends):
            legend.remove()
    figure.set_size_inches(FULL, FULL * 9 / 16)


def shade(quantity: str, value: float) -> Any:
    """Return the colour of a rank, width, angle or batch size, the same in every figure."""
    palette, largest = _SHADES[quantity]
    smallest = 1e-3 if quantity == "angle" else 1
    place = np.log(max(value, smallest) / smallest) / np.log(largest / smallest)
    return mpl.colormaps[palette](float(np.clip(0.92 * place, 0.05, 0.92)))


def log_ranks(axis: Axes, ranks: np.ndarray) -> None:
    """Make the x-axis a base-2 axis of ranks with plain numbers at every second power."""
    powers = 2 ** np.arange(int(np.log2(ranks.max())) + 1)
    powers = powers[(powers >= ranks.min()) & (np.log2(powers) % 2 == 0)]
    axis.set_xscale("log", base=2)
    axis.set_xticks(powers, [str(p) for p in powers])
    axis.minorticks_off()
    axis.set_xlabel("rank r")


def plain_log(axis: Axis) -> None:
    """Label a drawn logarithmic axis of up to three decades with numbers, without exponents."""
    low, high = axis.get_view_interval()
    few = np.log10(high / low) > 1.7  # over 1.7 decades, more labels would overlap
    axis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def band(
    axis: Axes,
    x: np.ndarray,
    middle: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    alpha: float,
    **line: Any,
) -> None:
    """Draw the curve ``middle`` in the style ``line``, and a band from ``low`` to ``high``."""
    axis.plot(x, middle, **line)
    axis.fill_between(x, low, high, color=line["color"], alpha=alpha, linewidth=0)


def show_all(axis: Axes, *values: Iterable[float]) -> None:
    """Set the y-limits so that all finite ``values`` are visible, with a margin."""
    finite = np.concatenate([np.ravel(np.asarray(part, dtype=float)) for part in values])
    finite = finite[np.isfinite(finite)]
    if not finite.size:  # no value is drawn
        return
    low, high = float(finite.min()), float(finite.max())
    room = 0.05 * (high - low) or 0.1
    axis.set_ylim(low - room, high + room)
