"""Render a report as lines and a table, and as files: report.json, scores.csv and summary.md.

Lines, table and files are NON-PRIVATE, because they are computed from membership bits. report.json
and summary.md state this. scores.csv is a plain table, for programs that read tables, and holds the
membership bits themselves.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_dp import artifacts
from lowrank_dp._rounding import rounded_down, rounded_up
from lowrank_dp.artifacts import files
from lowrank_dp.mia.options import ATTACKS, CONFIDENCE, SHADOW_ATTACKS
from lowrank_dp.mia.report import Attack, Report

LABEL = "NON-PRIVATE: computed from membership bits"


def save(report: Report, folder: Path, asked: Mapping[str, Any]) -> None:
    """Write the three files, each atomically.

    ``asked`` holds the options and the checkpoints' hashes that the report was made from.
    """
    files.write_json(folder / "report.json", as_json(report) | {"asked": asked})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "is_member", *report.scores])
    for row in zip(report.ids, report.is_member.astype(int), *report.scores.values(), strict=True):
        writer.writerow([*row[:2], *(repr(float(value)) for value in row[2:])])
    with artifacts.atomic_write(folder / "scores.csv") as file:
        file.write(text.getvalue().encode())
    columns, rows = table(report)
    lines = [
        f"# Membership inference on {Path(report.model).name}",
        "",
        *header(report),
        "",
        artifacts.markdown_table(columns, rows),
        "",
        *footer(report),
        "",
        LABEL,
    ]
    with artifacts.atomic_write(folder / "summary.md") as file:
        file.write(("\n".join(lines) + "\n").encode())


def header(report: Report) -> list[str]:
    """Return the lines above the table: model, privacy statement, records, format, and checks."""
    members = int(report.is_member.sum())
    losses = (
        f"; train loss {report.train_loss:.3g} / eval {report.eval_loss:.3g}"
        if report.train_loss is not None
        else ""
    )
    base = (
        "model before fine-tuning: not known"
        if report.base is None
        else f"AUC before fine-tuning {_interval(report.base)}"
    )
    return [
        f"model    {Path(report.model).name}: {report.description}{losses}",
        f"privacy  {report.privacy}",
        f"records  {members:,} in / {len(report.is_member) - members:,} out, sampling "
        f"{report.sampling}, overlap 0, copies left out {len(report.left_out):,}, near-duplicates "
        f"across sides {len(report.near_duplicates):,}",
        f"format   {report.format.description}",
        f"learned  {report.learning.description}: "
        f"{'better' if report.learning.better else 'NO better'} than chance (99%)",
        f"shift    {report.shift}: blind AUC {_interval(report.blind)}, {base} (99%)",
        f"control  {report.primary} against randomly permuted membership: AUC "
        f"{_interval(report.control)} (99%)",
    ]


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Tabulate the report, one row per attack, with a star at the primary attack."""
    rates = list(report.attacks[0].tpr)
    columns = ["attack", "AUC [95%]"]
    for rate in rates:
        columns += [f"TPR@{float(rate):.3g} [95%]", "realised FPR"]
    columns.append(f"epsilon >= [{_percent(report.bound_confidence)}]")
    rows = []
    for attack in report.attacks:
        shadows = f" ({report.num_shadows})" if attack.name in SHADOW_ATTACKS else ""
        star = "*" if attack.name == report.primary else ""
        cells = [f"{attack.name}{star}{shadows}", _interval(attack.auc)]
        for rate in rates:
            cells += _tpr(attack, rate)
        rows.append([*cells, rounded_down(attack.epsilon.epsilon, 3)])
    return columns, rows


def footer(report: Report) -> list[str]:
    """Return the lines below the table: lower bound and accountant's epsilon, and verdict."""
    claimed = (
        "none"
        if report.accountant_epsilon is None
        else f"epsilon <= {rounded_up(report.accountant_epsilon)} at delta "
        f"{rounded_up(report.delta, 6)}"
    )
    worth = (
        f"The bound is no proof: {report.objection}."
        if report.objection
        else "The bound is evidence of a leak; a low bound is no guarantee."
    )
    lines = [
        f"epsilon >= {rounded_down(report.lower_bound, 3)} ({_percent(CONFIDENCE)}, "
        f"{_methods(report)}, delta {rounded_down(report.delta, 6)}); accountant: {claimed}. "
        f"{worth}",
        "This is a single run and no ranking: compare methods over at least 3 seeds.",
        f"verdict  {report.verdict}",
    ]
    if report.exceeds_claim:  # in all digits: rounded, the two numbers may look equal
        comparison = (
            f"the lower bound {report.lower_bound!r} exceeds the accountant's epsilon "
            f"{report.accountant_epsilon!r}"
        )
        lines.append(
            f"no contradiction, although {comparison}: {report.objection}"
            if report.objection
            else f"CONTRADICTION: {comparison}"
        )
    if report.unavailable:
        lines.insert(
            0,
            "not made: " + "; ".join(f"{name} ({why})" for name, why in report.unavailable.items()),
        )
    return lines


def as_json(report: Report) -> dict[str, Any]:
    """Return the report without the scores, in JSON's types."""
    document: dict[str, Any] = artifacts.to_jsonable(report)
    del document["scores"], document["counted"]
    document["is_member"] = report.is_member.astype(int).tolist()
    document["label"] = LABEL
    document["contradiction"], document["lower_bound"] = report.contradiction, report.lower_bound
    if report.accountant_epsilon is not None and math.isinf(report.accountant_epsilon):
        document["accountant_epsilon"] = "infinite"  # JSON has no infinity
    document["meaning"] = {attack.name: ATTACKS[attack.name] for attack in report.attacks}
    return document


def _methods(report: Report) -> str:
    """Name the method of the lower bound; of two bounds, give both and their confidence."""
    if report.one_run_epsilon is None:
        return f"{report.primary}, split threshold"
    return (
        f"the larger of two bounds at {_percent(report.bound_confidence)} each: {report.primary}, "
        f"split threshold, and one-run audit {rounded_down(report.one_run_epsilon, 3)}"
    )


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.4g}%"


def _interval(auc: Any) -> str:
    return f"{auc.value:.3f} [{auc.ci[0]:.3f}, {auc.ci[1]:.3f}]"


def _tpr(attack: Attack, rate: str) -> list[str]:
    found = attack.tpr[rate]
    if found is None:
        return [f"n/a (needs {int(np.ceil(1 / float(rate))):,} out)", ""]
    return [f"{found.tpr:.3f} [{found.ci[0]:.3f}, {found.ci[1]:.3f}]", f"{found.fpr:.4f}"]
