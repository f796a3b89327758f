"""The papers' figures: run an experiment or load its artifact, draw it, save both.

What is particular to one figure lives in its experiment and its plot; this module only lists them.
``python -m lowrank_dp.figures`` never tries the hub by default: it takes SST-2 where
LOWRANK_DP_DATA holds it, else the generated task, and the packaged MiniLM, else a tiny model.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from matplotlib.figure import Figure

from lowrank_dp import _validate, artifacts
from lowrank_dp.experiments import (
    ablation,
    alignment,
    dynamics,
    efficiency,
    gradients,
    lora_noise,
    matrix_attack,
    membership,
    momentum,
    projection_privacy,
    spectra,
    tasks,
    total_variation,
)
from lowrank_dp.plots import lora as lora_plots
from lowrank_dp.plots import membership as membership_plots
from lowrank_dp.plots import restoration as gradient_plots
from lowrank_dp.plots import training as training_plots


@dataclass(frozen=True)
class FigureSpec:
    """An experiment, what it runs on at each scale, and how its result is drawn.

    ``lengthy``: what the figure shows takes from minutes to hours. Its saved result is that of the
    full scale, which the small one never replaces; that is a trial on generated text, for
    :func:`show`.
    """

    experiment: ModuleType
    small: Any
    full: Any
    plot: Callable[[Any], Figure]
    lengthy: bool = False


FIGURES = {
    "spectra": FigureSpec(
        spectra, spectra.Config(), spectra.Config(batch_size=4000), gradient_plots.plot_spectra
    ),
    "alignment": FigureSpec(
        alignment,
        alignment.Config(batch_sizes=(512, 1024, 2048), noise_multipliers=(0.6, 0.3, 1.0)),
        alignment.Config(),
        gradient_plots.plot_alignment,
    ),
    "tasks": FigureSpec(
        tasks, tasks.SMALL, tasks.Config(), gradient_plots.plot_tasks, lengthy=True
    ),
    "ablation": FigureSpec(
        ablation, ablation.SMALL, ablation.Config(), gradient_plots.plot_ablation
    ),
    "momentum": FigureSpec(
        momentum, momentum.SMALL, momentum.Config(), gradient_plots.plot_momentum, lengthy=True
    ),
    "lora_noise": FigureSpec(
        lora_noise, lora_noise.SMALL, lora_noise.Config(), lora_plots.plot_lora_noise
    ),
    "total_variation": FigureSpec(
        total_variation,
        total_variation.SMALL,
        total_variation.Config(),
        lora_plots.plot_total_variation,
    ),
    "projection_privacy": FigureSpec(
        projection_privacy,
        projection_privacy.SMALL,
        projection_privacy.Config(),
        lora_plots.plot_projection_privacy,
    ),
    "matrix_attack": FigureSpec(
        matrix_attack,
        matrix_attack.SMALL,
        matrix_attack.Config(),
        lora_plots.plot_matrix_attack,
    ),
    "dynamics": FigureSpec(dynamics, dynamics.SMALL, dynamics.Config(), lora_plots.plot_dynamics),
    "efficiency": FigureSpec(
        efficiency, efficiency.SMALL, efficiency.SST2, training_plots.plot_efficiency, lengthy=True
    ),
    "efficiency_mnli": FigureSpec(
        efficiency, efficiency.SMALL, efficiency.MNLI, training_plots.plot_efficiency, lengthy=True
    ),
    "efficiency_e2e": FigureSpec(
        efficiency,
        efficiency.SMALL_TABLES,
        efficiency.E2E,
        training_plots.plot_efficiency,
        lengthy=True,
    ),
    "efficiency_smollm2": FigureSpec(
        efficiency,
        efficiency.SMALL_TABLES,
        efficiency.SMOLLM2,
        training_plots.plot_efficiency,
        lengthy=True,
    ),
    "membership": FigureSpec(
        membership,
        membership.SMALL,
        membership.SST2,
        membership_plots.plot_membership,
        lengthy=True,
    ),
    "membership_e2e": FigureSpec(
        membership,
        membership.SMALL_TABLES,
        membership.E2E,
        membership_plots.plot_membership,
        lengthy=True,
    ),
}


def default_task() -> str:
    """``sst2`` where LOWRANK_DP_DATA holds it, else ``generated``: never the hub."""
    folder = os.environ.get("LOWRANK_DP_DATA")
    if folder and (Path(folder) / "glue" / "sst2" / "train.jsonl.gz").is_file():
        return "sst2"
    return "generated"


def _at_hand(recipe: FigureSpec) -> dict[str, str]:
    """A lengthy experiment has a task of its own; the others take what is at hand."""
    return {} if recipe.lengthy else {"task": default_task()}


def configure(config: Any, **changes: Any) -> Any:
    """``config`` with ``changes`` put into the fields of that name, nested configs included."""
    known = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in changes:
            known[field.name] = changes[field.name]
        elif dataclasses.is_dataclass(value):
            known[field.name] = configure(value, **changes)
    return dataclasses.replace(config, **known)


def compute(name: str, config: Any, sources: dict[Any, Any] | None = None) -> Any:
    """The result of a figure's experiment; ``sources`` keeps the model that several measure."""
    recipe = FIGURES[_validate.choice("figure", name, FIGURES)]
    if "source" not in inspect.signature(recipe.experiment.run).parameters:
        return recipe.experiment.run(config)
    sources = {} if sources is None else sources
    if config.gradients not in sources:
        sources.clear()  # one model in memory at a time
        sources[config.gradients] = gradients.prepare(config.gradients)
    return recipe.experiment.run(config, sources[config.gradients])


def show(
    name: str,
    *,
    artifact_folder: str | Path = "paper_artifacts",
    recompute: bool = False,
    scale: str = "small",
    sources: dict[Any, Any] | None = None,
) -> tuple[Any, Figure]:
    """``(result, figure)`` from the saved artifact, or computed afresh; saves nothing.

    For notebooks. ``sources``: an empty dict, given to several calls, keeps the prepared model from
    one to the next. Raises ``FileNotFoundError`` if there is no artifact to draw from.
    """
    recipe = FIGURES[_validate.choice("figure", name, FIGURES)]
    _validate.choice("scale", scale, ["small", "full"])
    if recompute:
        result = compute(name, configure(getattr(recipe, scale), **_at_hand(recipe)), sources)
    else:
        result = artifacts.load_result(artifact_folder, name, recipe.experiment.Result)
    return result, recipe.plot(result)
