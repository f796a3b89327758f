"""LoRA's projection noise on real layers' gradients: ``python -m lowrank_dp.lora``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from lowrank_dp import _terminal, _validate, artifacts, theory
from lowrank_dp.experiments import lora_noise
from lowrank_dp.experiments.gradients import GradientConfig

ANGLE, EPSILON = 0.1, 1.0
app = _terminal.new_app(
    "Measure LoRA's projection noise on real layers' gradients, beside the theory."
)


@app.command()
def measure(
    model: str = typer.Option("", help="Backbone; the default is minilm if installed, else tiny."),
    task: str = typer.Option("sst2", help="Task whose gradients are projected."),
    rank: list[int] = typer.Option([1, 4, 16, 64], help="Rank of A; give it several times."),
    batch_size: int = typer.Option(32, help="Examples whose clipped gradients are summed."),
    max_grad_norm: float = typer.Option(1.0, help="Clipping bound of one example's gradient."),
    max_length: int = typer.Option(64, help="Tokens a text is cut to."),
    draws: int = typer.Option(200, help="Draws of A for each layer and rank."),
    seed: int = typer.Option(0, help="Of head, batch and A."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    output: Path | None = typer.Option(None, help="Folder for lora.json and lora.npz."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of tables."),
) -> None:
    """Measure LoRA's projection noise on real layers' gradients, beside the theory."""
    for value in rank:
        _validate.integer("rank", value)
    _validate.integer("batch_size", batch_size)
    _validate.integer("draws", draws, low=2)
    _validate.integer("seed", seed, low=0)
    config = lora_noise.Config(
        gradients=GradientConfig(
            model=model,
            task=task,
            max_grad_norm=max_grad_norm,
            warm_loss=None,
            max_length=max_length,
            seed=seed,
            device=device,
        ),
        more_models=(),
        batch_size=batch_size,
        ranks=tuple(rank),
        num_draws=draws,
        vector_draws=draws,
    )
    result = lora_noise.run(config)
    if output is not None:
        artifacts.save_result(result, output, "lora", seed=seed, device=device)
    rows, laws = measured_rows(result), exact_laws(result)
    if as_json:
        print(
            json.dumps(
                {
                    "privacy": result.privacy,
                    "description": result.description,
                    "provenance": artifacts.provenance(seed=seed, device=device),
                    "rows": rows,
                    "laws": laws,
                },
                allow_nan=False,
            )
        )
        return
    console = Console()
    console.print(result.privacy, style="bold", markup=False)
    console.print(result.description, markup=False)
    console.print(
        _table(
            "Noise of G A^T A: measured over draws of A (95% interval), and exact",
            ("source", "rank", "variance / |q|^2", "exact", "kurtosis", "exact"),
            [
                (
                    r["source"],
                    str(r["rank"]),
                    f"{r['variance']:.4g} ± {r['variance_ci']:.2g}",
                    f"{r['variance_exact']:.4g}",
                    f"{r['kurtosis']:.3g} ± {r['kurtosis_ci']:.2g}",
                    f"{r['kurtosis_exact']:.3g}",
                )
                for r in rows
            ],
        )
    )
    console.print(
        _table(
            f"Exact laws: TV of one coordinate to a Gaussian, and delta of one vector query at epsilon "
            f"{EPSILON:g}, angle {ANGLE:g}",
            ("n", "rank", "TV exact", "TV bound", "joint TV", "delta exact", "Gaussian reading"),
            [
                (
                    str(law["n"]),
                    str(law["rank"]),
                    *(
                        f"{law[key]:.4g}"
                        for key in ("tv_exact", "tv_bound", "joint_tv", "delta", "delta_gaussian")
                    ),
                )
                for law in laws
            ],
        )
    )


def measured_rows(result: lora_noise.Result) -> list[dict[str, Any]]:
    """One dict a source and rank: variance and kurtosis, measured and exact."""
    keys = (
        "variance",
        "variance_ci",
        "variance_exact",
        "kurtosis",
        "kurtosis_ci",
        "kurtosis_exact",
    )
    return [
        {"source": source, "rank": rank, **{key: float(getattr(result, key)[i, r]) for key in keys}}
        for i, source in enumerate(result.sources)
        for r, rank in enumerate(result.config.ranks)
    ]


def exact_laws(result: lora_noise.Result) -> list[dict[str, Any]]:
    """One dict a width of the measured layers and rank: distances and one query's delta."""
    widths = sorted({int(name.rsplit("x", 1)[1]) for name in result.sources[1:]})
    return [
        {
            "n": n,
            "rank": rank,
            "tv_exact": theory.tv_exact(rank, n),
            "tv_bound": theory.tv_bound(rank, n),
            "joint_tv": theory.joint_tv(rank, n),
            "delta": theory.privacy_profile(EPSILON, rank, n, angle=ANGLE),
            "delta_gaussian": theory.gaussian_privacy_profile(EPSILON, rank, angle=ANGLE),
        }
        for n in widths
        for rank in result.config.ranks
    ]


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def main() -> None:
    """Run the command line and exit."""
    _terminal.run(app)
