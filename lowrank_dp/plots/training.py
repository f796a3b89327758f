"""Figure of training runs: learning curves, and steps to a target."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    band,
    letter,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import efficiency

# arm -> colour, marker and line; schemes as in plots.restoration
ARM_STYLE = {
    "DP-Adam": (GREY, "o", "-"),
    "denoise": (BLUE, "X", "--"),
    "optimal, zeroed": (RED, ".", ":"),
    "low-pass filter": (GREEN, "s", "--"),
    "momentum + optimal": (RED, "*", "--"),
    "momentum + optimal, zeroed": (RED, "*", "-"),
    "DP-LoRA": (SKY, "v", "-"),
    "DP-LoRA, frozen A": (ORANGE, "^", "-"),
    "DP-LoRA, momentum + optimal, zeroed": (PINK, "D", "-"),
}


@styled
def plot_efficiency(result: efficiency.Result) -> Figure:
    """Plot score and loss over steps, and steps to the target at every learning rate."""
    curves = {
        result.config.score: result.score,
        "loss": result.loss,
    }  # one panel if the score is the loss
    figure, axes = new_figure(1, len(curves) + 1, width=FULL, height=2.9)
    for panel, axis, (name, values) in zip("ab", axes[0, :-1], curves.items(), strict=False):
        for i, arm in enumerate(result.arms):
            colour, marker, line = ARM_STYLE[arm]
            mean, half = result.band(i, values)
            band(
                axis,
                result.steps,
                mean,
                mean - half,
                mean + half,
                alpha=0.12,
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=3,
                label=arm,
            )
        axis.set(xlabel="step", ylabel=f"validation {name}")
        _limit(axis, values)
        letter(axis, f"{panel}  each at its own rate")
    target = result.start + 0.9 * (result.best - result.start)
    axes[0, 0].axhline(target, color=BLACK, linewidth=0.8, linestyle="--")
    _plot_rates(result, axes[0, -1])
    letter(axes[0, -1], f"{'abc'[len(curves)]}  every rate, one seed")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _plot_rates(result: efficiency.Result, axis: Axes) -> None:
    """Plot steps to 90% against the learning rate; runs in the top row never reached 90%."""
    steps, rates = result.tuning_steps, np.arange(len(result.config.learning_rates))
    never = 1.15 * float(result.steps[-1])
    # the arms are shifted, so that equal values do not hide each other
    shift = np.linspace(-0.25, 0.25, len(result.arms))
    for i, arm in enumerate(result.arms):
        colour, marker, line = ARM_STYLE[arm]
        axis.plot(
            rates + shift[i],
            np.where(np.isinf(steps[i]), never, steps[i]),
            line,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=0.6,
        )
    axis.set_ylim(0, 1.05 * never)
    axis.set_xticks(rates, [f"{rate:g}" for rate in result.config.learning_rates])
    ticks = [step for step in axis.get_yticks() if 0 <= step <= result.steps[-1]]
    axis.set_yticks([*ticks, never], [*(f"{step:.0f}" for step in ticks), "never"])
    axis.set(xlabel="learning rate", ylabel="steps to 90% (tuning run)")


def _limit(axis: Axes, values: np.ndarray) -> None:
    """Limit the y-axis to the means, because an interval of three seeds can be far wider."""
    means = values.mean(axis=1)
    low, high = float(np.nanmin(means)), float(np.nanmax(means))
    room = 0.08 * (high - low) or 0.1
    axis.set_ylim(low - room, high + room)
