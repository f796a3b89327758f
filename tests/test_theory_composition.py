"""Composed epsilon of vector queries, and theorem 1 of Hu et al., against the exact law."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from lowrank_dp import theory
from lowrank_dp.theory import composition
from tests.tasks import case


def losses(rank, n, angle, ratio, steps, trials, seed):
    """Draw total privacy losses of ``steps`` releases under q, from the exact sampler."""
    rng = np.random.default_rng(seed)
    total = np.zeros(trials)
    for _ in range(steps):
        phi = np.arctan(rng.standard_t(rank, trials) / np.sqrt(rank))
        v = rng.chisquare(rank + n - 1, trials)
        c = ratio * np.cos(phi - angle) / np.cos(phi)
        with np.errstate(invalid="ignore", divide="ignore"):
            one = (rank - 1) * np.log(ratio) - (rank - n - 1) / 2 * np.log(c) - v / 2 * (1 - 1 / c)
        total += np.where(c > 0, one, np.inf)
    return total


@pytest.mark.parametrize(
    "rank, n, angle, ratio, steps",
    [
        (16, 768, 0.03, 1.0, 5),
        (4, 64, 0.05, 1.0, 20),
        (8, 128, 0.02, 1.03, 3),
        (8, 32, 0.0, 1.1, 2),
    ],
)
def test_composition_against_simulation(rank, n, angle, ratio, steps):
    """The error rate per case is below 1e-6, at five standard errors of the simulated delta."""
    delta, trials = 1e-2, 200_000
    epsilon = theory.projection_epsilon(delta, rank, n, angle=angle, norm_ratio=ratio, steps=steps)
    found, errors = [], []
    for one in {ratio, 1 / ratio}:
        loss = losses(rank, n, angle, one, steps, trials, seed=7)
        excess = np.clip(-np.expm1(np.minimum(epsilon - loss, 0.0)), 0, 1)
        found.append(excess.mean())
        errors.append(excess.std() / np.sqrt(trials))
    worst = int(np.argmax(found))
    assert found[worst] <= delta + 5 * errors[worst]  # an upper bound
    assert found[worst] >= 0.97 * delta - 5 * errors[worst]  # the bound is nearly tight


def test_composed_norms_are_exact_by_chi_squared():
    """At angle 0 the releases of all steps tell the norm only: by a sum of chi-squared numbers."""
    for rank, n, ratio, steps, delta in ((1, 1, 1.2, 30, 0.1), (8, 32, 1.1, 20, 1e-2)):
        law = stats.chi2(steps * (rank + n - 1))
        epsilon = theory.projection_epsilon(
            delta, rank, n, angle=0.0, norm_ratio=ratio, steps=steps
        )
        found = []
        for c in (ratio, 1 / ratio):  # log p / p' = dof / 2 ln c - v / 2 (1 - 1 / c)
            cut = 2 * (law.args[0] / 2 * np.log(c) - epsilon) / (1 - 1 / c)
            p, other = (law.cdf(x) if c > 1 else law.sf(x) for x in (cut, cut / c))
            found.append(p - np.exp(epsilon) * other)
        with case(rank, n, ratio, steps):
            assert 0.97 * delta <= max(found) <= delta * (1 + 1e-6)


@pytest.mark.filterwarnings("error")
def test_composed_epsilons_up_to_the_limit_and_infinity_beyond():
    """By the exact law of the norm, at angle 0: all steps together are a chi-squared number."""
    for rank, n, ratio, steps, delta in ((16, 768, 5.0, 2, 1e-3), (1, 1, 1e5, 2, 0.95)):
        epsilon = theory.projection_epsilon(
            delta, rank, n, angle=0.0, norm_ratio=ratio, steps=steps
        )
        law, exact = stats.chi2(steps * (rank + n - 1)), []
        for c in (ratio, 1 / ratio):  # as above; e^epsilon times the other probability is 0
            value = law.ppf(delta) if c > 1 else law.isf(delta)
            exact.append(law.args[0] / 2 * np.log(c) - value / 2 * (1 - 1 / c))
        with case(rank, n, ratio, steps):
            assert max(exact) <= epsilon <= 1.06 * max(exact)
    for ratio in (20.0, 30.0, 1e60):
        for angle in (0.0, 0.01):
            epsilon = theory.projection_epsilon(
                1e-3, 16, 768, angle=angle, norm_ratio=ratio, steps=2
            )
            assert epsilon == np.inf, (ratio, angle)
    one = theory.projection_epsilon(1e-3, 16, 768, angle=0.0, norm_ratio=23.0)
    assert theory.privacy_profile(one, 16, 768, angle=0.0, norm_ratio=1 / 23) == pytest.approx(1e-3)


def test_many_steps_spend_less_than_their_parts_together():
    """The sum over three parts of the steps is a bound too, and is above the composed bound."""
    whole, part = (
        theory.projection_epsilon(delta, 16, 768, angle=1e-4, steps=steps)
        for delta, steps in ((1e-3, 30_000), (3.3e-4, 10_000))
    )
    assert part < whole < 2 * part
    # a heavy tail of losses, at rank 1: the floor alone takes a third of delta
    assert 0 < theory.projection_epsilon(1e-3, 1, 768, angle=1e-5, steps=100) < 100


def test_a_floor_of_a_third_per_step_is_composed():
    rank, n, angle, delta = 1, 2, 1.2, 0.65
    floor = theory.privacy_floor(rank, angle=angle)
    assert 2 * floor < 1 and theory.privacy_profile(0.0, rank, n, angle=angle) < 2.2 * floor
    epsilon = theory.projection_epsilon(delta, rank, n, angle=angle, steps=2)
    loss = losses(rank, n, angle, 1.0, 2, 200_000, seed=3)
    found = np.clip(-np.expm1(np.minimum(epsilon - loss, 0.0)), 0, 1).mean()
    assert epsilon > 0 and abs(found - delta) < 0.01  # nine standard errors
    # two steps are identified with probability 1 - (1 - floor)^2
    least = 1 - (1 - floor) ** 2
    assert theory.projection_epsilon(0.999 * least, rank, n, angle=angle, steps=2) == np.inf


def test_one_step_is_the_inverse_of_the_profile():
    for rank, n, angle, ratio in ((16, 768, 0.01, 1.0), (4, 64, 0.1, 1.0), (8, 256, 0.02, 0.98)):
        with case(rank, n, angle, ratio):
            epsilon = theory.projection_epsilon(1e-4, rank, n, angle=angle, norm_ratio=ratio)
            deltas = [
                theory.privacy_profile(epsilon, rank, n, angle=angle, norm_ratio=one)
                for one in (ratio, 1 / ratio)
            ]
            assert max(deltas) == pytest.approx(1e-4, rel=1e-6)


def test_the_smallest_accepted_delta_of_one_step_is_met():
    """By scipy's quadrature over q . y, whose law is Student's, with |y|^2 chi-squared given it."""
    rank, n, angle = 16, 768, 0.01
    epsilon = theory.projection_epsilon(1e-8, rank, n, angle=angle)
    law, student = stats.chi2(rank + n - 1), stats.t(rank)

    def excess(t):
        phi = np.arctan(t / np.sqrt(rank))
        c = np.cos(phi - angle) / np.cos(phi)
        cut = 2 * ((n + 1 - rank) / 2 * np.log(c) - epsilon) / (1 - 1 / c)
        p, other = (law.cdf(x) if c > 1 else law.sf(x) for x in (cut, cut / c))
        return student.pdf(t) * max(p - np.exp(epsilon) * c ** (rank - 1) * other, 0.0)

    ends = [-60, -20, -10, -5, 5, 10, 20, 60]
    found = sum(integrate.quad(excess, *pair, epsabs=1e-13)[0] for pair in itertools.pairwise(ends))
    assert 0.9e-8 < found < 1.1e-8  # the profile is exact to 1e-9


def test_dots_bound_the_exact_epsilon_from_above():
    for delta, angle in ((1e-4, 0.01), (1e-2, 0.03)):
        exact = theory.projection_epsilon(delta, 16, 768, angle=angle)

        def profile(x, angle=angle):
            return theory.privacy_profile(x, 16, 768, angle=angle)

        floor = theory.privacy_floor(16, angle=angle)
        found = composition._composed(profile, profile, delta, 1, floor)
        assert exact <= found <= 1.01 * exact


def test_more_steps_and_smaller_deltas_cost_more():
    def epsilon(**changes):
        given = {"delta": 1e-3, "rank": 16, "n": 256, "angle": 0.01, "steps": 4} | changes
        return theory.projection_epsilon(given.pop("delta"), **given)

    assert epsilon(steps=1) < epsilon(steps=2) < epsilon() < epsilon(steps=16)
    assert epsilon(delta=1e-2) < epsilon() < epsilon(angle=0.012)
    assert epsilon(norm_ratio=1.01) == pytest.approx(epsilon(norm_ratio=1 / 1.01), rel=1e-9)
    assert epsilon(angle=0.0) == 0.0
    assert epsilon(rank=1, angle=0.1) == np.inf  # the floor alone exceeds delta
    assert epsilon(rank=1, angle=0.1, steps=1) == np.inf


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 64),
    st.integers(2, 1024),
    st.floats(1e-4, np.pi / 2),
    st.floats(0.05, 1),
    st.floats(0, 8),
)
def test_a_smaller_angle_leaks_less_at_every_epsilon(rank, n, angle, part, epsilon):
    """So the pair with the largest angle dominates a step, in both directions at equal norms."""
    smaller, larger = (
        theory.privacy_profile(epsilon, rank, n, angle=one) for one in (part * angle, angle)
    )
    assert smaller <= larger + 2e-9


SETTINGS = [
    (rank, n, angle, tail)
    for rank in (4, 16)
    for n in (128, 768)
    for angle in (0.003, 0.01, 0.03, 0.1)
    for tail in (1e-3, 1e-5)
]


def test_the_guarantee_of_hu_is_valid_and_loose():
    ratios = []
    for rank, n, angle, tail in SETTINGS:
        with case(rank, n, angle, tail):
            epsilon, delta = theory.hu_guarantee(rank, n, angle=angle, tail=tail)
            rho = np.cos(angle)
            k = np.sqrt(1 - rho**2) * stats.t.isf(tail, rank) / np.sqrt(rank)
            kappa = stats.chi2.isf(tail, rank + n - 1)
            if k >= rho:
                assert epsilon == np.inf
                continue
            assert epsilon == pytest.approx(
                (n + rank - 1) / 2 * np.log(rho + k) + (1 - rho + k) * kappa / (2 * (rho - k)),
                rel=1e-8,
            )
            # P(rho sqrt(x) + sin(angle) Z < 0) by Student's law of Z / sqrt(x / rank)
            floor = stats.t.sf(np.sqrt(rank) / np.tan(angle), rank)
            assert delta == pytest.approx(floor + 3 * tail, rel=1e-8)
            # the exact delta at this epsilon is smaller, and so is the exact epsilon at this delta
            assert theory.privacy_profile(epsilon, rank, n, angle=angle) < delta
            exact = theory.projection_epsilon(delta, rank, n, angle=angle)
            assert exact < epsilon
            ratios.append(epsilon / exact if exact else np.inf)
    assert min(ratios) > 3 and len(ratios) > 20


def test_arrays_and_bad_input():
    epsilon, delta = theory.hu_guarantee([4, 16], [[128], [768]], angle=0.01, tail=1e-3)
    assert epsilon.shape == delta.shape == (2, 2)
    assert epsilon[1, 1] == theory.hu_guarantee(16, 768, angle=0.01, tail=1e-3)[0]
    for changes, words in (
        ({"delta": 0.0}, "^delta must be"),
        ({"delta": 1.0}, "^delta must be"),
        ({"steps": 0}, "^steps must be an integer >= 1"),
        ({"rank": 2.5}, "^rank must be"),
        ({"n": 0}, "^n must be"),
        ({"angle": -0.1}, "^angle must be"),
        ({"angle": 4.0}, "^angle must be"),
        ({"norm_ratio": 0.0}, "^norm_ratio must be"),
        ({"norm_ratio": 1e-320}, "^norm_ratio must be .* got 1e-320"),
        ({"rank": 10**20}, "^rank must be .* <= 1000000000000"),
        ({"delta": 1e-9, "steps": 2}, "^delta must be >= 2e-08 for 2 steps"),
        # the profile's error, and not the law, would decide such an epsilon
        ({"delta": 1e-24}, "^delta must be >= 1e-08 for 1 step, got 1e-24"),
    ):
        given = {"delta": 1e-3, "rank": 4, "n": 16, "angle": 0.1} | changes
        with pytest.raises(ValueError, match=words):
            theory.projection_epsilon(given.pop("delta"), **given)
    for changes, words in (
        ({"tail": 0.0}, "^tail must be"),
        ({"tail": 1 / 3}, "^tail must be .* < 0.333333"),
        ({"angle": np.pi / 2}, "^angle must be .* < 1.5708"),
        ({"angle": 2.0}, "^angle must be"),
    ):
        with pytest.raises(ValueError, match=words):
            theory.hu_guarantee(4, 16, **{"angle": 0.1, "tail": 1e-3} | changes)
    assert theory.hu_guarantee(16, 768, angle=1.57, tail=0.33) == (np.inf, 1.0)
