"""Store of one tensor per row of text, in a folder that several processes and runs share."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lowrank_dp.artifacts.files import atomic_write

KEY_BYTES = 32
_SUFFIX = ".safetensors"
_NAME_DIGITS = 32  # hexadecimal digits of the SHA-256 of a file that make up its name

# files whose content this process has compared with their names: path, inode, size, times
_verified: set[tuple[Path, int, int, int, int]] = set()


class RowStore:
    """Tensors (T_i, d) by key, in files that are mapped into memory.

    Every file holds the tensors of many rows. A file is written once, and its name is the SHA-256
    of its content. Only the owner can read the folder and its files. A killed writer leaves no
    partial file. A file that cannot be read counts as absent, and so does a file whose content has
    another SHA-256 than its name, because it was changed in place. Each process compares a file
    with its name once, when the process opens the file.

    Args:
        folder: folder of the files. The folder and its parent are made if they are missing; only
            the owner can read a new folder.

    Raises:
        ValueError: if the folder belongs to another user.
        OSError: if the folder cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if self._folder.stat().st_uid != os.getuid():
            raise ValueError(f"{self._folder} must belong to the user who runs this process")
        self._folder.chmod(0o700)
        self._states: dict[str, Tensor] = {}
        self._places: dict[bytes, tuple[str, int, int]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the index of every file that was added since the last call."""
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            if path.name in self._states or path.name.startswith("."):
                continue
            with contextlib.suppress(SafetensorError, OSError):
                if not _is_as_written(path):
                    continue
                with safe_open(path, "pt") as file:
                    keys, lengths = file.get_tensor("keys"), file.get_tensor("lengths")
                    states = file.get_tensor("states")
                self._index(path.name, keys, lengths, states)

    def _index(self, name: str, keys: Tensor, lengths: Tensor, states: Tensor) -> None:
        self._states[name] = states
        start, flat = 0, keys.numpy().tobytes()
        for i, length in enumerate(lengths.tolist()):
            key = flat[i * KEY_BYTES : (i + 1) * KEY_BYTES]
            self._places.setdefault(key, (name, start, length))
            start += length

    def __contains__(self, key: bytes) -> bool:
        """Return whether the store holds a tensor under the key."""
        return key in self._places

    def __getitem__(self, key: bytes) -> Tensor:
        """Return the tensor under the key, (T, d), as a view of the file."""
        name, start, length = self._places[key]
        return self._states[name][start : start + length]

    def add(self, keys: Sequence[bytes], tensors: Sequence[Tensor]) -> None:
        """Write one file with a tensor (T_i, d) per key of ``KEY_BYTES`` bytes."""
        content = save(
            {
                "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8),
                "lengths": torch.tensor([len(tensor) for tensor in tensors]),
                "states": torch.cat([*tensors]).contiguous(),
            }
        )
        name = hashlib.sha256(content).hexdigest()[:_NAME_DIGITS] + _SUFFIX
        with atomic_write(self._folder / name, mode=0o600) as file:
            file.write(content)
        self.refresh()

    def digest(self, keys: Sequence[bytes]) -> str:
        """Return a SHA-256 that changes if the tensor under any of ``keys`` changes.

        The name of each tensor's file stands for the content, with which it was compared.
        """
        found = hashlib.sha256()
        for key in keys:
            found.update(f"{key.hex()} {self._places[key]}\n".encode())
        return found.hexdigest()

    @contextlib.contextmanager
    def lock(self, on_wait: Callable[[], object] | None = None) -> Iterator[None]:
        """Lock this store, and the user's others in its parent folder, for one process.

        Two processes then neither compute the same tensors nor together exceed a limit on the bytes
        of the parent folder. If another process holds the lock, ``on_wait()`` is called before this
        process waits. On a file system without locks, no process waits.
        """
        path = self._folder.parent / f"lock-{os.getuid()}"  # users may share the folder
        with open(path, "wb", opener=_private) as file:
            if not _locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                if on_wait is not None:
                    on_wait()
                _locked(file, fcntl.LOCK_EX)
            self.refresh()
            yield


def _is_as_written(path: Path) -> bool:
    """Return whether a file's content has the SHA-256 that its name states."""
    found = path.stat()
    key = (path.absolute(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if key not in _verified:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest[:_NAME_DIGITS] != path.stem:
            return False
        _verified.add(key)
    return True


def bytes_used(folder: str | Path) -> int:
    """Return the bytes of all stores in the subfolders of a folder; other files do not count."""
    total = 0
    for path in Path(folder).glob(f"*/{'[0-9a-f]' * _NAME_DIGITS}{_SUFFIX}"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _locked(file: BinaryIO, operation: int) -> bool:
    """Lock an open file; return False if another process holds the lock."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
