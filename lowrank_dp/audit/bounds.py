"""Lower bounds on the epsilon of a run of the subsampled Gaussian mechanism.

A step adds noise N(0, (sigma C)^2) to sums that one unit moves by at most C. For a unit that takes
part, the step is mu-GDP (Gaussian differential privacy) with mu = 1 / sigma. The functions of this
module give lower bounds on mu. :func:`run_epsilon` turns mu into the epsilon of all steps with
Poisson sampling. For a correct run, the bound exceeds the accountant's epsilon with probability at
most 1 - confidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from lowrank_dp import accounting
from lowrank_dp._validate import fail, integer, real
from lowrank_dp.mia.intervals import lower_bound


@dataclass(frozen=True)
class LowerBound:
    """Lower bound on epsilon.

    Attributes:
        method: the method, in words.
        epsilon: the bound, >= 0; infinite if no finite epsilon agrees with the measurements.
        judged: whether the verdict of the audit depends on this bound; fixed before the run.
    """

    method: str
    epsilon: float
    judged: bool = True


def run_epsilon(mu: float, sample_rate: float, steps: int, delta: float) -> float:
    """Return epsilon at ``delta`` of ``steps`` Poisson-sampled steps that are each ``mu``-GDP.

    ``mu`` >= 0 is the sensitivity divided by the standard deviation of the noise; ``mu`` is
    infinite without noise. :func:`lowrank_dp.accounting.bound` computes epsilon, which does not
    decrease in ``mu`` or ``sample_rate``.
    """
    if mu <= 0 or sample_rate <= 0:
        return 0.0
    if math.isinf(mu):
        return math.inf
    return accounting.bound(1 / mu, min(sample_rate, 1.0), steps, delta).epsilon


def law_bound(
    squares: ArrayLike,
    entries: ArrayLike,
    contribution: ArrayLike,
    noise_multiplier: float,
    tail: float,
) -> float:
    """Lower bound on mu from the measured noise variance of each tensor, for Gaussian noise.

    The most powerful test between a sum with and without a contribution is the likelihood-ratio
    test. Let the noise have standard deviation s_l sigma C in tensor l, and the contribution the
    norm a_l C. The test then has the power of mu = sqrt(sum_l (a_l / s_l)^2) / sigma. The function
    returns the larger of two lower bounds on this mu:

    - mu with an upper limit in place of each s_l^2. The limit is ``squares[l]`` divided by the
      quantile ``tail / 2L`` of the chi-squared distribution.
    - sum_l a_l^2 / sqrt(w) / sigma with an upper limit, at ``tail / 2``, of w = sum_l a_l^2 s_l^2.
      By Jensen's inequality, the value at w itself is at most mu. The limit of w is lemma 1 of
      Laurent & Massart (2000), with variances bounded by the limits above. This bound is sharper
      where tensors are small.

    Args:
        squares: (L,) sum of the squares of the noise in each tensor, in units of (sigma C)^2.
        entries: (L,) number of squares in each sum, over all steps.
        contribution: (L,) norm of one unit's contribution in each tensor, relative to C.
        noise_multiplier: sigma > 0 that is claimed, relative to C.
        tail: largest probability, in (0, 1), that the bound exceeds the true mu, if
            ``contribution`` is exact.

    Returns:
        The bound, >= 0; infinite if there is a contribution to a tensor without noise.

    Raises:
        ValueError: if an argument is out of range.
    """
    tail = real("tail", tail, low=0, high=1, low_open=True, high_open=True)
    noise_multiplier = real("noise_multiplier", noise_multiplier, low=0, low_open=True)
    squares, entries, part = (
        np.atleast_1d(np.asarray(x, dtype=float)) for x in (squares, entries, contribution)
    )
    if not squares.shape == entries.shape == part.shape or squares.ndim != 1:
        raise ValueError(
            "squares, entries and contribution must have one shape (L,), got "
            f"{squares.shape}, {entries.shape} and {part.shape}"
        )
    for name, values, least in (
        ("squares", squares, 0),
        ("entries", entries, 1),
        ("contribution", part, 0),
    ):
        if not values.size or not (np.isfinite(values) & (values >= least)).all():
            fail(name, f"a non-empty array of finite numbers >= {least}", values)
    highest = squares / stats.chi2.ppf(tail / 2 / len(squares), entries)
    with np.errstate(divide="ignore", invalid="ignore"):
        by_tensor = np.where(part > 0, part**2 / highest, 0.0).sum()
        seen = (part**2 * squares / entries).sum()
        spread = ((part**2 * highest) ** 2 / entries).sum()
        together = (part**2).sum() ** 2 / (seen + 2 * math.sqrt(spread * math.log(2 / tail)))
    return float(np.sqrt(np.fmax(by_tensor, together))) / noise_multiplier


def threshold_bound(tp: int, num_in: int, fp: int, num_out: int, tail: float) -> float:
    """Lower bound on mu from the true and false positive rates of a test.

    A mu-GDP step satisfies Phi^-1(TPR) - Phi^-1(FPR) <= mu for every test that is fixed before
    the trials. The bound takes a Clopper-Pearson limit of each rate, at ``tail / 2`` (Nasr et al.
    2023, arXiv 2302.07956). If mu differs between trials, the bound holds for the largest mu:
    trade-off curves of Gaussians are convex, and binomial limits hold for the mean rate of
    independent trials (Hoeffding 1956).

    Args:
        tp, num_in: true positives, and number of trials with the canary.
        fp, num_out: false positives, and number of trials without the canary.
        tail: largest probability, in (0, 1), that the bound exceeds the true mu.

    Returns:
        The bound, >= 0; 0 if there is no trial with, or no trial without, the canary.

    Raises:
        ValueError: if an argument is out of range.

    >>> round(threshold_bound(95, 100, 5, 100, 0.05), 2)
    2.42
    """
    tail = real("tail", tail, low=0, high=1, low_open=True, high_open=True)
    num_in, num_out = integer("num_in", num_in, low=0), integer("num_out", num_out, low=0)
    tp = integer("tp", tp, low=0, high=num_in)
    fp = integer("fp", fp, low=0, high=num_out)
    if not num_in or not num_out:
        return 0.0
    least = lower_bound(tp, num_in, tail / 2), lower_bound(num_out - fp, num_out, tail / 2)
    return max(0.0, float(special.ndtri(least[0]) + special.ndtri(least[1])))


def rate_bound(taken: int, trials: int, tail: float) -> float:
    """Lower Clopper-Pearson limit of the sampling rate, at confidence 1 - ``tail``.

    A trial is a pair of a unit and a step. In ``taken`` of ``trials`` trials, the sample of the
    step contained the unit.
    """
    return float(lower_bound(taken, trials, tail))


def run_log_ratio(values: ArrayLike, shifts: ArrayLike, sample_rate: float) -> np.ndarray:
    """Log-likelihood ratio of runs with a canary to runs without, under the claimed law.

    In each step, the canary takes part with probability ``sample_rate``. The value of the step is
    N(s, 1) if the canary takes part, and N(0, 1) otherwise.

    Args:
        values: (..., T) component of each released sum along the canary's gradient, minus the
            component of the other rows, in units of sigma C.
        shifts: (..., T) norm s of the canary's contribution, in units of sigma C.
        sample_rate: q in (0, 1] that is claimed.

    Returns:
        The log-likelihood ratio (...) of each run.
    """
    x, s = np.asarray(values, dtype=float), np.asarray(shifts, dtype=float)
    with np.errstate(divide="ignore"):
        out = np.log1p(-sample_rate)
    return np.logaddexp(out, math.log(sample_rate) + x * s - s**2 / 2).sum(-1)
