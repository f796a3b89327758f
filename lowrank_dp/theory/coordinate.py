r"""One coordinate of LoRA's implicit noise: exact law, total variation to a Gaussian, bounds.

Setting (arXiv 2409.17538): A is rank x n with independent N(0, 1/rank) entries, q a fixed vector,
u = q (A^T A - I), and beta2 = q_j^2 / |q|^2. Then, with X and X' independent chi^2_rank,

    u_j / |q|  =  (1 + beta)/2 (X/rank - 1)  -  (1 - beta)/2 (X'/rank - 1)      in law.

The law is compared with two Gaussians: "matched" has the same variance, |q|^2 (1 + beta2) / rank;
"paper" is the Gaussian reading of the paper, with variance |q|^2 / rank. Every distance is
independent of |q| and even in beta, so beta >= 0 throughout.

Unless a docstring says otherwise, arguments are numbers or arrays that broadcast together, and the
result is a float or a float64 array. ``rank`` and ``n`` are integers in [1, 1e12]. ``beta2`` lies
in [0, 1] and defaults to 1/n, the value of a flat q; if ``beta2`` is given, ``n`` has no further
influence. Every other argument raises ``ValueError`` with its name and value.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from lowrank_dp._validate import choice
from lowrank_dp.theory._arrays import (
    REFERENCES,
    Array,
    FloatOrArray,
    integers,
    reals,
    reference_variance,
    squared_cosine,
    unwrap,
)
from lowrank_dp.theory._law import log_density
from lowrank_dp.theory._quadrature import bisect, panel_integrals, panel_nodes
from lowrank_dp.theory._special import LOG_2PI, log_mean_square_density, log_minus_digamma


def _phi(x: FloatOrArray) -> Array:
    """Standard normal density."""
    return np.exp(-np.square(x) / 2) / np.sqrt(2 * np.pi)


def _he3(x: float) -> float:
    """Third Hermite polynomial."""
    return x**3 - 3 * x


# c_k = E|He_k(Z)|, the L1 norm of the k-th derivative of the normal density
C3 = float(2 * _phi(0) + 8 * _phi(np.sqrt(3)))
C4 = float(
    4
    * (
        _he3(np.sqrt(3 + np.sqrt(6))) * _phi(np.sqrt(3 + np.sqrt(6)))
        - _he3(np.sqrt(3 - np.sqrt(6))) * _phi(np.sqrt(3 - np.sqrt(6)))
    )
)
# Shevtsova (2013), for identically distributed terms
BERRY_ESSEEN_CONSTANT = 0.4690

_TAIL = 1e-16  # probability outside the panels on each side: negligible at 1e-14
_GAUSSIAN_REACH = 8.5  # standard deviations, beyond which a Gaussian has no mass at 1e-14


def noise_variance(
    rank: ArrayLike, n: ArrayLike, *, beta2: ArrayLike | None = None
) -> FloatOrArray:
    """Variance of one coordinate of the noise, in units of |q|^2: (1 + beta2) / rank.

    >>> noise_variance(8, 768, beta2=0)
    0.125
    """
    r, b2 = integers("rank", rank), squared_cosine(n, beta2)
    return unwrap((1 + b2) / r)


def noise_kurtosis(
    rank: ArrayLike, n: ArrayLike, *, beta2: ArrayLike | None = None
) -> FloatOrArray:
    """Kurtosis E u^4 / (E u^2)^2 of one coordinate of the noise.

    A Gaussian has kurtosis 3; the largest kurtosis of the noise is 15, at rank 1 and beta2 = 1.

    >>> noise_kurtosis(1, 768, beta2=0)
    9.0
    """
    r, b2 = integers("rank", rank), squared_cosine(n, beta2)
    return unwrap(3 + 6 * (1 + 6 * b2 + b2**2) / (r * (1 + b2) ** 2))


def noise_logpdf(x: ArrayLike, rank: ArrayLike, *, beta2: ArrayLike) -> FloatOrArray:
    """Log-density of u_j / |q| at ``x``.

    ``x`` lies in [-1e100, 1e100], in units of |q|, for a coordinate with q_j >= 0; for q_j < 0 take
    ``-x``. The density is a Bessel function. At rank 1 the density has a pole at x = -beta, where
    the result is ``inf``. At beta2 = 1 the density is a shifted gamma density, and the result is
    ``-inf`` for x < -1.

    >>> round(noise_logpdf(0.5, 2, beta2=0), 12)    # at rank 2, beta2 0: Laplace, exp(-2|x|)
    -1.0
    """
    x_, r, b2 = np.broadcast_arrays(
        reals("x", x, low=-1e100, high=1e100),
        integers("rank", rank),
        reals("beta2", beta2, low=0, high=1),
    )
    return unwrap(log_density(x_ + np.sqrt(b2), r, b2))


def tv_exact(
    rank: ArrayLike, n: ArrayLike, *, beta2: ArrayLike | None = None, reference: str = "matched"
) -> FloatOrArray:
    """Total variation distance, in [0, 1], between one coordinate of the noise and a Gaussian.

    The result is accurate to 1e-10: the crossings of the two densities are found, and the signed
    difference is integrated between them. ``reference`` is "matched" or "paper", as defined in the
    docstring of the module.

    >>> round(tv_exact(16, 4096), 5)
    0.02142
    """
    return _from_increments(lambda gaps: np.abs(gaps).sum() / 2, rank, n, beta2, reference)


def kolmogorov_exact(
    rank: ArrayLike, n: ArrayLike, *, beta2: ArrayLike | None = None, reference: str = "matched"
) -> FloatOrArray:
    """Kolmogorov distance between one coordinate of the noise and a Gaussian, to 1e-10.

    The distance is the largest gap, in [0, 1], between the two distribution functions.
    ``reference`` is as in `tv_exact`.

    >>> round(kolmogorov_exact(16, 4096, beta2=0), 4)
    0.0086
    """
    return _from_increments(lambda gaps: np.abs(np.cumsum(gaps)).max(), rank, n, beta2, reference)


def tv_bound(
    rank: ArrayLike, n: ArrayLike, *, beta2: ArrayLike | None = None, reference: str = "matched"
) -> FloatOrArray:
    """Proved upper bound, at most 1, on the total variation distance of `tv_exact`.

    The bound is the smallest of 1 and two bounds against the matched Gaussian. A Taylor expansion
    along the heat equation is sharp for a coordinate that carries little of q. The replacement of
    the two chi^2 variables by normals, one after the other, is sharp for beta2 near 1. Against the
    "paper" Gaussian, the distance between the two Gaussians is added.

    >>> round(tv_bound(16, 4096), 5)
    0.02529
    """
    r, b2 = integers("rank", rank), squared_cosine(n, beta2)
    choice("reference", reference, REFERENCES)
    beta, rest = np.sqrt(b2), 1 - b2
    with np.errstate(divide="ignore"):
        skew = C3 / 2 * beta * (1 + b2 / 3) / rest**1.5
    taylor = C4 / 8 * log_minus_digamma(r / 2) + skew / np.sqrt(r)
    replace = _per_unique(_chi2_tv, r) + np.sqrt(2) * C3 / 6 * (
        rest / (1 + beta) ** 2
    ) ** 3 / np.sqrt(r)
    bound = np.minimum(taylor, replace)
    if reference == "paper":
        bound = bound + _normal_tv(1 + b2)
    return unwrap(np.minimum(bound, 1.0))


def tv_lower_bound(
    rank: ArrayLike, n: ArrayLike, *, beta2: ArrayLike | None = None
) -> FloatOrArray:
    """Proved lower bound, in [0, 1], on `tv_exact` against the matched Gaussian.

    The bound is half the gap between the characteristic functions of sqrt(rank) u_j / |q| and of
    the Gaussian at 2. The bound stays above zero as n grows: at fixed rank the noise does not
    become Gaussian.

    >>> round(tv_lower_bound(16, 10**6) * 16, 3)
    0.26
    """
    r, b2 = integers("rank", rank), squared_cosine(n, beta2)
    beta, t = np.sqrt(b2), 2.0
    # phi(t) = exp(-i beta t sqrt(r)) [1 + (1 - beta2) t^2/r - 2 i beta t/sqrt(r)]^(-r/2)
    real, imaginary = (1 - b2) * t**2 / r, 2 * beta * t / np.sqrt(r)
    log_modulus = -r / 4 * np.log1p(real * (2 + real) + imaginary**2)
    phase = r / 2 * np.arctan2(imaginary, 1 + real) - beta * t * np.sqrt(r)
    gap = np.exp(log_modulus + 1j * phase) - np.exp(-(1 + b2) * t**2 / 2)
    return unwrap(np.abs(gap) / 2)


def berry_esseen_bound(
    rank: ArrayLike, n: ArrayLike, *, beta2: ArrayLike | None = None
) -> FloatOrArray:
    """Classical Berry-Esseen bound, at most 1, on `kolmogorov_exact` (matched).

    The bound is 0.4690 E|xi|^3 / sqrt(rank), where xi is one of the ``rank`` standardised terms
    whose mean is u_j. The Kolmogorov distance is weaker than total variation. The order of the
    bound is 1/sqrt(rank), because the bound ignores that the third moment nearly vanishes.

    >>> round(berry_esseen_bound(16, 4096, beta2=0), 3)
    0.299
    """
    r, b2 = integers("rank", rank), squared_cosine(n, beta2)
    ratio = _per_unique(_third_moment_ratio, b2)
    return unwrap(np.minimum(BERRY_ESSEEN_CONSTANT * ratio / np.sqrt(r), 1.0))


# --- exact distances -------------------------------------------------------------------------


def _from_increments(
    functional: Callable[[Array], float],
    rank: ArrayLike,
    n: ArrayLike,
    beta2: ArrayLike | None,
    reference: str,
) -> FloatOrArray:
    """Apply ``functional`` to the increments of F - G between the densities' crossings."""
    r, b2 = integers("rank", rank), squared_cosine(n, beta2)
    variance = reference_variance(reference, b2)

    def point(r: float, b2: float, variance: float) -> float:
        if b2 == 1:
            return functional(_chi2_increments(r, variance))
        return functional(_increments(r, b2, variance))

    return unwrap(np.vectorize(point, otypes=[float])(r, b2, variance))


def _increments(r: float, b2: float, variance: float) -> Array:
    """Increments of F - G over panels where f - g keeps its sign; G is N(0, variance/r)."""
    beta, sd = np.sqrt(b2), np.sqrt(variance / r)

    def log_g(y: Array) -> Array:
        return -(((y - beta) / sd) ** 2 + LOG_2PI) / 2 - np.log(sd)

    def log_ratio(y: Array) -> Array:
        return log_density(y, r, b2) - log_g(y)

    def difference(y: Array) -> Array:
        return np.exp(log_density(y, r, b2)) - np.exp(log_g(y))

    edges = _edges(r, b2, sd)
    nodes = panel_nodes(edges[:-1], edges[1:]).ravel()
    above = log_ratio(nodes) > 0
    flips = np.flatnonzero(above[1:] != above[:-1])
    rising = above[flips + 1]
    # the distance is stationary in the crossings, so a modest precision of the roots is ample
    roots = bisect(
        log_ratio,
        np.where(rising, nodes[flips], nodes[flips + 1]),
        np.where(rising, nodes[flips + 1], nodes[flips]),
        iterations=30,
    )
    edges = np.unique(np.concatenate([edges, roots]))
    return panel_integrals(difference, edges[:-1], edges[1:])


def _edges(r: float, b2: float, sd: float) -> Array:
    """Panel edges in y: fine around the mean and, geometrically, around the singular point 0."""
    beta = np.sqrt(b2)
    plus, minus = (1 + beta) / 2, (1 - b2) / (1 + beta) / 2
    low, high = special.chdtri(r, [1 - _TAIL, _TAIL]) / r
    left = min(beta + plus * (low - 1) - minus * (high - 1), beta - _GAUSSIAN_REACH * sd)
    right = max(beta + plus * (high - 1) + minus * (1 - low), beta + _GAUSSIAN_REACH * sd)
    widest = max(beta - left, right - beta) / sd
    t = np.linspace(-np.arcsinh(widest), np.arcsinh(widest), 41)
    # K_nu varies on the scale (1 - beta2)/r; an interval of 1e-16 of this scale holds no mass
    scale = 1e-16 * (1 - b2) / r
    graded = scale * 4.0 ** np.arange(np.ceil(np.log(max(-left, right) / scale) / np.log(4)))
    edges = np.concatenate([[left, right, 0.0], beta + sd * np.sinh(t), graded, -graded])
    return np.unique(edges[(edges >= left) & (edges <= right)])


def _chi2_tv(r: Array) -> Array:
    """Total variation between a standardised chi^2_r variable and N(0, 1)."""
    return np.abs(_chi2_increments(r, 2.0)).sum(axis=0) / 2


def _chi2_increments(r: FloatOrArray, variance: float) -> Array:
    """Increments of F - G between crossings; F is the law of chi^2_r/r - 1, G is N(0, variance/r).

    The ratio of the densities has two stationary points, the roots of a quadratic. So the ratio
    crosses 1 at most three times: before, between and after these points. If r <= 2, the first
    crossing is the end of the support.
    """
    r = np.asarray(r, dtype=np.float64)
    half_gap = np.sqrt((0.5 - variance / 4) ** 2 + variance / r)
    first, second = 0.5 + variance / 4 - half_gap, 0.5 + variance / 4 + half_gap
    sd = np.sqrt(variance / r)

    def log_ratio(s: Array) -> Array:
        return log_mean_square_density(s, r) + ((s - 1) / sd) ** 2 / 2 + LOG_2PI / 2 + np.log(sd)

    zero = np.zeros_like(r)
    crossings = np.stack(
        [
            np.where(r <= 2, 0.0, bisect(log_ratio, zero, np.maximum(first, zero))),
            bisect(log_ratio, second, np.maximum(first, zero)),
            bisect(log_ratio, second, second + 8 * sd),
        ]
    )
    gap = special.gammainc(r / 2, r / 2 * crossings) - special.ndtr((crossings - 1) / sd)
    return np.diff(np.concatenate([zero[None], gap, zero[None]]), axis=0)


def _normal_tv(a: FloatOrArray) -> FloatOrArray:
    """Total variation between N(0, a) and N(0, 1), a >= 1; their densities cross at +-x."""
    excess = np.asarray(a) - 1
    tiny = excess < 1e-300
    safe = np.where(tiny, 1.0, excess)
    x = np.sqrt(np.where(tiny, 1.0, (1 + safe) * np.log1p(safe) / safe))
    return np.where(tiny, 0.0, 2 * (special.ndtr(x) - special.ndtr(x / np.sqrt(a))))


def _third_moment_ratio(beta2: Array) -> Array:
    """E|xi|^3 / (E xi^2)^(3/2) for xi = beta (w^2 - 1) + sqrt(1 - beta2) w z; w and z are normal.

    Given w, xi is normal with a mean m, and E|N(m, t^2)|^3 is elementary. The integral over w uses
    panels that are fine around 0, and around 1, where m = 0.
    """
    b2 = np.asarray(beta2, dtype=np.float64)[:, None]
    graded = 4.0 ** -np.arange(1.0, 14)
    edges = np.unique(
        np.concatenate([[0.0, 1.0], graded, 1 - graded, 1 + graded, np.arange(1.5, 12.1, 0.5)])
    )

    def integrand(w: Array) -> Array:
        # one row per entry of beta2; panels and nodes along the other axes
        b, nodes = b2[..., None], w[None]
        mean, sd = np.sqrt(b) * (nodes**2 - 1), np.sqrt(1 - b) * nodes
        with np.errstate(divide="ignore"):
            m = mean / sd
        third = 2 * sd * (mean**2 + 2 * sd**2) * _phi(m) + mean * (
            mean**2 + 3 * sd**2
        ) * special.erf(m / np.sqrt(2))
        return 2 * third * _phi(nodes)

    return panel_integrals(integrand, edges[:-1], edges[1:]).sum(axis=-1) / (1 + b2[:, 0]) ** 1.5


def _per_unique(function: Callable[[Array], Array], values: Array) -> Array:
    """Apply ``function`` to every entry, evaluating it once per distinct entry."""
    distinct, inverse = np.unique(values, return_inverse=True)
    return function(distinct)[inverse].reshape(np.shape(values))
