"""Who is trained on, drawn before training, and the manifest that remembers it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from lowrank_dp import _validate
from lowrank_dp.data import Example

MEMBERSHIPS = ("all", "bernoulli", "half")
SCHEMA_VERSION = 1


def draw_members(units: Sequence[Sequence[Example]], membership: str, seed: int
                 ) -> list[bool]:
    """For each unit of privacy, whether it is trained on.

    "bernoulli" throws an independent fair coin for each unit; "half" takes a uniformly random
    half (rounded down); "all" takes all.
    """
    rng = random.Random(f"lowrank_dp membership {seed}")
    if _validate.choice("membership", membership, MEMBERSHIPS) == "all":
        return [True] * len(units)
    if membership == "bernoulli":
        return [rng.random() < 0.5 for _ in units]
    chosen = set(rng.sample(range(len(units)), len(units) // 2))
    return [i in chosen for i in range(len(units))]


def group_units(examples: Sequence[Example], unit: str) -> list[list[Example]]:
    """The examples by unit of privacy, in order of first appearance."""
    units: dict[str, list[Example]] = {}
    for example in examples:
        units.setdefault(example.group if unit == "group" else example.id, []).append(example)
    return list(units.values())


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 over ids and contents to the letter: the same records in the same order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode())
    return digest.hexdigest()


def manifest(units: Sequence[Sequence[Example]], members: Sequence[bool], *, membership: str,
             coin_seed: int, **context: Any) -> dict[str, Any]:
    """``membership.json``: ids and content hashes of every record, never a text.

    ``context`` is what an attack needs to know beside it: task, base model, recipe, losses.
    """
    records = [(example, member) for unit, member in zip(units, members, strict=True)
               for example in unit]
    probability = {"bernoulli": 0.5, "half": 0.5, "all": 1.0}[membership]
    scheme = {"bernoulli": "bernoulli", "half": "fixed", "all": "all"}[membership]
    return {
        "schema_version": SCHEMA_VERSION,
        "sensitive": "membership bits: whoever has this file knows who was trained on",
        **context,
        "coins": {"scheme": scheme, "probability": probability, "seed": coin_seed},
        "num_members": sum(member for _, member in records), "num_records": len(records),
        "ids": [example.id for example, _ in records],
        "content_hashes": [example.content_hash for example, _ in records],
        "groups": [example.group for example, _ in records],
        "is_member": [int(member) for _, member in records],
    }
