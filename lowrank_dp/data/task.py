"""Tasks: named splits of examples, and the declaration of a task's files and columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lowrank_dp.data.examples import Example


@dataclass(frozen=True)
class TaskSpec:
    """Location of a task's data, and the meaning of its columns.

    Attributes:
        folder: folder of the task inside a local data folder.
        hub_id, config, revision: repository, configuration and revision on the Hugging Face hub.
        text, pair, target, label: names of the columns.
        group: name of the column that rows of one person share, or None.
        labels: names of the classes in the order of their numbers; () for scores and references.
        score_range: smallest and largest score.
        metrics: names of the task's metrics.
        splits: pairs of a split's name in this package and its name in files and on the hub.
    """

    folder: str
    hub_id: str
    config: str | None
    text: str
    pair: str | None = None
    target: str | None = None
    label: str = "label"
    group: str | None = None
    labels: tuple[str, ...] = ()
    score_range: tuple[float, float] = (-math.inf, math.inf)
    metrics: tuple[str, ...] = ("accuracy",)
    splits: tuple[tuple[str, str], ...] = (("train", "train"), ("validation", "validation"))
    revision: str | None = None

    @property
    def kind(self) -> str:
        """Kind of the task: "generation", "classification" or "regression"."""
        return "generation" if self.target else "classification" if self.labels else "regression"


@dataclass(frozen=True)
class Task:
    """A named task with its splits.

    Attributes:
        name: name of the task; for own data, the name of its file or folder.
        kind: "classification", "regression" or "generation".
        num_labels: number of classes; 1 for regression, 0 for generation.
        label_names: names of the classes in the order of their numbers.
        metrics: names of the task's metrics.
        splits: the examples of each split.
        source: where the examples come from, in words.
        unused: columns of a user's own files that are not read.
        warning: one line on doubtful contents of a user's own files, or "".
    """

    name: str
    kind: str
    num_labels: int
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: Mapping[str, tuple[Example, ...]]
    source: str
    unused: tuple[str, ...] = ()
    warning: str = ""

    def split(self, name: str) -> tuple[Example, ...]:
        """Return the examples of one split; raise ValueError, with a hint, for a missing split."""
        if name not in self.splits:
            hint = ""
            if name == "train" and "test" in self.splits:
                hint = (
                    "; lowrank_dp.data.train_on_validation(task) trains on validation and "
                    "evaluates on test (for DART, so does --task dart-validation)"
                )
            elif name == "validation" and "train" in self.splits:
                hint = (
                    "; to train, add such a split, or hold out a part of the train split "
                    "(--holdout N)"
                )
            raise ValueError(
                f"{self.name} has no {name} split in {self.source} "
                f"(it has {', '.join(self.splits)}){hint}"
            )
        return self.splits[name]

    @property
    def train(self) -> tuple[Example, ...]:
        """Examples to train on."""
        return self.split("train")

    @property
    def validation(self) -> tuple[Example, ...]:
        """Examples to evaluate on; for MNLI, the matched split."""
        return self.split("validation")

    @property
    def test(self) -> tuple[Example, ...]:
        """Examples of the test split; ValueError if its labels are not public."""
        return self.split("test")

    def select(self, ids: Iterable[str], split: str = "train") -> Task:
        """Return the task with only the examples ``ids`` in ``split``, in the split's own order.

        Raises ValueError if the split lacks one of the ids.
        """
        wanted = set(ids)
        kept = tuple(e for e in self.split(split) if e.id in wanted)
        if len(kept) < len(wanted):
            missing = sorted(wanted - {e.id for e in kept})
            raise ValueError(
                f"ids must be of {self.name}'s {split} split, "
                f"{len(missing)} are not, such as {missing[0]!r}"
            )
        return replace(self, splits={**self.splits, split: kept})


def train_on_validation(task: Task) -> Task:
    """Return the task with ``validation`` as its train split and ``test`` as its validation split.

    Use the function for a task without a train split, such as a local copy of DART. Groups that
    also occur in test are left out of the new train split; ``source`` gives their number.
    """
    in_test = {e.group for e in task.test}
    train = tuple(e for e in task.validation if e.group not in in_test)
    dropped = len({e.group for e in task.validation} & in_test)
    return replace(
        task,
        splits={"train": train, "validation": task.test},
        source=f"{task.source}; trains on validation without {dropped} groups that are "
        "also in test, evaluates on test",
    )


def build_task(
    name: str, spec: TaskSpec, splits: Mapping[str, tuple[Example, ...]], source: str
) -> Task:
    """Make a task of checked examples; raise ValueError if a split is empty or none is given."""
    num_labels = {"classification": len(spec.labels), "regression": 1, "generation": 0}[spec.kind]
    if not splits:
        raise ValueError(f"{name}: {source} must hold at least one split, found none")
    for split, examples in splits.items():
        if not examples:
            raise ValueError(f"{name}: the {split} split of {source} must not be empty")
    return Task(name, spec.kind, num_labels, spec.labels, spec.metrics, splits, source)
