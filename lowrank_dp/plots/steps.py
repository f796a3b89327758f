"""Figure of steps to a target: curves, steps saved against both baselines, and the grids."""

from __future__ import annotations

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

# plain training has fixed colours; every other arm takes the next of COLOURS and MARKERS
_PLAIN_STYLE = {
    "DP-Adam": (BLACK, "-"),
    "DP-SGD": (GREY, "-"),
    "noise-free Adam (NON-PRIVATE)": (BLACK, ":"),
    "noise-free SGD (NON-PRIVATE)": (GREY, ":"),
}
_OTHERS = [colour for colour in COLOURS if colour not in (BLACK, GREY)]


@styled
def plot_steps(result: steps.Result) -> Figure:
    """Plot the score over steps, the steps saved by each arm, and the tuning grids."""
    figure, axes = new_figure(1, 3, width=FULL, height=3.4, width_ratios=(1.2, 1, 1.1))
    for arm in result.arms:
        mean, half = result.band(arm)
        band(
            axes[0, 0],
            np.arange(result.budget + 1),
            mean,
            mean - half,
            mean + half,
            alpha=0.1,
            label=arm,
            **_line(result.arms, arm),
        )
    axes[0, 0].axhline(result.target(), color=BLACK, linewidth=0.8, linestyle="--")
    axes[0, 0].set(xlabel="step", ylabel=f"validation {result.config.score}")
    letter(axes[0, 0], "a  each at its own rate")
    _plot_saved(result, axes[0, 1])
    _plot_grids(result, axes[0, 2])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _line(arms: tuple[str, ...], arm: str) -> dict[str, Any]:
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
    arms = [
        found.arm
        for found in result.tuned
        if found.chosen is not None and found.arm not in ("DP-Adam", "DP-SGD")
    ]
    for shift, baseline, colour, marker in (
        (-0.15, "DP-Adam", BLACK, "o"),
        (0.15, "DP-SGD", BLUE, "s"),
    ):
        saved = [result.saved(arm, baseline) for arm in arms]
        axis.errorbar(
            [mean for mean, _ in saved],
            np.arange(len(arms)) + shift,
            xerr=[half for _, half in saved],
            fmt=marker,
            color=colour,
            markersize=3,
            linewidth=0.8,
            label=f"than {baseline}",
        )
    axis.axvline(0, color=BLACK, linewidth=0.8)
    axis.set_yticks(range(len(arms)), [arm.replace(" (", "\n(") for arm in arms], fontsize=6)
    axis.invert_yaxis()
    axis.set(xlabel="steps to 90% fewer, paired")
    axis.legend(fontsize=6)
    letter(axis, "b  steps saved")


def _plot_grids(result: steps.Result, axis: Axes) -> None:
    """Plot the tuning criterion against the learning rate; a ring marks the chosen rate."""
    for found in result.tuned:
        line = _line(result.arms, found.arm)
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
