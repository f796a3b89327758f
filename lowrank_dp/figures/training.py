"""Figures of whole training runs: sample efficiency, and membership inference."""

from typing import Any

from lowrank_dp.experiments import efficiency, membership
from lowrank_dp.figures.spec import FigureSpec
from lowrank_dp.plots.membership import plot_membership
from lowrank_dp.plots.training import plot_efficiency


def _efficiency(small: Any, full: Any) -> FigureSpec:
    return FigureSpec(
        run=efficiency.run,
        result=efficiency.Result,
        small=small,
        full=full,
        plot=plot_efficiency,
        headline=efficiency.headline,
        caption=efficiency.CAPTION,
        table=efficiency.table,
        lengthy=True,
    )


def _membership(small: Any, full: Any) -> FigureSpec:
    return FigureSpec(
        run=membership.run,
        result=membership.Result,
        small=small,
        full=full,
        plot=plot_membership,
        headline=membership.headline,
        caption=membership.CAPTION,
        table=membership.table,
        plan=membership.plan,
        lengthy=True,
    )


FIGURES = {
    "efficiency": _efficiency(efficiency.SMALL, efficiency.SST2),
    "efficiency_mnli": _efficiency(efficiency.SMALL, efficiency.MNLI),
    "efficiency_e2e": _efficiency(efficiency.SMALL_TABLES, efficiency.E2E),
    "efficiency_smollm2": _efficiency(efficiency.SMALL_TABLES, efficiency.SMOLLM2),
    "membership": _membership(membership.SMALL, membership.SST2),
    "membership_e2e": _membership(membership.SMALL_TABLES, membership.E2E),
}
