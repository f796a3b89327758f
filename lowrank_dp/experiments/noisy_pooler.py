"""Training of a real model's pooler with noise by each arm, and attack on the released weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_dp import _validate, lora
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import GradientSource
from lowrank_dp.experiments.intervals import auc_with_interval
from lowrank_dp.experiments.noisy_release import Projection
from lowrank_dp.experiments.noisy_trained import (
    ARMS,
    FULL,
    LORA,
    Adapter,
    Layer,
    attack_score,
    mapped,
    train,
)
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.models.heads import final_layer


@dataclass(frozen=True)
class TrainedConfig:
    """Steps, records and arms of the trained layer.

    Attributes:
        ranks: ranks of A, at most the smaller side of the pooler.
        epsilon: epsilon after all steps, at the experiment's delta.
        num_steps: number of SGD steps on all records.
        num_records: number of records beside the attacked record.
        num_trials: number of trials with the attacked record, and as many without. Each trial has
            its own record, A and noise.
        num_held_out: number of records on which the loss is measured.
        learning_rates: increasing learning rates. Each arm takes the rate with the smallest
            held-out loss.
        num_draws: number of draws of A and noise per learning rate.
    """

    ranks: tuple[int, ...] = (8, 64)
    epsilon: float = 8.0
    num_steps: int = 10
    num_records: int = 64
    num_trials: int = 100
    num_held_out: int = 256
    learning_rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)
    num_draws: int = 4


@dataclass(frozen=True)
class _Data:
    """Pooler before training, and features (N, n) and labels (N,) of three groups of records."""

    layer: Layer
    rest: tuple[Tensor, Tensor]
    records: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    clip: float


def measure(
    config: TrainedConfig, source: GradientSource, delta: float, generator: torch.Generator
) -> dict[str, Any]:
    """Train and attack every arm; return the fields of the experiment's result. NON-PRIVATE.

    Raises ValueError for a config that cannot be run, or a model without a pooler.
    """
    _check(config)
    data = _read(config, source, generator)
    for rank in config.ranks:
        _validate.integer("ranks", rank, high=min(data.layer.weight.shape))
    sigma = GaussianMechanism.calibrate(
        config.epsilon, delta, config.num_steps, 1.0
    ).noise_multiplier
    shape = len(ARMS), len(config.ranks)
    loss = np.zeros((*shape, len(config.learning_rates)))
    accuracy = np.zeros_like(loss)
    auc, rates = np.zeros((*shape, 3)), np.zeros(shape)
    noiseless = np.zeros((len(config.ranks), 3))
    for i, k in progress([*np.ndindex(shape)], "trained arms"):
        if ARMS[i] == FULL and k:  # the arm FULL has no rank
            for values in (loss, accuracy, auc, rates):
                values[i, k] = values[i, 0]
            continue
        rank = config.ranks[k]
        loss[i, k], accuracy[i, k] = _utility(ARMS[i], rank, config, data, sigma, generator)
        rates[i, k] = config.learning_rates[int(np.argmin(loss[i, k]))]
        auc[i, k] = _attack(ARMS[i], rank, config, data, sigma, rates[i, k], generator)
        if ARMS[i] == LORA:
            noiseless[k] = _attack(LORA, rank, config, data, 0.0, rates[i, k], generator)
    start, right = _evaluate(data, None, None)
    return {
        "arms": ARMS,
        "trained_shape": tuple(data.layer.weight.shape),
        "trained_clip": data.clip,
        "trained_multiplier": sigma,
        "start_loss": start,
        "start_accuracy": right,
        "trained_auc": auc,
        "noiseless_auc": noiseless,
        "loss": loss,
        "accuracy": accuracy,
        "learning_rate": rates,
    }


def _check(config: TrainedConfig) -> None:
    for name in ("num_steps", "num_records", "num_held_out", "num_draws"):
        _validate.integer(name, getattr(config, name))
    _validate.integer("num_trials", config.num_trials, low=2)
    _validate.positive("epsilon", config.epsilon)
    for name in ("ranks", "learning_rates"):
        if not getattr(config, name):
            _validate.fail(name, "at least one value", ())
    for rate in config.learning_rates:
        _validate.positive("learning_rates", rate)


@torch.no_grad()
def _read(config: TrainedConfig, source: GradientSource, generator: torch.Generator) -> _Data:
    """Return the pooler and its inputs; C is the median norm of the attacked records' gradients."""
    model, sizes = source.model, (config.num_records, 2 * config.num_trials, config.num_held_out)
    found = [m for name, m in model.named_modules() if name.endswith("pooler.dense")]
    if not found or not final_layer(model):
        raise ValueError("model must have a pooler under a linear head, such as a BERT classifier")
    pooler: Any = found[0]
    head: Any = model.get_submodule(final_layer(model))
    chosen = source.sample(sum(sizes), generator)
    seen: list[Tensor] = []
    handle = pooler.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    features = torch.zeros(len(chosen), pooler.in_features)
    labels = torch.zeros(len(chosen), dtype=torch.long)
    try:
        for part, batch in source.batches(chosen, source.config.micro_batch_size):
            model(**batch)
            features[part], labels[part] = seen.pop().float().cpu(), batch["labels"].cpu()
    finally:
        handle.remove()
    layer = Layer(*(p.detach().float().cpu() for p in (*pooler.parameters(), *head.parameters())))
    groups = list(zip(features.split(sizes), labels.split(sizes), strict=True))
    x, y = groups[1]
    _, delta, _ = layer.loss_and_delta(x @ layer.weight.T + layer.bias, y)
    clip = float((delta.norm(dim=1) * x.norm(dim=1)).median())
    return _Data(layer, groups[0], groups[1], groups[2], clip)


def _adapter(arm: str, rank: int, data: _Data, generator: torch.Generator) -> Adapter:
    n = data.layer.weight.shape[1]
    a = None if arm == FULL else Projection.of(lora.draw_a(rank, n, generator=generator))
    return Adapter.of(arm, a)


def _utility(
    arm: str,
    rank: int,
    config: TrainedConfig,
    data: _Data,
    sigma: float,
    generator: torch.Generator,
) -> tuple[list[float], list[float]]:
    """Return held-out loss and accuracy per learning rate, means over draws of A and noise."""
    losses, rights = [], []
    for rate in config.learning_rates:
        found = []
        for _ in range(config.num_draws):
            adapter = _adapter(arm, rank, data, generator)
            m = train(
                data.layer,
                adapter,
                *data.rest,
                torch.ones(1, config.num_records),
                torch.tensor([True]),
                noise_multiplier=sigma,
                clip=data.clip,
                learning_rate=rate,
                num_steps=config.num_steps,
                generator=generator,
            )
            found.append(_evaluate(data, adapter, m[0]))
        losses.append(float(np.mean([value for value, _ in found])))
        rights.append(float(np.mean([value for _, value in found])))
    return losses, rights


def _evaluate(data: _Data, adapter: Adapter | None, m: Tensor | None) -> tuple[float, float]:
    """Return held-out loss in nats and accuracy, before training or with M (m, k)."""
    x, y = data.held_out
    hidden = x @ data.layer.weight.T + data.layer.bias
    if adapter is not None and m is not None:
        hidden = hidden + mapped(adapter.outputs, x) @ m.T
    loss, _, right = data.layer.loss_and_delta(hidden, y)
    return float(loss.mean()), float(right.float().mean())


def _attack(
    arm: str,
    rank: int,
    config: TrainedConfig,
    data: _Data,
    sigma: float,
    rate: float,
    generator: torch.Generator,
) -> tuple[float, float, float]:
    """Return the AUC and its interval of the attack that knows A, all records and the training."""
    records, labels = data.records
    member = np.arange(len(records)) < config.num_trials
    scores = np.empty(len(records))
    for t in range(len(records)):
        weights = torch.ones(3, config.num_records + 1)  # the release, and two noise-free runs
        weights[1, -1], weights[0, -1] = 0.0, float(member[t])
        ends = train(
            data.layer,
            _adapter(arm, rank, data, generator),
            torch.cat([data.rest[0], records[t : t + 1]]),
            torch.cat([data.rest[1], labels[t : t + 1]]),
            weights,
            torch.tensor([True, False, False]),
            noise_multiplier=sigma,
            clip=data.clip,
            learning_rate=rate,
            num_steps=config.num_steps,
            generator=generator,
        ).double()
        scores[t] = float(attack_score(ends[:1], ends[1:2], ends[2:3])[0])
    return auc_with_interval(scores, member)
