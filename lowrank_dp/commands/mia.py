"""``python -m lowrank_dp.mia``: how much a checkpoint tells about who was trained on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lowrank_dp import _terminal, artifacts
from lowrank_dp.data import Columns
from lowrank_dp.engines import ENGINES
from lowrank_dp.mia import compare, rendering
from lowrank_dp.mia.attack import ATTACKS, Options, attack, load, open_target
from lowrank_dp.mia.plan import plan
from lowrank_dp.plots.roc import plot_roc

app = _terminal.new_app("Membership inference from a checkpoint: NON-PRIVATE, it reads who was in.")
CONTRADICTION = 3


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Checkpoint folder, full or PEFT.")],
    attacks: Annotated[
        str, typer.Option(help=f"auto, or names with commas between: {', '.join(ATTACKS)}.")
    ] = "auto",
    primary: Annotated[
        str,
        typer.Option(help="Attack that the verdict rests on. Default: lira-offline, base or loss."),
    ] = "",
    shadows: Annotated[
        int, typer.Option(help="Train so many shadow models by the checkpoint's own recipe.")
    ] = 0,
    shadow_dir: Annotated[
        Path | None, typer.Option(help="Folder of shadows trained before.")
    ] = None,
    members: Annotated[
        Path | None,
        typer.Option(
            help="File of records that were trained on, for a checkpoint without membership.json: "
            "JSON Lines or another table."
        ),
    ] = None,
    nonmembers: Annotated[
        Path | None, typer.Option(help="File of records that were not trained on.")
    ] = None,
    population: Annotated[
        Path | None,
        typer.Option(help="File of records in no model. Default: the validation split."),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the texts; for a causal language model, of plain texts that are scored "
            "whole."
        ),
    ] = None,
    pair_column: Annotated[str | None, typer.Option(help="Column of the second texts.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels.")] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="Column of the prompts of a causal language model.")
    ] = None,
    target_column: Annotated[
        str | None,
        typer.Option(help="Column of the texts that follow the prompts, which are scored."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="How a causal language model that was trained elsewhere was shown its records, such "
            "as '### Input: {prompt}\\n### Response: {target}', or '{text}' for plain texts."
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens that each text is cut to, for a checkpoint that was trained elsewhere."
        ),
    ] = None,
    base: Annotated[
        str,
        typer.Option(
            help="Model that the checkpoint was fine-tuned from, in place of the one that its "
            "manifest or its adapter names."
        ),
    ] = "",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the task's data, in place of LOWRANK_DP_DATA.")
    ] = None,
    fpr: Annotated[
        str, typer.Option(help="False-positive rates, with commas between.")
    ] = "0.01,0.001",
    delta: Annotated[
        float | None, typer.Option(help="Of the lower bound. Default: the accountant's.")
    ] = None,
    guesses: Annotated[
        int, typer.Option(help="Of the one-run audit, fixed beforehand; 0 for none.")
    ] = 0,
    white_box: Annotated[
        bool,
        typer.Option("--white-box", help="Also the gradient's norm, and the projection attack."),
    ] = False,
    compare_with: Annotated[
        list[Path] | None,
        typer.Option("--compare", help="Another checkpoint on the same records; may be repeated."),
    ] = None,
    max_records: Annotated[int | None, typer.Option(help="Attack a random subset.")] = None,
    batch_size: Annotated[int, typer.Option(help="Records in memory at a time.")] = 64,
    seed: Annotated[int, typer.Option(help="Of shadows, halves and subsets.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    num_workers: Annotated[
        int | None, typer.Option(help="Shadows trained at a time. Default: one a core.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help=f"Where shadows are trained: {', '.join(ENGINES)}.")
    ] = "loky",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report. Default: mia/ in the checkpoint.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and how long it takes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Attack a checkpoint, and say what it leaks. Exit 3: more than its accountant claims."""
    options = Options(
        attacks=() if attacks == "auto" else tuple(attacks.split(",")),
        primary=primary,
        num_shadows=shadows,
        shadow_dir=shadow_dir,
        members=members,
        nonmembers=nonmembers,
        population=population,
        base=base,
        data_dir=data_dir,
        fpr=_rates(fpr),
        delta=delta,
        guesses=guesses,
        white_box=white_box,
        max_records=max_records,
        batch_size=batch_size,
        seed=seed,
        device=device,
        num_workers=num_workers,
        engine=engine,
        template=template,
        max_length=max_length,
        columns=Columns(
            text=text_column,
            pair=pair_column,
            label=label_column,
            prompt=prompt_column,
            target=target_column,
        ),
    )
    folder = output or model / "mia"
    targets = [open_target(path, options) for path in (model, *(compare_with or []))]
    console = Console(stderr=as_json)
    for line in plan(targets, options):
        console.print(line, highlight=False, soft_wrap=True)
    if dry_run:
        for target in targets:
            load(target, options)  # refuses what an attack would refuse
        return
    reports = [attack(target, options, folder / "cache") for target in targets]
    rendering.save(reports[0], folder)
    artifacts.save_figure(plot_roc(reports[0]), folder, "roc")
    for one in reports:
        rendering.show(one, console)
    comparison = None
    if len(reports) > 1:
        comparison = compare.compare(targets, reports)
        compare.save(comparison, folder)
        compare.show(comparison, console)
    console.print(f"files: {folder}", highlight=False, soft_wrap=True)
    if as_json:
        document = rendering.as_json(reports[0])
        if comparison is not None:
            document["comparison"] = compare.as_json(comparison)
        print(json.dumps(document, indent=1, allow_nan=False))
    if any(one.contradiction for one in reports):
        sys.exit(CONTRADICTION)


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(rate) for rate in text.split(","))
    except ValueError:
        raise ValueError(f"--fpr must be numbers with commas between, got {text!r}") from None
