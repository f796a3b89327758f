"""Figures on arXiv 2510.01137: gradient spectra, and gradients before and after restoration."""

from functools import partial

from lowrank_dp.experiments import (
    ablation,
    alignment,
    momentum,
    noise_cost,
    plan_check,
    plan_gap,
    spectra,
    tasks,
    tasks_large,
    tasks_large_configs,
)
from lowrank_dp.experiments import noise_cost_verdicts as verdicts
from lowrank_dp.figures.spec import OPTIONS, FigureSpec, lengthy
from lowrank_dp.plots import restoration as plots
from lowrank_dp.plots.noise_cost import plot_noise_cost
from lowrank_dp.plots.plan_check import plot_plan_check
from lowrank_dp.plots.plan_gap import plot_plan_gap
from lowrank_dp.plots.spectra import plot_spectra
from lowrank_dp.plots.tasks_large import plot_tasks_large

_OWN_MODELS = ("device", "seed")  # options of an experiment with several models and tasks


_tasks_large = partial(lengthy, tasks_large, plot_tasks_large, options=_OWN_MODELS)
# the runs of several experiments, each with its own configuration
_plan_gap = partial(lengthy, plan_gap, plot_plan_gap, plan_gap.SMALL, options=())

FIGURES = {
    "spectra": FigureSpec(
        run=spectra.run,
        result=spectra.Result,
        small=spectra.Config(),
        full=spectra.Config(batch_size=4000),
        plot=plot_spectra,
        headline=spectra.headline,
        caption=spectra.CAPTION,
        takes_source=True,
    ),
    "alignment": FigureSpec(
        run=alignment.run,
        result=alignment.Result,
        small=alignment.Config(batch_sizes=(512, 1024, 2048), noise_multipliers=(0.6, 0.3, 1.0)),
        full=alignment.Config(),
        plot=plots.plot_alignment,
        headline=alignment.headline,
        caption=alignment.CAPTION,
        table=alignment.table,
        takes_source=True,
    ),
    "tasks": lengthy(tasks, plots.plot_tasks, tasks.SMALL, tasks.Config(), _OWN_MODELS),
    "tasks_mpnet": _tasks_large(tasks_large_configs.SMALL, tasks_large_configs.MPNET),
    "tasks_gemma": _tasks_large(tasks_large_configs.SMALL_TABLES, tasks_large_configs.GEMMA),
    "tasks_qwen": _tasks_large(tasks_large_configs.SMALL_TABLES, tasks_large_configs.QWEN),
    "ablation": FigureSpec(
        run=ablation.run,
        result=ablation.Result,
        small=ablation.SMALL,
        full=ablation.Config(),
        plot=plots.plot_ablation,
        headline=ablation.headline,
        caption=ablation.CAPTION,
        table=ablation.table,
        takes_source=True,
    ),
    "momentum": FigureSpec(
        run=momentum.run,
        result=momentum.Result,
        small=momentum.SMALL,
        full=momentum.Config(),
        plot=plots.plot_momentum,
        headline=momentum.headline,
        caption=momentum.CAPTION,
        table=momentum.table,
        takes_source=True,
        lengthy=True,
    ),
    "plan_check": lengthy(
        plan_check, plot_plan_check, plan_check.SMALL, plan_check.Config(), OPTIONS
    ),
    "plan_gap": _plan_gap(plan_gap.FULL),
    "plan_gap_large_batch": _plan_gap(plan_gap.LARGE_BATCH),
    "noise_cost": FigureSpec(
        run=noise_cost.run,
        result=noise_cost.Result,
        small=noise_cost.SMALL,
        full=noise_cost.Config(),
        plot=plot_noise_cost,
        headline=verdicts.headline,
        caption=noise_cost.CAPTION,
        table=verdicts.table,
        plan=noise_cost.plan,
        options=_OWN_MODELS,
        lengthy=True,
    ),
}
