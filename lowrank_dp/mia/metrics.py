r"""Metrics of an attack, with confidence intervals: AUC, TPR at a given FPR, ROC curve.

``scores`` is (N,), higher for a member. Only the order of the scores counts: infinities are
allowed, NaN is not. ``is_member`` is (N,) booleans; n1 is the number of members, n0 the number of
non-members. No score is ever negated: a score that ranks the wrong way has an AUC below 1/2.
``confidence`` is in (0, 1). Every function raises ValueError for a bad argument and for a sample
that is too small.

Lower bounds on epsilon are in :mod:`~lowrank_dp.mia.epsilon` and the interval of a proportion is
in :mod:`~lowrank_dp.mia.intervals`; their names can be imported from this module as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from lowrank_dp._validate import real
from lowrank_dp.mia._arrays import Array, both_sides, confidence_level
from lowrank_dp.mia.epsilon import (
    SplitEpsilon,
    epsilon_lower_bound,
    one_run_correct,
    one_run_epsilon,
    split_epsilon,
)
from lowrank_dp.mia.intervals import Interval, clopper_pearson

__all__ = [
    "Auc",
    "AucDifference",
    "Interval",
    "Roc",
    "SplitEpsilon",
    "TprAtFpr",
    "allowed_false_positives",
    "auc",
    "chance_variance",
    "clopper_pearson",
    "epsilon_lower_bound",
    "largest_tie",
    "one_run_correct",
    "one_run_epsilon",
    "paired_auc_difference",
    "roc_points",
    "split_epsilon",
    "tie_share",
    "tpr_at_fpr",
]


# --- AUC -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Auc:
    """Area under the ROC curve.

    Attributes:
        value: the AUC, in [0, 1].
        se: DeLong's standard error, enlarged under ties.
        ci: confidence interval (low, high), computed on the logit scale.
    """

    value: float
    se: float
    ci: Interval


@dataclass(frozen=True)
class AucDifference:
    """AUC of a minus AUC of b on the same records, with standard error and two-sided p-value."""

    difference: float
    se: float
    p_value: float


def auc(scores: ArrayLike, is_member: ArrayLike, *, confidence: float = 0.95) -> Auc:
    """Compute P(member's score > non-member's) + P(equal) / 2, with DeLong's standard error.

    The variance is that of DeLong, DeLong & Clarke-Pearson (Biometrics 44, 1988), computed from
    midranks (Sun & Xu 2014) in O(N log N). At an AUC of 0 or 1 the interval is the Clopper-Pearson
    interval of min(n0, n1) trials with no success, or with successes only. n0 and n1 must be at
    least 2.

    If most scores are equal, DeLong's variance is estimated from the few other records, and is 0 if
    all scores are equal. With the share T of `tie_share`, the variance V is therefore enlarged to
    V + T max(0, C - V) + T / min(n0, n1)^2. C is the exact variance under the given ties if
    all orders of the records are equally likely. The last term is that of four more records, as
    in the interval of Agresti & Coull (1998): a record without an equal adds up to
    1 / (4 min(n0, n1)^2). Without ties nothing is added. If membership is random, the lower end of
    a 95% interval is above 1/2 in at most 3.2% of samples, for scores of two values, any number of
    records at either value, and 30 to 300 records on both sides; DeLong's own variance gives up to
    6%. For 1000 members and 100 non-members the shares are up to 3% and 68%.

    >>> auc([3.0, 2.0, 2.0, 1.0], [True, True, False, False]).value
    0.875
    """
    members, others = both_sides(scores, is_member, at_least=2)
    value, v_members, v_others = _placements(members, others)
    ties = tie_share(np.concatenate([members, others]))
    variance = _variance(v_members, v_others)
    by_chance = (1 - ties) * chance_variance(len(members), len(others))
    unseen = _unseen(ties, v_members, v_others)
    se = math.sqrt(variance + ties * max(0.0, by_chance - variance) + unseen**2)
    confidence = confidence_level(confidence)
    if value in (0.0, 1.0):
        fewest = min(len(members), len(others))
        return Auc(value, se, clopper_pearson(int(value) * fewest, fewest, confidence=confidence))
    reach = special.ndtri((1 + confidence) / 2) * se / (value * (1 - value))
    centre = special.logit(value)
    return Auc(
        value, se, (float(special.expit(centre - reach)), float(special.expit(centre + reach)))
    )


def paired_auc_difference(
    scores_a: ArrayLike, scores_b: ArrayLike, is_member: ArrayLike
) -> AucDifference:
    """Compare the AUCs of two scores of the same records by DeLong's paired test.

    The variance is that of the differences of placement values, which equals DeLong's covariance
    form. Under ties the variance is enlarged by (sqrt(T_a) + sqrt(T_b))^2 / min(n0, n1)^2, with the
    shares of `tie_share`, for the reason that `auc` gives. Where the variance is 0 (scores without
    ties, and each AUC is 0 or 1), the p-value is its limit: 1 for equal AUCs and 0 otherwise. A
    small sample does not support a p-value of 0.
    """
    sides = [
        both_sides(scores, is_member, at_least=2, name=name)
        for name, scores in (("scores_a", scores_a), ("scores_b", scores_b))
    ]
    a, b = (_placements(*pair) for pair in sides)
    difference = a[0] - b[0]
    unseen = sum(_unseen(tie_share(np.concatenate(pair)), *pair) for pair in sides)
    se = math.sqrt(_variance(a[1] - b[1], a[2] - b[2]) + unseen**2)
    z = abs(difference) / se if se > 0 else (math.inf if difference else 0.0)
    return AucDifference(difference, se, float(2 * special.ndtr(-z)))


def _placements(members: Array, others: Array) -> tuple[float, Array, Array]:
    """Compute the AUC and the placement values.

    The placement value of a member is the share of non-members below the member, that of a
    non-member the share of members above the non-member; ties count 1/2.
    """
    n1, n0 = len(members), len(others)
    ranks = stats.rankdata(np.concatenate([members, others]))
    below = ranks[:n1] - stats.rankdata(members)
    above = n1 - (ranks[n1:] - stats.rankdata(others))
    return float(below.sum() / (n0 * n1)), below / n0, above / n1


def chance_variance(num_members: int, num_nonmembers: int) -> float:
    """Return the variance of an AUC if all orders of the records are equally likely.

    The variance is that of the Mann-Whitney statistic without ties. Ties decrease the variance by
    the share that `tie_share` returns.
    """
    return (num_members + num_nonmembers + 1) / (12 * num_members * num_nonmembers)


def tie_share(scores: ArrayLike) -> float:
    """Return the share, in [0, 1], of `chance_variance` that the ties of ``scores`` take away.

    For t_i records at value i, the share is sum(t_i^3 - t_i) / (N^3 - N): 0 if no two scores are
    equal, and 1 if all are.
    """
    counts = _numbers_of_equals(scores)
    total = counts.sum()
    return float((counts**3 - counts).sum() / (total**3 - total))


def largest_tie(scores: ArrayLike) -> float:
    """Return the share, in (0, 1], of the records that have the most frequent score."""
    counts = _numbers_of_equals(scores)
    return float(counts.max() / counts.sum())


def _numbers_of_equals(scores: ArrayLike) -> Array:
    """Count the records at each distinct score."""
    return np.unique(np.asarray(scores), return_counts=True)[1].astype(np.float64)


def _variance(v_members: Array, v_others: Array) -> float:
    """Compute DeLong's variance from placement values."""
    return float(v_members.var(ddof=1) / len(v_members) + v_others.var(ddof=1) / len(v_others))


def _unseen(ties: float, members: Array, others: Array) -> float:
    """Return the standard error of an AUC that a share of ``ties`` hides."""
    return math.sqrt(ties) / min(len(members), len(others))


# --- ROC -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TprAtFpr:
    """True-positive rate at a threshold that bounds the false-positive rate.

    Attributes:
        tp, fp: number of members and of non-members above the threshold.
        tpr, fpr: the same as rates; ``fpr`` is the realised rate.
        ci: Clopper-Pearson interval of ``tpr`` at this threshold.
        threshold: a record is called a member if its score is strictly above.
    """

    tp: int
    fp: int
    tpr: float
    fpr: float
    ci: Interval
    threshold: float


@dataclass(frozen=True)
class Roc:
    """Points of a ROC curve, by rising ``fpr`` > 0; a score above ``threshold`` is a member."""

    fpr: Array
    tpr: Array
    threshold: Array


def allowed_false_positives(fpr: float, num_nonmembers: int) -> int:
    """Return floor(fpr n0), the largest number of false positives at a rate of at most ``fpr``."""
    return math.floor(fpr * num_nonmembers + 1e-9)  # 0.29 * 100 is below 29


def tpr_at_fpr(
    scores: ArrayLike, is_member: ArrayLike, fpr: float, *, confidence: float = 0.95
) -> TprAtFpr:
    """Compute the true-positive rate at a false-positive rate of at most ``fpr`` in (0, 1).

    With k = floor(fpr n0) the threshold is the (k+1)-th largest score of a non-member, and a record
    is called a member if its score is strictly above. Under ties the realised rate is lower. Raises
    ValueError for fewer than 1 / fpr non-members, which cannot resolve the rate.
    """
    members, others = both_sides(scores, is_member)
    n1, n0 = len(members), len(others)
    fpr = real("fpr", fpr, low=0, high=1, low_open=True, high_open=True)
    allowed = allowed_false_positives(fpr, n0)
    if allowed < 1:
        raise ValueError(
            f"is_member must have at least 1/fpr = {1 / fpr:.6g} non-members, got "
            f"{n0}: add some, or raise fpr from {fpr:g}"
        )
    threshold = np.sort(others)[::-1][min(allowed, n0 - 1)]
    tp, fp = int((members > threshold).sum()), int((others > threshold).sum())
    return TprAtFpr(
        tp, fp, tp / n1, fp / n0, clopper_pearson(tp, n1, confidence=confidence), float(threshold)
    )


def roc_points(scores: ArrayLike, is_member: ArrayLike) -> Roc:
    """Compute the corners of the ROC curve for log-log axes, up to (1, 1).

    Points with a rate of 0, which log axes cannot show, are left out, and so are points inside a
    horizontal or vertical stretch. The last point calls every record a member; its threshold is
    -inf.
    """
    members, others = both_sides(scores, is_member)
    cut = np.unique(np.concatenate([members, others]))[::-1]
    tp, fp = (
        np.append(len(side) - np.searchsorted(np.sort(side), cut, side="right"), len(side))
        for side in (members, others)
    )
    seen = (tp > 0) & (fp > 0)
    tp, fp, cut = tp[seen], fp[seen], np.append(cut, -np.inf)[seen]
    corner = np.ones(len(cut), dtype=np.bool_)
    for count in (tp, fp):
        corner[1:-1] &= (count[:-2] < count[1:-1]) | (count[1:-1] < count[2:])
    return Roc(fp[corner] / len(others), tp[corner] / len(members), cut[corner])
