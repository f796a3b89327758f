"""Figure of the training dynamics of LoRA against full fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lowrank_dp.experiments.dynamics import expected_ratio, rank_steps
from lowrank_dp.plots.style import (
    BLACK,
    BLUE,
    COLOURS,
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
    """Plot distances to full fine-tuning, losses, ranks of the update, and the paired ratio."""
    figure, axes = new_figure(3, 2, height=7.0)
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
    _plot_rank(result, axes[2, 0])
    _plot_ratio(result, axes[2, 1])
    handles, labels = axes[1, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=2.2)
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


def _plot_rank(result: dynamics.Result, axis: Axes) -> None:
    """Plot the mean rank of the update over steps, at the smallest rank of A."""
    steps = rank_steps(result.config.num_steps)
    for a, arm in enumerate(result.arms):
        _, colour, marker, line = _ARM_STYLE[arm]
        axis.plot(steps, result.update_rank[a, 0].mean(axis=0), line, color=colour, marker=marker)
    axis.axhline(min(result.shape), color=BLACK, linestyle=":")
    axis.set(xscale="log", yscale="log", xlabel="step", ylabel="rank of the update")
    axis.set_xticks(steps, [str(step) for step in steps])
    axis.minorticks_off()
    size = " × ".join(map(str, result.shape))
    letter(axis, f"e  update of one layer ({size}), rank {result.config.ranks[0]}")


def _plot_ratio(result: dynamics.Result, axis: Axes) -> None:
    """Plot the paired ratio of distances over steps, per rank, and the expected ratio."""
    steps = np.arange(1, result.config.num_steps + 1)
    for r, rank in enumerate(result.config.ranks):
        curves = [part[r] for part in result.ratio_band]
        band(axis, steps, *curves, alpha=0.1, color=COLOURS[r], label=f"rank {rank}")
    expected = np.exp(np.log(expected_ratio(result)).mean(axis=0))
    axis.plot(steps, expected, ":", color=BLACK, label="expected")
    axis.axhline(1, color=BLACK, linewidth=0.6)
    axis.set(yscale="log", xlabel="step", xlim=(1, steps[-1]), ylabel="frozen A / fresh A")
    _plain_log(axis)
    axis.legend(fontsize=6, ncols=2)
    letter(axis, "f  ratio of distances, paired by seed")


def _plain_log(axis: Axes) -> None:
    """Label a logarithmic axis of one or two decades with plain numbers."""
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
