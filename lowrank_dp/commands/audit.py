"""``python -m lowrank_dp.audit``: audit a run's privacy by canaries in its training loop."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank_dp._rounding import rounded_down, rounded_up
from lowrank_dp.audit.request import Request
from lowrank_dp.commands import _console
from lowrank_dp.commands._tables import print_table, say

if TYPE_CHECKING:
    from rich.console import Console

    from lowrank_dp.audit.auditing import Report
    from lowrank_dp.audit.canaries import Audited

app = _console.new_app(
    "Lower bound on the epsilon of a run, by canaries in its training loop. NON-PRIVATE."
)
CONTRADICTION = 3  # exit code if the audit contradicts the accountant
REPORT = "report.json"


@app.command()
@_console.options_of(Request)
@_console.holding_output
def main(
    given: dict[str, Any],
    output: Annotated[
        Path | None,
        typer.Option(
            help="New or empty folder for the report. Default: the report is not saved.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the planned runs and their time, and stop."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Audit the training loop of a private run by canaries. NON-PRIVATE.

    The command takes the options of the run, and the design and sizes of the audit. The exit code
    is 3 if the audit contradicts the accountant.
    """
    request = Request(**given)
    if output is not None and any(item.name != ".lock" for item in output.iterdir()):
        raise ValueError(f"--output must be a new or empty folder, got {str(output)!r}")
    from rich.console import Console

    from lowrank_dp.audit.auditing import audit_opened
    from lowrank_dp.audit.canaries import open_audit

    console = Console(stderr=as_json)
    audited = open_audit(request.run, request.design.num_canaries)
    _print_plan(console, audited, request)
    if dry_run:
        return
    report = audit_opened(audited, request.design)
    _print(console, report)
    if as_json:
        print(json.dumps(as_document(report), indent=1, allow_nan=False))
    if output is not None:
        _save(output, report)  # after the printing, so that a failed write loses no result
    say(console, f"files: {output or 'none written; --output FOLDER keeps the report'}")
    if report.contradictions:
        sys.exit(CONTRADICTION)


def as_document(report: Report) -> dict[str, Any]:
    """Return a report as JSON types; an infinite epsilon becomes the text "infinite"."""
    from dataclasses import replace

    from lowrank_dp.artifacts.jsonable import to_jsonable

    finite = [
        replace(b, epsilon=b.epsilon if math.isfinite(b.epsilon) else -1.0) for b in report.bounds
    ]
    document: dict[str, Any] = to_jsonable(replace(report, bounds=tuple(finite)))
    for bound in document["bounds"]:
        if bound["epsilon"] < 0:
            bound["epsilon"] = "infinite"
    if not math.isfinite(document["epsilon"]):
        document["epsilon"] = "infinite"
    return document


def _save(folder: Path, report: Report) -> None:
    from dataclasses import replace

    from lowrank_dp import artifacts

    stamped = replace(report, provenance=artifacts.provenance(device=report.config["device"]))
    artifacts.write_json(folder / REPORT, as_document(stamped))


def _print_plan(console: Console, audited: Audited, request: Request) -> None:
    from lowrank_dp.audit.auditing import LABEL, describe_audit
    from lowrank_dp.audit.timing import estimated_seconds

    design = request.design
    seconds = estimated_seconds(audited, design)
    say(console, f"audit: {design.design}: {describe_audit(audited, design)}")
    say(
        console,
        f"plan: {design.num_runs * audited.setup.config.steps:,} steps, about {seconds:.0f} s "
        "(estimated from the time of the canaries' gradients)",
    )
    say(console, LABEL)


def _print(console: Console, report: Report) -> None:
    say(console, f"claim: {report.statement}")
    say(
        console,
        f"epsilon: {rounded_up(report.epsilon)} at delta {rounded_up(report.delta, 6)} by the "
        "accountant",
    )
    for bound in report.bounds:
        say(console, f"  >= {rounded_down(bound.epsilon)} by {bound.method}")
    say(
        console,
        f"epsilon >= {rounded_down(report.lower_bound)} "
        f"({rounded_down(round(100 * report.confidence, 9))}%, one-sided, the largest of these "
        "bounds)",
    )
    if report.lines:
        print_table(
            console,
            ["fact", "expected", "seen", "p-value", "verdict"],
            [
                [
                    line.what,
                    line.expected,
                    line.seen,
                    "" if line.p_value is None else f"{line.p_value:.2g}",
                    "as claimed" if line.passed else "NOT AS CLAIMED",
                ]
                for line in report.lines
            ],
            title=f"Laws (the tests together reject a correct run with probability at most "
            f"{report.design.level:g}):",
        )
    if report.objection is not None:
        say(console, f"checks of train: {report.objection or 'all passed'}")
    for found in report.power:
        factor = "none up to 32" if found.factor is None else f"f = {found.factor:.3f}"
        say(console, f"power 0.8: {found.fault}: {factor}, by {found.by}")
    say(console, f"verdict: {report.verdict}{_reasons(report)}")


def _reasons(report: Report) -> str:
    if not report.contradictions:
        return " with the accountant; a lower bound is no proof of privacy"
    return ": " + "; ".join(report.contradictions)
