"""Tasks as immutable examples with stable ids, and the batches that a model takes.

A task comes from a local folder, from the Hugging Face hub or from the generator, and looks the
same from all three: ``load_task("sst2").train`` is a tuple of :class:`Example`. From there
:func:`encode` makes token rows, :func:`collate` one padded batch, and :func:`micro_batches` a
length-sorted stream of batches that remembers which examples are in which.

Sources of the tasks: GLUE, Wang et al., ICLR 2019; E2E, Novikova et al., SIGDIAL 2017; DART, Nan et
al., NAACL 2021.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from lowrank_dp import _validate
from lowrank_dp.data import generated
from lowrank_dp.data.batches import IGNORE, SEPARATOR, collate, encode, micro_batches
from lowrank_dp.data.examples import Example, Spec, read_jsonl, record_group, to_examples

__all__ = [
    "IGNORE", "SEPARATOR", "TASKS", "Columns", "Example", "Task", "collate", "encode",
    "generated_corpus", "hub_reachable", "load_task", "micro_batches", "offline_requested",
    "subset", "train_on_validation",
]


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a user's own file; None is found by the columns' own names."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    target: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Task:
    """A named task with its splits; ``source`` says where the examples came from."""

    name: str
    kind: str                                        # "classification", "regression", "generation"
    num_labels: int                                  # 1 for regression, 0 for generation
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: Mapping[str, tuple[Example, ...]]
    source: str

    def split(self, name: str) -> tuple[Example, ...]:
        """The examples of one split; a ``ValueError`` that says what there is instead."""
        if name not in self.splits:
            hint = ("; lowrank_dp.data.train_on_validation(task) trains on validation and "
                    "evaluates on test" if name == "train" and "test" in self.splits else "")
            raise ValueError(f"{self.name} has no {name} split in {self.source} "
                             f"(it has {', '.join(self.splits)}){hint}")
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
            raise ValueError(f"ids must be of {self.name}'s {split} split, "
                             f"{len(missing)} are not, such as {missing[0]!r}")
        return replace(self, splits={**self.splits, split: kept})


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
    "cola": _glue("cola", "sentence", labels=("unacceptable", "acceptable"),
                  metrics=("matthews",)),
    "sst2": _glue("sst2", "sentence", labels=("negative", "positive")),
    "mrpc": _glue("mrpc", "sentence1", "sentence2", labels=("not_equivalent", "equivalent"),
                  metrics=("accuracy", "f1")),
    "qqp": _glue("qqp", "question1", "question2", labels=("not_duplicate", "duplicate"),
                 metrics=("accuracy", "f1")),
    "stsb": _glue("stsb", "sentence1", "sentence2", score_range=(0.0, 5.0),
                  metrics=("pearson", "spearman")),
    "mnli": _glue("mnli", "premise", "hypothesis",
                  labels=("entailment", "neutral", "contradiction"),
                  splits=(("train", "train"), ("validation", "validation_matched"),
                          ("validation_mismatched", "validation_mismatched"))),
    "qnli": _glue("qnli", "question", "sentence", labels=_ENTAILS),
    "rte": _glue("rte", "sentence1", "sentence2", labels=_ENTAILS),
    "wnli": _glue("wnli", "sentence1", "sentence2", labels=("not_entailment", "entailment")),
    "e2e": Spec("e2e", "tuetschek/e2e_nlg", None, "meaning_representation",
                 target="human_reference", metrics=("bleu", "rouge_l"), splits=_WITH_TEST,
                 revision=_PARQUET),
    "dart": Spec("dart", "Yale-LILY/dart", None, "tripleset", target="annotations",
                  metrics=("bleu", "rouge_l"), splits=_WITH_TEST, revision=_PARQUET),
    "generated": None,            # sentiment, made in memory
    "generated-table": None,      # table to text, made in memory
}

# The columns by which a user's own files are recognised.
_OWN_COLUMNS = (
    ("meaning_representation", None, "human_reference"), ("tripleset", None, "annotations"),
    ("source", None, "target"), ("sentence1", "sentence2", None),
    ("question1", "question2", None), ("premise", "hypothesis", None),
    ("question", "sentence", None), ("sentence", None, None), ("text", None, None),
)


def load_task(name: str, *, data_dir: str | os.PathLike[str] | None = None,
              revision: str | None = None, offline: bool | None = None,
              max_examples: int | None = None, seed: int = 0,
              hub_id: str | None = None, columns: Columns | None = None) -> Task:
    """A task by name, or the user's own files by path.

    A name is looked for in ``data_dir`` (``glue/sst2/train.jsonl.gz``, ``e2e/...``), else in the
    folder that ``LOWRANK_DP_DATA`` names, else on the hub (``hub_id`` and ``revision`` replace the
    defaults there). A path is a folder with ``train.jsonl[.gz]`` and ``validation.jsonl[.gz]`` in
    columns like GLUE's, or one such file, which becomes the train split. Nothing is dropped: blank
    texts stay (one DART test reference is empty as released).

    ``max_examples`` keeps a random subset of each split, drawn from ``seed`` in whole groups so
    that the references of one record stay together; ``seed`` also drives the generated tasks.
    ``offline=None`` asks the environment, then whether the hub can be reached.

    Raises ``ValueError`` in one line: unknown name (the nearest is given), a broken file (its name
    and line), a hub out of reach (what to use instead).
    """
    if max_examples is not None:
        max_examples = _validate.integer("max_examples", max_examples)
    key = re.sub(r"[-_ ]", "", str(name).lower().removeprefix("glue/"))
    known = {re.sub("-", "", task): task for task in TASKS} | {
        "e2enlg": "e2e", "mnlimatched": "mnli", "generatedsentiment": "generated"}
    if key in known:
        task = _named_task(known[key], data_dir, revision, offline, seed, hub_id)
    elif Path(name).expanduser().exists():
        task = _own_task(Path(name).expanduser(), columns or Columns())
    elif os.sep in str(name) or str(name).endswith((".jsonl", ".jsonl.gz")):
        _validate.fail("task", "a known name, or an existing folder or JSON Lines file", str(name))
    else:
        _validate.choice("task", str(name), TASKS)
    if max_examples is None:
        return task
    return replace(task, splits={split: subset(examples, max_examples, f"{seed}/{split}")
                                 for split, examples in task.splits.items()})


def train_on_validation(task: Task) -> Task:
    """``validation`` as the train split and ``test`` as validation, for DART without its train.

    Groups that also occur in test are left out of the new train split; ``source`` says how many.
    """
    in_test = {e.group for e in task.test}
    train = tuple(e for e in task.validation if e.group not in in_test)
    dropped = len({e.group for e in task.validation} & in_test)
    return replace(task, splits={"train": train, "validation": task.test},
                   source=f"{task.source}; trains on validation without {dropped} groups that are "
                          "also in test, evaluates on test")


def _named_task(name: str, data_dir: str | os.PathLike[str] | None, revision: str | None,
                offline: bool | None, seed: int, hub_id: str | None) -> Task:
    spec = TASKS[name]
    if spec is None:
        return _generated_task(name, seed)
    if data_dir is not None:
        root = _existing_folder("data_dir", data_dir)
        folder = next((f for f in (root / spec.folder, root) if _files(f, spec)), None)
        if folder is None:
            raise ValueError(f"data_dir must hold {spec.folder}/{spec.splits[0][1]}.jsonl.gz "
                             f"or another split of {name}, got {str(root)!r}")
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
    paths = {split: [folder / f"{stem}.jsonl{zipped}" for zipped in (".gz", "")]
             for split, stem in spec.splits}
    return {split: next(p for p in both if p.is_file())
            for split, both in paths.items() if any(p.is_file() for p in both)}


def _local_task(name: str, spec: Spec, folder: Path) -> Task:
    splits = {split: to_examples(read_jsonl(path), name, split, spec)
              for split, path in _files(folder, spec).items()}
    return _task(name, spec, splits, f"local folder {spec.folder}")


def _own_task(path: Path, named: Columns) -> Task:
    """A user's own folder or file: kind and labels are read off the columns."""
    blank = Spec("", "", None, "", splits=_WITH_TEST)
    files = {"train": path} if path.is_file() else _files(path, blank)
    rows = {split: list(read_jsonl(file)) for split, file in files.items()}
    everything = [row for split in rows.values() for _, row in split]
    if not everything:
        _validate.fail("task", "a folder with train.jsonl.gz or validation.jsonl.gz", str(path))
    columns: Any = next((c for c in _OWN_COLUMNS if {*filter(None, c)} <= everything[0].keys()),
                        None)
    if named.text or named.prompt:
        columns = named.prompt or named.text, named.pair, named.target
    if named.label:
        rows = {split: [(where, row | {"label": row.get(named.label)}) for where, row in found]
                for split, found in rows.items()}
        everything = [row for split in rows.values() for _, row in split]
    if columns is None:
        raise ValueError(f"{rows[next(iter(rows))][0][0]}: columns must be like GLUE's (sentence "
                         "or text, sentence1 and sentence2, ..., with label) or source and target, "
                         f"got {', '.join(everything[0])}")
    text, pair, target = columns
    values = [row.get("label") for row in everything]
    scores = any(isinstance(value, float) for value in values)
    largest = max((value for value in values if type(value) is int), default=-1)
    if not target and not scores and not 0 <= largest < 1000:
        raise ValueError(f"{path}: column 'label' must hold classes from 0 to 999, or floats")
    classes = () if target or scores else tuple(str(i) for i in range(largest + 1))
    metrics = ("bleu", "rouge_l") if target else ("accuracy",) if classes else (
        "pearson", "spearman")
    spec = replace(blank, text=text, pair=pair, target=target, labels=classes, metrics=metrics)
    name = path.name.split(".jsonl")[0]
    return _task(name, spec, {split: to_examples(found, name, split, spec)
                              for split, found in rows.items()}, f"local files {path}")


def _hub_task(name: str, spec: Spec, hub_id: str, revision: str | None,
              offline: bool | None) -> Task:
    def refuse(reason: str) -> NoReturn:
        raise ValueError(f"{name} ({hub_id}) could not be had from the hub: {reason}; set "
                         f"LOWRANK_DP_DATA to a folder with {spec.folder}/"
                         f"{spec.splits[0][1]}.jsonl.gz, or use --task generated")

    if offline is None:
        offline = offline_requested() or not hub_reachable()
    import datasets

    try:
        with _hub_switched_off() if offline else contextlib.nullcontext():
            loaded = datasets.load_dataset(hub_id, spec.config, revision=revision)
    except Exception as error:  # whatever `datasets` and its file systems raise, said in one line
        refuse("it is not cached and the hub is unreachable or switched off" if offline
               else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    splits = {}
    for split, stem in spec.splits:
        if stem in loaded:
            rows = ((f"{hub_id} {stem} row {i}", row) for i, row in enumerate(loaded[stem]))
            splits[split] = to_examples(rows, name, split, spec)
    return _task(name, spec, splits, f"hub {hub_id}@{revision or 'main'}")


@contextlib.contextmanager
def _hub_switched_off() -> Iterator[None]:
    """``HF_HUB_OFFLINE=1`` for a while: the libraries read that variable at import only."""
    import datasets
    import huggingface_hub

    switches: tuple[Any, ...] = datasets.config, huggingface_hub.constants
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    for switch in switches:
        switch.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


def _generated_task(name: str, seed: int) -> Task:
    if name == "generated":
        splits = {split: tuple(Example(f"{name}/{split}/{i}", text, label=label,
                                       group=f"{name}/{split}/{i}")
                               for i, (text, label) in enumerate(rows))
                  for split, rows in generated.sentiment(seed).items()}
        return Task(name, "classification", 2, ("negative", "positive"), ("accuracy",), splits,
                    f"generated (seed {seed})")
    splits = {split: tuple(Example(f"{name}/{split}/{i}", table, target=reference,
                                   group=record_group(name, table))
                           for i, (table, reference) in enumerate(rows))
              for split, rows in generated.tables(seed).items()}
    return Task(name, "generation", 0, (), ("bleu", "rouge_l"), splits, f"generated (seed {seed})")


def generated_corpus(num_texts: int, seed: int = 0) -> list[str]:
    """Public text in the style of the generated tasks and disjoint from them, for pretraining.

    Every sentence and every table belongs to the public or to the private side by its hash, so
    that no seed can bring one across.
    """
    return generated.corpus(_validate.integer("num_texts", num_texts), seed)


def _task(name: str, spec: Spec, splits: dict[str, tuple[Example, ...]], source: str) -> Task:
    num_labels = {"classification": len(spec.labels), "regression": 1, "generation": 0}[spec.kind]
    if not splits:
        raise ValueError(f"{name}: {source} must hold at least one split, found none")
    for split, examples in splits.items():
        if not examples:
            raise ValueError(f"{name}: the {split} split of {source} must not be empty")
    return Task(name, spec.kind, num_labels, spec.labels, spec.metrics, splits, source)


def offline_requested() -> bool:
    """Whether the environment asks Hugging Face libraries to stay off the network."""
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
               for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"))


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the hub answers; the Hugging Face libraries retry for half a minute before they say.

    Behind a proxy a direct connection proves nothing, so there the libraries are left to find out.
    """
    if urllib.request.getproxies().get("https"):
        return True
    hub = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((hub.hostname or "", port), timeout).close()
    except OSError:
        return False
    return True


def subset(examples: tuple[Example, ...], size: int, seed: str) -> tuple[Example, ...]:
    """At most ``size`` examples in their own order: whole groups, in random order, that fit.

    ``seed`` alone decides which. Raises ``ValueError`` if no group is so small.
    """
    if len(examples) <= size:
        return examples
    members: dict[str, list[int]] = {}
    for position, example in enumerate(examples):
        members.setdefault(example.group, []).append(position)
    groups = list(members.values())
    random.Random(seed).shuffle(groups)
    kept: list[int] = []
    for group in groups:
        if len(kept) + len(group) <= size:
            kept += group
    if not kept:
        raise ValueError(f"max_examples must be at least {min(map(len, groups))}, the size of the "
                         f"smallest group, got {size}")
    return tuple(examples[i] for i in sorted(kept))
