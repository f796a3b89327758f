"""Figures of whole training runs: sample efficiency, and membership inference."""

from typing import Any

from lowrank_dp.experiments import efficiency, gap, membership, steps, steps_configs
from lowrank_dp.figures.spec import FigureSpec
from lowrank_dp.plots.gap import plot_gap
from lowrank_dp.plots.membership import plot_membership
from lowrank_dp.plots.steps import plot_steps
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


def _gap(small: Any, full: Any) -> FigureSpec:
    return FigureSpec(
        run=gap.run,
        result=gap.Result,
        small=small,
        full=full,
        plot=plot_gap,
        headline=gap.headline,
        caption=gap.CAPTION,
        table=gap.table,
        plan=gap.plan,
        lengthy=True,
    )


def _steps(small: Any, full: Any) -> FigureSpec:
    return FigureSpec(
        run=steps.run,
        result=steps.Result,
        small=small,
        full=full,
        plot=plot_steps,
        headline=steps.headline,
        caption=steps.CAPTION,
        table=steps.table,
        plan=steps.plan,
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
    "gap": _gap(gap.SMALL, gap.SST2),
    "gap_large_batch": _gap(gap.SMALL, gap.SST2_LARGE_BATCH),
    "gap_all_layers": _gap(gap.SMALL, gap.SST2_ALL_LAYERS),
    "steps_sst2": _steps(steps_configs.SMALL, steps_configs.SST2),
    "steps_sst2_gap": _steps(steps_configs.SMALL, steps_configs.SST2_GAP),
    "steps_sst2_eps8": _steps(steps_configs.SMALL, steps_configs.SST2_EPS8),
    "steps_sst2_all": _steps(steps_configs.SMALL, steps_configs.SST2_ALL),
    "steps_mnli": _steps(steps_configs.SMALL, steps_configs.MNLI),
    "steps_e2e": _steps(steps_configs.SMALL_TABLES, steps_configs.E2E),
    "steps_smollm2": _steps(steps_configs.SMALL_TABLES, steps_configs.SMOLLM2),
    "membership": _membership(membership.SMALL, membership.SST2),
    "membership_e2e": _membership(membership.SMALL_TABLES, membership.E2E),
}
