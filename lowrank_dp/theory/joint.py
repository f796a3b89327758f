r"""All coordinates of the noise together: density, distance to a Gaussian, bounds and limit.

With q rotated to the first axis, u / |q| = (s - 1, sqrt(s / rank) g) in law, where s is
chi^2_rank / rank and g is N(0, I) in n - 1 dimensions, independent of s. The noise across q has a
random scale. Together the n - 1 coordinates reveal the scale, although each alone looks Gaussian.
The "matched" Gaussian has covariance |q|^2 (I + q q^T / |q|^2) / rank. The "paper" Gaussian, the
Gaussian reading of arXiv 2409.17538, has covariance |q|^2 I / rank.

Arguments, results and errors are as in `lowrank_dp.theory.coordinate`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from lowrank_dp._validate import fail
from lowrank_dp.theory._arrays import (
    Array,
    FloatOrArray,
    integers,
    reals,
    reference_variance,
    unwrap,
)
from lowrank_dp.theory._quadrature import integrate
from lowrank_dp.theory._special import LOG_2PI, log_mean_square_density, log_minus_digamma
from lowrank_dp.theory.coordinate import tv_exact

_TAIL = 1e-17


def joint_tv(rank: ArrayLike, n: ArrayLike, *, reference: str = "matched") -> FloatOrArray:
    """Total variation distance, in [0, 1], between the whole noise vector and a Gaussian, to 1e-10.

    The distance depends on q only through ``n``. Against the "matched" Gaussian the distance
    vanishes only for rank >> n; against the "paper" Gaussian the distance is at least 0.166 at
    every large rank.

    >>> round(joint_tv(256, 4096), 4)
    0.7049
    """
    r, n_ = integers("rank", rank), integers("n", n)
    variance = float(reference_variance(reference, 1.0))
    tv = np.vectorize(lambda r, n: _joint_tv(r, n, variance), otypes=[float])
    return unwrap(tv(r, n_))


def joint_tv_limit(ratio: ArrayLike) -> FloatOrArray:
    """Limit of the matched `joint_tv` as rank and n grow with n / rank -> ``ratio`` >= 0.

    The limit is (2 / pi) arctan(sqrt(ratio) / 2), in [0, 1), which is 1/2 at n = 4 rank.

    >>> round(joint_tv_limit(4.0), 12)
    0.5
    """
    ratio_ = reals("ratio", ratio, low=0)
    return unwrap(2 / np.pi * np.arctan(np.sqrt(ratio_) / 2))


def joint_tv_upper_bound(rank: ArrayLike, n: ArrayLike) -> FloatOrArray:
    """Proved upper bound, at most 1, on the matched `joint_tv`.

    The bound adds the distance of chi^2_rank from a normal, along q, to the bound of Pinsker's
    inequality, across q.

    >>> joint_tv_upper_bound(1024, 16) >= joint_tv(1024, 16)
    True
    """
    r, n_ = integers("rank", rank), integers("n", n)
    across = np.sqrt((n_ - 1) * log_minus_digamma(r / 2)) / 2
    return unwrap(np.minimum(tv_exact(r, 1) + across, 1.0))


def joint_tv_lower_bound(rank: ArrayLike, n: ArrayLike) -> FloatOrArray:
    """Proved lower bound, in [0, 1), on the matched `joint_tv`; tends to 1 as n / rank grows.

    |u|^2 across q is close to its mean times s under the true law, and close to its mean under the
    Gaussian. The bound compares the two within a factor (1 +- eta).

    >>> joint_tv_lower_bound(4, 10**6) > 0.9
    True
    """
    r, n_ = integers("rank", rank), integers("n", n)
    across = np.maximum(n_ - 1, 0.5)  # n = 1 gives an eta above 1, and the bound 0
    # the best eta in (0, 1), to first order
    eta = (4 / across * np.sqrt(np.pi / r)) ** (1 / 3)
    usable = np.minimum(eta, 0.999)
    bound = 1 - 2 / (across * usable**2) - np.sqrt(r / (4 * np.pi)) * 2 * np.arctanh(usable)
    return unwrap(np.where(eta < 1, np.maximum(bound, 0.0), 0.0))


def projection_logpdf(y: ArrayLike, q: ArrayLike, rank: ArrayLike) -> FloatOrArray:
    """Log-density of A^T A q at ``y``, with A of shape (rank, n).

    ``y`` and ``q`` have shape (..., n), and ``rank`` is one integer or an array. The arguments
    broadcast over the leading axes, which are the shape of the result. The result is -inf off the
    support q . y > 0; a q . y below 1e-300 |q|^2 counts as zero. Unequal lengths and a zero ``q``
    raise ``ValueError``.

    >>> round(projection_logpdf([1.0], [1.0], 2), 12)       # n = 1: A^T A is exponential of mean 1
    -1.0
    >>> projection_logpdf([-1.0, 0.0], [1.0, 0.0], 2)
    -inf
    """
    y_, q_, r = reals("y", y), reals("q", q), integers("rank", rank)
    if q_.ndim == 0 or q_.shape[-1] == 0:
        fail("q", "a vector of at least one entry", q)
    n = q_.shape[-1]
    if y_.ndim == 0 or y_.shape[-1] != n:
        fail("y", f"an array whose last axis has the length of q, {n}", f"shape {y_.shape}")
    largest = np.abs(q_).max(axis=-1)
    if not np.all(largest > 0):
        fail("q", "a vector with a positive norm", q)
    q_ = q_ / largest[..., None]  # squares neither overflow nor vanish
    norm = np.linalg.norm(q_, axis=-1)
    unit = q_ / norm[..., None]
    # where y overflows, the log-density is -inf
    with np.errstate(over="ignore", invalid="ignore"):
        y_ = y_ / largest[..., None]
        along = np.sum(y_ * unit, axis=-1)
        s = along / norm  # chi^2_rank / rank
        inside = (s > 1e-300) & (s < np.inf)
        safe = np.where(inside, s, 1.0)
        across = np.sum((y_ - along[..., None] * unit) ** 2, axis=-1)
        variance = safe * norm**2 / r  # of a coordinate across q, given s
        log_along = log_mean_square_density(safe, r) - np.log(norm)
        log_across = -(across / variance + (n - 1) * (LOG_2PI + np.log(variance))) / 2
    return unwrap(np.where(inside, log_along + log_across - n * np.log(largest), -np.inf))


def _joint_tv(r: float, n: float, variance: float) -> float:
    """Integral over s of the excess of one law at the best threshold on |u across q|^2.

    With t = rank |u across q|^2 / |q|^2 and k = n - 1, the log-ratio of the two laws is
    alpha(s) + t/2 (1 - 1/s), which is monotone in t. So at each s the best event is that t lies on
    one side of t* = -2 alpha / (1 - 1/s); t is s chi^2_k under the law of the noise, and chi^2_k
    under the Gaussian.
    """
    if n == 1:
        return float(tv_exact(r, 1, reference="matched" if variance == 2 else "paper"))
    k, sd = n - 1, np.sqrt(variance / r)

    def excess(root: Array) -> Array:
        s = root**2  # the substitution removes the pole of the density of s at 0 for rank 1
        log_p = log_mean_square_density(s, r)
        log_g = -(((s - 1) / sd) ** 2 + LOG_2PI) / 2 - np.log(sd)
        alpha = log_p - log_g - k / 2 * np.log(s)
        with np.errstate(divide="ignore", over="ignore"):
            threshold = np.maximum(-2 * alpha * s / (s - 1), 0.0)
            p_event, g_event = _chi2_tail(threshold / s, s, k), _chi2_tail(threshold, s, k)
        return 2 * root * (np.exp(log_p) * p_event - np.exp(log_g) * g_event)

    # the excess is at most the density of s
    left, right = np.sqrt(special.chdtri(r, [1 - _TAIL, _TAIL]) / r)
    # the excess varies within |s - 1| of order sqrt(1/n) down to order 1/(rank n)
    graded = 4.0 ** -np.arange(24.0)
    edges = np.concatenate(
        [np.linspace(left, 1, 17), np.linspace(1, right, 17), 1 - graded, 1 + graded]
    )
    return integrate(excess, np.unique(edges[(edges >= left) & (edges <= right)]))


def _chi2_tail(t: Array, s: Array, k: float) -> Array:
    """P(chi^2_k > t) where s > 1, P(chi^2_k <= t) where s < 1."""
    out = np.empty_like(t)
    wide = s > 1
    out[wide] = special.gammaincc(k / 2, t[wide] / 2)
    out[~wide] = special.gammainc(k / 2, t[~wide] / 2)
    return out
