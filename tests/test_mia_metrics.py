"""AUC, TPR, intervals and bounds on epsilon: by definition, by simulation, and under no leakage.

Simulations have fixed seeds; the stated error rates are those of the tests over all seeds.
"""

import math

import mpmath as mp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from lowrank_dp.mia import metrics
from tests.oracles import naive_auc
from tests.tasks import case

# few distinct values, so many ties
tied = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=4, max_size=40)


def sides(pairs):
    scores, truth = (np.array(x) for x in zip(*pairs, strict=True))
    assume(2 <= truth.sum() <= len(truth) - 2)
    return scores.astype(float), truth


def binormal(rng, n1, n0, effect):
    """Scores of n1 members and n0 others, ``effect`` standard deviations apart."""
    truth = np.arange(n1 + n0) < n1
    return rng.standard_normal(n1 + n0) + effect * truth, truth


def naive_delong(many_scores, truth):
    """AUCs and their covariance matrix from the placement values of all pairs."""
    v_members, v_others = [], []
    for scores in many_scores:
        pairs = np.array([[(a > b) + (a == b) / 2 for b in scores[~truth]] for a in scores[truth]])
        v_members.append(pairs.mean(axis=1))
        v_others.append(pairs.mean(axis=0))
    covariance = np.cov(v_members) / truth.sum() + np.cov(v_others) / (~truth).sum()
    return np.mean(v_members, axis=1), covariance


def naive_tie_share(scores):
    """The correction of the Mann-Whitney variance for ties, value by value."""
    n = len(scores)
    same = sum((t := list(scores).count(v)) ** 3 - t for v in {*scores})
    return same / (n**3 - n)


# --- AUC -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(tied)
def test_auc_by_definition(pairs):
    scores, truth = sides(pairs)
    got = metrics.auc(scores, truth)
    assert got.value == pytest.approx(naive_auc(scores, truth), abs=1e-14)
    assert got.value == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    _, covariance = naive_delong([scores], truth)
    ties, fewest = naive_tie_share(scores), min(truth.sum(), (~truth).sum())
    chance = (1 - ties) * metrics.chance_variance(int(truth.sum()), int((~truth).sum()))
    variance = covariance + ties * max(0, chance - covariance) + ties / fewest**2
    assert got.se == pytest.approx(math.sqrt(variance), abs=1e-12)
    assert got.ci[0] <= got.value <= got.ci[1]


@settings(max_examples=100, deadline=None)
@given(tied)
def test_auc_invariances(pairs):
    scores, truth = sides(pairs)
    got = metrics.auc(scores, truth)
    # of monotone maps, here to numbers with as many ties, and to infinity
    for image in (np.exp(scores), scores**3 + 1e6, np.where(scores == 3, np.inf, scores)):
        assert metrics.auc(image, truth) == got
    flipped = metrics.auc(-scores, truth)
    assert flipped.value == pytest.approx(1 - got.value, abs=1e-15)
    assert flipped.se == pytest.approx(got.se, abs=1e-15)
    assert flipped.ci == pytest.approx((1 - got.ci[1], 1 - got.ci[0]), abs=1e-9)
    order = np.random.default_rng(0).permutation(len(scores))
    assert metrics.auc(scores[order], truth[order]).value == got.value


def test_auc_interval_on_the_logit_scale():
    scores, truth = binormal(np.random.default_rng(0), 40, 60, 1.0)
    got = metrics.auc(scores, truth, confidence=0.9)
    z = stats.norm.ppf(0.95)
    logit = math.log(got.value / (1 - got.value))
    reach = z * got.se / (got.value * (1 - got.value))
    want = [1 / (1 + math.exp(-x)) for x in (logit - reach, logit + reach)]
    assert got.ci == pytest.approx(want, abs=1e-12)
    assert [type(x) for x in (got.value, got.se, *got.ci)] == [float] * 4


def test_auc_at_the_ends():
    for n1, n0 in ((5, 30), (30, 5)):
        truth = np.arange(n1 + n0) < n1
        one, zero = metrics.auc(truth * 1.0, truth), metrics.auc(-1.0 * truth, truth)
        low = 0.025 ** (1 / 5)  # Clopper-Pearson, 5 of 5
        assert (one.value, one.ci) == (1.0, (pytest.approx(low), 1.0))
        # an AUC below 1/2 stays below 1/2
        assert (zero.value, zero.ci) == (0.0, (0.0, pytest.approx(1 - low)))
        apart = metrics.auc(np.arange(n1 + n0, 0, -1), truth)
        assert (apart.value, apart.se, apart.ci) == (1.0, 0.0, one.ci)
    huge = np.array([1e308, np.inf, -1e308, -np.inf])
    assert metrics.auc(huge, [True, True, False, False]).value == 1.0


def test_equal_scores_exclude_no_more_than_the_number_of_records_does():
    """If none of n members has another score, the share p of such members is at most 1 - a^(1/n).

    The AUC of members of which a share p scores above all others is (1 + p) / 2.
    """
    for n in (10, 30, 100, 1000):
        got = metrics.auc(np.ones(2 * n), np.arange(2 * n) < n)
        bound = 1 - 0.025 ** (1 / n)
        assert got.value == 0.5 and got.ci[0] == pytest.approx(1 - got.ci[1])
        assert (1 + bound) / 2 <= got.ci[1] < (1 + 1.3 * bound) / 2, n
    assert metrics.tie_share(np.ones(9)) == 1 and metrics.tie_share(np.arange(9.0)) == 0


def few_distinct(count, total, number):
    """``total`` scores of which ``count`` are above all others: equal, or each another."""
    scores = np.zeros(total)
    scores[:count] = np.arange(1, count + 1) if number % 2 else 1
    return scores


def test_few_distinct_scores_are_no_leak():
    """The exact probability, under random membership, that the AUC's interval is above 1/2.

    ``count`` of 2n records score above all others, and a hypergeometric number of them is that of
    members. With DeLong's own variance the largest probabilities are 0.061, 0.030, 0.032.
    """
    n = 100
    truth = np.arange(2 * n) < n
    for count in (2, 4, 5, 8, 20):
        total = 0.0
        for inside in range(count + 1):
            high = np.zeros(2 * n)
            high[:inside], high[n : n + count - inside] = 1, 1
            if metrics.auc(high, truth).ci[0] > 0.5:
                total += stats.hypergeom.pmf(inside, 2 * n, n, count)
        assert total <= 0.025, (count, total)


def test_a_leak_of_few_records_is_found_under_ties():
    """20 of 2000 records score above the others. If membership is random, the probability that
    all 20 are members is about 1e-6.
    """
    truth = np.arange(2000) < 1000
    assert metrics.auc(few_distinct(20, 2000, 0), truth).ci[0] > 0.5


@pytest.mark.slow
def test_few_distinct_scores_are_no_difference():
    """The paired test rejects at 5% in at most 5% of samples, within the error of 1000 samples."""
    rng, n = np.random.default_rng(4), 100
    for count in (2, 5, 8, 20):
        for other in (0, count):
            rejected = 0
            for number in range(1000):
                a, b = few_distinct(count, 2 * n, number), few_distinct(other, 2 * n, number)
                truth = rng.permutation(np.arange(2 * n) < n)
                got = metrics.paired_auc_difference(a, rng.permutation(b), truth)
                rejected += got.p_value < 0.05
            assert rejected <= 50 + 3 * 7, (count, other, rejected)


def test_auc_below_one_half_is_not_flipped():
    scores, truth = binormal(np.random.default_rng(1), 200, 200, -1.0)
    assert metrics.auc(scores, truth).ci[1] < 0.5


@pytest.mark.slow
def test_auc_interval_covers():
    """2000 runs; a true coverage in [0.935, 0.965] fails with probability under 1e-3."""
    for effect, n1, n0 in [(0.0, 50, 50), (1.0, 40, 80), (2.0, 60, 60)]:
        with case(effect, n1, n0):
            rng = np.random.default_rng(2)
            truth = stats.norm.cdf(effect / math.sqrt(2))
            hits = sum(
                low <= truth <= high
                for low, high in (
                    metrics.auc(*binormal(rng, n1, n0, effect)).ci for _ in range(2000)
                )
            )
            assert 0.918 < hits / 2000 < 0.981


@settings(max_examples=60, deadline=None)
@given(tied, st.integers(0, 2**32))
def test_paired_difference_by_definition(pairs, seed):
    a, truth = sides(pairs)
    b = a + np.random.default_rng(seed).integers(-2, 3, len(a))
    values, covariance = naive_delong([a, b], truth)
    got = metrics.paired_auc_difference(a, b, truth)
    assert got.difference == pytest.approx(values[0] - values[1], abs=1e-14)
    hidden = sum(math.sqrt(naive_tie_share(scores)) for scores in (a, b))
    hidden /= min(truth.sum(), (~truth).sum())
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1] + hidden**2
    assert got.se**2 == pytest.approx(variance, abs=1e-14)
    if got.se > 1e-6:
        z = (values[0] - values[1]) / math.sqrt(variance)
        assert got.p_value == pytest.approx(2 * stats.norm.sf(abs(z)), abs=1e-9)
    other = metrics.paired_auc_difference(b, a, truth)
    assert (other.difference, other.se) == (pytest.approx(-got.difference), pytest.approx(got.se))


def test_paired_difference_corners():
    scores, truth = binormal(np.random.default_rng(3), 30, 30, 1.0)
    same = metrics.paired_auc_difference(scores, np.exp(scores), truth)
    assert (same.difference, same.se, same.p_value) == (0.0, 0.0, 1.0)
    order = np.arange(60) + 100.0 * truth  # no two scores are equal
    apart = metrics.paired_auc_difference(order, -order, truth)
    assert (apart.difference, apart.se, apart.p_value) == (1.0, 0.0, 0.0)


@pytest.mark.slow
def test_paired_test_rejects_at_its_level():
    """1000 runs of two equally good, correlated scores: a true rate of 5% fails with p < 1e-4."""
    rng = np.random.default_rng(4)
    rejected = found = 0
    for _ in range(1000):
        common, truth = binormal(rng, 80, 80, 1.0)
        a, b = common + 0.7 * rng.standard_normal((2, 160))
        rejected += metrics.paired_auc_difference(a, b, truth).p_value < 0.05
        found += metrics.paired_auc_difference(common, a, truth).p_value < 0.05
    assert 22 < rejected < 80
    assert found > 2 * rejected  # noise added to one is noticed


# --- ROC -------------------------------------------------------------------------------------


def test_tpr_at_fpr_by_hand():
    scores = np.array([9.0, 8.0, 5.0, 4.0, 10.0, 7.0, 6.0, 3.0, 2.0])
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0], bool)
    got = metrics.tpr_at_fpr(scores, truth, 0.4)  # k = 2: above the third, 6.0
    assert (got.tp, got.fp, got.tpr, got.fpr, got.threshold) == (2, 2, 0.5, 0.4, 6.0)
    assert got.ci == metrics.clopper_pearson(2, 4)
    # 0.2 * 5 and 0.6 * 5 are whole, whatever their rounding
    assert metrics.tpr_at_fpr(scores, truth, 0.2).threshold == 7.0
    assert metrics.tpr_at_fpr(scores, truth, 0.6).threshold == 3.0
    # in float64, 100 * 0.29 is below 29: each whole per cent of 100 non-members is met exactly
    scores100 = np.arange(101.0)
    for percent in range(1, 100):
        assert metrics.tpr_at_fpr(scores100, scores100 == 50, percent / 100).fp == percent, percent
    # ties lower the realised rate
    flat = metrics.tpr_at_fpr(np.ones(9), truth, 0.4)
    assert (flat.tp, flat.fp, flat.threshold) == (0, 0, 1.0)
    assert metrics.tpr_at_fpr(scores, truth, 1 - 1e-15).fp == 4


@settings(max_examples=100, deadline=None)
@given(tied, st.floats(0.01, 0.99))
def test_tpr_at_fpr_by_loop(pairs, fpr):
    scores, truth = sides(pairs)
    n0 = int((~truth).sum())
    allowed = math.floor(fpr * n0 + 1e-9)
    if allowed < 1:
        with pytest.raises(ValueError, match="is_member must have at least 1/fpr"):
            metrics.tpr_at_fpr(scores, truth, fpr)
        return
    got = metrics.tpr_at_fpr(scores, truth, fpr)
    # the largest true positive rate of all thresholds that let at most ``allowed`` through
    best = max(
        int((scores[truth] > cut).sum())
        for cut in [*scores]
        if (scores[~truth] > cut).sum() <= allowed
    )
    assert got.tp == best and got.fp <= allowed and got.fpr == got.fp / n0
    assert got.tp == (scores[truth] > got.threshold).sum()
    assert got.fp == (scores[~truth] > got.threshold).sum()


def test_tpr_needs_enough_non_members():
    rng = np.random.default_rng(5)
    scores, truth = binormal(rng, 50, 999, 1.0)
    with pytest.raises(ValueError, match="at least 1/fpr = 1000 non-members, got 999"):
        metrics.tpr_at_fpr(scores, truth, 0.001)
    with pytest.raises(ValueError, match="non-members"):
        metrics.tpr_at_fpr(scores, truth, 5e-324)
    scores, truth = binormal(rng, 50, 1000, 1.0)
    assert metrics.tpr_at_fpr(scores, truth, 0.001).fp == 1


@settings(max_examples=100, deadline=None)
@given(tied)
def test_roc_points(pairs):
    scores, truth = sides(pairs)
    roc = metrics.roc_points(scores, truth)
    for fpr, tpr, cut in zip(roc.fpr, roc.tpr, roc.threshold, strict=True):
        above = scores > cut if cut > -np.inf else np.ones(len(scores), bool)
        assert fpr == above[~truth].mean() > 0 and tpr == above[truth].mean() > 0
    assert (roc.fpr[-1], roc.tpr[-1], roc.threshold[-1]) == (1, 1, -np.inf)
    assert (np.diff(roc.fpr) >= 0).all() and (np.diff(roc.tpr) >= 0).all()
    # every point of the full curve with both rates above 0 lies on the line through the corners
    full_fpr, full_tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    for fpr, tpr in zip(full_fpr, full_tpr, strict=True):
        if fpr > 0 and tpr > 0:
            at = np.flatnonzero(np.isclose(roc.fpr, fpr))
            if len(at):
                assert roc.tpr[at].min() - 1e-12 <= tpr <= roc.tpr[at].max() + 1e-12
            else:
                assert np.interp(fpr, roc.fpr, roc.tpr) == pytest.approx(tpr)


def test_roc_starts_at_the_first_false_positive():
    scores = np.array([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    roc = metrics.roc_points(scores, [True, True, False, False, False, True])
    np.testing.assert_allclose(roc.fpr, [1 / 3, 1, 1])
    np.testing.assert_allclose(roc.tpr, [2 / 3, 2 / 3, 1])


# --- intervals -------------------------------------------------------------------------------


def test_clopper_pearson_against_scipy():
    for confidence in [0.5, 0.95, 0.999]:
        with case(confidence):
            for trials in (1, 2, 17, 1000, 10**6):
                for successes in {0, 1, trials // 3, trials - 1, trials}:
                    want = stats.binomtest(successes, trials).proportion_ci(
                        confidence, method="exact"
                    )
                    got = metrics.clopper_pearson(successes, trials, confidence=confidence)
                    np.testing.assert_allclose(got, (want.low, want.high), atol=1e-11)
                    # the definition, which holds where scipy's own root is not as exact
                    tail = (1 - confidence) / 2
                    if successes > 0:
                        assert stats.binom.sf(successes - 1, trials, got[0]) == pytest.approx(tail)
                    if successes < trials:
                        assert stats.binom.cdf(successes, trials, got[1]) == pytest.approx(tail)
            assert (
                metrics.clopper_pearson(0, 5)[0] == 0.0 and metrics.clopper_pearson(5, 5)[1] == 1.0
            )


def test_clopper_pearson_covers_exactly():
    trials, k = 23, np.arange(24)
    low, high = np.transpose([metrics.clopper_pearson(int(i), trials, confidence=0.9) for i in k])
    for p in np.linspace(0.01, 0.99, 99):
        assert stats.binom.pmf(k, trials, p)[(low <= p) & (p <= high)].sum() >= 0.9


# --- epsilon from two rates ------------------------------------------------------------------


def naive_epsilon(tp, n1, fp, n0, delta, confidence):
    """Bound epsilon with scipy's exact one-sided intervals of both rates."""
    level = (1 + confidence) / 2
    tpr = stats.binomtest(tp, n1, alternative="greater").proportion_ci(level).low
    fpr = stats.binomtest(fp, n0, alternative="less").proportion_ci(level).high
    bounds = [0.0]
    if tpr > delta:
        bounds.append(math.log((tpr - delta) / fpr))
    if 1 - fpr > delta and tpr < 1:
        bounds.append(math.log((1 - fpr - delta) / (1 - tpr)))
    return max(bounds)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([0.0, 1e-5, 0.05, 0.9]),
    st.sampled_from([0.8, 0.95]),
)
def test_epsilon_lower_bound_by_definition(n1, n0, tpr, fpr, delta, confidence):
    tp, fp = round(tpr * n1), round(fpr * n0)
    got = metrics.epsilon_lower_bound(tp, n1, fp, n0, delta=delta, confidence=confidence)
    assert got == pytest.approx(naive_epsilon(tp, n1, fp, n0, delta, confidence), abs=1e-8)
    assert type(got) is float and math.isfinite(got)


def test_epsilon_lower_bound_corners():
    assert metrics.epsilon_lower_bound(0, 10, 0, 10) == 0.0
    assert metrics.epsilon_lower_bound(10, 10, 10, 10) == 0.0
    # scores in the wrong order are not reversed
    assert metrics.epsilon_lower_bound(0, 1000, 1000, 1000) == 0.0
    # a perfect test on 1000 + 1000: ln(0.025^(1/1000) / (1 - 0.025^(1/1000)))
    q = 0.025 ** (1 / 1000)
    assert metrics.epsilon_lower_bound(1000, 1000, 0, 1000) == pytest.approx(math.log(q / (1 - q)))
    # delta removes a rare but certain detection
    assert metrics.epsilon_lower_bound(20, 1000, 0, 10**5) > 4
    assert metrics.epsilon_lower_bound(20, 1000, 0, 10**5, delta=0.02) == 0.0


def test_epsilon_lower_bound_holds_exactly():
    """Randomised response attains epsilon: the bound exceeds it with probability <= 5%."""
    for epsilon in [0.0, 0.5, 2.0]:
        for n in [20, 200]:
            with case(epsilon, n):
                q, k = 1 / (1 + math.exp(-epsilon)), np.arange(n + 1)
                weights = np.outer(stats.binom.pmf(k, n, q), stats.binom.pmf(k, n, 1 - q))
                likely = weights > 1e-9
                too_high = sum(
                    weights[tp, fp]
                    for tp, fp in np.argwhere(likely)
                    if metrics.epsilon_lower_bound(int(tp), n, int(fp), n) > epsilon
                )
                assert too_high + weights[~likely].sum() <= 0.05


def leak_rates(bound, runs, rng, n=1000, effect=0.0):
    """Share of runs with a bound above 0; members score ``effect`` higher (0: no leakage)."""
    return np.mean([bound(*binormal(rng, n // 2, n // 2, effect)) > 0 for _ in range(runs)])


@pytest.mark.slow
def test_no_leakage_reads_zero_with_a_split_threshold():
    """500 runs on 1000 records: at a true rate of 5%, over 7.5% occur with probability 0.6%.

    Two Clopper-Pearson bounds that do not overlap have a rate of 0.03% only. The rate exceeds the
    limit if the best of three useless attacks and of all thresholds is chosen on the records that
    are counted, so the test can detect this fault.
    """
    rng = np.random.default_rng(7)

    def split(scores, truth):
        return metrics.split_epsilon(scores, truth, rng).epsilon

    def best_of_all(scores, truth):
        attacks = np.array([scores, rng.permutation(scores), rng.permutation(scores)])
        tp, fp = (np.cumsum(side[np.argsort(attacks)], axis=1) for side in (truth, ~truth))
        low = np.nan_to_num(stats.beta.ppf(0.025, tp, 501 - tp))
        high = np.nan_to_num(stats.beta.ppf(0.975, fp + 1, 500 - fp), nan=1.0)
        return np.max(low - high)  # TPR_low > FPR_high somewhere

    assert leak_rates(split, 500, rng) <= 0.075
    assert leak_rates(best_of_all, 500, rng) > 0.075
    assert leak_rates(split, 20, rng, effect=1.5) == 1.0  # power


def test_split_epsilon():
    scores, truth = binormal(np.random.default_rng(8), 500, 301, 2.0)
    got = metrics.split_epsilon(scores, truth, np.random.default_rng(9), delta=1e-3)
    assert (got.num_members, got.num_nonmembers) == (250, 151)
    assert got.epsilon == metrics.epsilon_lower_bound(got.tp, 250, got.fp, 151, delta=1e-3) > 0.5
    assert got == metrics.split_epsilon(scores, truth, np.random.default_rng(9), delta=1e-3)
    assert got != metrics.split_epsilon(scores, truth, np.random.default_rng(10), delta=1e-3)
    # only the evaluation half is counted
    assert got.tp <= (scores[truth] > got.threshold).sum()
    # a monotone map changes the threshold only
    image = metrics.split_epsilon(np.exp(scores), truth, np.random.default_rng(9), delta=1e-3)
    assert (image.epsilon, image.threshold) == (got.epsilon, pytest.approx(math.exp(got.threshold)))
    backwards = metrics.split_epsilon(-scores, truth, np.random.default_rng(9))
    assert backwards.epsilon == 0.0
    assert metrics.split_epsilon(np.ones(801), truth, np.random.default_rng(9)).epsilon == 0.0


def test_split_epsilon_chooses_the_best_threshold_of_the_calibration_half():
    """A loop over the thresholds finds the same threshold, on the half that is not counted."""
    rng = np.random.default_rng(11)
    scores, truth = np.round(binormal(rng, 60, 60, 2.5)[0], 1), np.arange(120) < 60
    got = metrics.split_epsilon(scores, truth, np.random.default_rng(12))
    generator = np.random.default_rng(12)
    members, others = generator.permutation(scores[truth]), generator.permutation(scores[~truth])
    bounds = {
        cut: metrics.epsilon_lower_bound(
            int((members[:30] > cut).sum()), 30, int((others[:30] > cut).sum()), 30
        )
        for cut in {*members[:30], *others[:30]}
    }
    assert bounds[got.threshold] == pytest.approx(max(bounds.values()), abs=1e-12)
    assert got.tp == (members[30:] > got.threshold).sum()


# --- one run ---------------------------------------------------------------------------------


def mp_one_run_p_value(m, r, v, epsilon, delta):
    """Theorem 5.2 of arXiv 2305.08846, term by term."""
    q = 1 / (1 + mp.exp(-mp.mpf(epsilon)))
    pmf = [mp.binomial(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    worst = max([mp.fsum(pmf[v - i : v]) / i for i in range(1, v + 1)], default=mp.mpf(0))
    return mp.fsum(pmf[v:]) + 2 * m * mp.mpf(delta) * worst


def test_one_run_epsilon_against_mpmath():
    """At the bound the p-value is 5%; slightly below the bound the p-value is smaller."""
    for m, r, v, delta in [
        (100, 100, 90, 0.01),
        (100, 100, 90, 0.0),
        (1000, 100, 75, 1e-4),
        (50, 20, 20, 1e-3),
        (10, 10, 9, 1e-12),
        (30, 30, 30, 1e-3),
        (40, 40, 35, 1e-5),
        (200, 60, 45, 1e-4),
    ]:
        with case(m, r, v, delta):
            got = metrics.one_run_epsilon(m, r, v, delta=delta)
            assert type(got) is float and got > 0
            with mp.workdps(40):
                assert mp_one_run_p_value(m, r, v, got, delta) == pytest.approx(0.05, abs=1e-10)
                for share in (0.0, 0.3, 0.9, 0.999):
                    assert mp_one_run_p_value(m, r, v, share * got, delta) < 0.05


def test_one_run_epsilon_published_values():
    """Appendix D (0.673) and Section 7 (2.675, truncated) of arXiv 2305.08846v1."""
    assert metrics.one_run_epsilon(1000, 100, 75, delta=1e-4) == pytest.approx(0.673, abs=5e-4)
    assert metrics.one_run_epsilon(100_000, 1510, 1439, delta=1e-5) == pytest.approx(
        2.6755, abs=5e-4
    )


def test_one_run_delta_is_more_than_a_subtraction():
    """90 of 100 guesses are right; epsilon is 1.63 at delta 0, and 0.39 at delta 0.01.

    Subtracting m delta / r from the first would give 1.62.
    """
    pure = metrics.one_run_epsilon(100, 100, 90)
    assert pure == pytest.approx(1.631, abs=1e-3)
    assert pure - 100 * 0.01 / 100 == pytest.approx(1.62, abs=5e-3)
    assert metrics.one_run_epsilon(100, 100, 90, delta=0.01) == pytest.approx(0.388, abs=1e-3)


def test_one_run_epsilon_corners():
    for right in (0, 50, 58):  # P[Bin(100, 1/2) >= 58] = 0.067
        assert metrics.one_run_epsilon(100, 100, right) == 0.0
    assert metrics.one_run_epsilon(100, 100, 59) > 0
    assert metrics.one_run_epsilon(1, 1, 1) == 0.0
    # all right: q^r = 0.05
    q = 0.05 ** (1 / 1000)
    assert metrics.one_run_epsilon(1000, 1000, 1000) == pytest.approx(math.log(q / (1 - q)))
    assert metrics.one_run_epsilon(1000, 20, 20, delta=1e-3) == 0.0
    assert metrics.one_run_epsilon(100, 100, 90, delta=1e-300) == pytest.approx(
        metrics.one_run_epsilon(100, 100, 90), abs=1e-9
    )
    assert metrics.one_run_epsilon(100, 100, 90, delta=0.99) == 0.0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(0, 60),
    st.integers(0, 200),
    st.floats(0, 0.02),
    st.sampled_from([0.9, 0.95]),
)
def test_one_run_epsilon_monotone(r, v, extra, delta, confidence):
    """More right guesses raise the bound; a larger delta, and more abstentions, lower it."""
    v = min(v, r)
    options = dict(confidence=confidence)
    here = metrics.one_run_epsilon(r + extra, r, v, delta=delta, **options)
    slack = 1e-9
    assert here <= metrics.one_run_epsilon(r + extra, r, v, **options) + slack
    assert metrics.one_run_epsilon(r + extra, r, v, delta=2 * delta, **options) <= here + slack
    assert metrics.one_run_epsilon(r + extra + 9, r, v, delta=delta, **options) <= here + slack
    if v < r:
        assert here <= metrics.one_run_epsilon(r + extra, r, v + 1, delta=delta, **options) + slack


def test_one_run_epsilon_holds_exactly():
    """Each bit is released with probability delta, else by randomised response: (eps, delta)-DP.

    All bits are guessed, and the bound exceeds epsilon with probability at most 5%.
    """
    for epsilon, delta in [
        (0.0, 0.0),
        (1.0, 0.0),
        (3.0, 0.0),
        (0.0, 0.01),
        (1.0, 0.01),
        (1.0, 0.1),
    ]:
        with case(epsilon, delta):
            for r in (10, 60, 300):
                q = delta + (1 - delta) / (1 + math.exp(-epsilon))
                chance = stats.binom.pmf(np.arange(r + 1), r, q)
                too_high = sum(
                    p
                    for v, p in enumerate(chance)
                    if metrics.one_run_epsilon(r, r, v, delta=delta) > epsilon
                )
                assert too_high <= 0.05


@pytest.mark.slow
def test_no_leakage_reads_zero_in_one_run():
    """1000 runs with 1000 fair bits each: a true rate of 5% exceeds 7.5% with p < 4e-4.

    The exact rate at 200 guesses is P[Bin(200, 1/2) >= 113] = 3.8%. The best of many numbers of
    guesses is above 0 too often, so the test can detect such a choice.
    """
    rng = np.random.default_rng(13)
    guesses = [20, 50, 100, 200, 400, 700, 1000]

    def one(scores, truth, number=200):
        return metrics.one_run_epsilon(
            len(scores), number, metrics.one_run_correct(scores, truth, number, rng)
        )

    runs = [(rng.standard_normal(1000), rng.random(1000) < 0.5) for _ in range(1000)]
    assert np.mean([one(*run) > 0 for run in runs]) <= 0.075
    assert np.mean([max(one(*run, number) for number in guesses) > 0 for run in runs]) > 0.075
    # all ties, the members first or last: nothing may leak from the order of the records
    for truth in (np.arange(1000) < 500, np.arange(1000) >= 500):
        assert np.mean([one(np.zeros(1000), truth) > 0 for _ in range(400)]) <= 0.085


def test_one_run_correct():
    scores = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
    truth = np.array([True, False, False, True, True])
    rng = np.random.default_rng(14)
    # the upper half gets the odd guess: 5.0 in, then 1.0 out, then 4.0 in, then 2.0 out
    for number, right in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 3)):
        assert metrics.one_run_correct(scores, truth, number, rng) == right
    assert metrics.one_run_correct(-scores, truth, 2, rng) == 0


# --- contract --------------------------------------------------------------------------------

TRUTH = np.array([True, True, False, False])
RNG = np.random.default_rng(0)


def test_bad_input():
    for call, words in [
        (lambda: metrics.auc([1, 2, np.nan, 3], TRUTH), "scores must be a number, .* index 2: nan"),
        (lambda: metrics.auc([1, 2], TRUTH), r"is_member must be of shape \(2,\)"),
        (lambda: metrics.auc([1, 2, 3, 4], [0, 1, 2, 3]), "is_member must be True and False"),
        (lambda: metrics.auc([1, 2, 3, 4], [1, 0, 0, 0]), "is_member must be at least 2 True"),
        (
            lambda: metrics.auc([1, 2, 3, 4], np.ones(4)),
            "is_member must be at least 2 True and 2 Fal",
        ),
        (lambda: metrics.auc([1, 2, 3, 4], TRUTH, confidence=1), "confidence must be .* got 1"),
        (lambda: metrics.auc([1, 2, 3, 4], TRUTH, confidence=95), "confidence must be .* got 95"),
        (lambda: metrics.auc([], []), "scores must be non-empty"),
        (
            lambda: metrics.paired_auc_difference([1, 2, 3, 4], [1, 2, 3], TRUTH),
            "is_member must be of",
        ),
        (lambda: metrics.paired_auc_difference([1, 2, 3, 4], [1, 2, np.nan, 4], TRUTH), "scores_b"),
        (lambda: metrics.tpr_at_fpr([1, 2, 3, 4], TRUTH, 0.0), "fpr must be .* got 0"),
        (lambda: metrics.tpr_at_fpr([1, 2, 3, 4], TRUTH, 1.0), "fpr must be .* got 1"),
        (
            lambda: metrics.tpr_at_fpr([1, 2, 3, 4], TRUTH, 0.4),
            "at least 1/fpr = 2.5 non-members, got",
        ),
        (
            lambda: metrics.roc_points([1, 2], [1, 1]),
            "is_member must be at least 1 True and 1 False",
        ),
        (
            lambda: metrics.clopper_pearson(5, 4),
            "successes must be an integer >= 0 and <= 4, got 5",
        ),
        (lambda: metrics.clopper_pearson(-1, 4), "successes must be"),
        (lambda: metrics.clopper_pearson(0, 0), "trials must be an integer >= 1, got 0"),
        (lambda: metrics.clopper_pearson(1.5, 4), "successes must be an integer"),
        (lambda: metrics.epsilon_lower_bound(5, 4, 0, 4), "tp must be .* got 5"),
        (lambda: metrics.epsilon_lower_bound(1, 4, 5, 4), "fp must be .* got 5"),
        (lambda: metrics.epsilon_lower_bound(0, 0, 1, 4), "num_members must be"),
        (lambda: metrics.epsilon_lower_bound(1, 4, 1, 4, delta=1.0), "delta must be .* got 1"),
        (lambda: metrics.epsilon_lower_bound(1, 4, 1, 4, delta=-0.1), "delta must be .* got -0.1"),
        (
            lambda: metrics.split_epsilon([1, 2, 3], [1, 1, 0], RNG),
            "is_member must be at least 2 True",
        ),
        (lambda: metrics.one_run_correct([1, 2], [1, 0], 3, RNG), "num_guesses must be .* got 3"),
        (lambda: metrics.one_run_epsilon(10, 11, 5), "num_guesses must be .* got 11"),
        (lambda: metrics.one_run_epsilon(10, 5, 6), "num_correct must be .* got 6"),
        (lambda: metrics.one_run_epsilon(0, 0, 0), "num_examples must be"),
        (lambda: metrics.one_run_epsilon(10, 5, 5, confidence=0), "confidence must be .* got 0"),
    ]:
        with case(words):
            with pytest.raises(ValueError, match=words) as error:
                call()
            assert "\n" not in str(error.value)


def test_lists_and_coins_as_integers():
    assert metrics.auc([1, 2, 3, 0], [0, 1, 1, 0]).value == 1.0
    assert metrics.tpr_at_fpr([1, 2, 3, 0], [0, 1, 1, 0], 0.5).tpr == 1.0


def test_ties_reveal_no_order_of_the_records():
    """Members come first and all scores are equal: 100 guesses are right by Binomial(100, 1/2)."""
    is_member = np.arange(200) < 100
    counts = [
        metrics.one_run_correct(np.zeros(200), is_member, 100, np.random.default_rng(seed))
        for seed in range(50)
    ]
    assert 40 < np.mean(counts) < 60 and np.std(counts) > 1  # by the order of records: 0 or 100
