"""The papers' figures: run an experiment or load its artifact, draw it, save both.

What is particular to one figure lives in its experiment and its plot; this module only lists them.
``python -m lowrank_dp.figures`` never tries the hub by default: it takes SST-2 where
LOWRANK_DP_DATA holds it, else the generated task, and the packaged MiniLM, else a tiny model.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lowrank_dp import _cli, _validate, artifacts
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
from lowrank_dp.plots import attacks as attack_plots
from lowrank_dp.plots import gradients as gradient_plots
from lowrank_dp.plots import lora as lora_plots
from lowrank_dp.plots import membership as membership_plots
from lowrank_dp.plots import training as training_plots


@dataclass(frozen=True)
class Recipe:
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
    "spectra": Recipe(
        spectra, spectra.Config(), spectra.Config(batch_size=4000), gradient_plots.plot_spectra
    ),
    "alignment": Recipe(
        alignment,
        alignment.Config(batch_sizes=(512, 1024, 2048), noise_multipliers=(0.6, 0.3, 1.0)),
        alignment.Config(),
        gradient_plots.plot_alignment,
    ),
    "tasks": Recipe(tasks, tasks.SMALL, tasks.Config(), gradient_plots.plot_tasks, lengthy=True),
    "ablation": Recipe(ablation, ablation.SMALL, ablation.Config(), gradient_plots.plot_ablation),
    "momentum": Recipe(
        momentum, momentum.SMALL, momentum.Config(), gradient_plots.plot_momentum, lengthy=True
    ),
    "lora_noise": Recipe(
        lora_noise, lora_noise.SMALL, lora_noise.Config(), lora_plots.plot_lora_noise
    ),
    "total_variation": Recipe(
        total_variation,
        total_variation.SMALL,
        total_variation.Config(),
        lora_plots.plot_total_variation,
    ),
    "projection_privacy": Recipe(
        projection_privacy,
        projection_privacy.SMALL,
        projection_privacy.Config(),
        lora_plots.plot_projection_privacy,
    ),
    "matrix_attack": Recipe(
        matrix_attack,
        matrix_attack.SMALL,
        matrix_attack.Config(),
        membership_plots.plot_matrix_attack,
    ),
    "dynamics": Recipe(dynamics, dynamics.SMALL, dynamics.Config(), lora_plots.plot_dynamics),
    "efficiency": Recipe(
        efficiency, efficiency.SMALL, efficiency.SST2, training_plots.plot_efficiency, lengthy=True
    ),
    "efficiency_mnli": Recipe(
        efficiency, efficiency.SMALL, efficiency.MNLI, training_plots.plot_efficiency, lengthy=True
    ),
    "efficiency_e2e": Recipe(
        efficiency,
        efficiency.SMALL_TABLES,
        efficiency.E2E,
        training_plots.plot_efficiency,
        lengthy=True,
    ),
    "efficiency_smollm2": Recipe(
        efficiency,
        efficiency.SMALL_TABLES,
        efficiency.SMOLLM2,
        training_plots.plot_efficiency,
        lengthy=True,
    ),
    "membership": Recipe(
        membership, membership.SMALL, membership.SST2, attack_plots.plot_membership, lengthy=True
    ),
    "membership_e2e": Recipe(
        membership,
        membership.SMALL_TABLES,
        membership.E2E,
        attack_plots.plot_membership,
        lengthy=True,
    ),
}


def default_task() -> str:
    """``sst2`` where LOWRANK_DP_DATA holds it, else ``generated``: never the hub."""
    folder = os.environ.get("LOWRANK_DP_DATA")
    if folder and (Path(folder) / "glue" / "sst2" / "train.jsonl.gz").is_file():
        return "sst2"
    return "generated"


def _at_hand(recipe: Recipe) -> dict[str, str]:
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


app = _cli.new_app("Draw the figures: PNG and PDF in figures/, arrays in paper_artifacts/.")


@app.command()
def main(
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Figure to make, may be repeated: {', '.join(FIGURES)}. Default: all."),
    ] = None,
    scale: Annotated[str, typer.Option(help="small (minutes on 2 cores) or full.")] = "small",
    model: Annotated[
        str,
        typer.Option(
            help="Hub id, folder or packaged name. Default: minilm if installed, else tiny."
        ),
    ] = "",
    task: Annotated[
        str, typer.Option(help="Task. Default: sst2 if LOWRANK_DP_DATA holds it, else generated.")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for PNG and PDF.")] = Path("figures"),
    artifact_folder: Annotated[
        Path, typer.Option("--artifacts", help="Folder for results.")
    ] = Path("paper_artifacts"),
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Draw from saved results, compute nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Make the figures, one after the other, and print what they show."""
    _validate.choice("scale", scale, ["small", "full"])
    names = [_validate.choice("--only", name, FIGURES) for name in only or FIGURES]
    for folder in (output, artifact_folder):
        folder.mkdir(parents=True, exist_ok=True)  # an unwritable place fails now, not at the end
    changes = (
        {"device": device, "seed": seed}
        | ({"task": task} if task else {})
        | ({"model": model} if model else {})
    )
    console = Console(stderr=True)
    summary: list[dict[str, Any]] = []
    sources: dict[Any, Any] = {}
    for name in names:
        started = time.perf_counter()
        redrawn = redraw or (FIGURES[name].lengthy and scale == "small")
        if redrawn and not redraw:
            console.print(
                f"{name}: drawn from the saved result; --scale full computes it, which "
                "takes minutes to hours",
                highlight=False,
                soft_wrap=True,
            )
        elif console.is_terminal:
            console.print(f"{name}: {'redrawing' if redrawn else 'computing'} ...", highlight=False)
        if not redrawn:
            config = configure(getattr(FIGURES[name], scale), **(_at_hand(FIGURES[name]) | changes))
            if hasattr(FIGURES[name].experiment, "plan"):
                console.print(
                    f"plan: {FIGURES[name].experiment.plan(config)}",
                    highlight=False,
                    soft_wrap=True,
                )
            artifacts.save_result(compute(name, config, sources), artifact_folder, name)
        result, figure = show(name, artifact_folder=artifact_folder)  # as a reader would see it
        artifacts.save_figure(figure, output, name)
        experiment = FIGURES[name].experiment
        columns, rows = (
            experiment.table(result)
            if hasattr(experiment, "table")
            else (["quantity", "value"], list(experiment.headline(result).items()))
        )
        artifacts.save_table(columns, rows, artifact_folder, name, caption=experiment.CAPTION)
        summary.append(
            {
                "figure": name,
                "seconds": round(time.perf_counter() - started, 1),
                "headline": FIGURES[name].experiment.headline(result),
                "privacy": result.privacy,
                "ran on": getattr(result, "description", ""),
                "files": [
                    str(output / f"{name}.png"),
                    str(output / f"{name}.pdf"),
                    str(artifact_folder / f"{name}.json"),
                ],
            }
        )
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        _print(summary)


def _print(summary: list[dict[str, Any]]) -> None:
    table = Table("figure", "what it shows", "value", "s")
    for entry in summary:
        for i, (what, value) in enumerate(entry["headline"].items()):
            first = i == 0
            table.add_row(
                entry["figure"] if first else "",
                what,
                value,
                f"{entry['seconds']:.0f}" if first else "",
            )
        table.add_section()
    console = Console()
    console.print(table)
    for line in sorted({f"{entry['figure']}: {entry['privacy']}" for entry in summary}):
        console.print(line, highlight=False, soft_wrap=True)
    for line in dict.fromkeys(entry["ran on"] for entry in summary if entry["ran on"]):
        console.print(f"ran on: {line}", highlight=False, soft_wrap=True)
    console.print(
        "files: " + ", ".join(path for entry in summary for path in entry["files"]),
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    _cli.run(app)
