"""Figure of noisy projections and plain DP at one epsilon: attacks, utility, a trained layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lowrank_dp.experiments.noisy_release import PLAIN
from lowrank_dp.experiments.noisy_trained import FULL
from lowrank_dp.plots.arms import Look, look
from lowrank_dp.plots.style import (
    BLACK,
    GREY,
    labelled,
    legend_below,
    letter,
    new_figure,
    shade,
    show_all,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import noisy_projection

_PLAIN_DP = "plain DP"  # label of the mechanism PLAIN and of the trained arm FULL


def _over_trials(result: noisy_projection.Result) -> str:
    released, trained = result.config.num_trials, result.config.trained.num_trials
    trials = f"{released} trials" + ("" if released == trained else f" (d: {trained})")
    return (
        f"a, b, d: bars are 95% intervals, {trials} with the record and as many without; c: one "
        f"draw; d: loss, mean of {result.config.trained.num_draws} draws."
    )


@labelled(_over_trials)
def plot_noisy_projection(
    result: noisy_projection.Result, *, axes: Sequence[Axes] | None = None
) -> Figure:
    """Plot AUC with A known and secret, the cosine, and the trained layer's AUC against loss.

    ``axes`` are four existing matplotlib axes to draw in; None makes a new figure.
    """
    figure, grid = new_figure(2, 2, axes=axes, height=5.4)
    last = len(result.config.epsilons) - 1
    epsilon = f"ε = {result.config.epsilons[last]:g}"
    for attack, title in ((0, "a  A known"), (1, "b  A secret")):
        _plot_auc(result, grid[0, attack], last, attack)
        letter(grid[0, attack], f"{title}: AUC after one release, {epsilon}")
    _plot_cosine(result, grid[1, 0], last)
    letter(grid[1, 0], f"c  all layers, {result.config.utility_batch} records, {epsilon}")
    _plot_trained(result, grid[1, 1])
    trained = result.config.trained
    letter(grid[1, 1], f"d  A known: {trained.num_steps} steps, ε = {trained.epsilon:g}")
    entries = [(_look(name).points(), _label(name)) for name in result.mechanisms]
    entries += [(_look(arm).points(), _label(arm)) for arm in result.arms]
    handles = {label: Line2D([], [], **points) for points, label in entries}
    handles["largest AUC of plain DP"] = Line2D([], [], color=GREY, linestyle="--")
    shared = list(handles.values()), list(handles)
    legend_below(figure, grid, axes is None, shared, ncols=3)
    return figure


def _look(name: str) -> Look:
    return look("noisy" if name in (PLAIN, FULL) else name)


def _label(name: str) -> str:
    return _PLAIN_DP if name in (PLAIN, FULL) else name


def _places(result: noisy_projection.Result, axis: Axes, i: int) -> np.ndarray:
    """Label the x-axis ("no A", then ranks); return the x-coordinates of the i-th mechanism."""
    ranks = result.config.ranks
    axis.set_xticks(range(len(ranks) + 1), ["no A", *(f"rank {rank}" for rank in ranks)])
    if result.mechanisms[i] == PLAIN:
        return np.zeros(1)
    projected = [name for name in result.mechanisms if name != PLAIN]
    shift = projected.index(result.mechanisms[i]) - (len(projected) - 1) / 2
    return np.arange(1, len(ranks) + 1) + 0.2 * shift


def _plot_auc(result: noisy_projection.Result, axis: Axes, j: int, attack: int) -> None:
    """Plot one attack's AUC by rank and mechanism, with intervals, at the j-th epsilon."""
    for i, name in enumerate(result.mechanisms):
        places = _places(result, axis, i)
        middle, low, high = result.auc[i, : len(places), j, attack].T
        bars = [middle - low, high - middle]
        axis.errorbar(places, middle, bars, **_look(name).points(elinewidth=0.8))
    axis.axhline(result.ceiling[j], color=GREY, linestyle="--")
    axis.axhline(0.5, color=GREY, linewidth=0.6)
    axis.set_ylabel("AUC")
    show_all(axis, result.auc[:, :, j, :2], [0.5, result.ceiling[j]])  # one scale for a and b


def _plot_cosine(result: noisy_projection.Result, axis: Axes, j: int) -> None:
    """Plot the cosine with the clean sum, all layers as one vector, at the j-th epsilon."""
    for i, name in enumerate(result.mechanisms):
        places = _places(result, axis, i)
        axis.plot(places, result.cosine[i, : len(places), j, 1], **_look(name).points())
    axis.axhline(0, color=GREY, linewidth=0.6)
    axis.set_ylabel("cosine with the clean sum")


def _plot_trained(result: noisy_projection.Result, axis: Axes) -> None:
    """Plot each trained arm's AUC against its smallest held-out loss; the fill is the rank."""
    ranks = result.config.trained.ranks
    for i, k in np.ndindex(len(result.arms), len(ranks)):
        if result.arms[i] == FULL and k:  # the arm FULL has no rank
            continue
        middle, low, high = result.trained_auc[i, k]
        style = _look(result.arms[i]).points(markersize=6, markeredgewidth=1.3, elinewidth=0.8)
        if result.arms[i] != FULL:
            style["markerfacecolor"] = shade("rank", ranks[k])
        bars = [[middle - low], [high - middle]]
        axis.errorbar([result.loss[i, k].min()], [middle], bars, **style)
    axis.axvline(result.start_loss, color=BLACK, linestyle=":")
    axis.axhline(0.5, color=GREY, linewidth=0.6)
    axis.set(xlabel="held-out loss (nats)", ylabel="AUC")
    show_all(axis, result.trained_auc, [0.5])
    faces = [
        Line2D([], [], marker="s", linestyle="none", color=shade("rank", rank)) for rank in ranks
    ]
    start = Line2D([], [], color=BLACK, linestyle=":")
    names = [*(f"rank {rank}" for rank in ranks), "before training"]
    axis.legend([*faces, start], names, fontsize=6)
