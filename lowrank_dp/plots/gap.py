"""Map of what noise and lost adaptivity cost, by epsilon, batch size and trained part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lowrank_dp.plots.style import FULL, letter, new_figure, styled

if TYPE_CHECKING:
    from lowrank_dp.experiments import gap

_MOST = 3.0  # ratio at which the colours end


@styled
def plot_gap(result: gap.Result) -> Figure:
    """Plot every ratio of steps as a heat map: a row per trained part, a column per ratio."""
    found, config = result.ratios, result.config
    figure, axes = new_figure(
        len(config.parts), len(found), width=FULL, height=0.9 + 1.7 * len(config.parts)
    )
    for i, part in enumerate(config.parts):
        for j, (name, values) in enumerate(found.items()):
            axis = axes[i, j]
            texts = [
                [values.text((i, k, m)) for k in range(len(config.batch_sizes))]
                for m in range(len(config.epsilons))
            ]
            image = _heat_map(axis, values.value[i].T, texts)
            axis.set_xticks(range(len(config.batch_sizes)), map(str, config.batch_sizes))
            axis.set_yticks(range(len(config.epsilons)), [f"{e:g}" for e in config.epsilons])
            if j == 0:
                axis.set_ylabel(f"{part}\nepsilon")
            if i == len(config.parts) - 1:
                axis.set_xlabel("expected batch B")
            if i == 0:
                letter(axis, f"{'abcd'[j]}  {name}")
    bar = figure.colorbar(image, ax=axes, extend="both", shrink=0.8)
    bar.set_ticks([-1, 0, 1], labels=["1/2", "1", "2"])
    bar.set_label("ratio of steps (NON-PRIVATE)")
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
