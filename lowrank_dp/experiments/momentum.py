"""Restoring the running mean of noisy gradients lifts the signal over the bulk edge.

Real DP-SGD steps on a cold model; at each, the noisy gradient and its bias-corrected running means
are compared, as they are and restored, with the current clean gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_dp import _validate, artifacts
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import GradientConfig, Source, add_noise, prepare
from lowrank_dp.experiments.intervals import with_interval
from lowrank_dp.mechanism import GaussianMechanism
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
    """A short run of DP-SGD with Poisson sampling at an expected batch of ``batch_size``."""

    gradients: GradientConfig = field(default_factory=lambda: GradientConfig(warm_loss=None))
    steps: int = 13
    batch_size: int = 1024
    noise_multiplier: float = 0.7
    betas: tuple[float, ...] = (0.0, 0.5, 0.7, 0.9)
    learning_rate: float = 1e-4
    seeds: int = 3


# to try in a minute, on generated text with a model that is always at hand
SMALL = Config(
    GradientConfig(model="tiny", task="generated", warm_loss=None), steps=7, batch_size=512, seeds=2
)


@dataclass(frozen=True)
class Result:
    """``noisy`` and ``restored`` are (seeds, steps, betas): alignment, mean over layers."""

    config: Config
    provenance: dict[str, Any]
    privacy: str
    statement: str  # what the noisy gradients alone would satisfy, with a secret seed
    description: str
    loss: float
    noisy: np.ndarray
    restored: np.ndarray
    consecutive: np.ndarray  # (seeds, steps - 1): cosine of consecutive clean gradients


def run(config: Config, source: Source | None = None) -> Result:
    """Take the steps, seed by seed, each from the same model, which ends as it began."""
    _validate.integer("seeds", config.seeds, low=2)
    shape = (config.seeds, config.steps, len(config.betas))
    noisy_cosine, restored_cosine = np.zeros(shape), np.zeros(shape)
    consecutive = np.zeros((config.seeds, config.steps - 1))
    source = source or prepare(config.gradients)
    start = {name: p.detach().clone() for name, p in source.model.named_parameters()}
    rate = min(1.0, config.batch_size / len(source.rows))
    mechanism = GaussianMechanism(config.noise_multiplier, config.gradients.max_grad_norm, rate)
    cells = [(seed, step) for seed in range(config.seeds) for step in range(config.steps)]
    for seed, step in progress(cells, "DP-SGD steps"):
        if step == 0:
            generator = torch.Generator().manual_seed(config.gradients.seed + 1 + seed)
            _reset(source, start)
            trained = {name: source.model.get_parameter(name) for name in source.matrices}
            optimizer = torch.optim.Adam(trained.values(), lr=config.learning_rate)
            means = {
                beta: {name: exponential_average(beta) for name in trained} for beta in config.betas
            }
            last: dict[str, Tensor] = {}
        drawn = torch.rand(len(source.rows), generator=generator) < rate
        clean = source.clean_sum(drawn.nonzero().flatten().tolist())
        noisy = add_noise(clean, mechanism.noise_std, 1000 * (config.gradients.seed + seed) + step)
        for j, beta in enumerate(config.betas):
            states: dict[str, LowPassFilter] = {
                name: state.update(noisy[name], mechanism.noise_std)
                for name, state in means[beta].items()
            }
            means[beta] = states
            noisy_cosine[seed, step, j] = np.mean(
                [alignment(state.mean, clean[name]) for name, state in states.items()]
            )
            restored_cosine[seed, step, j] = np.mean(
                [
                    alignment(restore(state.mean, state.noise_std), clean[name])
                    for name, state in states.items()
                ]
            )
        if last:
            consecutive[seed, step - 1] = np.mean([alignment(clean[n], last[n]) for n in clean])
        last = clean
        for name, p in trained.items():
            p.grad = noisy[name] / config.batch_size
        optimizer.step()
        optimizer.zero_grad()
    _reset(source, start)
    return Result(
        config=config,
        provenance=artifacts.provenance(seed=config.gradients.seed, device=config.gradients.device),
        privacy=artifacts.NON_PRIVATE,
        statement=mechanism.statement(config.steps, 1e-5),
        description=source.description,
        loss=source.loss,
        noisy=noisy_cosine,
        restored=restored_cosine,
        consecutive=consecutive,
    )


def headline(result: Result) -> dict[str, str]:
    """Alignment at the last step, with 95% t-intervals over seeds, for each running mean."""
    return {
        f"alignment at step {result.config.steps}, momentum {beta:g}": f"{with_interval(result.noisy[:, -1, j])} noisy, "
        f"{with_interval(result.restored[:, -1, j])} restored"
        for j, beta in enumerate(result.config.betas)
    }


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """A running mean each, at the last step, with 95% t-intervals over seeds."""
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
def _reset(source: Source, start: dict[str, Tensor]) -> None:
    for name, p in source.model.named_parameters():
        p.copy_(start[name])
