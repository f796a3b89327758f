r"""Epsilon of repeated vector queries q -> A^T A q, each with a fresh A.

`projection_epsilon` computes epsilon from the exact law of `lowrank_dp.theory.privacy` for one pair
of neighbouring vectors. `hu_guarantee` computes the epsilon of theorem 1 of Hu et al. (arXiv
2601.21719) for the same pair. Neither result covers

* an A that several steps share, such as a frozen A: two released vectors are then a matrix query,
  whose delta is 1 (`lowrank_dp.theory.matrix`);
* a matrix of two or more rows that share A, for the same reason;
* pairs without a bound on the angle and on the ratio of norms: delta tends to 1 as the angle grows.

Arguments and errors are otherwise as in `lowrank_dp.theory.privacy`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from lowrank_dp._validate import fail, integer, real
from lowrank_dp.theory._arrays import MOST, Array, FloatOrArray, integers, reals, unwrap
from lowrank_dp.theory.privacy import LEAST_RATIO, PROFILE_ERROR, privacy_floor, privacy_profile

_CELLS = 50  # equal intervals of the grid, up to the epsilon half-way to the profile's floor
_GROWTH = 1.02  # ratio of successive grid points beyond these intervals
_MOST_CELLS = 100_000  # largest number of intervals; a longer grid gets wider intervals
_MOST = 1e4  # a larger epsilon is reported as infinite
# smallest delta per step; the error of a computed delta is at most a tenth of it
_SMALLEST = 1e-8


def projection_epsilon(
    delta: float, rank: int, n: int, *, angle: float, norm_ratio: float = 1.0, steps: int = 1
) -> float:
    """Epsilon of ``steps`` releases of A^T A q, each with a fresh A, for one pair (q, q').

    The pair of a step may depend on earlier releases, as long as its angle is ``angle`` and its
    ratio of norms is ``norm_ratio``. In all computed cases, a smaller angle has a smaller delta at
    every epsilon; this property is not proved. The function returns the larger epsilon of the two
    directions, or infinity if the computed epsilon exceeds 1e4.

    For one step, the result is the inverse of `privacy_profile`. For several steps, the result is
    an upper bound: the numerical error is added to the profile, the privacy loss is discretised by
    connecting the dots of the profile, and dp-accounting composes the losses. A smaller ``delta``
    than ``1e-8 * steps`` is refused: `privacy_profile` is exact to 1e-9 only.

    Args:
        delta: delta of the guarantee, in [1e-8 * steps, 1).
        rank: number of rows of A, in [1, 1e12].
        n: length of q, in [1, 1e12].
        angle: angle between q and q', in radians, in [0, pi].
        norm_ratio: |q'| / |q|, in [1e-100, 1e100].
        steps: number of releases, >= 1.

    Raises:
        ValueError: for an argument out of its range.

    Source of the discretisation: Doroshenko et al., PoPETs 2022(4).

    >>> round(projection_epsilon(3e-3, 16, 768, angle=0.01), 3)
    0.107
    >>> round(projection_epsilon(1e-5, 16, 768, angle=0.01, steps=100), 2)
    2.88
    """
    delta = real("delta", delta, low=0, high=1, low_open=True, high_open=True)
    steps = integer("steps", steps)
    if delta < _SMALLEST * steps:
        fail("delta", f">= {_SMALLEST * steps:g} for {steps} step{'s' * (steps > 1)}", delta)
    rank, n = integer("rank", rank, high=MOST), integer("n", n, high=MOST)
    ratio_ = real("norm_ratio", norm_ratio, low=LEAST_RATIO, high=1 / LEAST_RATIO)
    angle = real("angle", angle, low=0, high=np.pi)
    profiles = [
        lambda epsilon, ratio=ratio: float(
            privacy_profile(epsilon, rank, n, angle=angle, norm_ratio=ratio)
        )
        for ratio in {ratio_, 1 / ratio_}
    ]
    if max(profile(0.0) for profile in profiles) == 0:
        return 0.0
    if steps == 1:
        return max(_inverse(profile, delta) for profile in profiles)
    return _composed(
        profiles[0], profiles[-1], delta, steps, float(privacy_floor(rank, angle=angle))
    )


def hu_guarantee(
    rank: ArrayLike, n: ArrayLike, *, angle: ArrayLike, tail: ArrayLike
) -> tuple[FloatOrArray, FloatOrArray]:
    """Epsilon and delta of one release by theorem 1 of Hu et al. (arXiv 2601.21719).

    The formula is taken from a summary of the theorem; the text of the paper was not available. Let
    rho = cos(angle). Let t be the quantile of the Student distribution of ``rank`` degrees of
    freedom, and kappa the quantile of the chi^2 distribution of ``rank + n - 1`` degrees, both
    exceeded with probability ``tail``. Let K = sin(angle) t / sqrt(rank). Then

        epsilon = (n + rank - 1) / 2 ln(rho + K) + (1 - rho + K) kappa / (2 (rho - K)),
        delta = E Phi(-rho sqrt(x) / sin(angle)) + 3 tail,  x ~ chi^2_rank.

    Epsilon is infinite where K >= rho, and delta is at most 1. The arguments are broadcast against
    each other.

    Args:
        rank: number of rows of A, in [1, 1e12].
        n: length of q, in [1, 1e12].
        angle: largest angle between neighbouring vectors, in radians, in [0, pi/2).
        tail: delta' of the theorem, in (0, 1/3).

    Raises:
        ValueError: for an argument out of its range.

    >>> epsilon, delta = hu_guarantee(16, 768, angle=0.01, tail=1e-3)
    >>> round(epsilon, 2), round(delta, 6)
    (7.83, 0.003)
    """
    r, n_ = integers("rank", rank), integers("n", n)
    theta = reals("angle", angle, low=0, high=np.pi / 2, high_open=True)
    tail_ = reals("tail", tail, low=0, high=1 / 3, low_open=True, high_open=True)
    rho = np.cos(theta)
    k = np.sin(theta) * -special.stdtrit(r, tail_) / np.sqrt(r)
    kappa = special.chdtri(r + n_ - 1, tail_)
    with np.errstate(divide="ignore", invalid="ignore"):
        epsilon = (n_ + r - 1) / 2 * np.log(rho + k) + (1 - rho + k) * kappa / (2 * (rho - k))
    delta = np.minimum(privacy_floor(r, angle=theta) + 3 * tail_, 1.0)
    return unwrap(np.where(k < rho, epsilon, np.inf)), unwrap(np.broadcast_to(delta, epsilon.shape))


def _inverse(profile: Callable[[float], float], delta: float) -> float:
    """Return the smallest epsilon in [0, 1e4] at which the profile is at most ``delta``, or inf."""
    if profile(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while profile(high) > delta:
        if high == _MOST:
            return float("inf")
        low, high = high, min(2 * high, _MOST)
    return float(optimize.brentq(lambda epsilon: profile(epsilon) - delta, low, high))


def _places(last: float) -> Array:
    """Return increasing integers from 0 to at least ``last``; their spacing grows."""
    count = int(np.ceil(np.log(max(last, 2.0)) / np.log(_GROWTH)))
    return np.unique(np.concatenate([[0], np.ceil(_GROWTH ** np.arange(count + 1))])).astype(int)


def _composed(
    forward: Callable[[float], float],
    backward: Callable[[float], float],
    delta: float,
    steps: int,
    floor: float,
) -> float:
    """Return the epsilon of ``steps`` releases of a pair with these profiles, one per direction."""
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    def exceeds(mass: float) -> bool:
        """Whether an infinite loss of probability ``mass`` per step alone exceeds ``delta``."""
        return 1 - (1 - mass) ** steps >= delta

    if exceeds(floor):
        return float("inf")
    half = max(_inverse(profile, (profile(0.0) + floor) / 2) for profile in (forward, backward))
    half = largest = min(half, _MOST)
    # losses beyond the largest dot count as infinite
    least = floor + 1e-3 * delta / steps
    while largest < _MOST and max(forward(largest), backward(largest)) > least:
        largest *= 1.5
    if exceeds(max(forward(largest), backward(largest))):
        return float("inf")
    interval = max(half / _CELLS, largest / _MOST_CELLS)
    places = _places(largest / interval)
    grid = interval * places
    # the error of the computed profiles is added, so that the composed epsilon is an upper bound
    deltas = [
        np.array([profile(one) for one in grid]) + PROFILE_ERROR for profile in (forward, backward)
    ]

    def distribution(ahead: Array, reverse: Array) -> pld_pmf.PLDPmf:
        # H_(e^-x)(P | Q) = 1 - e^-x + e^-x H_(e^x)(Q | P)
        negative = 1 - np.exp(-grid[:0:-1]) * (1 - reverse[:0:-1])
        both = np.minimum(np.concatenate([negative, ahead]), 1.0)
        return pld_pmf.create_pmf_pessimistic_connect_dots(
            interval,
            np.concatenate([-places[:0:-1], places]),
            np.minimum.accumulate(both),
        )

    composed = PrivacyLossDistribution(
        distribution(*deltas), distribution(*deltas[::-1])
    ).self_compose(steps)
    # dp-accounting's own inverse overflows above an epsilon of 700
    return _inverse(lambda epsilon: float(composed.get_delta_for_epsilon(epsilon)), delta)
