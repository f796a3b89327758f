"""Find the files of a user's own data, and read them as tables, one per split."""

from __future__ import annotations

import re
from pathlib import Path

from lowrank_dp._json import parse_json
from lowrank_dp.data.formats import FORMATS, SUFFIXES, Table, read_saved, read_table

# the name of a split in a user's data -> its name here
_SPLITS = {
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


def read_tables(path: Path) -> dict[str, Table]:
    """Read the splits of a user's own file or folder.

    A file is the train split. A folder was saved by ``datasets.save_to_disk``, or has one file per
    split: train, validation (or valid, val, dev, eval) and test, in any format; a split may be cut
    into ``train-00000-of-00002.parquet`` and so on.

    Raises ValueError in one line that names the file, and the row of the fault if it has one.
    """
    if path.is_file():
        return {"train": read_table(path)}
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        tables = read_saved(path, _SPLITS)
        _require_one_of_each(path)
        return tables
    if not path.is_dir():
        raise ValueError(f"{path} must be a file or a folder")
    found: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        stem = re.sub(r"-\d+-of-\d+$", "", stem_of(file))
        if file.is_file() and stem in _SPLITS and file.name != stem_of(file):
            found.setdefault(_SPLITS[stem], []).append(file)
    if not found:
        raise ValueError(
            f"{path} must hold train and validation files in {FORMATS}, or be a "
            "folder that datasets saved; found none"
        )
    return {
        split: _joined(split, found[split])
        for split in dict.fromkeys(_SPLITS.values())
        if split in found
    }


def unread_splits(path: Path) -> list[str]:
    """List the splits with unknown names in a folder that ``datasets`` saved."""
    return [name for name in _saved_splits(path) if name not in _SPLITS]


def _saved_splits(path: Path) -> list[str]:
    """List the splits of a DatasetDict in a folder; empty for a single Dataset."""
    file = path / "dataset_dict.json"
    return list(parse_json(file.read_bytes())["splits"]) if file.is_file() else []


def _require_one_of_each(path: Path) -> None:
    """Raise ValueError if two splits of a saved DatasetDict have one name in this package."""
    found: dict[str, list[str]] = {}
    for name in _saved_splits(path):
        found.setdefault(_SPLITS.get(name, name), []).append(name)
    for split, names in found.items():
        if len(names) > 1:
            raise ValueError(
                f"{path} must have one {split} split, has {', '.join(names)}: remove the others"
            )


def stem_of(path: Path) -> str:
    """Return the file's name without the ending of a known format."""
    name = path.name
    ending = next(
        (s for s in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), ""
    )
    return name[: len(name) - len(ending)] or name


def _joined(split: str, files: list[Path]) -> Table:
    """Read one split from its only file, or from all its parts ``name-i-of-n``."""
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
