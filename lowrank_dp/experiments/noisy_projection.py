"""Claim: with noise, a random projection of a gradient matrix amplifies privacy (arXiv 2601.21719).

Hu et al. name two mechanisms: "project, then add noise" and "add noise, then project". The
experiment compares both with plain DP at one epsilon; `lowrank_dp.experiments.noisy_release`
derives the sensitivities. Attacks measure what a release reveals about a record in a real layer,
and cosines measure the utility of the release. The same is measured for the weights of a layer that
was trained for several steps with a frozen, published A. Only the abstract of version 1 of the
paper and a summary were available.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from lowrank_dp import _validate, lora, theory
from lowrank_dp._terminal import progress
from lowrank_dp.experiments import noisy_pooler, noisy_release
from lowrank_dp.experiments.gradients import (
    GradientConfig,
    GradientSource,
    prepare,
    rows_of,
    spread_layers,
)
from lowrank_dp.experiments.intervals import auc_with_interval
from lowrank_dp.experiments.noisy_pooler import TrainedConfig
from lowrank_dp.experiments.noisy_release import MECHANISMS, PLAIN, Projection
from lowrank_dp.experiments.noisy_trained import FULL, LORA
from lowrank_dp.mechanism import NON_PRIVATE, GaussianMechanism

CAPTION = (
    "Noise and a random projection A^T A at one epsilon (arXiv 2601.21719): plain DP; project, "
    "then noise (whose noise is the largest eigenvalue of A^T A times as large, since the "
    "projection lengthens a gradient by up to this factor); noise, then project "
    "(post-processing of plain DP); and the last with the smaller noise that suffices on average "
    "over an A drawn after the record was fixed, for one release per A. (a) AUC of the likelihood "
    "ratio that knows A, the weights and all other records, for one record of a real layer "
    "whose records' gradients are clipped to their median norm, with 95% intervals; dashed: "
    "the largest AUC that plain DP permits. (b) The same without A: likelihood ratio to second "
    "order for project, then noise; with A learned from the release for noise, then project. "
    "(c) Cosine of the release with the clean sum, all layers as one vector. (d) AUC of the "
    "attack on the weights after several steps, A frozen and published, and the held-out loss "
    "of the released layer. NON-PRIVATE: gradients and membership bits are clean."
)


@dataclass(frozen=True)
class Config:
    """Releases of one step, and trained layers.

    Attributes:
        gradients: model, task and clipping norm of the gradients whose utility is measured; by
            default, the model is not warmed up.
        ranks: ranks of A, at most the smaller side of the attacked layer.
        epsilons: epsilons of one release at ``delta``, in increasing order.
        delta: delta of every guarantee.
        batch_size: number of records beside the attacked record in a release.
        num_trials: number of trials with the attacked record, and as many without. Each trial has
            its own record, A and noise.
        utility_batch: number of records of the sum whose releases are compared with the clean sum.
        trained: config of the trained layer.
    """

    gradients: GradientConfig = field(
        default_factory=lambda: GradientConfig(warm_loss=None, max_length=64)
    )
    ranks: tuple[int, ...] = (1, 8, 64)
    epsilons: tuple[float, ...] = (1.0, 8.0)
    delta: float = 1e-5
    batch_size: int = 32
    num_trials: int = 100
    utility_batch: int = 256
    trained: TrainedConfig = field(default_factory=TrainedConfig)


SMALL = Config(
    num_trials=20,
    utility_batch=32,
    trained=TrainedConfig(num_trials=20, num_records=32, num_held_out=64, num_draws=2),
)


@dataclass(frozen=True)
class Result:
    """AUCs and utilities by mechanism (4), rank (K), epsilon (E) and attack (3).

    Ranks and epsilons are in the order of the config. The last axis of an AUC has three entries:
    the AUC, and both ends of its 95% interval.
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    layer: str
    shape: tuple[int, ...]  # (m, n) of the attacked layer
    mechanisms: tuple[str, ...]
    attacks: tuple[str, ...]
    clip: float  # C of the attacked layer, absolute
    noise_multiplier: np.ndarray  # (E,) sigma, relative to C
    random_a_multiplier: np.ndarray  # (K, E) sigma_A of the attacked layer, relative to C
    noise_factor: np.ndarray  # (4, K, E) mean s / (sigma C) over trials
    ceiling: np.ndarray  # (E,) largest AUC under plain DP: Phi(1 / (sigma sqrt 2))
    auc: np.ndarray  # (4, K, E, 3 attacks, 3)
    cosine: (
        np.ndarray
    )  # (4, K, E, 2) with the clean sum: mean over layers, all layers as one vector
    error: np.ndarray  # (4, K, E, 2) |release - clean| / |clean|: the same two averages
    arms: tuple[str, ...]  # of the trained layer: arm (4) and trained rank (R) below
    trained_shape: tuple[int, ...]
    trained_clip: float  # C, absolute
    trained_multiplier: float  # sigma of one step, relative to C times the arm's sensitivity
    start_loss: float  # held out, in nats
    start_accuracy: float
    trained_auc: np.ndarray  # (4, R, 3); full fine-tuning repeats over the ranks
    noiseless_auc: np.ndarray  # (R, 3) of LoRA with frozen A and without noise
    loss: np.ndarray  # (4, R, learning rates) held out, mean over draws
    accuracy: np.ndarray  # (4, R, learning rates)
    learning_rate: np.ndarray  # (4, R) of the smallest loss; chosen on clean held-out records


def run(config: Config, source: GradientSource | None = None) -> Result:
    """Run the experiment; a missing ``source`` is prepared.

    Raises ValueError for a config that cannot be run.
    """
    _check(config)
    source = source or prepare(config.gradients)
    generator = torch.Generator().manual_seed(config.gradients.seed + 2)
    sigmas = np.array(
        [
            GaussianMechanism.calibrate(e, config.delta, 1, 1.0).noise_multiplier
            for e in config.epsilons
        ]
    )
    layer, rest, records, clip = clipped_layer(source, config, generator)
    random_a = _random_a(config, rest.shape[1])
    auc, factor = _attacked(config, rest, records, clip, sigmas, random_a, generator)
    cosine, error = _utility(config, source, sigmas, generator)
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        description=source.description,
        layer=layer,
        shape=tuple(rest.shape),
        mechanisms=MECHANISMS,
        attacks=noisy_release.ATTACKS,
        clip=clip,
        noise_multiplier=sigmas,
        random_a_multiplier=random_a,
        noise_factor=factor,
        ceiling=gaussian_auc(1 / sigmas),
        auc=auc,
        cosine=cosine,
        error=error,
        **noisy_pooler.measure(config.trained, source, config.delta, generator),
    )


def gaussian_auc(mu: np.ndarray) -> np.ndarray:
    """Return the AUC Phi(mu / sqrt 2) of the likelihood ratio of N(0, 1) against N(mu, 1)."""
    return np.asarray(special.ndtr(mu / np.sqrt(2)))


def _check(config: Config) -> None:
    for name in ("batch_size", "utility_batch"):
        _validate.integer(name, getattr(config, name))
    _validate.integer("num_trials", config.num_trials, low=2)
    for name in ("ranks", "epsilons"):
        if not getattr(config, name):
            _validate.fail(name, "at least one value", ())
    for epsilon in config.epsilons:
        _validate.positive("epsilons", epsilon)


def clipped_layer(
    source: GradientSource, config: Config, generator: torch.Generator
) -> tuple[str, Tensor, Tensor, float]:
    """Compute the clipped gradients of records in one middle layer. NON-PRIVATE.

    Gradients are clipped by their norm in this layer alone.

    Returns:
        The name of the layer; the sum G (m, n) of ``batch_size`` records; the gradients (N, m, n)
        of ``2 * num_trials`` other records; and C, the median norm of the gradients of these other
        records, absolute. Sum and gradients are float64.

    Raises:
        ValueError: if the split has too few records, or a rank exceeds the layer's smaller side.
    """
    chosen = source.sample(config.batch_size + 2 * config.num_trials, generator)
    first = source.clean_sum(chosen[:1])
    name = spread_layers(source.model, first, 1)[0]
    for rank in config.ranks:
        _validate.integer("ranks", rank, high=min(first[name].shape))
    gradients = torch.stack(
        [
            rows_of(source.model, source.clean_sum([i]), name).double().cpu()
            for i in progress(chosen, "records")
        ]
    )
    norms = gradients.norm(dim=(1, 2))
    clip = float(norms[config.batch_size :].median())
    gradients *= (clip / norms).clamp(max=1)[:, None, None]
    return (
        name,
        gradients[: config.batch_size].sum(dim=0),
        gradients[config.batch_size :],
        clip,
    )


def _random_a(config: Config, n: int) -> np.ndarray:
    """Return noise multipliers (K, E) that suffice on average over A, for gradients of width n."""
    return np.array(
        [
            [theory.noise_projection_multiplier(e, config.delta, r, n) for e in config.epsilons]
            for r in config.ranks
        ]
    )


def _draw(rank: int, n: int, generator: torch.Generator, dtype: torch.dtype) -> Projection:
    return Projection.of(lora.draw_a(rank, n, generator=generator, dtype=dtype))


def _attacked(
    config: Config,
    rest: Tensor,
    records: Tensor,
    clip: float,
    sigmas: np.ndarray,
    random_a: np.ndarray,
    generator: torch.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return AUCs (4, K, E, attacks, 3) and noise factors (4, K, E).

    The attacked record is in the first half of the releases.
    """
    shape = len(MECHANISMS), len(config.ranks), len(sigmas)
    scores = np.empty((*shape, len(noisy_release.ATTACKS), len(records)))
    factor = np.zeros((*shape, len(records)))
    member = np.arange(len(records)) < config.num_trials
    for t in progress(range(len(records)), "attacks"):
        gradient = rest + records[t] if member[t] else rest
        noise = torch.randn(rest.shape, generator=generator, dtype=rest.dtype)
        for k, rank in enumerate(config.ranks):
            projection = _draw(rank, rest.shape[1], generator, rest.dtype)
            for i, mechanism in enumerate(MECHANISMS):
                if mechanism == PLAIN and k:  # the mechanism PLAIN has no A
                    scores[i, k, ..., t], factor[i, k, :, t] = scores[i, 0, ..., t], 1.0
                    continue
                for j, sigma in enumerate(sigmas):
                    pair = float(sigma), float(random_a[k, j])
                    std = noisy_release.noise_std(mechanism, projection, pair, clip)
                    seen = noisy_release.release(mechanism, gradient, noise, projection, std)
                    factor[i, k, j, t] = std / (sigma * clip)
                    scores[i, k, j, :, t] = noisy_release.scores(
                        mechanism, seen, rest, records[t], projection, std
                    )
    auc = np.apply_along_axis(lambda s: auc_with_interval(s, member), -1, scores)
    return auc, factor.mean(axis=-1)


def _utility(
    config: Config, source: GradientSource, sigmas: np.ndarray, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine and relative error (4, K, E, 2) of one release of all layers, one A per layer.

    Records are clipped over all layers together. For "project, then noise", the noise of a layer is
    sigma C times the largest eigenvalue of the layer's A^T A. For the random A, sigma_A is computed
    for the smallest width of all layers.
    """
    sums = source.nested_sums([config.utility_batch])[config.utility_batch]
    clean = {name: rows_of(source.model, sums, name) for name in sums}
    clip = config.gradients.max_grad_norm
    random_a = _random_a(config, min(g.shape[1] for g in clean.values()))
    shape = len(MECHANISMS), len(config.ranks), len(sigmas)
    moments = np.zeros(
        (3, *shape, len(clean))
    )  # <release, clean>, |release|^2, |release - clean|^2
    own = np.array([float(g.double().square().sum()) for g in clean.values()])
    for layer, gradient in enumerate(progress(list(clean.values()), "utility")):
        gradient = gradient.float().cpu()
        noise = torch.randn(gradient.shape, generator=generator)
        for k, rank in enumerate(config.ranks):
            projection = _draw(rank, gradient.shape[1], generator, gradient.dtype)
            for i, j in np.ndindex(len(MECHANISMS), len(sigmas)):
                pair = float(sigmas[j]), float(random_a[k, j])
                std = noisy_release.noise_std(MECHANISMS[i], projection, pair, clip)
                seen = noisy_release.release(MECHANISMS[i], gradient, noise, projection, std)
                moments[:, i, k, j, layer] = (
                    float((seen * gradient).sum()),
                    float(seen.square().sum()),
                    float((seen - gradient).square().sum()),
                )
    kept = own > 0
    own, moments = own[kept], moments[..., kept]
    dot, square, gap = moments
    cosine = dot / np.sqrt(square * own)
    whole = dot.sum(axis=-1) / np.sqrt(square.sum(axis=-1) * own.sum())
    errors = np.sqrt(gap / own).mean(axis=-1), np.sqrt(gap.sum(axis=-1) / own.sum())
    return np.stack([cosine.mean(axis=-1), whole], axis=-1), np.stack(errors, axis=-1)


def headline(result: Result) -> dict[str, str]:
    """Summarise the result in a few numbers."""
    config = result.config
    lines = {}
    for j, epsilon in enumerate(config.epsilons):
        lines[f"epsilon {epsilon:g}: largest AUC under plain DP; cosine of plain DP"] = (
            f"{result.ceiling[j]:.3f}; {result.cosine[0, 0, j, 1]:.4f}"
        )
        for k, rank in enumerate(config.ranks):
            lines[f"epsilon {epsilon:g}, rank {rank}: AUC with A known; cosine, all layers"] = (
                ", ".join(
                    f"{name} {_interval(result.auc[i, k, j, 0])}; {result.cosine[i, k, j, 1]:.4f}"
                    for i, name in enumerate(result.mechanisms)
                    if name != PLAIN
                )
            )
    lines["trained layer before training: held-out loss, accuracy"] = (
        f"{result.start_loss:.3f}, {result.start_accuracy:.3f}"
    )
    for k, rank in enumerate(config.trained.ranks):
        lines[f"trained, epsilon {config.trained.epsilon:g}, rank {rank}: AUC; loss, accuracy"] = (
            ", ".join(_trained(result, i, k) for i in range(len(result.arms)))
        )
        lines[f"trained without noise, LoRA, A frozen, rank {rank}: AUC"] = _interval(
            result.noiseless_auc[k]
        )
    return lines


def _trained(result: Result, i: int, k: int) -> str:
    best = int(np.argmin(result.loss[i, k]))
    return (
        f"{result.arms[i]} {_interval(result.trained_auc[i, k])}; {result.loss[i, k, best]:.3f}, "
        f"{result.accuracy[i, k, best]:.3f}"
    )


def _interval(values: np.ndarray) -> str:
    return f"{values[0]:.3f} ({values[1]:.3f} to {values[2]:.3f})"


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate every mechanism, rank and epsilon of one release, and every trained arm."""
    columns = ["release", "epsilon", "rank", "noise / (sigma C)", *result.attacks]
    columns += ["cosine: mean, all", "relative error: mean, all"]
    columns.append("held-out loss, accuracy")
    config, rows = result.config, []
    for j, k, i in np.ndindex(len(config.epsilons), len(config.ranks), len(result.mechanisms)):
        if result.mechanisms[i] == PLAIN and k:
            continue
        cosine, error = result.cosine[i, k, j], result.error[i, k, j]
        rows.append(
            [
                result.mechanisms[i],
                f"{config.epsilons[j]:g}",
                "-" if result.mechanisms[i] == PLAIN else str(config.ranks[k]),
                f"{result.noise_factor[i, k, j]:.3g}",
                *(_interval(values) for values in result.auc[i, k, j]),
                f"{cosine[0]:.4f}, {cosine[1]:.4f}",
                f"{error[0]:.3g}, {error[1]:.3g}",
                "",
            ]
        )
    for i, k in np.ndindex(len(result.arms), len(config.trained.ranks)):
        full = result.arms[i] == FULL
        if not (full and k):
            best = int(np.argmin(result.loss[i, k]))
            rows.append(
                [
                    f"{config.trained.num_steps} steps: {result.arms[i]}",
                    f"{config.trained.epsilon:g}",
                    "-" if full else str(config.trained.ranks[k]),
                    "",
                    _interval(result.trained_auc[i, k]),
                    *[""] * 4,
                    f"{result.loss[i, k, best]:.3f}, {result.accuracy[i, k, best]:.3f}",
                ]
            )
    for k, rank in enumerate(config.trained.ranks):
        name = f"{config.trained.num_steps} steps: {LORA}, no noise"
        rows.append([name, "inf", str(rank), "", _interval(result.noiseless_auc[k]), *[""] * 5])
    start = f"{result.start_loss:.3f}, {result.start_accuracy:.3f}"
    rows.append(["before training", *[""] * 8, start])
    return columns, rows
