"""Compute every membership score that a checkpoint allows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lowrank_dp.data import IGNORE
from lowrank_dp.mia import projection, quantile, scores, signals
from lowrank_dp.mia._arrays import Array
from lowrank_dp.mia.loading import Loaded
from lowrank_dp.mia.options import SHADOW_ATTACKS, WHITE_BOX, Options
from lowrank_dp.mia.requirements import population_unavailable, projection_unavailable
from lowrank_dp.mia.shadows import Shadows
from lowrank_dp.mia.signals import Signals
from lowrank_dp.mia.target import Target


@dataclass
class Scores:
    """Scores (N,) of each attack that was made, and the reason for each that was not."""

    made: dict[str, Array] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def score_records(
    target: Target, options: Options, loaded: Loaded, found: Signals, shadow: Shadows | None
) -> Scores:
    """Score the attacked records by every attack that is available.

    ``found`` has the signals of the attacked records first, then those of the population.
    """
    result = Scores()
    count = len(target.records.examples)
    loss, phi = found.loss[:count], found.phi[:count]
    result.made["loss"] = scores.loss_score(loss)
    _add_base(result, loss, found.reference_loss[:count], loaded.why_no_reference)
    if target.records.kind == "generation":
        result.made["zlib"] = np.asarray(scores.zlib_score(loss, _scored_texts(target, loaded)))
        result.made["min-k"] = found.min_k[:count]
        result.made["min-k++"] = found.min_k_plus_plus[:count]
        if len(found.error_zone):
            result.made["ez"] = found.error_zone[:count]
    _add_quantile(result, target, found, options.seed)
    if shadow is None:
        result.unavailable |= dict.fromkeys(SHADOW_ATTACKS, "it needs --shadows")
    else:
        _add_shadow_scores(result, loss, phi, found.loss[count:], shadow)
    _add_white_box(result, target, options, loaded)
    return result


def _add_base(result: Scores, loss: Array, reference: Array, why_not: str) -> None:
    if not len(reference):
        result.unavailable["base"] = why_not
    elif np.array_equal(loss, reference):
        result.unavailable["base"] = (
            "every loss is that of the model before fine-tuning: --base names "
            "the checkpoint itself, or fine-tuning changed nothing"
        )
    else:
        result.made["base"] = scores.calibrated_score(loss, reference)


def _scored_texts(target: Target, loaded: Loaded) -> list[str]:
    """Return the part of each text that was scored, without a tail that was cut off."""
    if target.format.template is None:
        return [example.target or " " for example in target.records.examples]
    rows = loaded.rows[: len(target.records.examples)]
    scored = [[token for token in row["labels"] if token != IGNORE] for row in rows]
    return [text or " " for text in loaded.tokenizer.batch_decode(scored, skip_special_tokens=True)]


def _add_quantile(result: Scores, target: Target, found: Signals, seed: int) -> None:
    if reason := population_unavailable(target, "quantile"):
        result.unavailable["quantile"] = reason
        return
    examples, population = target.records.examples, target.population
    count = len(examples)
    known = quantile.features((*examples, *population), found.reference_loss)
    predicted = quantile.predicted_quantile(
        known[count:], found.phi[count:], known[:count], seed=seed
    )
    result.made["quantile"] = scores.quantile_score(found.phi[:count], predicted)


def _add_shadow_scores(
    result: Scores, loss: Array, phi: Array, population: Array, shadow: Shadows
) -> None:
    by_name = {
        "lira": lambda: scores.lira_online(phi, shadow.phi, shadow.is_member),
        "lira-offline": lambda: scores.lira_offline(phi, shadow.phi, shadow.is_member),
        "rmia": lambda: scores.rmia_online(
            loss, shadow.loss, shadow.is_member, population, shadow.population_loss
        ),
        "rmia-offline": lambda: scores.rmia_offline(
            loss, shadow.loss, shadow.is_member, population, shadow.population_loss
        ),
    }
    for name, make in by_name.items():
        try:
            result.made[name] = make()
        except ValueError as error:  # every shadow, or no shadow, was trained on some record
            result.unavailable[name] = f"{error}; train more shadows"


def _add_white_box(result: Scores, target: Target, options: Options, loaded: Loaded) -> None:
    records = target.records
    asked = {name for name in WHITE_BOX if options.white_box or name in options.named}
    if "gradient" in asked:
        result.made["gradient"] = -signals.gradient_norms(
            loaded.model,
            loaded.tokenizer,
            records.task,
            records.examples,
            batch_size=options.batch_size,
            precision=options.precision,
            **target.encoding,
        )
    if "projection" in asked:
        if reason := projection_unavailable(target, options):
            result.unavailable["projection"] = reason
            return
        result.made["projection"] = projection.projection_scores(
            target.folder,
            target.base or {},
            records.task,
            records.examples,
            records.is_member,
            max_length=target.max_length,
            pad_to=target.pad_to,
            device=options.device,
        )
