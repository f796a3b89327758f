r"""From scores and the truth to AUC, TPR at a FPR, and lower bounds on epsilon.

``scores`` is (N,), higher for a member, and only its order counts (infinities are allowed, NaN is
not); ``is_member`` is (N,) booleans. n1 is the number of members, n0 of non-members. A score that
ranks the wrong way keeps its AUC below 1/2: nothing is ever flipped. What the sample cannot
support raises ``ValueError``, as does any bad argument. ``confidence`` lies in (0, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats
from sklearn.metrics import roc_auc_score

from lowrank_dp._validate import fail, integer, real
from lowrank_dp.mia._arrays import Array, Mask, membership, real_array

Interval = tuple[float, float]


# --- AUC -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Auc:
    """Area under the ROC curve, DeLong's standard error, and an interval on the logit scale."""

    value: float
    se: float
    ci: Interval


@dataclass(frozen=True)
class AucDifference:
    """AUC of a minus AUC of b on the same records, its standard error, two-sided p-value."""

    difference: float
    se: float
    p_value: float


def auc(scores: ArrayLike, is_member: ArrayLike, *, confidence: float = 0.95) -> Auc:
    """P(member's score > non-member's) + P(equal) / 2, with DeLong's standard error.

    The variance is that of DeLong, DeLong & Clarke-Pearson (Biometrics 44, 1988), from midranks
    (Sun & Xu 2014) in O(N log N); n0 and n1 are at least 2. At 0 or 1 it vanishes, and the
    interval is the Clopper-Pearson one of min(n0, n1) trials, all lost or all won. Where all
    scores are equal it vanishes too.

    >>> auc([3.0, 2.0, 2.0, 1.0], [True, True, False, False]).value
    0.875
    """
    members, others = _sides(scores, is_member, at_least=2)
    value, v_members, v_others = _placements(members, others)
    se = _standard_error(v_members, v_others)
    confidence = _confidence(confidence)
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
    """DeLong's paired test of two scores of the same records.

    The variance is that of the differences of placement values, which is DeLong's covariance
    form. Where it vanishes (each AUC is 0, 1, or of equal scores) the p-value is 1 for equal AUCs
    and else 0, its limit, which a small sample does not support.
    """
    a, b = (
        _placements(*_sides(scores, is_member, at_least=2, name=name))
        for name, scores in (("scores_a", scores_a), ("scores_b", scores_b))
    )
    difference = a[0] - b[0]
    se = _standard_error(a[1] - b[1], a[2] - b[2])
    z = abs(difference) / se if se > 0 else (math.inf if difference else 0.0)
    return AucDifference(difference, se, float(2 * special.ndtr(-z)))


def _placements(members: Array, others: Array) -> tuple[float, Array, Array]:
    """AUC; of each member the share of non-members below it; of each non-member that above it."""
    n1, n0 = len(members), len(others)
    ranks = stats.rankdata(np.concatenate([members, others]))
    wins = ranks[:n1] - stats.rankdata(members)  # non-members below, ties 1/2
    losses = n1 - (ranks[n1:] - stats.rankdata(others))  # members above, ties 1/2
    return float(wins.sum() / (n0 * n1)), wins / n0, losses / n1


def _standard_error(v_members: Array, v_others: Array) -> float:
    return math.sqrt(v_members.var(ddof=1) / len(v_members) + v_others.var(ddof=1) / len(v_others))


# --- ROC -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TprAtFpr:
    """Members (``tp``) and non-members (``fp``) above the threshold, as counts and as rates.

    ``fpr`` is the realised one, ``ci`` the Clopper-Pearson interval of ``tpr`` at that threshold.
    """

    tp: int
    fp: int
    tpr: float
    fpr: float
    ci: Interval
    threshold: float


@dataclass(frozen=True)
class Roc:
    """ROC points with rising ``fpr`` > 0 and ``tpr`` > 0; a member is a score > ``threshold``."""

    fpr: Array
    tpr: Array
    threshold: Array


def tpr_at_fpr(
    scores: ArrayLike, is_member: ArrayLike, fpr: float, *, confidence: float = 0.95
) -> TprAtFpr:
    """Share of members above the threshold that ``fpr`` in (0, 1) of the non-members exceed.

    With k = floor(fpr n0) the threshold is the (k+1)-th largest score of a non-member, and a
    member is a score strictly above it; under ties the realised rate is lower. Fewer than 1 / fpr
    non-members cannot tell such a rate: ``ValueError``.
    """
    members, others = _sides(scores, is_member)
    n1, n0 = len(members), len(others)
    fpr = real("fpr", fpr, low=0, high=1, low_open=True, high_open=True)
    allowed = math.floor(fpr * n0 + 1e-9)
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
    """Corners of the ROC curve for log-log axes, from the first false positive on to (1, 1).

    Points with a rate of 0, which such axes cannot show, are left out, and so are points inside a
    horizontal or vertical stretch. The last point, everyone, has the threshold -inf.
    """
    members, others = _sides(scores, is_member)
    cut = np.unique(np.concatenate([members, others]))[::-1]
    tp, fp = (np.append(_counts_above(side, cut), len(side)) for side in (members, others))
    seen = (tp > 0) & (fp > 0)
    tp, fp, cut = tp[seen], fp[seen], np.append(cut, -np.inf)[seen]
    corner = np.ones(len(cut), dtype=np.bool_)
    for count in (tp, fp):
        corner[1:-1] &= (count[:-2] < count[1:-1]) | (count[1:-1] < count[2:])
    return Roc(fp[corner] / len(others), tp[corner] / len(members), cut[corner])


def _counts_above(values: Array, cut: Array) -> Array:
    """How many of ``values`` are strictly above each entry of ``cut``."""
    return len(values) - np.searchsorted(np.sort(values), cut, side="right").astype(np.float64)


# --- intervals -------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanInterval:
    """Mean over seeds, its standard error, and Student's t-interval."""

    mean: float
    se: float
    ci: Interval


def clopper_pearson(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Exact two-sided interval (low, high) of a binomial proportion (Biometrika 26, 1934).

    >>> clopper_pearson(0, 10, confidence=0.95)[0]
    0.0
    """
    trials = integer("trials", trials)
    successes = integer("successes", successes, low=0, high=trials)
    tail = (1 - _confidence(confidence)) / 2
    return float(_lower(successes, trials, tail)), float(_upper(successes, trials, tail))


def seed_interval(values: ArrayLike, *, confidence: float = 0.95) -> MeanInterval:
    """Student's t-interval of the mean of ``values``, one a seed, (k,) with k >= 2.

    >>> seed_interval([0.5, 0.7]).mean
    0.6
    """
    values = real_array("values", values)
    if len(values) < 2:
        fail("values", "one number for each of at least 2 seeds", f"{len(values)}")
    mean, se = values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    reach = se * special.stdtrit(len(values) - 1, (1 + _confidence(confidence)) / 2)
    return MeanInterval(float(mean), float(se), (float(mean - reach), float(mean + reach)))


def _lower(successes: ArrayLike, trials: int, tail: float) -> Array:
    """One-sided Clopper-Pearson bound: below the true rate with probability >= 1 - tail."""
    k = np.asarray(successes, dtype=np.float64)
    return np.where(k > 0, special.betaincinv(np.maximum(k, 1), trials - k + 1, tail), 0.0)


def _upper(successes: ArrayLike, trials: int, tail: float) -> Array:
    """One-sided Clopper-Pearson bound: above the true rate with probability >= 1 - tail."""
    k = np.asarray(successes, dtype=np.float64)
    missed = np.maximum(trials - k, 1)
    return np.where(k < trials, special.betainccinv(k + 1, missed, tail), 1.0)


# --- lower bounds on epsilon -----------------------------------------------------------------


@dataclass(frozen=True)
class SplitEpsilon:
    """Lower bound on epsilon with the threshold and the counts, of the other half, behind it."""

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
    """Lower bound >= 0 on epsilon, from a test that called ``tp`` members and ``fp`` others so.

    max(0, ln((TPR_low - delta) / FPR_high), ln((1 - FPR_high - delta) / (1 - TPR_low))), both
    rates bounded at (1 - confidence) / 2 by Clopper-Pearson (Kairouz et al. 2015; Jagielski et al.
    2020, arXiv 2006.07709; Nasr et al. 2021, arXiv 2101.04535). It holds with probability
    ``confidence`` for a test fixed beforehand: a threshold chosen on the very records that are
    counted makes it void, see `split_epsilon`.

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
        _confidence(confidence),
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
    """`epsilon_lower_bound` with a valid threshold: chosen on one random half, used on the other.

    ``generator`` draws the halves, of members and of non-members each (at least 2 of both). The
    threshold is the score with the highest bound on the calibration half.
    """
    members, others = (
        generator.permutation(side) for side in _sides(scores, is_member, at_least=2)
    )
    half1, half0 = len(members) // 2, len(others) // 2
    cut = np.unique(np.concatenate([members[:half1], others[:half0]]))
    bounds = _log_likelihood_bound(
        _counts_above(members[:half1], cut),
        half1,
        _counts_above(others[:half0], cut),
        half0,
        _delta(delta),
        _confidence(confidence),
    )
    threshold = float(cut[np.argmax(bounds)])
    members, others = members[half1:], others[half0:]
    tp, fp = int((members > threshold).sum()), int((others > threshold).sum())
    epsilon = epsilon_lower_bound(
        tp, len(members), fp, len(others), delta=delta, confidence=confidence
    )
    return SplitEpsilon(epsilon, threshold, tp, len(members), fp, len(others))


def one_run_correct(
    scores: ArrayLike, is_member: ArrayLike, num_guesses: int, generator: np.random.Generator
) -> int:
    """How many of ``num_guesses`` guesses are right, for `one_run_epsilon`.

    The upper half of the guesses calls the highest scores members, the lower half the lowest
    non-members; on the rest the attacker abstains. ``generator`` breaks ties, so that the order
    of the records tells nothing. ``num_guesses`` must be fixed before the scores are seen.
    """
    values = real_array("scores", scores, finite=False)
    truth = membership("is_member", is_member, values.shape)
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
    """Lower bound >= 0 on epsilon from one training run (arXiv 2305.08846, Theorem 5.2).

    ``num_examples`` = m records were each trained on by an independent fair coin (a fixed-size
    half is not that), and ``num_correct`` = v of ``num_guesses`` = r guesses, r fixed beforehand,
    were right. If the training is (epsilon, delta)-DP then so many are right with probability at
    most

        p(epsilon) = P[B >= v] + 2 m delta max_{1 <= i <= v} P[v > B >= v - i] / i,

    B ~ Binomial(r, 1 / (1 + exp(-epsilon))); the bound is where p reaches 1 - ``confidence``.

    >>> round(one_run_epsilon(1000, 100, 75, delta=1e-4), 3)        # Appendix D of the paper
    0.673
    """
    m = integer("num_examples", num_examples)
    r = integer("num_guesses", num_guesses, high=m)
    v = integer("num_correct", num_correct, low=0, high=r)
    delta, level = _delta(delta), 1 - _confidence(confidence)
    # P[B >= v] = level is solved by the Clopper-Pearson bound; the term in delta only lowers it
    pure = float(special.logit(_lower(v, r, level)))

    def excess(epsilon: float) -> float:
        return _one_run_p_value(m, r, v, epsilon, delta) - level

    if pure <= 0 or excess(0.0) >= 0:
        return 0.0
    if delta == 0 or excess(pure) <= 0:
        return pure
    return float(optimize.brentq(excess, 0.0, pure, xtol=1e-12))


def _one_run_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    q = special.expit(epsilon)
    p_value = stats.binom.sf(v - 1, r, q)
    if delta > 0 and v > 0:
        below = np.cumsum(stats.binom.pmf(np.arange(v - 1, -1, -1), r, q))
        p_value += 2 * m * delta * (below / np.arange(1, v + 1)).max()
    return float(p_value)


def _log_likelihood_bound(
    tp: ArrayLike, n1: int, fp: ArrayLike, n0: int, delta: float, confidence: float
) -> Array:
    """The bound of `epsilon_lower_bound` before the maximum with 0; counts may be arrays."""
    tail = (1 - confidence) / 2
    caught, alarm = _lower(tp, n1, tail), _upper(fp, n0, tail)
    spared, missed = _lower(n0 - np.asarray(fp), n0, tail), _upper(n1 - np.asarray(tp), n1, tail)
    with np.errstate(divide="ignore"):
        return np.maximum(
            np.log(np.maximum(caught - delta, 0) / alarm),
            np.log(np.maximum(spared - delta, 0) / missed),
        )


# --- arguments -------------------------------------------------------------------------------


def _sides(
    scores: ArrayLike, is_member: ArrayLike, *, at_least: int = 1, name: str = "scores"
) -> tuple[Array, Array]:
    """The members' scores and the non-members'."""
    values = real_array(name, scores, finite=False)
    truth: Mask = membership("is_member", is_member, values.shape)
    members, others = values[truth], values[~truth]
    if min(len(members), len(others)) < at_least:
        fail(
            "is_member",
            f"at least {at_least} True and {at_least} False",
            f"{len(members)} and {len(others)}",
        )
    return members, others


def _confidence(value: float) -> float:
    return real("confidence", value, low=0, high=1, low_open=True, high_open=True)


def _delta(value: float) -> float:
    return real("delta", value, low=0, high=1, high_open=True)


def auc_with_interval(scores: np.ndarray, member: np.ndarray) -> tuple[float, float, float]:
    """AUC and its 95 % interval: DeLong's variance on the logit scale.

    At an AUC of 0 or 1, where that variance is 0, the Clopper-Pearson bound of the smaller class.
    """
    positive, negative = scores[member], scores[~member]
    value = float(roc_auc_score(member, scores))
    least = min(len(positive), len(negative))
    if value in (0.0, 1.0):
        bound = 0.025 ** (1 / least)
        return (value, bound, 1.0) if value else (value, 0.0, 1 - bound)
    # the share of the other class that each score beats, ties as halves
    ranks = stats.rankdata(scores)
    above = (ranks[member] - stats.rankdata(positive)) / len(negative)
    below = 1 - (ranks[~member] - stats.rankdata(negative)) / len(positive)
    error = np.sqrt(above.var(ddof=1) / len(positive) + below.var(ddof=1) / len(negative))
    half = stats.norm.ppf(0.975) * error / (value * (1 - value))
    low, high = special.expit(special.logit(value) + np.array([-half, half]))
    return value, float(low), float(high)
