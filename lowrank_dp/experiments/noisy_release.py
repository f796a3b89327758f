"""Releases of a projected matrix with noise, and attacks that know all other records.

G (m, n) is a sum of records' gradients, each of Frobenius norm at most C. A neighbour of G adds the
gradient g of one more record. A is (rank, n), W = A^T A, and Z (m, n) has independent N(0, 1)
entries.

    plain                  G + s Z        s = sigma C
    project, then noise    G W + s Z      s = sigma C w, w: the largest eigenvalue of W
    noise, then project    (G + s Z) W    s = sigma C
    the same, random A     (G + s Z) W    s = sigma_A C

Sensitivity. |g W|_F <= w |g|_F, with equality if the rows of g are multiples of W's first
eigenvector. The second mechanism therefore needs w times the noise, where w is about
(1 + sqrt(n / rank))^2. The third mechanism is post-processing of the first, whatever A is. The
first three mechanisms have the same epsilon, for an adversary who knows A and for the worst g. The
fourth mechanism has this epsilon only on average over an A that is drawn after the record is fixed
(`theory.noise_projection_multiplier`), and only for one release per A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_dp import theory

PLAIN, PROJECT_NOISE, NOISE_PROJECT, RANDOM_A = MECHANISMS = (
    "plain",
    "project, then noise",
    "noise, then project",
    "noise, then project, random A",
)
ATTACKS = ("A known", "A secret", "symmetry")


@dataclass(frozen=True)
class Projection:
    """Matrix A (rank, n), an orthonormal basis of its row space, and eigenvalues of A^T A.

    ``basis`` is (n, rank). ``eigenvalues`` is (rank,), in descending order:
    A^T A = basis diag(eigenvalues) basis^T.
    """

    a: Tensor
    basis: Tensor
    eigenvalues: Tensor

    @staticmethod
    def of(a: Tensor) -> Projection:
        """Decompose A (rank, n), which must have full row rank."""
        _, values, rows = torch.linalg.svd(a, full_matrices=False)
        return Projection(a, rows.T, values**2)

    @property
    def largest(self) -> float:
        """Largest eigenvalue of A^T A: the sensitivity of G A^T A in units of C."""
        return float(self.eigenvalues[0])

    def apply(self, matrix: Tensor) -> Tensor:
        """Return ``matrix`` A^T A."""
        return (matrix @ self.a.T) @ self.a


def noise_std(
    mechanism: str, projection: Projection, noise_multipliers: tuple[float, float], clip: float
) -> float:
    """Return the noise level s of a mechanism, absolute.

    ``noise_multipliers`` are sigma and sigma_A, relative to the clipping norm ``clip`` = C.
    """
    sigma, sigma_random = noise_multipliers
    factor = {
        PROJECT_NOISE: sigma * projection.largest,
        RANDOM_A: sigma_random,
    }.get(mechanism, sigma)
    return factor * clip


def release(
    mechanism: str, gradient: Tensor, noise: Tensor, projection: Projection, std: float
) -> Tensor:
    """Return the release (m, n) of ``gradient``; ``noise`` is Z (m, n), and ``std`` is s."""
    if mechanism == PLAIN:
        return gradient + std * noise
    if mechanism == PROJECT_NOISE:
        return projection.apply(gradient) + std * noise
    return projection.apply(gradient + std * noise)


def scores(
    mechanism: str,
    released: Tensor,
    without: Tensor,
    record: Tensor,
    projection: Projection,
    std: float,
) -> tuple[float, float, float]:
    """Score one release by each of `ATTACKS`; a release with the record has higher scores.

    Args:
        mechanism: one of `MECHANISMS`.
        released: release R (m, n).
        without: sum G without the record, (m, n).
        record: gradient g of the record, (m, n), not zero.
        projection: the true A, which only the first attack reads.
        std: noise level s > 0, absolute.
    """
    with_ = without + record
    symmetry = theory.symmetry_score(released.numpy(), without.numpy()) - theory.symmetry_score(
        released.numpy(), with_.numpy()
    )
    if mechanism == PLAIN:
        known = _log_ratio(released - without, record, std)
        return known, known, symmetry
    rank = len(projection.a)
    if mechanism == PROJECT_NOISE:
        known = _log_ratio(released - projection.apply(without), projection.apply(record), std)
        secret = _log_ratio(released - without, record, std)
        secret += _curvature(released, with_, rank, std) - _curvature(released, without, rank, std)
        return known, secret, symmetry
    basis = projection.basis
    seen = (released @ basis) / projection.eigenvalues  # G + s Z in the row space of A
    known = _log_ratio(seen - without @ basis, record @ basis, std)
    return known, _learned_a(released, without, record, rank, std), symmetry


def _log_ratio(residual: Tensor, shift: Tensor, std: float) -> float:
    """Return the log of the density ratio of N(shift, std^2) to N(0, std^2) at ``residual``."""
    return float((residual * shift).sum() - shift.square().sum() / 2) / std**2


def _curvature(released: Tensor, g: Tensor, rank: int, std: float) -> float:
    """Return the second-order part of the log-likelihood of R = g W + std Z for a secret A.

    The law of R given g has mean g and covariance std^2 I + S, where
    S_(ij)(kl) = (g_i . g_k [j = l] + g_il g_kj) / rank. To first order in S / std^2, the logarithm
    of the density is that of N(g, std^2 I) plus e^T S e / (2 std^4) - tr S / (2 std^2), for e = R -
    g.
    """
    e = released - g
    cross = e @ g.T
    quadratic = (e.T @ g).square().sum() + (cross * cross.T).sum()
    trace = g.square().sum() * (g.shape[1] + 1)
    return float(quadratic / (2 * std**4) - trace / (2 * std**2)) / rank


def _learned_a(released: Tensor, without: Tensor, record: Tensor, rank: int, std: float) -> float:
    """Return the log-likelihood ratio of R = (G + std Z) W, with W estimated from R (m >= rank).

    R has rank ``rank``, so the rows of R span the row space of A. In an orthonormal basis Q of this
    space, R Q = (G + std Z) Q K with a symmetric positive K. If noise is the larger part, the
    columns of (G + std Z) Q are nearly orthogonal with squared norm m std^2. Then
    K = (Q^T R^T R Q)^(1/2) / (std sqrt(m)), and R Q K^-1 is the polar factor times std sqrt(m).
    """
    m = len(released)
    mixed = torch.randn(m, rank, generator=torch.Generator().manual_seed(0), dtype=released.dtype)
    basis = torch.linalg.qr(released.T @ mixed)[0]
    left, _, right = torch.linalg.svd(released @ basis, full_matrices=False)
    seen = std * m**0.5 * (left @ right)
    return _log_ratio(seen - without @ basis, record @ basis, std)
