"""Pages of the results: one per artifact, with its figure, claims, table and provenance."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from docs.hooks.claims import INDEX, ROOT, claims, commands, short_claims

FOLDER = ROOT / "paper_artifacts"
KINDS = {"json": "result", "npz": "arrays", "csv": "table", "tex": "LaTeX"}


def names() -> list[str]:
    """Names of the saved results, in the order of the list of commands in the index."""
    listed = commands(INDEX.read_text(encoding="utf-8"))
    return [name for name in listed if (FOLDER / f"{name}.json").exists()]


def files() -> list[Path]:
    """Figures, results and configurations that the pages link to."""
    found = [*(ROOT / "figures").iterdir(), *(FOLDER / "configs").iterdir()]
    return sorted(found + [path for path in FOLDER.iterdir() if path.suffix[1:] in KINDS])


def index() -> str:
    """Markdown of the claim index, in which the name of an artifact is a link to its page."""
    text = INDEX.read_text(encoding="utf-8")
    for row in claims(text):
        cells = f"| {row.claim} | {row.artifact} |"
        text = text.replace(cells, f"| {row.claim} | {_linked(row.artifact)} |")
    for short in short_claims(text):
        cells = f"| {short.verdict} | {short.artifact} |"
        text = text.replace(cells, f"| {short.verdict} | {_linked(short.artifact)} |")
    return text


def _linked(artifacts: str) -> str:
    def link(name: re.Match[str]) -> str:
        page = f"../{name[1]}" if "/" in name[1] else f"{name[1]}.md"
        return f"[{name[1]}]({page})"

    return re.sub(r"`([^`]+)`", link, artifacts)


def page(name: str) -> str:
    """Markdown of one result's page; its links are those of a file in ``paper_artifacts``."""
    text = INDEX.read_text(encoding="utf-8")
    result = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    caption, _, table = (FOLDER / f"{name}.md").read_text(encoding="utf-8").partition("\n\n")
    parts = [f"# {name}", _privacy(result["privacy"])]
    if (ROOT / "figures" / f"{name}.png").exists():
        parts.append(f"![Figure {name}](../figures/{name}.png)")
    parts += [caption, _claims(name, text), "## Table", table.strip(), "## How it was made"]
    parts += [_provenance(result, commands(text)[name][0]), _links(name)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _privacy(words: str) -> str:
    kind = "warning" if words.startswith("NON-PRIVATE") else "note"
    return f'!!! {kind} "Privacy"\n    {words}'


def _claims(name: str, text: str) -> str:
    found = [row for row in claims(text) if name in row.artifacts]
    if not found:
        return ""
    lines = [f"- {row.claim}: **{row.verdict}**" for row in found]
    return "\n".join(["## Claims that it tests", "", *lines])


def _provenance(result: dict[str, Any], command: str) -> str:
    made = result["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    rows = [
        ("command", f"`{command}`"),
        ("model and data", result.get("description") or "none"),
        ("code", f"lowrank_dp {made['lowrank_dp']}, commit `{(made['git_commit'] or '')[:10]}`"),
        ("versions", f"Python {made['python']}, {versions}"),
        ("machine", f"{made['machine']}, {made['cpus']} cores, device {made['device']}"),
    ]
    config = json.dumps(result["config"], indent=1)
    inner = "\n".join(f"    {line}" for line in f"```json\n{config}\n```".splitlines())
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    return f'{table}\n\n??? note "Configuration"\n{inner}'


def _links(name: str) -> str:
    links = [
        f"[{what} (`.{ending}`)]({name}.{ending})"
        for ending, what in KINDS.items()
        if (FOLDER / f"{name}.{ending}").exists()
    ]
    if (ROOT / "figures" / f"{name}.pdf").exists():
        links.append(f"[figure (`.pdf`)](../figures/{name}.pdf)")
    return "Files: " + ", ".join(links) + "."
