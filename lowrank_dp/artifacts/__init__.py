"""The only module that writes: results, tables, figures and arrays, each with its provenance.

A result is one frozen dataclass. ``save_result`` splits it into ``NAME.json`` (config, provenance,
scalars) and ``NAME.npz`` (arrays). Every file is written beside its final name and renamed, so a
reader never meets half of one. Nothing is pickled, and nothing that was pickled is read. ``runs``
holds what a training run writes: its ledger, snapshots and checkpoint.
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.artifacts.files import (
        MAX_JSON_BYTES,
        atomic_write,
        read_json,
        umask,
        write_json,
    )
    from lowrank_dp.artifacts.jsonable import plain, typed
    from lowrank_dp.artifacts.provenance import provenance
    from lowrank_dp.artifacts.results import (
        MAX_BYTES,
        NO_RECORDS,
        NON_PRIVATE,
        SCHEMA_VERSION,
        load_result,
        save_result,
    )
    from lowrank_dp.artifacts.tables import markdown_table, save_figure, save_table
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "MAX_BYTES", "MAX_JSON_BYTES", "NON_PRIVATE", "NO_RECORDS", "SCHEMA_VERSION",
    "atomic_write", "load_result", "markdown_table", "plain", "provenance", "read_json",
    "save_figure", "save_result", "save_table", "typed", "umask", "write_json",
]  # fmt: skip
