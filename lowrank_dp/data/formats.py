"""Read CSV, TSV, JSON Lines, JSON, Parquet and folders of `datasets` as tables of rows.

Every format gives the same rows for the same table, except for the types that the format lacks: a
cell of a CSV file is always a string. No content of a file is executed or copied to a cache, and
the limits below bound the memory that a reader takes.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank_dp._json import parse_json
from lowrank_dp.data.rows import Row

SUFFIXES = (
    *(
        f".{name}{zipped}"
        for name in ("csv", "tsv", "jsonl", "ndjson", "json")
        for zipped in ("", ".gz")
    ),
    ".parquet",
)
FORMATS = "CSV, TSV, JSON Lines, JSON or Parquet (.csv .tsv .jsonl .json, also with .gz, .parquet)"
MAX_LINE_BYTES = 1 << 20  # of a line of JSON Lines; the longest known example is far shorter
MAX_FILE_BYTES = 1 << 30  # unpacked: a small .gz file can hold any amount
MAX_ROWS = 5_000_000  # MNLI has 393 thousand
_ARROW_BATCH = 256  # number of rows converted at a time


@dataclass(frozen=True)
class Table:
    """The rows of one split, in order.

    Attributes:
        rows: the cells of each row, with the row's place: "file line n" (JSON Lines), or "file
            row n", counted from 1 without the header.
        columns: the names of all columns, in order.
        class_names: for each column that is a ``datasets.ClassLabel``, the names of its classes.
    """

    rows: list[Row]
    columns: tuple[str, ...]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class TooLarge(ValueError):
    """Error for a file that exceeds the limits of this module."""


def read_table(path: Path) -> Table:
    """Read one file in the format that its ending names.

    Raises ValueError in one line that names the file, and the row of the fault if it has one.
    """
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


def _table(rows: Iterable[Row]) -> Table:
    rows = list(rows)
    return Table(rows, tuple(dict.fromkeys(name for _, row in rows for name in row)))


def _check_size(where: object, size: int, num_rows: int) -> None:
    """Raise TooLarge if a table has more bytes, unpacked, or more rows than the limits."""
    if size > MAX_FILE_BYTES or num_rows > MAX_ROWS:
        raise TooLarge(
            f"{where}: a file must have at most {MAX_FILE_BYTES:,} bytes (unpacked) and "
            f"{MAX_ROWS:,} rows: split it"
        )


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """Open the unpacked bytes of a file, whose ending names gzip in any case of letters."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _content(path: Path) -> bytes:
    """Read the unpacked bytes of a file."""
    try:
        with _open(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: unreadable ({error})") from None
    _check_size(path, len(data), 0)
    return data


# --- JSON --------------------------------------------------------------------------------------


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON Lines file, plain or gzipped; blank lines are skipped.

    Raises ValueError, which names the file and the line, for a line that holds no JSON object.
    """
    number, size, where = 0, 0, str(path)
    try:
        with _open(path) as lines:
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path} line {number}"
                size += len(line)
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes")
                _check_size(where, size, number)
                if line.strip():
                    yield where, _json_row(where, line)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: unreadable after line {number} ({error})") from None


def _json_row(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        hint = ": call the file .json" if isinstance(row, list) else ""
        raise ValueError(f"{where}: must be a JSON object, got {type(row).__name__}{hint}")
    return row


def _json_array(path: Path, data: bytes) -> Table:
    _check_size(path, 0, data.count(b"{"))
    try:
        rows = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path} row {number}: must be a JSON object, got {type(row).__name__}"
            )
    return _table((f"{path} row {number}", row) for number, row in enumerate(rows, 1))


def _refuse_one_object(path: Path, data: bytes) -> None:
    """Raise ValueError for one object over several lines, or one that holds the whole table."""
    try:
        document = parse_json(data)
    except ValueError:
        return  # JSON Lines: its reader names the line of an error
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


# --- CSV and TSV -------------------------------------------------------------------------------


def _csv(path: Path, separator: str) -> Table:
    """Read every cell as a string: "NA" is a text, and an empty cell is the empty string."""
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
    except (ValueError, OverflowError, MemoryError) as error:  # pandas' parser errors too
        _require_separator(path, data.split(b"\n", 1)[0].decode(errors="replace"), separator)
        reason = " ".join(str(error).split()).removeprefix("Error tokenizing data. ")
        raise ValueError(
            f"{path}: not a table ({reason}); every row must have as many cells as the header"
        ) from None
    header, *cells = frame.itertuples(index=False, name=None)
    if separator == "\t" and len(header) > 1:
        _require_no_swallowed_row(path, header, cells)
    if quoting == csv.QUOTE_MINIMAL and b'"' in data:
        _require_whole_quoted_cells(path, data, separator)
    names = [str(name) for name in header]
    if len(names) == 1:
        _require_separator(path, names[0], separator)
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"{path}: column {twice[0]!r} occurs twice in the header; rename one")
    _check_size(path, 0, len(cells))
    # pandas writes its index as a column without a name
    kept = tuple(name for name in names if name.strip())
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
    """Raise ValueError if another character separates the header, as in a German Excel file."""
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
    """Tell whether a quote opens a cell that no quote closes, though each line is a whole row.

    Read with quoting, such a cell would swallow the rows up to the next quote.
    """
    lines = [line for line in data.split(b"\n") if line.strip()]
    if len({line.count(b"\t") for line in lines}) != 1:
        return False
    cells = re.findall(rb'(?:^|\t)("[^\t\r\n]*)', data, re.MULTILINE)
    return any(not re.fullmatch(rb'"(?:[^"]|"")*"', cell) for cell in cells)


def _require_no_swallowed_row(
    path: Path, header: Sequence[str], cells: Sequence[Sequence[str]]
) -> None:
    """Raise ValueError if a line of a cell has as many tabs as the header.

    Such a cell begins with a quote that is a part of its text, and ends at a quote in a later row.
    """
    tabs = len(header) - 1
    for number, row in enumerate(cells, 1):
        for name, cell in zip(header, row, strict=True):
            if "\n" in cell and any(line.count("\t") >= tabs for line in cell.split("\n")[1:]):
                raise ValueError(
                    f"{path} row {number}: column {name!r} contains a line with as many tabs as "
                    "the header, as if its quotes joined several rows: double the quotes within "
                    "cells, or save the table as .jsonl"
                )


def _require_whole_quoted_cells(path: Path, data: bytes, separator: str) -> None:
    """Raise ValueError if text follows the closing quote of a quoted cell.

    pandas reads such text as a part of the cell, without an error. The quote is a part of the text,
    or it closes a cell that a quote in an earlier row opened.
    """
    limit = csv.field_size_limit(max(len(data), csv.field_size_limit()))
    text = io.StringIO(data.decode("utf-8-sig"), newline="")
    reader = csv.reader(text, delimiter=separator, strict=True)
    try:
        for _ in reader:
            pass
    except csv.Error as error:
        raise ValueError(
            f"{path} line {reader.line_num}: a quote within a cell must be doubled, and the cell "
            f"quoted ({error}): write the table with a CSV library, or save it as .jsonl"
        ) from None
    finally:
        csv.field_size_limit(limit)


# --- Arrow: Parquet files and folders of `datasets` --------------------------------------------


def _parquet(path: Path) -> Table:
    """Read a Parquet file; sizes are checked before and while its rows are converted."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            size = sum(
                file.metadata.row_group(i).total_byte_size
                for i in range(file.metadata.num_row_groups)
            )
            _check_size(path, size, file.metadata.num_rows)
            rows = list(_arrow_rows(path, file.iter_batches(batch_size=_ARROW_BATCH)))
            return _arrow_table(rows, file.schema_arrow)
    except TooLarge:
        raise
    except Exception as error:  # Arrow raises errors of many types on a damaged file
        raise _unreadable(path, error) from None


def read_saved(path: Path, known: Mapping[str, str]) -> dict[str, Table]:
    """Read the splits of a Dataset or DatasetDict that ``save_to_disk`` wrote, without decoding.

    ``known`` maps the names of splits in the folder to their names in this package; other splits
    are not read. Cells such as images are not decoded. Raises ValueError if the folder is damaged,
    has no known split, or exceeds the limits.
    """
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(path))
        parts = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
        tables: dict[str, Table] = {}
        for name, part in parts.items():
            if name in known:
                where = path / name if isinstance(loaded, datasets.DatasetDict) else path
                _check_size(where, 0, part.num_rows)
                batches = part.with_format("arrow").iter(batch_size=_ARROW_BATCH)
                rows = list(_arrow_rows(where, batches))
                tables[known[name]] = _arrow_table(rows, part.features.arrow_schema)
    except TooLarge:
        raise
    except Exception as error:  # `datasets` raises errors of many types on a damaged folder
        raise _unreadable(path, error) from None
    if not tables:
        raise ValueError(
            f"{path} must have a split train, validation or test, has {', '.join(map(repr, parts))}"
        )
    return tables


def _arrow_rows(path: Path, batches: Iterable[Any]) -> Iterator[Row]:
    number = size = 0
    for batch in batches:
        size += batch.nbytes
        _check_size(path, size, number)
        for row in batch.to_pylist():
            number += 1
            yield f"{path} row {number}", row


def _arrow_table(rows: list[Row], schema: Any) -> Table:
    names = {field.name: _class_names(field, schema.metadata) for field in schema}
    columns = tuple(name for name in schema.names if not name.startswith("__index_level_"))
    return Table(rows, columns, {name: found for name, found in names.items() if found})


def _class_names(field: Any, metadata: Any) -> tuple[str, ...]:
    """Return the class names of an Arrow field, from the metadata that `datasets` writes."""
    import datasets
    import pyarrow as pa

    try:
        features = datasets.Features.from_arrow_schema(pa.schema([field], metadata=metadata))
    except (ValueError, TypeError):  # `datasets` does not know the type or the metadata
        return ()
    feature = features[field.name]
    return tuple(feature.names or ()) if isinstance(feature, datasets.ClassLabel) else ()


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ValueError(f"{path}: unreadable, damaged or cut off ({reason})")
