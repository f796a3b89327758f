"""Save results as ``NAME.json`` and ``NAME.npz``, and load them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lowrank_dp import _validate
from lowrank_dp.artifacts.files import atomic_write, encode_json, read_json
from lowrank_dp.artifacts.jsonable import from_jsonable, to_jsonable
from lowrank_dp.artifacts.provenance import provenance

R = TypeVar("R")

SCHEMA_VERSION = 1
MAX_BYTES = 1 << 30  # limit of the JSON and of the unpacked arrays: a small .npz can hold any size
_DIGEST = "arrays_sha256"  # of NAME.npz; absent in results of earlier versions
_OWN_KEYS = ("schema_version", "kind", "arrays", _DIGEST)


def save_result(
    result: Any, folder: str | Path, name: str, *, seed: int | None = None, device: str = "cpu"
) -> Path:
    """Save a frozen dataclass: its arrays as ``NAME.npz``, and all other fields as ``NAME.json``.

    If the dataclass has an empty field ``provenance``, the saved field states the
    versions, the machine, the commit, the command and the time (UTC) of this process. A loaded
    result keeps its saved provenance.

    Args:
        result: instance of a dataclass; numpy arrays may be fields, but not inside other fields.
        folder: where to save; created if missing.
        name: file name without suffix.
        seed: random seed of the experiment, for the provenance.
        device: device of the experiment, for the provenance.

    Returns:
        The path of the JSON file.

    Raises:
        ValueError: if ``result`` is no dataclass instance, or holds a value that neither file can
            hold (an object that would be pickled, NaN outside an array).
        OSError: if the folder cannot be written; the previous files are then intact.
    """
    if not dataclasses.is_dataclass(result) or isinstance(result, type):
        _validate.fail("result", "a dataclass instance", type(result).__name__)
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    arrays = {key: value for key, value in fields.items() if isinstance(value, np.ndarray)}
    for key, value in arrays.items():
        if value.dtype.hasobject:
            _validate.fail(key, "an array of numbers or text", "objects, which would be pickled")
    for key in _OWN_KEYS:
        if key in fields:
            _validate.fail("result", f"without a field {key!r}, a key of the JSON file itself", key)
    if fields.get("provenance") == {}:
        fields["provenance"] = provenance(seed=seed, device=device)
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    document = {
        "schema_version": SCHEMA_VERSION,
        "kind": type(result).__name__,
        "arrays": sorted(arrays),
        _DIGEST: hashlib.sha256(packed.getbuffer()).hexdigest(),
        **{key: to_jsonable(value) for key, value in fields.items() if key not in arrays},
    }
    path = Path(folder) / f"{name}.json"
    content = encode_json(document)  # raises before either file is touched
    with atomic_write(path.with_suffix(".npz")) as file:
        file.write(packed.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # on a full disk, this fails before either file is replaced
        with atomic_write(path) as other:
            other.write(content)
    return path


def load_result(folder: str | Path, name: str, kind: type[R]) -> R:
    """Load what :func:`save_result` saved, as an instance of the dataclass ``kind``.

    Raises:
        FileNotFoundError: if the folder has no result ``name``.
        ValueError: if a file is damaged, of another kind or schema, or lacks a field; or if the two
            files are of different results, because the process that saved them was killed.
    """
    path = Path(folder) / f"{name}.json"
    try:
        document = read_json(path, max_bytes=MAX_BYTES)
        arrays = _read_arrays(path.with_suffix(".npz"))
        with path.with_suffix(".npz").open("rb") as packed:
            digest = hashlib.file_digest(packed, "sha256").hexdigest()
    except FileNotFoundError as error:
        message = f"no result {path.name} in {path.parent}; compute it first"
        raise FileNotFoundError(message) from error
    except Exception as error:  # a damaged zip or array header can raise errors of any type
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"result {path} cannot be read: {reason}") from error
    if document.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"result {path} must have schema_version {SCHEMA_VERSION}; recompute it")
    if document.get(_DIGEST, digest) != digest:
        raise ValueError(
            f"result {path} is half written: {path.stem}.npz is of another result; recompute it"
        )
    if document.get("kind") != kind.__name__:
        raise ValueError(f"result {path} must be a {kind.__name__}, got {document.get('kind')!r}")
    fields = {**document, **arrays}
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for field in names:
        if field not in fields:
            raise ValueError(f"result {path} lacks the field {field!r}; recompute it")
    return from_jsonable(f"result {path}", {field: fields[field] for field in names}, kind)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}
