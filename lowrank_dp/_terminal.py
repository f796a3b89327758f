"""Terminal output and signals: progress bars, one-line errors and warnings, deferred SIGINT."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")
BAD_INPUT = 2  # exit code after bad input
FIRST_LINE = 60.0  # seconds before the first line of progress in a log
LONGEST_WAIT = 600.0  # most seconds between two lines of progress in a log
LONGEST = 300  # number of characters of a word in an error, as of a value in `_validate`


class Interrupted(SystemExit):
    """Exit after SIGINT (code 130) or SIGTERM (code 143), once the work so far is saved."""

    def __init__(self, number: int, what_is_kept: str) -> None:
        super().__init__(number, what_is_kept)  # unpickling calls the class with these arguments
        self.code = 128 + number

    def __str__(self) -> str:
        number, what_is_kept = self.args
        return f"stopped by {signal.Signals(number).name}: {what_is_kept}"


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Defer SIGINT and SIGTERM for the length of the block.

    The number of the first signal is appended to the yielded list. A second signal takes effect at
    once. The list stays empty outside the main thread, where Python handles no signals.
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


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message without its full stop, or the error's name.

    A line that ends in a colon is joined with the line after it.

    >>> first_line(ValueError("Expected one of:\n  a, b.\n"))
    'Expected one of: a, b'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0]).rstrip(".")


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the processor or the GPU has too little memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's; torch may not be installed
        or "DefaultCPUAllocator: " in str(error)
    )


def report(message: str) -> int:
    """Print ``message`` as one line on stderr and return the exit code of bad input.

    Characters that UTF-8 cannot encode, such as half of a surrogate pair, are escaped. Words of
    over 300 characters, such as a name that the system calls too long, are cut.
    """
    words = (word if len(word) <= LONGEST else f"{word[:LONGEST]}..." for word in message.split())
    line = " ".join(words).encode(errors="backslashreplace").decode()
    print(f"error: {line}", file=sys.stderr)
    return BAD_INPUT


def warn_in_one_line(
    message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any
) -> None:
    """Print a warning to the user as one line on stderr, in place of ``warnings.showwarning``.

    Warnings of other categories than ``UserWarning`` are for programmers and are dropped.
    """
    if issubclass(category, UserWarning):
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def tell(message: str) -> None:
    """Print a line on stderr at once, unless stderr takes no more text, as on a full disk."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def progress(
    items: Iterable[T], description: str, total: int | None = None, *, counts: bool = True
) -> Iterator[T]:
    """Iterate with a progress bar on stderr.

    If stderr is not a terminal but, for example, a log file, lines are printed in place of the bar:
    after 1, 2, 4, 8 and 16 minutes, and then every 10 minutes, each when the next item is finished.

    Args:
        items: items of the iteration.
        description: words before the bar, and at the start of each line.
        total: number of items; None takes it from ``items``, if they have a length.
        counts: whether the lines state numbers of items. Without counts, the lines state the share
            of the items that is finished, or only the time if the number of items is unknown.
    """
    # rich takes FORCE_COLOR, which a notebook's workers inherit, as proof of a terminal
    if not sys.stderr.isatty():
        yield from _logged(items, description, total, counts)
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description, total=total, console=Console(stderr=True), transient=True)


def _logged(items: Iterable[T], description: str, total: int | None, counts: bool) -> Iterator[T]:
    """Iterate, and print from time to time how many items, or which share, are finished."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    of = "" if total is None else f" of {total:,}"
    start, due = time.monotonic(), FIRST_LINE
    for finished, item in enumerate(items, 1):
        yield item
        passed = time.monotonic() - start
        if passed >= due:
            if counts:
                done = f"{finished:,}{of} "
            else:
                done = f"{finished / total:.0%} " if total else ""
            tell(f"{description}: {done}after {passed / 60:.0f} min")
            due = passed + min(passed, LONGEST_WAIT)
