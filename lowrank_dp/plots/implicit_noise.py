"""Figure of LoRA's implicit noise: AUC against rank at equal steps and losses, and over a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from lowrank_dp.plots.style import (
    BLACK,
    BLUE,
    FULL,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    letter,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import implicit_noise

# family -> colour, marker, and the factor that shifts its points sideways
FAMILY_STYLE = {
    "LoRA": (BLUE, "o", 0.88),
    "frozen A": (ORANGE, "^", 0.96),
    "Gaussian noise": (GREEN, "D", 1.04),
    "fresh A": (PINK, "v", 1.13),
}


@styled
def plot_implicit_noise(result: implicit_noise.Result) -> Figure:
    """Plot the AUC against rank at equal steps and at equal losses, and against training loss."""
    figure, axes = new_figure(2, 2, width=FULL, height=4.8)
    for axis, (name, values), mark in zip(axes.flat, result.readings.items(), "abc", strict=False):
        _against_rank(axis, result, values)
        axis.set_ylabel("AUC")
        letter(axis, f"{mark}  at {name}")
    last = axes[1, 1]
    for i, arm in enumerate(result.arms):
        family, _, _ = arm.removesuffix(", dropout").partition(" r=")
        colour, marker, _ = FAMILY_STYLE.get(family, (BLACK, "s", 1.0))
        last.plot(
            result.train_loss[i].mean(axis=0),
            result.auc[i].mean(axis=0),
            ":" if arm.endswith(", dropout") else "-",
            color=colour,
            marker=marker,
            markersize=3,
            linewidth=0.8,
            alpha=0.8,
        )
    last.axhline(0.5, color=GREY, linestyle=":", linewidth=0.8)
    last.set(xlabel="training loss", ylabel="AUC")
    letter(last, "d  over the run (dotted, with dropout)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def _against_rank(axis: Axes, result: implicit_noise.Result, values: np.ndarray) -> None:
    """Plot ``values`` (arms, seeds) against rank; an arm that a seed did not reach is left out."""
    mean, half = result.band(values, "full")
    if np.isfinite(mean):
        axis.axhline(mean, color=BLACK, linewidth=1, label="full")
        axis.axhspan(mean - half, mean + half, color=BLACK, alpha=0.08)
    for family, (colour, marker, shift) in FAMILY_STYLE.items():
        ranks = [
            int(arm.split("=")[1])
            for arm in result.arms
            if arm.startswith(f"{family} r=") and not arm.endswith(", dropout")
        ]
        bands = np.array([result.band(values, f"{family} r={rank}") for rank in ranks])
        if len(ranks):
            axis.errorbar(
                np.array(ranks) * shift,
                bands[:, 0],
                bands[:, 1],
                color=colour,
                marker=marker,
                label=family,
                elinewidth=0.8,
                capsize=2,
                linewidth=0.8,
            )
    axis.set(xscale="log", xlabel="rank")
    axis.set_xticks(result.config.ranks, [str(rank) for rank in result.config.ranks])
    axis.xaxis.set_minor_formatter(NullFormatter())
