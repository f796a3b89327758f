"""Claim: LoRA trains like noisy full fine-tuning (arXiv 2409.17538).

Four arms start from the same weights, train on the same batches, and are compared with noiseless
full fine-tuning: LoRA with A and B trained, LoRA with A frozen, and full fine-tuning whose gradient
has fresh noise in every step, either the exact projection noise (a new A) or Gaussian noise of the
same variance. The arms' first steps agree in mean and variance. Later, fresh noise averages out;
the noise of a frozen A is the same in each step and does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_dp import _validate, lora
from lowrank_dp._terminal import progress
from lowrank_dp.data import encode, load_task, micro_batches
from lowrank_dp.experiments.gradients import GradientConfig
from lowrank_dp.experiments.intervals import mean_and_interval
from lowrank_dp.mechanism import NON_PRIVATE
from lowrank_dp.models import default_model, describe, load_model, matrix_parameters
from lowrank_dp.models.heads import head_modules, without_adapter

CAPTION = (
    "Plain SGD from one start on the same batches, measured; every curve is against noiseless full "
    "fine-tuning, over seeds with 95% intervals. (a, b) Distance between the adapted layers' "
    "effective weights, W + BA for LoRA, relative to how far full fine-tuning has moved (geometric "
    "mean), at the smallest and largest rank; dotted, the expected distance after one step, "
    "sqrt((n+1)/r) by the exact law. (c) Absolute difference of the loss on the same batch. (d) "
    "The last distance against rank. Noise drawn anew each step averages out; the projection by a "
    "frozen A is the same each step and does not, so LoRA is not full fine-tuning with independent "
    "Gaussian noise (2409.17538) beyond its first step. Where the two LoRA curves coincide, A has "
    "hardly moved. NON-PRIVATE: nothing is clipped."
)

ARMS = ("lora", "lora-frozen-a", "fresh-a", "gaussian")


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


SMALL = Config(
    gradients=GradientConfig(max_length=24),
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
    arms: tuple[str, ...]
    one_step_distance: np.ndarray  # (ranks,) expected relative distance after one step
    reference_loss: np.ndarray  # (seeds, T) loss on each step's batch, before the step
    reference_moved: np.ndarray  # (seeds, T + 1) |W - W_0| over the adapted layers
    loss: np.ndarray  # (arms, ranks, seeds, T)
    distance: np.ndarray  # (arms, ranks, seeds, T + 1) |W - W_full|, absolute

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
        arms=ARMS,
        one_step_distance=np.stack([run.one_step_distance for run in runs]).mean(axis=0),
        reference_loss=np.stack([run.reference_loss for run in runs]),
        reference_moved=np.stack([run.reference_moved for run in runs]),
        loss=np.stack([run.loss for run in runs], axis=2),
        distance=np.stack([run.distance for run in runs], axis=2),
    )


@dataclass(frozen=True)
class _SeedRun:
    """All arms of one seed; arrays as in :class:`Result`, without the axis of the seeds."""

    model: str
    layers: list[str]
    one_step_distance: np.ndarray
    reference_loss: np.ndarray
    reference_moved: np.ndarray
    loss: np.ndarray
    distance: np.ndarray


def _run_seed(config: Config, task: Any, seed: int) -> _SeedRun:
    full, tokenizer = _load(config, task, "full", seed)
    batches = _batches(task, tokenizer, config, seed)
    adapters = [_load(config, task, "lora", seed, rank)[0] for rank in config.ranks]
    layers = _adapted(adapters[0])
    _train_only(full, layers)
    path = [_effective(full, layers)]  # the weights of full fine-tuning, before and after each step
    reference_loss, noise_to_gradient = np.zeros(config.num_steps), 0.0
    with _restored(full):
        for step, value in enumerate(_sgd(full, batches, config.learning_rate)):
            if step == 0:
                noise_to_gradient = _noise_to_gradient(full, layers)
            reference_loss[step] = value
            path.append(_effective(full, layers))

    shape = len(ARMS), len(config.ranks)
    loss = np.zeros((*shape, config.num_steps))
    distance = np.zeros((*shape, config.num_steps + 1))
    for r, rank in enumerate(config.ranks):
        for a, arm in enumerate(ARMS):
            model = adapters[r] if arm.startswith("lora") else full
            generator = torch.Generator(config.gradients.device).manual_seed(
                1_000_003 * seed + 101 * rank + a
            )
            with _restored(model), _frozen_a(model, arm == "lora-frozen-a"):
                steps = _sgd(model, batches, config.learning_rate, layers, arm, rank, generator)
                for step, value in enumerate(steps):
                    loss[a, r, step] = value
                    distance[a, r, step + 1] = _gap(_effective(model, layers), path[step + 1])
    return _SeedRun(
        model=describe(full),
        layers=layers,
        one_step_distance=np.sqrt(noise_to_gradient / np.array(config.ranks)),
        reference_loss=reference_loss,
        reference_moved=np.array([_gap(weights, path[0]) for weights in path]),
        loss=loss,
        distance=distance,
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
    return numbers


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


def _sgd(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    learning_rate: float,
    layers: list[str] | None = None,
    arm: str = "",
    rank: int = 1,
    generator: torch.Generator | None = None,
) -> Iterator[float]:
    """Take one plain SGD step per batch, and yield the loss before the step.

    ``arm`` selects the noise that is added to the gradient of ``layers``: "fresh-a", "gaussian",
    or none.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    noisy = (
        [model.get_parameter(f"{name}.weight") for name in layers or ()]
        if arm in ("fresh-a", "gaussian")
        else []
    )
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        with torch.no_grad():
            for p in noisy:
                gradient: Any = p.grad
                p.grad = (
                    lora.project(gradient, rank, generator=generator)
                    if arm == "fresh-a"
                    else gradient + lora.matched_noise(gradient, rank, generator=generator)
                )
            for p in trained:
                p.sub_(p.grad, alpha=learning_rate)  # type: ignore[arg-type]
        if not bool(loss.isfinite()):
            raise ValueError(
                f"learning_rate must be small enough to train, got {learning_rate} "
                f"and a loss of {loss.item()} ({arm or 'full'}, rank {rank})"
            )
        yield loss.item()


def _adapted(model: nn.Module) -> list[str]:
    """Return the names of the layers with a LoRA pair, as in the model without LoRA."""
    modules = without_adapter(model).named_modules()
    return [name for name, module in modules if hasattr(module, "get_delta_weight")]


@torch.no_grad()
def _effective(model: nn.Module, layers: list[str]) -> Tensor:
    """Return the adapted layers' weights, W + BA for LoRA, as one vector."""

    def weight(name: str) -> Tensor:
        module = without_adapter(model).get_submodule(name)
        if hasattr(module, "get_delta_weight"):
            return module.base_layer.weight + module.get_delta_weight("default")
        return module.weight

    return torch.cat([weight(name).flatten() for name in layers])


def _gap(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm((a - b).double()))


def _noise_to_gradient(model: nn.Module, layers: list[str]) -> float:
    """Return E|G A^T A - G|^2 / |G|^2 over all layers at rank 1 (n + 1 if all have width n)."""
    gradients: list[Any] = [model.get_parameter(f"{name}.weight").grad for name in layers]
    squares = [float(g.square().sum()) for g in gradients]
    return sum(g.shape[1] * s + s for g, s in zip(gradients, squares, strict=True)) / sum(squares)


def _train_only(model: nn.Module, layers: list[str]) -> None:
    """Train the parameters that LoRA trains: the adapted weights, and a head if there is one."""
    heads = {id(p) for module in head_modules(model).values() for p in module.parameters()}
    wanted = {f"{name}.weight" for name in layers}
    if wanted - set(matrix_parameters(model)):
        raise ValueError("model must train every adapted layer in full fine-tuning too")
    for name, p in model.named_parameters():
        p.requires_grad_(name in wanted or id(p) in heads)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore the trained parameters after the block."""
    kept = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


@contextmanager
def _frozen_a(model: nn.Module, freeze: bool) -> Iterator[None]:
    """Freeze A inside the block if ``freeze``."""
    a = [p for name, p in model.named_parameters() if "lora_A" in name] if freeze else []
    for p in a:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in a:
            p.requires_grad_(True)
