"""What the command lines share: one-line errors with exit code 2, progress bars on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import track

T = TypeVar("T")
BAD_INPUT = 2


def new_app(help: str) -> typer.Typer:
    """A typer application without boxes, tracebacks of its own, or completion options."""
    return typer.Typer(help=help, add_completion=False, rich_markup_mode=None,
                       pretty_exceptions_enable=False)


def run(app: typer.Typer, arguments: list[str] | None = None) -> None:
    """Run ``app`` and exit: 0, or 2 after one line on stderr that says what to change."""
    try:
        code = app(args=arguments, standalone_mode=False)
    except (ValueError, OSError) as error:
        code = report(str(error))
    except Exception as error:
        # typer vendors its own click: usage errors are recognised by what they offer
        if not hasattr(error, "format_message"):
            raise
        code = report(error.format_message())
    except KeyboardInterrupt:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def report(message: str) -> int:
    """Print ``message`` as one line on stderr and give the exit code of bad input."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def options(pairs: Iterable[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs, each value as JSON where it is some (a number, true), else as text."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--option must be NAME=VALUE, got {pair!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar on stderr; silent when stderr is not a terminal."""
    console = Console(stderr=True)
    yield from track(items, description, total=total, console=console,
                     disable=not console.is_terminal, transient=True)
