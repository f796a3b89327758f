"""The papers' figures: an experiment, a plot and a caption for each name."""

from lowrank_dp.figures.catalog import NAMES, find
from lowrank_dp.figures.making import compute, config_of, configure, default_task, show
from lowrank_dp.figures.spec import FigureSpec

__all__ = [
    "NAMES",
    "FigureSpec",
    "compute",
    "config_of",
    "configure",
    "default_task",
    "find",
    "show",
]
