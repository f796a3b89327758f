"""Figure of the training dynamics of LoRA against full fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank_dp.experiments.dynamics import expected_ratio, rank_steps
from lowrank_dp.plots.arms import look
from lowrank_dp.plots.style import (
    BLACK,
    band,
    labelled,
    legend_below,
    letter,
    log_ranks,
    new_figure,
    plain_log,
    shade,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import dynamics

_LABELS = {
    "lora": "LoRA, A and B trained",
    "lora-frozen-a": "LoRA, A frozen",
    "fresh-a": "full, projected by a fresh A",
    "gaussian": "full + matched Gaussian noise",
}


def _over_seeds(result: dynamics.Result) -> str:
    return f"Bands and bars: 95% t-interval, {result.config.num_seeds} seeds."


@labelled(_over_seeds)
def plot_dynamics(result: dynamics.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot distances to full fine-tuning, losses, ranks of the update, and the paired ratio.

    ``axes`` are six existing matplotlib axes to draw in; None makes a new figure.
    """
    figure, grid = new_figure(3, 2, axes=axes, height=7.0)
    ranks, steps = result.config.ranks, np.arange(1, result.config.num_steps + 1)
    distance, difference = result.distance_band, result.loss_band  # mean, low, high
    for column, r in enumerate((0, len(ranks) - 1)):
        _plot_distance(result, grid[0, column], r)
        letter(grid[0, column], f"{'ab'[column]}  weights, rank {ranks[r]}")
    for a, arm in enumerate(result.arms):
        curves = [part[a, 0] for part in difference]
        band(grid[1, 0], steps, *curves, alpha=0.13, **look(arm).curve(marker=""))
        middle, low, high = (part[a, :, -1] for part in distance)
        offset = 1.06 ** (a - 1.5)
        grid[1, 1].errorbar(
            np.array(ranks) * offset,
            middle,
            [middle - low, high - middle],
            **look(arm).curve(elinewidth=0.8, label=_LABELS[arm]),
        )
    grid[1, 1].plot(ranks, result.one_step_distance, ":", color=BLACK, label="one step, expected")
    grid[1, 0].set(xlabel="step", ylabel="|loss − loss of full|  (nats)", xlim=(1, steps[-1]))
    letter(grid[1, 0], f"c  losses, rank {ranks[0]}")
    log_ranks(grid[1, 1], np.array(ranks))
    grid[1, 1].set(yscale="log", ylabel=f"relative distance at step {steps[-1]}")
    plain_log(grid[1, 1].yaxis)
    letter(grid[1, 1], "d  weights at the end, against rank")
    _plot_rank(result, grid[2, 0])
    _plot_ratio(result, grid[2, 1])
    shared = grid[1, 1].get_legend_handles_labels()
    legend_below(figure, grid, axes is None, shared, ncols=3, handlelength=2.2)
    return figure


def _plot_distance(result: dynamics.Result, axis: Axes, r: int) -> None:
    """Plot the distance over steps at the r-th rank."""
    steps = np.arange(1, result.config.num_steps + 1)
    for a, arm in enumerate(result.arms):
        curves = [part[a, r] for part in result.distance_band]
        band(axis, steps, *curves, alpha=0.13, **look(arm).curve(marker=""))
    axis.axhline(result.one_step_distance[r], color=BLACK, linestyle=":")
    axis.set(
        yscale="log",
        xlabel="step",
        xlim=(1, steps[-1]),
        ylabel="$|W - W_{full}|$ / $|W_{full} - W_0|$",
    )
    plain_log(axis.yaxis)


def _plot_rank(result: dynamics.Result, axis: Axes) -> None:
    """Plot the mean rank of the update over steps, at the smallest rank of A."""
    steps = rank_steps(result.config.num_steps)
    for a, arm in enumerate(result.arms):
        axis.plot(steps, result.update_rank[a, 0].mean(axis=0), **look(arm).curve())
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
        band(axis, steps, *curves, alpha=0.1, color=shade("rank", rank), label=f"rank {rank}")
    expected = np.exp(np.log(expected_ratio(result)).mean(axis=0))
    axis.plot(steps, expected, ":", color=BLACK, label="expected")
    axis.axhline(1, color=BLACK, linewidth=0.6)
    axis.set(yscale="log", xlabel="step", xlim=(1, steps[-1]), ylabel="frozen A / fresh A")
    plain_log(axis.yaxis)
    axis.legend(fontsize=6, ncols=2)
    letter(axis, "f  ratio of distances, paired by seed")
