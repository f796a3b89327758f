"""``python -m lowrank_dp.spectrum``: measure the spectra of any model's gradients on any task."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank_dp import _validate
from lowrank_dp._options import option
from lowrank_dp.commands import _console
from lowrank_dp.commands._tables import in_sections, print_table, say, without_common_parts
from lowrank_dp.restore.names import EDGE_SCHEMES
from lowrank_dp.train.config_checks import MOST_NOISE, MOST_REAL

if TYPE_CHECKING:
    from lowrank_dp.experiments.spectra import Result

app = _console.new_app("Singular values of a model's gradients, clean, noisy and restored.")


@dataclass(frozen=True)
class Options:
    """Options of the command: the gradients that are measured, and their noise."""

    model: str = option(
        "",
        "Model: hub id, folder, GGUF file or packaged name. Default: minilm if installed, else "
        "tiny.",
    )
    task: str = option(
        "generated",
        "Task name, or own data as train reads them, whose columns have the names that train finds "
        "without an option.",
    )
    batch_size: int = option(2048, "Number of examples in the gradient sum.")
    noise_multiplier: float = option(
        0.6, "Standard deviation of the noise, relative to --max-grad-norm."
    )
    max_grad_norm: float = option(1.0, "Clipping norm of one example's gradient, absolute.")
    scheme: str = option(
        "optimal", "Restoration scheme of the gradients.", choices=("none", *EDGE_SCHEMES)
    )
    warm_loss: float | None = option(
        None,
        "Training loss, in nats, down to which the model is trained without privacy before the "
        "measurement; 0 leaves the model as it is. Default: 0.36 for a classifier, else 0.",
    )
    max_length: int = option(128, "Number of tokens that a text is cut to.")
    micro_batch_size: int = option(64, "Number of examples in memory at a time.")
    seed: int = option(0, "Seed of every random choice.")
    device: str = option("cpu", "Device of the model: cpu or cuda.")

    def __post_init__(self) -> None:
        _validate.choice("--scheme", self.scheme, ["none", *EDGE_SCHEMES])
        _validate.real(
            "--noise-multiplier", self.noise_multiplier, low=1 / MOST_NOISE, high=MOST_NOISE
        )
        _validate.real("--max-grad-norm", self.max_grad_norm, low=1 / MOST_REAL, high=MOST_REAL)
        _validate.integer("--batch-size", self.batch_size)
        _validate.integer("--micro-batch-size", self.micro_batch_size)
        if self.warm_loss is not None:
            _validate.real("--warm-loss", self.warm_loss, low=0)


@app.command()
@_console.options_of(Options)
@_console.holding_output
def main(
    given: dict[str, Any],
    output: Annotated[
        Path | None, typer.Option(help="Folder for spectra.json, .npz, .png and .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Measure the singular values of one batch's clipped gradient sum, by layer. NON-PRIVATE."""
    asked = Options(**given)
    _console.check_new(output, "spectra.json")
    from lowrank_dp import artifacts
    from lowrank_dp.experiments import spectra
    from lowrank_dp.experiments.gradients import GradientConfig, load_source, warm_up

    gradients = GradientConfig(
        model=asked.model,
        task=asked.task,
        max_grad_norm=asked.max_grad_norm,
        warm_loss=asked.warm_loss or None,
        max_length=asked.max_length,
        micro_batch_size=asked.micro_batch_size,
        seed=asked.seed,
        device=asked.device,
    )
    source = load_source(gradients, asked.batch_size)
    if asked.warm_loss is None and source.kind == "classification":
        source.config = replace(gradients, warm_loss=GradientConfig.warm_loss)
    _say(f"measures: {source.description}")
    source.loss, source.warm_steps = warm_up(source, _say)
    config = spectra.Config(source.config, asked.batch_size, asked.noise_multiplier, asked.scheme)
    result = spectra.run(config, source, _say)
    if as_json:
        print(json.dumps(_document(result, spectra.headline(result)), indent=1))
    else:
        _print(result, spectra.headline(result))
    if output is not None:  # after the printing, so that a failed write loses no result
        from lowrank_dp.plots.spectra import plot_spectra

        artifacts.save_result(result, output, "spectra", seed=asked.seed, device=asked.device)
        figure = plot_spectra(result)
        artifacts.save_figure(figure, output, "spectra", privacy=result.privacy)


def _say(line: str) -> None:
    from rich.console import Console

    say(Console(stderr=True), line)


def _document(result: Result, headline: dict[str, str]) -> dict[str, Any]:
    return {
        "privacy": result.privacy,
        "ran_on": result.description,
        "loss": result.loss,
        "noise_std": result.noise_std,
        "headline": headline,
        "layers": [
            {
                "name": name,
                "shape": result.shapes[i].tolist(),
                "edge": float(result.edges[i]),
                "top_clean": float(result.clean[i, 0]),
                "top_noisy": float(result.noisy[i, 0]),
                "num_above_edge": int(result.num_above_edge[i]),
                "effective_rank_clean": float(result.effective_rank_clean[i]),
                "effective_rank_noisy": float(result.effective_rank_noisy[i]),
                "alignment_noisy": float(result.alignment_noisy[i]),
                "alignment_restored": float(result.alignment_restored[i]),
                "action": result.actions[i],
            }
            for i, name in enumerate(result.layers)
        ],
    }


def _print(result: Result, headline: dict[str, str]) -> None:
    from rich.console import Console

    names, pattern = without_common_parts(result.layers)
    columns = [
        "matrix",
        "shape",
        "edge",
        "top clean",
        "top noisy",
        "above",
        "eff. rank clean",
        "eff. rank noisy",
        "align. noisy",
        "align. after",
    ]
    rows = [
        [
            "×".join(map(str, result.shapes[i])),
            f"{result.edges[i]:.1f}",
            f"{result.clean[i, 0]:.1f}",
            f"{result.noisy[i, 0]:.1f}",
            str(result.num_above_edge[i]),
            f"{result.effective_rank_clean[i]:.0f}",
            f"{result.effective_rank_noisy[i]:.0f}",
            f"{result.alignment_noisy[i]:.3f}",
            f"{result.alignment_restored[i]:.3f}",
        ]
        for i in range(len(names))
    ]
    console = Console()
    if pattern:
        say(console, f"matrices: {pattern}")
    print_table(console, columns, in_sections(names, rows))
    for what, value in headline.items():
        say(console, f"{what}: {value}")
    say(console, f"ran on: {result.description}")
    say(console, result.privacy)
