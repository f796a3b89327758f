"""Figure of the cost of noise and of lost adaptivity, by epsilon, batch size and trained part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lowrank_dp.plots.style import FULL, labelled, letter, new_figure

if TYPE_CHECKING:
    from lowrank_dp.experiments import gap

_MOST = 3.0  # ratio at the end of the colour scale


def _over_seeds(result: gap.Result) -> str:
    return f"Ratios of means over {result.config.num_seeds} seeds."


@labelled(_over_seeds)
def plot_gap(result: gap.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot every ratio of steps as a heat map: a row per trained part, a column per ratio.

    ``axes`` are existing matplotlib axes to draw in, one per trained part and ratio, row by row.
    """
    found, config = result.ratios, result.config
    height = 1.1 + 1.7 * len(config.parts)
    figure, grid = new_figure(len(config.parts), len(found), axes=axes, width=FULL, height=height)
    for i, part in enumerate(config.parts):
        for j, (name, values) in enumerate(found.items()):
            axis = grid[i, j]
            texts = [
                [values.text((i, k, m)) for k in range(len(config.batch_sizes))]
                for m in range(len(config.epsilons))
            ]
            image = _heat_map(axis, values.value[i].T, texts)
            axis.set_xticks(range(len(config.batch_sizes)), map(str, config.batch_sizes))
            axis.set_yticks(range(len(config.epsilons)), [f"{e:g}" for e in config.epsilons])
            axis.set(xlabel="expected batch B", ylabel=f"epsilon, {part}")
            mark = "abcdefghijklmnopqrstuvwxyz"[i * len(found) + j]
            letter(axis, f"{mark}  {name}")
    bar = figure.colorbar(image, ax=grid, extend="both", shrink=0.8)
    bar.set_ticks([-1, 0, 1], labels=["1/2", "1", "2"])
    bar.set_label("ratio of steps")
    return figure


def _heat_map(axis: Axes, values: np.ndarray, texts: list[list[str]]) -> AxesImage:
    """Draw ``values`` (epsilons, batch sizes) on a logarithmic scale around 1, with their texts."""
    image = axis.imshow(
        np.log2(values), cmap="RdBu_r", vmin=-np.log2(_MOST), vmax=np.log2(_MOST), aspect="auto"
    )
    axis.grid(False)
    for (i, j), value in np.ndenumerate(values):
        dark = np.isfinite(value) and abs(np.log2(value)) > 1.1
        axis.text(
            j, i, texts[i][j], ha="center", va="center", color="white" if dark else "black", size=7
        )
    return image
