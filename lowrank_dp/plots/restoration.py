"""Figures of restored gradients: alignment, ablation, running means, and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lowrank_dp.experiments.intervals import mean_and_interval
from lowrank_dp.plots.arms import look
from lowrank_dp.plots.style import (
    BLACK,
    BLUE,
    FULL,
    GREY,
    RED,
    band,
    labelled,
    legend_below,
    letter,
    new_figure,
    shade,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import ablation, alignment, momentum, tasks


def _over_draws(result: Any) -> str:
    return f"Bars: 95% t-interval, {result.alignment.shape[2]} noise draws."


@labelled(_over_draws)
def plot_alignment(result: alignment.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot alignment against batch size and against noise, and error at the largest batch.

    ``axes`` are three existing matplotlib axes to draw in; None makes a new figure.
    """
    figure, grid = new_figure(1, 3, axes=axes, width=FULL, height=3.0)
    by_size = result.noise_multiplier == result.noise_multiplier[0]
    by_noise = result.batch_size == result.batch_size.max()
    _plot_schemes(result, grid[0, 0], by_size, result.batch_size)
    grid[0, 0].set(xlabel="batch size", ylim=(0, None))
    _plot_schemes(result, grid[0, 1], by_noise, result.noise_multiplier)
    grid[0, 1].set(xlabel="noise multiplier", ylim=(0, None))
    sigma, size = result.noise_multiplier[0], result.batch_size.max()
    grid[0, 0].set_xscale("log", base=2)
    grid[0, 0].set_xticks(np.unique(result.batch_size), np.unique(result.batch_size))
    grid[0, 0].minorticks_off()
    letter(grid[0, 0], f"a  alignment, noise {sigma:g}")
    letter(grid[0, 1], f"b  alignment, batch {size}")
    setting = np.flatnonzero(by_size & by_noise)[0]
    mean, half = mean_and_interval(result.error[setting], axis=-1)
    y = np.arange(len(result.schemes))
    grid[0, 2].barh(
        y,
        mean,
        xerr=half,
        color=[look(scheme).colour for scheme in result.schemes],
        height=0.7,
        error_kw={"elinewidth": 0.8},
    )
    grid[0, 2].set_yticks(y, result.schemes)
    grid[0, 2].invert_yaxis()
    grid[0, 2].set(xlabel="error / norm of clean gradient", xlim=(0, None))
    grid[0, 2].axvline(1, color=GREY, linewidth=0.8, linestyle=":")  # the error of a zero gradient
    letter(grid[0, 2], f"c  error, batch {size}")
    legend_below(figure, grid, axes is None, ncols=6)
    return figure


def _plot_schemes(result: alignment.Result, axis: Axes, chosen: np.ndarray, x: np.ndarray) -> None:
    """Plot the alignment of every scheme against ``x`` at the ``chosen`` settings."""
    order = np.flatnonzero(chosen)[np.argsort(x[chosen])]
    for j, scheme in enumerate(result.schemes):
        mean, half = mean_and_interval(result.alignment[order, j].mean(-1), axis=-1)
        style = look(scheme).curve(label=scheme, elinewidth=0.8, markersize=4)
        axis.errorbar(x[order], mean, yerr=half, **style)
    axis.set_ylabel("alignment with clean gradient")


@labelled(_over_draws)
def plot_ablation(result: ablation.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot alignment and error against kappa, and of every threshold at the largest batch.

    ``axes`` are four existing matplotlib axes to draw in; None makes a new figure.
    """
    figure, grid = new_figure(2, 2, axes=axes, width=FULL, height=4.9, height_ratios=(4, 5))
    _plot_kappas(result, *grid[0])
    _plot_thresholds(result, *grid[1])
    return figure


def _plot_kappas(result: ablation.Result, aligned: Axes, error: Axes) -> None:
    """Plot ``denoise`` against kappa, with norm correction and without."""
    sizes, kappas = sorted(result.config.batch_sizes), np.array(result.config.kappas)
    noisy, colours = result.variants.index("noisy"), [shade("batch", size) for size in sizes]
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
    aligned.set(ylabel="alignment, mean over layers", ylim=(0, 1.5 * aligned.get_ylim()[1]))
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
    aligned.legend(handles=handles, ncols=2, fontsize=6, loc="upper right")
    error.legend(handles=handles, ncols=2, fontsize=6, loc="center right")
    letter(aligned, "a  alignment by kappa of denoise")
    letter(error, "b  error by kappa of denoise")


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
    error.barh(y, mean, xerr=half, color=RED, height=0.7, error_kw={"elinewidth": 0.8})
    error.axvline(1, color=GREY, linewidth=0.8, linestyle=":")  # the error of a zero gradient
    error.set(xlabel="error / norm of clean gradient", xlim=(0, None))
    largest = max(result.config.batch_sizes)
    for axis, title in ((aligned, "c  alignment"), (error, "d  error")):
        axis.set_yticks(y, names)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.tick_params(labelleft=axis is aligned)  # both panels share the row labels
        letter(axis, f"{title}, batch {largest}, noise {result.config.noise_multiplier:g}")


def _over_seeds(result: momentum.Result) -> str:
    return f"Lines: mean of {result.config.seeds} seeds; bands: their range."


@labelled(_over_seeds)
def plot_momentum(result: momentum.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot the alignment of each running mean over steps, noisy and restored.

    ``axes`` are two existing matplotlib axes to draw in; None makes a new figure.
    """
    figure, grid = new_figure(1, 2, axes=axes, width=FULL, height=2.8, width_ratios=(2, 1))
    main, side = grid[0]
    steps = np.arange(1, result.config.steps + 1)
    handles = [
        Line2D([], [], color=BLACK, label="restored"),
        Line2D([], [], color=BLACK, linestyle="--", label="noisy"),
    ]
    reds = mpl.colormaps["Reds"](np.linspace(0.35, 0.95, len(result.config.betas)))
    for j, (beta, colour) in enumerate(zip(result.config.betas, reds, strict=True)):
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
    legend_below(
        figure, grid, axes is None, (handles, [str(h.get_label()) for h in handles]), ncols=3
    )
    side.plot(steps[1:], result.consecutive.T, color=BLACK, linewidth=0.8)
    side.set(
        xlabel="step",
        ylabel="cosine with the step before",
        ylim=(min(0, result.consecutive.min()), 1),
    )
    letter(side, "b  consecutive clean gradients")
    return figure


def _over_task_draws(result: tasks.Result) -> str:
    return f"b: 95% t-interval, {result.noisy.shape[1]} noise draws."


@labelled(_over_task_draws)
def plot_tasks(result: tasks.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot layers above the edge, alignment and effective rank, one row per case.

    ``axes`` are three existing matplotlib axes to draw in; None makes a new figure.
    """
    height = 0.9 + 0.24 * len(result.loss)
    figure, grid = new_figure(1, 3, axes=axes, width=FULL, height=height, sharey=True)
    above, cosine, rank = grid[0]
    rows = np.arange(len(result.loss))[::-1]
    above.barh(rows, result.above.mean(axis=1) / result.num_layers, color=BLUE, height=0.6)
    above.set(xlim=(0, 1), xlabel="share of layers above the edge")
    above.set_yticks(rows, [result.label(i) for i in range(len(rows))])
    for values, name in ((result.noisy, "noisy"), (result.restored, "optimal")):
        mean, half = result.band(values)
        cosine.errorbar(mean, rows, xerr=half, **look(name).points(label=name))
    cosine.set(xlim=(0, None), xlabel="cosine with the clean gradient")
    for column, colour, marker, name in (
        (0, BLACK, "o", "clean"),
        (1, GREY, "x", "noisy"),
    ):
        rank.plot(result.effective_rank[:, column], rows, marker, color=colour, label=name)
    rank.set(xlim=(0, 1), xlabel="effective rank / largest")
    titles = ("a  above the edge", "b  alignment", "c  median effective rank")
    for axis, title in zip(grid[0], titles, strict=True):
        letter(axis, title)
        if axis is not above:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure
