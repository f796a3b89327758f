"""Write tables (CSV, Markdown, LaTeX) and figures (PNG, PDF)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from lowrank_dp.artifacts.files import atomic_write


def save_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    folder: str | Path,
    name: str,
    *,
    caption: str,
) -> list[Path]:
    """Write a table as ``NAME.csv``, ``NAME.md`` and ``NAME.tex``; ``caption`` heads the last two.

    Cells are written as given: format numbers beforehand.
    """
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"rows must each have {len(columns)} cells, one for each column")
    cells = [[str(cell) for cell in row] for row in rows]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *cells])
    body = [" & ".join(map(_latex, row)) + r" \\" for row in cells]
    tex = [
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
    paths = []
    for suffix, content in (
        (".csv", text.getvalue()),
        (".md", f"{caption}\n\n{markdown_table(columns, rows)}\n"),
        (".tex", "\n".join(tex) + "\n"),
    ):
        path = Path(folder) / f"{name}{suffix}"
        with atomic_write(path) as file:
            file.write(content.encode())
        paths.append(path)
    return paths


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows under ``columns`` as a Markdown table; cells are written as given.

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


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{c: "\\" + c for c in "&%$#_{}"},
    }
)


def _latex(text: str) -> str:
    return text.translate(_LATEX)


def save_figure(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write ``NAME.png`` (200 dpi) and ``NAME.pdf`` (vector, fonts embedded)."""
    paths = []
    for suffix, options in ((".png", {"dpi": 200}), (".pdf", {"metadata": {"CreationDate": None}})):
        path = Path(folder) / f"{name}{suffix}"
        with atomic_write(path) as file:
            with mpl.rc_context({"pdf.fonttype": 42}):  # read when saving, not when drawing
                figure.savefig(file, format=suffix[1:], **options)
        paths.append(path)
    return paths
