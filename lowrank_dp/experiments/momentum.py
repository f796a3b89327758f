"""Claim: restoring the running mean of noisy gradients lifts the signal over the bulk edge.

The experiment takes DP-SGD steps on a cold model, one that was not trained further. At each step,
the noisy gradient and its bias-corrected running means are compared with the current clean
gradient, before and after restoration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import GradientConfig, GradientSource, add_noise, prepare
from lowrank_dp.experiments.intervals import with_interval
from lowrank_dp.mechanism import NON_PRIVATE, GaussianMechanism
from lowrank_dp.restore import LowPassFilter, exponential_average, restore
from lowrank_dp.spectrum import alignment

CAPTION = (
    "Cosine with the current clean gradient over steps of DP-SGD (Adam on the plain noisy "
    "gradient), mean over layers: the noisy gradient and its bias-corrected running means "
    "(dashed), and each restored by the optimal shrinker at its own known noise level (solid); "
    "bands are ranges over seeds. NON-PRIVATE: compared with clean gradients."
)


@dataclass(frozen=True)
class Config:
    """A short run of DP-SGD with Poisson sampling.

    Attributes:
        gradients: model, task and clipping; cold by default.
        steps: number of steps.
        batch_size: expected batch size.
        noise_multiplier: sigma, relative to ``gradients.max_grad_norm``.
        betas: decay rates of the running means, in [0, 1); 0 is the current gradient alone.
        learning_rate: learning rate of Adam, which reads the plain noisy gradient.
        seeds: number of random seeds, 2 or more.
    """

    gradients: GradientConfig = field(default_factory=lambda: GradientConfig(warm_loss=None))
    steps: int = 13
    batch_size: int = 1024
    noise_multiplier: float = 0.7
    betas: tuple[float, ...] = (0.0, 0.5, 0.7, 0.9)
    learning_rate: float = 1e-4
    seeds: int = 3


# a trial of one minute on generated text, with a model that needs no download
SMALL = Config(
    GradientConfig(model="tiny", task="generated", warm_loss=None), steps=7, batch_size=512, seeds=2
)


@dataclass(frozen=True)
class Result:
    """Alignment, mean over layers: ``noisy`` and ``restored`` are (seeds, steps, betas)."""

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    statement: str  # privacy of the noisy gradients alone, if the seed were secret
    description: str
    loss: float
    noisy: np.ndarray
    restored: np.ndarray
    consecutive: np.ndarray  # (seeds, steps - 1): cosine of consecutive clean gradients


def run(config: Config, source: GradientSource | None = None) -> Result:
    """Take the steps of every seed from the same weights, which are restored at the end.

    A missing ``source`` is prepared. Raises ValueError for fewer than 2 seeds.
    """
    _validate.integer("seeds", config.seeds, low=2)
    source = source or prepare(config.gradients)
    start = {name: p.detach().clone() for name, p in source.model.named_parameters()}
    rate = min(1.0, config.batch_size / len(source.rows))
    mechanism = GaussianMechanism(config.noise_multiplier, config.gradients.max_grad_norm, rate)
    shape = (config.seeds, config.steps, len(config.betas))
    noisy, restored = np.zeros(shape), np.zeros(shape)
    consecutive = np.zeros((config.seeds, config.steps - 1))
    for seed in range(config.seeds):
        _reset(source, start)
        last: dict[str, Tensor] = {}
        for step, clean, means in _steps(config, source, mechanism, seed):
            for j, states in enumerate(means):
                noisy[seed, step, j] = np.mean(
                    [alignment(state.mean, clean[name]) for name, state in states.items()]
                )
                restored[seed, step, j] = np.mean(
                    [
                        alignment(restore(state.mean, state.noise_std), clean[name])
                        for name, state in states.items()
                    ]
                )
            if last:
                consecutive[seed, step - 1] = np.mean([alignment(clean[n], last[n]) for n in clean])
            last = clean
    _reset(source, start)
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        statement=mechanism.statement(config.steps, 1e-5),
        description=source.description,
        loss=source.loss,
        noisy=noisy,
        restored=restored,
        consecutive=consecutive,
    )


def _steps(
    config: Config, source: GradientSource, mechanism: GaussianMechanism, seed: int
) -> Iterator[tuple[int, dict[str, Tensor], list[dict[str, LowPassFilter]]]]:
    """Take DP-SGD steps; yield the number, the clean sum, and the running means for each beta."""
    generator = torch.Generator().manual_seed(config.gradients.seed + 1 + seed)
    trained = {name: source.model.get_parameter(name) for name in source.matrices}
    optimizer = torch.optim.Adam(trained.values(), lr=config.learning_rate)
    means = [{name: exponential_average(beta) for name in trained} for beta in config.betas]
    for step in progress(range(config.steps), f"DP-SGD steps, seed {seed}"):
        drawn = torch.rand(len(source.rows), generator=generator) < mechanism.sample_rate
        clean = source.clean_sum(drawn.nonzero().flatten().tolist())
        noisy = add_noise(clean, mechanism.noise_std, 1000 * (config.gradients.seed + seed) + step)
        means = [
            {name: state.update(noisy[name], mechanism.noise_std) for name, state in states.items()}
            for states in means
        ]
        yield step, clean, means
        for name, p in trained.items():
            p.grad = noisy[name] / config.batch_size
        optimizer.step()
        optimizer.zero_grad()


def headline(result: Result) -> dict[str, str]:
    """Summarise: alignment of each running mean at the last step, with 95% t-intervals."""
    return {
        f"alignment at step {result.config.steps}, momentum {beta:g}": (
            f"{with_interval(result.noisy[:, -1, j])} noisy, "
            f"{with_interval(result.restored[:, -1, j])} restored"
        )
        for j, beta in enumerate(result.config.betas)
    }


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate each running mean at the last step, with 95% t-intervals over seeds."""
    columns = [
        "beta (0: single step)",
        f"noisy, step {result.config.steps}",
        f"restored, step {result.config.steps}",
    ]
    return columns, [
        [
            f"{beta:g}",
            with_interval(result.noisy[:, -1, j]),
            with_interval(result.restored[:, -1, j]),
        ]
        for j, beta in enumerate(result.config.betas)
    ]


@torch.no_grad()
def _reset(source: GradientSource, start: dict[str, Tensor]) -> None:
    for name, p in source.model.named_parameters():
        p.copy_(start[name])
