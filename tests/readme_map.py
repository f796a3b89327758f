"""The table of modules in README.md, made from the first lines of the package's docstrings.

``python -m tests.readme_map`` writes the table anew; ``test_readme_map`` fails where the table and
the code differ.
"""

import ast
from pathlib import Path

import lowrank_dp
from tests.test_imports import ORDER

PACKAGE = Path(lowrank_dp.__file__).parent
README = PACKAGE.parent / "README.md"
BEGIN, END = "<!-- map: written by `make map` -->", "<!-- end of the map -->"


def first_line(path: Path) -> str:
    """First line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = text.split("\n\n")[0].replace("\n", " ").strip()
    assert line, f"{path} has no docstring"
    return line.removesuffix(".").replace("``", "`").replace("|", "\\|")


def modules_of(room: str) -> list[Path]:
    """A room's files by name, without its own face; a package inside a room has its face first."""
    if (PACKAGE / f"{room}.py").exists():
        return [PACKAGE / f"{room}.py"]
    face = PACKAGE / room / "__init__.py"
    inner = sorted((PACKAGE / room).rglob("*.py"))
    return [path for path in inner if path != face and path.name != "__main__.py"]


def table() -> str:
    """The whole table: a bold row for every room, in the order of imports, then its modules."""
    lines = ["| module | what it holds |", "|---|---|"]
    for room in ORDER:
        face = PACKAGE / room / "__init__.py"
        if face.exists():
            lines.append(f"| **`{room}/`** | **{first_line(face)}** |")
        for path in modules_of(room):
            name = path.relative_to(PACKAGE).as_posix().replace("__init__.py", "")
            lines.append(f"| `{name}` | {first_line(path)} |")
    return "\n".join(lines)


def written(text: str) -> str:
    """README's ``text`` with the table of today's code between the two marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
