"""``python -m lowrank_dp.restore``: restore the noisy gradients in a safetensors file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import safetensors
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save

from lowrank_dp import _terminal, artifacts
from lowrank_dp.restore import SCHEMES, restore_gradients

app = _terminal.new_app("Restore the singular values of noisy gradients: post-processing.")


@app.command()
def main(
    input: Annotated[Path, typer.Option(help="safetensors file: name -> noisy gradient.")],
    noise_std: Annotated[
        float,
        typer.Option(help="Standard deviation of each entry's noise, in the gradients' own units."),
    ],
    output: Annotated[Path, typer.Option(help="safetensors file to write.")],
    scheme: Annotated[str, typer.Option(help=f"One of {', '.join(SCHEMES)}.")] = "optimal",
    method: Annotated[str, typer.Option(help="fast or exact.")] = "fast",
    below: Annotated[
        str, typer.Option(help="Matrices with nothing above the edge: keep or zero.")
    ] = "keep",
    option: Annotated[
        list[str] | None,
        typer.Option(help="Option of the scheme as NAME=VALUE, may be repeated, e.g. kappa=1.2."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Restore every matrix of a file; other tensors pass unchanged."""
    try:
        noisy = load_file(input)
    except safetensors.SafetensorError as error:
        raise ValueError(f"--input must be a safetensors file, got {input.name}: {error}") from None
    restored, reports = restore_gradients(
        noisy, noise_std, scheme, method=method, below=below, **_terminal.options(option or [])
    )
    with artifacts.atomic_write(output) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in restored.items()}))
    if as_json:
        print(json.dumps({name: dataclasses.asdict(r) for name, r in reports.items()}, indent=1))
        return
    table = Table("matrix", "shape", "edge", "top", "above", "action", "norm before", "after")
    for name, report in reports.items():
        m, n = report.shape
        table.add_row(
            name,
            f"{m}×{n}",
            f"{report.edge:.3g}",
            "" if report.top is None else f"{report.top:.3g}",
            "" if report.num_above_edge is None else str(report.num_above_edge),
            report.action,
            f"{report.norm_before:.3g}",
            f"{report.norm_after:.3g}",
        )
    Console().print(table)
