"""Protocol of sample efficiency: measures against plain loops, grids on made-up scores."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lowrank_dp.experiments import protocol, tuning
from lowrank_dp.experiments.tuning import Tuned, best_index, next_places, tune
from tests.tasks import case

SCORES = st.lists(st.floats(0, 1), min_size=3, max_size=12)


def first_crossing(scores, target, sign):
    """First step at which the median of its score and both neighbours reaches the target."""
    for step in range(1, len(scores) - 1):
        middle = statistics.median([scores[step - 1], scores[step], scores[step + 1]])
        if sign * middle >= sign * target:
            return step
    return math.inf


@given(st.lists(SCORES, min_size=1, max_size=4), st.floats(0, 1), st.booleans())
@settings(max_examples=200, deadline=None)
def test_steps_to_a_target_against_a_loop(curves, target, higher):
    length = min(map(len, curves))
    scores = np.array([curve[:length] for curve in curves])
    found = protocol.steps_to(scores, target, higher_is_better=higher)
    sign = 1 if higher else -1
    assert found.tolist() == [first_crossing(row, target, sign) for row in scores.tolist()]


def test_a_spike_does_not_reach_a_target():
    scores = np.array([[0.5, 0.9, 0.6, 0.7, 0.9, 0.9, 0.7], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.9]])
    assert protocol.steps_to(scores, 0.85, higher_is_better=True).tolist() == [4, math.inf]
    scores[0, 3] = np.nan  # a run that stopped neither reached nor missed the target
    found = protocol.steps_to(scores, 0.85, higher_is_better=True)
    assert math.isnan(found[0]) and found[1] == math.inf
    assert np.isnan(protocol.censored(found, 6)[0]) and protocol.censored(found, 6)[1] == 7
    assert protocol.by_seed(np.array([math.nan, math.inf, 4.0]), 0.5) == "no run, not reached, 4"


def test_stopped_runs_are_counted():
    for values, words in (
        ([0.25, 0.75], "0.500"),
        ([0.25, math.nan], "1 of 2 runs stopped"),
        ([math.nan, math.nan], "no run"),
    ):
        assert protocol.unless_stopped(np.array(values), lambda v: f"{v.mean():.3f}") == words


@given(st.lists(st.integers(-4, 9), min_size=2, max_size=9), st.floats(0.5, 0.999))
@settings(max_examples=200, deadline=None)
def test_a_larger_number_is_decided_by_a_t_test_or_by_a_sign_test(differences, level):
    """Oracles: scipy's two-sided t-test, and its one-sided sign test if nothing varies."""
    first = np.array(differences, dtype=float) + 7
    found = protocol.is_larger(first, np.full(len(first), 7.0), level)
    if len(set(differences)) == 1:
        count = len(differences)
        test = stats.binomtest(count, count, alternative="greater")
        assert found == (differences[0] > 0 and test.pvalue <= (1 - level) / 2)
    else:
        test = stats.ttest_1samp(differences, 0)
        assert found == (test.pvalue < 1 - level and np.mean(differences) > 0)
    assert not protocol.is_larger(first + math.nan, first, level)


def test_the_target_is_of_the_weaker_baseline():
    better = [[0.5, 0.7, 0.9, 0.9, 0.9], [0.5, 0.7, 0.9, 0.9, 0.9]]
    worse = [[0.5, 0.6, 0.7, 0.7, 0.7], [0.5, 0.6, 0.7, 0.7, 0.9]]  # medians of the mean: 0.7
    both = np.array([better, worse])
    found = protocol.target_score(both, 0.9, higher_is_better=True)
    assert found == pytest.approx(0.5 + 0.9 * 0.2)
    assert found == protocol.target_score(both[::-1], 0.9, higher_is_better=True)
    # a loss must fall to its target
    assert protocol.target_score(-both, 0.9, higher_is_better=False) == pytest.approx(-found)
    # other seeds count if a run stopped; without any seed, or without a gain, there is no target
    both[1, 1] = np.nan
    assert protocol.target_score(both, 0.9, higher_is_better=True) == pytest.approx(found)
    both[1, 0] = np.nan
    assert math.isnan(protocol.target_score(both, 0.9, higher_is_better=True))
    flat = np.full((2, 2, 5), 0.5)
    target = protocol.target_score(flat, 0.9, higher_is_better=True)
    assert math.isnan(target)
    found = protocol.steps_to(flat, target, higher_is_better=True)
    assert np.isnan(found).all() and protocol.by_seed(found[0], target) == "no target"


def test_share_of_the_gap():
    for dp, arm, ceiling, want in (
        ([16, 18], [10, 10], [10, 10], 1.0),
        ([16, 18], [16, 18], [10, 10], 0.0),
        ([16, 18], [13, 14], [10, 10], 0.5),
        ([16, 18], [24, 24], [10, 10], -1.0),
        ([10, 10], [5, 5], [9, 10], None),  # a gap of half a step is none
        ([10, 10], [5, 5], [12, 12], None),
    ):
        with case(dp, arm, ceiling):
            found, half = protocol.gap_share(*map(np.array, (dp, arm, ceiling)))
            assert math.isnan(found) if want is None else found == pytest.approx(want)
            assert math.isnan(half) if want is None else half >= 0


def test_interval_of_the_share_of_the_gap():
    rng = np.random.default_rng(0)
    dp, arm, ceiling = np.array([[18], [14], [10]]) + rng.integers(-2, 3, (3, 5))

    def of(*kept):
        means = [values[[*kept]].mean() for values in (dp, arm, ceiling)]
        return (means[0] - means[1]) / (means[0] - means[2])

    whole = of(0, 1, 2, 3, 4)
    left_out = [of(*(j for j in range(5) if j != i)) for i in range(5)]
    jackknife = math.sqrt(4 / 5 * sum((x - np.mean(left_out)) ** 2 for x in left_out))
    found, half = protocol.gap_share(dp, arm, ceiling)
    assert found == pytest.approx(whole)
    assert half == pytest.approx(stats.t.ppf(0.975, 4) * jackknife)
    # without the first seed there is no gap
    dp, ceiling = np.array([30, 10, 10, 10, 10]), np.full(5, 10)
    assert protocol.gap_share(dp, arm, ceiling)[1] == math.inf


def test_a_target_out_of_reach_counts_as_one_step_more():
    found = protocol.censored(np.array([3.0, math.inf, 7.0]), 7)
    assert found.tolist() == [3, 8, 7]


def test_paired_differences_against_scipy():
    first, second = np.array([16, 18, 18, 18, 18.0]), np.array([10, 14, 18, 16, 10.0])
    mean, half = protocol.paired(first, second)
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    assert mean == pytest.approx(4.0)  # the first is the larger one
    assert math.isnan(protocol.paired(np.array([np.nan, 1.0]), np.array([0.0, 0.0]))[0])
    wide = stats.ttest_rel(first, second).confidence_interval(0.99)
    assert protocol.paired(first, second, level=0.99)[1] == pytest.approx(wide.high - mean)


# Grids of learning rates


def scored(function, seeds=2):
    """Return a measure of made-up scores, and the list of rates that it is asked for."""
    asked_for = []

    def measure(asked):
        asked_for.extend(asked)
        return [[function(arm, rate, seed) for seed in range(seeds)] for arm, rate in asked]

    return measure, asked_for


@given(
    st.floats(-5, 2),
    st.floats(-5, 2),
    st.floats(0.1, 5),
    st.one_of(st.none(), st.floats(-3, 3)),
    st.booleans(),
    st.sets(st.just("arm")),
)
@settings(max_examples=300, deadline=None)
def test_the_best_rate_is_inside_its_grid_or_the_failure_says_so(
    start, peak, width, diverges, higher, known
):
    """Scores have one maximum over the logarithm of the rate; some rates may diverge."""
    limit = math.inf if diverges is None else peak + diverges
    sign = 1.0 if higher else -1.0

    def score(arm, rate, seed):
        place = math.log10(rate)
        if place > limit:
            return math.nan
        return sign * (math.exp(-(((place - peak) / width) ** 2)) + 0.01 * seed)

    measure, asked = scored(score)
    found = tune({"arm": 10**start}, measure, known=known, higher_is_better=higher)["arm"]
    assert len(asked) == len({*asked}) == len(found.rates), "a rate is asked for once"
    assert (3 if known else 5) <= len(found.rates) <= 11
    assert list(found.rates) == sorted(found.rates)
    means = [
        -math.inf if math.isnan(mean) else sign * mean
        for mean in (np.mean([score("", rate, seed) for seed in range(2)]) for rate in found.rates)
    ]
    best = max(means)
    if found.chosen is None:
        stopped = best == -math.inf
        words = "every run stopped" if stopped else "still at an end of the grid"
        assert words in found.failure and not found.is_inside
        assert best in (means[0], means[-1])
        assert len(found.rates) >= 3 + tuning.MAX_EXTENSIONS
        return
    place = found.rates.index(found.chosen)
    assert not found.failure and found.is_inside
    assert 0 < place < len(found.rates) - 1 and means[place] == best
    assert found.rates[place] / found.rates[place - 1] <= 2
    assert found.rates[place + 1] / found.rates[place] <= 2


@given(st.lists(st.one_of(st.floats(-1, 1), st.just(math.nan)), min_size=3, max_size=9))
@settings(max_examples=200, deadline=None)
def test_any_scores_end_in_a_rate_or_a_failure(values):
    """Scores follow no function of the rate, only the order in which rates are asked for."""
    for known in ((), ("arm",)):
        queue = iter([*values * 20])
        measured = tune({"arm": 1.0}, lambda asked: [[next(queue)] for _ in asked], known=known)  # noqa: B023
        found = measured["arm"]
        assert found.is_inside == (found.chosen is not None) == (not found.failure)


def test_a_grid_by_hand():
    """The best rate is a decade above the start: one extension, then a rate on each side."""
    measure, asked = scored(lambda arm, rate, seed: -abs(math.log10(rate) - 1.1))
    found = tune({"a": 1.0}, measure)["a"]
    assert [rate for _, rate in asked] == [0.316, 1.0, 3.16, 10.0, 31.6, 5.62, 17.8]
    assert found.rates == (0.316, 1.0, 3.16, 5.62, 10.0, 17.8, 31.6) and found.chosen == 10
    assert found.means[4] == found.mean_at(found.rates[4]) == pytest.approx(-0.1)
    with pytest.raises(ValueError, match="rate must be in the grid"):
        found.mean_at(2 * found.rates[-1])


def test_a_grid_that_begins_at_a_known_rate():
    """Three rates are enough where the known rate is the best; else the grid grows as any other."""
    for peak, asked_for, best in (
        (0.05, [0.562, 1.0, 1.78], 1.0),
        (0.3, [0.562, 1.0, 1.78, 5.62, 3.16], 1.78),
        (-0.6, [0.562, 1.0, 1.78, 0.178, 0.0562, 0.1, 0.316], 0.316),
    ):
        measure, asked = scored(lambda arm, rate, seed, p=peak: -abs(math.log10(rate) - p))
        found = tune({"a": 1.0}, measure, known=["a"])["a"]
        with case(peak):
            assert found.is_inside and (found.chosen, [rate for _, rate in asked]) == (
                best,
                asked_for,
            )


def test_a_rate_at_which_one_seed_stops_is_not_chosen():
    measure, _ = scored(lambda arm, rate, seed: math.nan if rate > 1 and seed else rate)
    found = tune({"a": 1.0}, measure)["a"]
    assert found.chosen == 1.0 and found.scores[-1] == (found.rates[-1], None)
    assert np.isnan(found.means[-1])


def test_arms_are_tuned_together_and_each_by_itself():
    peaks = {"slow": -2.0, "fast": 0.0, "never": -99.0}
    rounds = []

    def measure(asked):
        rounds.append({arm for arm, _ in asked})
        return [[-abs(math.log10(rate) - peaks[arm])] for arm, rate in asked]

    found = tune(dict.fromkeys(peaks, 1.0), measure, max_extensions=4)
    assert found["slow"].chosen == 0.01 and found["fast"].chosen == 1.0
    assert found["never"].failure == (
        "never: the best learning rate, 0.00316, is still at an end of the grid 0.00316 to 3.16"
    )
    assert rounds[0] == {*peaks} and rounds[-1] == {"slow"}


def test_ties_and_ends():
    for means, want in (
        ([1, 1, 1, 1, 1], 2),
        ([1, 0, 0], 0),
        ([0, 1, 1], 1),
        ([math.nan, math.nan, 0.1], 2),
        ([math.nan] * 3, 0),
    ):
        with case(means):
            assert best_index(means) == want
    for places, means, want in (
        ([-2, 0, 2], [0, 1, 0], [-1, 1]),
        ([-2, -1, 0, 2], [0, 0, 1, 0], [1]),
        ([-2, -1, 0, 1, 2], [0, 0, 1, 0, 0], []),
        ([-2, 0, 2], [1, 0, 0], [-4]),
        ([-2, 0, 2], [0, 0, 1], [4]),
    ):
        with case(places, means):
            assert next_places(places, means) == want
    assert not Tuned("a", (1, 3, 5), ((0.0,), (1.0,), (0.0,)), 3).is_inside  # a factor of 3
    assert not Tuned("a", (1, 2), ((0.0,), (1.0,)), 2).is_inside
