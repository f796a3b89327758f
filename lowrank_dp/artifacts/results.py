"""Write and read results: ``NAME.json`` and ``NAME.npz``."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lowrank_dp import _validate
from lowrank_dp.artifacts.files import atomic_write
from lowrank_dp.artifacts.jsonable import plain, typed

R = TypeVar("R")


SCHEMA_VERSION = 1


MAX_BYTES = 1 << 30  # of a result's JSON, and of its arrays unpacked: a small .npz can hold any


NON_PRIVATE = "NON-PRIVATE: computed from clean gradients, which no mechanism protects"


NO_RECORDS = "no private records: computed from formulas, or from generated or public data only"


def save_result(result: Any, folder: str | Path, name: str) -> Path:
    """Write a frozen dataclass as ``NAME.npz`` (its arrays) and ``NAME.json`` (all the rest).

    Returns the path of the JSON file. Raises ``OSError`` if the folder can't be written; what was
    there before is then intact.
    """
    if not dataclasses.is_dataclass(result) or isinstance(result, type):
        _validate.fail("result", "a dataclass instance", type(result).__name__)
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    arrays = {key: value for key, value in fields.items() if isinstance(value, np.ndarray)}
    for key, value in arrays.items():
        if value.dtype.hasobject:
            _validate.fail(key, "an array of numbers or text", "objects, which would be pickled")
    for key in ("schema_version", "kind", "arrays"):
        if key in fields:
            _validate.fail("result", f"without a field {key!r}, which names its file's own", key)
    rest = {key: plain(value) for key, value in fields.items() if key not in arrays}
    document = {
        "schema_version": SCHEMA_VERSION,
        "kind": type(result).__name__,
        "arrays": sorted(arrays),
        **rest,
    }
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    path = Path(folder) / f"{name}.json"
    with atomic_write(path.with_suffix(".npz")) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")
    return path


def load_result(folder: str | Path, name: str, kind: type[R]) -> R:
    """Read what :func:`save_result` wrote, as an instance of the dataclass ``kind``.

    Raises:
        FileNotFoundError: if there is no such result.
        ValueError: if a file is truncated, of another kind or schema, or lacks a field.
    """
    path = Path(folder) / f"{name}.json"
    try:
        document = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_BYTES else None
        with zipfile.ZipFile(path.with_suffix(".npz")) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if document is None or unpacked > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except FileNotFoundError as error:
        message = f"no result {path.name} in {path.parent}; compute it first"
        raise FileNotFoundError(message) from error
    except Exception as error:  # what a damaged zip, array header or JSON raises is open-ended
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"result {path} cannot be read: {reason}") from error
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"result {path} must have schema_version {SCHEMA_VERSION}; recompute it")
    if document.get("kind") != kind.__name__:
        raise ValueError(f"result {path} must be a {kind.__name__}, got {document.get('kind')!r}")
    fields = {**document, **arrays}
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in names:
        if name not in fields:
            raise ValueError(f"result {path} lacks the field {name!r}; recompute it")
    return typed(f"result {path}", {name: fields[name] for name in names}, kind)
