"""Tasks by name, from a local folder, the Hugging Face hub or the generator; own files by path.

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
from lowrank_dp.data import generated
from lowrank_dp.data.examples import Example, Spec, read_jsonl, record_group, to_examples
from lowrank_dp.data.own import Columns, own_task
from lowrank_dp.data.readers import SUFFIXES
from lowrank_dp.data.selection import partition, require_alone, threshold
from lowrank_dp.data.task import Task, build_task


def _glue(config: str, text: str, pair: str | None = None, **others: Any) -> Spec:
    return Spec(f"glue/{config}", "nyu-mll/glue", config, text, pair, **others)


_WITH_TEST = (("train", "train"), ("validation", "validation"), ("test", "test"))
# The hub repositories of E2E and DART hold a loading script, which `datasets` no longer runs;
# the hub's own conversion to Parquet lies under this revision.
_PARQUET = "refs/convert/parquet"
_ENTAILS = ("entailment", "not_entailment")

# Names, label order and metrics are those of the hub's nyu-mll/glue. GLUE's test labels are not
# public, so its test splits are not read.
TASKS: dict[str, Spec | None] = {
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
    "e2e": Spec(
        "e2e",
        "tuetschek/e2e_nlg",
        None,
        "meaning_representation",
        target="human_reference",
        metrics=("bleu", "rouge_l"),
        splits=_WITH_TEST,
        revision=_PARQUET,
    ),
    "dart": Spec(
        "dart",
        "Yale-LILY/dart",
        None,
        "tripleset",
        target="annotations",
        metrics=("bleu", "rouge_l"),
        splits=_WITH_TEST,
        revision=_PARQUET,
    ),
    "generated": None,  # sentiment, made in memory
    "generated-table": None,  # table to text, made in memory
}


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
    """A task by name, or the user's own data by path.

    A name is looked for in ``data_dir`` (``glue/sst2/train.jsonl.gz``, ``e2e/...``), else in the
    folder that ``LOWRANK_DP_DATA`` names, else on the hub (``hub_id`` and ``revision`` replace the
    defaults there). A path is a file in CSV, TSV, JSON Lines, JSON or Parquet, which becomes the
    train split; a folder with one file per split; or a folder that ``datasets.save_to_disk`` made.
    ``columns`` names the columns of such data; without it, columns that are called as GLUE's,
    E2E's or DART's, or source and target, are found by their names. Of a named task nothing is
    dropped: blank texts stay (one DART test reference is empty as released). Of own data, an empty
    cell is refused.

    ``max_examples`` is the expected number of rows that are kept of each split. ``seed`` chooses
    whole groups, so that the references of one record stay together. Each group is chosen alone,
    by a keyed hash against a threshold (``selection.partition``), so that one more record in the
    data changes the membership of that record only. ``seed`` also drives the generated tasks.

    ``warn`` lets one ``UserWarning`` name the columns of own data that are not read; the same line
    is the task's ``warning``. ``offline=None`` asks the environment, then whether the hub can be
    reached.

    Raises ``ValueError`` in one line: unknown name (the nearest is given), a broken file (its name
    and line), a hub out of reach (what to use instead), a subset without any record.
    """
    if max_examples is not None:
        max_examples = _validate.integer("max_examples", max_examples)
    key = re.sub(r"[-_ ]", "", str(name).lower().removeprefix("glue/"))
    known = {re.sub("-", "", task): task for task in TASKS} | {
        "e2enlg": "e2e",
        "mnlimatched": "mnli",
        "generatedsentiment": "generated",
    }
    if key in known and columns:
        raise ValueError(
            f"text_column, label_column and the like name columns of your own data, "
            f"and {known[key]}'s are known: leave them out, or give a path"
        )
    if key in known:
        task = _named_task(known[key], data_dir, revision, offline, seed, hub_id)
    elif Path(name).expanduser().exists():
        task = own_task(Path(name).expanduser(), columns or Columns())
        if warn and task.warning:
            warnings.warn(task.warning, stacklevel=2)
    elif os.sep in str(name) or str(name).lower().endswith((*SUFFIXES, ".xlsx")):
        _validate.fail("task", "a known name, or an existing folder or file", str(name))
    else:
        _validate.choice("task", str(name), TASKS)
    if max_examples is None:
        return task
    return replace(
        task,
        splits={
            split: _about(examples, max_examples, split, seed)
            for split, examples in task.splits.items()
        },
    )


def _about(examples: tuple[Example, ...], size: int, split: str, seed: int) -> tuple[Example, ...]:
    """About ``size`` examples, and at least one."""
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
    spec = TASKS[name]
    if spec is None:
        return _generated_task(name, seed)
    if data_dir is not None:
        root = _existing_folder("data_dir", data_dir)
        folder = next((f for f in (root / spec.folder, root) if _files(f, spec)), None)
        if folder is None:
            raise ValueError(
                f"data_dir must hold {spec.folder}/{spec.splits[0][1]}.jsonl.gz "
                f"or another split of {name}, got {str(root)!r}"
            )
        return _local_task(name, spec, folder)
    if os.environ.get("LOWRANK_DP_DATA"):
        folder = _existing_folder("LOWRANK_DP_DATA", os.environ["LOWRANK_DP_DATA"]) / spec.folder
        if _files(folder, spec):
            return _local_task(name, spec, folder)
    return _hub_task(name, spec, hub_id or spec.hub_id, revision or spec.revision, offline)


def _existing_folder(name: str, value: str | os.PathLike[str]) -> Path:
    folder = Path(value).expanduser()
    if not folder.is_dir():
        _validate.fail(name, "an existing folder", str(value))
    return folder


def _files(folder: Path, spec: Spec) -> dict[str, Path]:
    """The split files that ``folder`` has, by split."""
    paths = {
        split: [folder / f"{stem}.jsonl{zipped}" for zipped in (".gz", "")]
        for split, stem in spec.splits
    }
    return {
        split: next(p for p in both if p.is_file())
        for split, both in paths.items()
        if any(p.is_file() for p in both)
    }


def _local_task(name: str, spec: Spec, folder: Path) -> Task:
    splits = {
        split: to_examples(read_jsonl(path), name, split, spec)
        for split, path in _files(folder, spec).items()
    }
    return build_task(name, spec, splits, f"local folder {spec.folder}")


def _hub_task(
    name: str, spec: Spec, hub_id: str, revision: str | None, offline: bool | None
) -> Task:
    def refuse(reason: str) -> NoReturn:
        raise ValueError(
            f"{name} ({hub_id}) could not be had from the hub: {reason}; set "
            f"LOWRANK_DP_DATA to a folder with {spec.folder}/"
            f"{spec.splits[0][1]}.jsonl.gz, or use --task generated"
        )

    if offline is None:
        offline = offline_requested() or not hub_reachable()
    import datasets

    try:
        with hub_switched_off() if offline else contextlib.nullcontext():
            loaded = datasets.load_dataset(hub_id, spec.config, revision=revision)
    except Exception as error:  # whatever `datasets` and its file systems raise, said in one line
        refuse(
            "it is not cached and the hub is unreachable or switched off"
            if offline
            else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    splits = {}
    for split, stem in spec.splits:
        if stem in loaded:
            rows = ((f"{hub_id} {stem} row {i}", row) for i, row in enumerate(loaded[stem]))
            splits[split] = to_examples(rows, name, split, spec)
    return build_task(name, spec, splits, f"hub {hub_id}@{revision or 'main'}")


def _generated_task(name: str, seed: int) -> Task:
    if name == "generated":
        splits = {
            split: tuple(
                Example(f"{name}/{split}/{i}", text, label=label, group=f"{name}/{split}/{i}")
                for i, (text, label) in enumerate(rows)
            )
            for split, rows in generated.sentiment(seed).items()
        }
        return Task(
            name,
            "classification",
            2,
            ("negative", "positive"),
            ("accuracy",),
            splits,
            f"generated (seed {seed})",
        )
    splits = {
        split: tuple(
            Example(f"{name}/{split}/{i}", table, target=reference, group=record_group(name, table))
            for i, (table, reference) in enumerate(rows)
        )
        for split, rows in generated.tables(seed).items()
    }
    return Task(name, "generation", 0, (), ("bleu", "rouge_l"), splits, f"generated (seed {seed})")


def generated_corpus(num_texts: int, seed: int = 0) -> list[str]:
    """Public text in the style of the generated tasks and disjoint from them, for pretraining.

    Every sentence and every table belongs to the public or to the private side by its hash, so
    that no seed can bring one across.
    """
    return generated.corpus(_validate.integer("num_texts", num_texts), seed)
