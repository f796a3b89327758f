"""Canaries: rows of random tokens that an audit adds to a run's records, and runs with them.

Each canary is one more unit of privacy. The tokens and the label of a canary are random, so that
nothing in the records predicts them, and the gradient of a canary is large.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lowrank_dp.losses import IGNORE
from lowrank_dp.rng import derive_seed
from lowrank_dp.train import preconditioning
from lowrank_dp.train import setup as preparation
from lowrank_dp.train import step as training
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.optimizers import make_optimizer
from lowrank_dp.train.setup import Setup
from lowrank_dp.train.state import State, first_state, new_stream

Sums = Mapping[str, Tensor]
Clip = Callable[[Any, float], tuple[Sums, Tensor]]
DEVIATION = 0.02  # largest relative difference of .grad from the release that counts as rounding


@dataclass(frozen=True)
class Audited:
    """An audited run with its canaries.

    Attributes:
        setup: setup of the run; every canary is a row and a unit of the run.
        canaries: positions of the canaries among the setup's rows; also the last units.
        initial: trained parameters before the first step, by name.
        scales: scales of a preconditioner before the first step; empty without a preconditioner.
        sample_rate: sampling rate q in (0, 1] that the configuration states.
        noise_multiplier: sigma that the configuration states, relative to C.
        max_grad_norm: clipping norm C that the configuration states, absolute.
        delta: delta at which epsilon is stated.
        seed: seed of the audit's own random numbers, and of the noise if the run has a seed.
    """

    setup: Setup
    canaries: tuple[int, ...]
    initial: dict[str, Tensor]
    scales: dict[str, Tensor]
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    delta: float
    seed: int

    @property
    def generator(self) -> np.random.Generator:
        """New generator of the audit's coins, always in the same initial state."""
        return np.random.default_rng(self.seed)

    def batches(self, rows: Sequence[int]) -> list[Any]:
        """Return the micro-batches into which a training step splits these rows."""
        return list(self.setup.batches(rows))


def open_audit(config: TrainConfig, num_canaries: int) -> Audited:
    """Prepare the run of ``config`` and add ``num_canaries`` canaries to its records.

    The sampling rate is the batch size divided by the number of units, canaries included. If the
    run caches the outputs of frozen blocks, the outputs of the canaries are cached too.

    Raises:
        ValueError: if the run can't be made, has no privacy guarantee, or needs several processes.
    """
    _require_auditable(config)
    seed = config.seed if config.seed is not None else derive_seed(None, "audit")
    setup = preparation.prepare(config, seed)
    rows, first = list(setup.rows), len(setup.rows)
    random = np.random.default_rng(derive_seed(seed, "canaries"))
    rows += _canaries(setup, num_canaries, random)
    unit_rows = [*setup.unit_rows, *([first + i] for i in range(num_canaries))]
    mechanism, delta = preparation.make_mechanism(config, len(unit_rows))
    scales = preconditioning.snapshot_tensors(setup.model, None)
    return Audited(
        setup=replace(
            setup,
            rows=rows,
            unit_rows=unit_rows,
            mechanism=mechanism,
            delta=delta,
            prefix=setup.prefix.including(rows[first:]),
        ),
        canaries=tuple(range(first, first + num_canaries)),
        initial={name: p.detach().clone() for name, p in setup.trained.items()},
        scales={name: scale.clone() for name, scale in scales.items()},
        sample_rate=config.batch_size / len(unit_rows),
        noise_multiplier=config.noise_multiplier or mechanism.noise_multiplier,
        max_grad_norm=config.max_grad_norm,
        delta=delta,
        seed=derive_seed(seed, "coins"),
    )


def _require_auditable(config: TrainConfig) -> None:
    for name in ("non_private", "noise_free", "diagnostic"):
        if getattr(config, name):
            raise ValueError(
                f"{name} must be False for an audit, got True: an audit tests the privacy claim "
                "of a run, and this run has none"
            )
    several = ""
    if config.shard:
        several = "shard must be False for an audit, got True"
    elif os.environ.get("WORLD_SIZE", "1") != "1":
        several = "an audit must be started as one process, not by torchrun (WORLD_SIZE is set)"
    if several:
        raise ValueError(
            f"{several}: only one process can compute the canaries' gradients in a training step; "
            "audit the same configuration in one process, which computes the same clipped sums"
        )


def _canaries(setup: Setup, count: int, random: np.random.Generator) -> list[dict[str, Any]]:
    """Return rows of random tokens and random labels, in the form of the longest record.

    All canaries of a run have the same number of tokens.
    """
    form = max(setup.rows, key=lambda row: len(row["input_ids"]))
    special = set(setup.tokenizer.all_special_ids)
    known = np.array([i for i in range(len(setup.tokenizer)) if i not in special])
    return [_canary(setup, form, known, special, random) for _ in range(count)]


def _canary(
    setup: Setup,
    form: Mapping[str, Any],
    known: np.ndarray,
    special: Container[int],
    random: np.random.Generator,
) -> dict[str, Any]:
    """Return one row with random tokens of ``known`` in place of those that are not special."""
    ids = [i if i in special else int(random.choice(known)) for i in form["input_ids"]]
    labels = form["labels"]
    if isinstance(labels, Sequence):
        labels = [
            IGNORE if label == IGNORE else token for label, token in zip(labels, ids, strict=True)
        ]
    elif setup.task.kind == "classification":
        labels = int(random.integers(setup.task.num_labels))
    else:
        labels = float(random.uniform(*_range_of_scores(setup)))
    return {**form, "input_ids": ids, "labels": labels}


def _range_of_scores(setup: Setup) -> tuple[float, float]:
    scores = [row["labels"] for row in setup.rows]
    return min(scores), max(scores)


class Observer:
    """Observer of a training step, which takes the place of the checks of the step.

    The methods are those of :class:`lowrank_dp.train.checks.StepChecks`, in the order of a step.
    Here they do nothing; the designs override them.
    """

    def sampled(self, rows: Sequence[int], sampler: Any) -> None:
        """Receive the rows of the sample, and the generator of the samples."""

    def clipped(self, sums: Sums, norms: Tensor, clip: Clip, step: int) -> None:
        """Receive the clipped sums and the step's own clipping function, before the noise."""

    def noised(self, clean: Sums, noisy: Sums, noise: Any, step: int) -> None:
        """Receive the sums before and after the noise is added."""

    def assigned(self, noisy: Sums, step: int) -> None:
        """Receive the noisy sums, when the optimizer's gradients are in ``.grad``."""


def take_steps(
    audited: Audited,
    observer_of: Callable[[Setup, State], Observer],
    run: int,
    *,
    units: Sequence[Sequence[int]] | None = None,
) -> None:
    """Take all steps of one run with :func:`lowrank_dp.train.take_step`, from the initial weights.

    Args:
        audited: the run.
        observer_of: function that makes the observer from the setup and the initial state.
        run: number of the run. For a run with a seed, this number selects the random numbers.
        units: rows of each unit; None takes all records and all canaries.
    """
    setup = audited.setup
    config = setup.config
    if config.seed is not None:
        config = replace(config, seed=derive_seed(config.seed, f"audited run {run}") >> 1)
    preconditioning.load_snapshot_tensors(setup.model, None, audited.scales)
    with torch.no_grad():
        for name, p in setup.trained.items():
            p.copy_(audited.initial[name])
            p.grad = None
    setup = replace(
        setup,
        optimizer=make_optimizer(setup.config, setup.model, setup.trained),
        unit_rows=setup.unit_rows if units is None else [list(rows) for rows in units],
    )
    state = first_state(config, new_stream(config, 0))
    with torch.random.fork_rng([config.device] if config.device.startswith("cuda") else []):
        state.checks = cast(Any, observer_of(setup, state))
        for _ in range(config.steps):
            training.take_step(setup, state)
            setup.optimizer.zero_grad()


def released(
    audited: Audited, noisy: Sums, plain: Callable[[Tensor], bool]
) -> tuple[dict[str, Tensor], float]:
    """Return the released sum of each tensor in a step, and the largest deviation from ``noisy``.

    For a tensor that is not restored, the release should equal the optimizer's ``.grad`` times the
    batch size. If the two differ by more than rounding, ``.grad`` times the batch size counts as
    the release; otherwise the noisy sum does. The deviation is relative to the size of an entry of
    the noisy sum and its noise.
    """
    noise_std = audited.noise_multiplier * audited.max_grad_norm
    found, most = dict(noisy), 0.0
    for name, total in noisy.items():
        grad = audited.setup.trained[name].grad
        if grad is None or not plain(total):
            continue
        through = grad.to(total.dtype) * audited.setup.config.batch_size
        deviation = float(((through - total).abs() / (total.abs() + noise_std)).max())
        most = max(most, deviation)
        if deviation > DEVIATION:
            found[name] = through
    return found, most
