"""Tasks (benchmarks, or a user's own files) as immutable examples, and batches for a model.

``load_task("sst2").train`` is a tuple of :class:`Example`, whether the task comes from a local
folder, the Hugging Face hub, the generator or a user's own files. :func:`encode` makes token rows
of examples, :func:`collate` one padded batch, and :func:`micro_batches` batches by length.

    examples  records       task     splits of records     tasks     tasks by name
    rows  rows to records   formats  files to rows         readers   folders to splits
    own  a user's columns   labels   classes and scores    selection  random subsets
    template  texts around  encoding  records to token rows  batches  padded rows
    generated  generated English text         copies  public copies of private records
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp._hub import hub_reachable, offline_requested
    from lowrank_dp.data.batches import collate, micro_batches
    from lowrank_dp.data.encoding import SEPARATOR, encode
    from lowrank_dp.data.examples import Example
    from lowrank_dp.data.own import Columns
    from lowrank_dp.data.selection import group_units, subset
    from lowrank_dp.data.task import Task, train_on_validation
    from lowrank_dp.data.tasks import TASKS, load_task
    from lowrank_dp.losses import IGNORE
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "IGNORE", "SEPARATOR", "TASKS", "Columns", "Example", "Task", "collate", "encode",
    "group_units", "hub_reachable", "load_task", "micro_batches", "offline_requested", "subset",
    "train_on_validation",
]  # fmt: skip
