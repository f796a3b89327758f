"""Figure of plans against measurements: predicted and measured alignment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lowrank_dp.plots.restoration import SCHEME_STYLE
from lowrank_dp.plots.style import BLACK, FULL, GREY, letter, new_figure, styled

if TYPE_CHECKING:
    from lowrank_dp.experiments import plan_check


@styled
def plot_plan_check(result: plan_check.Result) -> Figure:
    """Plot predicted against measured alignment, one row per value and one panel per text."""
    figure, axes = new_figure(2, len(result.texts), width=FULL, height=4.6)
    measured = result.measured.mean(axis=2)
    for row, value in enumerate(("one vector", "mean over matrices")):
        for column, text in enumerate(result.texts):
            axis = axes[row, column]
            axis.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
            for k, scheme in enumerate(result.schemes):
                colour, marker, _ = SCHEME_STYLE[scheme]
                for point in range(len(measured)):
                    axis.plot(
                        measured[point, :, k, row],
                        result.predicted[column, point, :, k, row],
                        marker,
                        color=colour,
                        fillstyle="none" if point else "full",
                        markersize=4,
                    )
            own = column == len(result.texts) - 1
            name = f"{text} itself, NON-PRIVATE" if own else f"public {text}"
            letter(axis, f"{'abcdefgh'[row * len(result.texts) + column]}  {name}")
            axis.set(
                xlim=(0, 1), ylim=(0, 1), xlabel=f"measured, {value}", ylabel=f"predicted, {value}"
            )
    handles = [
        Line2D([], [], color=SCHEME_STYLE[s][0], marker=SCHEME_STYLE[s][1], linestyle="", label=s)
        for s in result.schemes
    ]
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
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
    return figure
