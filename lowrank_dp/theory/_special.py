"""Special functions in forms that stay accurate for ranks from 1 to more than 1e6."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import special

from lowrank_dp.theory._arrays import Array

LOG_2PI = np.log(2 * np.pi)
# from this w on, the Debye expansion of K_nu is exact to rounding (see log_bessel_series)
DEBYE_FROM = 25.0
_DEBYE_TERMS = 13
_TAIL_TERMS = 40
_UNDERFLOW = 1e-290


def stirling_defect(a: float | Array) -> Array:
    """Compute a ln a - a - ln Gamma(a) = (1/2) ln(a / 2 pi) - 1/(12 a) + ... stably.

    The terms of the definition are of size a ln a. From a = 10 on, a series gives their small
    difference, which therefore does not lose digits as a grows.
    """
    a = np.asarray(a, dtype=np.float64)
    big = np.maximum(a, 10.0)
    series = _poly(big**-2, [1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188]) / big
    return np.where(
        a < 10, special.xlogy(a, a) - a - special.gammaln(a), (np.log(big) - LOG_2PI) / 2 - series
    )


def log_minus_digamma(a: Array) -> Array:
    """Compute ln a - psi(a) > 0, asymptotically 1/(2 a), without cancellation."""
    a = np.asarray(a, dtype=np.float64)
    big = np.maximum(a, 20.0)
    series = 1 / (2 * big) + _poly(big**-2, [1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132]) / big**2
    return np.where(a < 20, np.log(a) - special.digamma(a), series)


def log_half_step(a: float) -> Array:
    """Compute ln Gamma(a + 1/2) - ln Gamma(a) without cancellation."""
    return (
        a * np.log1p(0.5 / a)
        + np.log(a + 0.5) / 2
        - 0.5
        + stirling_defect(a)
        - stirling_defect(a + 0.5)
    )


def log_mean_square_density(s: Array, rank: float | Array) -> Array:
    """Log-density at s of chi^2_rank / rank: the mean of ``rank`` squared standard normals."""
    a = np.asarray(rank, dtype=np.float64) / 2
    positive = np.where(s < 0, 1.0, s)
    inside = special.xlogy(a - 1, positive) - a * (s - 1) + stirling_defect(a)
    return np.where(s < 0, -np.inf, inside)


def log_bessel_series(w: Array, p2: Array) -> Array:
    """Logarithm of the Debye series of K_nu(z), with w = sqrt(nu^2 + z^2) and p2 = nu^2 / w^2.

    K_nu(z) = sqrt(pi / (2 w)) e^-w ((nu + w) / z)^nu  sum_k (-1/w)^k U_k(p2). In terms of w
    the series covers both large nu and large z, and is exact to rounding for w >= 25.
    """
    total = np.zeros(np.broadcast(w, p2).shape)
    for coefficients in reversed(_DEBYE):
        total = _poly(p2, coefficients) - total / w
    return np.log(total)


def log_chi2_cdf(x: Array, dof: float) -> Array:
    """Logarithm of P(chi^2_dof <= x), also where the probability underflows."""
    a, x = dof / 2, np.asarray(x) / 2
    probability = special.gammainc(a, x)
    return _log_tail(probability, a, x, _lower_fraction)


def log_chi2_survival(x: Array, dof: float) -> Array:
    """Logarithm of P(chi^2_dof > x), also where the probability underflows."""
    a, x = dof / 2, np.asarray(x) / 2
    probability = special.gammaincc(a, x)
    return _log_tail(probability, a, x, _upper_fraction)


def _log_tail(
    probability: Array, a: float, x: Array, fraction: Callable[[float, Array], Array]
) -> Array:
    """Logarithm of ``probability``, by a continued fraction where the probability underflows."""
    # tail = x^a e^-x / Gamma(a) / fraction, with the prefactor expanded around its peak x = a
    with np.errstate(divide="ignore", over="ignore"):
        out = np.log(probability)
        deep = (probability < _UNDERFLOW) & (x > 0)
        x = x[deep]
        out[deep] = a * (np.log(x / a) + 1 - x / a) + stirling_defect(a) - np.log(fraction(a, x))
    return out


def _upper_fraction(a: float, x: Array) -> Array:
    """Legendre's continued fraction of Gamma(a, x); a few terms suffice in a tail this deep."""
    value = x + 2 * _TAIL_TERMS + 1 - a
    for k in range(_TAIL_TERMS, 0, -1):
        value = x + 2 * k - 1 - a - k * (k - a) / value
    return value


def _lower_fraction(a: float, x: Array) -> Array:
    """M-fraction of gamma(a, x)."""
    value = a + _TAIL_TERMS - x
    for k in range(_TAIL_TERMS, 0, -1):
        value = a + k - 1 - x + k * x / value
    return value


def _poly(x: Array, coefficients: list[float]) -> Array:
    """Polynomial by Horner's rule, constant first; numpy's own costs more for short sums."""
    value: Any = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


def _debye_polynomials(count: int) -> list[list[float]]:
    """Coefficients of U_k, where u_k(p) = p^k U_k(p^2) and u_0 = 1, by the recurrence

    u_(k+1)(p) = (1/2) p^2 (1 - p^2) u_k'(p) + (1/8) int_0^p (1 - 5 t^2) u_k(t) dt.
    """
    polynomials = [[1.0]]
    for k in range(count - 1):
        following = [0.0] * (k + 2)
        for i, c in enumerate(polynomials[-1]):
            degree = k + 2 * i
            following[i] += c * (degree / 2 + 1 / (8 * (degree + 1)))
            following[i + 1] -= c * (degree / 2 + 5 / (8 * (degree + 3)))
        polynomials.append(following)
    return polynomials


_DEBYE = _debye_polynomials(_DEBYE_TERMS)
