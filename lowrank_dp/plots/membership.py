"""Figures of membership inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from lowrank_dp.plots import BLUE, GREEN, GREY, ORANGE, RED, letter, new_figure, styled

if TYPE_CHECKING:
    from lowrank_dp.experiments import matrix_attack

# by number of released rows: colour, marker, line
_ROW_STYLES = ((RED, "o", ":"), (ORANGE, "s", "--"), (GREEN, "D", "-"), (BLUE, "^", "-."))


@styled
def plot_matrix_attack(result: matrix_attack.Result) -> Figure:
    """AUC against added noise, one panel a rank and one curve a number of rows."""
    config = result.config
    figure, axes = new_figure(1, len(config.ranks), height=2.7, sharey=True)
    noise = np.array(config.noise_multipliers)
    position, ticks, labels = _decades(noise)
    bottom = min(0.4, float(result.auc.min())) - 0.04
    for k, (axis, rank) in enumerate(zip(axes[0], config.ranks, strict=True)):
        for i, rows in enumerate(config.rows):
            colour, marker, line = _ROW_STYLES[i % len(_ROW_STYLES)]
            shift = 0.12 * (i - (len(config.rows) - 1) / 2)
            value, low, high = result.auc[k, i].T
            axis.errorbar(
                position + shift,
                value,
                [value - low, high - value],
                color=colour,
                marker=marker,
                linestyle=line,
                elinewidth=0.8,
                label=("1 row, likelihood ratio" if rows == 1 else f"{rows} rows, symmetry score"),
            )
            axis.plot(
                ticks[0] - 0.45 + shift,
                result.gaussian_reading[k, i],
                marker=marker,
                markerfacecolor="white",
                color=colour,
                linestyle="none",
            )
        rms = result.release_rms[k] / config.gradients.max_grad_norm
        axis.axvline(np.log10(rms), color=GREY, linestyle=":", linewidth=1)
        axis.axhline(0.5, color=GREY, linewidth=0.8)
        axis.set_xticks(ticks, labels)
        axis.set(xlabel="added noise, std / C", ylim=(bottom, 1.03))
        letter(axis, f"{chr(ord('a') + k)}  rank {rank}")
    axes[0, 0].set_ylabel("AUC")
    curves, names = axes[0, 0].get_legend_handles_labels()
    marks = [
        *axes[0, 0].plot([], [], "o", color=GREY, markerfacecolor="white"),
        *axes[0, 0].plot([], [], ":", color=GREY, linewidth=1),
    ]
    figure.legend(
        [*curves, *marks],
        [*names, "Gaussian reading, no noise", "rms entry of the release"],
        loc="outside lower center",
        ncols=3,
    )
    return figure


def _decades(levels: np.ndarray) -> tuple[np.ndarray, list[float], list[str]]:
    """Positions log10(level), with 0 left of the smallest; ticks at 0, decades and the largest."""
    logs = np.log10(levels[levels > 0]) if levels.any() else np.zeros(1)
    first, last = float(np.floor(logs.min())), float(logs.max())
    position = np.where(levels > 0, np.log10(np.where(levels > 0, levels, 1)), first - 1)
    decades = np.arange(first, last - 0.9, 2)
    return (
        position,
        [first - 1, *decades, last],
        ["0", *(f"$10^{{{d:.0f}}}$" for d in decades), f"{10**last:.2g}"],
    )
