"""What the command lines share: one-line errors with exit code 2, progress bars on stderr."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import track

T = TypeVar("T")
BAD_INPUT = 2


class Interrupted(SystemExit):
    """SIGINT or SIGTERM, obeyed where nothing is lost: exits with 130 or 143."""

    def __init__(self, number: int, what_is_kept: str) -> None:
        super().__init__(number, what_is_kept)  # what it is unpickled from
        self.code = 128 + number

    def __str__(self) -> str:
        number, what_is_kept = self.args
        return f"stopped by {signal.Signals(number).name}: {what_is_kept}"


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are added to, in place of their effect; a second one has it.

    It stays empty outside the main thread, where Python handles no signals.
    """
    asked: list[int] = []
    before = {
        number: signal.getsignal(number) or signal.SIG_DFL
        for number in (signal.SIGINT, signal.SIGTERM)
    }

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        asked.append(number)
        restore()

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        restore()


def new_app(help: str) -> typer.Typer:
    """A typer application without boxes, tracebacks of its own, or completion options."""
    return typer.Typer(
        help=help, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
    )


def run(app: typer.Typer, arguments: list[str] | None = None) -> None:
    """Run ``app`` and exit: 0, or 2 after one line on stderr that says what to change.

    130 after SIGINT and 143 after SIGTERM, with one line on how to go on where there is one.
    """
    warnings.showwarning = warn_in_one_line
    try:
        code = app(args=arguments, standalone_mode=False)
    except (ValueError, OSError) as error:
        code = report(str(error))
    except Exception as error:
        # typer vendors its own click: usage errors are recognised by what they offer
        if not hasattr(error, "format_message"):
            raise
        code = report(error.format_message())
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        code = stopped.code
    except KeyboardInterrupt:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def report(message: str) -> int:
    """Print ``message`` as one line on stderr and give the exit code of bad input.

    What UTF-8 cannot spell, such as half of a surrogate pair out of a damaged file, is escaped.
    """
    line = " ".join(message.split()).encode(errors="backslashreplace").decode()
    print(f"error: {line}", file=sys.stderr)
    return BAD_INPUT


def warn_in_one_line(
    message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any
) -> None:
    """Print a warning to the user as one line on stderr, in place of ``warnings.showwarning``.

    Warnings of other kinds, which are for programmers, are left out.
    """
    if issubclass(category, UserWarning):
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


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
    # not Console.is_terminal, which believes FORCE_COLOR: a notebook's workers inherit that
    yield from track(
        items,
        description,
        total=total,
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
