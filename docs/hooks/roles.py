"""Extension of griffe: reStructuredText in docstrings becomes Markdown.

Roles such as ``:func:`` become code, sessions with ``>>>`` become blocks of code, and an entry for
several arguments or attributes ("a, b: ...") becomes an entry of the first that names the others.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|exc|obj):`~?\.?([^`]+)`")
SEVERAL = re.compile(r"^( +)(\w+), (\w+(?:, \w+)*): ")


def plain(text: str) -> str:
    """Return a docstring as Markdown in Google's style, as griffe reads it."""
    lines, open_fence, section = [], False, ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            section = line
        if section in ("Args:", "Attributes:"):
            line = SEVERAL.sub(r"\1\2: (also \3) ", line)
        session = line.lstrip().startswith(">>>")
        if session and not open_fence:
            lines.append(f"{line[: len(line) - len(line.lstrip())]}```python")
            open_fence = True
        elif open_fence and not line.strip():
            lines.append("```")
            open_fence = False
        lines.append(line)
    return ROLE.sub(r"`\1`", "\n".join([*lines, *(["```"] if open_fence else [])]))


class Roles(griffe.Extension):
    """Rewrite the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)
