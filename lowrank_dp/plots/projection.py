"""Figures of the privacy of LoRA's projection: exact profiles, and attacks on released rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank_dp.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    labelled,
    legend_below,
    letter,
    log_ranks,
    new_figure,
    shade,
)
from lowrank_dp.theory.privacy import PROFILE_ERROR

if TYPE_CHECKING:
    from lowrank_dp.experiments import matrix_attack, projection_privacy

# colour, marker and line of each number of released rows
_ROW_STYLES = ((RED, "o", ":"), (ORANGE, "s", "--"), (GREEN, "D", "-"), (BLUE, "^", "-."))


def _over_trials(result: projection_privacy.Result) -> str:
    return (
        f"d: bars are 95% intervals, {result.config.num_trials} trials with the candidate and as "
        "many without."
    )


@labelled(_over_trials)
def plot_projection_privacy(
    result: projection_privacy.Result, *, axes: Sequence[Axes] | None = None
) -> Figure:
    """Plot privacy profiles, delta against rank, the attack's ROC, and AUC under added noise.

    ``axes`` are four existing matplotlib axes to draw in; None makes a new figure.
    """
    figure, grid = new_figure(2, 2, axes=axes, height=5.2)
    (profile, by_rank), (roc, noise) = grid
    _plot_profiles(result, profile)
    _plot_delta(result, by_rank)
    _plot_attack_roc(result, roc)
    _plot_added_noise(result, noise)
    return figure


def _plot_profiles(result: projection_privacy.Result, profile: Axes) -> None:
    config = result.config
    for i, rank in enumerate(config.profile_ranks):
        colour = shade("rank", rank)
        profile.plot(config.epsilons, result.profile[i], color=colour, label=f"r = {rank}")
        profile.plot(config.epsilons, result.profile_gaussian[i], "--", color=colour)
    profile.set(
        yscale="log",
        ylim=(PROFILE_ERROR, 1),
        xlim=(0, config.epsilons[-1]),
        xlabel="ε",
        ylabel="δ(ε) of one vector query",
    )
    profile.legend(
        loc="lower right",
        title_fontsize=7,
        title=f"n = {config.profile_width}, {config.angle:g} rad",
    )
    letter(profile, "a  computed: exact —, Gaussian reading – –")


def _plot_delta(result: projection_privacy.Result, by_rank: Axes) -> None:
    config = result.config
    for i, n in enumerate(config.widths):
        colour = shade("width", n)
        by_rank.plot(config.rank_grid, result.by_rank[i], color=colour, label=f"exact, n = {n}")
    by_rank.plot(
        config.rank_grid, result.by_rank_gaussian, "--", color=BLUE, label="Gaussian reading"
    )
    log_ranks(by_rank, np.array(config.rank_grid))
    by_rank.set(yscale="log", ylim=(1e-3, 1), ylabel=f"δ at ε = 1, {config.angle:g} rad")
    by_rank.legend(loc="lower right", bbox_to_anchor=(1.02, 0.05), handlelength=1.4)
    letter(by_rank, "b  computed: not monotone in rank")


def _plot_attack_roc(result: projection_privacy.Result, roc: Axes) -> None:
    config = result.config
    for i, rows in enumerate(config.rows):
        name = "likelihood ratio" if rows == 1 else "symmetry score"
        roc.plot(
            result.fpr,
            result.tpr[i],
            color=_ROW_STYLES[i % len(_ROW_STYLES)][0],
            linewidth=2.2 - 0.6 * i,
            linestyle=("-", "-", "--")[i % 3],
            label=f"{rows} row{'s' * (rows > 1)}, {name}: {result.auc[i, 0, 0]:.3f}",
        )
    roc.plot(
        result.fpr,
        result.tpr_gaussian_reading,
        "--",
        color=BLUE,
        linewidth=1,
        label=f"1 row, Gaussian reading: {result.auc_gaussian_reading:.3f}",
    )
    roc.plot([0, 1], [0, 1], ":", color=GREY)
    roc.set(
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.04),
        xlabel="false positive rate",
        ylabel="true positive rate",
    )
    roc.legend(title="attack: AUC", title_fontsize=7, loc="lower right", handlelength=1.6)
    letter(roc, f"c  measured: n = {config.attack_width}, r = {config.attack_rank}, synthetic")


def _plot_added_noise(result: projection_privacy.Result, noise: Axes) -> None:
    config = result.config
    levels = np.array(config.noise_levels)
    position = np.arange(len(levels))
    for data, label, line, filled in (
        (result.auc, "synthetic", "-", True),
        (result.real_auc, "real layer", "--", False),
    ):
        for i, rows in enumerate(config.rows):
            value, low, high = data[i].T
            colour, marker, _ = _ROW_STYLES[i % len(_ROW_STYLES)]
            shift = 0.08 * (i - 1) + (0.0 if filled else 0.04)
            noise.errorbar(
                position + shift,
                value,
                [value - low, high - value],
                color=colour,
                linestyle=line,
                marker=marker,
                markerfacecolor=colour if filled else "white",
                elinewidth=0.8,
                label=f"{label}, {rows} row{'s' * (rows > 1)}",
            )
    noise.axhline(0.5, color=GREY, linestyle=":")
    noise.set_xticks(position, [f"{level:g}" for level in levels])
    noise.set(
        ylim=(0.2, 1.03), xlabel="added noise  (std / rms entry of the release)", ylabel="AUC"
    )
    noise.legend(ncols=2, loc="lower left", handlelength=2.2)
    letter(noise, "d  measured: AUC under added noise")


def _over_records(result: matrix_attack.Result) -> str:
    return f"Bars: 95% intervals, {result.config.num_trials} trials with the record and without."


@labelled(_over_records)
def plot_matrix_attack(
    result: matrix_attack.Result, *, axes: Sequence[Axes] | None = None
) -> Figure:
    """Plot AUC against added noise: one panel per rank, one curve per number of rows.

    ``axes`` are existing matplotlib axes to draw in, one per rank.
    """
    figure, grid = new_figure(1, len(result.config.ranks), axes=axes, height=2.9, sharey=True)
    for k, axis in enumerate(grid[0]):
        _plot_rank(result, k, axis)
    grid[0, 0].set_ylabel("AUC")
    curves, names = grid[0, 0].get_legend_handles_labels()
    marks = [
        *grid[0, 0].plot([], [], "o", color=GREY, markerfacecolor="white"),
        *grid[0, 0].plot([], [], ":", color=GREY, linewidth=1),
    ]
    said = [*names, "Gaussian reading, no noise", "rms entry of the release"]
    legend_below(figure, grid, axes is None, ([*curves, *marks], said), ncols=3)
    return figure


def _plot_rank(result: matrix_attack.Result, k: int, axis: Axes) -> None:
    """Plot the AUC against added noise at the k-th rank."""
    config = result.config
    position, ticks, labels = _decades(np.array(config.noise_multipliers))
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
    bottom = min(0.4, float(result.auc.min())) - 0.04  # result.auc includes the intervals' ends
    axis.set(xlabel="added noise, std / C", ylim=(bottom, 1.03))
    letter(axis, f"{chr(ord('a') + k)}  rank {config.ranks[k]}")


def _decades(levels: np.ndarray) -> tuple[np.ndarray, list[float], list[str]]:
    """Return positions, ticks and labels of a log axis that has room for 0.

    A level of 0 stands left of the smallest level. Ticks are at 0, at decades and at the largest
    level.
    """
    logs = np.log10(levels[levels > 0]) if levels.any() else np.zeros(1)
    first, last = float(np.floor(logs.min())), float(logs.max())
    position = np.where(levels > 0, np.log10(np.where(levels > 0, levels, 1)), first - 1)
    decades = np.arange(first, last - 0.9, 2)
    return (
        position,
        [first - 1, *decades, last],
        ["0", *(f"$10^{{{d:.0f}}}$" for d in decades), f"{10**last:.2g}"],
    )
