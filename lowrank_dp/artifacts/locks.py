"""Locks of output folders, which end with the process that holds them."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class InUse(ValueError):
    """Error for an output that another process has locked."""


def take(lock: BinaryIO, file: Path, what: str, user: str) -> None:
    """Lock the open file ``lock``, whose path is ``file``, until it is closed.

    Raises :class:`InUse`, which says that the output ``what`` is in use by another ``user``, if
    another process has locked the file or has just removed it.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUse(
            f"{what} is in use by another {user}: wait for it, or choose another folder"
        ) from None
    try:
        in_place = os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except FileNotFoundError:  # a process that ends removes its lock file
        in_place = False
    if not in_place:
        raise InUse(f"{what} was in use by a {user} that was just ending: try again")


@contextlib.contextmanager
def held(file: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``file`` of a command's output ``what``; remove the file at the end.

    A file system without locks is used without one. Raises :class:`InUse` as :func:`take` does, and
    OSError if the file cannot be created.
    """
    with file.open("ab") as lock:
        with contextlib.suppress(OSError):  # some file systems have no locks
            take(lock, file, what, "command")
        try:
            yield
        finally:
            file.unlink(missing_ok=True)  # before the lock ends
