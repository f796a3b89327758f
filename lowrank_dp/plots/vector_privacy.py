"""Figure of the privacy of one vector's projection: theorem, exact law, measured angles, steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank_dp.plots.style import COLOURS, MARKERS, labelled, letter, new_figure, shade
from lowrank_dp.theory.privacy import PROFILE_ERROR

if TYPE_CHECKING:
    from lowrank_dp.experiments import vector_privacy


@labelled("c alone is measured, on clean gradients; a, b and d are formulas.")
def plot_vector_privacy(
    result: vector_privacy.Result, *, axes: Sequence[Axes] | None = None
) -> Figure:
    """Plot epsilon and delta against the angle, measured angles, and epsilon against steps.

    ``axes`` are four existing matplotlib axes to draw in; None makes a new figure.
    """
    figure, grid = new_figure(2, 2, axes=axes, height=5.2)
    config = result.config
    for i, rank in enumerate(config.ranks):
        for axis, exact, other in (
            (grid[0, 0], result.exact_epsilon, result.hu_epsilon),
            (grid[0, 1], result.exact_delta, result.gaussian_delta),
        ):
            colour = shade("rank", rank)
            axis.plot(config.angles, exact[i], color=colour, label=f"r = {rank}")
            axis.plot(config.angles, other[i], "--", color=colour)
    grid[0, 0].set(
        xscale="log", yscale="log", xlabel="angle (radians)", ylabel="ε at the theorem's δ"
    )
    for axis, corner in zip(grid[0], ("lower right", "upper left"), strict=True):
        axis.legend(title=f"n = {config.width}", title_fontsize=7, loc=corner)
    letter(grid[0, 0], "a  computed: exact —, theorem 1 – –")
    grid[0, 1].set(
        xscale="log",
        yscale="log",
        ylim=(PROFILE_ERROR, 1.5),  # below, the exact delta is not resolved
        xlabel="angle (radians)",
        ylabel="δ at ε = 1",
    )
    letter(grid[0, 1], "b  computed: exact —, Gaussian reading – –")
    _plot_angles(result, grid[1, 0])
    for i, angle in enumerate(config.composed_angles):
        grid[1, 1].plot(
            config.steps,
            result.composed[i],
            color=shade("angle", angle),
            marker=MARKERS[i],
            markersize=3,
            label=f"angle {angle:g}",
        )
    grid[1, 1].set(
        xscale="log",
        yscale="log",
        xlabel="steps, each with a fresh A",
        ylabel=f"ε at δ = {config.delta:g}",
    )
    grid[1, 1].legend(title=f"r = {config.composed_rank}, n = {config.width}", title_fontsize=7)
    letter(grid[1, 1], "d  computed: exact law, composed")
    return figure


def _plot_angles(result: vector_privacy.Result, axis: Axes) -> None:
    sizes = sorted(result.config.batch_sizes)
    for i, name in enumerate(result.layers):
        short = ".".join(name.split(".")[-3:-1])
        for k, line in ((0, "-"), (2, ":")):
            axis.plot(
                sizes,
                result.angle[i, :, k],
                line,
                color=COLOURS[i],
                marker=MARKERS[i],
                markersize=3,
                label=short if k == 0 else None,
            )
    axis.plot(
        sizes,
        result.angle[0, 0, 0] * sizes[0] / np.array(sizes),
        "--",
        color="black",
        linewidth=0.8,
        label="1 / B",
    )
    axis.set(xscale="log", yscale="log", xlabel="batch B", ylabel="angle by one example (radians)")
    axis.legend(fontsize=6)
    letter(axis, "c  NON-PRIVATE: median —, largest ···")
