"""Extension of griffe: the roles of reStructuredText in docstrings become plain code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|exc|obj):`~?\.?([^`]+)`")


def plain(text: str) -> str:
    """Replace each role, such as a ``:func:`` with its name, by the name as code."""
    return ROLE.sub(r"`\1`", text)


class Roles(griffe.Extension):
    """Rewrite the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)
