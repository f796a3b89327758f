"""Tables for terminals and logs, whose cells wrap and are never cut."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?%?|nan|inf|")
_WORD = re.compile(r"\[[^\]]*\]\S*|\S+")  # an interval [low, high] stays on one line
_IN_NAMES = re.compile(r"(?<=[A-Za-z_]\.)|(?<=\d\.)(?=[A-Za-z])")  # layer. | 0. | attention.


def say(console: Console, line: str) -> None:
    """Print a line verbatim; rich's markup would read a folder called [red] as a colour."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_table(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = ""
) -> None:
    """Print a table as wide as the console; see :func:`table_lines`."""
    for line in ([title] if title else []) + table_lines(columns, rows, console.width):
        say(console, line)


def table_lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int = 80
) -> list[str]:
    r"""Lay a table out in lines of at most ``width`` characters.

    Cells wrap between words, before an interval in brackets, and after the dots of a name. If the
    columns still do not fit side by side, each row becomes a block of ``column  cell`` lines.
    A row of one cell heads the rows below and spans the table.

    >>> print(*table_lines(["attack", "AUC [95%]"], [["loss", "0.61 [0.50, 0.72]"]], 24), sep="\n")
    attack AUC [95%]
    ------ -----------------
    loss   0.61 [0.50, 0.72]
    """
    cells = [row for row in rows if len(row) == len(columns)]
    by_column = list(zip(columns, *cells, strict=True))
    widths = [max(map(len, column)) for column in by_column]
    least = [
        max(
            (len(piece) + cell.startswith(" ") for cell in column for _, piece in _pieces(cell)),
            default=0,
        )
        for column in by_column
    ]
    gap = 2 if sum(widths) + 2 * len(widths) - 2 <= width else 1
    room = width - gap * (len(columns) - 1)
    if sum(least) > room:
        return _blocks(columns, rows, width)
    if sum(widths) > room:  # narrow the headers first
        widths = [max(low, *map(len, c[1:]), 0) for low, c in zip(least, by_column, strict=True)]
    while sum(widths) > room:  # then narrow the widest column that can wrap
        slack = [now if now > low else 0 for now, low in zip(widths, least, strict=True)]
        widths[slack.index(max(slack))] -= 1
    right = [
        i > 0 and all(map(_NUMBER.fullmatch, column[1:])) for i, column in enumerate(by_column)
    ]
    lines = _row(columns, widths, right, gap)
    lines.append((" " * gap).join("-" * width for width in widths))
    for row in rows:
        lines += _row(row, widths, right, gap) if len(row) == len(columns) else row
    return lines


def _row(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool], gap: int) -> list[str]:
    """Lay out one row of a table, in as many lines as its tallest cell."""
    columns = [_wrapped(cell, width) for cell, width in zip(cells, widths, strict=True)]
    lines = []
    for parts in zip_longest(*columns, fillvalue=""):
        padded = (
            part.rjust(width) if to_the_right else part.ljust(width)
            for part, width, to_the_right in zip(parts, widths, right, strict=True)
        )
        lines.append((" " * gap).join(padded).rstrip())
    return lines


def _blocks(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Lay out one block of lines per row."""
    left = min(max(map(len, columns)), max(width // 3, 1))
    lines: list[str] = []
    for row in rows:
        if len(row) < len(columns):
            lines += row
            continue
        for column, cell in zip(columns, row, strict=True):
            lines += _row([column, cell], [left, max(width - left - 2, 1)], [False, False], 2)
        lines.append("")
    return lines


def _pieces(cell: str) -> list[tuple[str, str]]:
    """Split a cell where a line may break: pairs of (blank before the piece or "", piece)."""
    pieces = []
    for word in _WORD.findall(cell):
        parts = [word] if word.startswith("[") else _IN_NAMES.split(word)
        pieces += [(" " if i == 0 else "", part) for i, part in enumerate(parts)]
    return pieces


def _wrapped(cell: str, width: int) -> list[str]:
    """Wrap a cell into the lines of a column of ``width`` characters."""
    if len(cell) <= width:
        return [cell]
    indent = " " * (len(cell) - len(cell.lstrip()))
    lines = [indent]
    for blank, piece in _pieces(cell):
        joined = f"{lines[-1]}{blank if lines[-1] != indent else ''}{piece}"
        if len(joined) <= width or lines[-1] == indent:
            lines[-1] = joined
        else:
            lines.append(indent + piece)
    return lines


def in_sections(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Put the names of a model's matrices before ``rows``, each under a line with its block's name.

    >>> in_sections(["bert.layer.0.query", "bert.layer.0.key", "classifier"], [["a"], ["b"], ["c"]])
    [['bert.layer.0'], [' query', 'a'], [' key', 'b'], ['classifier', 'c']]
    """
    found, before = list[list[str]](), ""
    for name, row in zip(names, rows, strict=True):
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
        start = numbers[-1] + 1 if numbers else len(parts) - 1
        section = ".".join(parts[:start])
        if section and section != before:
            found.append([section])
        before = section
        found.append([" " * bool(section) + ".".join(parts[start:]), *row])
    return found


def without_common_parts(names: Sequence[str]) -> tuple[list[str], str]:
    """Drop the dotted parts that all names begin and end with; also return the names' pattern.

    >>> without_common_parts(["bert.layer.0.query.weight", "bert.layer.1.key.weight"])
    (['0.query', '1.key'], 'bert.layer.*.weight')
    """
    parts = [name.split(".") for name in names]
    spare = min(map(len, parts)) - 1 if len(parts) > 1 else 0  # one part of each name stays
    first = min(spare, _alike(parts))
    last = min(spare - first, _alike([part[::-1] for part in parts]))
    if not first + last:
        return list(names), ""
    ending = parts[0][len(parts[0]) - last :]
    return (
        [".".join(part[first : len(part) - last]) for part in parts],
        ".".join([*parts[0][:first], "*", *ending]),
    )


def _alike(lists: Sequence[Sequence[str]]) -> int:
    """Number of leading items that are the same in all lists."""
    return next(
        (i for i, items in enumerate(zip(*lists, strict=False)) if len(set(items)) > 1),
        min(map(len, lists), default=0),
    )
