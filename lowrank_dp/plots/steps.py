"""Figure of steps to a target: curves, steps saved against both baselines, and the grids."""

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
    FULL,
    GREY,
    MARKERS,
    band,
    letter,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import steps

SHOWN = 4  # arms beside plain training whose curves and grids are drawn: those that save most
# plain training has fixed colours; every other arm takes the next of COLOURS and MARKERS
_PLAIN_STYLE = {
    "DP-Adam": (BLACK, "-"),
    "DP-SGD": (GREY, "-"),
    "noise-free Adam (NON-PRIVATE)": (BLACK, ":"),
    "noise-free SGD (NON-PRIVATE)": (GREY, ":"),
}
# baseline -> shift of its row, colour and marker of the steps saved against it
_BASELINES = {"DP-Adam": (-0.15, BLACK, "o"), "DP-SGD": (0.15, BLUE, "s")}
_OTHERS = [colour for colour in COLOURS if colour not in (BLACK, GREY)]


@styled
def plot_steps(result: steps.Result) -> Figure:
    """Plot the score over steps, the steps saved by each arm, and the tuning grids.

    Curves and grids are those of plain training and of the ``SHOWN`` arms that save the most steps
    against the faster baseline; steps saved are those of every arm.
    """
    height = max(3.4, 1.4 + 0.16 * len(result.arms))
    figure, axes = new_figure(1, 3, width=FULL, height=height, width_ratios=(1.2, 1, 1.1))
    shown = _shown(result)
    for arm in shown:
        mean, half = result.band(arm)
        band(
            axes[0, 0],
            np.arange(result.budget + 1),
            mean,
            mean - half,
            mean + half,
            alpha=0.1,
            label=arm,
            **_line(shown, arm),
        )
    axes[0, 0].axhline(result.target(), color=BLACK, linewidth=0.8, linestyle="--")
    axes[0, 0].set(xlabel="step", ylabel=f"validation {result.config.score}")
    # the limits are those of the means: an interval of a curve's steep part can be far wider
    curves = [result.band(arm)[0] for arm in shown]
    low, high = float(np.nanmin(curves)), float(np.nanmax(curves))
    room = 0.05 * (high - low) or 0.1
    axes[0, 0].set_ylim(low - room, high + room)
    letter(axes[0, 0], "a  each at its own rate")
    _plot_saved(result, axes[0, 1])
    _plot_grids(result, shown, axes[0, 2])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _shown(result: steps.Result) -> list[str]:
    """Return plain training and the arms with the most steps saved, in the order of the result."""
    tuned = _tuned_arms(result)

    def saved(arm: str) -> float:
        mean = min(result.saved(arm, baseline)[0] for baseline in _BASELINES)
        return -np.inf if np.isnan(mean) else mean

    best = sorted((arm for arm in tuned if arm not in _PLAIN_STYLE), key=saved, reverse=True)
    return [arm for arm in result.arms if arm in (*_PLAIN_STYLE, *best[:SHOWN])]


def _tuned_arms(result: steps.Result) -> list[str]:
    return [found.arm for found in result.tuned if found.chosen is not None]


def _line(arms: Sequence[str], arm: str) -> dict[str, Any]:
    """Return the colour, line and marker of an arm."""
    if arm in _PLAIN_STYLE:
        colour, line = _PLAIN_STYLE[arm]
        return {"color": colour, "linestyle": line, "marker": ""}
    place = [name for name in arms if name not in _PLAIN_STYLE].index(arm)
    return {
        "color": _OTHERS[place % len(_OTHERS)],
        "linestyle": "-" if place < len(_OTHERS) else "--",
        "marker": MARKERS[place % len(MARKERS)],
    }


def _plot_saved(result: steps.Result, axis: Axes) -> None:
    """Plot the steps saved against each baseline, with paired 95% intervals."""
    arms = [arm for arm in _tuned_arms(result) if arm not in _BASELINES]
    for baseline, (shift, colour, marker) in _BASELINES.items():
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
    axis.set_yticks(range(len(arms)), [arm.replace(" (", "\n(") for arm in arms], fontsize=6)
    axis.invert_yaxis()
    axis.set(xlabel="steps to 90% fewer than\n● DP-Adam, ■ DP-SGD (paired)")
    letter(axis, "b  steps saved")


def _plot_grids(result: steps.Result, shown: Sequence[str], axis: Axes) -> None:
    """Plot the tuning criterion against the learning rate; a ring marks the chosen rate."""
    for found in (found for found in result.tuned if found.arm in shown):
        line = _line(shown, found.arm)
        axis.plot(found.rates, found.means, **line, markersize=3, linewidth=0.8)
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
