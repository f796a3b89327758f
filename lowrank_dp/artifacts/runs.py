"""The folder of a training run: its lock, its ledger of releases, its snapshots, its checkpoint.

    OUTPUT/                 a Hugging Face folder once the run is finished
        training.json       written last: a folder that has it is finished
        membership.json
        .lock               held by the process that works here; dies with it
        snapshots/          gone when the run is finished
            releases.jsonl  one line for each release, written before it is made
            step-000020.json, step-000020.safetensors

A snapshot is valid once its JSON, which holds the SHA-256 of the tensors, has its name; a damaged
one is passed over for the one before. Nothing is pickled.
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
from typing import Any

from lowrank_dp import _validate
from lowrank_dp.artifacts import atomic_write, umask

KEPT_SNAPSHOTS = 2
MAX_JSON_BYTES = 64 << 20  # a run's own are a thousandth of that
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

    def begin_release(self, stream: str, step: int) -> None:
        """Note, durably, that the release of ``step`` is about to be drawn from ``stream``.

        A stream is one unbroken sequence of random draws. Replaying a step from saved generator
        states repeats its line, and the pair counts once.
        """
        line = json.dumps({"stream": stream, "step": step}) + "\n"
        with (_explained(f"ledger in {self.snapshots}"),
              (self.snapshots / "releases.jsonl").open("ab") as file):
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def num_releases(self, stream: str = "", steps: Iterable[int] = ()) -> int:
        """Distinct releases that may have been made, those of broken-off attempts included.

        ``steps`` of ``stream`` are counted with them, as if they had been made.
        """
        ledger = self.snapshots / "releases.jsonl"
        lines = ledger.read_bytes().split(b"\n") if ledger.is_file() else [b""]
        if lines[-1]:  # killed while writing it: that release was not made
            with atomic_write(ledger) as file:
                file.write(b"".join(line + b"\n" for line in lines[:-1]))
        try:
            seen = {(entry["stream"], entry["step"]) for entry in map(json.loads, lines[:-1])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{ledger} is damaged, so the privacy spent is unknown: start afresh "
                             f"in another folder ({type(error).__name__})") from None
        return len(seen | {(stream, step) for step in steps})

    # snapshots -----------------------------------------------------------------------------

    def save_snapshot(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Any]
                      ) -> None:
        """Write one snapshot, then drop all but the newest ``KEPT_SNAPSHOTS``.

        If this fails (a full disk), the snapshots before are intact.
        """
        from safetensors.torch import save

        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        name = f"step-{step:06d}"
        with _explained(f"snapshot of step {step} in {self.path}"):
            with atomic_write(self.snapshots / f"{name}.safetensors") as file:
                file.write(data)
            write_json(self.snapshots / f"{name}.json",
                       {**state, "step": step, "sha256": hashlib.sha256(data).hexdigest()})
        for old in self._steps()[:-KEPT_SNAPSHOTS]:
            for suffix in (".json", ".safetensors"):
                (self.snapshots / f"step-{old:06d}{suffix}").unlink(missing_ok=True)

    def load_snapshot(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """State and tensors of the newest whole snapshot; None if there is none."""
        from safetensors.torch import load

        for step in reversed(self._steps()):
            path = self.snapshots / f"step-{step:06d}.json"
            try:
                state = read_json(path)
                data = path.with_suffix(".safetensors").read_bytes()
            except (ValueError, FileNotFoundError):
                continue
            if hashlib.sha256(data).hexdigest() == state.get("sha256"):
                return state, load(data)
        return None

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


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """A failed write as an ``OSError`` that says what it was, and how to go on."""
    try:
        yield
    except Exception as error:  # what the model libraries raise on a full disk varies
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise OSError(f"{what} could not be written ({reason}): free some space, then go on with "
                      "--resume; the last snapshot is intact") from error


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
            raise InUse(f"output {path} is in use by another run: wait for it, or choose another "
                        "folder") from None
        found = [item.name for item in path.iterdir() if item.name != ".lock"
                 and not item.name.startswith(".checkpoint-")]
        if found and not resume:
            raise ValueError(f"output {path} must be empty, found {sorted(found)[0]}: choose "
                             "another folder, or continue that run with --resume")
        if found and not (folder.finished or folder.snapshots.is_dir()):
            raise ValueError(f"output {path} must be empty or hold a run to resume, found "
                             f"{sorted(found)[0]}")
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


def _leave_nothing_empty(path: Path) -> None:
    """A run that was refused before its first snapshot leaves no trace in the way of the next."""
    with contextlib.suppress(OSError):
        (path / "snapshots").rmdir()  # only succeeds where it is empty
    if [item.name for item in path.iterdir()] == [".lock"]:
        (path / ".lock").unlink()
        with contextlib.suppress(OSError):
            path.rmdir()


def write_json(path: str | Path, document: Any) -> None:
    """A JSON file, atomically; NaN and infinity are refused."""
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    with atomic_write(path) as file:
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
