"""Figure of the training dynamics of LoRA against full fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lowrank_dp.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    RED,
    band,
    letter,
    log_ranks,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import dynamics

# arm -> label, colour, marker, line
_ARM_STYLE = {
    "lora": ("LoRA, A and B trained", RED, "o", "-"),
    "lora-frozen-a": ("LoRA, A frozen", ORANGE, "s", "--"),
    "fresh-a": ("full, projected by a fresh A", GREEN, "D", "-"),
    "gaussian": ("full + matched Gaussian noise", BLUE, "^", "--"),
}


@styled
def plot_dynamics(result: dynamics.Result) -> Figure:
    """Plot distance to full fine-tuning over steps and against rank, and the losses' difference."""
    figure, axes = new_figure(2, 2, height=4.8)
    ranks, steps = result.config.ranks, np.arange(1, result.config.num_steps + 1)
    distance, difference = result.distance_band, result.loss_band  # mean, low, high
    for column, r in enumerate((0, len(ranks) - 1)):
        _plot_distance(result, axes[0, column], r)
        letter(axes[0, column], f"{'ab'[column]}  weights, rank {ranks[r]}")
    for a, arm in enumerate(result.arms):
        label, colour, marker, line = _ARM_STYLE[arm]
        curves = [part[a, 0] for part in difference]
        band(axes[1, 0], steps, *curves, alpha=0.13, color=colour, linestyle=line)
        middle, low, high = (part[a, :, -1] for part in distance)
        offset = 1.06 ** (a - 1.5)
        axes[1, 1].errorbar(
            np.array(ranks) * offset,
            middle,
            [middle - low, high - middle],
            color=colour,
            marker=marker,
            linestyle=line,
            elinewidth=0.8,
            label=label,
        )
    axes[1, 1].plot(ranks, result.one_step_distance, ":", color=BLACK, label="one step, expected")
    axes[1, 0].set(
        xlabel="step", ylabel="|loss − loss of full|  (nats)", xlim=(1, steps[-1]), ylim=(0, None)
    )
    letter(axes[1, 0], f"c  losses, rank {ranks[0]}")
    log_ranks(axes[1, 1], np.array(ranks))
    axes[1, 1].set(yscale="log", ylabel=f"relative distance at step {steps[-1]}")
    _plain_log(axes[1, 1])
    letter(axes[1, 1], "d  weights at the end, against rank")
    figure.legend(loc="outside lower center", ncols=3, handlelength=2.2)
    return figure


def _plot_distance(result: dynamics.Result, axis: Axes, r: int) -> None:
    """Plot the distance over steps at the r-th rank."""
    steps = np.arange(1, result.config.num_steps + 1)
    for a, arm in enumerate(result.arms):
        _, colour, _, line = _ARM_STYLE[arm]
        curves = [part[a, r] for part in result.distance_band]
        band(axis, steps, *curves, alpha=0.13, color=colour, linestyle=line)
    axis.axhline(result.one_step_distance[r], color=BLACK, linestyle=":")
    axis.set(
        yscale="log",
        xlabel="step",
        xlim=(1, steps[-1]),
        ylabel="$|W - W_{full}|$ / $|W_{full} - W_0|$",
    )
    _plain_log(axis)


def _plain_log(axis: Axes) -> None:
    """Label a logarithmic axis of one or two decades with plain numbers."""
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
