"""What a notebook needs of a saved result: its folder, its origin, and the cells of its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_dp import _validate
from lowrank_dp.figures.catalog import find

FOLDER = "paper_artifacts"


def saved_results() -> Path:
    """Return the folder ``paper_artifacts``, from any working directory.

    The folder is searched in the working directory and those above it, then beside the package.
    Raises FileNotFoundError if there is none.
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
    """State where a notebook's numbers come from, once for all its figures.

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
        result: its result.
        keys: number of first columns that name a row, joined by ", ".

    A column's second occurrence is named with " (2)". Raises ValueError for an unknown name.

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
