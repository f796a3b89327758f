"""Write files atomically, and read and write JSON objects."""

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

from lowrank_dp._json import parse_json
from lowrank_dp._terminal import first_line

MAX_JSON_BYTES = 64 << 20  # far above the size of a run's own JSON files


@contextlib.contextmanager
def atomic_write(path: str | Path, *, mode: int | None = None) -> Iterator[BinaryIO]:
    """Yield a binary file that is renamed to ``path`` when the block ends without an error.

    If the block raises, the new file is removed, and an old file at ``path`` stays. Missing folders
    are created. Only the owner can read the file before it is renamed; ``mode`` sets the
    permissions of the final file, and None takes the process's default. Raises OSError, whose
    message names ``path``, if the file cannot be written.
    """
    path = Path(path)
    try:
        with _replacement(path, mode) as file:
            yield file
    except OSError as error:
        if error.errno is None:  # not from the system: the message names another file already
            raise
        raise OSError(f"{path} could not be written ({error.strerror})") from error


@contextlib.contextmanager
def _replacement(path: Path, mode: int | None) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            with contextlib.suppress(OSError):  # some file systems have no locks
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
    """Delete the temporary files of killed writers of ``path``: those that no process locks."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def umask() -> int:
    """Return the process's file mode mask.

    The system returns the mask only when the mask is set, so the mask is set to 0 for a moment.
    """
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, document: Any, *, mode: int | None = None) -> None:
    """Write ``document`` as JSON, atomically; ``mode`` is as in :func:`atomic_write`.

    Raises ValueError if ``document`` holds NaN or infinity, and OSError if the file cannot be
    written.
    """
    content = encode_json(document)
    with atomic_write(path, mode=mode) as file:
        file.write(content)


def encode_json(document: Any) -> bytes:
    """Encode ``document`` as indented JSON in UTF-8; raise ValueError for NaN or infinity."""
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    return text.encode() + b"\n"


def read_json(
    path: str | Path,
    *,
    max_bytes: int | None = None,
    max_values: int | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: file to read.
        max_bytes: largest accepted size; None means ``MAX_JSON_BYTES`` (64 MiB).
        max_values: largest accepted number of values, which bounds the memory of parsing; None
            means any number.
        strict: also refuse NaN, infinity, and an object that holds a name twice.

    Raises:
        ValueError: if the file is too large, holds too many values, or holds anything other than a
            JSON object; the one line of the message names the file.
        OSError: if the file cannot be read.
    """
    limit = MAX_JSON_BYTES if max_bytes is None else max_bytes
    if (size := Path(path).stat().st_size) > limit:
        raise ValueError(f"{path} must have at most {limit:,} bytes, got {size:,}")
    data = Path(path).read_bytes()
    if max_values is not None and sum(map(data.count, (b",", b"[", b"{"))) > max_values:
        raise ValueError(f"{path} must hold at most {max_values:,} values")
    try:
        document = parse_json(data, finite=True) if strict else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON ({first_line(error)})") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return document
