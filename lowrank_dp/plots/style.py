"""Style of all figures: sizes, colours and fonts.

Matplotlib gets the settings directly: seaborn's styles set other values, so each of these lines
would still be needed.
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
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
COLOURS = (RED, ORANGE, GREEN, BLUE, PINK, SKY, BLACK, GREY)  # of series without a style
MARKERS = "osD^vPX*"

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
    """Make a figure of ``width`` by ``height`` inches with an array of axes (rows, columns).

    The figure is made without pyplot, so no global state changes and nothing has to be closed.
    """
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def letter(axes: Axes, text: str, size: float = 8) -> None:
    """Write a panel's letter and title above its upper left corner."""
    axes.set_title(text, loc="left", fontweight="bold", fontsize=size)


def log_ranks(axis: Axes, ranks: np.ndarray) -> None:
    """Make the x-axis a base-2 axis of ranks with plain numbers at every second power."""
    powers = 2 ** np.arange(int(np.log2(ranks.max())) + 1)
    powers = powers[(powers >= ranks.min()) & (np.log2(powers) % 2 == 0)]
    axis.set_xscale("log", base=2)
    axis.set_xticks(powers, [str(p) for p in powers])
    axis.minorticks_off()
    axis.set_xlabel("rank r")


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
