"""Attack one checkpoint: measure signals, score records, make the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_dp.mia import caching, learning, shadows, signals
from lowrank_dp.mia.loading import Loaded, load
from lowrank_dp.mia.options import ATTACKS, Options
from lowrank_dp.mia.report import Attack, Measured, Report, make_report
from lowrank_dp.mia.scoring import Scores, score_records
from lowrank_dp.mia.signals import Reference, Signals
from lowrank_dp.mia.target import Target, open_target

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


def attack(target: Target, options: Options, cache: Path) -> Report:
    """Attack one checkpoint; keep shadow models and signals in the folder ``cache``.

    Raises ValueError as ``loading.load`` and ``shadows.check_shadows`` do, and for a named attack
    that is unavailable.
    """
    if options.num_shadows or options.shadow_dir is not None:
        shadows.check_shadows(target, options)
    loaded = load(target, options)
    found = _signals(target, options, loaded, cache)
    shadow = _shadows(target, options, cache)
    scores = score_records(target, options, loaded, found, shadow)
    for name in options.named:
        if name not in scores.made:
            reason = scores.unavailable.get(name, "give --white-box")
            raise ValueError(f"attack {name!r} can't be made here: {reason}")
    primary = options.primary or _default_primary(scores)
    wanted = {*(options.attacks or scores.made), primary}
    count = len(target.records.examples)
    measured = Measured(
        scores={name: values for name, values in scores.made.items() if name in wanted},
        primary=primary,
        # a named attack that is unavailable is an error above
        unavailable={} if options.attacks else scores.unavailable,
        reference_loss=found.reference_loss[:count] if len(found.reference_loss) else None,
        learning=_learning(target, loaded, found),
        num_shadows=0 if shadow is None else len(shadow.loss),
    )
    return make_report(target, options, measured)


def _default_primary(scores: Scores) -> str:
    return next(name for name in ("lira-offline", "base", "loss") if name in scores.made)


def _signals(target: Target, options: Options, loaded: Loaded, cache: Path) -> Signals:
    """Measure the signals of the attacked records, followed by those of the population."""
    together = (*target.records.examples, *target.population)
    encoding = {"precision": options.precision, **target.encoding}
    records = (loaded.tokenizer, target.records.task, together)
    arguments = {"batch_size": options.batch_size, **encoding}

    def measure_reference() -> Reference:
        with signals.switched_off(loaded.reference, loaded.model) as base:
            return signals.measure_reference(base, *records, **arguments)

    def measure() -> Signals:
        reference = None
        if loaded.reference is not None:
            key = _reference_key(loaded, arguments)
            reference = caching.cached(cache, key, Reference, measure_reference)
        return signals.measure(loaded.model, *records, reference=reference, **arguments)

    key = caching.signals_key(
        loaded.model, loaded.tokenizer, loaded.rows, encoding, reference=loaded.reference
    )
    return caching.cached(cache, key, Signals, measure)


def _reference_key(loaded: Loaded, arguments: Mapping[str, Any]) -> str | None:
    """Compose the key of the model before fine-tuning; None if its own adapter takes part."""
    if loaded.reference is not loaded.model and hasattr(loaded.reference, "peft_config"):
        return None
    padding = loaded.tokenizer.pad_token_id
    return caching.reference_key(loaded.reference, loaded.rows, {"padding": padding, **arguments})


def _shadows(target: Target, options: Options, cache: Path) -> shadows.Shadows | None:
    """Find or train the shadows that were asked for, and measure them."""
    if not options.num_shadows and options.shadow_dir is None:
        return None
    recipe = shadows.shadow_recipe(target, options)
    if options.shadow_dir is not None:
        paths = shadows.find_shadows(target.recipe, target.seed, options.shadow_dir, recipe)
    else:
        paths = shadows.train_shadows(
            recipe,
            options.num_shadows,
            cache / "shadows",
            seed=options.seed,
            num_workers=options.num_workers,
            engine=options.engine,
            data_dir=options.data_dir,
        )
    return shadows.measure_shadows(
        paths,
        target.records.task,
        target.records.examples,
        target.population,
        encoding={"precision": options.precision, **target.encoding},
        batch_size=options.batch_size,
        device=options.device,
        cache=cache,
        base=options.base,
    )


def _learning(target: Target, loaded: Loaded, found: Signals) -> learning.Learning:
    """Compare the members' losses with the losses of chance."""
    records = target.records
    classes = records.task.num_labels or len(loaded.tokenizer)
    chance = learning.chance_losses(
        records.kind,
        records.examples,
        records.is_member,
        loaded.rows[: len(records.examples)],
        classes,
    )
    return learning.judge_learning(
        records.kind, records.examples, records.is_member, found, chance, max(classes, 2)
    )
