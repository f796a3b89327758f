"""Packages whose modules load on the first use of a name (PEP 562)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Collection
from functools import cache
from importlib import import_module
from typing import Any


def lazy(
    package: str, submodules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package whose modules load on first use.

    The lazy names are those that the package's ``__init__`` imports under ``if TYPE_CHECKING:``, so
    that a type checker and this function read the same declaration. An ``__init__`` contains::

        if TYPE_CHECKING:
            from lowrank_dp.spectrum.decomposition import decompose
        else:
            __getattr__, __dir__ = lazy(__name__)

    ``submodules`` are names of the package's modules, which load on first use too.

    A name that is also the name of its module is imported ordinarily, since Python would bind the
    name to the module.
    """

    @cache
    def modules() -> dict[str, str]:
        return _typing_imports(sys.modules[package])

    def load(name: str) -> Any:
        if name.startswith("__") or name not in {*submodules, *modules()}:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if name in submodules:
            return import_module(f"{package}.{name}")
        value = getattr(import_module(modules()[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *submodules, *modules()})

    return load, names


def _typing_imports(module: Any) -> dict[str, str]:
    """Map name to module for each ``from module import name`` under ``if TYPE_CHECKING:``."""
    found = {}
    for block in ast.parse(module.__spec__.loader.get_source(module.__name__)).body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for line in block.body:
                if isinstance(line, ast.ImportFrom):
                    found.update({alias.name: str(line.module) for alias in line.names})
    return found
