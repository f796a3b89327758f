"""Everything a run needs before its first step: data, model, mechanism, optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from lowrank_dp.data import Columns, Example, Task, encode, load_task
from lowrank_dp.data.selection import (
    has_group,
    partition,
    require_alone,
    threshold,
    unit_content,
)
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.membership.units import draw_members, fingerprint, group_units
from lowrank_dp.models import describe, load_model
from lowrank_dp.models.heads import head_state
from lowrank_dp.rng import derive_seed as derive_seed
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.identity import digests
from lowrank_dp.train.layout import Replicated, Sharded, equalise, shard
from lowrank_dp.train.processes import world_size
from lowrank_dp.train.public_rows import require_independent_rows

LABELLED_LENGTH = 128  # tokens that a text with a label is cut to, unless told otherwise


@dataclass(frozen=True)
class Setup:
    """A run before its first step.

    Attributes:
        units, members: every unit of privacy of the train split, and whether it is trained on.
        rows: encoded rows of the members; unit_rows: positions in it, by member unit.
        max_length: tokens that texts are cut to, or None.
        trained: the parameters that train, by name.
        initial_head: a classifier's head before training, under its state-dict names.
        seed: of everything that is not secret: head, LoRA's A, coins.
        digests: of model and data before the first step, by ``identity.digests``.
        layout: where tensors are when several processes share the run.
    """

    config: TrainConfig
    task: Task
    units: list[list[Example]]
    members: list[bool]
    rows: list[dict[str, Any]]
    unit_rows: list[list[int]]
    max_length: int | None
    model: Any
    tokenizer: Any
    trained: dict[str, torch.nn.Parameter]
    initial_head: dict[str, Tensor]
    mechanism: GaussianMechanism
    delta: float
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    seed: int
    data_fingerprint: str
    digests: dict[str, str]
    layout: Replicated

    @property
    def pad_to(self) -> int | None:
        """The public length that every row is padded to, in tokens; None for the longest row's."""
        return self.max_length if self.config.padding == "max-length" else None

    @property
    def description(self) -> str:
        """What runs on what, in words."""
        how = ", which share the model" if self.config.shard else ""
        several = f", by {world_size()} processes{how}" if world_size() > 1 else ""
        padded = f", each padded to {self.pad_to} tokens" if self.pad_to else ""
        return (
            f"{describe(self.model)}; {self.task.name} from {self.task.source}, "
            f"{sum(self.members):,} of {len(self.units):,} {self.config.unit}s trained on"
            f"{padded}{several}"
        )

    def statement(self, releases: int) -> str:
        """The privacy claim after ``releases`` releases, and what weakens it."""
        if self.config.non_private:
            return "NON-PRIVATE: no clipping and no noise"
        claim = self.mechanism.statement(releases, self.delta)
        if self.config.diagnostic:
            return (
                f"NON-PRIVATE: scheme {self.config.scheme!r} reads clean gradients, for "
                "diagnosis only"
            )
        claim += f"; the number of {self.config.unit}s ({sum(self.members):,}) is public"
        if self.config.membership == "half":
            claim += (
                f"; membership 'half': neighbours are sets of members, for one more "
                f"{self.config.unit} in the data may change the whole half"
            )
        if self.config.holdout:
            claim += f"; {self.config.unit}s set aside by holdout are evaluated on, not protected"
        if self.delta * len(self.unit_rows) >= 1:
            claim += (
                f"; delta is not below 1/N = {1 / len(self.unit_rows):.3g}: it allows "
                "publishing a whole record"
            )
        return f"{claim}; {self.randomness}"

    @property
    def randomness(self) -> str:
        """Where noise and samples come from."""
        secure = "the cryptographic generator AES-128-CTR, keyed by the operating system"
        if self.config.seed is not None:
            return (
                f"noise drawn from seed {self.config.seed}, as the samples are: reproducible, "
                "and not secret"
            )
        if torch.device(self.config.device).type == "cpu" or self.config.secure_rng:
            return f"noise and samples from {secure}"
        return (
            f"samples from {secure}; noise from torch's Philox generator on the GPU, seeded "
            "with 63 random bits of the operating system: not cryptographic"
        )

    def epsilon(self, releases: int) -> float | None:
        """Epsilon after ``releases`` releases; None where nothing is claimed."""
        if self.config.non_private or self.config.diagnostic:
            return None
        return self.mechanism.epsilon(releases, self.delta)


def prepare(config: TrainConfig, seed: int) -> Setup:
    """Load and check everything; raises ``ValueError`` in one line on what can't be trained.

    ``seed`` is ``config.seed``, or what was drawn in its place.
    """
    if config.shard and world_size() == 1:
        raise ValueError(
            "shard must go with several processes: start them by torchrun "
            "--nproc-per-node N -m lowrank_dp.train ..."
        )
    task = load_task(
        config.task,
        max_examples=config.max_examples,
        seed=config.data_seed,
        columns=Columns.of(config),
        warn=False,
    )
    _check_unit(config, task)
    task = hold_out(task, config.holdout, config.unit) if config.holdout else task
    units = group_units(task.train, config.unit)
    members = _members(units, config.membership, seed)
    trained_on = [unit for unit, member in zip(units, members, strict=True) if member]
    _check_data(config, task, trained_on)
    model, tokenizer = load_model(
        config.model,
        task=task,
        method=config.method,
        rank=config.rank,
        lora_alpha=config.lora_alpha,
        lora_init=config.lora_init,
        target_modules=list(config.target_modules) or None,
        train_embeddings=config.train_embeddings,
        train_layers=config.train_layers,
        device="cpu" if config.shard else config.device,
        seed=seed,
    )
    examples = [example for unit in trained_on for example in unit]
    max_length = config.max_length
    if max_length is None and task.kind != "generation":
        max_length = min(LABELLED_LENGTH, tokenizer.model_max_length)
    if max_length is None and config.padding == "max-length":
        raise ValueError(
            "max_length must be given to pad every row to it (padding 'max-length') "
            f"for {task.name}, a generation task: give --max-length"
        )
    rows = encode(examples, tokenizer, kind=task.kind, max_length=max_length)
    if task.kind == "generation" and config.generate:
        _check_room(config, task, tokenizer, max_length)
    positions = iter(range(len(rows)))
    unit_rows = [[next(positions) for _ in unit] for unit in trained_on]
    mechanism, delta = _mechanism(config, len(trained_on))
    equalise(model)
    initial_head = head_state(model)
    require_independent_rows(model, tokenizer, task, max_length, config)
    identity = digests(model, tokenizer, rows)
    if task.warning:  # last, so that what is refused is one line
        warnings.warn(task.warning, stacklevel=2)
    if config.shard:
        shard(model, config.device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = _optimizer(config, list(trained.values()))
    return Setup(
        config=config,
        task=task,
        units=units,
        members=members,
        rows=rows,
        unit_rows=unit_rows,
        max_length=max_length,
        model=model,
        tokenizer=tokenizer,
        trained=trained,
        initial_head=initial_head,
        mechanism=mechanism,
        delta=delta,
        optimizer=optimizer,
        learning_rate=_schedule(config, optimizer),
        seed=seed,
        data_fingerprint=fingerprint(examples),
        digests=identity,
        layout=Sharded(trained) if config.shard else Replicated(),
    )


def hold_out(task: Task, count: int, unit: str) -> Task:
    """The task with about ``count`` units of its train split in place of the validation split.

    The held-out units are the same for every seed. Each group is held out alone, with all its
    rows, by a keyed hash against a threshold (``data.selection``): a unit more in the train split
    changes that unit's side only, and the number of held-out units is an expectation.
    """
    units = len(group_units(task.train, unit))
    if not count < units:
        raise ValueError(
            f"holdout must be below the {units:,} {unit}s of {task.name}'s train "
            f"split, got {count:,}"
        )
    share = threshold(count, units)
    held_out, rest = partition(task.train, share, "holdout", "")
    require_alone(
        lambda rows: partition(rows, share, "holdout", "")[0], task.train, repr, "holdout"
    )
    if not held_out or not rest:
        raise ValueError(
            f"holdout {count:,} chose {'all' if held_out else 'none'} of the "
            f"{units:,} {unit}s of {task.name}'s train split (their number is "
            f"random): give a {'smaller' if held_out else 'larger'} one"
        )
    return replace(task, splits={"train": rest, "validation": held_out})


def _members(units: list[list[Example]], membership: str, seed: int) -> list[bool]:
    """For each unit, whether it is trained on; independent coins are checked to be independent."""

    def choose(some: Sequence[list[Example]]) -> list[list[Example]]:
        return [*compress(some, draw_members(some, membership, seed))]

    if membership == "bernoulli":
        require_alone(choose, units, unit_content, "membership 'bernoulli'")
    return draw_members(units, membership, seed)


def _check_unit(config: TrainConfig, task: Task) -> None:
    """Refuse groups where none are known, and warn where they are single rows."""
    if config.unit != "group":
        return
    if not any(map(has_group, task.train)):
        could = ", ".join(map(repr, task.unused[:10]))
        fix = (
            f"name their column by group_column (not read so far: {could})"
            if could
            else "use unit 'example', or own data with a group_column"
        )
        raise ValueError(
            f"unit 'group' must come with groups of rows, {task.name} has none that "
            f"are known: {fix}"
        )
    if len(group_units(task.train, "group")) == len(task.train) > 1:
        warnings.warn(
            f"each of the {len(task.train):,} groups of {task.name} is a single row: "
            "unit 'group' protects no more than unit 'example'",
            stacklevel=3,
        )


def _check_data(config: TrainConfig, task: Task, trained_on: list[list[Example]]) -> None:
    if config.batch_size > len(trained_on):
        raise ValueError(
            f"batch_size must be at most the {len(trained_on):,} {config.unit}s that "
            f"are trained on, got {config.batch_size:,}"
        )
    if task.kind == "classification":
        labels = {example.label for unit in trained_on for example in unit}
        if len(labels) < 2:
            name = task.label_names[int(labels.pop() or 0)]
            raise ValueError(
                f"{task.name} must have training examples of two classes or more, all "
                f"have label {name:.80}"
            )
    task.split("validation")


def _check_room(config: TrainConfig, task: Task, tokenizer: Any, max_length: int | None) -> None:
    """Refuse now what the last evaluation could not write, when the privacy would be spent."""
    prompts = encode(
        task.validation, tokenizer, kind=task.kind, max_length=max_length, with_target=False
    )
    room = tokenizer.model_max_length - max(len(prompt["input_ids"]) for prompt in prompts)
    if config.max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens must be <= {room}, what the longest prompt of "
            f"{task.name}'s validation split leaves of the model's context of "
            f"{tokenizer.model_max_length}, got {config.max_new_tokens}; or cut the "
            "prompts by a max_length, or leave generate out"
        )


def _mechanism(config: TrainConfig, num_units: int) -> tuple[GaussianMechanism, float]:
    sample_rate = config.batch_size / num_units
    delta = num_units**-1.1 if config.delta is None else config.delta
    if delta >= 1 / num_units and not config.non_private:
        warnings.warn(
            f"delta {delta:g} is not below 1/N = {1 / num_units:.3g}: it allows "
            "publishing a whole record",
            stacklevel=3,
        )
    if config.epsilon is not None:
        return GaussianMechanism.calibrate(
            config.epsilon, delta, config.steps, sample_rate, config.max_grad_norm, unit=config.unit
        ), delta
    mechanism = GaussianMechanism(
        config.noise_multiplier or 0.0, config.max_grad_norm, sample_rate, config.unit
    )
    if not config.non_private and math.isinf(mechanism.epsilon(config.steps, delta)):
        raise ValueError(
            f"noise_multiplier {config.noise_multiplier:g} protects nothing, epsilon "
            "is beyond any number: give a larger one, or say non_private"
        )
    return mechanism, delta


def _optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=config.averaging, weight_decay=decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(parameters, lr=rate, betas=(config.averaging, 0.999), weight_decay=decay)


def _schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """The learning rate as a function of the step, which needs no state to resume."""
    import transformers

    scheduler: Any = transformers.get_scheduler(
        config.schedule,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.steps,
    )
    # a warm-up that counts from 0 would waste a step's privacy on a rate of zero
    shift = 1 if config.warmup_steps else 0
    factor = scheduler.lr_lambdas[0]
    return lambda step: (
        config.learning_rate * factor(step + shift if step < config.warmup_steps else step)
    )
