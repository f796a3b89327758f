"""The papers' figures: which experiment and which plot makes each."""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.figures.catalog import FIGURES, compute, configure, default_task, show
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["FIGURES", "compute", "configure", "default_task", "show"]
