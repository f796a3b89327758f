"""Tasks as immutable examples with stable ids, and the batches that a model takes.

A task comes from a local folder, from the Hugging Face hub, from the generator or from a user's own
files, and looks the same from all four: ``load_task("sst2").train`` is a tuple of :class:`Example`.
From there :func:`encode` makes token rows, :func:`collate` one padded batch, and
:func:`micro_batches` a length-sorted stream of batches that remembers which examples are in which.

    examples  records          task  splits of records       tasks    tasks by name
    readers  files to rows     own  a user's own columns     hub      may the hub be asked
    selection  who is chosen   generated  public and private English   batches  token rows
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp._hub import hub_reachable, offline_requested
    from lowrank_dp.data.batches import SEPARATOR, collate, encode, micro_batches
    from lowrank_dp.data.examples import Example
    from lowrank_dp.data.own import Columns
    from lowrank_dp.data.selection import group_units, subset
    from lowrank_dp.data.task import Task, train_on_validation
    from lowrank_dp.data.tasks import TASKS, generated_corpus, load_task
    from lowrank_dp.losses import IGNORE
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "IGNORE", "SEPARATOR", "TASKS", "Columns", "Example", "Task", "collate", "encode",
    "generated_corpus", "group_units", "hub_reachable", "load_task", "micro_batches",
    "offline_requested", "subset", "train_on_validation",
]  # fmt: skip
