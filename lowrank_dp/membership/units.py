"""Draw which units of privacy a run trains on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from lowrank_dp import _validate
from lowrank_dp.data.examples import Example
from lowrank_dp.data.selection import draw, group_units, unit_content

__all__ = ["MEMBERSHIPS", "draw_members", "fingerprint", "group_units"]
MEMBERSHIPS = ("all", "bernoulli", "half")


def draw_members(units: Sequence[Sequence[Example]], membership: str, seed: int) -> list[bool]:
    """Draw, for each unit of privacy, whether the run trains on the unit.

    Args:
        units: the units of privacy, each a list of records.
        membership: the sampling scheme. "all" takes all units. "bernoulli" draws each unit
            independently with probability 1/2. The draw is a hash of the unit's content, keyed by
            ``seed`` (``data.selection.draw``), so that adding a unit changes no other unit's
            membership. "half" takes a uniformly random half, rounded down. The size of the half is
            fixed, so each draw depends on all units: adding a unit may change every bit. The
            privacy guarantee of a run with "half" therefore holds for neighbouring sets of
            members.
        seed: random seed of the draw, which need not be secret.

    Returns one bit per unit. Raises ValueError for another ``membership``.
    """
    if _validate.choice("membership", membership, MEMBERSHIPS) == "all":
        return [True] * len(units)
    if membership == "bernoulli":
        return draw(map(unit_content, units), 0.5, "membership", seed, copies="apart")
    rng = random.Random(f"lowrank_dp membership {seed}")
    chosen = set(rng.sample(range(len(units)), len(units) // 2))
    return [i in chosen for i in range(len(units))]


def fingerprint(examples: Sequence[Example]) -> str:
    """Return the SHA-256 of the records, their ids and their order, in hexadecimal."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode())
    return digest.hexdigest()
