"""Figure of membership inference: AUC by method, rank, training loss and utility."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, ScalarFormatter

from lowrank_dp.plots.arms import look
from lowrank_dp.plots.style import (
    FULL,
    GREEN,
    GREY,
    labelled,
    legend_below,
    letter,
    new_figure,
    show_all,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import membership


def _over_seeds(result: membership.Result) -> str:
    count = result.config.num_seeds
    return (
        f"a, b: bars and bands are 95% t-intervals, {count} seeds; c, d: means, a point per number "
        "of steps."
    )


@labelled(_over_seeds)
def plot_membership(result: membership.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot AUC and TPR against rank, and AUC against training loss and utility.

    ``axes`` are four existing matplotlib axes to draw in; None makes a new figure.
    """
    figure, grid = new_figure(2, 2, axes=axes, width=FULL, height=5.0)
    steps = result.config.steps[-1]
    _against_rank(grid[0, 0], result, result.auc)
    grid[0, 0].set_ylabel(f"AUC, {result.config.attack}")
    letter(grid[0, 0], f"a  AUC after {steps} steps")
    variance = grid[0, 0].twinx()
    one = "o" if len(result.config.ranks) == 1 else ""  # a line through one point is invisible
    variance.plot(
        result.config.ranks, result.noise_variance, "--", marker=one, color=GREEN, linewidth=1
    )
    variance.set(yscale="log")
    variance.set_ylabel("variance of the projection noise", color=GREEN)
    variance.grid(False)
    if np.isnan(result.tpr).all():  # an FPR of 1% needs 100 non-members
        grid[0, 1].text(
            0.5,
            0.5,
            "too few non-members",
            ha="center",
            va="center",
            transform=grid[0, 1].transAxes,
        )
    else:
        _against_rank(grid[0, 1], result, result.tpr)
        grid[0, 1].axhline(0.01, color=GREY, linestyle=":", linewidth=0.8)
        bands = [result.band(result.tpr, i) for i in range(len(result.arms))]
        show_all(grid[0, 1], *(mean + sign * half for mean, half in bands for sign in (-1, 1)))
    grid[0, 1].set_ylabel("TPR at 1% FPR")
    letter(grid[0, 1], f"b  TPR at 1% FPR after {steps} steps")
    for axis, values, name, mark in (
        (grid[1, 0], result.train_loss, "training loss", "c"),
        (grid[1, 1], result.utility, f"held-out {result.utility_name}", "d"),
    ):
        for i, arm in enumerate(result.arms):
            style = look(arm.split(" r=")[0]).points(markersize=3.5, alpha=0.8)
            axis.plot(values[i].mean(0), result.auc[i].mean(0), **style)
        axis.axhline(0.5, color=GREY, linestyle=":", linewidth=0.8)
        axis.set(xlabel=name, ylabel=f"AUC, {result.config.attack}")
        letter(axis, f"{mark}  AUC against {name}")
    grid[1, 0].xaxis.set_major_formatter(ScalarFormatter())
    curves, chance = grid[0, 0].get_legend_handles_labels(), Line2D([], [], color=GREY, ls=":")
    entries = [*curves[0], chance], [*curves[1], "chance"]
    legend_below(figure, grid, axes is None, entries, ncols=6)
    return figure


def _against_rank(axis: Axes, result: membership.Result, values: np.ndarray) -> None:
    """Plot ``values`` (arms, seeds, steps) at the last number of steps."""
    for family in ("LoRA", "frozen A"):
        chosen = [i for i, arm in enumerate(result.arms) if arm.startswith(family)]
        if not chosen:
            continue
        ranks = [int(result.arms[i].split("=")[1]) for i in chosen]
        bands = [result.band(values, i) for i in chosen]
        shift = 0.97 if family == "LoRA" else 1.03
        axis.errorbar(
            shift * np.array(ranks),
            [mean[-1] for mean, _ in bands],
            [half[-1] for _, half in bands],
            **look(family).curve(label=family, elinewidth=0.8, capsize=2),
        )
    for arm in (name for name in result.arms if name.startswith("full")):
        mean, half = result.band(values, result.arms.index(arm))
        colour = look(arm).colour
        axis.axhline(mean[-1], linewidth=1, label=arm, **look(arm).curve(marker=""))
        axis.axhspan(mean[-1] - half[-1], mean[-1] + half[-1], color=colour, alpha=0.08)
    axis.set(xscale="log", xlabel="rank")
    if len(result.config.ranks) == 1:
        axis.set_xlim(result.config.ranks[0] / 2, result.config.ranks[0] * 2)
    axis.set_xticks(result.config.ranks, [str(rank) for rank in result.config.ranks])
    axis.xaxis.set_minor_formatter(NullFormatter())
