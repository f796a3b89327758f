"""Requirements of an attack on checkpoint and options, checked before the first forward pass.

Functions called ``..._unavailable`` return the reason why something is unavailable, or "".
"""

from __future__ import annotations

import numpy as np

from lowrank_dp.artifacts import runs
from lowrank_dp.mia.options import NEEDS_POPULATION, SHADOW_ATTACKS, Options
from lowrank_dp.mia.quantile import MIN_POPULATION
from lowrank_dp.mia.report import independent_scores
from lowrank_dp.mia.target import Target

TEXT_ATTACKS = ("zlib", "min-k", "min-k++", "ez")  # attacks on causal language models alone
# options of a run after which B A is one projected gradient sum of known records
PROJECTION_RECIPE = {
    "method": "lora-frozen-a",
    "optimizer": "sgd",
    "steps": 1,
    "unit": "example",
    "weight_decay": 0.0,
    "non_private": True,
    "dropout": False,
}


def check_named(target: Target, options: Options) -> None:
    """Raise ValueError if an attack that was named, or the one-run audit, is unavailable."""
    for name in options.named:
        reason = ""
        if name in SHADOW_ATTACKS and not (options.num_shadows or options.shadow_dir):
            reason = "it needs --shadows"
        elif name == "projection":
            reason = projection_unavailable(target, options)
        elif name in NEEDS_POPULATION:
            reason = population_unavailable(target, name)
        elif name in TEXT_ATTACKS and target.records.kind != "generation":
            reason = "it needs a causal language model"
        if reason:
            raise ValueError(f"attack {name!r} can't be made here: {reason}")
    if options.guesses and (reason := one_run_unavailable(target, options)):
        raise ValueError(reason)


def projection_unavailable(target: Target, options: Options) -> str:
    """Return the reason why the projection attack is unavailable, or ""."""
    if (
        target.base is None
        or target.records.origin != runs.MEMBERSHIP
        or options.max_records
        or target.records.left_out
    ):
        return "it needs every record of membership.json, and the base"
    if target.result is None:
        return "it needs training.json"
    wrong = [
        f"{name} {wanted!r}"
        for name, wanted in PROJECTION_RECIPE.items()
        if getattr(target.result.config, name) != wanted
    ]
    if target.result.sample_rate != 1:
        wrong.append("batch_size the number of members, so that none is left out by chance")
    return f"it needs a recipe with {', '.join(wrong)}" if wrong else ""


def population_unavailable(target: Target, name: str) -> str:
    """Return the reason why attack ``name`` has too few records of the population, or ""."""
    needed, given = MIN_POPULATION if name == "quantile" else 1, len(target.population)
    if given >= needed:
        return ""
    return f"it needs {needed} records in no model, got {given}: give --population"


def one_run_unavailable(target: Target, options: Options) -> str:
    """Return the reason why the one-run audit is unavailable, or ""."""
    if target.records.sampling != "bernoulli" or options.max_records is not None:
        return (
            "guesses of the one-run audit need every record of a checkpoint trained with "
            "--membership bernoulli, independent fair coins"
        )
    count = len(independent_scores(target, np.zeros(len(target.records.examples)))[0])
    if options.guesses > count:
        return (
            f"guesses must be at most {count:,}, the number of independent units among the "
            f"attacked records, got {options.guesses:,}"
        )
    return ""
