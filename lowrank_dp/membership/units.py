"""Who is trained on, drawn before training, and the manifest that remembers it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from lowrank_dp import _validate
from lowrank_dp.data import Example, group_units
from lowrank_dp.data.selection import draw, unit_content

__all__ = ["MEMBERSHIPS", "draw_members", "fingerprint", "group_units", "manifest"]
MEMBERSHIPS = ("all", "bernoulli", "half")
SCHEMA_VERSION = 1


def draw_members(units: Sequence[Sequence[Example]], membership: str, seed: int) -> list[bool]:
    """For each unit of privacy, whether it is trained on.

    "all" takes all. "bernoulli" gives each unit an independent fair coin: a hash of the unit's
    content, keyed by ``seed`` (:func:`lowrank_dp.data.selection.draw`), so that a unit more in the
    data changes no other unit's coin. "half" takes a uniformly random half (rounded down). A half
    of fixed size depends on all units at once: a unit more may change every bit. The privacy
    guarantee of a run with "half" is therefore one for neighbouring sets of members.
    """
    if _validate.choice("membership", membership, MEMBERSHIPS) == "all":
        return [True] * len(units)
    if membership == "bernoulli":
        return draw(map(unit_content, units), 0.5, "membership", seed, copies="apart")
    rng = random.Random(f"lowrank_dp membership {seed}")
    chosen = set(rng.sample(range(len(units)), len(units) // 2))
    return [i in chosen for i in range(len(units))]


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 over ids and contents to the letter: the same records in the same order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode())
    return digest.hexdigest()


def manifest(
    units: Sequence[Sequence[Example]],
    members: Sequence[bool],
    *,
    membership: str,
    coin_seed: int,
    **context: Any,
) -> dict[str, Any]:
    """``membership.json``: ids and content hashes of every record, never a text.

    ``context`` is what an attack needs to know beside it: task, base model, recipe, losses.
    """
    records = [
        (example, member) for unit, member in zip(units, members, strict=True) for example in unit
    ]
    probability = {"bernoulli": 0.5, "half": 0.5, "all": 1.0}[membership]
    scheme = {"bernoulli": "bernoulli", "half": "fixed", "all": "all"}[membership]
    return {
        "schema_version": SCHEMA_VERSION,
        "sensitive": "membership bits: whoever has this file knows who was trained on",
        **context,
        "coins": {"scheme": scheme, "probability": probability, "seed": coin_seed},
        "num_members": sum(member for _, member in records),
        "num_records": len(records),
        "ids": [example.id for example, _ in records],
        "content_hashes": [example.content_hash for example, _ in records],
        "groups": [example.group for example, _ in records],
        "is_member": [int(member) for _, member in records],
    }
