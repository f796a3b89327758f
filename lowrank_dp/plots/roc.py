"""Figure of the ROC curves of one membership-inference report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowrank_dp.mia.rendering import LABEL
from lowrank_dp.plots.style import (
    BLACK,
    BLUE,
    COLUMN,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    YELLOW,
    labelled,
    new_figure,
)

if TYPE_CHECKING:
    from lowrank_dp.mia.report import Report

ATTACK_COLOUR = {
    "loss": GREY,
    "base": RED,
    "zlib": YELLOW,
    "min-k": SKY,
    "min-k++": BLUE,
    "ez": GREEN,
    "quantile": PINK,
    "gradient": ORANGE,
    "projection": GREEN,
    "lira": BLACK,
    "lira-offline": PINK,
    "rmia": BLUE,
    "rmia-offline": SKY,
}


@labelled(privacy=LABEL)
def plot_roc(report: Report, *, ax: Axes | None = None) -> Figure:
    """Plot the ROC curve of every attack on log-log axes; the dotted line is chance.

    A curve is that of the independent units from which the attack's AUC is computed: with a group
    as the unit of sampling, of the groups' mean scores.

    ``ax`` are existing matplotlib axes to draw in; None makes a new figure.
    """
    from lowrank_dp.mia.metrics import roc_points

    figure, grid = new_figure(1, 1, axes=None if ax is None else [ax], width=COLUMN, height=3.2)
    axis = grid[0, 0]
    axis.set_title("ROC of the attacks", fontweight="bold", loc="left")
    for attack in report.attacks:
        roc = roc_points(*report.counted[attack.name])
        star = "*" if attack.name == report.primary else ""
        shadowed = attack.name in ("rmia", "rmia-offline", "lira", "lira-offline")
        axis.plot(
            roc.fpr,
            roc.tpr,
            "--" if shadowed else "-",
            color=ATTACK_COLOUR[attack.name],
            label=f"{attack.name}{star} {attack.auc.value:.3f}",
        )
    _, truth = report.counted[report.primary]
    least = 1 / max(1, int((~truth).sum()))
    line = np.array([least, 1.0])
    axis.plot(line, line, ":", color=GREY, linewidth=0.8)
    axis.set(
        xscale="log",
        yscale="log",
        xlim=(least, 1),
        ylim=(least, 1.05),
        xlabel="false-positive rate",
        ylabel="true-positive rate",
    )
    axis.legend(loc="lower right", title="AUC (* primary)", title_fontsize=7)
    return figure
