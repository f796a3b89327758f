"""Membership of a run: the units that the run trains on, and their record, ``membership.json``.

units  draw the members     manifest  what membership.json holds     checked_json  its fields
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.data.selection import group_units
    from lowrank_dp.membership.manifest import Manifest, read_manifest
    from lowrank_dp.membership.units import MEMBERSHIPS, draw_members, fingerprint
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "MEMBERSHIPS", "Manifest", "draw_members", "fingerprint", "group_units", "read_manifest",
]  # fmt: skip
