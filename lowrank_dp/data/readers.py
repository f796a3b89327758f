"""A user's own files as rows: CSV, TSV, JSON Lines, JSON arrays, Parquet, folders of `datasets`.

Every reader gives the same rows for the same table, up to the types that the format has: a cell of
a CSV file is always a string. Nothing that a file holds is run, and nothing is copied to a cache.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_dp.data import examples
from lowrank_dp.data.examples import read_jsonl

SUFFIXES = (
    *(
        f".{name}{zipped}"
        for name in ("csv", "tsv", "jsonl", "ndjson", "json")
        for zipped in ("", ".gz")
    ),
    ".parquet",
)
FORMATS = "CSV, TSV, JSON Lines, JSON or Parquet (.csv .tsv .jsonl .json, also with .gz, .parquet)"
_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
}
Row = tuple[str, dict[str, Any]]  # where the row stands, and its cells by column


@dataclass(frozen=True)
class Table:
    """The rows of one split, in order.

    Attributes:
        rows: each with "file line n" (JSON Lines) or "file row n" (from 1, without the header).
        columns: the names of all columns, in order.
        class_names: of each column that is a ``datasets.ClassLabel``, the names of its classes.
    """

    rows: list[Row]
    columns: tuple[str, ...]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_tables(path: Path) -> dict[str, Table]:
    """The splits of a user's own file or folder.

    A file is the train split. A folder was saved by ``datasets.save_to_disk``, or has one file per
    split: train, validation (or valid, val, dev, eval) and test, in any format; a split may be cut
    into ``train-00000-of-00002.parquet`` and so on. Raises ``ValueError`` in one line that names
    the file, and the row where the fault has one.
    """
    if path.is_file():
        return {"train": read_table(path)}
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved_folder(path)
    if not path.is_dir():
        raise ValueError(f"{path} must be a file or a folder")
    found: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        stem = re.sub(r"-\d+-of-\d+$", "", stem_of(file))
        if file.is_file() and stem in _NAMES and file.name != stem_of(file):
            found.setdefault(_NAMES[stem], []).append(file)
    if not found:
        raise ValueError(
            f"{path} must hold train and validation files in {FORMATS}, or be a "
            "folder that datasets saved; found none"
        )
    return {
        split: _joined(split, found[split])
        for split in dict.fromkeys(_NAMES.values())
        if split in found
    }


def stem_of(path: Path) -> str:
    """The file's name without the ending of a known format: the same name in every format."""
    name = path.name
    ending = next(
        (s for s in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), ""
    )
    return name[: len(name) - len(ending)] or name


def read_table(path: Path) -> Table:
    """One file in the format that its ending names."""
    ending = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if not path.name.lower().endswith(SUFFIXES):
        raise ValueError(
            f"{path} must be {FORMATS}, or a folder that datasets saved; save it as one of them"
        )
    if ending == "parquet":
        return _parquet(path)
    if ending in ("csv", "tsv"):
        return _csv(path, "," if ending == "csv" else "\t")
    if ending == "json":
        data = _content(path).removeprefix(codecs.BOM_UTF8)
        if data.lstrip()[:1] == b"[":
            return _json_array(path, data)
        _refuse_one_object(path, data)
    return _table(read_jsonl(path))


def _joined(split: str, files: list[Path]) -> Table:
    """One table of a split's files: a single one, or all parts of ``name-i-of-n``."""
    parts = [re.search(r"-(\d+)-of-(\d+)$", stem_of(file)) for file in files]
    whole = [int(part[2]) for part in parts if part]
    complete = len(whole) == len(files) and set(whole) == {len(files)}
    if (len(files) > 1 or whole) and not complete:
        raise ValueError(
            f"{files[0].parent} must hold one file of the {split} split, or all its "
            f"parts name-i-of-n, found {', '.join(file.name for file in files[:5])}"
        )
    tables = [read_table(file) for file in files]
    return Table(
        [row for table in tables for row in table.rows],
        tuple(dict.fromkeys(name for table in tables for name in table.columns)),
        tables[0].class_names,
    )


def _table(rows: Iterable[Row]) -> Table:
    rows = list(rows)
    return Table(rows, tuple(dict.fromkeys(name for _, row in rows for name in row)))


def _content(path: Path) -> bytes:
    """The unpacked bytes of a file; at most ``examples.MAX_FILE_BYTES``."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            data = file.read(examples.MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: unreadable ({error})") from None
    if len(data) > examples.MAX_FILE_BYTES:
        raise ValueError(
            f"{path}: a file must have at most {examples.MAX_FILE_BYTES:,} bytes "
            "(unpacked): split it"
        )
    return data


def _csv(path: Path, separator: str) -> Table:
    """Cells as strings, as they stand: "NA" is a text, and an empty cell the empty string."""
    import pandas

    data = _content(path)
    quoting = csv.QUOTE_MINIMAL
    if separator == "\t" and _has_bare_quotes(data):
        quoting = csv.QUOTE_NONE
    try:
        frame = pandas.read_csv(
            io.BytesIO(data),
            sep=separator,
            header=None,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
            quoting=quoting,
            on_bad_lines="error",
            low_memory=False,
        )
    except UnicodeDecodeError:
        raise _not_utf8(path, data) from None
    except (ValueError, OverflowError, MemoryError) as error:  # pandas' parser errors among them
        _require_separator(path, data.split(b"\n", 1)[0].decode(errors="replace"), separator)
        reason = " ".join(str(error).split()).removeprefix("Error tokenizing data. ")
        raise ValueError(
            f"{path}: not a table ({reason}); every row must have as many cells as the header"
        ) from None
    header, *cells = frame.itertuples(index=False, name=None)
    names = [str(name) for name in header]
    if len(names) == 1:
        _require_separator(path, names[0], separator)
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"{path}: column {twice[0]!r} occurs twice in the header; rename one")
    if len(cells) > examples.MAX_ROWS:
        raise ValueError(f"{path}: a file must have at most {examples.MAX_ROWS:,} rows: split it")
    kept = tuple(name for name in names if name.strip())  # pandas' index has no name
    return Table(
        [
            (
                f"{path} row {number}",
                {name: cell for name, cell in zip(names, row, strict=True) if name.strip()},
            )
            for number, row in enumerate(cells, 1)
        ],
        kept,
    )


def _require_separator(path: Path, header: str, separator: str) -> None:
    """Refuse a header in which another character separates the columns, as in German Excel."""
    other = max(",;\t|", key=header.count)
    if separator not in header and other in header:
        named = {"\t": "tabs", ",": "commas"}
        raise ValueError(
            f"{path}: the columns must be separated by {named[separator]}, and the "
            f"header has {named.get(other, repr(other))}: save it with "
            f"{named[separator]}, or as .tsv with tabs or .csv with commas"
        )


def _not_utf8(path: Path, data: bytes) -> ValueError:
    place, reason = "", "another encoding"
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place, reason = f" line {line}", error.reason
    return ValueError(f"{path}{place}: must be UTF-8 text ({reason}): save the file as UTF-8")


def _has_bare_quotes(data: bytes) -> bool:
    """Whether the lines are rows as they stand, and a quote opens a cell that no quote closes."""
    lines = [line for line in data.split(b"\n") if line.strip()]
    if len({line.count(b"\t") for line in lines}) != 1:
        return False
    cells = re.findall(rb'(?:^|\t)("[^\t\r\n]*)', data, re.MULTILINE)
    return any(not re.fullmatch(rb'"(?:[^"]|"")*"', cell) for cell in cells)


def _json_array(path: Path, data: bytes) -> Table:
    if data.count(b"{") > examples.MAX_ROWS:
        raise ValueError(f"{path}: a file must have at most {examples.MAX_ROWS:,} rows: split it")
    try:
        rows = json.loads(data, object_pairs_hook=examples.without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path} row {number}: must be a JSON object, got {type(row).__name__}"
            )
    return _table((f"{path} row {number}", row) for number, row in enumerate(rows, 1))


def _refuse_one_object(path: Path, data: bytes) -> None:
    """Refuse one object over several lines, or one that holds the whole table."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return  # JSON Lines, whose reader names the line of an error
    if not isinstance(document, dict):
        return
    columns = bool(document) and all(isinstance(v, dict) for v in document.values())
    holds_rows = any(
        isinstance(v, list) and v and isinstance(v[0], dict) for v in document.values()
    )
    if b"\n" in data.strip() or columns or holds_rows:
        raise ValueError(
            f"{path}: must be a JSON array of objects, or one object per line, got "
            f"one object with {', '.join(map(repr, [*document][:10]))}: save the "
            "records as an array"
        )


def _parquet(path: Path) -> Table:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            size = sum(
                file.metadata.row_group(i).total_byte_size
                for i in range(file.metadata.num_row_groups)
            )
            _check_size(path, size, file.metadata.num_rows)
            rows = list(_arrow_rows(path, file.iter_batches(batch_size=256)))
            return _arrow_table(rows, file.schema_arrow)
    except _TooLarge as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # whatever Arrow raises on a damaged file, said in one line
        raise _unreadable(path, error) from None


def _saved_folder(path: Path) -> dict[str, Table]:
    """A Dataset or DatasetDict that was saved: Arrow files, whose cells are not decoded."""
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(path))
        parts = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
        tables: dict[str, Table] = {}
        for name, part in parts.items():
            if name in _NAMES and _NAMES[name] not in tables:
                where = path / name if isinstance(loaded, datasets.DatasetDict) else path
                _check_size(where, 0, part.num_rows)
                batches = part.with_format("arrow").iter(batch_size=256)
                rows = list(_arrow_rows(where, batches))
                tables[_NAMES[name]] = _arrow_table(rows, part.features.arrow_schema)
    except _TooLarge as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # whatever `datasets` raises on a damaged folder, said in one line
        raise _unreadable(path, error) from None
    if not tables:
        raise ValueError(
            f"{path} must have a split train, validation or test, has {', '.join(map(repr, parts))}"
        )
    return tables


def unread_splits(path: Path) -> list[str]:
    """The splits of a folder saved by ``datasets`` whose names are none that is known."""
    file = path / "dataset_dict.json"
    return (
        [name for name in json.loads(file.read_bytes())["splits"] if name not in _NAMES]
        if file.is_file()
        else []
    )


class _TooLarge(Exception):
    """A table beyond the limits, which no wrapper of a library's errors may swallow."""


def _check_size(where: Path, size: int, num_rows: int) -> None:
    if size > examples.MAX_FILE_BYTES or num_rows > examples.MAX_ROWS:
        raise _TooLarge(
            f"{where}: a file must have at most {examples.MAX_FILE_BYTES:,} bytes "
            f"(unpacked) and {examples.MAX_ROWS:,} rows: split it"
        )


def _arrow_rows(path: Path, batches: Iterable[Any]) -> Iterator[Row]:
    number = size = 0
    for batch in batches:
        size += batch.nbytes
        _check_size(path, size, number)
        for row in batch.to_pylist():
            number += 1
            yield f"{path} row {number}", row


def _arrow_table(rows: list[Row], schema: Any) -> Table:
    import datasets

    try:
        features = datasets.Features.from_arrow_schema(schema)
    except Exception:  # a column of a type that `datasets` lacks: it has no class names either
        features = datasets.Features()
    names = {
        name: tuple(feature.names)
        for name, feature in features.items()
        if isinstance(feature, datasets.ClassLabel) and feature.names
    }
    columns = tuple(name for name in schema.names if not name.startswith("__index_level_"))
    return Table(rows, columns, names)


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ValueError(f"{path}: unreadable, damaged or cut off ({reason})")
