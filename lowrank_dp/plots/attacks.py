"""Figures of membership inference: ROC curves of one report, and methods over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from lowrank_dp.plots import (
    BLACK,
    BLUE,
    COLUMN,
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

if TYPE_CHECKING:
    from lowrank_dp.experiments import membership
    from lowrank_dp.mia.report import Report

ATTACK_COLOUR = {
    "loss": GREY,
    "base": RED,
    "zlib": YELLOW,
    "min-k": SKY,
    "min-k++": BLUE,
    "ez": GREEN,
    "quantile": PINK,
    "gradient": ORANGE,
    "projection": GREEN,
    "lira": BLACK,
    "lira-offline": PINK,
    "rmia": BLUE,
    "rmia-offline": SKY,
}
# kind of method -> colour, marker
METHOD_STYLE = {
    "full": (BLACK, "s"),
    "LoRA": (BLUE, "o"),
    "frozen A": (ORANGE, "^"),
    "full, DP": (GREY, "D"),
    "full, DP restored": (RED, "*"),
}


@styled
def plot_roc(report: Report) -> Figure:
    """ROC curves on log-log axes; a dashed line is chance."""
    from lowrank_dp.mia.metrics import roc_points

    figure, axes = new_figure(1, 1, width=COLUMN, height=3.2)
    axis = axes[0, 0]
    for attack in report.attacks:
        roc = roc_points(report.scores[attack.name], report.is_member)
        star = "*" if attack.name == report.primary else ""
        shadowed = attack.name in ("rmia", "rmia-offline", "lira", "lira-offline")
        axis.plot(
            roc.fpr,
            roc.tpr,
            "--" if shadowed else "-",
            color=ATTACK_COLOUR[attack.name],
            label=f"{attack.name}{star} {attack.auc.value:.3f}",
        )
    least = 1 / max(1, int((~report.is_member).sum()))
    line = np.array([least, 1.0])
    axis.plot(line, line, ":", color=GREY, linewidth=0.8)
    axis.set(
        xscale="log",
        yscale="log",
        xlim=(least, 1),
        ylim=(least, 1.05),
        xlabel="false-positive rate",
        ylabel="true-positive rate",
    )
    axis.legend(loc="lower right", title="AUC (* primary)", title_fontsize=7)
    return figure


@styled
def plot_membership(result: membership.Result) -> Figure:
    """AUC and TPR against rank; AUC against training loss and against utility."""
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
    if np.isnan(result.tpr).all():  # such a rate needs 100 non-members
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
    """``values`` (arms, seeds, steps) at the last number of steps."""
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
