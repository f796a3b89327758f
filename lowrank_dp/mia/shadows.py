"""Shadow models: the checkpoint's own recipe, trained again on newly drawn members.

This is the only module of the attack that trains. Method, rank, frozen A, noise, restoration, steps
and batch size are the target's. Each shadow has its own seed and so its own members, head and
noise. The folder of a shadow is named by its configuration, so a second attack reads the shadows
that the first attack trained.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_dp import _validate
from lowrank_dp._terminal import progress
from lowrank_dp.artifacts import runs
from lowrank_dp.data import Example, Task, encode
from lowrank_dp.data.tasks import known_name
from lowrank_dp.membership import read_manifest
from lowrank_dp.mia import caching, signals
from lowrank_dp.mia._arrays import Array
from lowrank_dp.mia.checkpoint import load_checkpoint
from lowrank_dp.mia.options import Options
from lowrank_dp.mia.target import Target
from lowrank_dp.models.backbones import find_backbone
from lowrank_dp.models.loading import parse_device
from lowrank_dp.precondition.public import public_rows
from lowrank_dp.sweep import run_folder, sweep
from lowrank_dp.train import TrainConfig, load_result

# fields that may differ between target and shadows: none affects the distribution of the weights
SHADOW_MAY_DIFFER = (
    "seed",
    "device",
    "micro_batch_size",
    "eval_every",
    "eval_examples",
    "generate",
    "num_beams",
    "max_new_tokens",
    "snapshot_every",
    "secure_rng",
    "compile",
    "shard",
    "prefix_cache",
    "prefix_gigabytes",
)
PLACES = ("task", "model")  # fields whose value may be a path, which changes if a file is moved
NEEDS_POOL = (
    "shadows need the records of membership.json, which are in their pools: leave --members and "
    "--nonmembers out"
)
EVALUATED = 100  # evaluation examples of a shadow: enough to notice that the shadow diverged


@dataclass(frozen=True)
class Shadows:
    """Signals of K shadows.

    Attributes:
        loss, phi: losses and logit confidences of the N attacked records, (K, N).
        is_member: whether each shadow was trained on each record, (K, N).
        population_loss: losses of Z records that are in no model, (K, Z).
    """

    loss: Array
    phi: Array
    is_member: np.ndarray
    population_loss: Array


def shadow_recipe(target: Target, options: Options) -> TrainConfig:
    """Return the target's recipe with the data and the base model that the attack has loaded.

    A run on own data gets the path ``options.data_dir``, whatever training.json names, and the
    shadows share a cache of frozen blocks beside their own folders. A path of the base model is
    that of training.json if ``options.base`` is empty, and so is a path of public text.
    """
    recipe = target.recipe
    if known_name(recipe.task) is None:
        if options.data_dir is None:  # records that were given in files
            raise ValueError(NEEDS_POOL)
        path = _validate.expanded("data_dir", options.data_dir).absolute()
        recipe = replace(recipe, task=str(path))
    cache = "off" if recipe.prefix_cache == "off" else ""
    return replace(recipe, model=options.base or recipe.model, prefix_cache=cache)


def check_shadows(target: Target, options: Options) -> int:
    """Return the number of shadows that an attack will use.

    Raises ValueError for everything about the shadows that can be refused before the first forward
    pass: records that are not the run's own pool, a recipe that trains on every record, a base
    model or public data that are not here, a device that is not, and found shadows of another
    recipe.
    """
    count = len(shadow_configs(target.recipe, options.num_shadows or 1, options.seed))
    if target.records.origin != runs.MEMBERSHIP:
        raise ValueError(NEEDS_POOL)
    recipe = shadow_recipe(target, options)
    if options.shadow_dir is not None:
        return len(find_shadows(target.recipe, target.seed, options.shadow_dir, recipe))
    try:
        parse_device(recipe.device)
        find_backbone(recipe.model)
        if recipe.precondition not in ("none", "noisy"):
            public_rows(recipe.precondition, target.records.task, recipe.precondition_rows)
    except ValueError as error:
        raise ValueError(f"shadows can't be trained here: {error}") from None
    return count


def shadow_configs(recipe: TrainConfig, count: int, seed: int) -> list[TrainConfig]:
    """Make the configurations of ``count`` shadows: the recipe with distinct seeds.

    No seed is the target's. Raises ValueError for a recipe that trains on every record.
    """
    if recipe.membership == "all":
        raise ValueError(
            "shadows need a checkpoint trained with --membership bernoulli or half: "
            "this checkpoint was trained on every record, so no record is left to compare with"
        )
    rng = random.Random(f"lowrank_dp shadows {seed}")
    seeds: dict[int, None] = {}
    while len(seeds) < _validate.integer("shadows", count):
        drawn = rng.getrandbits(31)
        if drawn != recipe.seed:
            seeds[drawn] = None
    return [
        replace(
            recipe,
            seed=drawn,
            generate=False,
            eval_every=recipe.steps,
            eval_examples=min(recipe.eval_examples, EVALUATED),
            secure_rng=False,
            compile=False,
            shard=False,
        )
        for drawn in seeds
    ]


def train_shadows(
    recipe: TrainConfig,
    count: int,
    folder: Path,
    *,
    seed: int = 0,
    num_workers: int | None = None,
    engine: str = "loky",
    data_dir: Path | None = None,
) -> list[Path]:
    """Train those of ``count`` shadows that ``folder`` lacks; return all checkpoints' folders.

    ``num_workers``, ``engine`` and ``data_dir`` are those of ``sweep``; own data do not read the
    last. Raises ValueError if a shadow fails; the shadows that were trained are kept.
    """
    configs = shadow_configs(recipe, count, seed)
    outcomes = sweep(
        configs,
        folder,
        num_workers=num_workers,
        engine=engine,
        keep_model=True,
        data_dir=data_dir if known_name(recipe.task) else None,
    )
    failed = [outcome.error for outcome in outcomes if outcome.result is None]
    if failed:
        raise ValueError(
            f"{len(failed)} of {count} shadows could not be trained: {failed[0]}; "
            "what was trained is kept, so the attack can be repeated"
        )
    return [run_folder(config, folder) for config in configs]


def find_shadows(
    recipe: TrainConfig, seed: int | None, folder: Path, here: TrainConfig | None = None
) -> list[Path]:
    """Find the checkpoints in the subfolders of ``folder``.

    ``recipe`` is the target's, and ``here`` the result of `shadow_recipe`: a shadow may name the
    data and the base model as either of them does.

    ``seed`` is the seed of the target's head and of its sampling, which every run's manifest has,
    also that of a run without a seed of the user's. Raises ValueError if there is no checkpoint, or
    if a checkpoint was trained by another recipe than the target, or is the target or a copy of
    another checkpoint.
    """
    found = sorted(path.parent for path in folder.glob(f"*/{runs.MEMBERSHIP}"))
    if not found:
        raise ValueError(f"--shadow-dir {folder} must hold checkpoints in subfolders, found none")
    runs_by_seed: dict[int | None, str] = {seed: "the target"}
    for path in found:
        other = load_result(path).config
        alike = [*SHADOW_MAY_DIFFER]
        if here is not None:
            alike += [name for name in PLACES if getattr(other, name) == getattr(here, name)]
        same = replace(other, **{name: getattr(recipe, name) for name in alike})
        if differences := recipe.differences(same):
            raise ValueError(
                f"shadow {path.name} must be trained as the target was; target and "
                f"shadow differ in {'; '.join(differences)}"
            )
        own = int(read_manifest(path / runs.MEMBERSHIP).base["seed"])
        if own in runs_by_seed:
            raise ValueError(
                f"shadow {path.name} must be a run of its own: it has the seed {own} of "
                f"{runs_by_seed[own]}, so it is the same run"
            )
        runs_by_seed[own] = f"shadow {path.name}"
    return found


def measure_shadows(
    paths: Sequence[Path],
    task: Task,
    examples: Sequence[Example],
    population: Sequence[Example],
    *,
    encoding: Mapping[str, Any],
    batch_size: int,
    device: str,
    cache: Path,
    base: str = "",
) -> Shadows:
    """Measure every shadow's signals on the attacked records and on the population.

    ``encoding`` has the arguments of ``signals.measure`` that determine the tokens of a record and
    the precision; signals are kept in ``cache``; ``base`` is as in ``checkpoint.load_checkpoint``.
    Raises ValueError if an attacked record is not in a shadow's pool with the same text.
    """
    together = [*examples, *population]
    form = {name: encoding[name] for name in ("max_length", "template") if name in encoding}
    losses, phis, members = [], [], []
    for path in progress(paths, "shadows' losses"):
        manifest = read_manifest(path / runs.MEMBERSHIP, base=base or None)
        contents = dict(zip(manifest.ids, manifest.content_hashes, strict=True))
        truth = dict(zip(manifest.ids, manifest.is_member, strict=True))
        missing = [
            example.id for example in examples if contents.get(example.id) != example.content_hash
        ]
        if missing:
            raise ValueError(
                f"shadow {path.name} must have every attacked record in its pool, "
                f"{len(missing)} are not there with the same text, such as "
                f"{missing[0]}"
            )
        members.append([truth[example.id] for example in examples])
        model, tokenizer = load_checkpoint(path, base, task=task, device=device)
        measure = partial(
            signals.measure, model, tokenizer, task, together, batch_size=batch_size, **encoding
        )
        rows = encode(together, tokenizer, kind=task.kind, **form)
        key = caching.signals_key(model, tokenizer, rows, encoding)
        found = caching.cached(cache, key, signals.Signals, measure)
        losses.append(found.loss)
        phis.append(found.phi)
    loss, phi = np.stack(losses), np.stack(phis)
    count = len(examples)
    return Shadows(loss[:, :count], phi[:, :count], np.array(members, dtype=bool), loss[:, count:])
