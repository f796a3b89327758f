"""Figure of membership inference: AUC by method, rank, training loss and utility."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from lowrank_dp.plots.style import (
    BLACK,
    BLUE,
    FULL,
    GREEN,
    GREY,
    ORANGE,
    RED,
    letter,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import membership

# method -> colour and marker
METHOD_STYLE = {
    "full": (BLACK, "s"),
    "LoRA": (BLUE, "o"),
    "frozen A": (ORANGE, "^"),
    "full, DP": (GREY, "D"),
    "full, DP restored": (RED, "*"),
}


@styled
def plot_membership(result: membership.Result) -> Figure:
    """Plot AUC and TPR against rank, and AUC against training loss and utility."""
    figure, axes = new_figure(2, 2, width=FULL, height=4.8)
    steps = result.config.steps[-1]
    _against_rank(axes[0, 0], result, result.auc)
    axes[0, 0].set_ylabel(f"AUC, {result.config.attack}")
    letter(axes[0, 0], f"a  {steps} steps")
    variance = axes[0, 0].twinx()
    variance.plot(result.config.ranks, result.noise_variance, "--", color=GREEN, linewidth=1)
    variance.set(yscale="log")
    variance.set_ylabel("variance of the projection noise", color=GREEN)
    variance.grid(False)
    if np.isnan(result.tpr).all():  # an FPR of 1% needs 100 non-members
        axes[0, 1].text(
            0.5,
            0.5,
            "too few non-members",
            ha="center",
            va="center",
            transform=axes[0, 1].transAxes,
        )
    else:
        _against_rank(axes[0, 1], result, result.tpr)
        axes[0, 1].axhline(0.01, color=GREY, linestyle=":", linewidth=0.8)
    axes[0, 1].set(ylabel="TPR at 1% FPR", ylim=(0, None))
    letter(axes[0, 1], f"b  {steps} steps")
    for axis, values, name, mark in (
        (axes[1, 0], result.train_loss, "training loss", "c"),
        (axes[1, 1], result.utility, f"held-out {result.utility_name}", "d"),
    ):
        for i, arm in enumerate(result.arms):
            colour, marker = METHOD_STYLE[arm.split(" r=")[0]]
            axis.plot(
                values[i].mean(0),
                result.auc[i].mean(0),
                "-",
                color=colour,
                marker=marker,
                markersize=3,
                linewidth=0.8,
                alpha=0.8,
            )
        axis.axhline(0.5, color=GREY, linestyle=":", linewidth=0.8)
        axis.set(xlabel=name, ylabel=f"AUC, {result.config.attack}")
        letter(axis, mark)
    axes[1, 0].xaxis.set_major_formatter(ScalarFormatter())
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _against_rank(axis: Axes, result: membership.Result, values: np.ndarray) -> None:
    """Plot ``values`` (arms, seeds, steps) at the last number of steps."""
    for family in ("LoRA", "frozen A"):
        chosen = [i for i, arm in enumerate(result.arms) if arm.startswith(family)]
        if not chosen:
            continue
        ranks = [int(result.arms[i].split("=")[1]) for i in chosen]
        bands = [result.band(values, i) for i in chosen]
        colour, marker = METHOD_STYLE[family]
        axis.errorbar(
            ranks,
            [mean[-1] for mean, _ in bands],
            [half[-1] for _, half in bands],
            color=colour,
            marker=marker,
            label=family,
            elinewidth=0.8,
            capsize=2,
        )
    for arm in ("full", "full, DP", "full, DP restored"):
        mean, half = result.band(values, result.arms.index(arm))
        colour, _ = METHOD_STYLE[arm]
        axis.axhline(mean[-1], color=colour, linewidth=1, label=arm)
        axis.axhspan(mean[-1] - half[-1], mean[-1] + half[-1], color=colour, alpha=0.08)
    axis.set(xscale="log", xlabel="rank")
    axis.set_xticks(result.config.ranks, [str(rank) for rank in result.config.ranks])
    axis.xaxis.set_minor_formatter(NullFormatter())
