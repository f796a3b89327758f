"""Who was trained on and who was not: the manifest of a run, joined to the texts of its task.

``membership.json`` holds ids and hashes and never a text, so the texts come from the task itself
and are compared with the hashes. In its place the user can give two files. Either way, no text is
on both sides: the membership of a text that is on both says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowrank_dp import _validate
from lowrank_dp.artifacts import runs
from lowrank_dp.data import TASKS, Columns, Example, Task, load_task, subset
from lowrank_dp.membership.manifest import Manifest, read_manifest
from lowrank_dp.mia import files, guards
from lowrank_dp.mia.checkpoint import Checkpoint

__all__ = ["MIN_RECORDS", "Manifest", "Records", "load_records", "read_manifest", "read_population"]
MIN_RECORDS = 20  # of either side: below, no interval says anything


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
        columns: of a given file of members, which column is what; "" where none was given.
        left_out: ids of records that are not attacked because their text occurs more than once:
            in several units of a manifest's pool, or again in a given file.
    """

    task: Task
    kind: str
    unit: str
    examples: tuple[Example, ...]
    is_member: NDArray[np.bool_]
    source: str
    coins: str | None
    columns: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the records are whole texts, without prompt, target or label."""
        return self.kind == "generation" and self.examples[0].target is None

    @property
    def shift_check_mandatory(self) -> bool:
        """Whether a result means nothing unless the shift check is passed."""
        return self.coins is None


def load_records(
    folder: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    members: str | os.PathLike[str] | None = None,
    nonmembers: str | os.PathLike[str] | None = None,
    base: str | None = None,
    max_records: int | None = None,
    seed: int = 0,
    columns: Columns | None = None,
    checkpoint: Checkpoint | None = None,
) -> Records:
    """The records that a checkpoint was, and was not, trained on.

    Args:
        folder: the checkpoint, with ``membership.json``; not read if both files are given.
        data_dir: as in ``data.load_task``. For a run on the user's own files, that folder or file:
            the manifest's word for it is not taken.
        members, nonmembers: files in any format that ``data.load_task`` reads. ``nonmembers``
            alone replaces those of the manifest.
        base: as in :func:`read_manifest`.
        max_records: keeps a random subset drawn from ``seed``, half of it members as far as there
            are enough; whole groups where the coins were thrown for groups.
        columns: names of the files' columns; None finds them by their names.
        checkpoint: the head under attack: it decides whether a file of texts is read as plain
            texts, and its classes' names decide the number of each label.

    A text that occurs in several units of a manifest's pool is left out with all its copies,
    whatever their coins were, so that the coins of the others stay independent. In given files, a
    text that occurs again on the same side counts once.

    Raises ``ValueError`` in one line: a broken manifest or file, records that the task does not
    have or whose texts differ from those trained on, a text that is given on both sides or on the
    side that the manifest contradicts, fewer than 20 of either side.
    """
    reading = files.Reading(columns or Columns(), checkpoint or Checkpoint())
    if members is not None and nonmembers is None:
        raise ValueError(
            "members must come with nonmembers: pass both files, or nonmembers alone "
            "beside membership.json"
        )
    if max_records is not None:
        max_records = _validate.integer("max_records", max_records, low=2 * MIN_RECORDS)
    if members is not None and nonmembers is not None:
        records = _two_files(Path(members), Path(nonmembers), reading)
        _check_against_manifest(Path(folder) / runs.MEMBERSHIP, records, base)
    else:
        records = _from_manifest(read_manifest(Path(folder) / runs.MEMBERSHIP, base=base), data_dir)
        if nonmembers is not None:
            records = _with_nonmembers(records, Path(nonmembers), reading)
        else:
            records = _without_copies(records)
    counts = np.bincount(records.is_member, minlength=2).tolist()
    for count, all_are in zip(
        counts, ("every record is a member", "no record is a member"), strict=True
    ):
        if count == 0:
            raise ValueError(
                f"{all_are}: train with --membership bernoulli, or pass --nonmembers FILE"
            )
    if max_records is not None:
        records = _sample(records, max_records, seed)
        counts = np.bincount(records.is_member, minlength=2).tolist()
    if min(counts) < MIN_RECORDS:
        raise ValueError(
            f"{records.source} must give at least {MIN_RECORDS} members and as many "
            f"others, got {counts[1]} and {counts[0]}: attack a model that was "
            "trained on more, or pass more non-members or a larger max_records"
        )
    records.is_member.setflags(write=False)
    return records


def _from_manifest(manifest: Manifest, data_dir: str | os.PathLike[str] | None) -> Records:
    task = _load_pool(manifest, data_dir)
    if task.kind != manifest.kind:
        raise ValueError(
            f"{runs.MEMBERSHIP}: kind must be {task.kind!r}, that of {task.name}, got "
            f"{manifest.kind!r}"
        )
    # A run with max_examples or a hold-out knew only a part, so the whole split has them all.
    pool = {example.id: example for example in task.split(manifest.split)}
    where = f"{task.name}'s {manifest.split} split ({task.source})"
    _refuse_any(f"are not in {where}", [i for i in manifest.ids if i not in pool], manifest)
    examples = tuple(pool[i] for i in manifest.ids)
    known = zip(examples, manifest.content_hashes, manifest.groups, strict=True)
    _refuse_any(
        f"have another content hash or group in {where}",
        [e.id for e, content, group in known if (e.content_hash, e.group) != (content, group)],
        manifest,
    )
    return Records(
        task,
        task.kind,
        manifest.unit,
        examples,
        manifest.is_member.copy(),
        runs.MEMBERSHIP,
        manifest.sampling["scheme"],
    )


def _load_pool(manifest: Manifest, data_dir: str | os.PathLike[str] | None) -> Task:
    if manifest.task in TASKS:
        return load_task(
            manifest.task, data_dir=data_dir, seed=manifest.recipe.get("data_seed", 0)
        )  # it makes generated data
    if data_dir is None or not Path(data_dir).expanduser().exists():
        raise ValueError(
            f"data_dir must be the folder or file {manifest.task!r} that the model "
            f"was trained on: paths are not taken from {runs.MEMBERSHIP}"
        )
    task = load_task(
        str(Path(data_dir).expanduser().absolute()), columns=Columns.of(manifest.recipe)
    )
    if task.name != manifest.task:
        _validate.fail(
            "data_dir",
            f"the folder or file {manifest.task!r} that the model was trained on",
            str(data_dir),
        )
    return task


def _refuse_any(what: str, ids: list[str], manifest: Manifest) -> None:
    if ids:
        raise ValueError(
            f"{len(ids)} of {len(manifest.ids)} records of {runs.MEMBERSHIP} {what}, "
            f"first {', '.join(map(repr, ids[:3]))}: use the data that was trained on "
            "(LOWRANK_DP_DATA or data_dir)"
        )


def _two_files(members: Path, nonmembers: Path, reading: files.Reading) -> Records:
    inside = files.read(members, "members", reading)
    outside = files.read(nonmembers, "nonmembers", reading, inside.task.name)
    task, (first, second) = files.in_common_classes([inside, outside], reading.checkpoint)
    blank = Records(
        task,
        task.kind,
        "example",
        first,
        np.ones(len(first), np.bool_),
        members.name,
        None,
        inside.columns,
    )
    _require_same_form(nonmembers, outside, blank)
    return _joined(blank, second, nonmembers)


def _with_nonmembers(records: Records, path: Path, reading: files.Reading) -> Records:
    """The members of ``records`` and the rows of a file, which must be of the same form."""
    given = files.read(path, "nonmembers", reading, records.task.name)
    _require_same_form(path, given, records)
    inside = replace(
        records,
        examples=tuple(
            e for e, bit in zip(records.examples, records.is_member, strict=True) if bit
        ),
    )
    return _joined(inside, files.in_classes_of(given, records.task), path)


def _joined(inside: Records, outside: Sequence[Example], path: Path) -> Records:
    """Members and non-members, each text once; ``ValueError`` if one is on both sides."""
    everything = (*inside.examples, *outside)
    truth = np.arange(len(everything)) < len(inside.examples)
    if 0 < truth.sum() < len(truth) and (both := guards.overlap(everything, truth)):
        raise ValueError(
            f"{path}: {len(both)} of {len(outside)} non-members have the text of a "
            f"member, first {', '.join(pair.nonmember for pair in both[:3])}: give "
            "records that were not trained on"
        )
    first: dict[str, str] = {}
    kept = [first.setdefault(e.content_hash, e.id) == e.id for e in everything]
    left_out = tuple(e.id for e, keep in zip(everything, kept, strict=True) if not keep)
    return replace(
        inside,
        examples=tuple(e for e, keep in zip(everything, kept, strict=True) if keep),
        is_member=truth[np.array(kept, np.bool_)],
        source=f"{inside.source} and {path.name}",
        coins=None,
        left_out=left_out,
    )


def _check_against_manifest(path: Path, records: Records, base: str | None) -> None:
    """Refuse given files that the checkpoint's own manifest, where there is one, contradicts."""
    if not path.is_file():
        return
    manifest = read_manifest(path, base=base)
    truth = dict(zip(manifest.content_hashes, manifest.is_member.tolist(), strict=True))
    trained = {
        content
        for content, bit in zip(manifest.content_hashes, manifest.is_member, strict=True)
        if bit
    }
    wrong = [
        example.id
        for example, bit in zip(records.examples, records.is_member, strict=True)
        if example.content_hash in truth and bit != (example.content_hash in trained)
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} given records are on the other side in {path.name}, first "
            f"{', '.join(wrong[:3])}: leave out --members and --nonmembers, or give "
            "files that agree with it"
        )


def _without_copies(records: Records) -> Records:
    """The records whose text is of one unit alone."""
    units: dict[str, set[str]] = {}
    for e in records.examples:
        units.setdefault(e.content_hash, set()).add(e.group if records.unit == "group" else e.id)
    kept = np.array([len(units[e.content_hash]) == 1 for e in records.examples], np.bool_)
    if kept.all():
        return records
    return replace(
        records,
        is_member=records.is_member[kept],
        examples=tuple(e for e, keep in zip(records.examples, kept, strict=True) if keep),
        left_out=tuple(e.id for e, keep in zip(records.examples, kept, strict=True) if not keep),
    )


def read_population(
    path: str | os.PathLike[str], records: Records, *, columns: Columns | None = None
) -> tuple[Example, ...]:
    """A user's file of records that are in no model, of the same form as ``records``."""
    head = Checkpoint(records.kind)
    given = files.read(
        Path(path), "population", files.Reading(columns or Columns(), head), records.task.name
    )
    _require_same_form(Path(path), given, records)
    return files.in_classes_of(given, records.task)


def _require_same_form(path: Path, given: files.Given, records: Records) -> None:
    theirs, ours = given.examples[0], records.examples[0]
    if (given.task.kind, theirs.text_pair is None, theirs.target is None) != (
        records.kind,
        ours.text_pair is None,
        ours.target is None,
    ):
        form = (
            "plain text" if records.plain else "one text" if ours.text_pair is None else "two texts"
        )
        raise ValueError(
            f"{path} must have the columns of {records.task.name} ({records.kind}, "
            f"{form}), got {given.task.kind}"
        )


def _sample(records: Records, size: int, seed: int) -> Records:
    """At most ``size`` records, in their order."""
    count = int(records.is_member.sum())
    others = len(records.is_member) - count
    half = min(count, max(size // 2, size - others))
    kept: set[str] = set()
    for bit, share in ((True, half), (False, min(others, size - half))):
        side = [
            e for e, found in zip(records.examples, records.is_member, strict=True) if found == bit
        ]
        units = tuple(e if records.unit == "group" else replace(e, group=e.id) for e in side)
        kept.update(e.id for e in subset(units, share, f"{seed}/{bit}"))
    rows = [row for row, example in enumerate(records.examples) if example.id in kept]
    return replace(
        records,
        examples=tuple(records.examples[row] for row in rows),
        is_member=records.is_member[rows],
    )
