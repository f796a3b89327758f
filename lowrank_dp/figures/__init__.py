"""The papers' figures: which experiment and which plot makes each."""

from lowrank_dp.figures.catalog import FIGURES, compute, configure, default_task, show

__all__ = ["FIGURES", "compute", "configure", "default_task", "show"]
