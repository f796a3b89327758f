"""Figure of the training dynamics of LoRA against full fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    """Plot distance to full fine-tuning over steps and against rank, and the losses' difference.

    ``axes`` are four axes of the user's own to draw in.
    """
    figure, grid = new_figure(2, 2, axes=axes, height=5.0)
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
