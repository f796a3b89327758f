"""Figures of LoRA's implicit noise: its distribution, and its distance to a Gaussian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank_dp.plots.style import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    labelled,
    legend_below,
    letter,
    log_ranks,
    new_figure,
    shade,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import lora_noise, total_variation


def _over_draws(result: lora_noise.Result) -> str:
    config = result.config
    return (
        f"Bars: 95% interval over draws of A, {config.vector_draws} for the vectors, "
        f"{config.num_draws} for the layers."
    )


@labelled(_over_draws)
def plot_lora_noise(result: lora_noise.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot variance against rank, the exact density, and kurtosis against rank.

    ``axes`` are three existing matplotlib axes to draw in; None makes a new figure.
    """
    figure, grid = new_figure(1, 3, axes=axes, height=3.2)
    variance, density, kurtosis = grid[0]
    _plot_moments(result, variance, kurtosis)
    _plot_one_hot(result, variance)
    ranks = np.array(result.config.ranks)
    log_ranks(variance, ranks)
    variance.set(yscale="log", ylabel="variance of $u_j$  (units of $|q|^2$)")
    letter(variance, "a  variance ●, formula —")
    _plot_density(result, density)
    kurtosis.axhline(3, color=BLACK, linestyle="--", linewidth=0.8)
    kurtosis.text(ranks[0], 2.95, "Gaussian: 3", va="top", fontsize=7)
    log_ranks(kurtosis, ranks)
    low = float(np.min(result.kurtosis - result.kurtosis_ci))
    kurtosis.set(yscale="log", ylabel="kurtosis of $u_j$", ylim=(0.97 * min(2.6, low), None))
    kurtosis.set_yticks([3, 4, 6, 9, 12], ["3", "4", "6", "9", "12"])
    kurtosis.minorticks_off()
    letter(kurtosis, "c  kurtosis ●, exact —")
    legend_below(figure, grid, axes is None, ncols=3, handlelength=1.6, fontsize=6.5)
    return figure


def _plot_moments(result: lora_noise.Result, variance: Axes, kurtosis: Axes) -> None:
    """Plot measured moments with their intervals, and the formulas."""
    ranks = np.array(result.config.ranks)
    for i, label in enumerate(result.sources):
        style: dict[str, Any] = {
            "color": COLOURS[i % 7],
            "marker": MARKERS[i % 8],
            "linestyle": "none",
            "markersize": 3.5,
            "elinewidth": 0.8,
        }
        variance.errorbar(ranks, result.variance[i], result.variance_ci[i], label=label, **style)
        kurtosis.errorbar(ranks, result.kurtosis[i], result.kurtosis_ci[i], **style)
        kurtosis.plot(ranks, result.kurtosis_exact[i], color=COLOURS[i % 7], linewidth=0.8)
    variance.plot(
        ranks, result.variance_exact[0], color=BLACK, linewidth=0.8, label="formula, ≈ 1/r"
    )


def _plot_one_hot(result: lora_noise.Result, variance: Axes) -> None:
    """Plot the variance of the coordinate that carries all of q."""
    ranks = np.array(result.config.ranks)
    for init, values, half, exact, marker, line in zip(
        result.one_hot_inits,
        result.one_hot_variance,
        result.one_hot_variance_ci,
        result.one_hot_variance_exact,
        "1x",
        ("--", ":"),
        strict=False,
    ):
        variance.errorbar(
            ranks, values, half, color=GREY, marker=marker, linestyle="none", elinewidth=0.8
        )
        variance.plot(
            ranks,
            exact,
            line,
            color=GREY,
            linewidth=0.8,
            label=f"one-hot q, {init} A: {exact[0] * ranks[0]:.2g}/r",
        )


def _plot_density(result: lora_noise.Result, density: Axes) -> None:
    x = result.density_x
    for i, rank in enumerate(result.config.density_ranks):
        density.plot(x, result.density[i], color=shade("rank", rank), label=f"r = {rank}")
    density.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), "--", color=BLACK, label="Gaussian")
    density.set(
        yscale="log",
        ylim=(1e-5, 3),
        xlim=(-6, 6),
        xlabel="$u_j$  (standard deviations)",
        ylabel="density",
    )
    density.legend(loc="lower center", handlelength=1.4)
    letter(density, "b  exact density")


@labelled()
def plot_total_variation(
    result: total_variation.Result, *, axes: Sequence[Axes] | None = None
) -> Figure:
    """Plot the distance to a Gaussian of one coordinate, by rank and width, and of all.

    ``axes`` are three existing matplotlib axes to draw in; None makes a new figure.
    """
    figure, grid = new_figure(1, 3, axes=axes, height=2.9)
    by_rank, by_width, joint = grid[0]
    _plot_by_rank(result, by_rank)
    _plot_by_width(result, by_width)
    _plot_joint(result, joint)
    return figure


def _plot_by_rank(result: total_variation.Result, by_rank: Axes) -> None:
    config = result.config
    for values, label, colour, line in (
        (result.berry_esseen, "Berry–Esseen bound", GREY, "-"),
        (result.kolmogorov, "Kolmogorov, exact", GREY, ":"),
        (result.upper, "TV, upper bound", ORANGE, "--"),
        (result.exact, "TV, exact", BLUE, "-"),
        (result.lower, "TV, lower bound", GREEN, "-."),
    ):
        by_rank.plot(config.ranks, values, line, color=colour, label=label)
    log_ranks(by_rank, np.array(config.ranks))
    by_rank.set(yscale="log", ylabel="distance to the Gaussian", ylim=(1e-5, 2))
    by_rank.legend(loc="lower left", handlelength=1.8, fontsize=6.5)
    letter(by_rank, f"a  one coordinate, n = {config.width}")


def _plot_by_width(result: total_variation.Result, by_width: Axes) -> None:
    config = result.config
    for i, rank in enumerate(config.fixed_ranks):
        colour = shade("rank", rank)
        by_width.plot(config.widths, result.by_width_exact[i], color=colour)
        by_width.plot(config.widths, result.by_width_upper[i], "--", color=colour, linewidth=0.9)
        by_width.plot(config.widths, result.by_width_paper[i], ":", color=colour, linewidth=0.9)
        by_width.text(
            config.widths[-1] * 1.2,
            result.by_width_exact[i, -1],
            f"r={rank}",
            color=colour,
            fontsize=7,
            va="center",
        )
    for line, label in (("-", "exact"), ("--", "upper bound"), (":", "exact, paper's Gaussian")):
        by_width.plot([], [], line, color=BLACK, label=label)
    by_width.set(
        xscale="log",
        yscale="log",
        xlabel="width n",
        ylabel="TV of one coordinate",
        ylim=(result.by_width_exact.min() / 12, 1),
        xlim=(config.widths[0] / 1.2, config.widths[-1] * 6),
    )
    by_width.legend(loc="lower left", handlelength=1.8, fontsize=6.5)
    letter(by_width, "b  one coordinate, by width")


def _plot_joint(result: total_variation.Result, joint: Axes) -> None:
    config = result.config
    ratios = np.array(config.joint_ratios)
    joint.plot(ratios, result.joint_limit, color=BLACK, label="limit")
    for i, rank in enumerate(config.joint_ranks):
        joint.plot(
            ratios,
            result.joint[i],
            linestyle="none",
            marker=MARKERS[i],
            color=shade("rank", rank),
            markersize=3.5,
            label=f"r = {rank}",
        )
    joint.plot(
        ratios,
        result.joint_paper[-1],
        ":",
        color=shade("rank", config.joint_ranks[-1]),
        label=f"r = {config.joint_ranks[-1]}, paper's",
    )
    joint.set(
        xscale="log", xlabel="width / rank  (n/r)", ylabel="TV of all coordinates", ylim=(0, 1.02)
    )
    joint.legend(loc="lower right", handlelength=1.4, fontsize=6.5)
    letter(joint, "c  all coordinates, exact")
