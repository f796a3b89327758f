"""Saved results for notebooks: folder of the results, origin of the numbers, cells of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_dp import _validate
from lowrank_dp.figures.catalog import find

FOLDER = "paper_artifacts"


def saved_results() -> Path:
    """Return the folder ``paper_artifacts``, from any working directory.

    The folder is searched in the working directory, in the directories above it, and then beside
    the package. Raises FileNotFoundError if no such folder exists.
    """
    here = Path.cwd()
    for parent in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (parent / FOLDER / "README.md").is_file():
            return parent / FOLDER
    raise FileNotFoundError(
        f"no folder {FOLDER} in {here}, above it or beside the package: name the folder of the "
        "saved results"
    )


def notice(scale: str, recompute: bool) -> str:
    """Return a sentence that states the origin of a notebook's numbers.

    Args:
        scale: "small" or "full", as for :func:`lowrank_dp.figures.show`.
        recompute: whether the experiments run instead of loading their saved results.
    """
    _validate.choice("scale", scale, ("small", "full"))
    if not recompute:
        return "Saved results are shown. RECOMPUTE is False, so SCALE has no effect."
    kind = "TRIAL: computed anew at the small scale" if scale == "small" else "Computed anew"
    return f"{kind}. The text about the saved results is left out, since it quotes their numbers."


def cells(name: str, result: Any, keys: int = 1) -> dict[str, dict[str, str]]:
    """Return the formatted cells of a figure's table, by row and by column.

    Args:
        name: name in ``figures.NAMES``.
        result: result of the figure.
        keys: number of columns, from the left, that name a row; their cells are joined by ", ".

    The second of two columns of one name gets the suffix " (2)". Raises ValueError for an unknown
    name.

    >>> columns = ["arm", "gain", "less DP-Adam", "loss", "less DP-Adam"]
    >>> _by_column(columns, ["mean", "1", "2", "3", "4"])["less DP-Adam (2)"]
    '4'
    """
    columns, rows = find(name).rows(result)
    return {", ".join(row[:keys]): _by_column(columns, row) for row in rows}


def _by_column(columns: list[str], row: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for column, cell in zip(columns, row, strict=True):
        named[f"{column} (2)" if column in named else column] = cell
    return named
