"""One step of DP-SGD: sample, clip, add noise, restore, update."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lowrank_dp.grads import Batch
from lowrank_dp.grads.clipping import PaddingBatch, Reduce, clipped_sum_over
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.models.precision import autocast_dtype_of
from lowrank_dp.restore import SCHEMES
from lowrank_dp.rng import Generator, seed_globally, uniform
from lowrank_dp.train import guards, preconditioning, processes
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.implicit_noise import add_implicit_noise
from lowrank_dp.train.layout import Tensors
from lowrank_dp.train.optimizers import update
from lowrank_dp.train.setup import Setup
from lowrank_dp.train.state import State


def take_step(setup: Setup, state: State) -> tuple[Tensors, Tensors]:
    """Take one step, which moves the model, the optimizer and ``state``.

    1. Sample: every unit of privacy takes part independently with probability ``sample_rate``.
    2. Clip: the gradients of the sample's rows, each clipped to the norm C, are summed. With DiSK,
       the gradients are computed ahead of the weights.
    3. Noise: N(0, noise_std^2) is added to every entry. The noisy sum is the step's release.
    4. Restore: the noisy sums are averaged over steps, if the run has a filter, and the singular
       values of every matrix are restored.
    5. Update: the restored sum is divided by the expected batch size, and the optimizer takes a
       step along this mean gradient. A NON-PRIVATE run may first add LoRA's implicit noise.

    Steps 4 and 5 read releases only, and are post-processing; an oracle scheme, which reads the
    clean sum, makes the run NON-PRIVATE.

    Returns:
        The sums before and after the noise: ``(clean, noisy)``, by parameter name. The clean sum is
        NON-PRIVATE. For a replicated model, the clean sum is valid on rank 0 only; for a sharded
        model, each rank has the sums that it owns. The optimizer's gradients stay in ``.grad``.

    Raises:
        ValueError: if a check of privacy fails, or a gradient is not finite.
    """
    config, mechanism, layout, checks = setup.config, setup.mechanism, setup.layout, state.checks
    started = _seconds(config.device)
    setup.model.train(config.dropout)
    if config.dropout:
        words = f" step {state.step} process {processes.rank()}"
        seed_globally(state.mask_key + words.encode(), config.device)

    # 1. sample
    rows = _sample(setup.unit_rows, mechanism, state.sampler, one_each=config.unit == "group")
    if checks:
        checks.sampled(rows, state.sampler)

    # 2. clip
    clip = partial(_clipped_sum, setup.model, config, layout.reduce)
    max_norm = math.inf if config.non_private else mechanism.max_grad_norm
    with guards.diverging(state.step), state.look_ahead.applied(setup.trained):
        sums, norms = clip(_batches_of_rank(setup, rows), max_norm)
        guards.check_covered(setup.model, setup.optimizer, sums)
        if checks:
            checks.clipped(sums, norms, clip, state.step)

    # 3. noise
    clean, noisy = layout.add_noise(sums, mechanism if config.adds_noise else None, state.noise)
    if checks:
        checks.noised(clean, noisy, state.noise, state.step)

    # 4. restore
    restoring = _seconds(config.device)
    gradient = state.restorer.restore(
        noisy,
        mechanism.noise_std,
        clean=None if SCHEMES[config.scheme].private else layout.restored_clean(clean),
        distribute=layout.map_over_ranks,
    )
    restored = _seconds(config.device)

    # 5. update
    mean = {n: total / config.batch_size for n, total in gradient.items()}
    if setup.noisy_matrices:
        kind, matrices, at = config.implicit_noise, setup.noisy_matrices, state.step
        mean = add_implicit_noise(mean, matrices, kind, config.rank, seed=setup.seed, step=at)
    layout.assign(setup.trained, mean)
    if checks:
        checks.assigned(noisy, state.step)
    mean_noise_std = state.restorer.noise_std(mechanism.noise_std) / config.batch_size
    rate, skip = setup.learning_rate(state.step), config.skip_zeros
    with state.look_ahead.measured(setup.trained):
        update(setup.optimizer, rate, mean_noise_std, skip_zeros=skip)
    if state.noisy_moments is not None:
        preconditioning.refresh(
            setup.model, setup.optimizer, state.noisy_moments, noisy, mechanism.noise_std, config
        )

    state.step += 1
    state.seconds += _seconds(config.device) - started
    state.restore_seconds += restored - restoring
    return clean, noisy


def _sample(
    unit_rows: Sequence[Sequence[int]],
    mechanism: GaussianMechanism,
    generator: Generator,
    *,
    one_each: bool,
) -> list[int]:
    """Return the rows of one Poisson sample, on every rank.

    Rank 0 draws alone: without a seed, two ranks would not draw the same sample.
    """
    drawn = _draw(unit_rows, mechanism, generator, one_each) if processes.rank() == 0 else None
    rows, _ = processes.broadcast_from_rank0(drawn)
    return rows


def _draw(
    unit_rows: Sequence[Sequence[int]],
    mechanism: GaussianMechanism,
    generator: Generator,
    one_each: bool,
) -> list[int]:
    """Draw units, and return their rows: all rows of a unit, or a random one (``one_each``)."""
    units = [unit_rows[i] for i in mechanism.sample(len(unit_rows), generator).tolist()]
    if not one_each:
        return [row for unit in units for row in unit]
    picks = uniform(len(units), generator).tolist()
    return [unit[int(pick * len(unit))] for unit, pick in zip(units, picks, strict=True)]


def _clipped_sum(
    model: nn.Module,
    config: TrainConfig,
    reduce: Reduce | None,
    batches: Iterable[Batch | PaddingBatch],
    max_norm: float,
) -> tuple[Tensors, Tensor]:
    """Return this rank's sum of clipped gradients, and the norms of its rows before clipping."""
    return clipped_sum_over(
        model,
        batches,
        max_norm,
        autocast_dtype=autocast_dtype_of(config.precision),
        backend="compiled" if config.compile else "bookkeeping",
        padding=config.padding,
        check_rows=False,  # the model was examined on public rows before the first step
        reduce=reduce,
    )


def _batches_of_rank(setup: Setup, rows: Sequence[int]) -> Iterator[Batch | PaddingBatch]:
    """Yield micro-batches of the rows that this rank clips: every ``world_size``-th one.

    Every rank of a sharded model must run as many micro-batches as rank 0, whose share is the
    largest. A rank that has one less gets a micro-batch that adds nothing.
    """
    rank, world, size = processes.rank(), processes.world_size(), setup.config.micro_batch_size
    mine = rows[rank::world]
    yield from setup.batches(mine)
    if setup.layout.collective and math.ceil(len(mine) / size) < math.ceil(
        len(rows[::world]) / size
    ):
        yield from map(PaddingBatch, setup.batches(rows[:1]))


def _seconds(device: str) -> float:
    """Return wall-clock seconds, once the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()
