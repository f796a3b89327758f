"""One checkpoint under attack: what is measured, by which attacks, and what that says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_dp import _validate, artifacts
from lowrank_dp.artifacts import runs
from lowrank_dp.data import Example
from lowrank_dp.engines import check_engine
from lowrank_dp.mia import guards, metrics, projection, quantile, scores, shadows, signals
from lowrank_dp.mia.records import Records, load_records, read_manifest, read_population
from lowrank_dp.mia.signals import Array, Signals
from lowrank_dp.models import load_model
from lowrank_dp.train import TrainConfig, TrainResult, load_result

# name -> what it needs and means, in words
ATTACKS = {
    "loss": "-loss",
    "base": "loss before fine-tuning minus loss",
    "zlib": "-loss over the compressed length",
    "min-k": "mean of the least likely 20% of tokens",
    "min-k++": "the same, standardised over the vocabulary",
    "ez": "error zone: where tokens were wrong, gains over losses against the base",
    "quantile": "confidence over the non-members' quantile that its features predict",
    "gradient": "-norm of the loss gradient (white-box)",
    "projection": "symmetry of B A against the gradient sum with the record, over that without "
                  "(white-box; one step with a frozen A, all other records known)",
    "lira": "likelihood ratio against shadows with and without the record",
    "lira-offline": "z-score against shadows without the record",
    "rmia": "share of population records whose likelihood ratio is beaten",
    "rmia-offline": "the same, from shadows without the record",
}
WHITE_BOX = ("gradient", "projection")
SHADOW_ATTACKS = ("lira", "lira-offline", "rmia", "rmia-offline")
POPULATION = 1000  # at most so many validation records, which are in no model


@dataclass(frozen=True)
class Options:
    """What an attack is asked to do.

    Attributes:
        attacks: names in ``ATTACKS``; () takes all that the checkpoint and the shadows allow.
        primary: the attack that the verdict rests on, named beforehand; "" takes "lira-offline"
            with shadows, else "base", else "loss".
        num_shadows, shadow_dir: train so many, or use those found there.
        members, nonmembers: JSON Lines files, for a checkpoint without membership.json.
        population: JSON Lines of records that are in no model, for RMIA and the quantile attack;
            None takes up to 1,000 of the validation split.
        base: backbone that the checkpoint was fine-tuned from, in place of the manifest's word.
        data_dir: of the task, as in ``data.load_task``.
        fpr: false-positive rates at which the true-positive rate is reported.
        guesses: of the one-run audit; 0 for none. Needs independent coins.
        white_box: also the gradient's norm, and the projection attack where the recipe allows it.
        max_records, batch_size, seed, device: of the computation.
        num_workers, engine: shadows trained at a time, and where, as in ``sweep``.
    """

    attacks: tuple[str, ...] = ()
    primary: str = ""
    num_shadows: int = 0
    shadow_dir: Path | None = None
    members: Path | None = None
    nonmembers: Path | None = None
    population: Path | None = None
    base: str = ""
    data_dir: Path | None = None
    fpr: tuple[float, ...] = (0.01, 0.001)
    delta: float | None = None
    guesses: int = 0
    white_box: bool = False
    max_records: int | None = None
    batch_size: int = 64
    seed: int = 0
    device: str = "cpu"
    num_workers: int | None = None
    engine: str = "loky"

    def __post_init__(self) -> None:
        check_engine(self.engine)
        for name in (*self.attacks, *filter(None, [self.primary])):
            _validate.choice("attack", name, ATTACKS)
        for rate in self.fpr:
            _validate.real("fpr", rate, low=0, high=1, low_open=True, high_open=True)
        _validate.integer("shadows", self.num_shadows, low=0)
        _validate.integer("guesses", self.guesses, low=0)
        if self.num_shadows and self.shadow_dir is not None:
            raise ValueError("shadows and shadow_dir must not both be given")


@dataclass(frozen=True)
class Attack:
    """One attack's numbers. ``tpr`` has None where the non-members are too few for that rate."""

    name: str
    auc: metrics.Auc
    tpr: Mapping[str, metrics.TprAtFpr | None]
    epsilon: metrics.SplitEpsilon


@dataclass(frozen=True)
class Report:
    """What an attack found; NON-PRIVATE, since it is computed from membership bits.

    ``scores`` has (N,) for each attack; ``control`` is the primary one's AUC against the same coins
    dealt out anew, 1/2 but for chance (99%); ``accountant_epsilon`` is None where none is claimed;
    ``one_run_epsilon`` is None where it was not asked for.
    """

    model: str
    description: str
    privacy: str
    ids: tuple[str, ...]
    is_member: np.ndarray
    scores: Mapping[str, Array]
    attacks: tuple[Attack, ...]
    primary: str
    unavailable: Mapping[str, str]
    num_shadows: int
    coins: str
    control: metrics.Auc
    blind: metrics.Auc
    untuned: metrics.Auc | None
    shift: str
    overlap: tuple[Any, ...]
    near_duplicates: tuple[Any, ...]
    train_loss: float | None
    eval_loss: float | None
    accountant_epsilon: float | None
    delta: float
    one_run_epsilon: float | None
    verdict: str
    provenance: Mapping[str, Any]

    @property
    def contradiction(self) -> bool:
        """Whether some lower bound on epsilon exceeds what the accountant claims."""
        if self.accountant_epsilon is None:
            return False
        return self.lower_bound > self.accountant_epsilon

    @property
    def lower_bound(self) -> float:
        """Of epsilon: the primary attack's, or the one-run audit's if that is higher.

        Only attacks named beforehand count: the best of many would need a correction.
        """
        primary = next(attack for attack in self.attacks if attack.name == self.primary)
        return max(primary.epsilon.epsilon, self.one_run_epsilon or 0.0)


@dataclass(frozen=True)
class Target:
    """A checkpoint with its records, before anything is measured."""

    folder: Path
    records: Records
    result: TrainResult | None  # of training.json
    base: Mapping[str, Any] | None  # of the manifest
    max_length: int | None
    population: tuple[Example, ...]

    @property
    def trained(self) -> TrainResult:
        """How it was trained and what came of it; ``ValueError`` where no file says so."""
        if self.result is None:
            raise ValueError(f"{self.folder} must hold training.json, for shadows by its own "
                             "recipe and for comparisons: train with python -m lowrank_dp.train")
        return self.result

    @property
    def pad_to(self) -> int | None:
        """The length that every row was padded to in training; None for the longest row's."""
        padded = self.result is not None and self.result.config.padding == "max-length"
        return self.max_length if padded else None

    @property
    def recipe(self) -> TrainConfig:
        """How it was trained."""
        return self.trained.config


def open_target(folder: str | Path, options: Options) -> Target:
    """Check a checkpoint and its records; nothing is computed."""
    folder = Path(folder)
    if not folder.is_dir():
        _validate.fail("model", "a checkpoint's folder", str(folder))
    records = load_records(folder, members=options.members, nonmembers=options.nonmembers,
                           data_dir=options.data_dir, base=options.base or None,
                           max_records=options.max_records, seed=options.seed)
    result = load_result(folder) if (folder / runs.TRAINING).is_file() else None
    base, max_length = None, result.config.max_length if result else None
    known: tuple[str, ...] = ()
    if (folder / runs.MEMBERSHIP).is_file():
        manifest = read_manifest(folder / runs.MEMBERSHIP, base=options.base or None)
        base, max_length, known = manifest.base, manifest.max_length, manifest.content_hashes
        told = result.config.as_json() if result else {}
        # a field that the manifest lacks is younger than that
        if wrong := [name for name, value in told.items()
                     if manifest.recipe.get(name, value) != value]:
            raise ValueError(f"{folder} must hold training.json and membership.json of one run, "
                             f"they differ in {', '.join(wrong)}")
    elif options.base:
        base = {"model": options.base, "seed": 0}
    return Target(folder, records, result, base, max_length, _population(records, options, known))


def _population(records: Records, options: Options, known: Iterable[str]) -> tuple[Example, ...]:
    """Records that are in no model: none under attack, and none of the run's (content hashes)."""
    attacked = {*known, *(example.content_hash for example in records.examples)}
    if options.population is None:
        validation = records.task.splits.get("validation", ())
        return tuple(e for e in validation if e.content_hash not in attacked)[:POPULATION]
    given = read_population(options.population, records)
    if both := [example.id for example in given if example.content_hash in attacked]:
        raise ValueError("population must hold no record of the run's or under attack, "
                         f"{len(both)} are in {options.population}, such as {both[0]}")
    return given


def attack(target: Target, options: Options, cache: Path) -> Report:
    """Measure, score and judge one checkpoint. Shadows and signals are kept in ``cache``."""
    records = target.records
    task, examples = records.task, records.examples
    arguments: dict[str, Any] = {"max_length": target.max_length, "pad_to": target.pad_to,
                                 "batch_size": options.batch_size}
    model, tokenizer = load_model(str(target.folder), task=task, device=options.device,
                                  **_trained_part(target))
    adapter = hasattr(model, "disable_adapter")
    reference = None
    if target.base is not None:
        reference = (model if adapter and task.kind == "generation" else
                     signals.load_reference(target.folder, target.base, task,
                                            device=options.device))
    together = (*examples, *target.population)
    found = signals.cached(
        cache, signals.key(target.folder, together, target.max_length,
                           str(target.base) if reference is not None else "",
                           *([f"padded to {target.pad_to}"] if target.pad_to else [])),
        lambda: signals.measure(model, tokenizer, task, together, reference=reference,
                                **arguments))
    shadow = _shadows(target, options, cache)
    made, unavailable = _scores(target, options, found, shadow)
    asked = {name for name in WHITE_BOX if options.white_box or name in (
        *options.attacks, options.primary)}
    if "gradient" in asked:
        made["gradient"] = -signals.gradient_norms(model, tokenizer, task, examples, **arguments)
    if "projection" in asked:
        if reason := _why_no_projection(target, options):
            unavailable["projection"] = reason
        else:
            made["projection"] = projection.projection_scores(
                target.folder, target.base or {}, task, examples, records.is_member,
                max_length=target.max_length, pad_to=target.pad_to, device=options.device)
    wanted = options.attacks or tuple(made)
    for name in (*wanted, *filter(None, [options.primary])):
        if name not in made:
            raise ValueError(f"attack {name!r} can't be made here: "
                             f"{unavailable.get(name, 'give --white-box')}")
    primary = options.primary or next(
        name for name in ("lira-offline", "base", "loss") if name in made)
    made = {name: made[name] for name in made if name in {*wanted, primary}}
    before = found.reference_loss[:len(examples)] if len(found.reference_loss) else None
    return _judge(target, options, made, primary, unavailable, before, shadow)


def _why_no_projection(target: Target, options: Options) -> str:
    if target.base is None or target.records.source != runs.MEMBERSHIP or options.max_records:
        return "it needs every record of membership.json, and the base"
    return projection.why_not(target.result)


def _trained_part(target: Target) -> dict[str, Any]:
    """Arguments that make the recipe's own parameters trainable, for white-box attacks."""
    if target.result is None or (target.folder / "adapter_config.json").is_file():
        return {"method": target.result.config.method} if target.result else {}
    config = target.result.config
    return {"train_embeddings": config.train_embeddings, "train_layers": config.train_layers}


def _shadows(target: Target, options: Options, cache: Path) -> shadows.Shadows | None:
    if options.shadow_dir is not None:
        paths = shadows.find_shadows(target.recipe, options.shadow_dir)
    elif options.num_shadows:
        paths = shadows.train_shadows(target.recipe, options.num_shadows, cache / "shadows",
                                      seed=options.seed, num_workers=options.num_workers,
                                      engine=options.engine)
    else:
        return None
    return shadows.measure_shadows(
        paths, target.records.task, target.records.examples, target.population,
        max_length=target.max_length, pad_to=target.pad_to, batch_size=options.batch_size,
        device=options.device, cache=cache, base=options.base)


def _scores(target: Target, options: Options, found: Signals, shadow: shadows.Shadows | None
            ) -> tuple[dict[str, Array], dict[str, str]]:
    """Every score that can be made, (N,) each, and why the others can't."""
    examples = target.records.examples
    count = len(examples)
    loss, phi = found.loss[:count], found.phi[:count]
    made: dict[str, Array] = {"loss": scores.loss_score(loss)}
    unavailable: dict[str, str] = {}
    if len(found.reference_loss):
        made["base"] = scores.calibrated_score(loss, found.reference_loss[:count])
    else:
        unavailable["base"] = "the base model is not known, give --base"
    if target.records.kind == "generation":
        texts = [example.target or " " for example in examples]
        made["zlib"] = np.asarray(scores.zlib_score(loss, texts))
        made["min-k"], made["min-k++"] = found.min_k[:count], found.min_k_plus_plus[:count]
        if len(found.error_zone):
            made["ez"] = found.error_zone[:count]
    if len(target.population) < quantile.MIN_POPULATION:
        unavailable["quantile"] = (f"it needs {quantile.MIN_POPULATION} records in no model, got "
                                   f"{len(target.population)}: give --population")
    else:
        known = quantile.features((*examples, *target.population), found.reference_loss)
        made["quantile"] = scores.quantile_score(phi, quantile.predicted_quantile(
            known[count:], found.phi[count:], known[:count], seed=options.seed))
    if shadow is None:
        return made, unavailable | dict.fromkeys(SHADOW_ATTACKS, "it needs --shadows")
    population = found.loss[count:]
    made_with_shadows = {
        "lira": lambda: scores.lira_online(phi, shadow.phi, shadow.is_member),
        "lira-offline": lambda: scores.lira_offline(phi, shadow.phi, shadow.is_member),
        "rmia": lambda: scores.rmia_online(loss, shadow.loss, shadow.is_member, population,
                                           shadow.population_loss),
        "rmia-offline": lambda: scores.rmia_offline(loss, shadow.loss, shadow.is_member,
                                                    population, shadow.population_loss)}
    for name, make in made_with_shadows.items():
        try:
            made[name] = make()
        except ValueError as error:  # a record that every shadow, or none, was trained on
            unavailable[name] = f"{error}; train more shadows"
    return made, unavailable


def _judge(target: Target, options: Options, made: Mapping[str, Array], primary: str,
           unavailable: Mapping[str, str], before: Array | None,
           shadow: shadows.Shadows | None) -> Report:
    records, result = target.records, target.result
    truth, examples = records.is_member, records.examples
    delta = options.delta if options.delta is not None else result.delta if result else 0.0
    # rows that share a coin count once: one by one they would make every interval too short
    counted = {name: guards.unit_scores(values, examples, truth) if records.unit == "group"
               else (values, truth) for name, values in made.items()}
    attacks = tuple(_measure(name, *one, options, delta) for name, one in counted.items())
    values, coins = counted[primary]
    control = metrics.auc(values, np.random.default_rng(options.seed).permutation(coins),
                          confidence=guards.CONFIDENCE)
    blind = guards.blind_baseline(examples, truth, seed=options.seed)
    untuned = None if before is None else guards.unit_auc(-before, examples, truth)
    shift = guards.shift_verdict(blind, untuned)
    one_run = None
    if options.guesses:
        if records.coins != "bernoulli" or options.max_records is not None:
            raise ValueError("guesses of the one-run audit need every record of a checkpoint "
                             "trained with --membership bernoulli, independent fair coins")
        correct = metrics.one_run_correct(values, coins, options.guesses,
                                          np.random.default_rng(options.seed))
        one_run = metrics.one_run_epsilon(len(coins), options.guesses, correct, delta=delta)
    best = next(one for one in attacks if one.name == primary)
    return Report(
        model=str(target.folder),
        description=result.description if result else f"{records.task.name}, given records",
        privacy=result.privacy if result else "not known: no training.json",
        ids=tuple(example.id for example in examples), is_member=truth, scores=made,
        attacks=attacks, primary=primary, unavailable=unavailable,
        num_shadows=0 if shadow is None else len(shadow.loss), coins=records.coins or "given files",
        control=control, blind=blind, untuned=untuned, shift=shift,
        overlap=tuple(guards.overlap(examples, truth)),
        near_duplicates=tuple(guards.near_duplicates(examples, truth)),
        train_loss=result.train_loss if result else None,
        eval_loss=result.curve[-1]["loss"] if result else None,
        accountant_epsilon=result.epsilon if result else None, delta=delta,
        one_run_epsilon=one_run, verdict=_verdict(best, shift),
        provenance=artifacts.provenance(seed=options.seed, device=options.device))


def _measure(name: str, values: Array, truth: np.ndarray, options: Options, delta: float
             ) -> Attack:
    enough = {rate: math.floor(rate * int((~truth).sum()) + 1e-9) >= 1 for rate in options.fpr}
    return Attack(
        name, metrics.auc(values, truth),
        {f"{rate:g}": metrics.tpr_at_fpr(values, truth, rate) if enough[rate] else None
         for rate in options.fpr},
        metrics.split_epsilon(values, truth, np.random.default_rng(options.seed), delta=delta))


def _verdict(primary: Attack, shift: str) -> str:
    if shift != "ok":
        return shift
    low, high = primary.auc.ci
    if low > 0.5:
        return "LEAKS"
    if high < 0.5:
        return "BELOW CHANCE: members score lower; look for a shift or a bug, nothing is flipped"
    weak = " (weak attack: calibrate it or give --shadows)" if primary.name == "loss" else ""
    return f"no leak found by {primary.name}{weak}"
