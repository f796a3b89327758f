"""Delta of noise then projection, averaged over A: against drawn A and closed forms."""

import itertools

import numpy as np
import pytest
from mpmath import mp, mpf
from scipy import stats

from lowrank_dp import theory
from lowrank_dp.mechanism import GaussianMechanism
from tests.tasks import case


def gaussian(epsilon, mu):
    """Delta between N(0, 1) and N(mu, 1) by its textbook formula."""
    return stats.norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * stats.norm.cdf(
        -mu / 2 - epsilon / mu
    )


def drawn(g, rank, epsilon, sigma, num, rng):
    """Delta for each of ``num`` drawn A; the projection is computed from A, not from a law."""
    a = rng.standard_normal((num, rank, g.shape[1]))
    basis = np.linalg.qr(a.transpose(0, 2, 1))[0]
    return gaussian(epsilon, np.linalg.norm(g @ basis, axis=(1, 2)) / np.linalg.norm(g) / sigma)


def test_rank_one_is_the_mean_over_drawn_projections():
    rng = np.random.default_rng(0)
    for rank, n, epsilon, sigma in ((1, 6, 1.0, 1.2), (3, 6, 1.0, 1.2), (4, 20, 0.5, 2.2)):
        assert sigma >= 1 / np.sqrt(2 * (np.sqrt(1 + epsilon**2) - 1))  # where equality holds
        g = np.outer(rng.standard_normal(3), rng.standard_normal(n))
        values = drawn(g, rank, epsilon, sigma, 40_000, rng)
        error = values.std() / np.sqrt(len(values))
        found = theory.noise_projection_delta(epsilon, sigma, rank, n)
        assert abs(found - values.mean()) < 4 * error, (rank, n)  # wrong for 1 seed in 15,000
        assert 4 * error < 0.1 * found, (rank, n)


def test_no_gradient_exceeds_the_bound():
    rng = np.random.default_rng(1)
    for epsilon, sigma in ((1.0, 1.2), (1.0, 0.4), (0.2, 0.5), (3.0, 0.3)):
        bound = theory.noise_projection_delta(epsilon, sigma, 2, 8)
        for weights in ([1, 0, 0], [1, 0.5, 0.1], [1, 1, 1]):
            g = np.diag(weights) @ np.linalg.qr(rng.standard_normal((8, 3)))[0].T
            values = drawn(g, 2, epsilon, sigma, 20_000, rng)
            assert values.mean() - 4 * values.std() / np.sqrt(len(values)) < bound, weights


def test_beyond_the_bend_the_bound_is_the_mean_of_the_tangent():
    """Where 1 / sigma^2 exceeds x*: the slope by differences, the mean by scipy's quadrature."""
    for epsilon, sigma, rank, n in ((1.0, 0.6, 1, 12), (3.0, 0.3, 2, 40), (0.5, 0.7, 1, 30)):
        bend = 2 * (np.sqrt(1 + epsilon**2) - 1)
        assert sigma**-2 > bend
        h = 1e-4 * bend
        low, high = (gaussian(epsilon, np.sqrt(bend + sign * h)) for sign in (-1, 1))

        def convex(x, epsilon=epsilon, bend=bend, slope=(high - low) / (2 * h)):
            inside = gaussian(epsilon, np.sqrt(min(x, bend)))
            return inside + slope * max(x - bend, 0.0)

        law = stats.beta(rank / 2, (n - rank) / 2)
        mean = law.expect(lambda b, sigma=sigma, convex=convex: convex(b / sigma**2), epsrel=1e-9)
        assert mean < gaussian(epsilon, 1 / sigma), (epsilon, sigma)  # below the worst case
        found = theory.noise_projection_delta(epsilon, sigma, rank, n)
        assert found == pytest.approx(mean, rel=1e-5), (epsilon, sigma)


def test_full_rank_is_the_gaussian_mechanism_and_the_worst_case():
    for epsilon, sigma in ((1.0, 3.73), (8.0, 0.6), (0.1, 1.0)):
        exact = gaussian(epsilon, 1 / sigma)
        assert theory.noise_projection_delta(epsilon, sigma, 16, 16) == pytest.approx(exact)
        deltas = [theory.noise_projection_delta(epsilon, sigma, r, 16) for r in (1, 4, 12, 16)]
        assert (np.diff(deltas) >= 0).all() and deltas[0] < deltas[-1], deltas


def test_multiplier_is_the_inverse_and_at_full_rank_the_calibrated_one():
    plain = GaussianMechanism.calibrate(1.0, 1e-5, 1, 1.0).noise_multiplier
    assert theory.noise_projection_multiplier(1.0, 1e-5, 32, 32) == pytest.approx(plain, abs=1e-4)
    for rank in (1, 8):
        sigma = theory.noise_projection_multiplier(1.0, 1e-5, rank, 384)
        assert theory.noise_projection_delta(1.0, sigma, rank, 384) == pytest.approx(1e-5, rel=1e-6)
        assert np.sqrt(rank / 384) * plain < sigma < plain / 2


def test_the_bend_is_where_the_second_derivative_in_mu_squared_changes_its_sign():
    for epsilon in (0.3, 1.0, 4.0):
        x = 2 * (np.sqrt(1 + epsilon**2) - 1)
        for factor, sign in ((0.9, 1), (1.1, -1)):
            h = 1e-3 * x
            low, middle, high = (gaussian(epsilon, np.sqrt(factor * x + k * h)) for k in (-1, 0, 1))
            assert np.sign(low + high - 2 * middle) == sign, (epsilon, factor)


@pytest.mark.filterwarnings("error")
def test_extreme_arguments_give_a_delta_without_a_warning():
    for epsilon, sigma in itertools.product((1e-100, 1e-9, 1.0, 1e100), (1e-100, 1e-3, 1e100)):
        deltas = [theory.noise_projection_delta(epsilon, sigma, r, 9) for r in (1, 8, 9)]
        assert 0 <= deltas[0] <= deltas[1] <= deltas[2] <= 1, (epsilon, sigma, deltas)
        assert not np.signbit(deltas).any()


def test_large_sizes_are_the_mean_by_mpmath():
    """Against Beta's density with 60 digits: the terms of its logarithm are of size n."""
    many = 10**12
    sizes = ((8, 384), (10**8, 10**9), (many // 10, many), (many // 2, many), (many - 10**6, many))
    with mp.workdps(60):
        for rank, n in sizes:
            a, b = mpf(rank) / 2, mpf(n - rank) / 2
            mean = a / (a + b)
            width = mp.sqrt(mean * (1 - mean) / (a + b))
            constant = mp.loggamma(a + b) - mp.loggamma(a) - mp.loggamma(b)

            def weighted(x, a=a, b=b, constant=constant):
                density = mp.exp(constant + (a - 1) * mp.log(x) + (b - 1) * mp.log(1 - x))
                mu = mp.sqrt(x) * 5 / 6
                low = mp.e * mp.ncdf(-mu / 2 - 1 / mu)
                return density * (mp.ncdf(mu / 2 - 1 / mu) - low)

            edges = [mean + k * width for k in (-9, -5, -2, 0, 2, 5, 9, 20)]
            inside = [x for x in edges if 0 < x < 1]
            exact = float(mp.quad(weighted, [0, *inside, 1] if rank == 8 else inside))
            with case(rank, n):
                found = theory.noise_projection_delta(1.0, 1.2, rank, n)
                assert found == pytest.approx(exact, rel=1e-8)


def test_bad_input_is_one_error():
    good = {"epsilon": 1.0, "noise_multiplier": 1.0, "rank": 2, "n": 8}
    for name, bad in (
        ("epsilon", 1e-300),
        ("noise_multiplier", 1e300),
        ("noise_multiplier", 0.0),
        ("epsilon", 0.0),
        ("rank", 1.5),
        ("n", 0),
        ("n", 10**13),
        ("n", 10**400),
        ("rank", 10**400),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            theory.noise_projection_delta(**good | {name: bad})
    for bad in (0.0, 1.0, 1e-20):
        with pytest.raises(ValueError, match=r"^delta must be"):
            theory.noise_projection_multiplier(1.0, bad, 2, 8)
