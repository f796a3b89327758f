"""Figures of LoRA's implicit noise: its law, its distance to a Gaussian, privacy, dynamics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lowrank_dp.experiments import matrix_attack
from lowrank_dp.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    letter,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import dynamics, lora_noise, projection_privacy, total_variation

_COLOURS = (RED, ORANGE, GREEN, BLUE, PINK, SKY, BLACK, GREY)
_MARKERS = "osD^vPX*"
# arm of the dynamics -> label, colour, marker, line: the same in every panel
_ARM_STYLE = {
    "lora": ("LoRA, A and B trained", RED, "o", "-"),
    "lora-frozen-a": ("LoRA, A frozen", ORANGE, "s", "--"),
    "fresh-a": ("full, projected by a fresh A", GREEN, "D", "-"),
    "gaussian": ("full + matched Gaussian noise", BLUE, "^", "--"),
}


@styled
def plot_lora_noise(result: lora_noise.Result) -> Figure:
    """Variance against rank, exact density against the Gaussian, kurtosis against rank."""
    figure, axes = new_figure(1, 3, height=3.1)
    ranks = np.array(result.config.ranks)
    variance, density, kurtosis = axes[0]
    for i, label in enumerate(result.sources):
        style = {
            "color": _COLOURS[i % 7],
            "marker": _MARKERS[i % 8],
            "linestyle": "none",
            "markersize": 3.5,
            "elinewidth": 0.8,
        }
        variance.errorbar(ranks, result.variance[i], result.variance_ci[i], label=label, **style)
        kurtosis.errorbar(ranks, result.kurtosis[i], result.kurtosis_ci[i], **style)
        kurtosis.plot(ranks, result.kurtosis_exact[i], color=_COLOURS[i % 7], linewidth=0.8)
    variance.plot(
        ranks, result.variance_exact[0], color=BLACK, linewidth=0.8, label="formula, ≈ 1/r"
    )
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
    _log_ranks(variance, ranks)
    variance.set(yscale="log", ylabel="variance of $u_j$  (units of $|q|^2$)")
    letter(variance, "a  measured ●, formula —")

    x = result.density_x
    for i, rank in enumerate(result.config.density_ranks):
        density.plot(x, result.density[i], color=_COLOURS[i], label=f"r = {rank}")
    density.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), "--", color=BLACK, label="Gaussian")
    density.set(
        yscale="log",
        ylim=(1e-5, 3),
        xlim=(-6, 6),
        xlabel="$u_j$  (standard deviations)",
        ylabel="density",
    )
    density.legend(loc="lower center", handlelength=1.4)
    letter(density, "b  exact")

    kurtosis.axhline(3, color=BLACK, linestyle="--", linewidth=0.8)
    kurtosis.text(ranks[0], 2.93, "Gaussian: 3", va="top", fontsize=7)
    _log_ranks(kurtosis, ranks)
    kurtosis.set(yscale="log", ylabel="kurtosis of $u_j$", ylim=(2.5, None))
    kurtosis.set_yticks([3, 4, 6, 9, 12], ["3", "4", "6", "9", "12"])
    kurtosis.minorticks_off()
    letter(kurtosis, "c  measured ●, exact —")
    figure.legend(
        *variance.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        handlelength=1.6,
        fontsize=6.5,
    )
    return figure


@styled
def plot_total_variation(result: total_variation.Result) -> Figure:
    """One coordinate against rank and against width; all coordinates together."""
    figure, axes = new_figure(1, 3, height=2.9)
    config = result.config
    by_rank, by_width, joint = axes[0]
    for values, label, colour, line in (
        (result.berry_esseen, "Berry–Esseen bound", GREY, "-"),
        (result.kolmogorov, "Kolmogorov, exact", GREY, ":"),
        (result.upper, "TV, upper bound", ORANGE, "--"),
        (result.exact, "TV, exact", BLUE, "-"),
        (result.lower, "TV, lower bound", GREEN, "-."),
    ):
        by_rank.plot(config.ranks, values, line, color=colour, label=label)
    _log_ranks(by_rank, np.array(config.ranks))
    by_rank.set(yscale="log", ylabel="distance to the Gaussian", ylim=(1e-5, 2))
    by_rank.legend(loc="lower left", handlelength=1.8, fontsize=6.5)
    letter(by_rank, f"a  one coordinate, n = {config.width}")

    for i, rank in enumerate(config.fixed_ranks):
        colour = _COLOURS[i]
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

    ratios = np.array(config.joint_ratios)
    joint.plot(ratios, result.joint_limit, color=BLACK, label="limit")
    for i, rank in enumerate(config.joint_ranks):
        joint.plot(
            ratios,
            result.joint[i],
            linestyle="none",
            marker=_MARKERS[i],
            color=_COLOURS[i],
            markersize=3.5,
            label=f"r = {rank}",
        )
    joint.plot(
        ratios,
        result.joint_paper[-1],
        ":",
        color=_COLOURS[len(config.joint_ranks) - 1],
        label="paper's Gaussian",
    )
    joint.set(
        xscale="log", xlabel="width / rank  (n/r)", ylabel="TV of all coordinates", ylim=(0, 1.02)
    )
    joint.legend(loc="lower right", handlelength=1.4, fontsize=6.5)
    letter(joint, "c  all coordinates, exact")
    return figure


@styled
def plot_projection_privacy(result: projection_privacy.Result) -> Figure:
    """Profile and its Gaussian reading; delta against rank; ROC; AUC under added noise."""
    figure, axes = new_figure(2, 2, height=5.0)
    config = result.config
    (profile, by_rank), (roc, noise) = axes
    for i, rank in enumerate(config.profile_ranks):
        profile.plot(config.epsilons, result.profile[i], color=_COLOURS[i], label=f"r = {rank}")
        profile.plot(config.epsilons, result.profile_gaussian[i], "--", color=_COLOURS[i])
    profile.set(
        yscale="log",
        ylim=(1e-10, 1),
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

    for i, n in enumerate(config.widths):
        by_rank.plot(
            config.rank_grid, result.by_rank[i], color=_COLOURS[i + 2], label=f"exact, n = {n}"
        )
        by_rank.plot(
            np.sqrt(n / 2), 1.15e-3, marker="^", color=_COLOURS[i + 2], markersize=5, clip_on=False
        )
    by_rank.plot(
        config.rank_grid, result.by_rank_gaussian, "--", color=BLACK, label="Gaussian reading"
    )
    by_rank.plot([], [], "^", color=GREY, label="rank $\\sqrt{n/2}$")
    _log_ranks(by_rank, np.array(config.rank_grid))
    by_rank.set(yscale="log", ylim=(1e-3, 1), ylabel="δ at ε = 1")
    by_rank.legend(loc="lower right", bbox_to_anchor=(1.02, 0.05), handlelength=1.4)
    letter(by_rank, "b  computed: not monotone in rank")

    for i, rows in enumerate(config.rows):
        name = "likelihood ratio" if rows == 1 else "symmetry score"
        roc.plot(
            result.fpr,
            result.tpr[i],
            color=_COLOURS[i],
            linewidth=2.2 - 0.6 * i,
            linestyle=("-", "-", "--")[i % 3],
            label=f"{rows} row{'s' * (rows > 1)}, {name}: {result.auc[i, 0, 0]:.3f}",
        )
    roc.plot(
        result.fpr,
        result.tpr_gaussian_reading,
        "--",
        color=BLACK,
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

    levels = np.array(config.noise_levels)
    position = np.arange(len(levels))
    for data, label, line, filled in (
        (result.auc, "synthetic", "-", True),
        (result.real_auc, "real layer", "--", False),
    ):
        for i, rows in enumerate(config.rows):
            value, low, high = data[i].T
            shift = 0.08 * (i - 1) + (0.0 if filled else 0.04)
            noise.errorbar(
                position + shift,
                value,
                [value - low, high - value],
                color=_COLOURS[i],
                linestyle=line,
                marker=_MARKERS[i],
                markerfacecolor=_COLOURS[i] if filled else "white",
                elinewidth=0.8,
                label=f"{label}, {rows} row{'s' * (rows > 1)}",
            )
    noise.axhline(0.5, color=GREY, linestyle=":")
    noise.set_xticks(position, [f"{level:g}" for level in levels])
    noise.set(
        ylim=(0.2, 1.03), xlabel="added noise  (std / rms entry of the release)", ylabel="AUC"
    )
    noise.legend(ncols=2, loc="lower left", handlelength=2.2)
    letter(noise, "d  measured: 95% intervals")
    return figure


@styled
def plot_dynamics(result: dynamics.Result) -> Figure:
    """Distance to full fine-tuning over steps, difference of losses, final distance by rank."""
    figure, axes = new_figure(2, 2, height=4.8)
    ranks, steps = result.config.ranks, np.arange(1, result.config.num_steps + 1)
    distance, difference = result.distance_band, result.loss_band  # mean, low, high
    for column, r in enumerate((0, len(ranks) - 1)):
        axis = axes[0, column]
        for a, arm in enumerate(result.arms):
            _, colour, _, line = _ARM_STYLE[arm]
            _band(axis, steps, [part[a, r] for part in distance], colour, line)
        axis.axhline(result.one_step_distance[r], color=BLACK, linestyle=":")
        axis.set(
            yscale="log",
            xlabel="step",
            xlim=(1, steps[-1]),
            ylabel="$|W - W_{full}|$ / $|W_{full} - W_0|$",
        )
        _plain_log(axis)
        letter(axis, f"{'ab'[column]}  weights, rank {ranks[r]}")
    for a, arm in enumerate(result.arms):
        label, colour, marker, line = _ARM_STYLE[arm]
        _band(axes[1, 0], steps, [part[a, 0] for part in difference], colour, line)
        middle, low, high = (part[a, :, -1] for part in distance)
        offset = 1.06 ** (a - 1.5)
        axes[1, 1].errorbar(
            np.array(ranks) * offset,
            middle,
            [middle - low, high - middle],
            color=colour,
            marker=marker,
            linestyle=line,
            elinewidth=0.8,
            label=label,
        )
    axes[1, 1].plot(ranks, result.one_step_distance, ":", color=BLACK, label="one step, expected")
    axes[1, 0].set(
        xlabel="step", ylabel="|loss − loss of full|  (nats)", xlim=(1, steps[-1]), ylim=(0, None)
    )
    letter(axes[1, 0], f"c  losses, rank {ranks[0]}")
    _log_ranks(axes[1, 1], np.array(ranks))
    axes[1, 1].set(yscale="log", ylabel=f"relative distance at step {steps[-1]}")
    _plain_log(axes[1, 1])
    letter(axes[1, 1], "d  weights at the end, against rank")
    figure.legend(loc="outside lower center", ncols=3, handlelength=2.2)
    return figure


def _band(axis: Axes, x: np.ndarray, band: list[np.ndarray], colour: str, line: str) -> None:
    """A curve and the interval around it: ``band`` is mean, low, high."""
    mean, low, high = band
    axis.plot(x, mean, line, color=colour)
    axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)


def _plain_log(axis: Axes) -> None:
    """Plain numbers on a logarithmic axis that spans a decade or two."""
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _log_ranks(axis: Axes, ranks: np.ndarray) -> None:
    """A base-2 axis of ranks with plain numbers, a few of them."""
    powers = 2 ** np.arange(int(np.log2(ranks.max())) + 1)
    powers = powers[(powers >= ranks.min()) & (np.log2(powers) % 2 == 0)]
    axis.set_xscale("log", base=2)
    axis.set_xticks(powers, [str(p) for p in powers])
    axis.minorticks_off()
    axis.set_xlabel("rank r")


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
