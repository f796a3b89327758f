"""Audit of train's own loop: bounds and laws against oracles, correct runs, planted bugs."""

import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from lowrank_dp.audit import Design, audit, canaries, laws, power, runs, sums, weights
from lowrank_dp.audit.bounds import (
    LowerBound,
    law_bound,
    rate_bound,
    run_epsilon,
    run_log_ratio,
    threshold_bound,
)
from lowrank_dp.audit.scales import ExpectedScales
from lowrank_dp.audit.stepping import Record
from lowrank_dp.commands import audit as command
from lowrank_dp.grads.clipping import row_gradients
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.mia.epsilon import one_run_epsilon
from lowrank_dp.models.scaled import scale_layers, unit_scale
from tests.oracles import assert_refused
from tests.planted_bugs import BUGS
from tests.tasks import case, run_main, train_words

pytestmark = pytest.mark.usefixtures("one_thread")

AUDITS = 400  # simulated audits
ERROR = 1e-5  # probability that a test of a rate fails by chance
DELTA = 1e-5


@pytest.fixture(scope="module")
def config(base):
    """A run of two steps on forty sentences, with noise that is easy to account for."""
    return replace(base, noise_multiplier=2.0, delta=DELTA, steps=6)


def assert_rate(hits, trials, nominal):
    """Check that ``hits`` fit a true rate of at most ``nominal`` (false alarm rate: ERROR)."""
    assert hits <= stats.binom.isf(ERROR, trials, nominal), (hits, trials)


# Bounds ------------------------------------------------------------------------------------------


def test_limits_of_rates_are_those_of_clopper_and_pearson():
    def low(k, n, tail):
        return stats.binomtest(k, n).proportion_ci(1 - 2 * tail, "exact").low

    for tp, n1, fp, n0, tail in ((40, 50, 5, 60, 0.05), (50, 50, 0, 50, 0.02), (3, 10, 2, 9, 0.1)):
        expected = stats.norm.ppf(low(tp, n1, tail / 2)) + stats.norm.ppf(
            low(n0 - fp, n0, tail / 2)
        )
        found = threshold_bound(tp, n1, fp, n0, tail)
        assert found == pytest.approx(max(0, expected), abs=1e-9), (tp, n1, fp, n0)
        assert rate_bound(tp, n1, tail) == pytest.approx(low(tp, n1, tail))
    assert threshold_bound(0, 50, 50, 50, 0.05) == 0  # scores in the wrong order are never reversed
    assert threshold_bound(0, 0, 0, 50, 0.05) == threshold_bound(0, 50, 0, 0, 0.05) == 0


def test_mu_of_the_law_is_that_of_the_likelihood_ratio_test():
    """mu agrees with a Monte Carlo simulation of the Neyman-Pearson test between two Gaussians."""
    random = np.random.default_rng(0)
    entries, scale = np.array([4, 3]), np.array([1.0, 0.5])  # standard deviations, in sigma C
    shift = np.array([0.6, 0.6])  # norm of the contribution in each tensor, in C
    sigma, draws = 0.8, 200_000
    deviation = np.repeat(scale, entries) * sigma
    mean = np.concatenate([np.eye(n)[0] * s for n, s in zip(entries, shift, strict=True)])
    noise = random.normal(size=(2, draws, len(mean))) * deviation
    ratio = [((x + m) * mean / deviation**2).sum(1) for x, m in zip(noise, (mean, 0), strict=True)]
    cut = np.median(np.concatenate(ratio))
    tpr, fpr = ((r > cut).mean() for r in ratio)
    simulated = stats.norm.ppf(tpr) - stats.norm.ppf(fpr)
    many = 1e9  # number of entries; the confidence limits then equal the noise level
    exact = law_bound(scale**2 * many, [many, many], shift, sigma, 0.05)
    assert exact == pytest.approx(simulated, abs=5 * 2 / math.sqrt(draws))
    assert exact == pytest.approx(math.sqrt(0.6**2 + 1.2**2) / sigma, rel=1e-3)
    few = law_bound(scale**2 * 50, [50, 50], shift, sigma, 0.05)
    assert 0 < few < exact
    # both limits, in the order of the formula
    squares, n, a2 = np.array([60.0, 30.0]), np.array([50.0, 40.0]), np.array([0.2, 0.7])
    high = [s / stats.chi2(k).ppf(0.05 / 4) for s, k in zip(squares, n, strict=True)]
    first = sum(a / h for a, h in zip(a2, high, strict=True))
    spread = sum((a * h) ** 2 / k for a, h, k in zip(a2, high, n, strict=True))
    mean = sum(a * s / k for a, s, k in zip(a2, squares, n, strict=True))
    second = a2.sum() ** 2 / (mean + 2 * math.sqrt(spread * math.log(2 / 0.05)))
    found = law_bound(squares, n, np.sqrt(a2), sigma, 0.05)
    assert found == pytest.approx(math.sqrt(max(first, second)) / sigma)
    # many small tensors: the second limit is near the truth, and the first is not
    assert law_bound(np.full(400, 20.0), np.full(400, 20), np.full(400, 0.05), 1, 0.05) > 0.9


def test_a_tensor_without_noise_has_no_finite_epsilon():
    assert law_bound([0.0, 5.0], [5, 5], [0.1, 0.9], 1.0, 0.05) == math.inf
    assert law_bound([0.0, 5.0], [5, 5], [0.0, 0.9], 1.0, 0.05) < math.inf
    assert run_epsilon(math.inf, 0.1, 5, DELTA) == math.inf
    assert run_epsilon(0.0, 0.1, 5, DELTA) == run_epsilon(1.0, 0.0, 5, DELTA) == 0
    mechanism = GaussianMechanism(2.0, 1.0, 0.1)
    assert run_epsilon(0.5, 0.1, 5, DELTA) == mechanism.epsilon(5, DELTA)


def test_bad_arguments_of_bounds_are_named():
    for call, words in (
        (lambda: threshold_bound(5, 4, 0, 4, 0.05), "tp must"),
        (lambda: threshold_bound(1, 4, 5, 4, 0.05), "fp must"),
        (lambda: threshold_bound(1, 4, 1, 4, 0.0), "tail must"),
        (lambda: law_bound([1.0], [1, 2], [1.0], 1.0, 0.05), "one shape"),
        (lambda: law_bound([1.0], [1], [1.0], 0.0, 0.05), "noise_multiplier must"),
        (lambda: law_bound([], [], [], 1.0, 0.05), "squares must be a non-empty"),
        (lambda: law_bound([1.0], [0], [1.0], 1.0, 0.05), "entries must be .* >= 1"),
        (lambda: law_bound([1.0], [1], [-1.0], 1.0, 0.05), "contribution must be"),
        (lambda: law_bound([1.0], [1], [1.0], 1.0, 1.0), "tail must"),
        (lambda: Design("sum"), "did you mean 'sums'"),
        (lambda: Design("sums", canaries=0), "canaries must be an integer >= 1"),
        (lambda: Design("weights", canaries=5), "canaries must be an integer >= 20"),
        (lambda: Design("weights", runs=2), "runs must be .* <= 1"),
        (lambda: Design("runs", canaries=2), "canaries must be .* <= 1"),
        (lambda: Design("runs", runs=4), "runs must be an integer >= 8"),
        (lambda: Design("sums", runs=1), "runs must be an integer >= 2"),
        (lambda: Design(confidence=1.0), "confidence must"),
        (lambda: Design(level=0.0), "level must"),
    ):
        with case(words), pytest.raises(ValueError, match=words):
            call()


def test_likelihood_ratio_of_a_run_is_that_of_its_densities():
    random = np.random.default_rng(0)
    values, shifts = random.normal(size=(5, 4)), random.random(4)
    for q in (0.3, 1.0):
        expected = [
            math.fsum(
                math.log((1 - q) * stats.norm.pdf(x) + q * stats.norm.pdf(x, loc=s))
                - stats.norm.logpdf(x)
                for x, s in zip(row, shifts, strict=True)
            )
            for row in values
        ]
        np.testing.assert_allclose(run_log_ratio(values, shifts, q), expected, atol=1e-12)


def test_directions_are_those_of_a_qr_decomposition():
    random = np.random.default_rng(0)
    vectors, z = random.normal(size=(6, 3)), random.normal(size=6)
    q, r = np.linalg.qr(vectors)
    signs = np.sign(np.diag(r))
    values, own = sums.along_directions(vectors.T @ vectors, vectors.T @ z)
    np.testing.assert_allclose(values, signs * (q.T @ z))
    np.testing.assert_allclose(own, np.abs(np.diag(r)))
    twice = np.c_[vectors[:, :1], vectors[:, :1], vectors[:, 1:]]  # a canary that occurs twice
    again, _ = sums.along_directions(twice.T @ twice, twice.T @ z)
    np.testing.assert_allclose(again, values)


def test_bound_of_one_run_is_that_of_a_naive_loop():
    random = np.random.default_rng(0)
    scores, coins = random.normal(size=40), random.random(40) < 0.5
    scores = scores + 2 * coins
    order = sorted(range(40), key=lambda i: scores[i])
    correct = sum(not coins[i] for i in order[:5]) + sum(bool(coins[i]) for i in order[-5:])
    found = weights.one_run_bound(scores, coins, random, delta=DELTA, tail=0.025)
    assert weights.guesses_of(40) == 10

    def p_value(epsilon):  # theorem 5.2, term by term
        q = 1 / (1 + math.exp(-epsilon))
        mass = [math.comb(10, k) * q**k * (1 - q) ** (10 - k) for k in range(11)]
        extra = max(sum(mass[correct - i : correct]) / i for i in range(1, correct + 1))
        return sum(mass[correct:]) + 2 * 40 * DELTA * extra

    if found > 0:
        assert p_value(found) == pytest.approx(0.025, abs=1e-9)
    assert found == one_run_epsilon(40, 10, correct, delta=DELTA, confidence=0.975) > 0
    assert weights.one_run_bound(-scores, coins, random, delta=DELTA, tail=0.025) == 0


# Correct runs, simulated from the exact law ------------------------------------------------------

SIZES = np.array([3.0, 40.0, 500.0])
SIGMA, RATE, UNITS, STEPS = 1.5, 0.2, 50, 20


def simulated(random, *, noise=1.0, clip=1.0, rate=RATE):
    """Simulate a record of two runs by the exact law; noise and contributions can be scaled."""
    record = Record(names=["a", "b", "c"], entries=SIZES)
    bound = SimpleNamespace(
        setup=SimpleNamespace(
            unit_rows=[[i] for i in range(UNITS)], config=SimpleNamespace(precision="float32")
        ),
        noise_multiplier=SIGMA,
        sample_rate=RATE,
        generator=random,
    )
    share = np.sqrt(np.array([0.2, 0.3, 0.5]))
    for _ in range(2 * STEPS):
        record.squares.append(noise**2 * random.chisquare(SIZES))
        record.samples.append(np.flatnonzero(random.random(UNITS) < rate))
        record.moved.append((clip * share) ** 2)
        gram = random.normal(size=(4, 4))  # of four canaries, of different directions
        gram = gram / np.linalg.norm(gram, axis=0)
        inner = np.stack([part * gram.T @ gram for part in share**2])
        record.gram.append(clip**2 * inner)
        z = random.normal(size=(3, 4))
        record.products.append(
            np.stack([clip * s * noise * gram.T @ one for s, one in zip(share, z, strict=True)])
        )
    return bound, record


def test_limits_of_correct_runs_exceed_the_claim_at_no_more_than_their_rate():
    """For design sums, a bound exceeds the claimed epsilon only if a limit is on the wrong side."""
    design, random = Design("sums"), np.random.default_rng(1)
    wrong, mus = 0, []
    for _ in range(AUDITS):
        found = sums.limits_of(*simulated(random), design)
        wrong += found.rate > RATE or max(found.by_law, found.by_test) > 1 / SIGMA
        mus.append(found.by_law * SIGMA)
    assert_rate(wrong, AUDITS, 0.05)
    assert np.median(mus) > 0.8  # and the bound is not far below
    for faults in ({"noise": 2**-0.5}, {"clip": 3.0}, {"noise": 0.0}):
        for _ in range(20):
            found = sums.limits_of(*simulated(random, **faults), design)
            assert max(found.by_law, found.by_test) > 1 / SIGMA, faults


def test_single_step_tests_of_correct_runs_have_their_rate():
    """The Clopper-Pearson bound keeps its rate; 300 single steps make the test sharp."""
    random, wrong = np.random.default_rng(2), 0
    for _ in range(AUDITS):
        values = random.normal(size=300)
        coins = random.random(300) < 0.5
        called = values + coins / SIGMA > 0.5 / SIGMA
        counts = (called & coins).sum(), coins.sum(), (called & ~coins).sum(), (~coins).sum()
        wrong += threshold_bound(*map(int, counts), 0.05) > 1 / SIGMA
    assert_rate(wrong, AUDITS, 0.05)


def test_tests_of_single_steps_see_what_is_there():
    for faults, least in (({}, 0.0), ({"clip": 4.0}, 1 / SIGMA), ({"noise": 0.0}, 1 / SIGMA)):
        _, record = simulated(np.random.default_rng(3), **faults)
        tp, n1, fp, n0 = sums.step_trials(
            *map(np.array, (record.gram, record.products, record.squares)),
            SIZES,
            SIGMA,
            STEPS,
            np.random.default_rng(0),
        )
        assert n1 + n0 == 4 * STEPS and tp / n1 > fp / n0, faults
        assert threshold_bound(tp, n1, fp, n0, 0.05) >= least, faults
    assert (tp, fp) == (n1, 0)  # without noise the test is never wrong


def test_a_test_of_one_canary_is_the_likelihood_ratio_of_the_densities():
    """Against densities of whole vectors, whose variances come from the noise of the first steps.

    Tensor "a" has a hundred times the claimed variance and "b" the claimed one, within chance.
    """
    random, sizes, first = np.random.default_rng(11), np.array([6, 5]), 3
    scale = np.repeat([10.0, 1.0], sizes)
    noise = random.normal(size=(first + 40, 11)) * scale  # in units of sigma C
    canary = random.normal(size=(len(noise), 11))
    canary[:, 6:] *= 0.3  # both tensors matter to the ratio
    parts = slice(0, 6), slice(6, 11)
    squares, gram, products = (
        np.array([[(x[s] * y[s]).sum() for s in parts] for x, y in zip(one, other, strict=True)])
        for one, other in ((noise, noise), (canary, canary), (canary, noise))
    )
    found = sums.step_trials(
        gram[..., None, None], products[..., None], squares, sizes.astype(float), 0.5, first,
        np.random.default_rng(0),
    )  # fmt: skip
    deviation = np.repeat([math.sqrt(squares[:first, 0].sum() / (first * 6)), 1.0], sizes)
    coins, counts = np.random.default_rng(0), np.zeros(4, dtype=int)
    for z, c in zip(noise[first:], canary[first:] / 0.5, strict=True):
        is_in = coins.random(1)[0] < 0.5
        ratio = stats.norm.logpdf(z + is_in * c, c, deviation).sum()
        ratio -= stats.norm.logpdf(z + is_in * c, 0, deviation).sum()
        counts += np.array([is_in and ratio > 0, is_in, not is_in and ratio > 0, not is_in])
    assert found == tuple(counts) and 0 < counts[2] and counts[0] < counts[1]


def audited_units(num_units, num_canaries, seed=0):
    """What the designs read of an audited run whose steps a test replaces."""
    units = [[i] for i in range(num_units + num_canaries)]
    return SimpleNamespace(
        setup=SimpleNamespace(unit_rows=units),
        canaries=tuple(range(num_units, num_units + num_canaries)),
        delta=DELTA,
        sample_rate=RATE,
        generator=np.random.default_rng(seed),
    )


def test_scores_of_one_run_share_the_tail_and_point_to_the_canaries_that_were_in(monkeypatch):
    """Design weights, with losses that fall for the canaries of the run."""
    audited, seen = audited_units(30, 60), {}

    def steps(audited, observer_of, run, units):
        projection = observer_of(None, SimpleNamespace(look_ahead=None))
        seen["in"] = np.array([[c] in units for c in audited.canaries])
        assert [unit for unit in units if unit[0] < 30] == audited.setup.unit_rows[:30]
        projection.scores = seen["in"] - 0.0

    def losses(audited):
        return 3.0 - 2.0 * seen["in"] if seen else np.full(60, 3.0)

    monkeypatch.setattr(weights, "take_steps", steps)
    monkeypatch.setattr(weights, "_losses", losses)
    outcome = weights.audit_weights(audited, Design("weights", canaries=60, confidence=0.9))
    coins = np.random.default_rng(0).random(60) < 0.5
    np.testing.assert_array_equal(seen["in"], coins)
    guesses = weights.guesses_of(60)  # all are right
    expected = one_run_epsilon(60, guesses, guesses, delta=DELTA, confidence=0.95)
    assert [bound.epsilon for bound in outcome.bounds] == [expected] * 2 and expected > 1


def test_a_run_without_the_canary_lacks_no_record(monkeypatch):
    """Design runs: the coin takes the canary out, which is the last unit."""
    audited, seen = audited_units(5, 1), []

    def steps(audited, observer_of, run, units):
        observer = observer_of(None, None)
        seen.append([5] in units)
        assert units == audited.setup.unit_rows[: 5 + seen[-1]]
        observer.values, observer.shifts = [30.0 * seen[-1]], [30.0]

    monkeypatch.setattr(runs, "take_steps", steps)
    (bound,) = runs.audit_runs(audited, Design("runs", runs=40)).bounds
    coins = np.random.default_rng(0).random(40) < 0.5
    assert seen[:4] == [True, True, False, False] and seen[4:] == coins[4:].tolist()
    assert bound.epsilon > 0.5


def test_one_run_bounds_of_correct_runs_exceed_the_claim_at_no_more_than_their_rate():
    """For design weights, scores follow the exact law of sums with known other contributions."""
    random, wrong, steps = np.random.default_rng(4), 0, 4
    claim = run_epsilon(1 / SIGMA, 1.0, steps, DELTA)
    for _ in range(AUDITS):
        coins = random.random(60) < 0.5
        scores = coins * steps / SIGMA + random.normal(size=60) * math.sqrt(steps)
        wrong += weights.one_run_bound(scores, coins, random, delta=DELTA, tail=0.05) > claim
    assert_rate(wrong, AUDITS, 0.05)
    clear = coins * 100 / SIGMA + random.normal(size=60)
    assert weights.one_run_bound(clear, coins, random, delta=DELTA, tail=0.05) > 1.4


def test_split_bounds_of_correct_runs_exceed_the_claim_at_no_more_than_their_rate():
    """For design runs, scores are likelihood ratios of the exact law, with and without leakage."""
    random, shift = np.random.default_rng(5), np.full(5, 1 / SIGMA)
    for q in (1.0, 0.3, 1e-9):
        claim = run_epsilon(1 / SIGMA, q, 5, DELTA)
        wrong = 0
        for _ in range(AUDITS):
            coins = random.random(60) < 0.5
            taken = (random.random((60, 5)) < q) * coins[:, None]
            scores = run_log_ratio(taken / SIGMA + random.normal(size=(60, 5)), shift, q)
            wrong += runs.split_bound(scores, coins, random, delta=0.0, confidence=0.95) > max(
                claim, 1e-12
            )
        assert_rate(wrong, AUDITS, 0.05)
    clear = run_log_ratio(coins[:, None] * np.full(5, 20.0) + random.normal(size=(60, 5)), shift, 1)
    assert runs.split_bound(clear, coins, random, delta=0.0, confidence=0.95) > 0.8


# Laws --------------------------------------------------------------------------------------------


def lines_of(random, steps=12, change=lambda noise: noise, sample=None, size=(8, 16)):
    """Report lines with a p-value, for noise that is drawn and then changed by ``change``."""
    names, entries = ["w", "v", "b"], np.array([128.0, 128.0, 6.0])
    heads, squares, totals, within = [], [], [], []
    direction = np.ones(16) / 4
    for _ in range(steps):
        z = change([random.normal(size=size), random.normal(size=size), random.normal(size=6)])
        flat = [one.ravel() for one in z]
        heads.append([np.pad(f, (0, 128 - len(f))) for f in flat])
        squares.append([f @ f for f in flat])
        totals.append([f.sum() for f in flat])
        within.append([((m @ direction) ** 2).sum() for m in z[:2]])
    heads = np.array(heads)
    inside = np.arange(128) < entries[:, None]
    sample = sample or (lambda: np.flatnonzero(random.random(UNITS) < RATE))
    samples = [sample() for _ in range(steps)]
    drawn = np.array([len(s) for s in samples])
    along = heads[:, 0] @ (np.ones(128) / math.sqrt(128))
    return {
        "size": laws.noise_size(names, np.array(squares), entries, 0.05),
        "along": laws.noise_along("along", along, 0.05),
        "mean": laws.noise_mean(names, np.array(totals), entries, 0.05),
        "shape": laws.noise_shape(heads[:, inside].ravel(), 0.05),
        "steps": laws.noise_steps(heads[:, inside], 0.05),
        "tensors": laws.noise_tensors(names, heads, entries, 0.05),
        "within": laws.noise_within(["w", "v"], np.array(within), np.array([8, 8]), 0.05),
        "rate": laws.sampling_rate(drawn, UNITS, RATE, 0.05),
        "spread": laws.sampling_spread(drawn, UNITS, RATE, 0.05),
        "overlap": laws.sampling_overlap(samples, RATE, 0.05),
        "units": laws.sampling_units(samples, UNITS, RATE, 0.05),
    }


def test_p_values_of_correct_runs_have_their_rate():
    random = np.random.default_rng(6)
    found = [lines_of(random) for _ in range(AUDITS)]
    for name in found[0]:
        for level in (0.05, 0.3):
            hits = sum(lines[name].p_value <= level for lines in found)
            with case(name, level):
                assert_rate(hits, AUDITS, level)
    assert sum(not line.passed for lines in found for line in lines.values()) <= stats.binom.isf(
        ERROR, AUDITS, 0.05
    )


def test_each_law_sees_its_fault():
    random = np.random.default_rng(7)
    kept = {}

    def same(noise):
        return kept.setdefault("noise", noise)

    def rank_one(noise):
        outer = np.outer(random.normal(size=8), random.normal(size=16))
        return [outer, noise[1], noise[2]]

    for line, faults in (
        ("size", {"change": lambda z: [one / math.sqrt(2) for one in z]}),
        ("size", {"change": lambda z: [z[0], z[1], 0 * z[2]]}),
        ("along", {"change": lambda z: [one / 3 for one in z]}),
        ("mean", {"change": lambda z: [one + 0.3 for one in z]}),
        ("shape", {"change": lambda z: [(stats.norm.cdf(one) - 0.5) * 12**0.5 for one in z]}),
        ("steps", {"change": same}),
        ("tensors", {"change": lambda z: [z[0], z[0], z[2]]}),
        ("within", {"change": rank_one, "steps": 60}),
        ("rate", {"sample": lambda: np.flatnonzero(random.random(UNITS) < 2 * RATE)}),
        ("spread", {"sample": lambda: random.choice(UNITS, 10, replace=False), "steps": 40}),
        ("overlap", {"sample": lambda: np.arange(10)}),
        ("units", {"sample": lambda: np.union1d(random.choice(UNITS, 9), [3]), "steps": 40}),
    ):
        with case(line, faults):
            assert not lines_of(random, **faults)[line].passed
    assert not laws.noise_bits(np.array([100, 900]), 1000, 0.05).passed
    assert laws.noise_bits(np.array([100, 110]), 1000, 0.05).passed


def test_samples_in_common_are_counted_in_pairs_that_do_not_overlap():
    samples = [np.arange(a, a + 6) for a in (0, 3, 3, 20, 0)]  # a last sample has no partner
    line = laws.sampling_overlap(samples, RATE, 0.05)
    assert line.seen == "0.25"  # 3 of 6, and 0 of 6
    test = [stats.binomtest(3, 12, RATE, side).pvalue for side in ("less", "greater")]
    assert line.p_value == pytest.approx(min(1.0, 2 * min(test)))


def spoilt(bad, noise):
    return [*noise[:2], bad * noise[2]]


def test_noise_that_is_not_finite_is_not_as_claimed():
    for bad in (math.nan, math.inf):
        with np.errstate(all="ignore"):
            found = lines_of(np.random.default_rng(8), change=partial(spoilt, bad))
        for line in ("size", "mean"):
            assert not found[line].passed and found[line].p_value == 0, (line, bad)
        with pytest.raises(ValueError, match=r"squares must be .* finite"):
            law_bound([1.0, bad], [1, 1], [0.5, 0.5], 1.0, 0.05)


def test_a_contribution_above_the_norm_counts_unless_it_is_rounding():
    moved = np.array([[0.1, 0.2], [0.36, 0.64]])  # the larger one has norm 1
    for factor, slack, expected in ((1.0, 1e-3, 1.0), (0.5, 1e-3, 0.5), (1.04, 0.05, 1.0),
                                    (1.04, 1e-3, 1.04 / 1.001), (2.0, 0.05, 2 / 1.05)):  # fmt: skip
        found = sums.largest_contribution(moved * factor**2, slack)
        np.testing.assert_allclose(found, np.array([0.6, 0.8]) * expected)


@pytest.mark.parametrize("changes", [{"momentum_beta": 0.9}, {"disk_kappa": 0.7}])
def test_running_means_are_compared_with_the_releases(changes, config, monkeypatch):
    changes = {**changes, "scheme": "optimal", "steps": 3}
    design = Design("sums", canaries=1)
    for planted in (False, True):
        if planted:
            BUGS["clean sums to the optimizer"][0](monkeypatch)
        report = audit(replace(config, **changes), design, power=False)
        (line,) = (line for line in report.lines if line.what.startswith("release:"))
        assert line.passed != planted, line


def test_the_number_of_parts_is_that_of_the_lines_with_a_p_value(config):
    report = audit(config, Design("sums", canaries=2), power=False)
    assert sum(line.p_value is not None for line in report.lines) == laws.PARTS
    assert report.verdict == "CONSISTENT" and report.objection == ""
    assert (
        report.lower_bound
        < report.epsilon
        == pytest.approx(GaussianMechanism(2.0, 1.0, 10 / 42).epsilon(6, DELTA))
    )
    assert "NON-PRIVATE" in report.privacy


# Power -------------------------------------------------------------------------------------------


def test_power_is_that_of_simulated_audits():
    random, draws = np.random.default_rng(8), 2000
    factor = power.noise_factor(500, 1e-3)
    squares = random.chisquare(500, size=draws) / factor**2
    hits = (stats.chi2.cdf(squares, 500) < 5e-4).mean()
    assert hits == pytest.approx(power.POWER, abs=5 * math.sqrt(0.16 / draws))
    factor = power.rate_factor(1000, 0.2, 1e-3)
    taken = random.binomial(1000, 0.2 * factor, size=draws)
    hits = (stats.binom.sf(taken - 1, 1000, 0.2) <= 5e-4).mean()
    assert hits == pytest.approx(power.POWER, abs=5 * math.sqrt(0.16 / draws) + 0.02)
    assert power.rate_factor(3, 0.9, 1e-3) is None
    assert power.smallest_factor(lambda f: np.array([f > 3.0])) == pytest.approx(3, rel=0.03)
    assert power.smallest_factor(lambda f: np.array([False])) is None
    assert power.smallest_factor(lambda f: np.array([True])) == 1.0


def test_power_of_the_bound_is_that_of_audits_with_less_noise():
    """At the factor, the noise of a run gives a bound above epsilon with the stated probability."""
    audited = SimpleNamespace(
        setup=SimpleNamespace(config=SimpleNamespace(steps=STEPS)),
        sample_rate=RATE,
        delta=DELTA,
        noise_multiplier=SIGMA,
    )
    design, trials, entries = Design("sums"), 2000, np.array([30.0, 200.0])
    rate = rate_bound(int(RATE * trials), trials, 0.05 * sums.TAILS["rate"])
    needed = 1.5 / SIGMA
    epsilon = run_epsilon(needed, rate, STEPS, DELTA)
    factor = power._law_bound_factor(audited, design, epsilon, entries, trials)
    squares = np.random.default_rng(12).chisquare(entries, size=(1000, 2)) / factor**2
    part = np.sqrt(entries / 230)
    found = [law_bound(s, entries, part, SIGMA, 0.05 * sums.TAILS["law"]) > needed for s in squares]
    # the factor itself comes from 100 draws
    assert np.mean(found) == pytest.approx(power.POWER, abs=5 * math.sqrt(0.16 / 100))
    assert power._law_bound_factor(audited, design, 1e6, entries, trials) is None


# Canaries and runs -------------------------------------------------------------------------------


def test_canaries_are_units_of_the_run_and_of_one_length(config, monkeypatch):
    audited = canaries.open_audit(config, 3)
    again = canaries.open_audit(config, 3)
    setup = audited.setup
    assert [setup.rows[i] for i in audited.canaries] == [
        again.setup.rows[i] for i in again.canaries
    ]
    assert len(setup.unit_rows) == 43 and setup.unit_rows[-3:] == [[i] for i in audited.canaries]
    rows = [setup.rows[i] for i in audited.canaries]
    assert len({len(row["input_ids"]) for row in rows}) == 1
    assert len({tuple(row["input_ids"]) for row in rows}) == 3
    assert audited.sample_rate == setup.mechanism.sample_rate == 10 / 43
    random, naive = (np.random.default_rng(0) for _ in range(2))
    drawn = canaries._canaries(setup, 20, random)
    assert {row["labels"] for row in drawn} == {0, 1}
    form = max(setup.rows, key=lambda row: len(row["input_ids"]))
    special = setup.tokenizer.all_special_ids
    known = [i for i in range(len(setup.tokenizer)) if i not in special]
    for row in drawn:
        assert row["input_ids"] == [
            i if i in special else naive.choice(known) for i in form["input_ids"]
        ]
        assert row["labels"] == naive.integers(2)
    for name, also in (
        ("non_private", {"noise_multiplier": None}),
        ("noise_free", {"noise_multiplier": None}),
        ("diagnostic", {"scheme": "oracle"}),
    ):
        with pytest.raises(ValueError, match=f"{name} must be False for an audit"):
            canaries.open_audit(replace(config, **{name: True}, **also), 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process, not by torchrun"):
        canaries.open_audit(config, 3)


def test_a_scale_that_differs_is_seen_in_any_layer():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    scale_layers(model, {name: unit_scale(model[int(name)].weight) for name in ("0", "1")})
    expected = ExpectedScales(model, SimpleNamespace(precondition="generated"))
    assert expected.deviation() == 0
    for layer in model:
        for scale in (layer.row_scale, layer.col_scale):
            scale[1] *= 0.97
            assert expected.deviation() == pytest.approx(0.03, rel=1e-4)
            scale[1] /= 0.97


def test_derivatives_along_a_release_are_inner_products_with_gradients(config):
    audited = canaries.open_audit(config, 4)
    model, trained = audited.setup.model, audited.setup.trained
    model.eval()
    generator = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(p.shape, generator=generator) for n, p in trained.items()}
    before = {n: p.detach().clone() for n, p in trained.items()}
    found = weights._derivatives(audited, direction)
    for row, value in zip(audited.canaries, found, strict=True):
        (gradient,) = row_gradients(model, audited.batches([row])[0])
        exact = sum(float((g * direction[n]).sum()) for n, g in gradient.items())
        assert value == pytest.approx(exact, rel=1e-2, abs=1e-2)
    assert all(torch.equal(before[n], p) for n, p in trained.items())


def test_runs_start_from_the_same_weights_and_differ_in_noise(config):
    audited = canaries.open_audit(config, 1)
    seen = []

    class Look(canaries.Observer):
        def noised(self, clean, noisy, noise, step):
            name = next(iter(noisy))
            seen.append((clean[name].clone(), noisy[name] - clean[name]))

    for run in (0, 1, 0):
        canaries.take_steps(audited, lambda setup, state: Look(), run)
    steps = config.steps
    assert torch.equal(seen[0][1], seen[2 * steps][1]) and torch.equal(
        seen[steps - 1][0], seen[3 * steps - 1][0]
    )
    assert not torch.equal(seen[0][1], seen[steps][1])


@pytest.mark.slow
def test_correct_runs_are_consistent(config):
    """A line fails with probability at most 1e-3 per run; the seeds are fixed."""
    for changes in (
        {"scheme": "optimal"},
        {"momentum_beta": 0.9},
        {"disk_kappa": 0.7},
        {"method": "lora"},
        {"precision": "bf16"},
        {"optimizer": "muon"},
        {"noise_multiplier": None, "epsilon": 3.0},
        {"seed": None},
        {"batch_size": 40},
    ):
        with case(changes):
            report = audit(replace(config, **changes), Design("sums", canaries=2), power=False)
            assert report.verdict == "CONSISTENT", report.contradictions
            assert report.objection == ""
    for design in (Design("weights", canaries=30), Design("runs", runs=20)):
        report = audit(replace(config, steps=2), design, power=False)
        assert report.verdict == "CONSISTENT" and report.lower_bound <= report.epsilon


SEEN_BY = {
    "no noise on the head's bias": "noise: standard deviation",
    "noise over sqrt 2": "noise: standard deviation",
    "one noise for all steps": "noise: same in two steps",
    "C doubled": "clipping: one canary",
    "clip factor inverted": "clipping: that is the canary's",
    "the same rows each step": "sample: independent",
    "rows with replacement": "sample: no unit twice",
    "clean sums to the optimizer": "release: the optimizer's",
    "less noise than asked for": "accounting: sigma",
}


@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(
            bug, marks=[pytest.mark.slow] * (bug not in ("noise over sqrt 2", "C doubled"))
        )
        for bug in SEEN_BY
    ],
)
def test_planted_bugs_contradict_the_claim(bug, config, monkeypatch):
    plant, _, *changes = BUGS[bug]
    plant(monkeypatch)
    report = audit(
        replace(config, steps=16, **(changes[0] if changes else {})),
        Design("sums", canaries=2),
        power=False,
    )
    assert report.verdict == "CONTRADICTION"
    assert any(line.what.startswith(SEEN_BY[bug]) for line in report.lines if not line.passed)
    assert report.objection  # train's own checks see the bug too, and did not stop the audit
    if bug in ("noise over sqrt 2", "C doubled", "no noise on the head's bias"):
        assert report.lower_bound > report.epsilon


@pytest.mark.slow
def test_no_noise_contradicts_the_claim_by_runs(config, monkeypatch):
    BUGS["no noise"][0](monkeypatch)
    report = audit(
        replace(config, steps=2, noise_multiplier=8.0), Design("runs", runs=60), power=False
    )
    assert report.lower_bound > report.epsilon and report.verdict == "CONTRADICTION"


# Command -----------------------------------------------------------------------------------------


def test_the_command_prints_saves_and_exits_with_3_on_a_contradiction(
    config, tmp_path, capsys, monkeypatch
):
    words = ["audit", *train_words(config, tmp_path)[3:], "--canaries", "2"]
    code, out, err = run_main(capsys, *words, "--output", tmp_path / "new")
    assert code == 0, err
    assert "NON-PRIVATE" in out and "verdict: CONSISTENT" in out and "power 0.8" in out
    document = json.loads((tmp_path / "new" / "report.json").read_text())
    assert document["verdict"] == "CONSISTENT" and document["provenance"]["git_commit"]
    assert document["statement"].endswith(
        f"; the number of examples (42) is public; noise drawn from seed {config.seed}, as the "
        "samples are: reproducible, and not secret"
    )
    assert f"claim: {document['statement']} epsilon:" in " ".join(out.split())
    assert "NON-PRIVATE" in document["privacy"]
    assert_refused(run_main(capsys, *words, "--output", tmp_path / "new"), "new or empty folder")
    with monkeypatch.context() as full:  # the result is printed before it is saved

        def fail(path, document):
            raise OSError(f"{path} could not be written")

        full.setattr("lowrank_dp.artifacts.write_json", fail)
        code, out, err = run_main(capsys, *words, "--output", tmp_path / "full")
        assert code == 2 and "report.json could not be" in err and "verdict: CONSISTENT" in out
    BUGS["no noise"][0](monkeypatch)
    code, out, err = run_main(capsys, *words, "--json")
    document = json.loads(out)
    assert code == 3 and document["bounds"][0]["epsilon"] == "infinite"
    assert "CONTRADICTION" in err


def test_printed_bounds_are_rounded_towards_the_weaker_claim(capsys):
    report = SimpleNamespace(
        statement="",
        epsilon=3.34140947,
        delta=1.2345672e-6,
        bounds=(LowerBound("a test", 2.99996), LowerBound("another", math.inf)),
        lower_bound=1.99996,
        confidence=0.99996,
        lines=(),
        objection=None,
        power=(),
        verdict="CONSISTENT",
        contradictions=(),
    )
    command._print(Console(width=200), report)
    out = capsys.readouterr().out
    for line in (
        "epsilon: 3.342 at delta 1.23457e-06 by the accountant",
        "  >= 2.999 by a test",
        "  >= inf by another",
        "epsilon >= 1.999 (99.99%, one-sided, the largest of these bounds)",
    ):
        assert line in out.splitlines(), out
    command._print(Console(width=200), SimpleNamespace(**vars(report) | {"confidence": 0.29}))
    assert "(29%, one-sided" in capsys.readouterr().out


def test_the_command_plans_and_refuses_bad_input(config, tmp_path, capsys, monkeypatch):
    words = ["audit", *train_words(config, tmp_path)[3:]]
    code, out, err = run_main(capsys, *words, "--dry-run")
    assert code == 0 and "12 steps, about" in out and "verdict" not in out, err
    for more, expected in (
        (["--design", "weigths"], ["design", "did you mean 'weights'"]),
        (["--design", "runs", "--runs", "3"], ["runs must be an integer >= 8"]),
        (["--canaries", "0"], ["canaries"]),
        (["--confidence", "2"], ["confidence"]),
        (["--optimizer", "adm"], ["did you mean 'adam'"]),
        (["--shard"], ["shard must be False for an audit", "in one process"]),
        (["--batch-size", "4000"], ["batch_size must be at most"]),
        (["--output", "/proc/none"], ["/proc/none"]),
    ):
        assert_refused(run_main(capsys, *words, *more), *expected)

    def read_only(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)  # a folder that exists, and is empty
    monkeypatch.setattr("lowrank_dp.audit.auditing.audit_opened", pytest.fail)
    assert_refused(run_main(capsys, *words, "--output", tmp_path), "can't be written to")
