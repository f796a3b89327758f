"""Checkpoint under attack: its records, its recipe, and the format of its records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_dp import _validate
from lowrank_dp.artifacts import runs
from lowrank_dp.data import Example
from lowrank_dp.membership import Manifest, read_manifest
from lowrank_dp.mia.checkpoint import Checkpoint, read_checkpoint
from lowrank_dp.mia.options import NEEDS_POPULATION, POPULATION, Options
from lowrank_dp.mia.record_format import Format, given_format, own_format
from lowrank_dp.mia.records import Records, load_records, read_population
from lowrank_dp.train import TrainConfig, TrainResult, load_result
from lowrank_dp.train.records import length_of_texts


@dataclass(frozen=True)
class Target:
    """A checkpoint with its records, before anything is measured.

    Attributes:
        folder: the checkpoint.
        records: the records under attack.
        result: content of training.json, or None without that file.
        base: the manifest's base, or {"model": the user's --base, "seed": 0}, or None.
        format: conversion of a record to tokens.
        population: records that are in no model.
    """

    folder: Path
    records: Records
    result: TrainResult | None
    base: Mapping[str, Any] | None
    format: Format
    population: tuple[Example, ...]

    @property
    def max_length(self) -> int | None:
        """Number of tokens that a text is cut to, or None."""
        return self.format.max_length

    @property
    def pad_to(self) -> int | None:
        """Length that every row was padded to in training; None for the longest row's length."""
        padded = self.result is not None and self.recipe.padding == "max-length"
        return self.max_length if padded else None

    @property
    def encoding(self) -> dict[str, Any]:
        """Arguments of ``signals.measure`` that determine the tokens of a record."""
        found: dict[str, Any] = {"max_length": self.format.max_length}
        if self.format.template is not None:
            found["template"] = self.format.template
        if self.pad_to is not None:
            found["pad_to"] = self.pad_to
        return found

    @property
    def trained(self) -> TrainResult:
        """Configuration and outcome of training; ValueError without training.json."""
        if self.result is None:
            raise ValueError(
                f"{self.folder} must hold training.json, for shadows by its own "
                "recipe and for comparisons: train with python -m lowrank_dp.train"
            )
        return self.result

    @property
    def recipe(self) -> TrainConfig:
        """Configuration of training; ValueError without training.json."""
        return self.trained.config

    @property
    def seed(self) -> int | None:
        """Seed of the target's head and of its sampling, or None if no manifest names it."""
        return None if self.base is None else int(self.base["seed"])


def open_target(folder: str | Path, options: Options) -> Target:
    """Read a checkpoint's files and its records; no weights are read.

    Raises ValueError in one line as ``load_records`` does, for records that do not fit the
    checkpoint's head, for files of different runs, and for a template or a maximal length that the
    manifest contradicts.
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
    _check_kind(folder, head, records)
    result = _read_result(folder)
    if not (folder / runs.MEMBERSHIP).is_file():
        base = {"model": options.base, "seed": 0} if options.base else None
        length = _own_length(folder, records, options, result)
        form = given_format(records, options, length, head)
        return Target(folder, records, result, base, form, _population(records, options, ()))
    manifest = read_manifest(folder / runs.MEMBERSHIP, base=options.base or None)
    _check_one_run(folder, manifest, result)
    form = own_format(manifest, records, options)
    population = _population(records, options, manifest.content_hashes)
    return Target(folder, records, result, manifest.base, form, population)


def _own_length(
    folder: Path, records: Records, options: Options, result: TrainResult | None
) -> int | None:
    """Return the length that a run without a manifest cut texts to; None if it is not asked for."""
    if result is None or options.max_length is not None:
        return None
    from lowrank_dp.models import load_tokenizer  # imported when used: it imports transformers

    return length_of_texts(
        result.config,
        records.kind,
        lambda: load_tokenizer(str(folder), base=options.base or None),
    )


def _check_kind(folder: Path, head: Checkpoint, records: Records) -> None:
    if head.kind is None or (head.kind == "generation") == (records.kind == "generation"):
        return
    raise ValueError(
        f"{folder} is a causal language model, and the records have labels and no texts to "
        "generate: give records of prompts and targets, or plain texts with --text-column"
        if head.kind == "generation"
        else f"{folder} is a classifier, and the records have no labels: give records of texts "
        "with labels, or a causal language model"
    )


def _check_one_run(folder: Path, manifest: Manifest, result: TrainResult | None) -> None:
    """Raise ValueError if the manifest and training.json are of different runs."""
    config = result.config.as_json() if result else {}
    # a manifest lacks fields that were added to the configuration after the manifest was written
    wrong = [name for name, value in config.items() if manifest.recipe.get(name, value) != value]
    if wrong:
        raise ValueError(
            f"{folder} must hold training.json and membership.json of one run, "
            f"they differ in {', '.join(wrong)}"
        )


def _read_result(folder: Path) -> TrainResult | None:
    """Read training.json, or return None; check the numbers that a report uses."""
    if not (folder / runs.TRAINING).is_file():
        return None
    result = load_result(folder)
    last = result.curve[-1] if result.curve else {}
    file = folder / runs.TRAINING
    numbers = {
        "train_loss": result.train_loss,
        "seconds": result.seconds,
        "curve: loss": last.get("loss"),
        "epsilon": 0.0 if result.epsilon is None else result.epsilon,
    }
    for name, value in numbers.items():
        _validate.real(f"{file}: {name}", value, low=0 if name == "seconds" else -math.inf)
    _validate.real(f"{file}: delta", result.delta, low=0, high=1, high_open=True)
    _validate.real(f"{file}: noise_multiplier", result.noise_multiplier, low=0)
    _validate.real(f"{file}: sample_rate", result.sample_rate, low=0, low_open=True, high=1)
    _validate.integer(f"{file}: releases", result.releases, low=0)
    return result


def _population(records: Records, options: Options, known: Iterable[str]) -> tuple[Example, ...]:
    """Return records in no model: not under attack, and with no content hash in ``known``.

    There are none if no file is given and no named attack needs them: each record takes a pass
    through the models.
    """
    attacked = {*known, *(example.content_hash for example in records.examples)}
    if options.population is None:
        if options.attacks and not {*options.named} & {*NEEDS_POPULATION}:
            return ()
        validation = records.task.splits.get("validation", ())
        return tuple(e for e in validation if e.content_hash not in attacked)[:POPULATION]
    given = read_population(options.population, records, columns=options.columns)
    if both := [example.id for example in given if example.content_hash in attacked]:
        raise ValueError(
            "population must hold no record of the run's or under attack, "
            f"{len(both)} are in {options.population}, such as {both[0]}"
        )
    return given
