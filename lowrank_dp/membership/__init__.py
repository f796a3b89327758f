"""Membership of a run: which units it trains on, and ``membership.json``, which records them."""

from lowrank_dp.membership.manifest import Manifest, read_manifest
from lowrank_dp.membership.units import (
    MEMBERSHIPS,
    draw_members,
    fingerprint,
    group_units,
    manifest,
)

__all__ = [
    "MEMBERSHIPS",
    "Manifest",
    "draw_members",
    "fingerprint",
    "group_units",
    "manifest",
    "read_manifest",
]
