"""Claim: LoRA's projection hides a record like privacy noise does (arXiv 2409.17538).

For a matrix the claim fails (arXiv 2601.21719): if rows share A, R G^T is symmetric for the true
gradient G alone, and two rows of a real layer suffice at every rank. No such test exists for one
row, a vector query, whose most powerful test is the likelihood ratio. Independent noise that is
added to the release ends the attack.

The two hypotheses differ in one record: G0 is some rows of a layer's clipped gradient sum over a
batch without the record, and G1 = G0 + the record's own clipped gradient. The adversary sees
R = G A^T A + noise for a fresh, secret A, knows both candidates, and scores R. A higher score means
that the record is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from lowrank_dp import _validate, lora, theory
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import (
    GradientConfig,
    GradientSource,
    prepare,
    rows_of,
    spread_layers,
)
from lowrank_dp.experiments.intervals import auc_with_interval
from lowrank_dp.mechanism import NON_PRIVATE

Array = NDArray[np.float64]

CAPTION = (
    "Rows of G A^T A from a real layer: can an adversary tell whether one record's clipped "
    "gradient is in the batch's sum G? Measured AUC with 95% intervals (DeLong; Clopper-Pearson at "
    "0 and 1) against Gaussian noise added to the release, its standard deviation in units of the "
    "clipping norm C. One row: exact likelihood ratio; 2 and 8 rows that share A: symmetry "
    "score T0 - T1. Hollow markers: the AUC that the reading of the projection as independent "
    "Gaussian noise (2409.17538) promises without added noise. Dotted: the noise is as large as "
    "the release's entries. Each trial has a record, an A and noise of its own; batch, layer and "
    "rows are fixed. The noise levels and numbers of rows of a trial share its draws, so where an "
    "interval misses by chance, as one in 20 does, its neighbours do too. Limits: the adversary "
    "knows all other records and the weights, so G0 and G1; under noise the symmetry score is not "
    "the best attack (where it falls below one row's curve the adversary would use that row), so "
    "its AUC does not bound what leaks; 0.5 C is the level of DP-SGD's noise but no guarantee "
    "here, for A^T A lengthens a row by about sqrt(1 + n/r). NON-PRIVATE: the gradients are "
    "clean."
)


@dataclass(frozen=True)
class Config:
    """Releases and trials of the attack.

    Attributes:
        gradients: model, task and clipping norm C; cold by default.
        batch_size: records in G0.
        num_trials: trials with the record, and as many without; each trial has its own record.
        ranks: ranks of A.
        rows: numbers of released rows, which are those of largest norm in G0. One row is attacked
            by the likelihood ratio, several rows by the symmetry score.
        noise_multipliers: standard deviation of the noise added to each entry of the release, in
            units of C; rising, 0 allowed.
    """

    gradients: GradientConfig = field(
        default_factory=lambda: GradientConfig(warm_loss=None, max_length=64)
    )
    batch_size: int = 32
    num_trials: int = 1000
    ranks: tuple[int, ...] = (1, 8, 64)
    rows: tuple[int, ...] = (1, 2, 8)
    noise_multipliers: tuple[float, ...] = (0.0, 1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 1e-2, 0.1, 0.5)


SMALL = Config(num_trials=100)


@dataclass(frozen=True)
class Result:
    """Scores and AUCs for K ranks, M numbers of rows and L noise levels, in the config's order.

    ``scores`` are (K, M, L, N) with N = 2 num_trials; in the first half the record is in the batch.
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    layer: str
    shape: tuple[int, ...]  # (m, n) of the whole layer
    noise_std: Array  # (L,) absolute, on the release: noise_multipliers x C
    release_rms: Array  # (K,) root-mean-square entry of the releases without noise
    relative_size: Array  # (N,) |record| / |G0| over the rows taken
    scores: Array
    auc: Array  # (K, M, L, 3): value, lower and upper end of 95 % intervals
    gaussian_reading: Array  # (K, M): AUC that the reading promises without added noise


def run(config: Config, source: GradientSource | None = None) -> Result:
    """Run the attack; a missing ``source`` is prepared.

    Raises ValueError for a config that cannot be run; before the model is loaded, if the config
    alone shows the fault.
    """
    _check(config)
    source = source or prepare(config.gradients)
    generator = torch.Generator().manual_seed(config.gradients.seed + 1)
    layer, shape, rest, records = real_rows(source, config, generator)
    member = np.arange(len(records)) < config.num_trials
    noise_std = np.array(config.noise_multipliers) * config.gradients.max_grad_norm

    scores = np.empty((len(config.ranks), len(config.rows), len(noise_std), len(records)))
    release_rms = np.empty(len(config.ranks))
    for k, rank in progress(list(enumerate(config.ranks)), "attacks"):
        released = release(rest, records, member, rank, generator)
        noise = torch.randn(released.shape, generator=generator, dtype=released.dtype)
        release_rms[k] = released.square().mean().sqrt()
        for i, rows in enumerate(config.rows):
            g0, g1 = rest[:rows].numpy(), (rest + records)[:, :rows].numpy()
            for j, std in enumerate(noise_std):
                seen = (released + std * noise)[:, :rows].numpy()
                scores[k, i, j] = score(seen, g0, g1, rank, float(std))
    sizes = torch.linalg.vector_norm(records, dim=2) / torch.linalg.vector_norm(rest, dim=1)
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        description=source.description,
        layer=layer,
        shape=shape,
        noise_std=noise_std,
        release_rms=release_rms,
        relative_size=(torch.linalg.vector_norm(records, dim=(1, 2)) / rest.norm()).numpy(),
        scores=scores,
        auc=np.apply_along_axis(lambda s: auc_with_interval(s, member), -1, scores),
        gaussian_reading=np.array(
            [
                [gaussian_reading(sizes[:, :rows].numpy(), member, rank) for rows in config.rows]
                for rank in config.ranks
            ]
        ),
    )


def headline(result: Result) -> dict[str, str]:
    """Summarise the result in a few numbers."""
    config = result.config
    which = ", ".join(map(str, config.rows))
    numbers = {}
    for k, rank in enumerate(config.ranks):
        for j in (0, len(config.noise_multipliers) - 1):
            noise = config.noise_multipliers[j]
            numbers[f"AUC, rank {rank}, noise {noise:g} C; {which} rows"] = ", ".join(
                f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in result.auc[k, :, j]
            )
        numbers[f"Gaussian reading's AUC, rank {rank}, no noise; {which} rows"] = ", ".join(
            f"{value:.3f}" for value in result.gaussian_reading[k]
        )
    numbers["release's rms entry, in C"] = ", ".join(
        f"rank {rank}: {rms / config.gradients.max_grad_norm:.1e}"
        for rank, rms in zip(config.ranks, result.release_rms, strict=True)
    )
    numbers["record's norm / rest's, median"] = f"{np.median(result.relative_size):.3f}"
    return numbers


def real_rows(
    source: GradientSource,
    config: Config,
    generator: torch.Generator,
) -> tuple[str, tuple[int, ...], Tensor, Tensor]:
    """Compute G0 and the records' gradients for the largest rows of a middle layer. NON-PRIVATE.

    The m = max(rows) rows are chosen by their norm in G0 alone, the largest first.

    Returns:
        Name and shape of the layer, G0 (m, n), and the clipped gradients of N = 2 num_trials
        records (N, m, n); both in float64 on the CPU.

    Raises:
        ValueError: if the split has too few records, or the layer too few rows.
    """
    needed = config.batch_size + 2 * config.num_trials
    if needed > len(source.rows):
        _validate.fail(
            "batch_size and num_trials",
            f"such that batch_size + 2 num_trials <= {len(source.rows)} records",
            needed,
        )
    chosen = source.sample(needed, generator)
    rest = source.clean_sum(chosen[: config.batch_size])
    name = spread_layers(source.model, rest, 1)[0]
    matrix = rows_of(source.model, rest, name)
    m = _validate.integer("rows", max(config.rows), high=len(matrix))
    top = torch.linalg.vector_norm(matrix, dim=1).topk(m).indices
    records = [
        rows_of(source.model, source.clean_sum([i]), name)[top]
        for i in progress(chosen[config.batch_size :], "records")
    ]
    return (
        name,
        tuple(matrix.shape),
        matrix[top].double().cpu(),
        torch.stack(records).double().cpu(),
    )


def release(
    rest: Tensor, records: Tensor, member: NDArray[np.bool_], rank: int, generator: torch.Generator
) -> Tensor:
    """Release G A^T A (N, m, n) with a fresh A per trial.

    Args:
        rest: G0 (m, n).
        records: one record's gradient per trial (N, m, n).
        member: whether G includes the record (N,).
        rank: rows of A, which is rank x n with independent N(0, 1/rank) entries.
        generator: random generator of A, on the CPU.
    """
    return torch.stack(
        [
            lora.project(rest + record if inside else rest, rank, generator=generator)
            for record, inside in zip(records, member, strict=True)
        ]
    )


def score(released: Array, without: Array, with_: Array, rank: int, noise_std: float) -> Array:
    """Score each trial (N,); a higher score means that the record is in the batch.

    The score of one row is the log-likelihood ratio, the most powerful test. The score of several
    rows is the difference of symmetry scores T0 - T1: without noise, T is 0 up to rounding for the
    true candidate. The symmetry score uses neither the rank nor the noise level.

    Args:
        released: R (N, m, n), noise included.
        without: candidate G0, (m, n) or (N, m, n), without a row of zeros.
        with_: candidate G1, of the same form.
        rank: rank of A.
        noise_std: standard deviation of the noise in each entry of R, absolute, >= 0.
    """
    without, with_ = (np.broadcast_to(g, released.shape) for g in (without, with_))
    if released.shape[1] == 1:
        y, q0, q1 = released[:, 0], without[:, 0], with_[:, 0]
        return row_logpdf(y, q1, rank, noise_std) - row_logpdf(y, q0, rank, noise_std)
    return np.array(
        [
            theory.symmetry_score(y, g0) - theory.symmetry_score(y, g1)
            for y, g0, g1 in zip(released, without, with_, strict=True)
        ]
    )


def row_logpdf(y: Array, q: Array, rank: int, noise_std: float) -> Array:
    """Return the log-density of A^T A q + N(0, noise_std^2 I) at ``y``.

    ``y`` and ``q`` are (..., n), the result is (...). Without noise the density is
    `theory.projection_logpdf`, with -inf off its support. With noise, and given
    s = |A q|^2 / |q|^2 (distributed as chi^2_rank / rank), y is Gaussian: along q with mean s |q|
    and variance noise_std^2, and in each direction across q with mean 0 and variance
    s |q|^2 / rank + noise_std^2. The remaining integral over s is exact to about 1e-7.
    """
    if noise_std == 0:
        return np.asarray(theory.projection_logpdf(y, q, rank))
    n, norm = q.shape[-1], np.linalg.norm(q, axis=-1)
    along = np.sum(y * q, axis=-1) / norm
    across2 = np.square(y - (along / norm)[..., None] * q).sum(axis=-1)

    def log_integrand(t: Array) -> Array:
        s = np.exp(t)
        variance = s * norm**2 / rank + noise_std**2
        return (
            rank / 2 * (t - s)
            - ((along - s * norm) / noise_std) ** 2 / 2
            - ((n - 1) * np.log(variance) + across2 / variance) / 2
        )

    # every factor of the integrand decreases beyond the largest of 1 and the two estimates of s
    largest = np.maximum(np.maximum(1.0, along / norm), across2 * rank / (max(n - 1, 1) * norm**2))
    integral = _log_integral(log_integrand, np.full_like(norm, -70.0), np.log(largest) + 6)
    constant = (
        rank / 2 * np.log(rank / 2)
        - special.gammaln(rank / 2)
        - np.log(noise_std)
        - n / 2 * np.log(2 * np.pi)
    )
    return integral + constant


def _log_integral(log_integrand: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Return the log of the integral over t = ln s, by the trapezoidal rule.

    The interval from ``low`` to ``high`` is narrowed first to the part where the integrand is
    above e^-40 of its maximum.
    """
    for points in (200, 200, 200, 200, 1000):
        t = np.linspace(low, high, points)  # (points, ...)
        values = log_integrand(t)
        matters = values > values.max(axis=0) - 40
        first = np.maximum(matters.argmax(axis=0) - 1, 0)
        last = np.minimum(points - matters[::-1].argmax(axis=0), points - 1)
        low, high = (np.take_along_axis(t, end[None], axis=0)[0] for end in (first, last))
    return special.logsumexp(values, axis=0) + np.log(t[1] - t[0])


def gaussian_reading(sizes: Array, member: NDArray[np.bool_], rank: int) -> float:
    """Return the best attack's AUC without added noise, if the projection's noise were Gaussian.

    The Gaussian reading (arXiv 2409.17538) takes row i of G A^T A as g_i + N(0, |g_i|^2 I / rank),
    independent of the other rows and the same under both hypotheses. The log-likelihood ratio of a
    record is then N(+-mu^2 / 2, mu^2) with mu^2 = rank sum_i ``sizes``_i^2. A member with mu scores
    higher than a non-member with mu' with probability Phi(sqrt(mu^2 + mu'^2) / 2), and the AUC is
    the mean of this probability over all pairs.

    Args:
        sizes: |row i of the record| / |row i of G0| (N, m).
        member: whether each trial includes the record (N,).
        rank: rank of A.
    """
    mu2 = rank * np.square(sizes).sum(axis=1)
    return float(special.ndtr(np.sqrt(mu2[member][:, None] + mu2[~member]) / 2).mean())


def _check(config: Config) -> None:
    """Raise ValueError for a config that no model could run."""
    _validate.integer("num_trials", config.num_trials, low=2)
    for name, values in (("ranks", config.ranks), ("rows", config.rows)):
        if not values:
            _validate.fail(name, "at least one integer", values)
        for value in values:
            _validate.integer(name, value)
    levels = [_validate.real("noise_multipliers", x, low=0) for x in config.noise_multipliers]
    if not levels or sorted(set(levels)) != levels:
        _validate.fail(
            "noise_multipliers", "rising numbers, at least one", config.noise_multipliers
        )
