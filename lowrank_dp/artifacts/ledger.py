"""The ledger of a training run: one line per release, written before the release is made.

Each line holds the SHA-256 of itself and of all lines before it, so that a changed, lost or moved
line is noticed. One loss is not noticed: whole lines at the end that were written after the last
snapshot. The steps of these lines are drawn again in the same way and count once. The hashes detect
damage, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lowrank_dp.artifacts.files import atomic_write

_LINE_BYTES = 4096  # no line of the ledger is longer
_FIELDS = {"number": int, "stream": str, "step": int, "noise": str, "sums": str, "chain": str}


class EarlierVersion(ValueError):
    """Error for a file that an earlier version of the package wrote."""

    def __init__(self, path: Path):
        super().__init__(
            f"{path} was written by an earlier version of lowrank_dp, which did not "
            "protect it against damage: finish the run with that version, or start afresh "
            "in another folder, and add the privacy that this run has spent"
        )


@dataclass(frozen=True)
class Ledger:
    """The ledger at ``path``, a file of JSON Lines; the file need not exist yet."""

    path: Path

    def append(self, stream: str, step: int, noise: str, sums: str) -> None:
        """Append the line of one release, and return once the line is on the disk.

        The arguments are those of ``runs.RunFolder.begin_release``.
        """
        with self.path.open("ab+") as file:
            os.chmod(file.fileno(), 0o600)
            number, head = self._last(file)
            entry = {
                "number": number + 1,
                "stream": stream,
                "step": step,
                "noise": noise,
                "sums": sums,
            }
            file.write(_line(entry, head))
            file.flush()
            os.fsync(file.fileno())

    def count(self, stream: str, steps: Iterable[int]) -> int:
        """Count the distinct releases, and count ``steps`` of ``stream`` as released.

        A release is a pair of stream and step. Raises ValueError if the ledger is damaged, if a
        pair was repeated with another noise or other sums, or if two pairs have the same noise:
        the number of pairs would then be less than the number of releases.
        """
        digests_of, head = dict[tuple[str, int], tuple[str, str]](), ""
        release_of: dict[str, tuple[str, int]] = {}
        for number, line in enumerate(self.lines(), 1):
            entry = _entry(self.path, line)
            if _line(entry, head) != line + b"\n" or entry["number"] != number:
                raise self._damaged(f"line {number} does not match the lines before it")
            head = entry["chain"]
            release, digests = (entry["stream"], entry["step"]), (entry["noise"], entry["sums"])
            if digests_of.setdefault(release, digests) != digests:
                changed = "noise" if digests_of[release][0] != digests[0] else "sums"
                raise self._reused(f"step {entry['step'] + 1} was repeated with other {changed}")
            if digests[0] and release_of.setdefault(digests[0], release) != release:
                raise self._reused(
                    f"step {entry['step'] + 1} has the noise of step "
                    f"{release_of[digests[0]][1] + 1}"
                )
        return len(digests_of.keys() | {(stream, step) for step in steps})

    def lines(self) -> list[bytes]:
        """Return the complete lines.

        A last line that is cut short was being written when the process was killed. Its release
        was not made yet, so the line is removed from the file. A last line that lacks only its
        newline is complete, and the newline is added.
        """
        lines = self.path.read_bytes().split(b"\n") if self.path.is_file() else [b""]
        if lines[-1]:
            if lines[-1].endswith(b"}"):
                lines.append(b"")
            with atomic_write(self.path, mode=0o600) as file:
                file.write(b"".join(line + b"\n" for line in lines[:-1]))
        return lines[:-1]

    def state(self) -> dict[str, Any]:
        """Return the number of lines and the hash of the last line (0 and "" without any)."""
        lines, head = 0, ""
        if self.path.is_file():
            with self.path.open("rb") as file:
                lines, head = self._last(file)
        return {"lines": lines, "head": head}

    def require(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless the ledger begins with the lines that ``state`` describes."""
        lines, count = self.lines(), state["lines"]
        if count and (
            len(lines) < count or _entry(self.path, lines[count - 1])["chain"] != state["head"]
        ):
            raise self._damaged(
                f"it had {count} lines when the last snapshot was made, "
                f"and now has {len(lines)} lines, or lines with another content",
            )

    def _last(self, file: BinaryIO) -> tuple[int, str]:
        """Return number and hash of the last line of the open file; (0, "") without a line."""
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LINE_BYTES))
        lines = file.read().splitlines()
        if not lines:
            return 0, ""
        entry = _entry(self.path, lines[-1])
        return entry["number"], entry["chain"]

    def _reused(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path}: {what}, so the privacy spent is more than the ledger counts: "
            "start afresh in another folder"
        )

    def _damaged(self, reason: str) -> ValueError:
        return _damaged(self.path, reason)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is damaged, so the privacy spent is unknown: start afresh in "
        f"another folder ({reason})"
    )


def _line(entry: Mapping[str, Any], head: str) -> bytes:
    """Encode ``entry`` as the line after a line whose hash is ``head``; append its own hash."""
    content = {name: entry[name] for name in _FIELDS if name != "chain"}
    chain = hashlib.sha256(f"{head} {json.dumps(content)}".encode()).hexdigest()
    return json.dumps({**content, "chain": chain}).encode() + b"\n"


def _entry(path: Path, line: bytes) -> dict[str, Any]:
    """Decode and check one line; raise ValueError if the line is damaged."""
    try:
        entry = json.loads(line)
        if isinstance(entry, dict) and entry.keys() == {"stream", "step"}:
            raise EarlierVersion(path)
        types = {name: type(entry[name]) for name in _FIELDS}
    except EarlierVersion:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, type(error).__name__) from None
    if types != _FIELDS:
        raise _damaged(path, "it holds something other than releases")
    return entry
