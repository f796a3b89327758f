"""Figures of noisy and restored gradients: spectra, alignment, momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lowrank_dp.experiments.intervals import _interval
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
    letter,
    new_figure,
    styled,
)
from lowrank_dp.spectrum.random_matrix import marchenko_pastur_quantiles

if TYPE_CHECKING:
    from lowrank_dp.experiments import ablation, alignment, momentum, spectra, tasks

# scheme -> colour, marker, line: the same in every figure
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
def plot_spectra(result: spectra.Result) -> Figure:
    """Four layers' singular values, then all layers' top value and effective rank."""
    figure, axes = new_figure(2, 3, width=FULL, height=4.2)
    for panel, (axis, layer) in enumerate(zip(axes.flat, _spread(result, 4), strict=False)):
        edge, (m, n) = result.edges[layer], result.shapes[layer]
        for values, label, colour, style in (
            (result.noisy, "noisy", GREY, "-"),
            (result.restored, "restored", RED, "-"),
            (result.clean, "clean (non-private)", BLACK, "--"),
        ):
            row = values[layer][~np.isnan(values[layer])] / edge
            row = row[row > 1e-4]  # what is restored to zero has no place on a log axis
            # a dot where a handful of values is all there is
            axis.plot(
                np.arange(1, len(row) + 1),
                row,
                style,
                color=colour,
                label=label,
                marker="." if len(row) < 20 else None,
            )
        bulk = marchenko_pastur_quantiles(min(m, n), (m, n), result.noise_std) / edge
        axis.plot(np.arange(1, len(bulk) + 1), bulk, ":", color=BLUE, label="pure noise (MP law)")
        axis.axhline(1, color=GREEN, linewidth=0.8, label="bulk edge")
        axis.set(xscale="log", yscale="log", xlabel="index", ylim=(1e-2, None))
        axis.set_ylabel("singular value / edge")
        letter(axis, f"{'abcd'[panel]}  {_short(result.layers[layer])} {m}×{n}", size=7)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    order = np.arange(len(result.layers))
    for axis, clean, noisy, name in (
        (
            axes[1, 1],
            result.clean[:, 0] / result.edges,
            result.noisy[:, 0] / result.edges,
            "top value / edge",
        ),
        (axes[1, 2], result.effective_rank_clean, result.effective_rank_noisy, "effective rank"),
    ):
        axis.plot(order, noisy, "x", color=GREY, label="noisy")
        axis.plot(order, clean, "o", color=BLACK, label="clean", markersize=3)
        axis.set(xlabel="matrix, in the model's order", ylabel=name, yscale="log")
        axis.legend(loc="lower center", bbox_to_anchor=(0.7, 0.98), ncols=2, borderpad=0)
    axes[1, 1].axhline(1, color=GREEN, linewidth=0.8)
    letter(axes[1, 1], "e")
    letter(axes[1, 2], "f")
    return figure


def _spread(result: spectra.Result, count: int) -> list[int]:
    """Layers spread over the order of their clean top value against the edge, strongest first."""
    wide = np.flatnonzero(result.shapes.min(1) >= 64)
    wide = wide if len(wide) >= count else np.arange(len(result.layers))
    order = wide[np.argsort(-(result.clean[wide, 0] / result.edges[wide]))]
    return [int(i) for i in order[np.linspace(0, len(order) - 1, count).astype(int)]]


def _short(name: str) -> str:
    """The last telling words of a parameter's name."""
    words = [
        w
        for w in name.removesuffix(".weight").split(".")
        if w
        not in (
            "base_model",
            "model",
            "bert",
            "roberta",
            "encoder",
            "layer",
            "layers",
            "self",
            "dense",
            "transformer",
            "h",
        )
    ]
    return ".".join(words[-3:])


@styled
def plot_alignment(result: alignment.Result) -> Figure:
    """Alignment against batch size and against noise, and error at the largest batch."""
    figure, axes = new_figure(1, 3, width=FULL, height=2.9)
    by_size = result.noise_multiplier == result.noise_multiplier[0]
    by_noise = result.batch_size == result.batch_size.max()
    for axis, rows, x, name in (
        (axes[0, 0], by_size, result.batch_size, "batch size"),
        (axes[0, 1], by_noise, result.noise_multiplier, "noise multiplier"),
    ):
        order = np.flatnonzero(rows)[np.argsort(x[rows])]
        for j, scheme in enumerate(result.schemes):
            colour, marker, line = SCHEME_STYLE[scheme]
            mean, half = _interval(result.alignment[order, j].mean(-1))
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
        axis.set(xlabel=name, ylabel="alignment with clean gradient", ylim=(0, None))
    sigma, size = result.noise_multiplier[0], result.batch_size.max()
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_xticks(np.unique(result.batch_size), np.unique(result.batch_size))
    axes[0, 0].minorticks_off()
    letter(axes[0, 0], f"a  noise multiplier {sigma:g}")
    letter(axes[0, 1], f"b  batch size {size}")
    setting = np.flatnonzero(by_size & by_noise)[0]
    mean, half = _interval(result.error[setting])
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
    axes[0, 2].axvline(1, color=GREY, linewidth=0.8, linestyle=":")  # as bad as no gradient
    letter(axes[0, 2], f"c  batch {size}, noise {sigma:g}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


@styled
def plot_ablation(result: ablation.Result) -> Figure:
    """Alignment and error against kappa; then of every threshold, at the largest batch."""
    figure, axes = new_figure(2, 2, width=FULL, height=4.6, height_ratios=(4, 5))
    sizes, kappas = sorted(result.config.batch_sizes), np.array(result.config.kappas)
    noisy, colours = result.variants.index("noisy"), (SKY, BLUE, GREEN, PINK)[: len(sizes)]
    for axis, values in ((axes[0, 0], result.alignment), (axes[0, 1], result.error)):
        mean, half = _interval(result.by_kappa(values))
        for i, colour in enumerate(colours):
            for k, line in enumerate(("-", "--")):  # in (a) one: rescaling turns no layer
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
    axes[0, 0].set_ylabel("alignment, mean over layers")
    axes[0, 1].set_ylabel("error / norm of clean gradient")
    handles = [
        Line2D([], [], color=colour, marker="X", label=f"batch {size}")
        for size, colour in zip(sizes, colours, strict=False)
    ]
    handles += [
        Line2D([], [], color=BLACK, label="norm correction"),
        Line2D([], [], color=BLACK, linestyle="--", label="without"),
        Line2D([], [], color=BLACK, linestyle=":", label="noisy"),
    ]
    axes[0, 1].legend(handles=handles, ncols=2)
    letter(axes[0, 0], "a  kappa of denoise")
    letter(axes[0, 1], "b  and norm correction")

    names = result.variants[: -2 * len(kappas)]
    y = np.arange(len(names))
    for values, fill, label in (
        (result.alignment, RED, "mean over layers"),
        (result.overall, "white", "all layers as one"),
    ):
        mean, half = _interval(values[-1, : len(names)])
        axes[1, 0].errorbar(
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
    axes[1, 0].set(xlabel="alignment with clean gradient", xlim=(0, 1))
    axes[1, 0].legend(loc="lower left")
    mean, half = _interval(result.error[-1, : len(names)])
    axes[1, 1].barh(y, mean, xerr=half, color=SKY, height=0.7, error_kw={"elinewidth": 0.8})
    axes[1, 1].axvline(1, color=GREY, linewidth=0.8, linestyle=":")  # as bad as no gradient
    axes[1, 1].set(xlabel="error / norm of clean gradient", xlim=(0, None))
    axes[1, 0].set_yticks(y, names)
    axes[1, 1].set_yticks(y, [])
    for axis, mark in zip(axes[1], "cd", strict=True):
        axis.set_ylim(len(names) - 0.4, -0.6)
        letter(axis, f"{mark}  batch {sizes[-1]}, noise {result.config.noise_multiplier:g}")
    return figure


@styled
def plot_momentum(result: momentum.Result) -> Figure:
    """Alignment over steps for each running mean, noisy and restored."""
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
            main.plot(steps, curve.mean(0), line, color=colour)
            main.fill_between(
                steps, curve.min(0), curve.max(0), color=colour, alpha=0.15, linewidth=0
            )
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
    """A row for each model, task and moment: layers above the edge, alignment, effective rank."""
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
