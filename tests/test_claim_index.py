"""Index of claims, ``paper_artifacts/README.md``: every claim has a verdict and an artifact."""

import json
import re
import shutil
import subprocess
from pathlib import Path

from docs.hooks.claims import claims

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "paper_artifacts" / "README.md").read_text()
VERDICTS = ("reproduced", "reproduced within limits", "not reproduced", "refuted", "holds")
# a text may state the sign of a difference in words
INTERVAL = r"\d+\.\d+ ± \d+\.\d+|\b\d[\d.e-]* \(\d[\d.e-]* to \d[\d.e-]*\)"


def test_every_claim_has_a_verdict_and_its_artifact():
    found = claims(TEXT)
    assert len(found) >= 15
    for row in found:
        assert any(row.verdict.startswith(word) for word in VERDICTS), row.claim
        assert row.reason, row.claim
        for name in row.artifacts:
            path = ROOT / name if "/" in name else ROOT / "paper_artifacts" / f"{name}.json"
            assert path.is_file(), f"{row.claim}: {name}"


def test_every_interval_in_words_stands_in_a_table():
    """Intervals in README, the claim index, the pages and the notebooks, which are written by hand.

    The tables are generated. The tables of the last commit count too, because `make figures` may
    have computed the tables in the folder from other data.
    """
    folder = ROOT / "paper_artifacts"
    tables = [path.read_text() for path in folder.glob("*.md") if path.stem != "README"]
    if shutil.which("git"):
        tables.append(
            subprocess.run(
                [
                    "git",
                    "grep",
                    "-hE",
                    "±| to ",
                    "HEAD",
                    "--",
                    "paper_artifacts/*.md",
                    ":!paper_artifacts/README.md",
                ],
                cwd=ROOT,
                capture_output=True,
                encoding="utf-8",
                check=False,
            ).stdout
        )
    known = set(re.findall(INTERVAL, "\n".join(tables)))
    pages = [ROOT / "README.md", folder / "README.md", *(ROOT / "docs").rglob("*.md")]
    texts = {path: path.read_text() for path in pages}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        texts[path] = "\n".join(
            "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
        )
    assert sum(len(re.findall(INTERVAL, text)) for text in texts.values()) > 100
    for path, text in texts.items():
        assert set(re.findall(INTERVAL, text)) <= known, path


def test_every_artifact_is_listed_with_its_command():
    paths = [*(ROOT / "paper_artifacts").glob("*.json")]
    assert paths
    for path in paths:
        script = ROOT / "benchmarks" / f"{path.stem}.py"
        made = "benchmarks/" if script.is_file() else "-m lowrank_dp.figures --only "
        assert f"| `{path.stem}` | `python {made}{path.stem}" in TEXT
