"""Everything that a run needs before its first step: data, model, mechanism, optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from lowrank_dp.data import Example, Task, encode, micro_batches
from lowrank_dp.evaluation.models import evaluated_rows
from lowrank_dp.grads import Batch
from lowrank_dp.grads.frequencies import require_fixed_frequencies
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.membership.units import fingerprint
from lowrank_dp.models import describe, load_model
from lowrank_dp.models.heads import head_state
from lowrank_dp.models.memory import warn_of_logits
from lowrank_dp.train.claims import statement_of
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.identity import digests
from lowrank_dp.train.implicit_noise import noisy_matrices
from lowrank_dp.train.layout import Layout, Replicated, Sharded, equalise, shard
from lowrank_dp.train.optimizers import make_optimizer
from lowrank_dp.train.preconditioning import add_preconditioner
from lowrank_dp.train.prefix import (
    PrefixCache,
    cache_wanted,
    open_cache,
)
from lowrank_dp.train.processes import world_size
from lowrank_dp.train.public_rows import public_batches, require_independent_rows
from lowrank_dp.train.records import check_room, select_units, token_limit
from lowrank_dp.train.request import DEFAULT_REQUEST, RunRequest


@dataclass(frozen=True)
class Setup:
    """Data, model, mechanism and optimizer of a run before its first step.

    Attributes:
        config: configuration of the run.
        task: the data, with held-out units as its validation split if the run has a holdout.
        units, members: every unit of privacy of the train split, and whether the run trains on it.
        rows: encoded rows of the members.
        unit_rows: the positions in ``rows`` of each member's rows.
        max_length: number of tokens that texts are cut to, or None.
        model, tokenizer: the model, on the run's device, and its tokenizer; a sharded model holds
            this rank's rows.
        trained: the trained parameters, by name.
        initial_head: a classifier's head before training, under its state-dict names.
        mechanism, delta: the Gaussian mechanism, and the delta at which epsilon is stated.
        optimizer: optimizer of the trained parameters.
        learning_rate: the learning rate as a function of the step, counted from 0.
        seed: seed of the choices that are not secret: the head, LoRA's A, the membership bits.
        data_fingerprint: SHA-256 of the records that are trained on.
        digests: SHA-256 of model and data before the first step, by ``identity.digests``.
        layout: placement of the tensors on the processes that share the run.
        evaluated: validation examples of the evaluations, and their encoded rows.
        prefix: cached outputs of the frozen blocks.
        preconditioner: source of the preconditioner's moments, in words; "" if there is no
            preconditioner.
        noisy_matrices: name of each weight whose gradient gets LoRA's implicit noise -> whether the
            weight is stored as (in, out); empty for a run without this noise.
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
    layout: Layout
    evaluated: tuple[Sequence[Example], Sequence[Mapping[str, Any]]]
    prefix: PrefixCache
    preconditioner: str = ""
    noisy_matrices: Mapping[str, bool] = field(default_factory=dict)

    @property
    def pad_to(self) -> int | None:
        """Public number of tokens that every row is padded to; None pads to the longest row."""
        return self.max_length if self.config.padding == "max-length" else None

    @property
    def description(self) -> str:
        """The model, the data and the processes, in words."""
        how = ", which share the model" if self.config.shard else ""
        half = ", steps and evaluations in bf16" if self.config.precision == "bf16" else ""
        several = f", by {world_size()} processes{how}" if world_size() > 1 else ""
        cached = f"; {self.prefix.note}" if self.prefix.note else ""
        padded = f", each padded to {self.pad_to} tokens" if self.pad_to else ""
        return (
            f"{describe(self.model)}; {self.task.name} from {self.task.source}, "
            f"{sum(self.members):,} of {len(self.units):,} {self.config.unit}s trained on"
            f"{padded}{half}{several}{cached}"
        )

    def statement(self, releases: int) -> str:
        """State the privacy after ``releases`` releases, with all facts that weaken the claim."""
        if self.noisy_matrices:
            return (
                "NON-PRIVATE: no clipping; LoRA's implicit noise "
                f"({self.config.implicit_noise}, rank {self.config.rank}) on the gradients of "
                f"{len(self.noisy_matrices)} matrices depends on these gradients and is no privacy "
                "mechanism"
            )
        if self.config.non_private:
            return "NON-PRIVATE: no clipping and no noise"
        if self.config.noise_free:
            return (
                "NON-PRIVATE: sampled and clipped to max_grad_norm "
                f"{self.mechanism.max_grad_norm:g} without noise, for diagnosis only"
            )
        return statement_of(
            self.config,
            self.mechanism,
            self.delta,
            releases,
            len(self.unit_rows),
            task_name=self.task.name,
            preconditioner=self.preconditioner,
        )

    def epsilon(self, releases: int) -> float | None:
        """Return epsilon at ``delta`` after ``releases`` releases; None without a privacy claim."""
        if self.config.diagnostic or not self.config.adds_noise:
            return None
        return self.mechanism.epsilon(releases, self.delta)

    def batches(self, chosen: Sequence[int]) -> Iterator[Batch]:
        """Yield micro-batches of the chosen ``rows``, on the device; no batch for no row."""
        rows = [self.rows[row] for row in chosen]
        for indices, batch in micro_batches(
            rows,
            self.config.micro_batch_size,
            self.tokenizer.pad_token_id,
            length=self.pad_to,
            device=self.config.device,
        ):
            yield self.prefix.for_training([rows[i] for i in indices], batch)


def prepare(config: TrainConfig, seed: int, request: RunRequest = DEFAULT_REQUEST) -> Setup:
    """Load the data and the model, and make the mechanism and the optimizer.

    Args:
        config: configuration of the run.
        seed: ``config.seed``, or the number that was drawn in its place.
        request: options of the cache of the frozen blocks' outputs, and the data's folder.

    Raises:
        ValueError: if the run can't be made; the message is one line.
    """
    _require_processes(config)
    task, units, members = select_units(config, seed, request.data_dir)
    trained_on = [*compress(units, members)]
    examples = [example for unit in trained_on for example in unit]
    model, tokenizer = _load_model(config, task, seed)
    max_length = token_limit(config, task, tokenizer)
    require_fixed_frequencies(model, max_length or tokenizer.model_max_length, config.padding)
    rows = encode(examples, tokenizer, kind=task.kind, max_length=max_length)
    positions = iter(range(len(rows)))
    if task.kind == "generation" and config.generate:
        check_room(config, task, tokenizer, max_length)
    mechanism, delta = make_mechanism(config, len(trained_on))
    equalise(model)
    initial_head = head_state(model)
    require_independent_rows(model, tokenizer, task, max_length, config)
    preconditioner = ""
    if config.precondition != "none":
        preconditioner = add_preconditioner(model, tokenizer, task, max_length, config)
        equalise(model)  # sums of public gradients may round differently on different ranks
        require_independent_rows(model, tokenizer, task, max_length, config)
    identity = digests(model, tokenizer, rows)
    if task.warning:  # after all checks, so that an error is one line
        warnings.warn(task.warning, stacklevel=2)
    if config.shard:
        shard(model, config.device)
    evaluated = evaluated_rows(
        tokenizer, task, max_length=max_length, max_examples=config.eval_examples
    )
    cache = _open_cache(model, tokenizer, task, rows, evaluated[1], max_length, config, request)
    identity |= {"prefix": cache.digest} if cache.digest else {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(config, model, trained)
    return Setup(
        config=config,
        task=task,
        units=units,
        members=members,
        rows=rows,
        unit_rows=[[next(positions) for _ in unit] for unit in trained_on],
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
        evaluated=evaluated,
        prefix=cache,
        preconditioner=preconditioner,
        noisy_matrices=noisy_matrices(model, config),
    )


def _require_processes(config: TrainConfig) -> None:
    """Refuse to shard a model over a single process."""
    if config.shard and world_size() == 1:
        raise ValueError(
            "shard must go with several processes: start them by torchrun "
            "--nproc-per-node N -m lowrank_dp.train ..."
        )


def _open_cache(
    model: Any,
    tokenizer: Any,
    task: Task,
    rows: list[dict[str, Any]],
    evaluated: Sequence[Mapping[str, Any]],
    max_length: int | None,
    config: TrainConfig,
    request: RunRequest,
) -> PrefixCache:
    """Open the cache of the frozen blocks' outputs, if the configuration names one."""
    if not cache_wanted(config):
        return PrefixCache()
    return open_cache(
        model,
        config,
        request,
        training=rows,
        evaluation=evaluated,
        public=public_batches(tokenizer, task, max_length, config.padding),
        pad_token_id=tokenizer.pad_token_id,
        pad_to=max_length if config.padding == "max-length" else None,
    )


def _load_model(config: TrainConfig, task: Task, seed: int) -> tuple[Any, Any]:
    """Load the model and its tokenizer; a model that will be sharded stays on the CPU."""
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
    warn_of_logits(model, task.kind, config.micro_batch_size)
    return model, tokenizer


def make_mechanism(config: TrainConfig, num_units: int) -> tuple[GaussianMechanism, float]:
    """Return the mechanism, calibrated if the configuration has a target epsilon, and delta."""
    sample_rate = config.batch_size / num_units
    delta = num_units**-1.1 if config.delta is None else config.delta
    if delta >= 1 / num_units and config.adds_noise:
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
    if config.adds_noise and math.isinf(mechanism.epsilon(config.steps, delta)):
        raise ValueError(
            f"noise_multiplier {config.noise_multiplier:g} protects nothing, since "
            "epsilon is infinite: give a larger one, or non_private"
        )
    return mechanism, delta


def _schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """Return the learning rate as a function of the step; the function has no state to save."""
    if config.schedule == "constant":
        return lambda step: config.learning_rate
    import transformers  # imported here, since its schedulers import peft

    scheduler: Any = transformers.get_scheduler(
        config.schedule,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.steps,
    )
    # A warm-up that starts at 0 would spend the first step's privacy on a learning rate of zero.
    shift = 1 if config.warmup_steps else 0
    factor = scheduler.lr_lambdas[0]
    return lambda step: (
        config.learning_rate * factor(step + shift if step < config.warmup_steps else step)
    )
