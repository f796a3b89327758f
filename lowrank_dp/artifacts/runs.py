"""The folder of a training run: lock it, and write and read its ledger, snapshots and checkpoint.

    OUTPUT/                 a Hugging Face folder once the run is finished
        training.json       written last: a folder with this file is finished
        membership.json
        .lock               held by the process that works here; released when the process ends
        snapshots/          removed when the run is finished
            releases.jsonl  the ledger: one line per release, written before the release is made
            step-000020.json, step-000020.safetensors

A snapshot is valid once its JSON file has its final name. The JSON file holds the SHA-256 of
itself and of the tensors, and the length and head of the ledger at that time. If a snapshot is
damaged, the snapshot before it is loaded. Only the owner can read snapshots. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_dp import _validate
from lowrank_dp._json import json_digest
from lowrank_dp._terminal import first_line
from lowrank_dp.artifacts.files import atomic_write, read_json, umask, write_json
from lowrank_dp.artifacts.ledger import EarlierVersion, Ledger
from lowrank_dp.artifacts.locks import InUse as InUse
from lowrank_dp.artifacts.locks import take

KEPT_SNAPSHOTS = 2
FORMAT = 2  # format of snapshots and ledger; format 1 had no hashes
TRAINING, MEMBERSHIP = "training.json", "membership.json"
INITIAL_HEAD = "initial_head.safetensors"  # a classifier's head before the first step


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; open it with :func:`open_run`, which locks it."""

    path: Path

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is complete."""
        return (self.path / TRAINING).is_file()

    @property
    def snapshots(self) -> Path:
        """Folder of the ledger and the snapshots."""
        return self.path / "snapshots"

    # releases ------------------------------------------------------------------------------

    def begin_release(self, stream: str, step: int, noise: str = "", sums: str = "") -> None:
        """Record, durably, that the release of ``step`` is about to be drawn from ``stream``.

        A stream is one unbroken sequence of random draws. Replaying a step from saved generator
        states records the same pair of stream and step again, and the pair counts once.

        Args:
            stream: name of the stream.
            step: number of the step, from 0.
            noise: digest of the generator state that the noise is drawn from; "" if unknown.
            sums: digest of the inputs of the gradient sums; "" if unknown.

        Raises:
            ValueError: if the ledger is damaged.
            OSError: if the ledger cannot be written; the release must not be made then.
        """
        with self._explained(f"ledger in {self.snapshots}"):
            self._ledger.append(stream, step, noise, sums)

    def num_releases(self, stream: str = "", steps: Iterable[int] = ()) -> int:
        """Count the distinct releases that may have been made, in interrupted attempts too.

        ``steps`` of ``stream`` are counted as if their releases had been made.

        Raises:
            ValueError: if the ledger is damaged or was written by an earlier version, if a
                release was repeated with another noise or other sums, or if one noise was drawn
                for two releases. In the last two cases, the number of pairs is too small.
        """
        return self._ledger.count(stream, steps)

    @property
    def _ledger(self) -> Ledger:
        return Ledger(self.snapshots / "releases.jsonl")

    # snapshots -----------------------------------------------------------------------------

    def save_snapshot(
        self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> None:
        """Save one snapshot, then delete all but the newest ``KEPT_SNAPSHOTS``.

        Raises OSError if the snapshot cannot be written (for instance on a full disk); the
        previous snapshots are then intact.
        """
        from safetensors.torch import save

        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        name = f"step-{step:06d}"
        document = {
            **state,
            "step": step,
            "format": FORMAT,
            "ledger": self._ledger.state(),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        with self._explained(f"snapshot of step {step} in {self.path}"):
            with atomic_write(self.snapshots / f"{name}.safetensors", mode=0o600) as file:
                file.write(data)
            write_json(
                self.snapshots / f"{name}.json",
                {**document, "digest": json_digest(document)},
                mode=0o600,
            )
        for old in self._steps()[:-KEPT_SNAPSHOTS]:
            for suffix in (".json", ".safetensors"):
                (self.snapshots / f"step-{old:06d}{suffix}").unlink(missing_ok=True)

    def load_snapshot(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Load state and tensors of the newest intact snapshot; None if no step was taken.

        Raises:
            ValueError: if the privacy spent, or the state to continue from, is unknown: the ledger
                is damaged or shorter than the snapshot states, releases were made but no snapshot
                is intact, or an earlier version wrote the files.
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
                raise EarlierVersion(path)
            if (
                document.pop("digest", None) == json_digest(document)
                and document["step"] == step
                and document["sha256"] == hashlib.sha256(data).hexdigest()
            ):
                self._ledger.require(document["ledger"])
                return document, load(data)
        if made or any(step > 0 for step in self._steps()):
            raise ValueError(
                f"{self.snapshots} holds no intact snapshot, though {made} releases "
                "were made: start afresh in another folder, and add what they spent "
                "to what that run will spend"
            )
        return None

    def configuration(self) -> Any:
        """Return the run's configuration, from its result or newest intact snapshot, or None."""
        with contextlib.suppress(ValueError, OSError):
            if self.finished:
                return read_json(self.path / TRAINING).get("config")
        for step in reversed(self._steps()):
            with contextlib.suppress(ValueError, OSError):
                document = read_json(self.snapshots / f"step-{step:06d}.json")
                if document.pop("digest", None) == json_digest(document):
                    return document.get("config")
        return None

    def _steps(self) -> list[int]:
        if not self.snapshots.is_dir():
            return []
        names = [path.stem for path in self.snapshots.glob("step-*.json")]
        return sorted(int(name[5:]) for name in names if name[5:].isdigit())

    # checkpoint ----------------------------------------------------------------------------

    def save_checkpoint(self, write: Callable[[Path], None], documents: Mapping[str, Any]) -> None:
        """Save the finished model, then delete the snapshots.

        The snapshots' generator states would reveal the noise.

        Args:
            write: function that writes the model's files into an empty folder; the files are then
                moved into place.
            documents: content of JSON files, by name; ``training.json`` is written last.

        Raises:
            OSError: if a file cannot be written; the snapshots are then intact. Also if the
                snapshots cannot be deleted; the checkpoint is then complete.
        """
        aside = Path(tempfile.mkdtemp(dir=self.path, prefix=".checkpoint-"))
        try:
            with self._explained(f"checkpoint in {self.path}"):
                write(aside)
            for item in sorted(aside.iterdir()):
                if item.is_file():
                    item.chmod(0o666 & ~umask())  # safetensors lets only the owner read its files
                os.replace(item, self.path / item.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        with self._explained(f"checkpoint in {self.path}"):
            for name in sorted(documents, key=lambda name: name == TRAINING):
                write_json(self.path / name, documents[name])
        self.delete_snapshots()

    def delete_snapshots(self) -> None:
        """Delete the ledger and the snapshots of a finished run, whose result stays.

        Raises OSError if they cannot be deleted: with a snapshot, the noise could be computed and
        subtracted.
        """
        if not self.snapshots.exists():
            return
        try:
            shutil.rmtree(self.snapshots)
        except OSError as error:
            raise OSError(
                f"{self.snapshots} could not be deleted ({first_line(error)}) and would reveal the "
                f"noise: delete this folder before you publish {self.path}, whose result is saved"
            ) from error

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn a failed write into an OSError that names the file ``what`` and how to continue."""
        try:
            yield
        except Exception as error:  # on a full disk, model libraries raise errors of many types
            go_on = (
                "resume the run with --resume; the last snapshot is intact"
                if self._steps()
                else "begin the run again in an empty folder; it has no snapshot yet"
            )
            raise OSError(
                f"{what} could not be written ({first_line(error)}): free some space, then {go_on}"
            ) from error


@contextlib.contextmanager
def open_run(path: str | Path, *, resume: bool = False) -> Iterator[RunFolder]:
    """Open a run's folder, which stays locked until the block or the process ends.

    A missing folder is created.

    Raises:
        InUse: if another process has locked the folder.
        ValueError: if the folder is not empty and ``resume`` is False, or if it holds something
            other than a run.
        OSError: if the folder cannot be written, or if it holds snapshots of a finished run that
            cannot be deleted.
    """
    path = _validate.expanded("output", path)
    if path.exists() and not path.is_dir():
        _validate.fail("output", "a folder", str(path))
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    with (path / ".lock").open("ab") as lock:
        take(lock, path / ".lock", f"output {path}", "run")
        _require_room(folder, resume)
        _clear_remains(folder)
        if not folder.finished:
            folder.snapshots.mkdir(mode=0o700, exist_ok=True)  # snapshots reveal the noise
        try:
            yield folder
        finally:
            _remove_if_empty(path)


def _require_room(folder: RunFolder, resume: bool) -> None:
    """Raise ValueError unless the folder is empty, or holds a run to resume."""
    found = [
        item.name
        for item in folder.path.iterdir()
        if item.name != ".lock" and not item.name.startswith(".checkpoint-")
    ]
    if found and not resume:
        raise ValueError(
            f"output {folder.path} must be empty, found {sorted(found)[0]}: choose "
            "another folder, or continue that run with --resume"
        )
    if found and not (folder.finished or folder.snapshots.is_dir()):
        raise ValueError(
            f"output {folder.path} must be empty or hold a run to resume, found {sorted(found)[0]}"
        )


def _clear_remains(folder: RunFolder) -> None:
    """Delete the remains of a killed attempt: partial checkpoints, a finished run's snapshots."""
    for aside in folder.path.glob(".checkpoint-*"):
        shutil.rmtree(aside, ignore_errors=True)
    for name in (TRAINING, MEMBERSHIP):
        for torn in folder.path.glob(f".{name}.*"):
            torn.unlink(missing_ok=True)
    if folder.finished:
        folder.delete_snapshots()


def _remove_if_empty(path: Path) -> None:
    """Remove the folder of a run that was refused before its first snapshot."""
    with contextlib.suppress(OSError):
        (path / "snapshots").rmdir()  # succeeds only for an empty folder
    if [item.name for item in path.iterdir()] == [".lock"]:
        (path / ".lock").unlink()
        with contextlib.suppress(OSError):
            path.rmdir()
