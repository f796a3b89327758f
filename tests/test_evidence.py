"""The guards of noise and samples: exact null distributions, rare false alarms, fast detection.

Oracle: expectations by scipy's distributions, and simulated runs with fixed seeds.
"""

import math
import re

import numpy as np
import pytest
import torch
from scipy import stats

from lowrank_dp.rng import SecureRandom
from lowrank_dp.train import evidence, guards, noise_checks, sampling_checks
from lowrank_dp.train.noise_checks import GeneratorCheck, NoiseCheck
from lowrank_dp.train.sampling_checks import SamplingCheck

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = {"matrix": (48, 32), "bias": (48,), "head": (2, 32), "head.bias": (2,), "low": (4, 60)}


# The formulas: an e-value is a likelihood ratio, whose expectation under the null is 1


def test_evidence_has_expectation_one_under_the_null():
    for count in (1, 3, 10, 200):
        most = 16 * count + 20 * math.sqrt(count)  # the largest t moves the mass by 16 a draw
        x = np.linspace(-most, most, 40_001)
        mass = np.exp(
            evidence.normal(x, np.full(x.shape, count))
            + stats.norm.logpdf(x, scale=math.sqrt(count))
        )
        assert np.trapezoid(mass, x) == pytest.approx(1, abs=2e-3)
    for count in (2, 7, 300):
        x = np.geomspace(1e-9, 1e5, 40_001)  # at 0.49, the largest t, the tail is long
        mass = np.exp(evidence.squares(x, np.full(x.shape, count)) + stats.chi2.logpdf(x, count))
        assert np.trapezoid(mass * x, np.log(x)) == pytest.approx(1, abs=0.01)
    for count, rate in ((1, 0.3), (40, 0.25), (1000, 0.01), (3000, 0.9)):
        hits = np.arange(count + 1)
        pmf = stats.binom.logpmf(hits, count, rate)
        total = np.exp(evidence.successes(rate)(hits, np.full(hits.shape, count)) + pmf).sum()
        assert total == pytest.approx(1, abs=1e-9)
        fewer = stats.binom.logpmf(hits, count, rate / 2)
        one_sided = evidence.successes(rate, more_only=True)(hits, np.full(hits.shape, count))
        assert np.exp(one_sided + fewer).sum() <= 1
    for trials, rate in ((40, 0.25), (3000, 0.01), (20_000, 0.5)):
        sizes = np.arange(trials + 1)
        spread = evidence.spread(sizes, trials, rate)
        total = np.exp(
            evidence.too_even(trials, rate)(spread, np.ones(trials + 1))
            + stats.binom.logpmf(sizes, trials, rate)
        ).sum()
        assert total == pytest.approx(1, abs=1e-9)


def test_evidence_is_within_the_tail_that_scipy_gives():
    """At the level of a run of 10^4 steps and 10^3 tensors, exact tails stay below the bound."""
    level = 24.0
    x = np.linspace(0, 20, 20_001)
    first = x[np.argmax(evidence.normal(x, np.ones(x.shape)) >= level)]
    assert 2 * stats.norm.sf(first) <= math.exp(-level) and first < 8
    x = np.linspace(500, 1600, 60_001)
    found = evidence.squares(x, np.full(x.shape, 1000)) >= level
    low, high = x[found & (x < 1000)].max(), x[found & (x > 1000)].min()
    assert stats.chi2.cdf(low, 1000) + stats.chi2.sf(high, 1000) <= math.exp(-level)
    assert 0.6 < low / 1000 and high / 1000 < 1.5


# Honest runs


def honest(generator, std=0.8):
    clean = {name: 3 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return clean, {
        name: total + std * torch.randn(total.shape, generator=generator)
        for name, total in clean.items()
    }


@pytest.mark.slow
def test_honest_runs_are_stopped_no_more_often_than_stated(monkeypatch):
    """The bound is raised to 1/5 so that 120 runs of 12 steps can test it."""
    monkeypatch.setattr(noise_checks, "FALSE_ALARMS", 0.2)
    monkeypatch.setattr(sampling_checks, "FALSE_ALARMS", 0.2)
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    stopped = [0, 0]
    for _ in range(120):
        noise = NoiseCheck(0.8, 12)
        sampling = SamplingCheck([[row] for row in range(60)], 0.2, 12)
        for kind, look in enumerate(
            (
                lambda check=noise: check.check(*honest(generator), spectrum=True),
                lambda check=sampling: check.check(
                    np.flatnonzero(random.random(60) < 0.2).tolist(), one_each=False
                ),
            )
        ):
            try:
                for _ in range(12):
                    look()
            except ValueError:
                stopped[kind] += 1
    assert max(stopped) <= stats.binom.isf(1e-6, 120, 0.2)


def test_single_steps_share_the_bound_of_the_run():
    """The e-value 1 / U (U uniform) reaches each level as often as Ville's inequality allows."""

    def of_single_steps(total, count):
        return np.where(count == 1, total, 0.0)

    random, stopped = np.random.default_rng(0), 0
    for _ in range(300):
        watch = evidence.Watch(of_single_steps, 1, 50, 0.2)
        steps = -np.log(random.random((50, 1)))
        stopped += any(watch.add(step, np.ones(1)) is not None for step in steps)
    assert 0 < stopped <= stats.binom.isf(1e-6, 300, 0.2)


@pytest.mark.slow
def test_long_honest_runs_pass():
    """At the true bound: noise far above and far below the sums, groups, and a rate of 1."""
    generator, random = torch.Generator().manual_seed(1), np.random.default_rng(1)
    for std in (1e-3, 0.8, 1e3):
        check = NoiseCheck(std, 10_000)
        for step in range(150):
            check.check(*honest(generator, std), spectrum=step % 10 == 0)
    groups = [[3 * unit, 3 * unit + 1, 3 * unit + 2] for unit in range(500)]
    for rate in (0.01, 0.3, 1.0):
        check = SamplingCheck(groups, rate, 10_000)
        for _ in range(400):
            units = np.flatnonzero(random.random(500) < rate)
            check.check([groups[unit][random.integers(3)] for unit in units], one_each=True)
    SamplingCheck(groups, 1.0, 10).check(list(range(1500)), one_each=False)


# Small tensors and rare faults, seen within some steps


def steps_until(change, most):
    """Steps until a run with changed noise is stopped, and the message of the stop."""
    generator, check, memory = torch.Generator().manual_seed(2), NoiseCheck(0.8, 10_000), {}
    for step in range(most):
        clean, noisy = honest(generator)
        noise = {name: (noisy[name] - clean[name]) / 0.8 for name in clean}
        noise = change(noise, step, memory)
        try:
            check.check(clean, {name: clean[name] + 0.8 * noise[name] for name in clean})
        except ValueError as error:
            return step + 1, str(error)
    return most + 1, ""


def of_the_bias(function):
    return lambda noise, step, memory: {**noise, "head.bias": function(noise["head.bias"])}


def kept_bias(noise, step, memory):
    return {**noise, "head.bias": memory.setdefault("noise", noise["head.bias"])}


def copied_head(noise, step, memory):
    return {**noise, "head": noise["matrix"].flatten()[:64].view(2, 32)}


def every_fifth(noise, step, memory):
    memory[step] = noise
    return memory[step - 5] if step >= 5 else noise


def test_a_tensor_that_repeats_one_of_its_last_four_steps_is_seen():
    """A bias, none of whose entries are among those that are kept for the whole run."""
    for lag in (1, 2, 3, 4):

        def repeats(noise, step, memory, lag=lag):
            memory[step] = memory[step - lag] if step >= lag else noise["bias"]
            return {**noise, "bias": memory[step]}

        seen, message = steps_until(repeats, lag + 3)
        when = "the step before" if lag == 1 else f"{lag} steps before"
        assert seen <= lag + 3 and message.startswith(f"noise of bias repeats that of {when}"), lag


@pytest.mark.slow
def test_two_entries_are_enough_within_some_steps():
    for change, most, words in (
        (of_the_bias(lambda z: 0 * z), 4, "a standard deviation in head.bias"),
        (of_the_bias(lambda z: z / 2**0.5), 250, "a standard deviation in head.bias"),
        (of_the_bias(lambda z: z * 2**0.5), 250, "a standard deviation in head.bias"),
        (of_the_bias(lambda z: z + 1), 60, "head.bias"),
        (kept_bias, 60, "head.bias"),
        (copied_head, 3, "noise of matrix and of head is the same"),
        (every_fifth, 6, "repeats that of 5 steps before"),
    ):
        seen, message = steps_until(change, most)
        assert seen <= most, (words, most)
        assert re.search(words, message), message


def test_a_message_says_nothing_of_the_clean_values():
    messages = set()
    for scale in (0.0, 1.0, 50.0):
        clean = {name: torch.full(shape, scale) for name, shape in SHAPES.items()}
        with pytest.raises(ValueError, match="noise has a standard deviation") as error:
            NoiseCheck(0.8, 1).check(clean, clean, spectrum=True)
        messages.add(str(error.value))
    assert len(messages) == 1


# Sums, rows, gradients, generators


def test_a_sum_longer_than_its_rows_allow_is_refused():
    sums = {"a": torch.full((3, 4), 1.0), "b": torch.full((4,), 1.0)}  # norm 4 over all of them
    guards.check_sum(sums, 4.0)
    guards.check_sum({}, 0.0)
    for bound in (3.9, 0.0, math.nan):
        with pytest.raises(ValueError, match="longer than the bound max_grad_norm for each"):
            guards.check_sum(sums, bound)
    with pytest.raises(ValueError, match="longer than the bound"):
        guards.check_sum({"a": torch.tensor([math.nan])}, 4.0)


def test_gradients_other_than_the_released_are_refused():
    weight = torch.nn.Parameter(torch.zeros(5, 4))
    noisy = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    weight.grad = noisy.clone()
    guards.check_gradient({"w": weight}, {"w": noisy}, 1.0)
    for grad in (None, noisy + 0.2, noisy * 0, noisy * math.nan):
        weight.grad = grad
        with pytest.raises(ValueError, match="gradient of w is not what the mechanism released"):
            guards.check_gradient({"w": weight}, {"w": noisy}, 1.0)


def test_generators_must_move_on():
    generator = torch.Generator().manual_seed(5)
    check = GeneratorCheck("noise", generator)
    start = generator.get_state()
    with pytest.raises(ValueError, match="generator of the noise has not moved on"):
        check.check(generator)
    for _ in range(3):
        torch.randn(3, generator=generator)
        check.check(generator)
    generator.set_state(start)
    torch.randn(3, generator=generator)
    with pytest.raises(ValueError, match="or was set back"):
        check.check(generator)
    generator.manual_seed(6)
    with pytest.raises(ValueError, match="was seeded anew"):
        check.check(generator)


def test_the_secure_generator_must_move_on_too():
    """The state of the generator of an unseeded run is a key and a position, which must advance."""
    generator = SecureRandom(bytes(range(16)))
    check = GeneratorCheck("noise", generator)
    start = generator.state()
    with pytest.raises(ValueError, match="generator of the noise has not moved on"):
        check.check(generator)
    for _ in range(3):
        generator.normal(3)
        check.check(generator)
    back = SecureRandom.from_state(start)
    back.normal(3)
    with pytest.raises(ValueError, match="or was set back"):
        check.check(back)
    other = SecureRandom(bytes(16))
    other.normal(30)
    with pytest.raises(ValueError, match="was seeded anew"):
        check.check(other)


def test_a_unit_that_is_never_sampled_is_noticed():
    """60 units at a rate of a quarter: one is left out of 150 samples with probability 1e-19."""
    random, check = np.random.default_rng(0), SamplingCheck([[row] for row in range(60)], 0.25, 200)
    with pytest.raises(ValueError, match="takes a unit more or less often than the others"):
        for _ in range(150):
            drawn = set(np.flatnonzero(random.random(60) < 0.25)) - {7}
            check.check(sorted(map(int, drawn)), one_each=False)


def test_samples_of_units_with_several_rows():
    check = SamplingCheck([[0, 1], [2], [3, 4, 5]], 0.5, 10)
    check.check([0, 1, 2], one_each=False)
    check.check([], one_each=False)
    for rows, one_each in (([0, 1], True), ([2, 2], False), ([3, 3], True)):
        with pytest.raises(ValueError, match="the sample has a unit twice"):
            check.check(rows, one_each=one_each)
    with pytest.raises(ValueError, match="lacks a unit though the rate is 1"):
        SamplingCheck([[0], [1]], 1.0, 10).check([0], one_each=False)
