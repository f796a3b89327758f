"""``python -m lowrank_dp.spectrum``: measure the spectra of any model's gradients on any task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lowrank_dp import _terminal, _validate, artifacts
from lowrank_dp.experiments import spectra
from lowrank_dp.experiments.gradients import GradientConfig
from lowrank_dp.plots.spectra import plot_spectra
from lowrank_dp.restore import EDGE_SCHEMES

app = _terminal.new_app("Singular values of a model's gradients, clean, noisy and restored.")


@app.command()
def main(
    model: Annotated[
        str,
        typer.Option(
            help="Hub id, folder or packaged name. Default: minilm if installed, else tiny."
        ),
    ] = "",
    task: Annotated[
        str, typer.Option(help="Task name, or a folder with train.jsonl.gz.")
    ] = "generated",
    batch_size: Annotated[int, typer.Option(help="Examples in the gradient sum.")] = 2048,
    noise_multiplier: Annotated[
        float, typer.Option(help="Noise relative to --max-grad-norm.")
    ] = 0.6,
    max_grad_norm: Annotated[float, typer.Option(help="Clipping norm of one example.")] = 1.0,
    scheme: Annotated[
        str, typer.Option(help=f"How to restore: none or {', '.join(EDGE_SCHEMES)}.")
    ] = "optimal",
    warm_loss: Annotated[
        float,
        typer.Option(
            help="Train, without privacy, to this loss first; 0 measures the model as it is."
        ),
    ] = 0.36,
    max_length: Annotated[int, typer.Option(help="Tokens a text is cut to.")] = 128,
    micro_batch_size: Annotated[int, typer.Option(help="Examples in memory at a time.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[
        Path | None, typer.Option(help="Folder for spectra.json, .npz, .png and .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Measure one batch's clipped gradient sum, layer by layer. NON-PRIVATE."""
    _validate.choice("--scheme", scheme, ["none", *EDGE_SCHEMES])
    _validate.positive("--noise-multiplier", noise_multiplier)
    _validate.integer("--batch-size", batch_size)
    _validate.integer("--micro-batch-size", micro_batch_size)
    _validate.real("--warm-loss", warm_loss, low=0)
    gradients = GradientConfig(
        model=model,
        task=task,
        max_grad_norm=max_grad_norm,
        warm_loss=warm_loss or None,
        max_length=max_length,
        micro_batch_size=micro_batch_size,
        seed=seed,
        device=device,
    )
    result = spectra.run(spectra.Config(gradients, batch_size, noise_multiplier, scheme))
    if output is not None:
        artifacts.save_result(result, output, "spectra", seed=seed, device=device)
        artifacts.save_figure(plot_spectra(result), output, "spectra")
    if as_json:
        print(
            json.dumps(
                {
                    "privacy": result.privacy,
                    "ran_on": result.description,
                    "loss": result.loss,
                    "noise_std": result.noise_std,
                    "headline": spectra.headline(result),
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
                },
                indent=1,
            )
        )
        return
    table = Table(
        "matrix",
        "shape",
        "edge",
        "top clean",
        "top noisy",
        "above",
        "eff. rank",
        "noisy",
        "alignment",
        scheme,
    )
    for i, name in enumerate(result.layers):
        m, n = result.shapes[i]
        table.add_row(
            name.removesuffix(".weight"),
            f"{m}×{n}",
            f"{result.edges[i]:.1f}",
            f"{result.clean[i, 0]:.1f}",
            f"{result.noisy[i, 0]:.1f}",
            str(result.num_above_edge[i]),
            f"{result.effective_rank_clean[i]:.0f}",
            f"{result.effective_rank_noisy[i]:.0f}",
            f"{result.alignment_noisy[i]:.3f}",
            f"{result.alignment_restored[i]:.3f}",
        )
    console = Console()
    console.print(table)
    for what, value in spectra.headline(result).items():
        console.print(f"{what}: {value}", highlight=False)
    console.print(f"ran on: {result.description}", highlight=False, soft_wrap=True)
    console.print(result.privacy, highlight=False, soft_wrap=True)
