"""One checkpoint under attack: what is measured, and by which attacks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_dp.artifacts import runs
from lowrank_dp.data import IGNORE, encode
from lowrank_dp.mia import learning, projection, quantile, scores, shadows, signals
from lowrank_dp.mia.options import ATTACKS, SHADOW_ATTACKS, WHITE_BOX, Options
from lowrank_dp.mia.report import Attack, Report, judge, why_no_one_run
from lowrank_dp.mia.signals import Array, Signals
from lowrank_dp.mia.target import Target, load_before, load_target, open_target
from lowrank_dp.models.backbones import find_backbone

__all__ = [
    "ATTACKS",
    "Attack",
    "Loaded",
    "Options",
    "Report",
    "Target",
    "attack",
    "load",
    "open_target",
]


@dataclass(frozen=True)
class Loaded:
    """A target's models, and its records as tokens.

    Attributes:
        model, tokenizer: of the checkpoint.
        before: the model before fine-tuning, which may be ``model`` itself; None if there is none.
        why_no_base: the reason in that case.
        rows: of the attacked records, as ``data.encode`` makes them.
    """

    model: Any
    tokenizer: Any
    before: Any
    why_no_base: str
    rows: list[dict[str, Any]]


def load(target: Target, options: Options) -> Loaded:
    """Everything that an attack needs before the first forward pass.

    Raises ``ValueError`` in one line for whatever can be refused without one: weights that are
    missing or damaged, a folder without its tokenizer, a base without a head, an attack that was
    asked for and can't be made, records that don't fit the model's context.
    """
    for name in options.named:
        if name in SHADOW_ATTACKS and not (options.num_shadows or options.shadow_dir):
            raise ValueError(f"attack {name!r} can't be made here: it needs --shadows")
        if name == "projection" and (reason := _why_no_projection(target, options)):
            raise ValueError(f"attack 'projection' can't be made here: {reason}")
        if name in ("zlib", "min-k", "min-k++", "ez") and target.records.kind != "generation":
            raise ValueError(
                f"attack {name!r} can't be made here: it needs a causal language model"
            )
    if options.guesses and (reason := why_no_one_run(target, options)):
        raise ValueError(reason)
    model, tokenizer = load_target(target, options)
    before, why_no_base = load_before(target, options, model)
    form = {name: value for name, value in target.encoding.items() if name != "pad_to"}
    rows = encode(
        (*target.records.examples, *target.population), tokenizer, kind=target.records.kind, **form
    )
    return Loaded(model, tokenizer, before, why_no_base, rows[: len(target.records.examples)])


def attack(target: Target, options: Options, cache: Path) -> Report:
    """Measure, score and judge one checkpoint. Shadows and signals are kept in ``cache``."""
    records, loaded = target.records, load(target, options)
    task, examples = records.task, records.examples
    arguments: dict[str, Any] = {"batch_size": options.batch_size, **target.encoding}
    together = (*examples, *target.population)
    found = signals.cached(
        cache,
        signals.key(target.folder, together, target.encoding, *_identity(target, options, loaded)),
        lambda: signals.measure(
            loaded.model, loaded.tokenizer, task, together, reference=loaded.before, **arguments
        ),
    )
    shadow = _shadows(target, options, cache)
    made, unavailable = _scores(target, options, loaded, found, shadow)
    asked = {name for name in WHITE_BOX if options.white_box or name in options.named}
    if "gradient" in asked:
        made["gradient"] = -signals.gradient_norms(
            loaded.model, loaded.tokenizer, task, examples, **arguments
        )
    if "projection" in asked:
        if reason := _why_no_projection(target, options):
            unavailable["projection"] = reason
        else:
            made["projection"] = projection.projection_scores(
                target.folder,
                target.base or {},
                task,
                examples,
                records.is_member,
                max_length=target.max_length,
                pad_to=target.pad_to,
                device=options.device,
            )
    for name in options.named:
        if name not in made:
            raise ValueError(
                f"attack {name!r} can't be made here: {unavailable.get(name, 'give --white-box')}"
            )
    primary = options.primary or next(
        name for name in ("lira-offline", "base", "loss") if name in made
    )
    wanted = {*(options.attacks or made), primary}
    made = {name: made[name] for name in made if name in wanted}
    classes = task.num_labels or len(loaded.tokenizer)
    learned = learning.judge_learning(
        task.kind,
        examples,
        records.is_member,
        found,
        learning.chance_losses(task.kind, examples, records.is_member, loaded.rows, classes),
        max(classes, 2),
    )
    untuned = found.reference_loss[: len(examples)] if len(found.reference_loss) else None
    return judge(
        target,
        options,
        made,
        primary,
        unavailable,
        untuned,
        learned,
        0 if shadow is None else len(shadow.loss),
    )


def _identity(target: Target, options: Options, loaded: Loaded) -> list[str]:
    """What decides the signals beside the checkpoint: its base, by name and weights."""
    used = target.base is not None and loaded.before is not None
    named = {options.base, target.base["model"] if used and target.base else ""} - {""}
    folders = [Path(find_backbone(name).path) for name in sorted(named)]
    return [
        str(target.base),
        str(loaded.before is None),
        str(loaded.before is loaded.model),
        *(signals.weight_hash(folder) for folder in folders if folder.is_dir()),
    ]


def _why_no_projection(target: Target, options: Options) -> str:
    if (
        target.base is None
        or target.records.source != runs.MEMBERSHIP
        or options.max_records
        or target.records.left_out
    ):
        return "it needs every record of membership.json, and the base"
    return projection.unavailable_reason(target.result)


def _shadows(target: Target, options: Options, cache: Path) -> shadows.Shadows | None:
    if options.shadow_dir is not None:
        paths = shadows.find_shadows(target.recipe, options.shadow_dir)
    elif options.num_shadows:
        paths = shadows.train_shadows(
            target.recipe,
            options.num_shadows,
            cache / "shadows",
            seed=options.seed,
            num_workers=options.num_workers,
            engine=options.engine,
        )
    else:
        return None
    return shadows.measure_shadows(
        paths,
        target.records.task,
        target.records.examples,
        target.population,
        encoding=target.encoding,
        batch_size=options.batch_size,
        device=options.device,
        cache=cache,
        base=options.base,
    )


def _scores(
    target: Target, options: Options, loaded: Loaded, found: Signals, shadow: shadows.Shadows | None
) -> tuple[dict[str, Array], dict[str, str]]:
    """Every score that can be made, (N,) each, and why the others can't."""
    examples = target.records.examples
    count = len(examples)
    loss, phi = found.loss[:count], found.phi[:count]
    made: dict[str, Array] = {"loss": scores.loss_score(loss)}
    unavailable: dict[str, str] = {}
    if not len(found.reference_loss):
        unavailable["base"] = loaded.why_no_base
    elif np.array_equal(loss, found.reference_loss[:count]):
        unavailable["base"] = (
            "every loss is that of the model before fine-tuning: --base names "
            "the checkpoint itself, or fine-tuning changed nothing"
        )
    else:
        made["base"] = scores.calibrated_score(loss, found.reference_loss[:count])
    if target.records.kind == "generation":
        texts = _scored_texts(target, loaded)
        made["zlib"] = np.asarray(scores.zlib_score(loss, texts))
        made["min-k"], made["min-k++"] = found.min_k[:count], found.min_k_plus_plus[:count]
        if len(found.error_zone):
            made["ez"] = found.error_zone[:count]
    if len(target.population) < quantile.MIN_POPULATION:
        unavailable["quantile"] = (
            f"it needs {quantile.MIN_POPULATION} records in no model, got "
            f"{len(target.population)}: give --population"
        )
    else:
        known = quantile.features((*examples, *target.population), found.reference_loss)
        made["quantile"] = scores.quantile_score(
            phi,
            quantile.predicted_quantile(
                known[count:], found.phi[count:], known[:count], seed=options.seed
            ),
        )
    if shadow is None:
        return made, unavailable | dict.fromkeys(SHADOW_ATTACKS, "it needs --shadows")
    shadow_scores, reasons = _shadow_scores(loss, phi, found.loss[count:], shadow)
    return made | shadow_scores, unavailable | reasons


def _scored_texts(target: Target, loaded: Loaded) -> list[str]:
    """What of each text was scored, without a tail that was cut off."""
    if target.format.template is None:
        return [example.target or " " for example in target.records.examples]
    scored = [[token for token in row["labels"] if token != IGNORE] for row in loaded.rows]
    return [text or " " for text in loaded.tokenizer.batch_decode(scored, skip_special_tokens=True)]


def _shadow_scores(
    loss: Array, phi: Array, population: Array, shadow: shadows.Shadows
) -> tuple[dict[str, Array], dict[str, str]]:
    """The scores that need shadows, and why some of them can't be made."""
    made: dict[str, Array] = {}
    unavailable: dict[str, str] = {}
    made_with_shadows = {
        "lira": lambda: scores.lira_online(phi, shadow.phi, shadow.is_member),
        "lira-offline": lambda: scores.lira_offline(phi, shadow.phi, shadow.is_member),
        "rmia": lambda: scores.rmia_online(
            loss, shadow.loss, shadow.is_member, population, shadow.population_loss
        ),
        "rmia-offline": lambda: scores.rmia_offline(
            loss, shadow.loss, shadow.is_member, population, shadow.population_loss
        ),
    }
    for name, make in made_with_shadows.items():
        try:
            made[name] = make()
        except ValueError as error:  # a record that every shadow, or none, was trained on
            unavailable[name] = f"{error}; train more shadows"
    return made, unavailable
