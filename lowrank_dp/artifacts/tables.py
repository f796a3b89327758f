"""Save tables (CSV, Markdown, LaTeX) and figures (PNG, PDF).

This module formats the tables itself, because pandas needs two more packages for Markdown and
LaTeX, and its output differs from the committed tables in rules and escapes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_dp.artifacts.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        **{c: "\\" + c for c in "&%$#_{}"},
    }
)


def save_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    folder: str | Path,
    name: str,
    *,
    caption: str,
) -> list[Path]:
    """Save a table as ``NAME.csv``, ``NAME.md`` and ``NAME.tex``.

    Args:
        columns: names of the columns.
        rows: cells of each row, one per column; every cell is written as ``str(cell)``, so numbers
            are formatted beforehand.
        folder: where to save; created if missing.
        name: file name without suffix.
        caption: text above the Markdown table and in the LaTeX table; the CSV file has none.

    Returns:
        The paths of the three files.

    Raises:
        ValueError: if a row does not have one cell per column; no file is touched then.
    """
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"rows must each have {len(columns)} cells, one per column")
    cells = [[str(cell) for cell in row] for row in rows]
    paths = []
    for suffix, content in (
        (".csv", _csv_table(columns, cells)),
        (".md", f"{caption}\n\n{markdown_table(columns, rows)}\n"),
        (".tex", _latex_table(columns, cells, caption)),
    ):
        path = Path(folder) / f"{name}{suffix}"
        with atomic_write(path) as file:
            file.write(content.encode())
        paths.append(path)
    return paths


def _csv_table(columns: Sequence[str], cells: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *cells])
    return text.getvalue()


def _latex_table(columns: Sequence[str], cells: list[list[str]], caption: str) -> str:
    body = [" & ".join(map(_latex, row)) + r" \\" for row in cells]
    lines = [
        r"\begin{table}",
        rf"\caption{{{_latex(caption)}}}",
        rf"\begin{{tabular}}{{{'l' * len(columns)}}}",
        r"\hline",
        " & ".join(map(_latex, columns)) + r" \\",
        r"\hline",
        *body,
        r"\hline",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex(text: str) -> str:
    return text.translate(_LATEX)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format ``rows`` under ``columns`` as a Markdown table; each cell is ``str(cell)``.

    >>> print(markdown_table(["rank", "AUC"], [(1, "0.873")]))
    | rank | AUC |
    |---|---|
    | 1 | 0.873 |
    """
    head, *rest = [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"
        for row in (columns, *rows)
    ]
    return "\n".join([head, "|" + "---|" * len(columns), *rest])


def save_figure(figure: Figure, folder: str | Path, name: str, *, privacy: str = "") -> list[Path]:
    """Save a figure as ``NAME.png`` (200 dpi) and ``NAME.pdf`` (vector graphics, embedded fonts).

    Args:
        figure: the figure.
        folder: where to save; created if missing.
        name: file name without suffix, and the title in the files' metadata.
        privacy: privacy statement of the shown result (its field ``privacy``). The statement is
            stored as ``Description`` in the PNG's metadata and as ``Subject`` in the PDF's; "" is
            not stored.

    Returns:
        The paths of the two files. The PDF states no date, so that the same figure always gives the
        same bytes.

    Raises:
        OSError: if a file cannot be written.
    """
    import matplotlib as mpl

    paths = []
    for suffix, dpi, field in ((".png", 200, "Description"), (".pdf", None, "Subject")):
        path = Path(folder) / f"{name}{suffix}"
        metadata: dict[str, str | None] = {"Title": name}
        if privacy:
            metadata[field] = privacy
        if suffix == ".pdf":
            metadata["CreationDate"] = None
        options: dict[str, Any] = {"metadata": metadata} | ({"dpi": dpi} if dpi else {})
        with atomic_write(path) as file:
            with mpl.rc_context({"pdf.fonttype": 42}):  # matplotlib reads this when it saves
                figure.savefig(file, format=suffix[1:], **options)
        paths.append(path)
    return paths
