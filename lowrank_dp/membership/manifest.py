"""``membership.json``, the manifest of a run: read with bounded memory, every field checked.

The file may have come from anywhere. Nothing in it is run, no path in it is followed, and what is
wrong with it is one ``ValueError``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from lowrank_dp.data import TASKS, Columns
from lowrank_dp.data.examples import without_repeats

SCHEMA_VERSION = 1  # that of lowrank_dp.membership.units, as a test makes sure
MAX_BYTES = 256 << 20
MAX_VALUES = 10_000_000  # 2.5 million records; parsed, a value takes up to some 60 bytes
SCHEMES = {"bernoulli": 0.5, "fixed": 0.5, "all": 1.0}  # coins -> probability
_MEMBERSHIP = {"bernoulli": "bernoulli", "fixed": "half", "all": "all"}  # as the recipe has it
_LARGEST = 2**63


@dataclass(frozen=True)
class Manifest:
    """What ``membership.json`` holds: SENSITIVE, for it says who was trained on.

    Attributes:
        task, split, source, kind: of the data. ``task`` is a name, never a path.
        unit: of privacy and of the coins, "example" or "group".
        template: {"separator": text between source and target} for generation, else None.
        max_length: tokens that a text is cut to, or None.
        base: {"model": hub id or name, "seed": of head, LoRA's A and coins}, and "weights", the
            SHA-256 of the base's weights, in the manifest of a version that records it.
        recipe: the run's configuration in JSON's types; its ``task`` is as the user gave it, so
            for their own files it is a path, which must not be followed.
        seed: the user's, or None.
        train_loss, eval_loss: at the end; the first is NON-PRIVATE.
        coins: {"scheme": "bernoulli", "fixed" (a half of fixed size) or "all",
            "probability": of a unit to be a member, "seed": theirs}.
        ids, content_hashes, groups: of every record, in the same order, (N,).
        is_member: (N,) booleans, read-only.
    """

    schema_version: int
    task: str
    split: str
    source: str
    kind: str
    unit: str
    template: Mapping[str, str] | None
    max_length: int | None
    base: Mapping[str, Any]
    recipe: Mapping[str, Any]
    seed: int | None
    privacy: str
    train_loss: float
    eval_loss: float
    coins: Mapping[str, Any]
    ids: tuple[str, ...]
    content_hashes: tuple[str, ...]
    groups: tuple[str, ...]
    is_member: NDArray[np.bool_]


def read_manifest(path: str | os.PathLike[str], *, base: str | None = None) -> Manifest:
    """Read and check ``membership.json``.

    ``base``, the user's own word, stands in for the file's base model; only so can that be an
    absolute path or one with "..".

    Raises ``ValueError`` in one line, with the file and field, on anything else than what a run
    writes: over 256 MiB, damaged, not JSON, a field missing or of the wrong type, fields that
    contradict each other, a path that leads elsewhere.
    """
    path = Path(path)
    top = _Object(f"{path}: ", _parse(path))
    if type(version := top.get("schema_version")) is not int or version != SCHEMA_VERSION:
        top.fail("schema_version", f"{SCHEMA_VERSION}, or else train again", version)
    count = top.integer("num_records", low=1)
    ids = top.column("ids", count, "a line of printable text", _is_text)
    if len(set(ids)) < count:
        twice, times = Counter(ids).most_common(1)[0]
        top.fail("ids", f"distinct ({times} are the same)", twice)
    groups = top.column("groups", count, "a line of printable text", _is_text)
    hashes = top.column("content_hashes", count, "64 hexadecimal digits", _is_hash)
    bits = top.column("is_member", count, "0 or 1", lambda bit: type(bit) is int and bit in (0, 1))
    is_member = np.array(bits, dtype=np.bool_)
    is_member.setflags(write=False)
    if top.integer("num_members") != is_member.sum():
        top.fail("num_members", f"{is_member.sum()}, the sum of is_member", top.get("num_members"))
    unit = top.text("unit", ("example", "group"))
    coins = top.object("coins")
    scheme, backbone = coins.text("scheme", SCHEMES), top.object("base")
    if coins.number("probability") != SCHEMES[scheme]:
        coins.fail("probability", f"{SCHEMES[scheme]} for {scheme!r}", coins.get("probability"))
    _check_coins(top, scheme, groups if unit == "group" else ids, is_member)
    return Manifest(
        schema_version=version,
        task=top.name("task"),
        split=top.name("split"),
        source=top.text("source"),
        kind=top.text("kind", ("classification", "regression", "generation")),
        unit=unit,
        template=_template(top),
        max_length=top.optional_integer("max_length", low=1),
        base={
            "model": backbone.name("model", folders=True) if base is None else base,
            "seed": backbone.integer("seed"),
            **_weights(backbone),
        },
        recipe=_recipe(top, backbone, unit, scheme),
        seed=top.optional_integer("seed"),
        privacy=top.text("privacy"),
        train_loss=top.number("train_loss"),
        eval_loss=top.number("eval_loss"),
        coins={"scheme": scheme, "probability": SCHEMES[scheme], "seed": coins.integer("seed")},
        ids=tuple(ids),
        content_hashes=tuple(hashes),
        groups=tuple(groups),
        is_member=is_member,
    )


def _parse(path: Path) -> dict[str, Any]:
    """The JSON object in the file: no NaN, no infinity, no field twice, not too many values."""
    if not os.path.isfile(path):  # nor is a pipe or a device, which could go on for ever
        raise ValueError(
            f"{path.parent} has no {path.name}: train with python -m lowrank_dp.train "
            "--membership bernoulli, or pass --members FILE --nonmembers FILE (the "
            "shift check is then mandatory)"
        )
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror})") from None
    if size > MAX_BYTES:
        raise ValueError(
            f"{path} must have at most {MAX_BYTES:,} bytes, got {size:,}: it is no "
            "manifest of a run"
        )
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(
            f"{path} must hold at most {MAX_VALUES:,} values: it is no manifest of a run"
        )
    try:
        document = json.loads(
            data.decode(),
            object_pairs_hook=without_repeats,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object, got {_shown(document)}")
    return document


def _finite(token: str) -> float:
    if not math.isfinite(value := float(token)):
        raise ValueError(f"{token[:20]} is not a finite number")
    return value


def _check_coins(top: _Object, scheme: str, units: list[str], is_member: NDArray[np.bool_]) -> None:
    """Whether coins of this scheme can have fallen so: one a unit."""
    coin: dict[str, bool] = {}
    for unit, bit in zip(units, is_member.tolist(), strict=True):
        if coin.setdefault(unit, bit) != bit:
            top.fail("is_member", f"the same for all records of group {unit[:80]!r}", "both")
    heads = sum(coin.values())
    expected = {"all": len(coin), "fixed": len(coin) // 2}.get(scheme, heads)
    if heads != expected:
        top.fail(
            "is_member", f"true for {expected} of {len(coin)} units with coins {scheme!r}", heads
        )


def _template(top: _Object) -> Mapping[str, str] | None:
    if top.get("template") is None:
        return None
    template = top.object("template")
    for name in template.values:
        if not isinstance(text := template.get(name), str) or len(text) > 80:
            template.fail(_shown(name), "a text of at most 80 characters", text)
    return template.values


def _weights(backbone: _Object) -> dict[str, str]:
    if not (digest := backbone.values.get("weights")):
        return {}
    if not _is_hash(digest):
        backbone.fail("weights", "64 hexadecimal digits", digest)
    return {"weights": digest}


def _recipe(top: _Object, backbone: _Object, unit: str, scheme: str) -> Mapping[str, Any]:
    """The recipe, if it is flat and says of model, unit and coins what the rest says."""
    recipe = top.object("recipe")
    for name, expected in (
        ("model", backbone.get("model")),
        ("unit", unit),
        ("membership", _MEMBERSHIP[scheme]),
    ):
        if recipe.get(name) != expected:
            recipe.fail(
                name, f"{_shown(expected)}, as the rest of the file has it", recipe.get(name)
            )
    for name, value in recipe.values.items():
        if not _is_flat(value, 3):
            recipe.fail(_shown(name), "a number, a text, or a flat list or object of them", value)
    for field in fields(Columns):
        column = recipe.values.get(f"{field.name}_column")
        if column is not None and not _is_text(column):
            recipe.fail(f"{field.name}_column", "the name of a column, or null", column)
    if "data_seed" in recipe.values:
        recipe.integer("data_seed")
    if top.get("task") in TASKS:
        recipe.name("task", folders=True)
    return recipe.values


def _is_flat(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(item, levels - 1) for item in inner)


@dataclass(frozen=True)
class _Object:
    """A JSON object whose getters check; ``where`` says file and outer field for their errors."""

    where: str
    values: Mapping[str, Any]

    def fail(self, name: str, requirement: str, value: object) -> NoReturn:
        raise ValueError(f"{self.where}{name} must be {requirement}, got {_shown(value)}")

    def get(self, name: str) -> Any:
        if name not in self.values:
            raise ValueError(f"{self.where}{name} is missing")
        return self.values[name]

    def object(self, name: str) -> _Object:
        if not isinstance(value := self.get(name), dict):
            self.fail(name, "an object", value)
        return _Object(f"{self.where}{name}.", value)

    def integer(self, name: str, *, low: int = 0) -> int:
        if type(value := self.get(name)) is not int or not low <= value < _LARGEST:
            self.fail(name, f"an integer >= {low}", value)
        return value

    def optional_integer(self, name: str, *, low: int = 0) -> int | None:
        return None if self.get(name) is None else self.integer(name, low=low)

    def number(self, name: str) -> float:
        if type(value := self.get(name)) not in (int, float) or not 0 <= value < _LARGEST:
            self.fail(name, "a number >= 0", value)
        return float(value)

    def text(self, name: str, options: Iterable[str] = ()) -> str:
        value, options = self.get(name), tuple(options)
        if not _is_text(value) or (options and value not in options):
            self.fail(
                name,
                f"one of {', '.join(options)}" if options else "a line of printable text",
                value,
            )
        return value

    def name(self, name: str, *, folders: bool = False) -> str:
        """A text that leads nowhere as a path, or with ``folders`` only further inside."""
        parts = re.split(r"[/\\]", value := self.text(name))
        if (
            not parts[0]
            or parts[0][0] == "~"
            or ":" in parts[0]
            or ".." in parts
            or (len(parts) > 1 and not folders)
        ):
            fix = (
                "a hub id or a name, and no path elsewhere, which only the user gives, as --base"
                if folders
                else "a plain name and no path"
            )
            self.fail(name, fix, value)
        return value

    def column(
        self, name: str, count: int, requirement: str, valid: Callable[[Any], bool]
    ) -> list[Any]:
        if not isinstance(values := self.get(name), list):
            self.fail(name, "a list", values)
        if len(values) != count:
            self.fail(name, f"a list of {count} entries, as num_records says", len(values))
        for index, value in enumerate(values):
            if not valid(value):
                self.fail(f"{name}[{index}]", requirement, value)
        return values


def _is_text(value: Any) -> bool:
    """No control characters, which a terminal might obey, and no halves of surrogate pairs."""
    return isinstance(value, str) and bool(value) and value.isprintable()


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _shown(value: object) -> str:
    """``value`` on one short line, however large it is."""
    if isinstance(value, str):
        return repr(value[:80])
    return repr(value)[:80] if isinstance(value, int | float | None) else type(value).__name__
