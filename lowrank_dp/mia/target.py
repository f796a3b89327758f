"""A checkpoint under attack: its records, its recipe, and how its records become tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lowrank_dp import _validate
from lowrank_dp.artifacts import runs
from lowrank_dp.data import SEPARATOR, Example, Task
from lowrank_dp.data.template import Template
from lowrank_dp.membership.manifest import Manifest
from lowrank_dp.mia.checkpoint import has_label_head, load_checkpoint, read_checkpoint
from lowrank_dp.mia.options import NEEDS_BASE, POPULATION, Options
from lowrank_dp.mia.records import Records, load_records, read_manifest, read_population
from lowrank_dp.models import load_model
from lowrank_dp.models.backbones import find_backbone, one_line
from lowrank_dp.models.base import check_base_weights
from lowrank_dp.train import TrainConfig, TrainResult, load_result


@dataclass(frozen=True)
class Format:
    """How a record becomes tokens, and whose word that is.

    Attributes:
        columns: what is read of a record, in words.
        template: as in ``data.encode``; None where the run's own encoding is used.
        max_length: tokens that a text is cut to, or None.
        scored: the tokens whose loss counts, in words.
        source: "membership.json", "as given", or "assumed".
    """

    columns: str
    template: str | None
    max_length: int | None
    scored: str
    source: str

    @property
    def description(self) -> str:
        """One line for people."""
        written = "" if self.template is None else f" written as {self.template!r}"
        cut = "not cut" if self.max_length is None else f"cut to {self.max_length:,} tokens"
        return f"{self.columns}{written}, {cut} ({self.source}); scored: {self.scored}"


@dataclass(frozen=True)
class Target:
    """A checkpoint with its records, before anything is measured."""

    folder: Path
    records: Records
    result: TrainResult | None  # of training.json
    base: Mapping[str, Any] | None  # of the manifest, or {"model": the user's word}
    format: Format
    population: tuple[Example, ...]

    @property
    def max_length(self) -> int | None:
        """Tokens that a text is cut to, or None."""
        return self.format.max_length

    @property
    def pad_to(self) -> int | None:
        """The length that every row was padded to in training; None for the longest row's."""
        padded = self.result is not None and self.recipe.padding == "max-length"
        return self.max_length if padded else None

    @property
    def encoding(self) -> dict[str, Any]:
        """The arguments of ``signals.measure`` that say how a record becomes tokens."""
        found: dict[str, Any] = {"max_length": self.format.max_length}
        if self.format.template is not None:
            found["template"] = self.format.template
        if self.pad_to is not None:
            found["pad_to"] = self.pad_to
        return found

    @property
    def trained(self) -> TrainResult:
        """How it was trained and what came of it; ``ValueError`` where no file says so."""
        if self.result is None:
            raise ValueError(
                f"{self.folder} must hold training.json, for shadows by its own "
                "recipe and for comparisons: train with python -m lowrank_dp.train"
            )
        return self.result

    @property
    def recipe(self) -> TrainConfig:
        """How it was trained."""
        return self.trained.config


def open_target(folder: str | Path, options: Options) -> Target:
    """Check a checkpoint's files and its records; no weights are read.

    Raises ``ValueError`` in one line for what ``load_records`` refuses, for records that the
    checkpoint's head does not take, for files of different runs, and for a template or a maximal
    length that the manifest contradicts.
    """
    folder = Path(folder)
    if not folder.is_dir():
        _validate.fail("model", "a checkpoint's folder", str(folder))
    head = read_checkpoint(folder, options.base)
    records = load_records(
        folder,
        members=options.members,
        nonmembers=options.nonmembers,
        data_dir=options.data_dir,
        base=options.base or None,
        max_records=options.max_records,
        seed=options.seed,
        columns=options.columns,
        checkpoint=head,
    )
    if head.kind is not None and (head.kind == "generation") != (records.kind == "generation"):
        raise ValueError(
            f"{folder} is a causal language model, and the records have labels and no texts to "
            "generate: give records of prompts and targets, or plain texts with --text-column"
            if head.kind == "generation"
            else f"{folder} is a classifier, and the records have no labels: give records of texts with "
            "labels, or a causal language model"
        )
    result = _result(folder)
    if not (folder / runs.MEMBERSHIP).is_file():
        base = {"model": options.base, "seed": 0} if options.base else None
        form = _given_format(records, options, result.config.max_length if result else None)
        return Target(folder, records, result, base, form, _population(records, options, ()))
    manifest = read_manifest(folder / runs.MEMBERSHIP, base=options.base or None)
    told = result.config.as_json() if result else {}
    # a field that the manifest lacks is younger than that
    if wrong := [name for name, value in told.items() if manifest.recipe.get(name, value) != value]:
        raise ValueError(
            f"{folder} must hold training.json and membership.json of one run, "
            f"they differ in {', '.join(wrong)}"
        )
    form = _own_format(manifest, records, options)
    population = _population(records, options, manifest.content_hashes)
    return Target(folder, records, result, manifest.base, form, population)


def _result(folder: Path) -> TrainResult | None:
    """What training.json says, if it is there, with the numbers that a report builds on checked."""
    if not (folder / runs.TRAINING).is_file():
        return None
    result = load_result(folder)
    last = result.curve[-1] if result.curve else {}
    numbers = {
        "delta": result.delta,
        "train_loss": result.train_loss,
        "seconds": result.seconds,
        "sample_rate": result.sample_rate,
        "curve: loss": last.get("loss"),
        "epsilon": 0.0 if result.epsilon is None else result.epsilon,
    }
    for name, value in numbers.items():
        _validate.real(f"{folder / runs.TRAINING}: {name}", value)
    _validate.real(f"{folder / runs.TRAINING}: delta", result.delta, low=0, high=1, high_open=True)
    return result


def _own_format(manifest: Manifest, records: Records, options: Options) -> Format:
    """The run's own encoding, which no option may contradict."""
    own = {"max_length": manifest.max_length, "template": None}
    for name, value in own.items():
        asked = getattr(options, name)
        if asked is not None and asked != value:
            shown = "the encoding of lowrank_dp.train" if name == "template" else repr(value)
            raise ValueError(
                f"{name} must be left out: {runs.MEMBERSHIP} says how this checkpoint "
                f"was trained, with {shown}, got {asked!r}"
            )
    if records.plain:
        raise ValueError(
            "records must have prompts and targets: this checkpoint was trained on "
            "such, and plain texts were given; name --prompt-column and "
            "--target-column"
        )
    if manifest.template is not None and manifest.template != {"separator": SEPARATOR}:
        raise ValueError(
            f"{runs.MEMBERSHIP}: template must be {{'separator': {SEPARATOR!r}}}, the "
            f"only one that lowrank_dp.train uses, got {dict(manifest.template)}"
        )
    return Format(
        _columns(records), None, manifest.max_length, _scored(records, None), runs.MEMBERSHIP
    )


def _given_format(records: Records, options: Options, max_length: int | None) -> Format:
    """The encoding of a checkpoint that was trained elsewhere: the user's word, or assumptions."""
    template = options.template
    if records.kind != "generation" and template is not None:
        raise ValueError(
            "template must be left out for records with labels: it is for causal language models"
        )
    if records.plain:
        if template is not None and not Template.parse(template).plain:
            raise ValueError(
                "template must have {text} alone for plain texts, got "
                f"{template!r}: or name --prompt-column and --target-column"
            )
        template = template or "{text}"
    elif template is not None and Template.parse(template).plain:
        raise ValueError(
            "template must have {target} for records of prompts and targets, got "
            f"{template!r}: or name --text-column alone for plain texts"
        )
    given = options.template is not None or options.max_length is not None
    return Format(
        _columns(records),
        template,
        max_length if options.max_length is None else options.max_length,
        _scored(records, template),
        "as given" if given else "assumed",
    )


def _columns(records: Records) -> str:
    form = (
        "plain text"
        if records.plain
        else {
            "generation": "prompt and target",
            "classification": "text and label",
            "regression": "text and score",
        }[records.kind]
    )
    if records.kind != "generation" and records.examples[0].text_pair is not None:
        form = f"two texts and {form.split()[-1]}"
    return f"{form} ({records.columns})" if records.columns else form


def _scored(records: Records, template: str | None) -> str:
    if records.kind != "generation":
        return "the label" if records.kind == "classification" else "the score"
    if records.plain:
        return "all tokens but the first"
    parts = (
        ""
        if template is not None
        else (f" after the source and {SEPARATOR!r}, each tokenised by itself")
    )
    return f"the target's tokens and the end of sequence{parts}"


def _population(records: Records, options: Options, known: Iterable[str]) -> tuple[Example, ...]:
    """Records that are in no model: none under attack, and none of the run's (content hashes)."""
    attacked = {*known, *(example.content_hash for example in records.examples)}
    if options.population is None:
        validation = records.task.splits.get("validation", ())
        return tuple(e for e in validation if e.content_hash not in attacked)[:POPULATION]
    given = read_population(options.population, records, columns=options.columns)
    if both := [example.id for example in given if example.content_hash in attacked]:
        raise ValueError(
            "population must hold no record of the run's or under attack, "
            f"{len(both)} are in {options.population}, such as {both[0]}"
        )
    return given


# --- the models ------------------------------------------------------------------------------


def load_target(target: Target, options: Options) -> tuple[Any, Any]:
    """The checkpoint's model, with the recipe's parameters trainable, and its tokenizer."""
    return load_checkpoint(
        target.folder,
        options.base,
        task=target.records.task,
        device=options.device,
        **_trained_part(target),
    )


def _trained_part(target: Target) -> dict[str, Any]:
    """Arguments that make the recipe's own parameters trainable, for white-box attacks."""
    if target.result is None or (target.folder / "adapter_config.json").is_file():
        return {"method": target.result.config.method} if target.result else {}
    config = target.result.config
    return {"train_embeddings": config.train_embeddings, "train_layers": config.train_layers}


def load_before(target: Target, options: Options, model: Any) -> tuple[Any, str]:
    """The model before fine-tuning, or None and the reason why there is none.

    It is ``model`` itself for an adapter of a causal language model, whose adapter can be switched
    off; for a run of this package, the base with the head that the run began with; for a
    classifier trained elsewhere, a base that is a classifier, with its own head. Where an attack
    that needs it was asked for by name, the reason is raised as ``ValueError``.
    """
    reason = ""
    if target.base is None and not (
        target.records.kind == "generation" and hasattr(model, "disable_adapter")
    ):
        reason = "the model before fine-tuning is not known: give --base"
    elif target.records.kind == "generation":
        if hasattr(model, "disable_adapter"):
            return model, ""
    elif (target.folder / runs.MEMBERSHIP).is_file():
        if not (target.folder / runs.INITIAL_HEAD).is_file():
            reason = (
                f"{target.folder} holds no {runs.INITIAL_HEAD}, the head before training, "
                "so there is no loss before fine-tuning to compare with"
            )
    elif target.base is not None and not has_label_head(target.base["model"]):
        reason = (
            f"--base {target.base['model']} is no classifier, and a head drawn at random has "
            "no loss to compare with: it needs a base with its own trained head"
        )
    if reason:
        if asked := [name for name in options.named if name in NEEDS_BASE]:
            raise ValueError(f"attack {asked[0]!r} can't be made: {reason}")
        return None, reason
    assert target.base is not None
    # not the checkpoint itself under another name: nothing would be left of any score
    found = find_backbone(target.base["model"])
    if Path(found.path).is_dir() and Path(found.path).samefile(target.folder):
        raise ValueError(
            f"base must be the model before fine-tuning, got {found.path}, the checkpoint itself"
        )
    return load_reference(
        target.folder, target.base, target.records.task, device=options.device
    ), ""


def load_reference(
    folder: str | Path, base: Mapping[str, Any], task: Task, *, device: str = "cpu"
) -> Any:
    """The model before fine-tuning: the manifest's base, with the head that training kept.

    A checkpoint without ``initial_head.safetensors`` was not trained here: its reference is a base
    that brings a head of its own. Raises ``ValueError`` if the reference would have a weight that
    was drawn at random, or if the base's weights are not those that the manifest names.
    """
    file = Path(folder) / runs.INITIAL_HEAD
    with one_line(str(file)):
        head = load_file(file) if file.is_file() else {}
    try:
        model, _ = load_model(
            base["model"], task=task, seed=base["seed"], device=device, new_head=bool(head)
        )
    except ValueError as error:
        raise ValueError(
            f"base: {error}; without a base nothing can be calibrated: give another, "
            "or leave out the attack 'base'"
        ) from None
    check_base_weights(model, base.get("weights"), Path(folder).name, base["model"])
    if lost := sorted(set(getattr(model, "lowrank_dp_new", ())) - head.keys()):
        raise ValueError(
            f"{file} must hold what the base {base['model']} lacks, {', '.join(lost)}:"
            " they would be drawn at random; train again, or leave out the attack "
            "'base'"
        )
    with one_line(str(file)):
        _, unexpected = model.load_state_dict(head, strict=False)
    if unexpected:
        raise ValueError(f"{file} must fit the base model, got {unexpected[0]}")
    return model.eval()
