"""Figure of steps to a target: curves, steps saved against both baselines, and the grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank_dp.experiments.arms import PLAIN
from lowrank_dp.plots.arms import look
from lowrank_dp.plots.style import (
    BLACK,
    FULL,
    band,
    labelled,
    legend_below,
    letter,
    new_figure,
    show_all,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import steps

SHOWN = 4  # number of arms, beside plain training, whose curves and grids are drawn
# baseline -> vertical shift of the points of the steps saved against this baseline
_BASELINES = {"DP-Adam": -0.15, "DP-SGD": 0.15}


def _over_seeds(result: steps.Result) -> str:
    return f"Bands and bars: 95% t-interval, {result.config.num_seeds} seeds."


@labelled(_over_seeds)
def plot_steps(result: steps.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot the score over steps, the steps saved by each arm, and the tuning grids.

    Curves and grids are drawn for plain training and for the ``SHOWN`` arms that save the most
    steps against the faster baseline. Steps saved are drawn for every arm. ``axes`` are three
    existing matplotlib axes to draw in; None makes a new figure.
    """
    height = max(3.8, 1.6 + 0.21 * len(result.arms))
    ratios = (1.2, 1, 1.1)
    figure, grid = new_figure(1, 3, axes=axes, width=FULL, height=height, width_ratios=ratios)
    shown = _shown(result)
    limits: list[np.ndarray] = []
    for arm in shown:
        mean, half = result.band(arm)
        limits += [mean - half, mean + half]
        band(
            grid[0, 0],
            np.arange(result.budget + 1),
            mean,
            mean - half,
            mean + half,
            alpha=0.07,
            **look(arm).curve(markersize=3, markevery=3, label=arm),
        )
    grid[0, 0].axhline(
        result.target(),
        color=BLACK,
        linewidth=0.8,
        linestyle="--",
        label="target: 90% of the weaker baseline's gain",
    )
    grid[0, 0].set(xlabel="step", ylabel=f"{result.config.score}, evaluation examples")
    show_all(grid[0, 0], *limits)
    letter(grid[0, 0], f"a  {result.config.score}, tuned rates")
    _plot_saved(result, grid[0, 1])
    _plot_grids(result, shown, grid[0, 2])
    legend_below(figure, grid, axes is None, ncols=3)
    return figure


def _shown(result: steps.Result) -> list[str]:
    """Return plain training and the arms that save the most steps, in the order of the result."""
    tuned = _tuned_arms(result)

    def saved(arm: str) -> float:
        mean = min(result.saved(arm, baseline)[0] for baseline in _BASELINES)
        return -np.inf if np.isnan(mean) else mean

    best = sorted((arm for arm in tuned if arm not in PLAIN), key=saved, reverse=True)
    return [arm for arm in result.arms if arm in (*PLAIN, *best[:SHOWN])]


def _tuned_arms(result: steps.Result) -> list[str]:
    return [found.arm for found in result.tuned if found.chosen is not None]


def _plot_saved(result: steps.Result, axis: Axes) -> None:
    """Plot the steps saved against each baseline, with paired 95% intervals."""
    arms = [arm for arm in _tuned_arms(result) if arm not in _BASELINES]
    for baseline, shift in _BASELINES.items():
        colour, marker = look(baseline).colour, look(baseline).marker
        for i, arm in enumerate(arms):
            mean, half = result.saved(arm, baseline)
            axis.errorbar(
                mean,
                i + shift,
                xerr=half,
                fmt=marker,
                color=colour,
                markersize=3,
                markerfacecolor="none" if result.bound(arm, baseline) else colour,
                linewidth=0.8,
            )
    axis.axvline(0, color=BLACK, linewidth=0.8)
    axis.set_yticks(range(len(arms)), arms, fontsize=6)
    axis.invert_yaxis()
    axis.set(xlabel="steps to 90% fewer than\n● DP-Adam, ■ DP-SGD (paired)")
    letter(axis, "b  steps saved")


def _plot_grids(result: steps.Result, shown: Sequence[str], axis: Axes) -> None:
    """Plot the tuning criterion against the learning rate; rings mark the selected rates."""
    for found in (found for found in result.tuned if found.arm in shown):
        line = look(found.arm).curve(markersize=3, linewidth=0.8)
        axis.plot(found.rates, found.means, **line)
        if found.chosen is not None:
            axis.plot(
                found.chosen,
                found.means[found.rates.index(found.chosen)],
                "o",
                markersize=7,
                markerfacecolor="none",
                markeredgecolor=line["color"],
            )
    axis.set(
        xscale="log",
        xlabel="learning rate",
        ylabel=f"mean {result.config.score}, held-out training examples",
    )
    letter(axis, "c  grids (tuning seeds)")
