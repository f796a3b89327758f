"""Pages of the reference: the map of modules, the options of each command, and one per package."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re

from lowrank_dp.__main__ import COMMANDS, main
from tests.readme_map import PACKAGE, face, first_line, modules_of, table
from tests.test_imports import ORDER

WIDTH = "88"  # columns of the help texts


def rooms() -> list[str]:
    """Packages and top-level modules with public names, in the order of their imports."""
    return [room for room in ORDER if not room.startswith("_") and room not in ("commands",)]


def public_names(room: str) -> list[str]:
    """Names in the ``__all__`` of the package ``room``; none if the package has no ``__all__``."""
    for node in ast.parse(face(room).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value), key=str.lower)
    return []


def page(room: str) -> str:
    """Markdown of one package's page.

    A package that lists its names has an entry for each name. A package that lists none, and a
    top-level module, have every name without an underscore, module by module.
    """
    title, first = f"# `lowrank_dp.{room}`", f"{first_line(face(room))}."
    names = public_names(room)
    if names:
        entries = [f"::: lowrank_dp.{room}.{name}" for name in names]
        return "\n\n".join([title, first, *entries]) + "\n"
    entries = []
    for path in modules_of(room):
        module = path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
        if not path.name.startswith("_"):
            entries += [f"## `{module}`", f"::: {module}"]
    return "\n\n".join([title, first, *entries]) + "\n"


def index() -> str:
    """Markdown of the map of all modules."""
    text = (
        "Each package and top-level module imports only from those above it in the table; a test "
        "enforces this order. The table is made from the first line of every module."
    )
    pages = "\n".join(
        f"- [`lowrank_dp.{room}`]({room}.md): {first_line(face(room))}" for room in rooms()
    )
    return f"# Reference\n\n{pages}\n\n## Map of modules\n\n{text}\n\n{table()}\n"


def command_page() -> str:
    """Markdown of the help text of every command."""
    parts = [
        "# Commands",
        "`lowrank-dp COMMAND` is the same as `python -m lowrank_dp.COMMAND`. Bad input gives one "
        "line on stderr and exit code 2.",
    ]
    for command in COMMANDS:
        parts += [f"## {command}", f"```text\n{_help(command)}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(command: str) -> str:
    said, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([command, "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    # the usage names the running program, which is mkdocs or pytest here
    return re.sub(
        r"^Usage: .* \[", f"Usage: python -m lowrank_dp.{command} [", said.getvalue().strip()
    )
