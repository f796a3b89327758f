"""Figure of plans against measurements: predicted and measured cost of noise in steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from lowrank_dp.plots.style import COLOURS, FULL, GREY, MARKERS, letter, new_figure, styled

if TYPE_CHECKING:
    from lowrank_dp.experiments import plan_gap


@styled
def plot_plan_gap(result: plan_gap.Result) -> Figure:
    """Plot predicted against measured ratios of steps, one panel per text."""
    figure, axes = new_figure(1, len(result.texts), width=FULL, height=3.0)
    values = [*result.predicted[np.isfinite(result.predicted)], *result.measured, 1.0]
    low, high = 0.85 * min(values), 1.2 * max(values)
    line = np.array([low, high])
    for i, text in enumerate(result.texts):
        axis = axes[0, i]
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
            xlabel="measured ratio of steps (NON-PRIVATE)",
            ylabel="predicted ratio of steps",
        )
        letter(axis, f"{'abcdefgh'[i]}  {text}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
