"""A task: named splits of examples, and what kind of task they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lowrank_dp.data.examples import Example, Spec


@dataclass(frozen=True)
class Task:
    """A named task with its splits; ``source`` says where the examples came from."""

    name: str
    kind: str  # "classification", "regression", "generation"
    num_labels: int  # 1 for regression, 0 for generation
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: Mapping[str, tuple[Example, ...]]
    source: str
    unused: tuple[str, ...] = ()  # columns of a user's own files that are not read
    warning: str = ""  # a line that names them

    def split(self, name: str) -> tuple[Example, ...]:
        """The examples of one split; a ``ValueError`` that says what there is instead."""
        if name not in self.splits:
            hint = ""
            if name == "train" and "test" in self.splits:
                hint = (
                    "; lowrank_dp.data.train_on_validation(task) trains on validation and "
                    "evaluates on test"
                )
            elif name == "validation" and "train" in self.splits:
                hint = (
                    "; to train, give it one, or set some of the train split aside by holdout "
                    "(--holdout N)"
                )
            raise ValueError(
                f"{self.name} has no {name} split in {self.source} "
                f"(it has {', '.join(self.splits)}){hint}"
            )
        return self.splits[name]

    @property
    def train(self) -> tuple[Example, ...]:
        """The split to train on."""
        return self.split("train")

    @property
    def validation(self) -> tuple[Example, ...]:
        """The split to evaluate on (MNLI: the matched one)."""
        return self.split("validation")

    @property
    def test(self) -> tuple[Example, ...]:
        """The test split, where its answers are public."""
        return self.split("test")

    def restrict(self, ids: Iterable[str], split: str = "train") -> Task:
        """The task with ``split`` cut down to ``ids``, in the split's own order."""
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
    """``validation`` as the train split and ``test`` as validation, for DART without its train.

    Groups that also occur in test are left out of the new train split; ``source`` says how many.
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
    name: str, spec: Spec, splits: Mapping[str, tuple[Example, ...]], source: str
) -> Task:
    """A task of checked examples; ``ValueError`` if a split is empty or none is there."""
    num_labels = {"classification": len(spec.labels), "regression": 1, "generation": 0}[spec.kind]
    if not splits:
        raise ValueError(f"{name}: {source} must hold at least one split, found none")
    for split, examples in splits.items():
        if not examples:
            raise ValueError(f"{name}: the {split} split of {source} must not be empty")
    return Task(name, spec.kind, num_labels, spec.labels, spec.metrics, splits, source)
