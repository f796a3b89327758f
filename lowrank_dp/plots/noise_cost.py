"""Figure of the cost of noise in one step: gain, curvature, and the quadratic prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank_dp.experiments import noise_cost_verdicts as verdicts
from lowrank_dp.experiments.intervals import mean_and_interval
from lowrank_dp.plots.style import (
    COLOURS,
    FULL,
    GREY,
    MARKERS,
    labelled,
    legend_below,
    letter,
    new_figure,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import noise_cost

WARM = -1  # the last stage


def _over_warm_ups(result: noise_cost.Result) -> str:
    return (
        f"a, d: bars are 95% t-intervals of the logarithm, {result.gain.shape[2]} warm-ups; "
        f"factors below {1 / verdicts.LIMIT:g} count as {1 / verdicts.LIMIT:g}."
    )


@labelled(_over_warm_ups)
def plot_noise_cost(result: noise_cost.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot gain and curvature by direction, predicted gain, and the gain of single matrices.

    ``axes`` are four existing matplotlib axes to draw in; None makes a new figure.
    """
    figure, grid = new_figure(2, 2, axes=axes, width=FULL, height=6.4, height_ratios=(3, 2))
    _plot_factors(
        grid[0, 0], result, verdicts.gain_factors(result)[:, WARM], result.directions, "noisy"
    )
    grid[0, 0].set_xlabel("gain at the best step / noisy sum's")
    letter(grid[0, 0], "a  gain, all trained matrices, warm model")
    _plot_curvature(grid[0, 1], result)
    letter(grid[0, 1], "b  curvature, warm model")
    _plot_prediction(grid[1, 0], result)
    letter(grid[1, 0], "c  fall of the loss, quadratic model, all stages")
    _plot_factors(
        grid[1, 1],
        result,
        verdicts.layer_factors(result)[:, WARM],
        result.layer_directions,
        "noisy",
    )
    grid[1, 1].set_xlabel("gain at the best step / noisy sum's")
    letter(grid[1, 1], "d  gain, one matrix, warm model")
    legend_below(figure, grid, axes is None, ncols=3)
    return figure


def _style(result: noise_cost.Result, case: int) -> dict[str, Any]:
    return {
        "color": COLOURS[case % len(COLOURS)],
        "marker": MARKERS[case % len(MARKERS)],
        "linestyle": "none",
        "label": result.config.cases[case].label,
    }


def _rows(axis: Axes, names: tuple[str, ...]) -> np.ndarray:
    """Label one row per name, from the top; return the y-coordinates of the rows."""
    y = np.arange(len(names))
    axis.set_yticks(y, names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xscale("log")
    return y


def _plot_factors(
    axis: Axes,
    result: noise_cost.Result,
    logs: np.ndarray,
    names: tuple[str, ...],
    reference: str,
) -> None:
    """Plot factors with intervals over warm-ups; ``logs`` is (K, W, names)."""
    shown = [j for j, name in enumerate(names) if name != reference]
    y = _rows(axis, tuple(names[j] for j in shown))
    for case, values in enumerate(logs[..., shown]):
        mean, half = mean_and_interval(values)
        middle = np.exp(mean)
        bars = middle - np.exp(mean - half), np.exp(mean + half) - middle
        shift = 0.22 * (case - (len(logs) - 1) / 2)
        axis.errorbar(middle, y + shift, xerr=bars, elinewidth=0.8, **_style(result, case))
    axis.axvline(1, color=GREY, linewidth=0.8, linestyle=":")


def _plot_curvature(axis: Axes, result: noise_cost.Result) -> None:
    """Plot the size of each direction's curvature relative to the clean sum's."""
    y = _rows(axis, result.directions)
    for case, ratios in enumerate(np.abs(verdicts.curvature_ratios(result)[:, WARM])):
        usable = np.where(ratios > 0, ratios, np.nan)  # a direction of zeros has no curvature
        shift = 0.22 * (case - (len(result.config.cases) - 1) / 2)
        for values in usable:
            axis.plot(values, y + shift, alpha=0.7, **_style(result, case))
    axis.set_xlabel("|d'Hd| / clean sum's, each warm-up")


def _plot_prediction(axis: Axes, result: noise_cost.Result) -> None:
    """Plot the measured against the predicted decrease of the loss, one point per direction."""
    predicted, measured = result.predicted, result.gain
    seen = (measured > 0) & np.isfinite(predicted)
    for case in range(len(result.config.cases)):
        x, y = predicted[case][seen[case]], measured[case][seen[case]]
        style = _style(result, case) | {"marker": "."}
        axis.plot(x, y, alpha=0.3, markersize=3, **style)
    axis.axline((1e-4, 1e-4), slope=1, color=GREY, linewidth=0.8, linestyle=":")
    axis.set(xscale="log", yscale="log", xlabel="predicted fall (nats)", ylabel="measured fall")
