"""Table of the known tasks (GLUE, E2E, DART): hub ids, columns, classes; load a task.

Sources of the tasks: GLUE, Wang et al., ICLR 2019; E2E, Novikova et al., SIGDIAL 2017; DART, Nan et
al., NAACL 2021.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from lowrank_dp import _validate
from lowrank_dp._hub import hub_reachable, hub_switched_off, offline_requested
from lowrank_dp._terminal import first_line
from lowrank_dp.data import generated
from lowrank_dp.data.examples import Example, record_group
from lowrank_dp.data.formats import SUFFIXES, read_jsonl
from lowrank_dp.data.own import Columns, own_task
from lowrank_dp.data.rows import to_examples
from lowrank_dp.data.selection import partition, require_alone, threshold
from lowrank_dp.data.task import Task, TaskSpec, build_task, train_on_validation


def _glue(config: str, text: str, pair: str | None = None, **others: Any) -> TaskSpec:
    return TaskSpec(f"glue/{config}", "nyu-mll/glue", config, text, pair, **others)


_WITH_TEST = (("train", "train"), ("validation", "validation"), ("test", "test"))
# The hub repositories of E2E and DART hold a loading script, which `datasets` no longer runs;
# the hub's own conversion to Parquet lies under this revision.
_PARQUET = "refs/convert/parquet"
_ENTAILS = ("entailment", "not_entailment")


def _table_to_text(folder: str, hub_id: str, text: str, target: str) -> TaskSpec:
    return TaskSpec(
        folder,
        hub_id,
        None,
        text,
        target=target,
        metrics=("bleu", "rouge_l"),
        splits=_WITH_TEST,
        revision=_PARQUET,
    )


_DART = _table_to_text("dart", "Yale-LILY/dart", "tripleset", "annotations")

# Names, label order and metrics are those of nyu-mll/glue on the hub. GLUE's test splits are left
# out, because their labels are not public.
TASKS: dict[str, TaskSpec | None] = {
    "cola": _glue("cola", "sentence", labels=("unacceptable", "acceptable"), metrics=("matthews",)),
    "sst2": _glue("sst2", "sentence", labels=("negative", "positive")),
    "mrpc": _glue(
        "mrpc",
        "sentence1",
        "sentence2",
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
    ),
    "qqp": _glue(
        "qqp",
        "question1",
        "question2",
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
    ),
    "stsb": _glue(
        "stsb", "sentence1", "sentence2", score_range=(0.0, 5.0), metrics=("pearson", "spearman")
    ),
    "mnli": _glue(
        "mnli",
        "premise",
        "hypothesis",
        labels=("entailment", "neutral", "contradiction"),
        splits=(
            ("train", "train"),
            ("validation", "validation_matched"),
            ("validation_mismatched", "validation_mismatched"),
        ),
    ),
    "qnli": _glue("qnli", "question", "sentence", labels=_ENTAILS),
    "rte": _glue("rte", "sentence1", "sentence2", labels=_ENTAILS),
    "wnli": _glue("wnli", "sentence1", "sentence2", labels=("not_entailment", "entailment")),
    "e2e": _table_to_text("e2e", "tuetschek/e2e_nlg", "meaning_representation", "human_reference"),
    "dart": _DART,
    "dart-validation": _DART,  # train_on_validation of "dart": copies of DART may lack train
    "generated": None,  # sentiment, generated in memory
    "generated-table": None,  # table to text, generated in memory
}
_ALIASES = {"e2enlg": "e2e", "mnlimatched": "mnli", "generatedsentiment": "generated"}


def load_task(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    offline: bool | None = None,
    max_examples: int | None = None,
    seed: int = 0,
    hub_id: str | None = None,
    columns: Columns | None = None,
    warn: bool = True,
) -> Task:
    """Load a task by its name, or the user's own data by path.

    Args:
        name: name of a task, or path of own data: a file in CSV, TSV, JSON Lines, JSON or Parquet,
            which becomes the train split; a folder with one file per split; or a folder that
            ``datasets.save_to_disk`` wrote.
        data_dir: folder with a named task's files (``glue/sst2/train.jsonl.gz``, ``e2e/...``).
            None takes the folder that ``LOWRANK_DP_DATA`` names, and else the hub.
        hub_id, revision: repository and revision on the hub, in place of the task's defaults. With
            either of them, ``LOWRANK_DP_DATA`` is not read.
        offline: whether to read the hub's local cache only; None does so if the environment asks
            for offline mode or the hub is unreachable.
        max_examples: the expected number of rows to keep of each split, in whole groups. Each group
            is chosen alone, by a keyed hash against a threshold (``selection.partition``), so
            that adding a record changes the membership of that record only.
        seed: random seed of the kept rows and of the generated tasks.
        columns: names of the columns of own data. With None, columns are found by the names that
            GLUE, E2E and DART use, or by the names source and target.
        warn: whether the ``warning`` of own data is issued as a ``UserWarning``.

    A named task keeps all its rows, blank texts included (DART has one blank reference in test). An
    empty cell of own data is an error.

    Raises ValueError in one line for an unknown name (the message has the nearest known name), a
    damaged file (its name and line), a hub out of reach (the alternatives), a subset without
    records, and ``data_dir``, ``hub_id`` or ``revision`` where it has no effect: for own data and
    generated tasks, and beside ``data_dir``.
    """
    if max_examples is not None:
        max_examples = _validate.integer("max_examples", max_examples)
    if not str(name):  # as a path, an empty name would be the current folder
        _validate.fail("task", "a known name, or an existing folder or file", str(name))
    known = known_name(name)
    if known and columns:
        raise ValueError(
            f"text_column, label_column and the like name columns of your own data, "
            f"and {known}'s are known: leave them out, or give a path"
        )
    if known:
        task = _named_task(known, data_dir, revision, offline, seed, hub_id)
    elif (path := _validate.expanded("task", name)).exists():
        _leave_out("own data", data_dir=data_dir, hub_id=hub_id, revision=revision)
        task = own_task(path, columns or Columns())
        if warn and task.warning:
            warnings.warn(task.warning, stacklevel=2)
    elif os.sep in str(name) or str(name).lower().endswith((*SUFFIXES, ".xlsx")):
        _validate.fail("task", "a known name, or an existing folder or file", str(name))
    else:
        _validate.choice("task", str(name), TASKS)
    if max_examples is None:
        return task
    splits = {k: _about(rows, max_examples, k, seed) for k, rows in task.splits.items()}
    return replace(task, splits=splits)


def known_name(name: str | os.PathLike[str]) -> str | None:
    """Return the task that ``name`` denotes, whatever its case and hyphens: "SST-2" is "sst2"."""
    key = re.sub(r"[-_ ]", "", str(name).lower().removeprefix("glue/"))
    return ({task.replace("-", ""): task for task in TASKS} | _ALIASES).get(key)


def _leave_out(what: str, **options: Any) -> None:
    """Raise ValueError if one of the options, which ``what`` does not read, is given."""
    for name, value in options.items():
        if value is not None:
            _validate.fail(name, f"left out for {what}", str(value))


def _about(examples: tuple[Example, ...], size: int, split: str, seed: int) -> tuple[Example, ...]:
    """Choose about ``size`` examples of a split; raise ValueError if none is chosen."""
    share = threshold(size, len(examples))

    def choose(rows: Sequence[Example]) -> tuple[Example, ...]:
        return partition(rows, share, f"max_examples {split}", seed)[0]

    kept = choose(examples)
    require_alone(choose, examples, repr, "max_examples")
    if not kept:
        raise ValueError(
            f"max_examples {size:,} chose none of the {len(examples):,} examples of "
            f"the {split} split (their number is random): give a larger one"
        )
    return kept


def _named_task(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    revision: str | None,
    offline: bool | None,
    seed: int,
    hub_id: str | None,
) -> Task:
    """Load a named task from ``data_dir``, ``LOWRANK_DP_DATA`` or the hub, in this order.

    A given ``hub_id`` or ``revision`` precedes the environment.
    """
    spec = TASKS[name]
    if spec is None:
        _leave_out(
            f"the task {name}, which is made in memory",
            data_dir=data_dir,
            hub_id=hub_id,
            revision=revision,
        )
        return _generated_task(name, seed)
    if name == "dart-validation":
        return replace(
            train_on_validation(_named_task("dart", data_dir, revision, offline, seed, hub_id)),
            name=name,
        )
    if data_dir is not None:
        _leave_out("a task that is read from data_dir", hub_id=hub_id, revision=revision)
        root = _existing_folder("data_dir", data_dir)
        folder = next((f for f in (root / spec.folder, root) if _files(f, spec)), None)
        if folder is None:
            raise ValueError(
                f"data_dir must hold {spec.folder}/{spec.splits[0][1]}.jsonl.gz "
                f"or another split of {name}, got {str(root)!r}"
            )
        return _local_task(name, spec, folder)
    if hub_id is None and revision is None and os.environ.get("LOWRANK_DP_DATA"):
        folder = _existing_folder("LOWRANK_DP_DATA", os.environ["LOWRANK_DP_DATA"]) / spec.folder
        if _files(folder, spec):
            return _local_task(name, spec, folder)
    return _hub_task(name, spec, hub_id or spec.hub_id, revision or spec.revision, offline)


def _existing_folder(name: str, value: str | os.PathLike[str]) -> Path:
    folder = _validate.expanded(name, value)
    if not folder.is_dir():
        _validate.fail(name, "an existing folder", str(value))
    return folder


def _files(folder: Path, spec: TaskSpec) -> dict[str, Path]:
    """Find the files of the splits in ``folder``, by split."""
    paths = {
        split: [folder / f"{stem}.jsonl{zipped}" for zipped in (".gz", "")]
        for split, stem in spec.splits
    }
    return {
        split: next(p for p in both if p.is_file())
        for split, both in paths.items()
        if any(p.is_file() for p in both)
    }


def _local_task(name: str, spec: TaskSpec, folder: Path) -> Task:
    splits = {
        split: to_examples(read_jsonl(path), name, split, spec)
        for split, path in _files(folder, spec).items()
    }
    return build_task(name, spec, splits, f"local folder {spec.folder}")


def _hub_task(
    name: str, spec: TaskSpec, hub_id: str, revision: str | None, offline: bool | None
) -> Task:
    def refuse(reason: str) -> NoReturn:
        raise ValueError(
            f"{name} ({hub_id}) could not be loaded from the hub: {reason}; set "
            f"LOWRANK_DP_DATA to a folder with {spec.folder}/"
            f"{spec.splits[0][1]}.jsonl.gz, or use --task generated"
        )

    if offline is None:
        offline = offline_requested() or not hub_reachable()
    import datasets

    try:
        with hub_switched_off() if offline else contextlib.nullcontext():
            loaded = datasets.load_dataset(hub_id, spec.config, revision=revision)
    except Exception as error:  # `datasets` and its file systems raise errors of many types
        refuse(
            "it is not cached and the hub is unreachable or switched off"
            if offline
            else f"{type(error).__name__}: {first_line(error)}"
        )
    splits = {}
    for split, stem in spec.splits:
        if stem in loaded:
            rows = ((f"{hub_id} {stem} row {i}", row) for i, row in enumerate(loaded[stem]))
            splits[split] = to_examples(rows, name, split, spec)
    return build_task(name, spec, splits, f"hub {hub_id}@{revision or 'main'}")


def _generated_task(name: str, seed: int) -> Task:
    """Make the task "generated" (sentiment) or "generated-table" (table to text)."""
    source = f"generated (seed {seed})"
    splits = {}
    if name == "generated":
        for split, sentences in generated.sentiment(seed).items():
            ids = [f"{name}/{split}/{i}" for i in range(len(sentences))]
            splits[split] = tuple(
                Example(id, text, label=label, group=id)
                for id, (text, label) in zip(ids, sentences, strict=True)
            )
        labels = ("negative", "positive")
        return Task(name, "classification", 2, labels, ("accuracy",), splits, source)
    for split, rows in generated.tables(seed).items():
        splits[split] = tuple(
            Example(f"{name}/{split}/{i}", table, target=text, group=record_group(name, table))
            for i, (table, text) in enumerate(rows)
        )
    return Task(name, "generation", 0, (), ("bleu", "rouge_l"), splits, source)
