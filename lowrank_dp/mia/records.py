"""Who was trained on and who was not: the manifest of a run, joined to the texts of its task.

``membership.json`` holds ids and hashes and never a text, so the texts come from the task itself
and are compared with the hashes. In its place the user can give two files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowrank_dp import _validate
from lowrank_dp.artifacts import runs
from lowrank_dp.data import (
    TASKS,
    Columns,
    Example,
    Task,
    load_task,
    subset,
    with_label_names,
)
from lowrank_dp.data.examples import record_group
from lowrank_dp.mia.manifest import Manifest, read_manifest

__all__ = ["MIN_RECORDS", "Manifest", "Records", "load_records", "read_manifest",
           "read_population"]
MIN_RECORDS = 20                    # of either side: below, no interval says anything


@dataclass(frozen=True)
class Records:
    """Records under attack, with the truth about them: SENSITIVE.

    Attributes:
        task: with all its splits; of the members' file alone it has only that as its train split.
        kind: "classification", "regression" or "generation".
        unit: of the coins, "example" or "group".
        examples: in fixed order, (N,); is_member: (N,) booleans, read-only.
        source: of the truth: "membership.json", or the files' names.
        coins: the manifest's scheme, or None where a file was given: then nobody vouches that
            members and non-members were drawn alike, and an attack may only tell them apart.
    """

    task: Task
    kind: str
    unit: str
    examples: tuple[Example, ...]
    is_member: NDArray[np.bool_]
    source: str
    coins: str | None

    @property
    def shift_check_mandatory(self) -> bool:
        """Whether a result means nothing unless the shift check is passed."""
        return self.coins is None


def load_records(folder: str | os.PathLike[str], *,
                 data_dir: str | os.PathLike[str] | None = None,
                 members: str | os.PathLike[str] | None = None,
                 nonmembers: str | os.PathLike[str] | None = None, base: str | None = None,
                 max_records: int | None = None, seed: int = 0) -> Records:
    """The records that a checkpoint was, and was not, trained on.

    Args:
        folder: the checkpoint, with ``membership.json``; not read if both files are given.
        data_dir: as in ``data.load_task``. For a run on the user's own files, that folder or file:
            the manifest's word for it is not taken.
        members, nonmembers: JSON Lines in the columns that ``data.load_task`` takes.
            ``nonmembers`` alone replaces those of the manifest.
        base: as in :func:`read_manifest`.
        max_records: keeps a random subset drawn from ``seed``, half of it members as far as there
            are enough; whole groups where the coins were thrown for groups.

    Raises ``ValueError`` in one line: a broken manifest or file, records that the task does not
    have or whose texts differ from those trained on, fewer than 20 of either side.
    """
    if members is not None and nonmembers is None:
        raise ValueError("members must come with nonmembers: pass both files, or nonmembers alone "
                         "beside membership.json")
    if max_records is not None:
        max_records = _validate.integer("max_records", max_records, low=2 * MIN_RECORDS)
    if members is not None and nonmembers is not None:
        records = _two_files(Path(members), Path(nonmembers))
    else:
        records = _from_manifest(read_manifest(Path(folder) / runs.MEMBERSHIP, base=base), data_dir)
        if nonmembers is not None:
            records = _with_nonmembers(records, Path(nonmembers))
    counts = np.bincount(records.is_member, minlength=2).tolist()
    for count, all_are in zip(counts, ("every record is a member", "no record is a member"),
                              strict=True):
        if count == 0:
            raise ValueError(f"{all_are}: train with --membership bernoulli, or pass "
                             "--nonmembers FILE")
    if max_records is not None:
        records = _sample(records, max_records, seed)
        counts = np.bincount(records.is_member, minlength=2).tolist()
    if min(counts) < MIN_RECORDS:
        raise ValueError(f"{records.source} must give at least {MIN_RECORDS} members and as many "
                         f"others, got {counts[1]} and {counts[0]}: attack a model that was "
                         "trained on more, or pass more non-members or a larger max_records")
    records.is_member.setflags(write=False)
    return records


def _from_manifest(manifest: Manifest, data_dir: str | os.PathLike[str] | None) -> Records:
    task = _load_pool(manifest, data_dir)
    if task.kind != manifest.kind:
        raise ValueError(f"{runs.MEMBERSHIP}: kind must be {task.kind!r}, that of {task.name}, got "
                         f"{manifest.kind!r}")
    # A run with max_examples or a hold-out knew only a part, so the whole split has them all.
    pool = {example.id: example for example in task.split(manifest.split)}
    where = f"{task.name}'s {manifest.split} split ({task.source})"
    _refuse_any(f"are not in {where}", [i for i in manifest.ids if i not in pool], manifest)
    examples = tuple(pool[i] for i in manifest.ids)
    known = zip(examples, manifest.content_hashes, manifest.groups, strict=True)
    _refuse_any(f"have another content hash or group in {where}", [
        e.id for e, content, group in known if (e.content_hash, e.group) != (content, group)],
        manifest)
    return Records(task, task.kind, manifest.unit, examples, manifest.is_member.copy(),
                   runs.MEMBERSHIP, manifest.coins["scheme"])


def _load_pool(manifest: Manifest, data_dir: str | os.PathLike[str] | None) -> Task:
    if manifest.task in TASKS:
        return load_task(manifest.task, data_dir=data_dir,
                         seed=manifest.recipe.get("data_seed", 0))  # it makes generated data
    if data_dir is None or not Path(data_dir).expanduser().exists():
        raise ValueError(f"data_dir must be the folder or file {manifest.task!r} that the model "
                         f"was trained on: paths are not taken from {runs.MEMBERSHIP}")
    task = load_task(str(Path(data_dir).expanduser().absolute()),
                     columns=Columns.of(manifest.recipe))
    if task.name != manifest.task:
        _validate.fail("data_dir", f"the folder or file {manifest.task!r} that the model was "
                       "trained on", str(data_dir))
    return task


def _refuse_any(what: str, ids: list[str], manifest: Manifest) -> None:
    if ids:
        raise ValueError(f"{len(ids)} of {len(manifest.ids)} records of {runs.MEMBERSHIP} {what}, "
                         f"first {', '.join(map(repr, ids[:3]))}: use the data that was trained on "
                         "(LOWRANK_DP_DATA or data_dir)")


def _two_files(members: Path, nonmembers: Path) -> Records:
    task, inside = _read_file(members, "members")
    blank = Records(task, task.kind, "example", inside, np.ones(len(inside), np.bool_),
                    members.name, None)
    return _with_nonmembers(blank, nonmembers)


def _with_nonmembers(records: Records, path: Path) -> Records:
    """The members of ``records`` and the rows of a file, which must be of the same form."""
    inside = tuple(e for e, bit in zip(records.examples, records.is_member, strict=True) if bit)
    task, outside = _read_file(path, "nonmembers", records.task.name)
    if inside:
        _require_same_form(path, task, outside[0], records, inside[0])
    known = records.task
    if known.kind == "classification":
        if records.coins is None:       # no task is known but that of the members' file
            known = _with_classes_of(known, task)
            inside = with_label_names(replace(records.task, splits={"train": inside}), known,
                                      str(path)).train
        outside = with_label_names(replace(task, splits={"train": outside}), known,
                                   str(path)).train
    truth = np.arange(len(inside) + len(outside)) < len(inside)
    return Records(known, records.kind, records.unit, inside + outside, truth,
                   f"{records.source} and {path.name}", None)


def _with_classes_of(known: Task, task: Task) -> Task:
    """``known`` with the classes of ``task`` as well; numbers in numeric order."""
    names = {*known.label_names, *task.label_names}
    ordered = tuple(sorted(names, key=int) if all(name.isdigit() for name in names) else
                    sorted(names))
    return replace(known, label_names=ordered, num_labels=len(ordered))


def read_population(path: str | os.PathLike[str], records: Records) -> tuple[Example, ...]:
    """A user's file of records that are in no model, of the same form as ``records``."""
    task, examples = _read_file(Path(path), "population", records.task.name)
    _require_same_form(Path(path), task, examples[0], records, records.examples[0])
    if records.kind == "classification":
        return with_label_names(replace(task, splits={"train": examples}), records.task,
                                str(path)).train
    return examples


def _require_same_form(path: Path, task: Task, theirs: Example, records: Records, ours: Example
                       ) -> None:
    if (task.kind, theirs.text_pair is None) != (records.kind, ours.text_pair is None):
        raise ValueError(f"{path} must have the columns of {records.task.name} ({records.kind}, "
                         f"{'one text' if ours.text_pair is None else 'two texts'}), got "
                         f"{task.kind}")


def _read_file(path: Path, side: str, name: str = "") -> tuple[Task, tuple[Example, ...]]:
    """A user's file: ids start with ``side``, and groups agree with those of task ``name``.

    By default the name is the file's own.
    """
    if not path.expanduser().is_file():
        _validate.fail(side, "an existing JSON Lines file", str(path))
    task = load_task(str(path.expanduser().absolute()))
    examples = []
    for example in task.train:
        unique = f"{side}/{example.id.rsplit('/', 1)[1]}"
        group = (record_group(name or task.name, example.text) if task.kind == "generation"
                 else unique)
        examples.append(replace(example, id=unique, group=group))
    return task, tuple(examples)


def _sample(records: Records, size: int, seed: int) -> Records:
    """At most ``size`` records, in their order."""
    count = int(records.is_member.sum())
    others = len(records.is_member) - count
    half = min(count, max(size // 2, size - others))
    kept: set[str] = set()
    for bit, share in ((True, half), (False, min(others, size - half))):
        side = [e for e, found in zip(records.examples, records.is_member, strict=True)
                if found == bit]
        units = tuple(e if records.unit == "group" else replace(e, group=e.id) for e in side)
        kept.update(e.id for e in subset(units, share, f"{seed}/{bit}"))
    rows = [row for row, example in enumerate(records.examples) if example.id in kept]
    return replace(records, examples=tuple(records.examples[row] for row in rows),
                   is_member=records.is_member[rows])
