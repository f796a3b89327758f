r"""Privacy of one vector query q -> A^T A q: the exact profile and its Gaussian reading.

The mechanism releases y = A^T A q, where A of shape (rank, n) has independent N(0, 1/rank) entries
and is drawn for this release; q' is a neighbouring vector. The profile is the hockey-stick
divergence

    delta(epsilon) = sup over events S of  P_q(S) - e^epsilon P_q'(S),

and depends on the pair only through the angle between q and q' and the ratio |q'| / |q|. The
profile is that of one pair in one direction. A claim of (epsilon, delta)-DP must take the supremum
over all neighbours and both directions, which is larger.

The Gaussian reading (arXiv 2409.17538) assumes noise N(0, |q|^2 I / rank) for the pair.

``epsilon`` is finite and >= 0, ``angle`` lies in [0, pi] radians (0 or pi if n is 1), and
``norm_ratio`` = |q'| / |q| lies in [1e-100, 1e100]. Arguments, results and errors are otherwise as
in `lowrank_dp.theory.coordinate`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from lowrank_dp._validate import fail
from lowrank_dp.theory._arrays import Array, FloatOrArray, integers, reals, unwrap
from lowrank_dp.theory._quadrature import integrate
from lowrank_dp.theory._special import log_chi2_cdf, log_chi2_survival, log_half_step

LEAST_RATIO = 1e-100  # smallest ratio of norms; the largest is its inverse
PROFILE_ERROR = 1e-9  # largest error of `privacy_profile`, absolute
_TAIL = 1e-17  # mass of phi that the integral leaves out at each end; the mass is added to delta
# tolerance per panel; at rank 1e6 the integrand itself is rounded at nearly this level
_TOLERANCE = 1e-12
# above this epsilon, e^epsilon times a probability that underflows is not negligible
_HUGE_EPSILON = 600.0


def privacy_profile(
    epsilon: ArrayLike,
    rank: ArrayLike,
    n: ArrayLike,
    *,
    angle: ArrayLike,
    norm_ratio: ArrayLike = 1.0,
) -> FloatOrArray:
    """Exact delta, in [0, 1], of one release of A^T A q against q', to 1e-9 absolute.

    The error is `PROFILE_ERROR`: of a delta below it, the result states no digit. A bound on the
    part that the integral leaves out is added, so the result is not too small because of that part.
    Delta never falls below `privacy_floor`. At fixed rank delta tends to 1 as n grows, and delta is
    not monotone in the rank.

    >>> round(privacy_profile(1.0, 16, 4096, angle=0.1), 3)
    0.184
    >>> privacy_profile(1.0, 16, 4096, angle=0.0)
    0.0
    """
    eps, r, n_ = reals("epsilon", epsilon, low=0), integers("rank", rank), integers("n", n)
    theta, kappa = _pair(angle, norm_ratio)
    impossible = (n_ == 1) & (theta > 0) & (theta < np.pi)
    if impossible.any():
        bad = np.broadcast_to(theta, impossible.shape)[impossible].flat[0]
        fail("angle", "0 or pi when n is 1", float(bad))
    return unwrap(np.vectorize(_profile, otypes=[float])(eps, r, n_, theta, kappa))


def privacy_floor(rank: ArrayLike, *, angle: ArrayLike) -> FloatOrArray:
    """Lower bound on delta at every epsilon, n and norm ratio: P_q(q' . y <= 0), in [0, 1].

    >>> round(privacy_floor(1, angle=0.05), 6)
    0.015915
    """
    r, theta = integers("rank", rank), reals("angle", angle, low=0, high=np.pi)
    half = special.betainc(r / 2, 0.5, np.sin(theta) ** 2) / 2
    return unwrap(np.where(theta <= np.pi / 2, half, 1 - half))


def gaussian_privacy_profile(
    epsilon: ArrayLike, rank: ArrayLike, *, angle: ArrayLike, norm_ratio: ArrayLike = 1.0
) -> FloatOrArray:
    """Delta, in [0, 1], of the Gaussian reading of the query: N(0, 1) against N(mu, 1).

    The mean is mu = sqrt(rank) |q - q'| / |q|. The reading ignores that the variance of the noise
    depends on q.

    >>> round(gaussian_privacy_profile(1.0, 16, angle=0.1), 5)
    0.0013
    """
    eps, r = reals("epsilon", epsilon, low=0), integers("rank", rank)
    theta, kappa = _pair(angle, norm_ratio)
    mu = np.sqrt(r * ((1 - kappa) ** 2 + 4 * kappa * np.sin(theta / 2) ** 2))
    return unwrap(gaussian_delta(*np.broadcast_arrays(eps, mu)))


def gaussian_delta(epsilon: Array, mu: Array) -> Array:
    """Delta at ``epsilon`` of N(0, 1) against N(mu, 1), mu >= 0; both arrays have one shape."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_p = special.log_ndtr(mu / 2 - epsilon / mu)
        log_q = special.log_ndtr(-mu / 2 - epsilon / mu)
        delta = np.exp(log_p) * -np.expm1(np.minimum(epsilon + log_q - log_p, 0.0))
    return np.where((mu > 0) & (log_p > -np.inf), delta, 0.0)


def _pair(angle: ArrayLike, norm_ratio: ArrayLike) -> tuple[Array, Array]:
    return (
        reals("angle", angle, low=0, high=np.pi),
        reals("norm_ratio", norm_ratio, low=LEAST_RATIO, high=1 / LEAST_RATIO),
    )


def _profile(epsilon: float, r: float, n: float, theta: float, kappa: float) -> float:
    """Integral over phi, the angle of y from q in the plane of q and q'.

    phi has density cos(phi)^(r-1) / Z, and V = r |y|^2 / (q . y) is chi^2_(r+n-1), independent of
    phi. With c = cos(phi - theta) / cos(phi) = (q' . y) / (q . y) / kappa, the same holds for q'
    with phi - theta and V / (kappa c).
    """
    if theta == 0:
        return float(_excess_given_angle(np.zeros(1), epsilon, r, n, kappa)[0])
    floor = float(privacy_floor(r, angle=theta))
    # sqrt(r) tan(phi) is Student t_r under q, and the integrand is at most the density of phi
    reach = float(np.arctan(-special.stdtrit(r, _TAIL) / np.sqrt(r)))
    low, high = max(theta - np.pi / 2, -reach), reach
    omitted = (1 + (low == -reach)) * _TAIL  # the floor holds the mass below theta - pi/2
    if low >= high:
        return min(floor + omitted, 1.0)
    log_z = np.log(np.pi) / 2 - log_half_step(r / 2)

    def excess(phi: Array) -> Array:
        cos = np.cos(phi)
        less_one = np.sin(theta) * np.tan(phi) - 2 * np.sin(theta / 2) ** 2  # c - 1
        near = np.abs(less_one) < 0.5
        log_c = np.where(
            near,
            np.log1p(np.where(near, less_one, 0.0)),
            np.log(np.maximum(np.cos(phi - theta), 1e-300) / cos),
        )
        density = np.exp((r - 1) * np.log(cos) - log_z)
        return density * _excess_given_angle(log_c, epsilon, r, n, kappa)

    # c tends to 0 and infinity within theta of +-pi/2, and for a small epsilon the integrand has a
    # narrow notch where kappa c = 1: all of these get geometric panels
    marks = np.concatenate([[low, high], _turning_angles(epsilon, r, n, theta, kappa)])
    graded = (high - low) * 4.0 ** -np.arange(2.0, 25)
    edges = np.concatenate(
        [np.linspace(low, high, 33), marks, np.add.outer(marks, [graded, -graded]).ravel()]
    )
    edges = np.unique(edges[(edges >= low) & (edges <= high)])
    inside = max(integrate(excess, edges, _TOLERANCE), 0.0)
    return min(floor + inside + omitted, 1.0)


def _turning_angles(epsilon: float, r: float, n: float, theta: float, kappa: float) -> Array:
    """Angles at which the integrand is not smooth: kappa c = 1, and a threshold of 0 on V."""
    log_c = [-np.log(kappa)]
    with np.errstate(over="ignore"):
        if r != n + 1:
            log_c.append(2 * ((r - 1) * np.log(kappa) - epsilon) / (r - n - 1) - np.log(kappa))
        # tan(phi) = (c - cos(theta)) / sin(theta)
        tangent = np.expm1(np.array(log_c)) / np.sin(theta) + np.tan(theta / 2)
    return np.arctan(tangent)


def _excess_given_angle(log_c: Array, epsilon: float, r: float, n: float, kappa: float) -> Array:
    """P(L > epsilon | phi) - e^epsilon c^(r-1) P'(L > epsilon | phi), in [0, 1].

    L = (r-1) ln kappa - (r-n-1)/2 ln(kappa c) - V/2 (1 - 1/(kappa c)) is the privacy loss.
    """
    dof = r + n - 1
    ell = log_c + np.log(kappa)
    ell = np.where(ell == 0, 1e-300, ell)  # at kappa c = 1 either one-sided limit is right
    with np.errstate(divide="ignore", over="ignore"):
        slope = -np.expm1(-ell)  # 1 - 1/(kappa c)
        v = 2 * ((r - 1) * np.log(kappa) - (r - n - 1) / 2 * ell - epsilon) / slope
        v = np.clip(v, 0.0, 1e250)
        other = np.clip(v * np.exp(-ell), 0.0, 1e250)
    below = ell > 0  # L > epsilon means V < v here, and V > v elsewhere
    p, log_other = np.empty_like(v), np.empty_like(v)
    p[below] = special.gammainc(dof / 2, v[below] / 2)
    p[~below] = special.gammaincc(dof / 2, v[~below] / 2)
    if epsilon > _HUGE_EPSILON:
        log_other[below] = log_chi2_cdf(other[below], dof)
        log_other[~below] = log_chi2_survival(other[~below], dof)
    else:
        with np.errstate(divide="ignore"):
            log_other[below] = np.log(special.gammainc(dof / 2, other[below] / 2))
            log_other[~below] = np.log(special.gammaincc(dof / 2, other[~below] / 2))
    # the second term never exceeds the first, but rounding of the exponent can make it so
    exponent = np.minimum(epsilon + (r - 1) * log_c + log_other, 0.0)
    return np.maximum(p - np.exp(exponent), 0.0)
