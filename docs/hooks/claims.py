"""Rows of the claim index, ``paper_artifacts/README.md``, and the verdicts that README.md shows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "paper_artifacts" / "README.md"
VERDICTS = ("reproduced within limits", "reproduced", "not reproduced", "refuted", "holds")
MAX_WORDS = 12  # in a cell of README's table, which must fit the screen of a phone
# how the claims of the short table begin in the tables of all claims, in the same order
SHOWN = (
    "Restoring the singular values from the noisy gradient alone",
    "DP-SGD with restored gradients reaches a given utility",
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


@dataclass(frozen=True)
class ShortClaim:
    """One row of the table "In short": a claim of the index, its verdict and its artifacts."""

    claim: str
    verdict: str
    artifact: str


def short_claims(text: str) -> list[ShortClaim]:
    """Read the table "In short" of ``text``."""
    rows = text.split("### In short")[1].split("\n#")[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if "|" in row]
    return [ShortClaim(*row) for row in cells[2:]]


def verdict_table(text: str) -> str:
    """README's table of verdicts: the table "In short" of the index ``text``, with links.

    Raises:
        ValueError: a short claim has not exactly one full claim that begins as ``SHOWN`` says, its
            verdict or its artifacts are not those of the full claim, or a cell has too many words.
    """
    lines = ["| claim | verdict | evidence |", "|---|---|---|"]
    for short, beginning in zip(short_claims(text), SHOWN, strict=True):
        found = [row for row in claims(text) if row.claim.startswith(beginning)]
        if len(found) != 1:
            raise ValueError(f"{len(found)} claims begin with {beginning!r}, expected 1")
        if _verdict(short.verdict) != _verdict(found[0].verdict):
            raise ValueError(f"{short.claim!r} and {beginning!r} have different verdicts")
        names = re.findall(r"`([^`]+)`", short.artifact)
        if not set(names) <= set(found[0].artifacts):
            raise ValueError(f"{short.claim!r} names artifacts that {beginning!r} does not")
        for cell in (short.claim, short.verdict):
            if len(cell.split()) > MAX_WORDS:
                raise ValueError(f"{cell!r} has more than {MAX_WORDS} words")
        links = ", ".join(f"[{name}](paper_artifacts/{name}.md)" for name in names)
        lines.append(f"| {short.claim} | {short.verdict} | {links} |")
    return "\n".join(lines).replace("](../", "](")  # README is one folder above the index


def _verdict(cell: str) -> str:
    return next(word for word in VERDICTS if cell.startswith(word))
