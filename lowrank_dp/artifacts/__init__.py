"""The only module that writes: results, tables, figures and arrays, each with its provenance.

A result is one frozen dataclass. ``save_result`` splits it into ``NAME.json`` (config, provenance,
scalars) and ``NAME.npz`` (arrays). Every file is written beside its final name and renamed, so a
reader never meets half of one. Nothing is pickled, and nothing that was pickled is read. ``runs``
holds what a training run writes: its ledger, snapshots and checkpoint.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import glob
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import types
import typing
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, get_type_hints

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import lowrank_dp
from lowrank_dp import _validate

R = TypeVar("R")
SCHEMA_VERSION = 1
MAX_BYTES = 1 << 30  # of a result's JSON, and of its arrays unpacked: a small .npz can hold any
NON_PRIVATE = "NON-PRIVATE: computed from clean gradients, which no mechanism protects"
NO_RECORDS = "no private records: computed from formulas, or from generated or public data only"
_VERSIONS = ("torch", "numpy", "scipy", "transformers", "peft", "opacus", "dp-accounting")


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


def provenance(*, seed: int | None = None, device: str = "cpu") -> dict[str, Any]:
    """Where and with what a result was computed: versions, machine, commit, command, time (UTC)."""
    versions = {name: metadata.version(name) for name in _VERSIONS if _installed(name)}
    return {
        "lowrank_dp": lowrank_dp.__version__,
        "git_commit": _git_commit(),
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "device": device,
        "seed": seed,
        "command": _command(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _git_commit() -> str:
    """Commit of the checkout the package runs from, "+changes" if it differs, else "unknown"."""
    folder = Path(lowrank_dp.__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "."],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("+changes" if changed else "")


def _command() -> str:
    """The command line, without the folders of the machine it ran on."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = module.name.removesuffix(".__main__") if module and module.name else None
    program = f"python -m {name}" if name else Path(sys.argv[0]).name
    return " ".join([program, *map(_without_folders, sys.argv[1:])])


def _without_folders(word: str) -> str:
    """``/folder/name`` as ``name``, also in ``--option=/folder/name``."""
    option, equals, value = word.partition("=")
    if equals and os.path.isabs(value):
        return option + equals + Path(value).name
    return Path(word).name if os.path.isabs(word) else word


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


def plain(value: Any) -> Any:
    """``value`` in JSON's own types: dataclasses, tuples, mappings, paths and numpy scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value


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


def typed(name: str, value: Any, hint: Any) -> Any:
    """A value read from JSON as the annotation ``hint`` says; ``ValueError`` if it does not fit.

    Lists become tuples and objects dataclasses; where ``hint`` says nothing, anything passes.
    """
    try:
        return _typed(name, value, hint)
    except RecursionError:
        raise ValueError(f"{name} must not be nested so deeply") from None


def _typed(name: str, value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        inner = get_type_hints(hint)
        if unknown := value.keys() - inner.keys():
            _validate.fail(hint.__name__, f"one with fields {', '.join(inner)}", sorted(unknown))
        values = {key: _typed(f"{name}: {key}", item, inner[key]) for key, item in value.items()}
        try:
            return hint(**values)
        except TypeError as error:  # a field is missing
            raise ValueError(f"{name} must be a whole {hint.__name__} ({error})") from None
    origin, inside = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in inside:
            with contextlib.suppress(ValueError):
                return _typed(name, value, option)
    elif origin is tuple and isinstance(value, list):
        hints = inside if inside and inside[-1] is not ... else inside[:1] * len(value)
        if len(hints or value) == len(value):
            return tuple(
                _typed(name, item, one)
                for item, one in zip(value, hints or [Any] * len(value), strict=True)
            )
    elif origin in (dict, Mapping) and isinstance(value, dict):
        return {key: _typed(name, item, (*inside, Any, Any)[1]) for key, item in value.items()}
    elif origin in (Any, object):
        if isinstance(value, list):
            return tuple(_typed(name, item, Any) for item in value)
        return value
    elif type(value) in ((int, float) if origin is float else (origin,)) or (
        value is None and origin is types.NoneType
    ):
        return value
    _validate.fail(name, f"of the type {getattr(hint, '__name__', hint)}", _short(value))


def _short(value: object) -> object:
    return value if isinstance(value, int | float | None) else type(value).__name__


def save_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    folder: str | Path,
    name: str,
    *,
    caption: str,
) -> list[Path]:
    """Write a table as ``NAME.csv``, ``NAME.md`` and ``NAME.tex``; ``caption`` heads the last two.

    Cells are written as given: format numbers beforehand.
    """
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"rows must each have {len(columns)} cells, one for each column")
    cells = [[str(cell) for cell in row] for row in rows]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *cells])
    body = [" & ".join(map(_latex, row)) + r" \\" for row in cells]
    tex = [
        r"\begin{table}",
        rf"\caption{{{_latex(caption)}}}",
        rf"\begin{{tabular}}{{{'l' * len(columns)}}}",
        r"\hline",
        " & ".join(map(_latex, columns)) + r" \\",
        r"\hline",
        *body,
        r"\hline",
        r"\end{tabular}",
        r"\end{table}",
    ]
    paths = []
    for suffix, content in (
        (".csv", text.getvalue()),
        (".md", f"{caption}\n\n{markdown_table(columns, rows)}\n"),
        (".tex", "\n".join(tex) + "\n"),
    ):
        path = Path(folder) / f"{name}{suffix}"
        with atomic_write(path) as file:
            file.write(content.encode())
        paths.append(path)
    return paths


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows under ``columns`` as a Markdown table; cells are written as given.

    >>> print(markdown_table(["rank", "AUC"], [(1, "0.873")]))
    | rank | AUC |
    |---|---|
    | 1 | 0.873 |
    """
    head, *rest = [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"
        for row in (columns, *rows)
    ]
    return "\n".join([head, "|" + "---|" * len(columns), *rest])


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{c: "\\" + c for c in "&%$#_{}"},
    }
)


def _latex(text: str) -> str:
    return text.translate(_LATEX)


def save_figure(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write ``NAME.png`` (200 dpi) and ``NAME.pdf`` (vector, fonts embedded)."""
    paths = []
    for suffix, options in ((".png", {"dpi": 200}), (".pdf", {"metadata": {"CreationDate": None}})):
        path = Path(folder) / f"{name}{suffix}"
        with atomic_write(path) as file:
            with mpl.rc_context({"pdf.fonttype": 42}):  # read when saving, not when drawing
                figure.savefig(file, format=suffix[1:], **options)
        paths.append(path)
    return paths
