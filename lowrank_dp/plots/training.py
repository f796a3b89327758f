"""Figures of training runs: learning curves and steps to a target."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from lowrank_dp.plots import (
    BLACK,
    BLUE,
    FULL,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    letter,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import efficiency

# arm -> colour, marker, line: schemes as in every other figure
ARM_STYLE = {
    "DP-SGD": (GREY, "o", "-"), "denoise": (BLUE, "X", "--"),
    "optimal, zeroed": (RED, ".", ":"), "low-pass filter": (GREEN, "s", "--"),
    "momentum + optimal": (RED, "*", "--"), "momentum + optimal, zeroed": (RED, "*", "-"),
    "DP-LoRA": (SKY, "v", "-"), "DP-LoRA, frozen A": (ORANGE, "^", "-"),
    "DP-LoRA, momentum + optimal, zeroed": (PINK, "D", "-"),
}


@styled
def plot_efficiency(result: efficiency.Result) -> Figure:
    """Score and loss over steps, and score against the time spent in steps."""
    figure, axes = new_figure(1, 3, width=FULL, height=2.9)
    seconds = result.seconds.mean(axis=1)
    panels = ((axes[0, 0], result.score, None, result.config.score, "step"),
              (axes[0, 1], result.loss, None, "validation loss", "step"),
              (axes[0, 2], result.score, seconds, result.config.score, "seconds in steps"))
    for panel, (axis, values, x, name, below) in zip("abc", panels, strict=True):
        for i, arm in enumerate(result.arms):
            colour, marker, line = ARM_STYLE[arm]
            mean, half = result.band(i, values)
            where = result.steps if x is None else x[i]
            axis.plot(where, mean, line, color=colour, marker=marker, markersize=3, label=arm)
            axis.fill_between(where, mean - half, mean + half, color=colour, alpha=0.12,
                              linewidth=0)
        axis.set(xlabel=below, ylabel=name)
        letter(axis, panel)
    target = result.start + 0.9 * (result.best - result.start)
    for axis in (axes[0, 0], axes[0, 2]):
        axis.axhline(target, color=BLACK, linewidth=0.8, linestyle="--")
        _limit(axis, result.score)
    _limit(axes[0, 1], result.loss)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _limit(axis: object, values: np.ndarray) -> None:
    """The range of the means: with three seeds an interval can leave every scale."""
    means = values.mean(axis=1)
    low, high = float(np.nanmin(means)), float(np.nanmax(means))
    room = 0.08 * (high - low) or 0.1
    axis.set_ylim(low - room, high + room)  # type: ignore[attr-defined]
