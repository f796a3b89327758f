"""Figure of plans against measurements: predicted and measured cost of noise in steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank_dp.plots.style import (
    COLOURS,
    FULL,
    GREY,
    MARKERS,
    labelled,
    legend_below,
    letter,
    new_figure,
    plain_log,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import plan_gap


def _band(result: plan_gap.Result) -> str:
    return f"Band: relative error of {result.tolerance:.0%}."


@labelled(_band)
def plot_plan_gap(result: plan_gap.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot predicted against measured ratios of steps, one panel per text.

    ``axes`` are existing matplotlib axes to draw in, one per text.
    """
    figure, grid = new_figure(1, len(result.texts), axes=axes, width=FULL, height=3.2)
    values = [*result.predicted[np.isfinite(result.predicted)], *result.measured, 1.0]
    low, high = 0.85 * min(values), 1.2 * max(values)
    line = np.array([low, high])
    for i, text in enumerate(result.texts):
        axis = grid[0, i]
        axis.plot(line, line, color=GREY, linewidth=0.8)
        axis.fill_between(
            line,
            (1 - result.tolerance) * line,
            (1 + result.tolerance) * line,
            color=GREY,
            alpha=0.15,
        )
        for j, setting in enumerate(result.settings):
            bound = ">" if result.is_lower_bound[j] else "<" if result.is_upper_bound[j] else ""
            axis.plot(
                np.full(result.predicted.shape[-1], result.measured[j]),
                result.predicted[i, j],
                bound or MARKERS[j % len(MARKERS)],
                color=COLOURS[j % len(COLOURS)],
                markersize=5,
                label=setting,
            )
        axis.set(
            xscale="log",
            yscale="log",
            xlim=(low, high),
            ylim=(low, high),
            xlabel="measured ratio of steps",
            ylabel="predicted ratio of steps",
        )
        plain_log(axis.xaxis)
        plain_log(axis.yaxis)
        letter(axis, f"{'abcdefgh'[i]}  {text}")
    legend_below(figure, grid, axes is None, ncols=2)
    return figure
