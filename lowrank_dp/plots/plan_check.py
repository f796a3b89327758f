"""Figure of plans against measurements: predicted and measured alignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lowrank_dp.plots.arms import look
from lowrank_dp.plots.style import BLACK, FULL, GREY, labelled, legend_below, letter, new_figure

if TYPE_CHECKING:
    from lowrank_dp.experiments import plan_check


def _over_draws(result: plan_check.Result) -> str:
    return f"Points: mean of {result.measured.shape[2]} noise draws."


@labelled(_over_draws)
def plot_plan_check(result: plan_check.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot predicted against measured alignment, one row per value and one panel per text.

    ``axes`` are existing matplotlib axes to draw in, two per text: all of the first row, then all
    of the second.
    """
    figure, grid = new_figure(2, len(result.texts), axes=axes, width=FULL, height=4.8)
    measured = result.measured.mean(axis=2)
    for row, value in enumerate(("one vector", "mean over matrices")):
        for column, text in enumerate(result.texts):
            axis = grid[row, column]
            axis.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
            for k, scheme in enumerate(result.schemes):
                for point in range(len(measured)):
                    axis.plot(
                        measured[point, :, k, row],
                        result.predicted[column, point, :, k, row],
                        **look(scheme).points(
                            fillstyle="none" if point else "full", markersize=4, clip_on=False
                        ),
                    )
            own = column == len(result.texts) - 1
            name = f"{text} itself, NON-PRIVATE" if own else f"public {text}"
            letter(axis, f"{'abcdefgh'[row * len(result.texts) + column]}  {name}")
            axis.set(
                xlim=(0, 1), ylim=(0, 1), xlabel=f"measured, {value}", ylabel=f"predicted, {value}"
            )
    handles = [Line2D([], [], **look(s).points(label=s)) for s in result.schemes]
    handles += [
        Line2D(
            [],
            [],
            color=BLACK,
            marker="o",
            linestyle="",
            fillstyle="none" if i else "full",
            label=f"{steps} warm-up steps",
        )
        for i, steps in enumerate(result.config.warm_steps)
    ]
    legend_below(
        figure, grid, axes is None, (handles, [str(h.get_label()) for h in handles]), ncols=6
    )
    return figure
