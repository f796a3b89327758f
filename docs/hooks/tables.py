"""Tables of the pages on a narrow screen: rows of long sentences become cards."""

from __future__ import annotations

import re

LONG = 160  # characters of a cell; numbers and short terms stay in columns
_TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


def stacked(markdown: str) -> str:
    """Put each table that has a cell of more than ``LONG`` characters into a ``div.stacked``.

    In every table, no line ends between a "±" and its number.
    """

    def wrap(table: re.Match[str]) -> str:
        text = table[0].replace("± ", "±\N{NO-BREAK SPACE}")
        if max(len(cell) for row in text.splitlines() for cell in row.split("|")) <= LONG:
            return text
        return f'<div class="stacked" markdown="1">\n\n{text}\n</div>\n'

    return _TABLE.sub(wrap, markdown)
