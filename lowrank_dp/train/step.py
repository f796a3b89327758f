"""One step of DP-SGD: sample, clip, add noise, restore, update."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lowrank_dp.data import micro_batches
from lowrank_dp.grads import Batch
from lowrank_dp.grads.clipping import PaddingBatch, clipped_sum_over
from lowrank_dp.restore import oracle_values, restore_gradients, restore_with_report
from lowrank_dp.rng import Generator, derive_seed, uniform
from lowrank_dp.train import guards, processes
from lowrank_dp.train.checks import StepChecks
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.setup import Setup
from lowrank_dp.train.state import State


def take_step(setup: Setup, state: State) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """One step of DP training; ``(clean, noisy)`` sums, of which the first is NON-PRIVATE.

    The optimizer's gradients are left in ``.grad``. With several processes, ``clean`` has a meaning
    on the first only; of a sharded model each has the sums that it owns.
    """
    config, mechanism, layout = setup.config, setup.mechanism, setup.layout
    started = _clock(config)
    setup.model.train(config.dropout)
    bound = float("inf") if config.non_private else mechanism.max_grad_norm
    if config.dropout and processes.rank() > 0:  # snapshots hold the first process's generator only
        torch.manual_seed(
            derive_seed(setup.seed, f"dropout {state.stream} {state.step} {processes.rank()}")
        )
    with guards.diverging(state.step):
        sums, norms = _clipped(setup, _sample(setup, state.sampler, state.checks), bound)
    if state.checks:
        state.checks.clipped(sums, norms)
        if rows := state.checks.rows_to_compare(state.step):
            state.checks.row_by_row(
                next(_batches(setup, rows)),
                lambda batch, bound: _clipped(setup, iter([batch]), bound)[0],
            )
    guards.check_covered(setup.model, setup.optimizer, sums)
    clean, noisy = layout.noised(
        sums, None if config.non_private else (lambda sums: mechanism.add_noise(sums, state.noise))
    )
    if state.checks:
        state.checks.noised(clean, noisy, state.noise, state.step)

    restoring = _clock(config)
    gradient = _restored(setup, state, noisy, clean)  # post-processing of noisy, but for an oracle
    restored = _clock(config)

    layout.assign(
        setup.trained, {name: total / config.batch_size for name, total in gradient.items()}
    )
    if state.checks:
        state.checks.assigned(noisy, state.step)
    for group in setup.optimizer.param_groups:
        group["lr"] = setup.learning_rate(state.step)
    setup.optimizer.step()
    state.step += 1
    state.seconds += _clock(config) - started
    state.restore_seconds += restored - restoring
    return clean, noisy


def _clipped(
    setup: Setup, batches: Iterator[Batch | PaddingBatch], bound: float
) -> tuple[dict[str, Tensor], Tensor]:
    """This process's clipped sums, and its rows' norms before."""
    config = setup.config
    return clipped_sum_over(
        setup.model,
        batches,
        bound,
        autocast_dtype=torch.bfloat16 if config.precision == "bf16" else None,
        backend="compiled" if config.compile else "bookkeeping",
        padding=config.padding,
        check_rows=False,
        reduce=setup.layout.reduce,
    )  # prepare has checked public rows


def _batches(setup: Setup, chosen: Sequence[int]) -> Iterator[Batch]:
    """Micro-batches of some rows, on the device."""
    rows = [setup.rows[row] for row in chosen]
    for _, batch in micro_batches(
        rows, setup.config.micro_batch_size, setup.tokenizer.pad_token_id, length=setup.pad_to
    ):
        yield {key: value.to(setup.config.device) for key, value in batch.items()}


def _sample(
    setup: Setup, generator: Generator, checks: StepChecks | None = None
) -> Iterator[Batch | PaddingBatch]:
    """Micro-batches of this process's share of one Poisson sample.

    Where processes share the model each has as many as the first, whose share is the largest.
    """
    # the first draws for all: what comes from the operating system can't be drawn alike twice
    chosen, _ = processes.broadcast_from_rank0(
        _draw(setup, generator) if processes.rank() == 0 else None
    )
    if checks:
        checks.sampled(chosen, generator)
    world, size = processes.world_size(), setup.config.micro_batch_size
    mine = chosen[processes.rank() :: world]
    yield from _batches(setup, mine)
    missing = math.ceil(len(chosen[::world]) / size) - math.ceil(len(mine) / size)  # 0 or 1
    if setup.layout.collective and missing:
        yield from map(PaddingBatch, _batches(setup, chosen[:1]))


def _draw(setup: Setup, generator: Generator) -> list[int]:
    """Rows of one Poisson sample of units; a unit of several rows takes part with one."""
    taken = setup.mechanism.sample(len(setup.unit_rows), generator)
    rows = [setup.unit_rows[unit] for unit in taken.tolist()]
    if setup.config.unit == "group":
        picks = uniform(len(rows), generator).tolist()
        return [unit[int(pick * len(unit))] for unit, pick in zip(rows, picks, strict=True)]
    return [row for unit in rows for row in unit]


def _restored(
    setup: Setup, state: State, noisy: Mapping[str, Tensor], clean: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The gradient sum that the optimizer gets: from ``noisy`` alone, except with an oracle."""
    config, noise_std = setup.config, setup.mechanism.noise_std
    start = config.low_pass
    if start is not None and noisy:
        state.low_passes = {
            name: state.low_passes.get(name, start).update(total, noise_std)
            for name, total in noisy.items()
        }
        noisy = {name: low_pass.mean for name, low_pass in state.low_passes.items()}
        noise_std = next(iter(state.low_passes.values())).noise_std
    if config.scheme == "none":
        return noisy
    if config.scheme == "oracle":
        clean = setup.layout.known(clean)
        return setup.layout.restored(
            lambda some: {
                name: _oracle(total, clean[name], noise_std) for name, total in some.items()
            },
            noisy,
        )
    return setup.layout.restored(
        lambda some: restore_gradients(some, noise_std, config.scheme, **config.restoration)[0],
        noisy,
    )


def _oracle(noisy: Tensor, clean: Tensor, noise_std: float) -> Tensor:
    """NON-PRIVATE."""
    if noisy.ndim != 2:
        return noisy
    return restore_with_report(noisy, noise_std, "oracle", values=oracle_values(noisy, clean))[0]


def _clock(config: TrainConfig) -> float:
    """Wall-clock seconds, once the device has done what it was given."""
    if config.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
