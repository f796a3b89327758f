"""Files on disk: results with provenance, tables, figures, and the folders of training runs.

A result is one frozen dataclass, saved as ``NAME.json`` (config, provenance, scalars) and
``NAME.npz`` (arrays). Every file is written beside its final name and then renamed, so a reader
never sees an incomplete file. Nothing is pickled, and pickled data is never read.
:mod:`lowrank_dp.artifacts.runs` holds the ledger, the snapshots and the checkpoint of a run.
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy
from lowrank_dp.artifacts.provenance import provenance  # imported now: the name is also a module's

if TYPE_CHECKING:
    from lowrank_dp.artifacts.files import (
        MAX_JSON_BYTES,
        atomic_write,
        read_json,
        umask,
        write_json,
    )
    from lowrank_dp.artifacts.jsonable import from_jsonable, to_jsonable
    from lowrank_dp.artifacts.results import MAX_BYTES, SCHEMA_VERSION, load_result, save_result
    from lowrank_dp.artifacts.tables import markdown_table, save_figure, save_table
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "MAX_BYTES", "MAX_JSON_BYTES", "SCHEMA_VERSION", "atomic_write", "from_jsonable",
    "load_result", "markdown_table", "provenance", "read_json", "save_figure", "save_result",
    "save_table", "to_jsonable", "umask", "write_json",
]  # fmt: skip
