"""Figures of restored gradients: alignment, ablation, running means, and tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lowrank_dp.experiments.intervals import mean_and_interval
from lowrank_dp.plots.style import (
    BLACK,
    BLUE,
    FULL,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    YELLOW,
    band,
    letter,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import ablation, alignment, momentum, tasks

# scheme -> colour, marker and line in every figure
SCHEME_STYLE = {
    "noisy": (GREY, "o", "-"),
    "truncate(8)": (SKY, "v", "-"),
    "power(3)": (ORANGE, "^", "-"),
    "hard": (PINK, "s", "-"),
    "soft": (YELLOW, "D", "-"),
    "partial(0.5)": (GREEN, "P", "-"),
    "denoise": (BLUE, "X", "--"),
    "optimal": (RED, "*", "-"),
    "optimal, zeroed": (RED, ".", ":"),
    "oracle profile": (BLACK, "x", ":"),
    "oracle weights": (BLACK, "+", "--"),
}


@styled
def plot_alignment(result: alignment.Result) -> Figure:
    """Plot alignment against batch size and against noise, and error at the largest batch."""
    figure, axes = new_figure(1, 3, width=FULL, height=2.9)
    by_size = result.noise_multiplier == result.noise_multiplier[0]
    by_noise = result.batch_size == result.batch_size.max()
    _plot_schemes(result, axes[0, 0], by_size, result.batch_size)
    axes[0, 0].set(xlabel="batch size", ylim=(0, None))
    _plot_schemes(result, axes[0, 1], by_noise, result.noise_multiplier)
    axes[0, 1].set(xlabel="noise multiplier", ylim=(0, None))
    sigma, size = result.noise_multiplier[0], result.batch_size.max()
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_xticks(np.unique(result.batch_size), np.unique(result.batch_size))
    axes[0, 0].minorticks_off()
    letter(axes[0, 0], f"a  noise multiplier {sigma:g}")
    letter(axes[0, 1], f"b  batch size {size}")
    setting = np.flatnonzero(by_size & by_noise)[0]
    mean, half = mean_and_interval(result.error[setting], axis=-1)
    y = np.arange(len(result.schemes))
    axes[0, 2].barh(
        y,
        mean,
        xerr=half,
        color=[SCHEME_STYLE[s][0] for s in result.schemes],
        height=0.7,
        error_kw={"elinewidth": 0.8},
    )
    axes[0, 2].set_yticks(y, result.schemes)
    axes[0, 2].invert_yaxis()
    axes[0, 2].set(xlabel="error / norm of clean gradient", xlim=(0, None))
    axes[0, 2].axvline(1, color=GREY, linewidth=0.8, linestyle=":")  # the error of a zero gradient
    letter(axes[0, 2], f"c  batch {size}, noise {sigma:g}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def _plot_schemes(result: alignment.Result, axis: Axes, chosen: np.ndarray, x: np.ndarray) -> None:
    """Plot the alignment of every scheme against ``x`` at the ``chosen`` settings."""
    order = np.flatnonzero(chosen)[np.argsort(x[chosen])]
    for j, scheme in enumerate(result.schemes):
        colour, marker, line = SCHEME_STYLE[scheme]
        mean, half = mean_and_interval(result.alignment[order, j].mean(-1), axis=-1)
        axis.errorbar(
            x[order],
            mean,
            yerr=half,
            color=colour,
            marker=marker,
            linestyle=line,
            label=scheme,
            elinewidth=0.8,
            markersize=4,
        )
    axis.set_ylabel("alignment with clean gradient")


@styled
def plot_ablation(result: ablation.Result) -> Figure:
    """Plot alignment and error against kappa, and of every threshold at the largest batch."""
    figure, axes = new_figure(2, 2, width=FULL, height=4.6, height_ratios=(4, 5))
    _plot_kappas(result, *axes[0])
    _plot_thresholds(result, *axes[1])
    return figure


def _plot_kappas(result: ablation.Result, aligned: Axes, error: Axes) -> None:
    """Plot ``denoise`` against kappa, with norm correction and without."""
    sizes, kappas = sorted(result.config.batch_sizes), np.array(result.config.kappas)
    noisy, colours = result.variants.index("noisy"), (SKY, BLUE, GREEN, PINK)[: len(sizes)]
    for axis, values in ((aligned, result.alignment), (error, result.error)):
        mean, half = mean_and_interval(result.by_kappa(values), axis=-1)
        for i, colour in enumerate(colours):
            for k, line in enumerate(("-", "--")):  # equal in (a): rescaling keeps a direction
                axis.errorbar(
                    kappas,
                    mean[i, k],
                    half[i, k],
                    color=colour,
                    marker="X",
                    linestyle=line,
                    elinewidth=0.8,
                    markersize=4,
                )
            axis.axhline(values[i, noisy].mean(), color=colour, linestyle=":", linewidth=1)
        axis.set(xlabel="kappa", xscale="log", ylim=(0, None))
        axis.set_xticks(kappas, [f"{kappa:g}" for kappa in kappas])
        axis.minorticks_off()
    aligned.set_ylabel("alignment, mean over layers")
    error.set_ylabel("error / norm of clean gradient")
    handles = [
        Line2D([], [], color=colour, marker="X", label=f"batch {size}")
        for size, colour in zip(sizes, colours, strict=False)
    ]
    handles += [
        Line2D([], [], color=BLACK, label="norm correction"),
        Line2D([], [], color=BLACK, linestyle="--", label="without"),
        Line2D([], [], color=BLACK, linestyle=":", label="noisy"),
    ]
    error.legend(handles=handles, ncols=2)
    letter(aligned, "a  kappa of denoise")
    letter(error, "b  and norm correction")


def _plot_thresholds(result: ablation.Result, aligned: Axes, error: Axes) -> None:
    """Plot thresholds and shrinkers at the largest batch."""
    names = result.variants[: -2 * len(result.config.kappas)]
    y = np.arange(len(names))
    for values, fill, label in (
        (result.alignment, RED, "mean over layers"),
        (result.overall, "white", "all layers as one"),
    ):
        mean, half = mean_and_interval(values[-1, : len(names)], axis=-1)
        aligned.errorbar(
            mean,
            y,
            xerr=half,
            color=RED,
            marker="o",
            markerfacecolor=fill,
            linestyle="none",
            elinewidth=0.8,
            label=label,
        )
    aligned.set(xlabel="alignment with clean gradient", xlim=(0, 1))
    aligned.legend(loc="lower left")
    mean, half = mean_and_interval(result.error[-1, : len(names)], axis=-1)
    error.barh(y, mean, xerr=half, color=SKY, height=0.7, error_kw={"elinewidth": 0.8})
    error.axvline(1, color=GREY, linewidth=0.8, linestyle=":")  # the error of a zero gradient
    error.set(xlabel="error / norm of clean gradient", xlim=(0, None))
    aligned.set_yticks(y, names)
    error.set_yticks(y, [])
    largest = max(result.config.batch_sizes)
    for axis, mark in ((aligned, "c"), (error, "d")):
        axis.set_ylim(len(names) - 0.4, -0.6)
        letter(axis, f"{mark}  batch {largest}, noise {result.config.noise_multiplier:g}")


@styled
def plot_momentum(result: momentum.Result) -> Figure:
    """Plot the alignment of each running mean over steps, noisy and restored."""
    figure, axes = new_figure(1, 2, width=FULL, height=2.6, width_ratios=(2, 1))
    main, side = axes[0]
    steps = np.arange(1, result.config.steps + 1)
    handles = [
        Line2D([], [], color=BLACK, label="restored"),
        Line2D([], [], color=BLACK, linestyle="--", label="noisy"),
    ]
    for j, (beta, colour) in enumerate(
        zip(result.config.betas, (GREY, SKY, BLUE, RED, ORANGE), strict=False)
    ):
        for values, line in ((result.restored, "-"), (result.noisy, "--")):
            curve = values[:, :, j]
            edges = curve.min(0), curve.max(0)
            band(main, steps, curve.mean(0), *edges, alpha=0.15, color=colour, linestyle=line)
        name = "single step" if beta == 0 else f"running mean, β = {beta:g}"
        handles.append(Line2D([], [], color=colour, label=name))
    main.set(xlabel="step", ylabel="alignment with clean", ylim=(0, None))
    letter(
        main,
        f"a  batch {result.config.batch_size}, noise multiplier {result.config.noise_multiplier:g}",
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
    side.plot(steps[1:], result.consecutive.T, color=GREEN)
    side.set(
        xlabel="step",
        ylabel="cosine with the step before",
        ylim=(min(0, result.consecutive.min()), 1),
    )
    letter(side, "b  consecutive clean gradients")
    return figure


@styled
def plot_tasks(result: tasks.Result) -> Figure:
    """Plot layers above the edge, alignment and effective rank, one row per case."""
    figure, axes = new_figure(1, 3, width=FULL, height=0.6 + 0.24 * len(result.loss), sharey=True)
    above, cosine, rank = axes[0]
    rows = np.arange(len(result.loss))[::-1]
    above.barh(rows, result.above.mean(axis=1) / result.num_layers, color=SKY, height=0.6)
    above.set(xlim=(0, 1), xlabel="layers above the edge")
    above.set_yticks(rows, [result.label(i) for i in range(len(rows))])
    for values, name in ((result.noisy, "noisy"), (result.restored, "optimal")):
        colour, marker, _ = SCHEME_STYLE[name]
        mean, half = result.band(values)
        cosine.errorbar(
            mean, rows, xerr=half, color=colour, marker=marker, linestyle="none", label=name
        )
    cosine.set(xlim=(0, None), xlabel="cosine with the clean gradient")
    for column, colour, marker, name in (
        (0, BLACK, "o", "clean (non-private)"),
        (1, GREY, "x", "noisy"),
    ):
        rank.plot(result.effective_rank[:, column], rows, marker, color=colour, label=name)
    rank.set(xlim=(0, 1), xlabel="effective rank / largest")
    for axis, mark in zip(axes[0], "abc", strict=True):
        letter(axis, mark)
        if axis is not above:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure
