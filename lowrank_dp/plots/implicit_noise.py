"""Figure of LoRA's implicit noise: AUC against rank at equal steps and losses, and over a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from lowrank_dp.experiments.implicit_noise_configs import DROPOUT, FAMILIES
from lowrank_dp.plots.arms import look
from lowrank_dp.plots.style import FULL, GREY, labelled, legend_below, letter, new_figure, shade

if TYPE_CHECKING:
    from lowrank_dp.experiments import implicit_noise


def _over_seeds(result: implicit_noise.Result) -> str:
    count = result.config.num_seeds
    return f"a to c: bars and band are 95% t-intervals, {count} seeds; d: means."


@labelled(_over_seeds)
def plot_implicit_noise(
    result: implicit_noise.Result, *, axes: Sequence[Axes] | None = None
) -> Figure:
    """Plot the AUC against rank at equal steps and at equal losses, and against training loss.

    ``axes`` are four existing matplotlib axes to draw in; None makes a new figure.
    """
    figure, grid = new_figure(2, 2, axes=axes, width=FULL, height=5.0)
    for axis, (name, values), mark in zip(grid.flat, result.readings.items(), "abc", strict=False):
        _against_rank(axis, result, values)
        letter(axis, f"{mark}  AUC at {name}")
    _over_the_run(grid[1, 1], result)
    letter(grid[1, 1], "d  AUC over the run")
    known = ("full", *(family for family in FAMILIES if _ranks(result, family)))
    handles = [Line2D([], [], **look(arm).curve()) for arm in known]
    legend_below(figure, grid, axes is None, (handles, known), ncols=5)
    return figure


def _ranks(result: implicit_noise.Result, family: str) -> list[int]:
    """Return the ranks of a family's arms without dropout."""
    arms = [arm for arm in result.arms if not arm.endswith(DROPOUT)]
    return [int(arm.split("=")[1]) for arm in arms if arm.startswith(f"{family} r=")]


def _against_rank(axis: Axes, result: implicit_noise.Result, values: np.ndarray) -> None:
    """Plot ``values`` (arms, seeds) against rank, without arms that lack a value for a seed."""
    mean, half = result.band(values, "full")
    if np.isfinite(mean):
        axis.axhline(mean, linewidth=1, **look("full").curve(marker=""))
        axis.axhspan(mean - half, mean + half, color=look("full").colour, alpha=0.08)
    for family, shift in zip(FAMILIES, (0.88, 0.96, 1.04, 1.13), strict=True):
        ranks = np.array(_ranks(result, family))
        bands = np.array([result.band(values, f"{family} r={rank}") for rank in ranks])
        if len(ranks):
            style = look(family).curve(elinewidth=0.8, capsize=2, linewidth=0.8)
            axis.errorbar(ranks * shift, bands[:, 0], bands[:, 1], **style)
    axis.axhline(0.5, color=GREY, linestyle=":", linewidth=0.8)
    if np.isnan(values).any(axis=1).all():
        axis.text(0.5, 0.6, "reached by no arm", ha="center", transform=axis.transAxes)
    axis.set(xscale="log", xlabel="rank", ylabel="AUC")
    every = (*result.config.ranks, *result.config.lora_ranks)
    axis.set_xlim(0.75 * min(every), 1.35 * max(every))  # the same limits if an arm is left out
    axis.set_xticks(result.config.ranks, [str(rank) for rank in result.config.ranks])
    axis.xaxis.set_minor_formatter(NullFormatter())


def _over_the_run(axis: Axes, result: implicit_noise.Result) -> None:
    """Plot every arm's mean AUC against its mean training loss; the fill colour is the rank."""
    shown: set[int] = set()
    for i, arm in enumerate(result.arms):
        family, _, rank = arm.removesuffix(DROPOUT).partition(" r=")
        style = look(family).curve(markersize=4, linewidth=0.8, alpha=0.8)
        if rank:
            style["markerfacecolor"] = shade("rank", int(rank))
            shown.add(int(rank))
        if arm.endswith(DROPOUT):
            style["linestyle"] = ":"
        axis.plot(result.train_loss[i].mean(axis=0), result.auc[i].mean(axis=0), **style)
    axis.axhline(0.5, color=GREY, linestyle=":", linewidth=0.8)
    axis.set(xlabel="training loss (nats)", ylabel="AUC")
    faces = [
        Line2D([], [], marker="s", linestyle="none", color=shade("rank", rank))
        for rank in sorted(shown)
    ]
    names = [f"rank {rank}" for rank in sorted(shown)]
    if any(arm.endswith(DROPOUT) for arm in result.arms):
        faces.append(Line2D([], [], color=GREY, linestyle=":", linewidth=0.8))
        names.append("with dropout")
    axis.legend(faces, names, fontsize=6)
