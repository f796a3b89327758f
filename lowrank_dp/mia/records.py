"""Records under attack, with their true membership.

The truth is in a run's manifest, ``membership.json``, which holds ids and hashes and never a text:
the texts come from the task itself and are compared with the hashes. The user can give two files
instead. In both cases, a text that is a member's and a non-member's is left out or refused, because
its membership is undefined.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowrank_dp import _validate
from lowrank_dp.artifacts import runs
from lowrank_dp.data import Columns, Example, Task, load_task, subset
from lowrank_dp.membership import Manifest, read_manifest
from lowrank_dp.mia import duplicates, given_files
from lowrank_dp.mia.checkpoint import Checkpoint

MIN_RECORDS = 20  # least number on either side; with fewer, every interval is too wide for use


@dataclass(frozen=True)
class Records:
    """Records under attack, with their true membership; SENSITIVE.

    Attributes:
        task: the task with all its splits, or with a train split only for given files.
        kind: "classification", "regression" or "generation".
        unit: unit of sampling, "example" or "group".
        examples: in fixed order, (N,).
        is_member: (N,) booleans, read-only.
        origin: source of the true membership: "membership.json", or names of files.
        sampling: the manifest's sampling scheme, or None if a file was given. In that case members
            and non-members may come from different distributions, and an attack may only tell the
            distributions apart.
        columns: the role of each column of a given file of members; "" without such a file.
        left_out: ids of records that are not attacked because their text occurs more than once: in
            several units of a manifest's pool, or again in a given file.
    """

    task: Task
    kind: str
    unit: str
    examples: tuple[Example, ...]
    is_member: NDArray[np.bool_]
    origin: str
    sampling: str | None
    columns: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the records are plain texts, without prompt, target or label."""
        return self.kind == "generation" and self.examples[0].target is None


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
    """Load the records that a checkpoint was, and was not, trained on.

    A text that occurs in several units of a manifest's pool is left out with all its copies,
    whatever their membership, so that the other units stay independent. In given files, a text that
    occurs again on the same side counts once.

    Args:
        folder: the checkpoint, with ``membership.json``; not read if both files are given.
        data_dir: as in ``data.load_task``. For a run on the user's own data, the file or folder of
            these data, because the path in the manifest is not followed.
        members, nonmembers: files in any format that ``data.load_task`` reads. ``nonmembers``
            alone replaces the non-members of the manifest.
        base: as in ``membership.read_manifest``.
        max_records: size of a random subset to keep, drawn from ``seed``; half of the subset are
            members if the records allow. None keeps all records. Groups stay whole if groups were
            the unit of sampling.
        seed: seed of the subset.
        columns: names of the files' columns; None finds known names.
        checkpoint: head of the attacked model. Its kind decides whether a file of texts is read as
            plain texts, and the names of its classes decide the number of each label.

    Raises ValueError in one line for a broken manifest or file, for records that the task does not
    have or whose texts differ from those trained on, for a text that is given on both sides, for
    given members that the checkpoint's manifest does not list as trained on, for given non-members
    that it does, and for fewer than 20 records on either side.
    """
    reading = given_files.Reading(columns or Columns(), checkpoint or Checkpoint())
    if members is not None and nonmembers is None:
        raise ValueError(
            "members must come with nonmembers: pass both files, or nonmembers alone "
            "beside membership.json"
        )
    if max_records is not None:
        max_records = _validate.integer("max_records", max_records, low=2 * MIN_RECORDS)
    if members is not None and nonmembers is not None:
        records = _from_two_files(Path(members), Path(nonmembers), reading)
        _check_against_manifest(Path(folder) / runs.MEMBERSHIP, records, base)
    else:
        records = _from_manifest(read_manifest(Path(folder) / runs.MEMBERSHIP, base=base), data_dir)
        if nonmembers is not None:
            records = _with_nonmembers(records, Path(nonmembers), reading)
        else:
            records = _without_copies(records)
    return _enough(records, max_records, seed)


def _enough(records: Records, max_records: int | None, seed: int) -> Records:
    """Draw the subset; ValueError unless both sides have ``MIN_RECORDS`` records."""
    if records.is_member.all() or not records.is_member.any():
        side = "every record is" if records.is_member.all() else "no record is"
        raise ValueError(
            f"{side} a member: train with --membership bernoulli, or pass --nonmembers FILE"
        )
    if max_records is not None:
        records = _sample(records, max_records, seed)
    others, members = np.bincount(records.is_member, minlength=2).tolist()
    if min(others, members) < MIN_RECORDS:
        raise ValueError(
            f"{records.origin} must give at least {MIN_RECORDS} members and as many "
            f"others, got {members} and {others}: attack a model that was "
            "trained on more, or pass more non-members or a larger max_records"
        )
    records.is_member.setflags(write=False)
    return records


def read_population(
    path: str | os.PathLike[str], records: Records, *, columns: Columns | None = None
) -> tuple[Example, ...]:
    """Read a user's file of records that are in no model, of the same form as ``records``.

    Raises ValueError for a file that cannot be read, or whose records have another form.
    """
    head = Checkpoint(records.kind)
    given = given_files.read_file(
        Path(path), "population", given_files.Reading(columns or Columns(), head), records.task.name
    )
    _require_same_form(Path(path), given, records)
    return given_files.in_classes_of(given, records.task)


# --- the manifest of a run -------------------------------------------------------------------


def _from_manifest(manifest: Manifest, data_dir: str | os.PathLike[str] | None) -> Records:
    task = _load_pool(manifest, data_dir)
    if task.kind != manifest.kind:
        raise ValueError(
            f"{runs.MEMBERSHIP}: kind must be {task.kind!r}, that of {task.name}, got "
            f"{manifest.kind!r}"
        )
    # a run with max_examples or a hold-out read a part of the split; the whole split has all ids
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
    """Load the task of a manifest; generated data come from the recipe's seed."""
    if not manifest.is_own_data:
        return load_task(manifest.task, data_dir=data_dir, seed=manifest.recipe.get("data_seed", 0))
    path = None if data_dir is None else _validate.expanded("data_dir", data_dir)
    if path is None or not path.exists():
        raise ValueError(
            f"data_dir must be the folder or file {manifest.task!r} that the model "
            f"was trained on: paths are not taken from {runs.MEMBERSHIP}"
        )
    task = load_task(str(path.absolute()), columns=Columns.of(manifest.recipe))
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


def _without_copies(records: Records) -> Records:
    """Leave out the records whose text occurs in several units."""
    units: dict[str, set[str]] = {}
    for e in records.examples:
        units.setdefault(e.content_hash, set()).add(e.group if records.unit == "group" else e.id)
    kept = np.array([len(units[e.content_hash]) == 1 for e in records.examples], np.bool_)
    if kept.all():
        return records
    return replace(
        records,
        is_member=records.is_member[kept],
        examples=tuple(compress(records.examples, kept)),
        left_out=tuple(e.id for e in compress(records.examples, ~kept)),
    )


# --- given files -----------------------------------------------------------------------------


def _from_two_files(members: Path, nonmembers: Path, reading: given_files.Reading) -> Records:
    inside = given_files.read_file(members, "members", reading)
    outside = given_files.read_file(nonmembers, "nonmembers", reading, inside.task.name)
    task, (first, second) = given_files.in_common_classes([inside, outside], reading.checkpoint)
    member_side = Records(
        task,
        task.kind,
        "example",
        first,
        np.ones(len(first), np.bool_),
        members.name,
        None,
        inside.columns,
    )
    _require_same_form(nonmembers, outside, member_side)
    return _joined(member_side, second, nonmembers)


def _with_nonmembers(records: Records, path: Path, reading: given_files.Reading) -> Records:
    """Join the members of ``records`` with the rows of a file, which must be of the same form."""
    given = given_files.read_file(path, "nonmembers", reading, records.task.name)
    _require_same_form(path, given, records)
    inside = replace(records, examples=tuple(compress(records.examples, records.is_member)))
    return _joined(inside, given_files.in_classes_of(given, records.task), path)


def _joined(inside: Records, outside: Sequence[Example], path: Path) -> Records:
    """Join members and non-members, each text once; ValueError if a text is on both sides."""
    everything = (*inside.examples, *outside)
    truth = np.arange(len(everything)) < len(inside.examples)
    if 0 < truth.sum() < len(truth) and (both := duplicates.overlap(everything, truth)):
        raise ValueError(
            f"{path}: {len(both)} of {len(outside)} non-members have the text of a "
            f"member, first {', '.join(pair.nonmember for pair in both[:3])}: give "
            "records that were not trained on"
        )
    first: dict[str, str] = {}
    kept = np.array([first.setdefault(e.content_hash, e.id) == e.id for e in everything], np.bool_)
    return replace(
        inside,
        examples=tuple(compress(everything, kept)),
        is_member=truth[kept],
        origin=f"{inside.origin} and {path.name}",
        sampling=None,
        left_out=tuple(e.id for e in compress(everything, ~kept)),
    )


def _check_against_manifest(path: Path, records: Records, base: str | None) -> None:
    """Raise ValueError if the checkpoint has a manifest that contradicts the given files.

    A manifest lists every record that was trained on, so each given member must be among them, and
    no given non-member may be. Non-members that the manifest does not list are accepted.
    """
    if not path.is_file():
        return
    manifest = read_manifest(path, base=base)
    trained = set(compress(manifest.content_hashes, manifest.is_member))
    inside, outside = (
        [e for e, bit in zip(records.examples, records.is_member, strict=True) if bit == side]
        for side in (True, False)
    )
    remedy = "leave out --members and --nonmembers, or give files that agree with it"
    if unknown := [e.id for e in inside if e.content_hash not in trained]:
        raise ValueError(
            f"{len(unknown)} of {len(inside)} given members are not among the records trained on "
            f"in {path.name}, first {', '.join(unknown[:3])}; the likely cause is other columns or "
            f"targets than those of the training, or other records: {remedy}"
        )
    if wrong := [e.id for e in outside if e.content_hash in trained]:
        raise ValueError(
            f"{len(wrong)} of {len(outside)} given non-members are among the records trained on in "
            f"{path.name}, first {', '.join(wrong[:3])}: {remedy}"
        )


def _require_same_form(path: Path, given: given_files.Given, records: Records) -> None:
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


# --- a random subset -------------------------------------------------------------------------


def _sample(records: Records, size: int, seed: int) -> Records:
    """Keep at most ``size`` records, in their order."""
    count = int(records.is_member.sum())
    others = len(records.is_member) - count
    half = min(count, max(size // 2, size - others))
    kept: set[str] = set()
    for bit, share in ((True, half), (False, min(others, size - half))):
        side = compress(records.examples, records.is_member == bit)
        units = tuple(e if records.unit == "group" else replace(e, group=e.id) for e in side)
        kept.update(e.id for e in subset(units, share, f"{seed}/{bit}"))
    chosen = np.array([example.id in kept for example in records.examples], np.bool_)
    return replace(
        records,
        examples=tuple(compress(records.examples, chosen)),
        is_member=records.is_member[chosen],
    )
