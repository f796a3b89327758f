"""Names of the papers' figures, and the module that defines each figure.

This module imports no experiment: a command can list the names without loading torch.
"""

from __future__ import annotations

import importlib

from lowrank_dp import _validate
from lowrank_dp.figures.spec import FigureSpec

# figure -> module of this package whose FIGURES define it, in the order of the papers
MODULES = {
    "spectra": "restoration",
    "alignment": "restoration",
    "tasks": "restoration",
    "tasks_mpnet": "restoration",
    "tasks_gemma": "restoration",
    "tasks_qwen": "restoration",
    "ablation": "restoration",
    "momentum": "restoration",
    "plan_check": "restoration",
    "plan_gap": "restoration",
    "plan_gap_large_batch": "restoration",
    "noise_cost": "restoration",
    "lora_noise": "lora",
    "total_variation": "lora",
    "projection_privacy": "lora",
    "vector_privacy": "lora",
    "matrix_attack": "lora",
    "noisy_projection": "lora",
    "dynamics": "lora",
    "gap": "training",
    "gap_large_batch": "training",
    "gap_all_layers": "training",
    "steps_sst2": "training",
    "steps_sst2_gap": "training",
    "steps_sst2_arms": "training",
    "steps_sst2_arms_eps8": "training",
    "steps_sst2_eps8": "training",
    "steps_sst2_all": "training",
    "steps_sst2_mpnet": "training",
    "steps_cola_mpnet": "training",
    "steps_mnli": "training",
    "steps_e2e": "training",
    "steps_e2e_arms": "training",
    "steps_smollm2": "training",
    "steps_dart": "training",
    "steps_gemma": "training",
    "membership": "training",
    "membership_e2e": "training",
    "membership_gemma": "training",
    "implicit_noise": "training",
}
NAMES = tuple(MODULES)


def find(name: str) -> FigureSpec:
    """Return the definition of a figure; ValueError, with the nearest name, for another name."""
    module_name = MODULES[_validate.choice("figure", name, NAMES)]
    module = importlib.import_module(f"lowrank_dp.figures.{module_name}")
    figures: dict[str, FigureSpec] = module.FIGURES
    return figures[name]
