"""Density of one coordinate of the noise, stable at every rank.

The density is a Bessel function K_nu. Three forms of the density cover all arguments: a gamma
density at beta2 = 1, scipy's scaled K_nu, and the Debye expansion of K_nu where order or argument
is large. Notation: r is the rank, b2 = beta2, rest = 1 - beta2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from lowrank_dp.theory._arrays import Array
from lowrank_dp.theory._special import (
    DEBYE_FROM,
    LOG_2PI,
    log_bessel_series,
    log_mean_square_density,
    stirling_defect,
)


def log_density(y: Array, rank: ArrayLike, beta2: ArrayLike) -> Array:
    """Log-density of u_j / |q| at y - beta.

    The argument is y, not y - beta, so that the singular point y = 0 is exact.
    """
    y, r, b2 = np.broadcast_arrays(np.asarray(y), np.asarray(rank, dtype=float), np.asarray(beta2))
    out = np.empty(y.shape)
    gamma = b2 == 1
    # w = sqrt(nu^2 + z^2) for the order nu = (r-1)/2 and the argument z = r|y|/rest of K_nu
    with np.errstate(divide="ignore", invalid="ignore"):
        w = np.hypot((r - 1) / 2, r * y / (1 - b2))
    debye = ~gamma & (w >= DEBYE_FROM)
    bessel = ~gamma & ~debye
    out[gamma] = log_mean_square_density(y[gamma], r[gamma])
    out[debye] = _log_density_debye(y[debye], r[debye], b2[debye], w[debye])
    out[bessel] = _log_density_bessel(y[bessel], r[bessel], b2[bessel])
    return out


def _log_density_bessel(y: Array, r: Array, b2: Array) -> Array:
    r"""Log-density by scipy's scaled K_nu:

    ln[ 2 (r/2)^(r/2) / Gamma(r/2) sqrt(r / (2 pi rest)) e^(r beta y/rest) |y|^nu K_nu(z) ].
    """
    beta, rest, nu = np.sqrt(b2), 1 - b2, (r - 1) / 2
    z = r * np.abs(y) / rest
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = special.kve(nu, z)
        # where kve overflows, z^nu K_nu(z) is at its limit Gamma(nu) 2^(nu-1) for small z
        log_zk = np.where(
            np.isinf(scaled),
            special.gammaln(nu) + (nu - 1) * np.log(2),
            special.xlogy(nu, z) + np.log(scaled),
        )
    # z - r beta y/rest, without cancellation for y > 0
    exponent = r * np.abs(y) * np.where(y > 0, 1 / (1 + beta), (1 + beta) / rest)
    return (
        np.log(2)
        + stirling_defect(r / 2)
        + r / 2
        - (LOG_2PI + np.log(rest / r)) / 2
        + nu * np.log(rest / r)
        + log_zk
        - exponent
    )


def _log_density_debye(y: Array, r: Array, b2: Array, w: Array) -> Array:
    """Log-density by the expansion of K_nu, its large terms combined so as not to cancel."""
    beta, rest, h = np.sqrt(b2), 1 - b2, (r - 1) / (2 * r)
    x, s = y - beta, w * rest / r
    # the exponent is r [1/2 - ratio] + nu ln(h rest + s), where ratio = (s - beta y) / rest
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(y >= 0, (y**2 + h**2 * rest) / (beta * y + s), (s - beta * y) / rest)
    # Where the mass is, x is of order 1/sqrt(r) and both terms nearly vanish. Both terms are there
    # expressed by their difference from x = 0, h = 1/2, where s = (1 + beta2)/2.
    central = np.abs(x) < 0.5
    quarter_less_h2 = (1 - 0.5 / r) / (2 * r)
    s_excess = (2 * beta * x + x**2 - quarter_less_h2 * rest**2) / (s + (1 + b2) / 2)
    half_less_ratio = (s_excess + 2 * quarter_less_h2 * rest - 3 * beta * x - 2 * x**2) / (
        2 * np.where(central, beta * y + s, 1.0)
    )
    exponent = r * np.where(central, half_less_ratio, 0.5 - ratio)
    log_sum = np.where(
        central, np.log1p(np.where(central, s_excess - rest / (2 * r), 0.0)), np.log(h * rest + s)
    )
    p2 = ((r - 1) / 2 / w) ** 2
    return (
        stirling_defect(r / 2)
        + exponent
        + (r - 1) / 2 * log_sum
        - np.log(s) / 2
        + log_bessel_series(w, p2)
    )
