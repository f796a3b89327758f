"""Manifest of a run, ``membership.json``: its fields, and how it is written, read and checked.

A manifest that is read may come from anywhere. The reader executes nothing, follows no path in the
manifest, takes bounded memory, and checks every field.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_dp.artifacts.files import read_json
from lowrank_dp.data.examples import Example
from lowrank_dp.data.own import Columns
from lowrank_dp.data.tasks import known_name
from lowrank_dp.membership.checked_json import CheckedObject, is_hash, is_text, shown

SCHEMA_VERSION = 1
MAX_BYTES = 256 << 20
MAX_VALUES = 10_000_000  # 2.5 million records; a parsed value takes up to about 60 bytes
_SENSITIVE = "membership bits: whoever has this file knows who was trained on"
# the run's option "membership" -> the sampling scheme in the file
_SCHEME_OF = {"bernoulli": "bernoulli", "half": "fixed", "all": "all"}
_OPTION_OF = {scheme: option for option, scheme in _SCHEME_OF.items()}
_PROBABILITY = {"bernoulli": 0.5, "fixed": 0.5, "all": 1.0}  # that a unit is a member
_COLUMNS = ("ids", "content_hashes", "groups", "is_member")  # lists with one entry per record


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of ``membership.json``; SENSITIVE, because it names the records trained on.

    In the file, ``sampling`` has the key "coins", and ``num_members`` and ``num_records`` stand
    beside the lists.

    Attributes:
        task, split, source, kind: description of the data. ``task`` is a name, never a path.
        unit: the unit of privacy and of sampling: "example" or "group".
        template: {"separator": text between source and target} for generation, else None.
        max_length: number of tokens that a text is cut to, or None for no cut.
        base: {"model": hub id or name, "seed": seed of the head, of LoRA's A and of sampling}, and
            in later versions "weights", the SHA-256 of the base's weights.
        recipe: the run's configuration in JSON's types. Its ``task`` is the user's argument: for
            own files a path, which must not be followed.
        seed: the user's seed, or None.
        privacy: the statement of the guarantee.
        train_loss, eval_loss: losses after training; ``train_loss`` is NON-PRIVATE.
        sampling: {"scheme": "bernoulli", "fixed" (a half of fixed size) or "all",
            "probability": that a unit is a member, "seed": of the draw}.
        ids, content_hashes, groups: id, content hash and group of every record, (N,) each.
        is_member: whether each record was trained on, (N,) booleans, read-only.
    """

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
    sampling: Mapping[str, Any]
    ids: tuple[str, ...]
    content_hashes: tuple[str, ...]
    groups: tuple[str, ...]
    is_member: NDArray[np.bool_]
    schema_version: int = SCHEMA_VERSION

    @property
    def is_own_data(self) -> bool:
        """Whether the run read the user's own data, whose name may be that of a known task.

        The recipe's ``task`` decides, as it did when ``load_task`` read it.
        """
        return known_name(self.recipe["task"]) is None

    @classmethod
    def of(
        cls,
        units: Sequence[Sequence[Example]],
        members: Sequence[bool],
        *,
        membership: str,
        sampling_seed: int,
        **others: Any,
    ) -> Manifest:
        """Make the manifest of a run: ids and hashes of every record, never a text.

        Args:
            units: the units of privacy, each a list of records.
            members: for each unit, whether the run trains on the unit.
            membership: the run's option: "all", "bernoulli" or "half".
            sampling_seed: the seed of ``units.draw_members``.
            others: the other fields of the manifest, by name.
        """
        scheme = _SCHEME_OF[membership]
        records = [
            (example, bit) for unit, bit in zip(units, members, strict=True) for example in unit
        ]
        return cls(
            sampling={
                "scheme": scheme,
                "probability": _PROBABILITY[scheme],
                "seed": sampling_seed,
            },
            ids=tuple(example.id for example, _ in records),
            content_hashes=tuple(example.content_hash for example, _ in records),
            groups=tuple(example.group for example, _ in records),
            is_member=_read_only([bit for _, bit in records]),
            **others,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object of ``membership.json``."""
        names = [field.name for field in fields(self) if field.name not in _COLUMNS]
        context = {name: getattr(self, name) for name in names}
        version, sampling = context.pop("schema_version"), context.pop("sampling")
        return {
            "schema_version": version,
            "sensitive": _SENSITIVE,
            **context,
            "coins": sampling,
            "num_members": int(self.is_member.sum()),
            "num_records": len(self.ids),
            "ids": [*self.ids],
            "content_hashes": [*self.content_hashes],
            "groups": [*self.groups],
            "is_member": self.is_member.astype(int).tolist(),
        }


def read_manifest(path: str | os.PathLike[str], *, base: str | None = None) -> Manifest:
    """Read and check ``membership.json``.

    ``base``, given by the user, replaces the file's base model. Only the user may give an absolute
    path or a path with "..".

    Raises ValueError in one line, with the file and the field, for a file that no run writes: over
    256 MiB, damaged, not JSON, a field missing or of the wrong type, fields that contradict each
    other, a path that leads elsewhere.
    """
    path = Path(path)
    top = CheckedObject(f"{path}: ", _parse(path))
    if type(version := top.get("schema_version")) is not int or version != SCHEMA_VERSION:
        top.fail("schema_version", f"{SCHEMA_VERSION}, or else train again", version)
    records = _records(top)
    unit = top.text("unit", ("example", "group"))
    sampling, backbone = top.object("coins"), top.object("base")
    scheme = sampling.text("scheme", _PROBABILITY)
    if sampling.number("probability") != _PROBABILITY[scheme]:
        sampling.fail(
            "probability", f"{_PROBABILITY[scheme]} for {scheme!r}", sampling.get("probability")
        )
    units = records["groups"] if unit == "group" else records["ids"]
    _check_sampling(top, scheme, units, records["is_member"])
    return Manifest(
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
        sampling={
            "scheme": scheme,
            "probability": _PROBABILITY[scheme],
            "seed": sampling.integer("seed"),
        },
        **records,
    )


def _read_only(bits: Sequence[Any]) -> NDArray[np.bool_]:
    array = np.array(bits, dtype=np.bool_)
    array.setflags(write=False)
    return array


def _parse(path: Path) -> dict[str, Any]:
    """Parse the JSON object in a file, with bounded memory."""
    if not os.path.isfile(path):  # reading a pipe or a device might never end
        raise ValueError(
            f"{path.parent} has no {path.name}: train with python -m lowrank_dp.train "
            "--membership bernoulli, or pass --members FILE --nonmembers FILE (the "
            "shift check is then mandatory)"
        )
    try:
        return read_json(path, max_bytes=MAX_BYTES, max_values=MAX_VALUES, strict=True)
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror})") from None


def _records(top: CheckedObject) -> dict[str, Any]:
    """Read the lists that have one entry per record."""
    count = top.integer("num_records", low=1)
    ids = top.column("ids", count, "a line of printable text", is_text)
    if len(set(ids)) < count:
        twice, times = Counter(ids).most_common(1)[0]
        top.fail("ids", f"distinct ({times} are the same)", twice)
    groups = top.column("groups", count, "a line of printable text", is_text)
    hashes = top.column("content_hashes", count, "64 hexadecimal digits", is_hash)
    bits = top.column("is_member", count, "0 or 1", lambda bit: type(bit) is int and bit in (0, 1))
    if top.integer("num_members") != sum(bits):
        top.fail("num_members", f"{sum(bits)}, the sum of is_member", top.get("num_members"))
    return {
        "ids": tuple(ids),
        "content_hashes": tuple(hashes),
        "groups": tuple(groups),
        "is_member": _read_only(bits),
    }


def _check_sampling(
    top: CheckedObject, scheme: str, units: Sequence[str], is_member: NDArray[np.bool_]
) -> None:
    """Check that membership bits agree within a unit and fit the sampling scheme."""
    member: dict[str, bool] = {}
    for unit, bit in zip(units, is_member.tolist(), strict=True):
        if member.setdefault(unit, bit) != bit:
            top.fail("is_member", f"the same for all records of group {unit[:80]!r}", "both")
    count = sum(member.values())
    expected = {"all": len(member), "fixed": len(member) // 2}.get(scheme, count)
    if count != expected:
        top.fail(
            "is_member", f"true for {expected} of {len(member)} units with coins {scheme!r}", count
        )


def _template(top: CheckedObject) -> Mapping[str, str] | None:
    if top.get("template") is None:
        return None
    template = top.object("template")
    for name in template.values:
        if not isinstance(text := template.get(name), str) or len(text) > 80:
            template.fail(shown(name), "a text of at most 80 characters", text)
    return template.values


def _weights(backbone: CheckedObject) -> dict[str, str]:
    if not (digest := backbone.values.get("weights")):
        return {}
    if not is_hash(digest):
        backbone.fail("weights", "64 hexadecimal digits", digest)
    return {"weights": digest}


def _recipe(
    top: CheckedObject, backbone: CheckedObject, unit: str, scheme: str
) -> Mapping[str, Any]:
    """Read the recipe; its model, unit and membership must agree with the rest of the file."""
    recipe = top.object("recipe")
    for name, expected in (
        ("model", backbone.get("model")),
        ("unit", unit),
        ("membership", _OPTION_OF[scheme]),
    ):
        if recipe.get(name) != expected:
            recipe.fail(
                name, f"{shown(expected)}, as the rest of the file has it", recipe.get(name)
            )
    for name, value in recipe.values.items():
        if not _is_flat(value, 3):
            recipe.fail(shown(name), "a number, a text, or a flat list or object of them", value)
    for field in fields(Columns):
        column = recipe.values.get(f"{field.name}_column")
        if column is not None and not is_text(column):
            recipe.fail(f"{field.name}_column", "the name of a column, or null", column)
    if "data_seed" in recipe.values:
        recipe.integer("data_seed")
    if not isinstance(task := recipe.get("task"), str):
        recipe.fail("task", "the name of a task or a path", task)
    if (known := known_name(task)) and known != top.get("task"):
        recipe.fail("task", f"{shown(top.get('task'))}, as the rest of the file has it", task)
    return recipe.values


def _is_flat(value: Any, levels: int) -> bool:
    """Tell whether a value has at most ``levels`` levels of lists and objects."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(item, levels - 1) for item in inner)
