"""``python -m lowrank_dp.mia``: measure what a checkpoint reveals about its training records."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank_dp.commands import _console
from lowrank_dp.commands._tables import print_table, say
from lowrank_dp.mia.options import Options

if TYPE_CHECKING:
    from rich.console import Console

    from lowrank_dp.mia.compare import Comparison
    from lowrank_dp.mia.report import Report
    from lowrank_dp.mia.target import Target

app = _console.new_app(
    "Membership inference from a checkpoint. NON-PRIVATE: attacks read the membership bits."
)
CONTRADICTION = 3  # exit code if an attack contradicts the accountant
REPORT = "report.json"
# options that decide where and how fast an attack runs, but not the report
COMPUTING = ("batch_size", "device", "num_workers", "engine")


@app.command()
@_console.options_of(Options, without=("group_column",))
@_console.holding_output
def main(
    given: dict[str, Any],
    model: Annotated[
        Path, typer.Option(help="Folder of the checkpoint: a full model or a PEFT adapter.")
    ],
    compare_with: Annotated[
        list[Path] | None,
        typer.Option(
            "--compare",
            help="Folder of another checkpoint with the same records, to compare; may be repeated.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the report and for trained shadow models. Default: nothing is written."
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace a report of another checkpoint, or with other options, in --output.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the planned attacks and their estimated time, and stop."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Attack a checkpoint by membership inference, and report how much it reveals. NON-PRIVATE.

    The exit code is 3 if an attack contradicts the epsilon that the accountant claims.
    """
    from rich.console import Console

    from lowrank_dp.mia.plan import plan
    from lowrank_dp.mia.target import open_target

    options = Options(**given)
    targets = [open_target(path, options) for path in (model, *(compare_with or []))]
    asked = _asked(targets, options) if output is not None else {}
    if output is not None and not force:
        _check_replaceable(output, asked)
    console = Console(stderr=as_json)
    for line in plan(targets, options):
        say(console, line)

    from lowrank_dp.mia import compare  # after the first line of output
    from lowrank_dp.mia.attack import attack, load

    if compare_with:
        compare.check_comparable(targets, options)
    if dry_run:
        for target in targets:
            load(target, options)  # raises the errors that an attack would raise
        return
    with _folder(output) as folder:
        reports = [attack(target, options, folder / "cache") for target in targets]
    _print(console, reports)
    if output is not None:
        _save(output, reports[0], asked)
    comparison = None
    if len(reports) > 1:
        comparison = compare.compare(targets, reports)  # if refused, the reports are kept
        if output is not None:
            compare.save(comparison, output)
        print_table(console, *compare.table(comparison))
        for line in compare.notes(comparison):
            say(console, line)
    say(console, f"files: {output or 'none written; --output FOLDER keeps the report'}")
    if as_json:
        _print_json(reports[0], comparison)
    if any(report.contradiction for report in reports):
        sys.exit(CONTRADICTION)


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    """Yield the folder of signals and shadows: ``output``, or a temporary folder."""
    if output is not None:
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="lowrank_dp-mia-") as temporary:
        yield Path(temporary)


def _asked(targets: Sequence[Target], options: Options) -> dict[str, Any]:
    """Return the inputs that decide a report: the weights, and all options but ``COMPUTING``."""
    from lowrank_dp.artifacts.jsonable import to_jsonable
    from lowrank_dp.mia.caching import weight_hash

    asked = {name: value for name, value in to_jsonable(options).items() if name not in COMPUTING}
    return asked | {"checkpoints": [weight_hash(target.folder) for target in targets]}


def _check_replaceable(output: Path, asked: dict[str, Any]) -> None:
    """Raise ValueError if ``output`` holds a report of other checkpoints or options."""
    from lowrank_dp.artifacts import files

    if not (output / REPORT).exists():
        return
    try:
        before = files.read_json(output / REPORT).get("asked")
    except ValueError:
        before = None
    before = before if isinstance(before, dict) else {}
    if differing := [name for name in asked if before.get(name) != asked[name]]:
        raise ValueError(
            f"--output {output} holds a report of other {', '.join(differing)}: choose another "
            "folder, or replace the report with --force"
        )


def _save(folder: Path, report: Report, asked: dict[str, Any]) -> None:
    from lowrank_dp import artifacts
    from lowrank_dp.mia import rendering
    from lowrank_dp.plots.roc import plot_roc

    artifacts.save_figure(plot_roc(report), folder, "roc", privacy=rendering.LABEL)
    rendering.save(report, folder, asked)


def _print(console: Console, reports: Sequence[Report]) -> None:
    from lowrank_dp.mia import rendering

    for report in reports:
        for line in rendering.header(report):
            if not line.startswith("format "):  # the planned attacks already state the format
                say(console, line)
        print_table(console, *rendering.table(report))
        for line in (*rendering.footer(report), rendering.LABEL):
            say(console, line)


def _print_json(report: Report, comparison: Comparison | None) -> None:
    from lowrank_dp.mia import compare, rendering

    document = rendering.as_json(report)
    if comparison is not None:
        document["comparison"] = compare.as_json(comparison)
    print(json.dumps(document, indent=1, allow_nan=False))
