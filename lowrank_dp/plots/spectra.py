"""Figure of gradient spectra: singular values, effective rank, and overlaps of singular vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank_dp.plots.arms import look
from lowrank_dp.plots.style import (
    BLACK,
    BROWN,
    FULL,
    GREY,
    OLIVE,
    PINK,
    PURPLE,
    labelled,
    legend_below,
    letter,
    own_axes,
    root,
)
from lowrank_dp.spectrum.random_matrix import (
    aspect_and_scale,
    marchenko_pastur_quantiles,
    overlaps,
    visible_value,
)

if TYPE_CHECKING:
    from lowrank_dp.experiments import spectra

# parts of a parameter's name that do not distinguish layers
_FILLERS = (
    "base_model",
    "model",
    "bert",
    "roberta",
    "encoder",
    "layer",
    "layers",
    "self",
    "dense",
    "transformer",
    "h",
)


@labelled("One batch, one noise draw.")
def plot_spectra(result: spectra.Result, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Plot four layers' singular values, then all layers' top values, effective ranks, overlaps.

    ``axes`` are seven existing matplotlib axes to draw in; None makes a new figure.
    """
    if axes is None:
        figure = Figure(figsize=(FULL, 4.8))
        rows = figure.add_gridspec(2, 1)
        grids = [rows[i].subgridspec(1, count) for i, count in enumerate((4, 3))]
        places = [grid[i] for grid in grids for i in range(grid.ncols)]
        panels = {name: figure.add_subplot(p) for name, p in zip("abcdefg", places, strict=True)}
    else:
        panels = dict(zip("abcdefg", own_axes(axes, 7), strict=True))
        figure = root(panels["a"])
    for name, layer in zip("abcd", _spread(result, 4), strict=False):
        _plot_layer(result, panels[name], layer)
        m, n = result.shapes[layer]
        letter(panels[name], f"{name}  {_short(result.layers[layer])}\n    {m}×{n}", size=7)
    panels["a"].set_ylabel("singular value / edge")
    legend_below(figure, [panels["a"]], axes is None, ncols=5)
    _plot_top_values(result, panels["e"])
    _plot_effective_ranks(result, panels["f"])
    _plot_overlaps(result, panels["g"])
    for name, title in (
        ("e", "top singular values"),
        ("f", "effective ranks"),
        ("g", "overlaps"),
    ):
        letter(panels[name], f"{name}  {title}")
    return figure


def _plot_layer(result: spectra.Result, axis: Axes, layer: int) -> None:
    """Plot one layer's singular values in units of its bulk edge."""
    edge, (m, n) = result.edges[layer], result.shapes[layer]
    for values, label in (
        (result.noisy, "noisy"),
        (result.restored, "restored"),
        (result.clean, "clean"),
    ):
        row = values[layer][~np.isnan(values[layer])] / edge
        row = row[row > 1e-4]  # a logarithmic axis cannot show zero
        axis.plot(
            np.arange(1, len(row) + 1),
            row,
            **look(label).curve(
                marker="." if len(row) < 20 else "",  # a line of one point is invisible
                label=label,
            ),
        )
    bulk = marchenko_pastur_quantiles(min(m, n), (m, n), result.noise_std) / edge
    axis.plot(np.arange(1, len(bulk) + 1), bulk, ":", color=PURPLE, label="pure noise (MP law)")
    axis.axhline(1, color=BROWN, linewidth=0.8, label="bulk edge")
    axis.set(xscale="log", yscale="log", xlabel="index", ylim=(1e-2, None))


def _plot_top_values(result: spectra.Result, axis: Axes) -> None:
    """Plot each layer's top value: noisy, clean, and where theory expects the noisy value."""
    order = np.arange(len(result.layers))
    expected = []
    for shape, clean in zip(result.shapes, result.clean[:, 0], strict=True):
        aspect, scale = aspect_and_scale(tuple(shape.tolist()), result.noise_std)
        expected.append(scale * float(visible_value(torch.tensor(clean / scale), aspect)))
    axis.plot(order, result.noisy[:, 0] / result.edges, "x", color=GREY, label="noisy")
    axis.plot(
        order, result.clean[:, 0] / result.edges, "o", color=BLACK, label="clean", markersize=3
    )
    axis.plot(order, expected / result.edges, "+", color=OLIVE, label="noisy, expected")
    axis.axhline(1, color=BROWN, linewidth=0.8)
    axis.set(xlabel="matrix, in the model's order", ylabel="top value / edge", yscale="log")
    axis.legend(loc="upper left", handletextpad=0, borderpad=0, borderaxespad=0.1)


def _plot_effective_ranks(result: spectra.Result, axis: Axes) -> None:
    """Plot each layer's effective rank and entropy: noisy, clean, and of pure noise."""
    order = np.arange(len(result.layers))
    noise = []
    for m, n in result.shapes:
        bulk = marchenko_pastur_quantiles(min(m, n), (m, n), result.noise_std)
        share = bulk / bulk.sum()
        noise.append(np.exp(-(share * np.log(share)).sum()))
    axis.plot(order, result.effective_rank_noisy, "x", color=GREY, label="noisy")
    axis.plot(order, result.effective_rank_clean, "o", color=BLACK, label="clean", markersize=3)
    axis.plot(order, noise, "+", color=PURPLE, label="pure noise")
    axis.set(xlabel="matrix, in the model's order", ylabel="effective rank", yscale="log")
    axis.legend(loc="lower left", handletextpad=0, borderpad=0, borderaxespad=0.1)
    entropy = axis.twinx()  # the logarithm of the effective rank
    entropy.set(ylim=np.log(axis.get_ylim()), ylabel="entropy (nats)")
    entropy.grid(False)


def _plot_overlaps(result: spectra.Result, axis: Axes) -> None:
    """Plot squared cosines of the leading singular vectors, measured against theory."""
    import seaborn

    points: dict[str, list[Any]] = {"expected": [], "measured": [], "side": []}
    for i, (m, n) in enumerate(result.shapes):
        aspect, scale = aspect_and_scale((int(m), int(n)), result.noise_std)
        count = min(result.overlap_left.shape[1], m, n)
        theta = torch.from_numpy(result.clean[i, :count]) / scale
        measured = result.overlap_left[i, :count], result.overlap_right[i, :count]
        short_side_first = measured if m <= n else measured[::-1]
        for side, expected, values in zip(
            ("shorter side", "longer side"), overlaps(theta, aspect), short_side_first, strict=True
        ):
            points["expected"] += expected.tolist()
            points["measured"] += values.tolist()
            points["side"] += [side] * count
    seaborn.scatterplot(
        points,
        x="expected",
        y="measured",
        hue="side",
        style="side",
        markers=["o", "s"],
        palette=[PINK, OLIVE],
        s=9,
        linewidth=0,
        ax=axis,
    )
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    axis.set(xlabel="squared cosine, expected", ylabel="squared cosine, measured")
    axis.legend(loc="lower right", handletextpad=0, borderpad=0, borderaxespad=0.1)


def _spread(result: spectra.Result, count: int) -> list[int]:
    """Choose layers spread over the order of clean top value / edge, largest first."""
    wide = np.flatnonzero(result.shapes.min(1) >= 64)
    wide = wide if len(wide) >= count else np.arange(len(result.layers))
    order = wide[np.argsort(-(result.clean[wide, 0] / result.edges[wide]))]
    return [int(i) for i in order[np.linspace(0, len(order) - 1, count).astype(int)]]


def _short(name: str) -> str:
    """Shorten a parameter's name to its last three informative parts."""
    words = [word for word in name.removesuffix(".weight").split(".") if word not in _FILLERS]
    return ".".join(words[-3:])
