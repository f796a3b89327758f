"""Noise and accounting of the Gaussian mechanism, compared with dp-accounting and Opacus."""

import hashlib
import math
import re
from functools import partial

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from scipy import optimize, stats

from lowrank_dp.mechanism import GaussianMechanism, os_seeded_generator
from tests.oracles import refusal_of

# sample rate, noise multiplier, steps, delta: epsilon by RDP, and dp-accounting's PLD (1e-3, 1e-4)
TABLE = [
    ((0.0304, 0.8, 500, 1e-5), 8.0342, 7.1318, 7.1317),
    ((64 / 67349, 0.6, 3157, 1e-5), 2.765, 1.7793, 1.7782),
    ((0.1, 2.0, 1000, 1e-6), 9.8213, 9.1823, 9.1820),
]


def epsilon(q, sigma, steps, delta, **options):
    return GaussianMechanism(sigma, 1.0, q).epsilon(steps, delta, **options)


def test_stored_values():
    for setting, by_rdp, by_pld, fine in TABLE:
        assert epsilon(*setting) == pytest.approx(by_pld, abs=1e-4), setting
        assert epsilon(*setting, accountant="rdp") == pytest.approx(by_rdp, abs=1e-3), setting
        assert fine - 1e-4 <= epsilon(*setting) <= fine + 2e-3, setting


@pytest.mark.slow
def test_upper_bound_next_to_a_finer_one():
    for setting in ((0.05, 1.0, 200, 1e-5), (0.3, 3.0, 50, 1e-7), (0.01, 0.5, 20, 1e-6)):
        q, sigma, steps, delta = setting
        accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
        event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
        fine = accountant.compose(event, steps).get_epsilon(delta)
        assert fine - 1e-9 <= epsilon(*setting) <= fine * 1.002 + 1e-3, setting
        opacus = RDPAccountant()
        opacus.history = [(sigma, q, steps)]
        by_rdp = epsilon(*setting, accountant="rdp")
        assert by_rdp == pytest.approx(opacus.get_epsilon(delta), rel=0.01), setting
        assert by_rdp > epsilon(*setting), setting


def test_without_sampling_against_the_exact_profile():
    """Epsilon is the exact epsilon of a Gaussian mechanism (Balle & Wang 2018).

    Many steps take no more memory than few.
    """
    for sigma, steps, delta in (
        (1.0, 10, 1e-5),
        (5.0, 100, 1e-6),
        (0.05, 3, 1e-5),
        (0.01, 100, 1e-5),
    ):
        mu = math.sqrt(steps) / sigma

        def excess(e, mu=mu, delta=delta):
            log_second = e + stats.norm.logcdf(-mu / 2 - e / mu)
            return stats.norm.cdf(mu / 2 - e / mu) - math.exp(min(log_second, 0)) - delta

        exact = optimize.brentq(excess, 1e-9, mu**2 + 20 * mu)
        got = epsilon(1.0, sigma, steps, delta)
        assert exact - 1e-6 <= got <= exact * 1.02 + 2e-3, (sigma, steps, delta)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.floats(1e-3, 0.5), st.floats(0.7, 5.0), st.integers(1, 300), st.floats(1e-8, 1e-3))
def test_monotone(q, sigma, steps, delta):
    middle = epsilon(q, sigma, steps, delta)
    assert epsilon(q, sigma, steps + 50, delta) >= middle
    assert epsilon(q, 1.2 * sigma, steps, delta) <= middle + 1e-9
    assert epsilon(q, sigma, steps, delta / 10) >= middle - 1e-9
    assert epsilon(q / 2, sigma, steps, delta) <= middle + 1e-9


def test_edges():
    assert epsilon(0.1, 1.0, 0, 1e-5) == 0
    assert epsilon(0.1, 0.0, 10, 1e-5) == math.inf == epsilon(1, 0, 1, 0.5, accountant="rdp")
    assert epsilon(1.0, 1.0, 10, 1e-5) > epsilon(0.5, 1.0, 10, 1e-5)
    # epsilon depends on neither the clip norm nor the unit
    assert GaussianMechanism(1.0, 7.0, 0.1, unit="group").epsilon(5, 1e-5) == epsilon(
        0.1, 1.0, 5, 1e-5
    )


def test_calibrate():
    for target, delta, steps, q in (
        (8, 1e-5, 500, 0.0304),
        (1, 1e-6, 100, 0.01),
        (3, 1e-5, 20, 1.0),
        (100, 1e-5, 10, 0.2),
        (20_000, 1e-5, 1, 1.0),
    ):
        found = GaussianMechanism.calibrate(
            target, delta, steps, q, max_grad_norm=2.0, unit="group"
        )
        assert found.epsilon(steps, delta) <= target, target
        assert epsilon(q, found.noise_multiplier - 2e-4, steps, delta) > target, target
        assert (found.max_grad_norm, found.sample_rate, found.unit) == (2.0, q, "group")
        if target == 8:
            assert found.noise_multiplier == pytest.approx(0.7633, abs=2e-4)


def test_statement():
    text = GaussianMechanism(0.8, 1.5, 0.0304, unit="group").statement(500, 1e-5)
    for words in (
        "(7.132, 1e-05)-DP",
        "500 steps",
        "add or remove one group",
        "Poisson sampling at rate 0.0304",
        "noise_multiplier 0.8",
        "max_grad_norm 1.5",
        "PLD, interval 0.001",
        "RDP cross-check: epsilon 8.035",
    ):
        assert words in text
    none = GaussianMechanism(0.0, 1.0, 0.5).statement(10, 1e-5)
    assert "NOT private" in none and "-DP" not in none


def test_a_statement_claims_no_more_than_the_bound():
    """Without sampling epsilon is known exactly: the claim is compared with the exact delta."""
    for sigma, steps, delta in ((4.0, 10, 1e-5), (4.00009, 10, 1e-5), (1.5, 7, 1.2345678e-6)):
        text = GaussianMechanism(sigma, 1.0, 1.0).statement(steps, delta)
        claimed, at, stated = (
            float(number)
            for number in re.search(
                r"^\((.+), (.+)\)-DP.*noise_multiplier (\S+) relative", text
            ).groups()
        )
        mu = math.sqrt(steps) / sigma
        exact = stats.norm.cdf(mu / 2 - claimed / mu) - math.exp(claimed) * stats.norm.cdf(
            -mu / 2 - claimed / mu
        )
        assert exact <= delta <= at and stated <= sigma, text
        assert (
            epsilon(1.0, sigma, steps, delta) <= claimed < 1.001 * epsilon(1.0, sigma, steps, delta)
        )
    assert GaussianMechanism(4.0, 1.0, 1.0).statement(10, 1e-5).startswith("(3.342, 1e-05)-DP")
    sampled = GaussianMechanism(0.76329, 1.0, 0.0304049).statement(500, 1e-5)
    assert "at rate 0.03041;" in sampled and "noise_multiplier 0.7632 " in sampled


def test_a_calibrated_mechanism_claims_no_more_than_its_target():
    """The claim is the target, or below it by the tolerance of the calibration."""
    for target, steps, rate in ((8, 500, 0.0304), (1.0, 100, 0.01), (0.1, 20, 0.05), (3, 20, 1.0)):
        mechanism = GaussianMechanism.calibrate(target, 1e-5, steps, rate, tolerance=1e-6)
        text = mechanism.statement(steps, 1e-5)
        claimed = float(text.split(",")[0].removeprefix("("))
        assert 0.999 * target < claimed <= target, text
        if target == 8:
            assert text.startswith("(8, 1e-05)-DP")


def test_noise():
    mechanism = GaussianMechanism(0.6, 2.5, 0.1)
    assert mechanism.noise_std == 1.5
    sums = {
        "a": torch.full((300, 200), 4.0),
        "b": torch.zeros(60000),
        "half": torch.ones(60000, dtype=torch.bfloat16),
        "d": torch.ones(60000).double(),
    }
    copies = {name: tensor.clone() for name, tensor in sums.items()}
    generator = torch.Generator().manual_seed(0)
    noisy = mechanism.add_noise(sums, generator)
    assert list(noisy) == list(sums)
    noise = {name: (noisy[name].double() - sums[name].double()).flatten() for name in sums}
    for name, tensor in sums.items():
        assert torch.equal(tensor, copies[name]) and noisy[name].shape == tensor.shape
        assert noisy[name].dtype == (torch.float64 if name == "d" else torch.float32)
        # 4 standard errors of 60000 draws
        assert float(noise[name].std()) == pytest.approx(1.5, rel=4 / math.sqrt(2 * 60000))
        assert abs(float(noise[name].mean())) < 4 * 1.5 / math.sqrt(60000)
        assert stats.kstest(noise[name].numpy() / 1.5, "norm").pvalue > 1e-4
    correlations = np.corrcoef(torch.stack(list(noise.values())).numpy())
    assert np.abs(correlations - np.eye(4)).max() < 4.5 / math.sqrt(60000)
    again = mechanism.add_noise(sums, torch.Generator().manual_seed(0))
    assert all(torch.equal(again[name], noisy[name]) for name in sums)
    other = mechanism.add_noise(sums, generator)  # the generator has advanced
    assert not torch.equal(other["a"], noisy["a"])


def test_noise_from_the_operating_system():
    mechanism = GaussianMechanism(1.0, 1.0, 0.1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = (
        mechanism.add_noise({"a": torch.zeros(4), "b": torch.zeros(4)}) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first["a"], second["a"]) and not torch.equal(first["a"], first["b"])


def test_a_generator_from_the_operating_system_is_not_one_of_2_to_the_32(monkeypatch):
    """torch's CPU generator uses only 32 bits of a seed; this generator has a whole state.

    The state is a hash of 256 random bits. numpy's Mersenne Twister, with the same words as its
    state, must give the same numbers.
    """
    short, long = (torch.Generator().manual_seed(seed) for seed in (7, 7 + 2**32))
    assert torch.equal(torch.randn(9, generator=short), torch.randn(9, generator=long))
    monkeypatch.setattr("os.urandom", lambda size: bytes(range(size)))
    words = np.frombuffer(hashlib.shake_256(bytes(range(32))).digest(4 * 624), dtype="<u4")
    ours = torch.randint(2**16, (2000,), generator=os_seeded_generator())
    numpys = np.random.RandomState()
    numpys.set_state(("MT19937", words, 624))
    theirs = numpys.randint(0, 2**32, 2000, dtype=np.uint32) % 2**16
    np.testing.assert_array_equal(ours, theirs)
    monkeypatch.undo()
    assert len({float(torch.rand((), generator=os_seeded_generator())) for _ in range(5)}) == 5


@pytest.mark.parametrize(
    "rate", [1 / 3, *(pytest.param(rate, marks=pytest.mark.slow) for rate in (0.01, 0.97))]
)
def test_sample_takes_each_unit_with_the_stated_probability(rate):
    """400 samples of 500 units, in total, per unit and in pairs; overall false alarm rate 1e-6."""
    generator = torch.Generator().manual_seed(0)
    sampled = [GaussianMechanism(1.0, 1.0, rate).sample(500, generator) for _ in range(400)]
    taken = np.zeros((400, 500), dtype=int)
    for row, indices in zip(taken, sampled, strict=True):
        assert indices.dtype == torch.int64 and indices.unique().numel() == indices.numel()
        row[indices.numpy()] = 1
    alarm = 1e-6 / (1 + 500 + 499 + 399 + 2)
    assert stats.binomtest(int(taken.sum()), taken.size, rate).pvalue > alarm
    for column in taken.T:
        assert stats.binomtest(int(column.sum()), 400, rate).pvalue > alarm
    neighbours, successive = taken[:, 1:] * taken[:, :-1], taken[1:] * taken[:-1]
    for pairs in (*neighbours.T, *successive):  # independent within each
        assert stats.binomtest(int(pairs.sum()), len(pairs), rate**2).pvalue > alarm
    # the sizes are binomial: neither fixed nor of larger variance
    spread = 399 * taken.sum(axis=1).var(ddof=1) / (500 * rate * (1 - rate))
    assert stats.chi2.ppf(alarm, 399) < spread < stats.chi2.isf(alarm, 399)


def test_sample_may_be_empty_or_whole_and_follows_its_generator():
    def draw(rate, seed, count=4):
        return GaussianMechanism(1.0, 1.0, rate).sample(count, torch.Generator().manual_seed(seed))

    assert draw(1.0, 0).tolist() == [0, 1, 2, 3]
    empty = sum(draw(0.25, seed).numel() == 0 for seed in range(500))
    assert stats.binomtest(empty, 500, 0.75**4).pvalue > 1e-6
    assert draw(1e-12, 0, 1000).numel() == 0 and draw(0.5, 0, 0).numel() == 0
    assert torch.equal(draw(0.5, 1, 100), draw(0.5, 1, 100))
    assert not torch.equal(draw(0.5, 1, 100), draw(0.5, 2, 100))
    state = torch.get_rng_state()
    draw(0.5, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_too_small_for_any_epsilon_has_an_infinite_one():
    """Epsilon is infinite if the arithmetic of the accountant would overflow."""
    assert epsilon(0.25, 1e-6, 4, 1e-3) == math.inf == epsilon(1.0, 1e-6, 4, 1e-3)
    assert math.isfinite(epsilon(0.25, 1e-3, 4, 1e-3))


def test_no_noise():
    sums = {"a": torch.ones(3)}
    noisy = GaussianMechanism(0.0, 1.0, 0.1).add_noise(sums)
    assert torch.equal(noisy["a"], sums["a"]) and noisy["a"].data_ptr() != sums["a"].data_ptr()


def mechanism(**changes):
    return GaussianMechanism(
        **{"noise_multiplier": 1.0, "max_grad_norm": 1.0, "sample_rate": 0.1, **changes}
    )


def test_bad_input():
    fields = {
        "noise_multiplier": (-1, math.nan, math.inf, "1", None, True),
        "max_grad_norm": (0, -1, math.nan, "x"),
        "sample_rate": (0, -0.1, 1.01, math.nan),
    }
    calls = [(partial(mechanism, **{f: v}), f) for f, values in fields.items() for v in values]
    calls += [
        (partial(mechanism().epsilon, v, 1e-5), "steps")
        for v in (-1, 1.5, "3", math.inf, True, 2**63, 10**400)
    ]
    calls += [(partial(mechanism().epsilon, 5, v), "delta") for v in (0, 1, 1e-201, math.nan, "x")]
    for state in (mechanism().statement, mechanism(noise_multiplier=0).statement):
        calls += [(partial(state, v, 1e-5), "steps") for v in (-3, 2.5, "a")]
        calls += [(partial(state, 5, v), "delta") for v in (0, 1.5, math.nan)]
    calls += [(partial(mechanism().sample, v, torch.Generator()), "num_units") for v in (-1, 2.5)]
    for sigma, norm in ((1e-200, 1e-200), (1.0, 1e-31), (1.0, 1e301)):
        changes = {"noise_multiplier": sigma, "max_grad_norm": norm}
        calls.append(
            (partial(mechanism, **changes), r"noise_multiplier \* max_grad_norm must be 0")
        )
    calibrate, add_noise = GaussianMechanism.calibrate, mechanism().add_noise
    calls += [(partial(calibrate, v, 1e-5, 5, 0.1), "epsilon") for v in (0, -1, "8")]
    calls += [
        (partial(mechanism, unit="exampel"), "unit must .*did you mean 'example'"),
        (
            partial(mechanism().epsilon, 5, 1e-5, accountant="gdp"),
            "accountant must be one of pld, rdp",
        ),
        (partial(mechanism().epsilon, 5, 1e-5, accountant="PLD"), "accountant"),
        (partial(calibrate, 1, 2, 5, 0.1), "delta"),
        *((partial(calibrate, 1, 1e-5, v, 0.1), "steps") for v in (0, 2**63, 10**400)),
        (partial(calibrate, 1, 1e-5, 5, 0), "sample_rate"),
        (partial(calibrate, 1, 1e-5, 5, 0.1, -1), "max_grad_norm"),
        *((partial(calibrate, 1, 1e-5, 5, 0.1, tolerance=v), "tolerance") for v in (0, 1e-15, 5e3)),
        (partial(calibrate, 1e-6, 1e-12, 10**6, 1.0), "epsilon = 1e-06"),
        (partial(add_noise, {"w": np.ones(3)}), r"clipped_sums\['w'\]"),
        (partial(add_noise, {"w": torch.ones(3).long()}), r"clipped_sums\['w'\]"),
    ]
    for call, words in calls:
        message = refusal_of(call)
        assert re.search(f"^{words}", message), (call, message)
