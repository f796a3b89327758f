"""``paper_artifacts/README.md``: every claim has a verdict, and an artifact that is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "paper_artifacts" / "README.md").read_text()
VERDICTS = ("reproduced", "reproduced within limits", "not reproduced", "refuted", "holds")


def claims():
    for line in TEXT.split("## Made by")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and cells[0] != "claim" and "---" not in line:
            yield cells


def test_every_claim_has_a_verdict_and_its_artifact():
    found = list(claims())
    assert len(found) >= 15
    for claim, artifact, verdict, line in found:
        assert any(verdict.startswith(word) for word in VERDICTS), claim
        assert line, claim
        for name in re.findall(r"`([^`]+)`", artifact):
            path = ROOT / name if "/" in name else ROOT / "paper_artifacts" / f"{name}.json"
            assert path.is_file(), f"{claim}: {name}"


def test_every_artifact_is_listed_with_its_command():
    for path in (ROOT / "paper_artifacts").glob("*.json"):
        assert f"| `{path.stem}` | `python -m lowrank_dp.figures --only {path.stem}" in TEXT
