"""Figure of training runs: learning curves, and steps to a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    from lowrank_dp.experiments import efficiency


def _over_seeds(result: efficiency.Result) -> str:
    private = result.privacy.partition(";")[0]
    return f"Each run: {private}. Bands: 95% t-interval, {result.score.shape[1]} seeds."


@labelled(_over_seeds)
def plot_efficiency(result: efficiency.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot score and loss over steps, and steps to the target at every learning rate.

    ``axes`` are existing matplotlib axes to draw in: three, or two if the score is the loss.
    """
    curves = {
        result.config.score: result.score,
        "loss": result.loss,
    }  # one panel if the score is the loss
    figure, grid = new_figure(1, len(curves) + 1, axes=axes, width=FULL, height=3.2)
    for panel, axis, (name, values) in zip("ab", grid[0, :-1], curves.items(), strict=False):
        limits: list[np.ndarray] = []
        for i, arm in enumerate(result.arms):
            mean, half = result.band(i, values)
            limits += [mean - half, mean + half]
            band(
                axis,
                result.steps,
                mean,
                mean - half,
                mean + half,
                alpha=0.1,
                **look(arm).curve(markersize=3, label=arm),
            )
        axis.set(xlabel="step", ylabel=f"validation {name}")
        show_all(axis, *limits)
        letter(axis, f"{panel}  {name}, tuned rates")
    target = result.start + 0.9 * (result.best - result.start)
    said = "target: 90% of DP-Adam's best gain"
    grid[0, 0].axhline(target, color=BLACK, linewidth=0.8, linestyle="--", label=said)
    _plot_rates(result, grid[0, -1])
    letter(grid[0, -1], f"{'abc'[len(curves)]}  every rate, one seed")
    legend_below(figure, grid, axes is None, ncols=3)
    return figure


def _plot_rates(result: efficiency.Result, axis: Axes) -> None:
    """Plot steps to 90% of the gain against the rate; the top row shows runs that missed 90%."""
    steps, rates = result.tuning_steps, np.arange(len(result.config.learning_rates))
    never = 1.15 * float(result.steps[-1])
    # the arms are shifted, so that equal values do not hide each other
    shift = np.linspace(-0.25, 0.25, len(result.arms))
    for i, arm in enumerate(result.arms):
        axis.plot(
            rates + shift[i],
            np.where(np.isinf(steps[i]), never, steps[i]),
            **look(arm).points(markersize=4),
        )
    axis.set_ylim(0, 1.05 * never)
    axis.set_xticks(rates, [f"{rate:g}" for rate in result.config.learning_rates])
    ticks = [step for step in axis.get_yticks() if 0 <= step <= result.steps[-1]]
    axis.set_yticks([*ticks, never], [*(f"{step:.0f}" for step in ticks), "never"])
    axis.set(xlabel="learning rate", ylabel="steps to 90% (tuning run)")
