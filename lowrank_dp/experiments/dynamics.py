"""Claim: LoRA trains like noisy full fine-tuning (arXiv 2409.17538).

Four arms start from the same weights, train on the same batches, and are compared with noiseless
full fine-tuning: LoRA with A and B trained, LoRA with A frozen, and full fine-tuning whose gradient
has fresh noise in every step, either the exact projection noise (a new A) or Gaussian noise of the
same variance. The arms' first steps agree in mean and variance. Later they differ, for two exact
reasons:

- Rank. With A frozen, plain SGD moves B by -lr G_t A^T in step t, so that the update after any
  number of steps is -lr (sum_t G_t A^T) A: its rows lie in the row space of A, and its rank is at
  most r. A fresh A adds a matrix of rank r per step in a new row space, so that the rank grows to
  T r or to full rank; Gaussian noise has full rank in the first step.
- Size. Suppose the gradients G_1, ..., G_T of the arms were those of full fine-tuning. Then the
  frozen A's distance to full fine-tuning is lr |(sum_t G_t)(A^T A - I)|, and the fresh noise's is
  lr |sum_t G_t (A_t^T A_t - I)|. Since E |G (A^T A - I)|^2 = |G|^2 (n + 1) / r for each G of width
  n, the ratio of the root mean squares is |sum_t G_t| / sqrt(sum_t |G_t|^2) at every rank: 1 if the
  gradients are orthogonal to each other, sqrt(T) if they are equal (`expected_ratio`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_dp import _validate
from lowrank_dp._terminal import progress
from lowrank_dp.data import encode, load_task, micro_batches
from lowrank_dp.experiments.gradients import GradientConfig
from lowrank_dp.experiments.intervals import mean_and_interval
from lowrank_dp.experiments.noisy_sgd import (
    adapted_layers,
    distance_between,
    effective_weights,
    frozen_a,
    noise_to_gradient,
    numerical_rank,
    restored,
    sgd,
    train_only,
)
from lowrank_dp.mechanism import NON_PRIVATE
from lowrank_dp.models import default_model, describe, load_model

CAPTION = (
    "Plain SGD from one start on the same batches, measured; every curve is against noiseless full "
    "fine-tuning, over seeds with 95% intervals. (a, b) Distance between the adapted layers' "
    "effective weights, W + BA for LoRA, relative to how far full fine-tuning has moved (geometric "
    "mean), at the smallest and largest rank; dotted, the expected distance after one step, "
    "sqrt((n+1)/r) by the exact law. (c) Absolute difference of the loss on the same batch. (d) "
    "The last distance against rank. (e) Numerical rank of one layer's update at the smallest rank "
    "of A: singular values above a thousandth of the largest. With A frozen the rank never exceeds "
    "that of A; fresh noise reaches full rank, so LoRA is not full fine-tuning with independent "
    "Gaussian noise (2409.17538) beyond its first step. (f) Distance with A frozen over the "
    "distance with a fresh A each step, paired within the seed (geometric mean); dotted, the ratio "
    "that the exact law expects from the gradients of full fine-tuning. Noise drawn anew averages "
    "out only as far as the steps' gradients agree. Where the two LoRA curves coincide, A has "
    "hardly moved. NON-PRIVATE: nothing is clipped."
)

ARMS = ("lora", "lora-frozen-a", "fresh-a", "gaussian")
TOLERANCE = 1e-3  # tolerance of the numerical rank, relative to the largest singular value


@dataclass(frozen=True)
class Config:
    """A short run of plain SGD, the same for every arm.

    Attributes:
        gradients: model, task, max_length, device, and the first of ``num_seeds`` seeds; the
            other fields are not used.
        ranks: ranks of A. LoRA is scaled by 1, and A is drawn from N(0, 1/rank), so that LoRA's
            first step is the full gradient on average.
        num_blocks: number of adapted transformer blocks, counted from the last.
        num_seeds: number of random seeds (of head, A, noise and batches), 2 or more.
        num_steps: number of SGD steps.
        batch_size: examples per step.
        learning_rate: learning rate of SGD.
    """

    gradients: GradientConfig = field(default_factory=lambda: GradientConfig(max_length=64))
    ranks: tuple[int, ...] = (1, 4, 16, 64)
    num_blocks: int = 2
    num_seeds: int = 5
    num_steps: int = 60
    batch_size: int = 32
    learning_rate: float = 0.05


# trial of one minute on generated text
SMALL = Config(
    gradients=GradientConfig(task="generated", max_length=24),
    ranks=(1, 8, 64),
    num_blocks=1,
    num_seeds=3,
    num_steps=12,
    batch_size=16,
)


@dataclass(frozen=True)
class Result:
    """Losses (nats) and distances by arm, rank, seed and step; step 0 is the common start."""

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    layers: tuple[str, ...]
    shape: tuple[int, ...]  # of the first layer, whose update's rank is measured
    arms: tuple[str, ...]
    one_step_distance: np.ndarray  # (ranks,) expected relative distance after one step
    reference_loss: np.ndarray  # (seeds, T) loss on each step's batch, before the step
    reference_moved: np.ndarray  # (seeds, T + 1) |W - W_0| over the adapted layers
    reference_step: np.ndarray  # (seeds, T) |W_t - W_(t-1)|, the same layers
    loss: np.ndarray  # (arms, ranks, seeds, T)
    distance: np.ndarray  # (arms, ranks, seeds, T + 1) |W - W_full|, absolute
    update_rank: np.ndarray  # (arms, ranks, seeds, S) of W - W_0 in the first layer at `rank_steps`

    @property
    def distance_band(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Geometric mean over seeds of `relative_distance`, and the ends of its 95% t-interval."""
        mean, half = mean_and_interval(np.log(relative_distance(self)), axis=-2)
        return np.exp(mean), np.exp(mean - half), np.exp(mean + half)

    @property
    def loss_band(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean over seeds of `loss_difference`, and the ends of its 95% t-interval."""
        mean, half = mean_and_interval(loss_difference(self), axis=-2)
        return mean, mean - half, mean + half

    @property
    def ratio_band(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Geometric mean over seeds of `paired_ratio`, and both ends of its 95% t-interval."""
        mean, half = mean_and_interval(np.log(paired_ratio(self)), axis=-2)
        return np.exp(mean), np.exp(mean - half), np.exp(mean + half)


def run(config: Config) -> Result:
    """Train every arm from every seed; the result depends on the seeds alone.

    Raises ValueError for fewer than 2 seeds, too few examples for the steps, or a learning rate
    at which the loss is not finite.
    """
    _validate.integer("num_seeds", config.num_seeds, low=2)
    _validate.integer("num_steps", config.num_steps)
    _validate.positive("learning_rate", config.learning_rate)
    task = load_task(
        config.gradients.task,
        seed=config.gradients.seed,
        max_examples=4 * config.num_steps * config.batch_size,
    )
    seeds = [config.gradients.seed + i for i in range(config.num_seeds)]
    runs = [_run_seed(config, task, seed) for seed in progress(seeds, "training dynamics")]
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        description=f"{runs[0].model}; {task.name} from {task.source}; plain SGD, learning rate "
        f"{config.learning_rate:g}, batch {config.batch_size}",
        layers=tuple(runs[0].layers),
        shape=runs[0].shape,
        arms=ARMS,
        one_step_distance=np.stack([run.one_step_distance for run in runs]).mean(axis=0),
        reference_loss=np.stack([run.reference_loss for run in runs]),
        reference_moved=np.stack([run.reference_moved for run in runs]),
        reference_step=np.stack([run.reference_step for run in runs]),
        loss=np.stack([run.loss for run in runs], axis=2),
        distance=np.stack([run.distance for run in runs], axis=2),
        update_rank=np.stack([run.update_rank for run in runs], axis=2),
    )


def rank_steps(num_steps: int) -> list[int]:
    """Return the steps after which the update's rank is measured: powers of two, and the last."""
    powers = takewhile(lambda step: step < num_steps, (2**k for k in range(num_steps)))
    return [*powers, num_steps]


@dataclass(frozen=True)
class _SeedRun:
    """All arms of one seed; arrays as in :class:`Result`, without the axis of the seeds."""

    model: str
    layers: list[str]
    shape: tuple[int, ...]
    one_step_distance: np.ndarray
    reference_loss: np.ndarray
    reference_moved: np.ndarray
    reference_step: np.ndarray
    loss: np.ndarray
    distance: np.ndarray
    update_rank: np.ndarray


def _run_seed(config: Config, task: Any, seed: int) -> _SeedRun:
    full, tokenizer = _load(config, task, "full", seed)
    batches = _batches(task, tokenizer, config, seed)
    adapters = [_load(config, task, "lora", seed, rank)[0] for rank in config.ranks]
    layers = adapted_layers(adapters[0])
    train_only(full, layers)
    path = [effective_weights(full, layers)]  # full fine-tuning's weights before and after steps
    start = path[0]
    matrix = full.get_parameter(f"{layers[0]}.weight").shape
    measured = rank_steps(config.num_steps)
    reference_loss, excess = np.zeros(config.num_steps), 0.0
    with restored(full):
        for step, value in enumerate(sgd(full, batches, config.learning_rate)):
            if step == 0:
                excess = noise_to_gradient(full, layers)
            reference_loss[step] = value
            path.append(effective_weights(full, layers))

    shape = len(ARMS), len(config.ranks)
    loss = np.zeros((*shape, config.num_steps))
    distance = np.zeros((*shape, config.num_steps + 1))
    update_rank = np.zeros((*shape, len(measured)), dtype=np.int64)
    for r, rank in enumerate(config.ranks):
        for a, arm in enumerate(ARMS):
            model = adapters[r] if arm.startswith("lora") else full
            generator = torch.Generator(config.gradients.device).manual_seed(
                1_000_003 * seed + 101 * rank + a
            )
            with restored(model), frozen_a(model, arm == "lora-frozen-a"):
                steps = sgd(model, batches, config.learning_rate, layers, arm, rank, generator)
                for step, value in enumerate(steps):
                    loss[a, r, step] = value
                    weights = effective_weights(model, layers)
                    distance[a, r, step + 1] = distance_between(weights, path[step + 1])
                    if step + 1 in measured:
                        update = (weights - start)[: matrix.numel()].view(matrix)
                        update_rank[a, r, measured.index(step + 1)] = numerical_rank(
                            update, TOLERANCE
                        )
    return _SeedRun(
        model=describe(full),
        layers=layers,
        shape=tuple(matrix),
        one_step_distance=np.sqrt(excess / np.array(config.ranks)),
        reference_loss=reference_loss,
        reference_moved=np.array([distance_between(weights, start) for weights in path]),
        reference_step=np.array([distance_between(b, a) for a, b in pairwise(path)]),
        loss=loss,
        distance=distance,
        update_rank=update_rank,
    )


def _load(
    config: Config, task: Any, method: str, seed: int, rank: int = 1
) -> tuple[nn.Module, Any]:
    return load_model(
        config.gradients.model or default_model(),
        task=task,
        method=method,
        rank=rank,
        lora_init="gaussian",
        train_layers=config.num_blocks,
        device=config.gradients.device,
        seed=seed,
    )


def relative_distance(result: Result) -> np.ndarray:
    """Return |W - W_full| / |W_full - W_0| from step 1 on: (arms, ranks, seeds, T)."""
    return result.distance[..., 1:] / result.reference_moved[:, 1:]


def loss_difference(result: Result) -> np.ndarray:
    """Return |loss - full fine-tuning's loss| on the same batch: (arms, ranks, seeds, T)."""
    return np.abs(result.loss - result.reference_loss)


def paired_ratio(result: Result) -> np.ndarray:
    """Return distance with a frozen A / distance with a fresh A, by seed: (ranks, seeds, T)."""
    arms = result.arms
    frozen, fresh = (result.distance[arms.index(arm)] for arm in ("lora-frozen-a", "fresh-a"))
    ratio: np.ndarray = frozen[..., 1:] / fresh[..., 1:]
    return ratio


def expected_ratio(result: Result) -> np.ndarray:
    """Return |sum of gradients| / sqrt(sum of squared norms) of full fine-tuning: (seeds, T).

    If the arms had the gradients of full fine-tuning, this would be the exact ratio of the
    root-mean-square distances, at every rank (see the docstring of the module).
    """
    squares: np.ndarray = np.cumsum(result.reference_step**2, axis=1)
    return np.asarray(result.reference_moved[:, 1:] / np.sqrt(squares))


def headline(result: Result) -> dict[str, str]:
    """Summarise the result in a few numbers."""
    middle, low, high = result.distance_band
    numbers = {
        f"learning rate {result.config.learning_rate:g}, full fine-tuning's loss": (
            f"{result.reference_loss[:, 0].mean():.3f} to {result.reference_loss[:, -1].mean():.3f}"
        )
    }
    for r, rank in enumerate(result.config.ranks):
        numbers[f"distance to full, relative, rank {rank}"] = ", ".join(
            f"{arm} {middle[a, r, -1]:.2f} ({low[a, r, -1]:.2f} to {high[a, r, -1]:.2f})"
            for a, arm in enumerate(result.arms)
        )
    return numbers | _ratios(result) | _ranks(result)


def _ratios(result: Result) -> dict[str, str]:
    """Summarise the paired ratio at the last step: per rank, over all ranks, and expected."""
    last = paired_ratio(result)[..., -1]
    middle, low, high = (part[:, -1] for part in result.ratio_band)
    numbers = {
        f"frozen A's distance over fresh A's, paired, rank {rank}": (
            f"{middle[r]:.2f} ({low[r]:.2f} to {high[r]:.2f}); {(last[r] > 1).sum()} of "
            f"{last.shape[1]} seeds above 1"
        )
        for r, rank in enumerate(result.config.ranks)
    }
    mean, half = mean_and_interval(np.log(last).mean(axis=0))  # ranks of a seed share its batches
    expected = expected_ratio(result)[:, -1]
    return numbers | {
        "frozen A's distance over fresh A's, paired, all ranks": (
            f"{np.exp(mean):.2f} ({np.exp(mean - half):.2f} to {np.exp(mean + half):.2f}); "
            f"{(last > 1).sum()} of {last.size} pairs above 1"
        ),
        "the same ratio, expected from full fine-tuning's gradients": (
            f"{expected.mean():.2f} ({expected.min():.2f} to {expected.max():.2f} over seeds)"
        ),
    }


def _ranks(result: Result) -> dict[str, str]:
    """Summarise the rank of the first layer's update at the last step: the range over seeds."""
    last = result.update_rank[..., -1]
    return {
        f"rank of a {result.shape[0]} x {result.shape[1]} update, rank {rank}": ", ".join(
            f"{arm} {last[a, r].min()}"
            + ("" if np.ptp(last[a, r]) == 0 else f" to {last[a, r].max()}")
            for a, arm in enumerate(result.arms)
        )
        for r, rank in enumerate(result.config.ranks)
    }


def _batches(task: Any, tokenizer: Any, config: Config, seed: int) -> list[dict[str, Tensor]]:
    """Draw ``num_steps`` random batches of texts of similar length, in random order."""
    rows = encode(task.train, tokenizer, kind=task.kind, max_length=config.gradients.max_length)
    wanted = config.num_steps * config.batch_size
    if len(rows) < wanted:
        _validate.fail("num_steps * batch_size", f"at most the {len(rows)} examples", wanted)
    generator = torch.Generator().manual_seed(seed)
    chosen = [rows[i] for i in torch.randperm(len(rows), generator=generator)[:wanted].tolist()]
    batches = [
        batch
        for _, batch in micro_batches(
            chosen, config.batch_size, tokenizer.pad_token_id, device=config.gradients.device
        )
    ]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
