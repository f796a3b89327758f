"""Write and read files: no reader meets half of one."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic_write(path: str | Path, *, mode: int | None = None) -> Iterator[BinaryIO]:
    """A binary file that takes the name ``path`` only when the block ends without an error.

    Until then it is its owner's only; ``mode`` is what it becomes, None for the process's default.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~umask() if mode is None else mode)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _remove_abandoned(path: Path) -> None:
    """Delete what writers of ``path`` that were killed left: files that nobody holds locked."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def umask() -> int:
    """The process's file mode mask; reading it is setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


MAX_JSON_BYTES = 64 << 20  # a run's own are a thousandth of that


def write_json(path: str | Path, document: Any, *, mode: int | None = None) -> None:
    """A JSON file, atomically; NaN and infinity are refused. ``mode`` as in ``atomic_write``."""
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    with atomic_write(path, mode=mode) as file:
        file.write(text.encode() + b"\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object; ``ValueError`` naming the file if it is over 64 MiB or holds anything else."""
    if (size := Path(path).stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} must have at most {MAX_JSON_BYTES:,} bytes, got {size:,}")
    try:
        document = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return document
