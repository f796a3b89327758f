"""The folder of a training run: its lock, its ledger of releases, its snapshots, its checkpoint.

    OUTPUT/                 a Hugging Face folder once the run is finished
        training.json       written last: a folder that has it is finished
        membership.json
        .lock               held by the process that works here; dies with it
        snapshots/          gone when the run is finished
            releases.jsonl  one line for each release, written before it is made
            step-000020.json, step-000020.safetensors

A snapshot is valid once its JSON has its name. The JSON holds the SHA-256 of itself and of the
tensors, and the length and head of the ledger at that time; a damaged snapshot is passed over for
the one before. Each line of the ledger holds the SHA-256 of all before it, so that a line that was
changed, lost or moved is noticed, but for whole lines lost from the end since the last snapshot:
their steps are drawn again, in the same way, and count once. The hashes find damage, not forgery.
Snapshots are readable by their owner only. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lowrank_dp import _validate
from lowrank_dp.artifacts.files import atomic_write, read_json, umask, write_json

KEPT_SNAPSHOTS = 2
FORMAT = 2  # of snapshots and ledger; the first had no hashes
_LINE_BYTES = 4096  # no line of the ledger is longer
TRAINING, MEMBERSHIP = "training.json", "membership.json"
INITIAL_HEAD = "initial_head.safetensors"  # a classifier's head before the first step


class InUse(ValueError):
    """Another process works in the folder."""


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; open it with :func:`open_run`, which holds its lock."""

    path: Path

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is complete."""
        return (self.path / TRAINING).is_file()

    @property
    def snapshots(self) -> Path:
        """The folder of the intermediate states."""
        return self.path / "snapshots"

    # releases ------------------------------------------------------------------------------

    def begin_release(self, stream: str, step: int, noise: str = "", sums: str = "") -> None:
        """Note, durably, that the release of ``step`` is about to be drawn from ``stream``.

        A stream is one unbroken sequence of random draws. Replaying a step from saved generator
        states repeats its line, and the pair counts once. ``noise`` is a digest of the state that
        the noise is drawn from, and ``sums`` one of what the sums depend on; :meth:`num_releases`
        compares both. Empty digests are not compared.
        """
        with _explained(f"ledger in {self.snapshots}"), self._ledger.open("ab+") as file:
            os.chmod(file.fileno(), 0o600)
            number, head = self._end(file)
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

    def num_releases(self, stream: str = "", steps: Iterable[int] = ()) -> int:
        """Distinct releases that may have been made, those of broken-off attempts included.

        ``steps`` of ``stream`` are counted with them, as if they had been made.

        Raises:
            ValueError: if the ledger is damaged, or was written by an earlier version; if a
                release was repeated with other noise or other sums, or a noise was drawn again for
                another release, so that counting pairs would count too few.
        """
        entries, head = dict[tuple[str, int], tuple[str, str]](), ""
        release_of: dict[str, tuple[str, int]] = {}
        for number, line in enumerate(self._lines(), 1):
            entry = _entry(self._ledger, line)
            if _line(entry, head) != line + b"\n" or entry["number"] != number:
                raise _damaged(self._ledger, f"line {number} does not follow from those before")
            head = entry["chain"]
            release, drawn = (entry["stream"], entry["step"]), (entry["noise"], entry["sums"])
            if entries.setdefault(release, drawn) != drawn:
                raise _reused(
                    self._ledger,
                    f"step {entry['step'] + 1} was repeated with other "
                    f"{'noise' if entries[release][0] != drawn[0] else 'sums'}",
                )
            if drawn[0] and release_of.setdefault(drawn[0], release) != release:
                raise _reused(
                    self._ledger,
                    f"step {entry['step'] + 1} has the noise of step {release_of[drawn[0]][1] + 1}",
                )
        return len(entries.keys() | {(stream, step) for step in steps})

    @property
    def _ledger(self) -> Path:
        return self.snapshots / "releases.jsonl"

    def _lines(self) -> list[bytes]:
        """Whole lines.

        A last line that is cut short was being written when the process was killed, before its
        release was made, and is dropped. If it lacks nothing but the line's end, it counts.
        """
        lines = self._ledger.read_bytes().split(b"\n") if self._ledger.is_file() else [b""]
        if lines[-1]:
            if lines[-1].endswith(b"}"):
                lines.append(b"")
            with atomic_write(self._ledger, mode=0o600) as file:
                file.write(b"".join(line + b"\n" for line in lines[:-1]))
        return lines[:-1]

    def _end(self, file: BinaryIO) -> tuple[int, str]:
        """Number and hash of the last line of the open ledger; (0, "") where there is none."""
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LINE_BYTES))
        lines = file.read().splitlines()
        if not lines:
            return 0, ""
        entry = _entry(self._ledger, lines[-1])
        return entry["number"], entry["chain"]

    # snapshots -----------------------------------------------------------------------------

    def save_snapshot(
        self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> None:
        """Write one snapshot, then drop all but the newest ``KEPT_SNAPSHOTS``.

        If this fails (a full disk), the snapshots before are intact.
        """
        from safetensors.torch import save

        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        name = f"step-{step:06d}"
        lines, head = 0, ""
        if self._ledger.is_file():
            with self._ledger.open("rb") as ledger:
                lines, head = self._end(ledger)
        document = {
            **state,
            "step": step,
            "format": FORMAT,
            "ledger": {"lines": lines, "head": head},
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        with _explained(f"snapshot of step {step} in {self.path}"):
            with atomic_write(self.snapshots / f"{name}.safetensors", mode=0o600) as file:
                file.write(data)
            write_json(
                self.snapshots / f"{name}.json",
                {**document, "digest": _digest(document)},
                mode=0o600,
            )
        for old in self._steps()[:-KEPT_SNAPSHOTS]:
            for suffix in (".json", ".safetensors"):
                (self.snapshots / f"step-{old:06d}{suffix}").unlink(missing_ok=True)

    def load_snapshot(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """State and tensors of the newest whole snapshot; None where no step has been taken.

        Raises:
            ValueError: if what was spent or how to go on is not known: the ledger is damaged or
                shorter than the snapshot's, releases were made but no snapshot is whole, or an
                earlier version wrote them.
        """
        from safetensors.torch import load

        made = self.num_releases()
        for step in reversed(self._steps()):
            path = self.snapshots / f"step-{step:06d}.json"
            try:
                document = read_json(path)
                data = path.with_suffix(".safetensors").read_bytes()
            except (ValueError, FileNotFoundError):
                continue
            if "digest" not in document and "format" not in document and "sha256" in document:
                raise _earlier(path)
            if (
                document.pop("digest", None) == _digest(document)
                and document["step"] == step
                and document["sha256"] == hashlib.sha256(data).hexdigest()
            ):
                self._require_ledger(document["ledger"])
                return document, load(data)
        if made or any(step > 0 for step in self._steps()):
            raise ValueError(
                f"{self.snapshots} holds no whole snapshot, though {made} releases "
                "were made: start afresh in another folder, and add what they spent "
                "to what that run will spend"
            )
        return None

    def configuration(self) -> Any:
        """What the run began with, by its result or its last whole snapshot; None if unknown."""
        with contextlib.suppress(ValueError, OSError):
            if self.finished:
                return read_json(self.path / TRAINING).get("config")
        for step in reversed(self._steps()):
            with contextlib.suppress(ValueError, OSError):
                document = read_json(self.snapshots / f"step-{step:06d}.json")
                if document.pop("digest", None) == _digest(document):
                    return document.get("config")
        return None

    def _require_ledger(self, then: Mapping[str, Any]) -> None:
        lines = self._lines()
        count = then["lines"]
        if count and (
            len(lines) < count or _entry(self._ledger, lines[count - 1])["chain"] != then["head"]
        ):
            raise _damaged(
                self._ledger,
                f"it had {count} lines when the last snapshot was made, "
                f"and has {len(lines)} or others",
            )

    def _steps(self) -> list[int]:
        if not self.snapshots.is_dir():
            return []
        names = [path.stem for path in self.snapshots.glob("step-*.json")]
        return sorted(int(name[5:]) for name in names if name[5:].isdigit())

    # checkpoint ----------------------------------------------------------------------------

    def save_checkpoint(self, write: Callable[[Path], None], documents: Mapping[str, Any]) -> None:
        """Put a finished model in place: ``write(folder)`` fills a folder beside it first.

        ``documents`` are JSON files by name; ``training.json`` comes last, after which the
        snapshots, whose generator states could undo the noise, are removed.
        """
        aside = Path(tempfile.mkdtemp(dir=self.path, prefix=".checkpoint-"))
        try:
            with _explained(f"checkpoint in {self.path}"):
                write(aside)
            for item in sorted(aside.iterdir()):
                if item.is_file():
                    item.chmod(0o666 & ~umask())  # safetensors keeps its files to their owner
                os.replace(item, self.path / item.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        with _explained(f"checkpoint in {self.path}"):
            for name in sorted(documents, key=lambda name: name == TRAINING):
                write_json(self.path / name, documents[name])
        shutil.rmtree(self.snapshots, ignore_errors=True)


def _line(entry: Mapping[str, Any], head: str) -> bytes:
    """A line of the ledger, after one whose hash is ``head``."""
    content = {name: entry[name] for name in ("number", "stream", "step", "noise", "sums")}
    chain = hashlib.sha256(f"{head} {json.dumps(content)}".encode()).hexdigest()
    return json.dumps({**content, "chain": chain}).encode() + b"\n"


def _entry(path: Path, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if isinstance(entry, dict) and entry.keys() == {"stream", "step"}:
            raise _earlier(path)
        kinds = [
            type(entry[name]) for name in ("number", "stream", "step", "noise", "sums", "chain")
        ]
    except _Earlier:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, type(error).__name__) from None
    if kinds != [int, str, int, str, str, str]:
        raise _damaged(path, "it holds something other than releases")
    return entry


class _Earlier(ValueError):
    pass


def _earlier(path: Path) -> ValueError:
    return _Earlier(
        f"{path} was written by an earlier version of lowrank_dp, which did not "
        "protect it against damage: finish the run with that version, or start afresh "
        "in another folder, and add what was spent"
    )


def _reused(ledger: Path, what: str) -> ValueError:
    return ValueError(
        f"{ledger}: {what}, so the privacy spent is more than the ledger counts: "
        "start afresh in another folder"
    )


def _damaged(ledger: Path, reason: str) -> ValueError:
    return ValueError(
        f"{ledger} is damaged, so the privacy spent is unknown: start afresh in "
        f"another folder ({reason})"
    )


def _digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON document's content."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """A failed write as an ``OSError`` that says what it was, and how to go on."""
    try:
        yield
    except Exception as error:  # what the model libraries raise on a full disk varies
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise OSError(
            f"{what} could not be written ({reason}): free some space, then go on with "
            "--resume; the last snapshot is intact"
        ) from error


@contextlib.contextmanager
def open_run(path: str | Path, *, resume: bool = False) -> Iterator[RunFolder]:
    """A run's folder, made if need be, locked until the block ends or the process dies.

    Raises :class:`InUse` if another process holds it; ``ValueError`` if it is not empty and
    ``resume`` is False, or holds something other than a run; ``OSError`` if it can't be written.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        _validate.fail("output", "a folder", str(path))
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    with (path / ".lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(
                f"output {path} is in use by another run: wait for it, or choose another folder"
            ) from None
        if not _is_at(lock, path / ".lock"):
            raise InUse(f"output {path} was being left by another run: try again")
        found = [
            item.name
            for item in path.iterdir()
            if item.name != ".lock" and not item.name.startswith(".checkpoint-")
        ]
        if found and not resume:
            raise ValueError(
                f"output {path} must be empty, found {sorted(found)[0]}: choose "
                "another folder, or continue that run with --resume"
            )
        if found and not (folder.finished or folder.snapshots.is_dir()):
            raise ValueError(
                f"output {path} must be empty or hold a run to resume, found {sorted(found)[0]}"
            )
        for aside in path.glob(".checkpoint-*"):
            shutil.rmtree(aside, ignore_errors=True)  # of an attempt that was killed
        for name in (TRAINING, MEMBERSHIP):
            for torn in path.glob(f".{name}.*"):
                torn.unlink(missing_ok=True)
        if folder.finished:
            shutil.rmtree(folder.snapshots, ignore_errors=True)  # killed just before it could
        else:
            folder.snapshots.mkdir(mode=0o700, exist_ok=True)  # they tell the noise
        try:
            yield folder
        finally:
            _leave_nothing_empty(path)


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one at ``path``: a run that leaves unlinks its lock."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _leave_nothing_empty(path: Path) -> None:
    """A run that was refused before its first snapshot leaves no trace in the way of the next."""
    with contextlib.suppress(OSError):
        (path / "snapshots").rmdir()  # only succeeds where it is empty
    if [item.name for item in path.iterdir()] == [".lock"]:
        (path / ".lock").unlink()
        with contextlib.suppress(OSError):
            path.rmdir()
