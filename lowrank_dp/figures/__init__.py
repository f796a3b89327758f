"""The papers' figures: an experiment, a plot and a caption for each name."""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.figures.catalog import NAMES, find
    from lowrank_dp.figures.making import compute, config_of, configure, default_task, show
    from lowrank_dp.figures.reading import cells, notice, saved_results
    from lowrank_dp.figures.spec import FigureSpec
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "NAMES",
    "FigureSpec",
    "cells",
    "compute",
    "config_of",
    "configure",
    "default_task",
    "find",
    "notice",
    "saved_results",
    "show",
]
