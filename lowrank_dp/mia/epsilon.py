"""Lower bounds on epsilon from the outcome of a membership attack.

Each bound holds with probability ``confidence`` in (0, 1), if the attack was fixed before anyone
looked at the records that are counted. Every function raises ValueError for a bad argument.
``delta`` is in [0, 1). n1 is the number of members, n0 the number of non-members.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

from lowrank_dp._validate import integer, real
from lowrank_dp.mia._arrays import (
    Array,
    boolean_array,
    both_sides,
    confidence_level,
    real_array,
)
from lowrank_dp.mia.intervals import lower_bound, upper_bound


@dataclass(frozen=True)
class SplitEpsilon:
    """Lower bound on epsilon by a threshold chosen on one half of the records.

    Attributes:
        epsilon: the bound, >= 0.
        threshold: a record is called a member if its score is strictly above.
        tp, num_members, fp, num_nonmembers: counts on the other half, from which the bound is
            computed.
    """

    epsilon: float
    threshold: float
    tp: int
    num_members: int
    fp: int
    num_nonmembers: int


def epsilon_lower_bound(
    tp: int,
    num_members: int,
    fp: int,
    num_nonmembers: int,
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
) -> float:
    """Bound epsilon from below by the rates of a test that was fixed beforehand.

    The test called ``tp`` of ``num_members`` members, and ``fp`` of ``num_nonmembers`` non-members,
    members. The bound is

        max(0, ln((TPR_low - delta) / FPR_high), ln((1 - FPR_high - delta) / (1 - TPR_low))),

    where Clopper-Pearson bounds each rate at the tail (1 - confidence) / 2 (Kairouz et al. 2015;
    Jagielski et al. 2020, arXiv 2006.07709; Nasr et al. 2021, arXiv 2101.04535). If the threshold
    was chosen on the records that are counted, the bound is invalid: see `split_epsilon`.

    >>> round(epsilon_lower_bound(90, 100, 10, 100), 4)
    1.5422
    """
    num_members = integer("num_members", num_members)
    num_nonmembers = integer("num_nonmembers", num_nonmembers)
    bound = _log_likelihood_bound(
        integer("tp", tp, low=0, high=num_members),
        num_members,
        integer("fp", fp, low=0, high=num_nonmembers),
        num_nonmembers,
        _delta(delta),
        confidence_level(confidence),
    )
    return max(0.0, float(bound))


def split_epsilon(
    scores: ArrayLike,
    is_member: ArrayLike,
    generator: np.random.Generator,
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
) -> SplitEpsilon:
    """Bound epsilon from below by `epsilon_lower_bound` with a valid threshold.

    ``generator`` splits members and non-members (at least 2 of each) into random halves. The
    threshold is the score with the highest bound on the first half; the bound is computed from
    the second half alone.
    """
    members, others = (
        generator.permutation(side) for side in both_sides(scores, is_member, at_least=2)
    )
    half1, half0 = len(members) // 2, len(others) // 2
    cut = np.unique(np.concatenate([members[:half1], others[:half0]]))
    bounds = _log_likelihood_bound(
        _counts_above(members[:half1], cut),
        half1,
        _counts_above(others[:half0], cut),
        half0,
        _delta(delta),
        confidence_level(confidence),
    )
    threshold = float(cut[np.argmax(bounds)])
    members, others = members[half1:], others[half0:]
    tp, fp = int((members > threshold).sum()), int((others > threshold).sum())
    epsilon = epsilon_lower_bound(
        tp, len(members), fp, len(others), delta=delta, confidence=confidence
    )
    return SplitEpsilon(epsilon, threshold, tp, len(members), fp, len(others))


def _counts_above(values: Array, cut: Array) -> Array:
    """Count, for each entry of ``cut``, the ``values`` strictly above."""
    return len(values) - np.searchsorted(np.sort(values), cut, side="right").astype(np.float64)


def _log_likelihood_bound(
    tp: ArrayLike, n1: int, fp: ArrayLike, n0: int, delta: float, confidence: float
) -> Array:
    """Compute `epsilon_lower_bound` before the maximum with 0; counts may be arrays."""
    tail = (1 - confidence) / 2
    tpr_low, fpr_high = lower_bound(tp, n1, tail), upper_bound(fp, n0, tail)
    tnr_low = lower_bound(n0 - np.asarray(fp), n0, tail)
    fnr_high = upper_bound(n1 - np.asarray(tp), n1, tail)
    with np.errstate(divide="ignore"):
        return np.maximum(
            np.log(np.maximum(tpr_low - delta, 0) / fpr_high),
            np.log(np.maximum(tnr_low - delta, 0) / fnr_high),
        )


# --- one training run ------------------------------------------------------------------------


def one_run_correct(
    scores: ArrayLike, is_member: ArrayLike, num_guesses: int, generator: np.random.Generator
) -> int:
    """Count how many of ``num_guesses`` guesses are right, for `one_run_epsilon`.

    Half of the guesses (rounded up) call the records of the highest scores members; the other half
    call those of the lowest scores non-members. The attacker abstains on the rest. ``generator``
    breaks ties, so that the order of the records reveals nothing. ``num_guesses`` must be fixed
    before the scores are seen.
    """
    values = real_array("scores", scores, finite=False)
    truth = boolean_array("is_member", is_member, values.shape)
    num_guesses = integer("num_guesses", num_guesses, high=len(values))
    order = np.lexsort((generator.random(len(values)), values))
    low = num_guesses // 2
    high = num_guesses - low
    return int(np.count_nonzero(~truth[order[:low]]) + np.count_nonzero(truth[order[-high:]]))


def one_run_epsilon(
    num_examples: int,
    num_guesses: int,
    num_correct: int,
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
) -> float:
    """Bound epsilon from below by one training run (arXiv 2305.08846, Theorem 5.2).

    Each of ``num_examples`` = m records was a member with probability 1/2, independently (a half of
    fixed size does not satisfy this), and ``num_correct`` = v of ``num_guesses`` = r guesses were
    right, with r fixed beforehand. If the training is (epsilon, delta)-DP, then v or more guesses
    are right with probability at most

        p(epsilon) = P[B >= v] + 2 m delta max_{1 <= i <= v} P[v > B >= v - i] / i,

    where B ~ Binomial(r, 1 / (1 + exp(-epsilon))). The bound, >= 0, is the epsilon at which p
    equals 1 - ``confidence``.

    >>> round(one_run_epsilon(1000, 100, 75, delta=1e-4), 3)        # Appendix D of the paper
    0.673
    """
    m = integer("num_examples", num_examples)
    r = integer("num_guesses", num_guesses, high=m)
    v = integer("num_correct", num_correct, low=0, high=r)
    delta, level = _delta(delta), 1 - confidence_level(confidence)
    # the Clopper-Pearson bound solves P[B >= v] = level; the term in delta only lowers epsilon
    pure = float(special.logit(lower_bound(v, r, level)))

    def excess(epsilon: float) -> float:
        return _one_run_p_value(m, r, v, epsilon, delta) - level

    if pure <= 0 or excess(0.0) >= 0:
        return 0.0
    if delta == 0 or excess(pure) <= 0:
        return pure
    return float(optimize.brentq(excess, 0.0, pure, xtol=1e-12))


def _one_run_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Compute p(epsilon) of `one_run_epsilon`."""
    q = special.expit(epsilon)
    p_value = stats.binom.sf(v - 1, r, q)
    if delta > 0 and v > 0:
        below = np.cumsum(stats.binom.pmf(np.arange(v - 1, -1, -1), r, q))
        p_value += 2 * m * delta * (below / np.arange(1, v + 1)).max()
    return float(p_value)


def _delta(value: float) -> float:
    return real("delta", value, low=0, high=1, high_open=True)
