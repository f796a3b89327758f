"""Figure of noisy projections beside plain DP at one epsilon: attacks, utility, a trained layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    RED,
    letter,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import noisy_projection

_STYLE = ((BLACK, "o"), (RED, "s"), (BLUE, "^"), (GREEN, "D"))  # by mechanism


@styled
def plot_noisy_projection(result: noisy_projection.Result) -> Figure:
    """Plot AUC with A known and secret, the cosine, and the trained layer's AUC against loss."""
    figure, axes = new_figure(2, 2, height=5.2)
    last = len(result.config.epsilons) - 1
    epsilon = f"ε = {result.config.epsilons[last]:g}"
    for column, title in ((0, "a  A known"), (1, "b  A secret")):
        _plot_auc(result, axes[0, column], last, column)
        letter(axes[0, column], f"{title}, {epsilon} (NON-PRIVATE)")
    _bars(result, axes[1, 0], [result.cosine[i, :, last, 1] for i in range(len(_STYLE))])
    axes[1, 0].set(ylabel="cosine with the clean sum")
    letter(axes[1, 0], f"c  all layers, {epsilon}, B = {result.config.utility_batch}")
    _plot_trained(result, axes[1, 1])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _plot_auc(result: noisy_projection.Result, axis: Axes, j: int, attack: int) -> None:
    """Plot one attack's AUC by rank and mechanism, with intervals, at the j-th epsilon."""
    places = np.arange(len(result.config.ranks))
    for i, name in enumerate(result.mechanisms):
        middle, low, high = result.auc[i, :, j, attack].T
        axis.errorbar(
            places + 0.16 * (i - 1.5),
            middle,
            [middle - low, high - middle],
            color=_STYLE[i][0],
            marker=_STYLE[i][1],
            linestyle="",
            elinewidth=0.8,
            label=name,
        )
    axis.axhline(result.ceiling[j], color=GREY, linestyle="--", label="largest AUC of plain DP")
    axis.axhline(0.5, color=GREY, linewidth=0.6)
    axis.set_xticks(places, [f"rank {rank}" for rank in result.config.ranks])
    axis.set(ylabel="AUC", ylim=(0.35, 1.0))


def _bars(result: noisy_projection.Result, axis: Axes, values: list[np.ndarray]) -> None:
    """Draw one bar per mechanism at each rank."""
    places = np.arange(len(result.config.ranks))
    for i, heights in enumerate(values):
        axis.bar(places + 0.2 * (i - 1.5), heights, 0.18, color=_STYLE[i][0])
    axis.set_xticks(places, [f"rank {rank}" for rank in result.config.ranks])


def _plot_trained(result: noisy_projection.Result, axis: Axes) -> None:
    """Plot each trained arm's AUC against its smallest held-out loss."""
    trained = result.config.trained
    for i, arm in enumerate(result.arms):
        for k, rank in enumerate(trained.ranks):
            if i == 0 and k:
                continue
            middle, low, high = result.trained_auc[i, k]
            axis.errorbar(
                result.loss[i, k].min(),
                middle,
                [[middle - low], [high - middle]],
                color=(BLACK, RED, BLUE, ORANGE)[i] if i < len(_STYLE) else COLOURS[i],
                marker=MARKERS[k],
                elinewidth=0.8,
                label=arm if i == 0 else f"{arm}, rank {rank}",
            )
    axis.axvline(result.start_loss, color=GREY, linestyle=":", label="before training")
    axis.axhline(0.5, color=GREY, linewidth=0.6)
    axis.set(xlabel="held-out loss (nats)", ylabel="AUC", ylim=(0.35, 1.25))
    axis.legend(fontsize=5.5, ncols=2, loc="upper center")
    letter(axis, f"d  {trained.num_steps} steps, A known, ε = {trained.epsilon:g} (NON-PRIVATE)")
