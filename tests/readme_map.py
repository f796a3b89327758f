"""The generated tables of README.md and of the claim index.

README.md has a table of the packages, from their docstrings, and a table of the verdicts of the
claims. The claim index has a table of the verdicts on larger models, from their results. ``python
-m tests.readme_map`` writes the tables; ``test_readme_map`` fails where a table and its source
differ. The map of all modules, which ``table`` returns, is a page of the site.
"""

import ast
from pathlib import Path

import lowrank_dp
from docs.hooks.claims import INDEX, verdict_table
from lowrank_dp.artifacts import load_result
from lowrank_dp.experiments import tasks_large, tasks_large_verdicts
from tests.test_imports import ORDER

PACKAGE = Path(lowrank_dp.__file__).parent
README = PACKAGE.parent / "README.md"
MARKS = {
    "map": ("<!-- map: written by `make map` -->", "<!-- end of the map -->"),
    "verdicts": ("<!-- verdicts: written by `make map` -->", "<!-- end of the verdicts -->"),
}
LARGER_MARKS = (
    "<!-- larger models: written by `make map` -->",
    "<!-- end of the larger models -->",
)
# artifact -> the model, and what it stands for
LARGER = {
    "tasks_mpnet": "MPNet base, 110 M, RoBERTa-base's sizes",
    "tasks_gemma": "Gemma 3, 270 M, 4-bit build",
    "tasks_qwen": "Qwen2.5-Coder-Instruct, 0.5 B, 4-bit build",
}


def first_line(path: Path) -> str:
    """First line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = text.split("\n\n")[0].replace("\n", " ").strip()
    assert line, f"{path} has no docstring"
    return line.removesuffix(".").replace("``", "`").replace("|", "\\|")


def face(room: str) -> Path:
    """The file with the docstring of a package or of a top-level module."""
    inner = PACKAGE / room / "__init__.py"
    return inner if inner.exists() else PACKAGE / f"{room}.py"


def modules_of(room: str) -> list[Path]:
    """Files of a package by name, without its ``__init__.py``; that of a subpackage comes first."""
    if (PACKAGE / f"{room}.py").exists():
        return [PACKAGE / f"{room}.py"]
    inner = sorted((PACKAGE / room).rglob("*.py"))
    return [path for path in inner if path != face(room) and path.name != "__main__.py"]


def table() -> str:
    """Table of all modules: per package a bold row, then its modules, in the order of imports."""
    lines = ["| module | what it holds |", "|---|---|"]
    for room in ORDER:
        if face(room).name == "__init__.py":
            lines.append(f"| **`{room}/`** | **{first_line(face(room))}** |")
        for path in modules_of(room):
            name = path.relative_to(PACKAGE).as_posix().replace("__init__.py", "")
            lines.append(f"| `{name}` | {first_line(path)} |")
    return "\n".join(lines)


def packages() -> str:
    """README's table: one row per package and public top-level module, in the order of imports."""
    lines = ["| module | what it holds |", "|---|---|"]
    for room in ORDER:
        if not room.startswith("_"):
            lines.append(f"| `{room}` | {first_line(face(room))} |")
    return "\n".join(lines)


def larger_models(folder: Path = INDEX.parent) -> str:
    """The claim index's table of larger models: the verdicts of the results that are saved."""
    lines = ["| model | claim | artifact | verdict | in one line |", "|---|---|---|---|---|"]
    for name, model in LARGER.items():
        if not (folder / f"{name}.json").is_file():
            lines.append(f"| {model} | both | `{name}` | not run yet | No result is saved |")
            continue
        result = load_result(folder, name, tasks_large.Result)
        for claim, verdict, reason in tasks_large_verdicts.verdicts(result):
            lines.append(f"| {model} | {claim} | `{name}` | {verdict} | {reason} |")
    return "\n".join(lines)


def index(text: str, folder: Path = INDEX.parent) -> str:
    """The claim index's ``text`` with the table of results of ``folder`` between its marks."""
    begin, end = LARGER_MARKS
    before, rest = text.split(begin)
    return f"{before}{begin}\n{larger_models(folder)}\n{end}{rest.split(end)[1]}"


def written(text: str) -> str:
    """README's ``text`` with the tables of the current code and index between their marks."""
    made = {"map": packages(), "verdicts": verdict_table(INDEX.read_text(encoding="utf-8"))}
    for name, (begin, end) in MARKS.items():
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{made[name]}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    INDEX.write_text(index(INDEX.read_text(encoding="utf-8")), encoding="utf-8")
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
