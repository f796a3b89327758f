"""Figures of whole training runs: sample efficiency, and membership inference."""

from functools import partial

from lowrank_dp.experiments import (
    gap,
    gap_configs,
    implicit_noise,
    membership,
    membership_configs,
    steps,
    steps_configs,
)
from lowrank_dp.figures.spec import lengthy
from lowrank_dp.plots.gap import plot_gap
from lowrank_dp.plots.implicit_noise import plot_implicit_noise
from lowrank_dp.plots.membership import plot_membership
from lowrank_dp.plots.steps import plot_steps

_OPTIONS = ("model", "task", "device")  # the seeds are 0 to num_seeds - 1
_gap = partial(lengthy, gap, plot_gap, options=_OPTIONS)
_steps = partial(lengthy, steps, plot_steps, options=_OPTIONS)
_membership = partial(lengthy, membership, plot_membership, options=_OPTIONS)

FIGURES = {
    "gap": _gap(gap_configs.SMALL, gap_configs.SST2),
    "gap_large_batch": _gap(gap_configs.SMALL, gap_configs.SST2_LARGE_BATCH),
    "gap_all_layers": _gap(gap_configs.SMALL, gap_configs.SST2_ALL_LAYERS),
    "steps_sst2": _steps(steps_configs.SMALL, steps_configs.SST2),
    "steps_sst2_gap": _steps(steps_configs.SMALL, steps_configs.SST2_GAP),
    "steps_sst2_arms": _steps(steps_configs.SMALL, steps_configs.SST2_ARMS),
    "steps_sst2_arms_eps8": _steps(steps_configs.SMALL, steps_configs.SST2_ARMS_EPS8),
    "steps_sst2_eps8": _steps(steps_configs.SMALL, steps_configs.SST2_EPS8),
    "steps_sst2_all": _steps(steps_configs.SMALL, steps_configs.SST2_ALL),
    "steps_sst2_mpnet": _steps(steps_configs.SMALL, steps_configs.SST2_MPNET),
    "steps_cola_mpnet": _steps(steps_configs.SMALL, steps_configs.COLA_MPNET),
    "steps_mnli": _steps(steps_configs.SMALL, steps_configs.MNLI),
    "steps_e2e": _steps(steps_configs.SMALL_TABLES, steps_configs.E2E),
    "steps_e2e_arms": _steps(steps_configs.SMALL_TABLES, steps_configs.E2E_ARMS),
    "steps_smollm2": _steps(steps_configs.SMALL_TABLES, steps_configs.SMOLLM2),
    "steps_dart": _steps(steps_configs.SMALL_TABLES, steps_configs.SMOLLM2_DART),
    "steps_gemma": _steps(steps_configs.SMALL_TABLES, steps_configs.GEMMA),
    "membership": _membership(membership_configs.SMALL, membership_configs.SST2),
    "membership_e2e": _membership(membership_configs.SMALL_TABLES, membership_configs.E2E),
    "membership_gemma": _membership(membership_configs.SMALL_TABLES, membership_configs.GEMMA),
    "implicit_noise": lengthy(
        implicit_noise,
        plot_implicit_noise,
        implicit_noise.SMALL,
        implicit_noise.SST2,
        options=_OPTIONS,
    ),
}
