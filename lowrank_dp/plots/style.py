"""The style of every figure: sizes, colours and fonts."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


styled = mpl.rc_context(
    {
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
)


def new_figure(
    rows: int, columns: int, *, width: float = FULL, height: float = 2.4, **options: Any
) -> tuple[Figure, Any]:
    """A figure of ``width`` by ``height`` inches and its array of axes (rows, columns).

    Made without pyplot, so nothing global is touched and nothing has to be closed.
    """
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def letter(axes: Axes, text: str, size: float = 8) -> None:
    """Put a panel's letter above its upper left corner."""
    axes.set_title(text, loc="left", fontweight="bold", fontsize=size)
