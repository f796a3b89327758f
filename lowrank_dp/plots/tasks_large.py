"""Figure of larger models: alignment by both averages, values above the edge, effective rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank_dp.experiments import tasks_large as experiment
from lowrank_dp.plots.arms import look
from lowrank_dp.plots.style import (
    BLACK,
    BLUE,
    FULL,
    GREY,
    labelled,
    legend_below,
    letter,
    new_figure,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import tasks_large


def _over_starts(result: tasks_large.Result) -> str:
    starts, draws = result.cosine.shape[2:4]
    return f"b, c: 95% t-interval, {starts} starts, mean of {draws} noise draws each."


@labelled(_over_starts)
def plot_tasks_large(result: tasks_large.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot matrices above the edge, alignment by both averages, and effective rank, per case.

    ``axes`` are four existing matplotlib axes to draw in; None makes a new figure.
    """
    rows = result.rows
    figure, grid = new_figure(
        2, 2, axes=axes, width=FULL, height=1.8 + 0.4 * len(rows), sharey=True
    )
    above, mean, joint, rank = grid.ravel()
    y = np.arange(len(rows))[::-1]
    names = [f"{result.label(*row)}, {experiment.STAGES[row[1]]}" for row in rows]
    share = [(result.above[row].mean(axis=-1) / result.num_layers[row]).mean() for row in rows]
    above.barh(y, share, color=BLUE, height=0.6)
    above.axvline(1 / 7, color=GREY, linewidth=0.8, linestyle=":")  # pure noise, see bulk_edge
    above.set(xlim=(0, 1), xlabel="share of matrices above the edge")
    for average, axis in enumerate((mean, joint)):
        for scheme, name in enumerate(experiment.SCHEMES):
            middle, half = experiment.bands(result.starts(scheme, average), rows)
            shift = 0.2 * (1 - scheme)
            axis.errorbar(middle, y + shift, xerr=half, **look(name).points(label=name))
        axis.axvline(0, color=GREY, linewidth=0.6, linestyle=":")
        axis.set(xlabel="cosine with the clean gradient")
    for column, colour, marker, name in ((0, BLACK, "o", "clean (d)"), (1, GREY, "x", "noisy (d)")):
        ranks = [result.effective_rank[row][:, column].mean() for row in rows]
        rank.plot(ranks, y, marker, color=colour, label=name)
    rank.set(xlim=(0, 1), xlabel="effective rank / largest")
    titles = "a  above the edge", "b  mean over matrices", "c  one vector", "d  effective rank"
    for axis, title in zip(grid.ravel(), titles, strict=True):
        axis.set_yticks(y, names)
        letter(axis, title)
    schemes, ranks_of = (axis.get_legend_handles_labels() for axis in (joint, rank))
    entries = [*schemes[0], *ranks_of[0]], [*schemes[1], *ranks_of[1]]
    legend_below(figure, grid, axes is None, entries, ncols=5)
    return figure
