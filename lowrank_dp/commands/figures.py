"""Draw the figures: ``python -m lowrank_dp.figures``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lowrank_dp import _terminal, _validate, artifacts
from lowrank_dp.figures import NAMES, compute, config_of, find, show

app = _terminal.new_app("Draw the figures: PNG and PDF in figures/, arrays in paper_artifacts/.")


@app.command()
def main(
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Figure to make, may be repeated: {', '.join(NAMES)}. Default: all."),
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
    names = [_validate.choice("--only", name, NAMES) for name in only or NAMES]
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
        spec = find(name)
        redrawn = redraw or (spec.lengthy and scale == "small")
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
            config = config_of(name, scale, **changes)
            if spec.plan is not None:
                console.print(f"plan: {spec.plan(config)}", highlight=False, soft_wrap=True)
            artifacts.save_result(
                compute(name, config, sources), artifact_folder, name, seed=seed, device=device
            )
        result, figure = show(name, artifact_folder=artifact_folder)  # as a reader would see it
        artifacts.save_figure(figure, output, name)
        columns, rows = spec.rows(result)
        artifacts.save_table(columns, rows, artifact_folder, name, caption=spec.caption)
        summary.append(
            {
                "figure": name,
                "seconds": round(time.perf_counter() - started, 1),
                "headline": spec.headline(result),
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
