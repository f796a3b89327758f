"""Rows of the claim index, ``paper_artifacts/README.md``, and the verdicts that README.md shows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "paper_artifacts" / "README.md"
# The claims of README's table of verdicts: how each begins in the index.
SHOWN = (
    "Restoring the singular values from the noisy gradient alone",
    "DP-SGD reaches a given utility in fewer steps",
    "What noise costs in steps",
    "A rank-one preconditioner from public text",
    "Each coordinate of LoRA's noise",
    "So LoRA's noise as a whole",
    "LoRA with a frozen A is differentially private by design",
    "LoRA resists membership inference better",
)


@dataclass(frozen=True)
class Claim:
    """One row of the index: the claim, the artifacts that test it, the verdict and its reason."""

    claim: str
    artifact: str
    verdict: str
    reason: str

    @property
    def artifacts(self) -> list[str]:
        """Names of the artifacts, such as ``alignment``, and paths such as ``benchmarks/x.py``."""
        return re.findall(r"`([^`]+)`", self.artifact)


def claims(text: str) -> list[Claim]:
    """Read the rows of every table of claims in ``text``."""
    found = []
    for line in text.split("## Made by")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and cells[0] != "claim" and "---" not in line:
            found.append(Claim(*cells))
    return found


def commands(text: str) -> dict[str, tuple[str, str]]:
    """Read, per artifact, the command that makes it and what it says about NON-PRIVATE values."""
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (.+) \|$", text, re.MULTILINE)
    return {name: (command, private) for name, command, private in rows}


def verdict_table(text: str) -> str:
    """README's table of verdicts, in the words of the index ``text``.

    Raises:
        ValueError: a claim of ``SHOWN`` is not the beginning of exactly one claim of the index.
    """
    lines = ["| claim | verdict | evidence |", "|---|---|---|"]
    for beginning in SHOWN:
        found = [row for row in claims(text) if row.claim.startswith(beginning)]
        if len(found) != 1:
            raise ValueError(f"{len(found)} claims begin with {beginning!r}, expected 1")
        row = found[0]
        verdict = re.split(r"\. (?=[A-Z])", row.verdict)[0]
        links = ", ".join(f"[{name}](paper_artifacts/{name}.md)" for name in row.artifacts[:2])
        lines.append(f"| {row.claim} | {verdict} | {links} |")
    return "\n".join(lines)
