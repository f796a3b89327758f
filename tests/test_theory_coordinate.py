"""Law of one coordinate against references, mpmath, limits, and simulations that form A."""

import functools
import itertools
import json
from pathlib import Path

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lowrank_dp import theory
from tests.refusals import refused

REFERENCE = json.loads((Path(__file__).parent / "data" / "theory_ref.json").read_text())

ranks = st.one_of(st.integers(1, 60), st.integers(61, 10**6))
beta2s = st.one_of(
    st.floats(0, 1),
    st.floats(-16, 0).map(lambda e: 10.0**e),
    st.floats(-16, 0).map(lambda e: 1 - 10.0**e),
    st.sampled_from([0.0, 1.0, 1e-300, 1 - 2**-53]),
)


def mp_log_density(x, rank, beta2):
    """Log-density by mpmath's Bessel function."""
    x, b2, r = mp.mpf(x), mp.mpf(beta2), mp.mpf(rank)
    y, rest, nu = x + mp.sqrt(b2), 1 - b2, (r - 1) / 2
    return (
        mp.log(2)
        + r / 2 * mp.log(r / 2)
        - mp.loggamma(r / 2)
        - mp.log(2 * mp.pi * rest / r) / 2
        + r * mp.sqrt(b2) * y / rest
        + nu * mp.log(abs(y))
        + mp.log(mp.besselk(nu, r * abs(y) / rest))
    )


def mp_mixture_log_density(x, rank, beta2):
    """Log-density by integrating the normal density given s = chi^2_rank / rank."""
    x, b2, r = mp.mpf(x), mp.mpf(beta2), mp.mpf(rank)
    beta, rest = mp.sqrt(b2), 1 - b2

    def joint(s):
        log_s = r / 2 * mp.log(r / 2) - mp.loggamma(r / 2) + (r / 2 - 1) * mp.log(s) - r * s / 2
        return mp.exp(
            log_s
            - (x - beta * (s - 1)) ** 2 * r / (2 * rest * s)
            - mp.log(2 * mp.pi * rest * s / r) / 2
        )

    sd = mp.sqrt(2 / r)
    return mp.log(
        mp.quad(
            joint,
            [max(mp.mpf(0), 1 + k * sd) for k in range(-16, 0)] + [1 + k * sd for k in range(17)],
        )
    )


def simulated_coordinate(rank, q, j, count, seed):
    """Return ``count`` draws of u_j / |q|, each with an A that is formed."""
    a = np.random.default_rng(seed).standard_normal((count, rank, len(q))) / np.sqrt(rank)
    projected = np.einsum("srn,n->sr", a, q)
    return (np.einsum("sr,sr->s", projected, a[:, :, j]) - q[j]) / np.linalg.norm(q)


# --- reference values ------------------------------------------------------------------------


def test_reference_coordinate():
    for field, function, options in (
        ("tv_matched", theory.tv_exact, {"reference": "matched"}),
        ("tv_paper", theory.tv_exact, {"reference": "paper"}),
        ("bound_matched", theory.tv_bound, {"reference": "matched"}),
        ("bound_paper", theory.tv_bound, {"reference": "paper"}),
        ("lower_cf_matched", theory.tv_lower_bound, {}),
        ("kolmogorov_matched", theory.kolmogorov_exact, {"reference": "matched"}),
        ("berry_esseen_kolm", theory.berry_esseen_bound, {}),
        ("kurtosis", theory.noise_kurtosis, {}),
    ):
        rows = [row for row in REFERENCE["coord_tv"] if row.get(field) is not None]
        assert len(rows) >= 94, field  # of 102: some have no Kolmogorov distance
        rank, beta2, want = ([row[key] for row in rows] for key in ("r", "beta2", field))
        # 12 digits are given; the Kolmogorov distances carry one digit less
        np.testing.assert_allclose(
            function(rank, 7, beta2=beta2, **options), want, rtol=5e-12, atol=2e-12, err_msg=field
        )


def test_reference_flat_q():
    rows = REFERENCE["flat_grid"]
    for field, function, options in (
        ("tv_matched", theory.tv_exact, {"reference": "matched"}),
        ("tv_paper", theory.tv_exact, {"reference": "paper"}),
        ("bound_matched", theory.tv_bound, {"reference": "matched"}),
        ("bound_paper", theory.tv_bound, {"reference": "paper"}),
        ("lower", theory.tv_lower_bound, {}),
    ):
        rank, n, want = ([row[key] for row in rows] for key in ("r", "n", field))
        np.testing.assert_allclose(
            function(rank, n, **options), want, rtol=0, atol=1e-12, err_msg=field
        )


def test_reference_chi2():
    rows = REFERENCE["chi_tv_T"]
    r = [row["r"] for row in rows]
    np.testing.assert_allclose(theory.tv_exact(r, 1), [row["T"] for row in rows], atol=1e-12)
    np.testing.assert_allclose(theory.tv_bound(r, 1), [row["T"] for row in rows], atol=1e-12)


def test_reference_third_moment():
    rows = REFERENCE["third_moment_ratio"]
    got = theory.berry_esseen_bound(100, 7, beta2=[row["beta2"] for row in rows]) * 10 / 0.4690
    np.testing.assert_allclose(got, [row["rho3"] for row in rows], rtol=1e-11)


# --- mpmath ----------------------------------------------------------------------------------


def test_logpdf_against_bessel():
    cases = itertools.product(
        [1, 2, 3, 20, 49, 50, 51, 200],
        [0.0, 1e-300, 1e-6, 0.3, 0.9, 1 - 1e-6],
        [-7.0, -1.0, -0.1, 0.3, 2.0, 12.0],
    )
    with mp.workdps(40):
        for rank, beta2, sds in cases:
            x = sds * np.sqrt((1 + beta2) / rank)
            want = float(mp_log_density(x, rank, beta2))
            # x + beta is rounded, and near beta2 = 1 the slope is rank/(1 - beta2)
            rounding = 3e-13 + 3e-16 * rank / (1 - beta2)
            got = theory.noise_logpdf(x, rank, beta2=beta2)
            assert got == pytest.approx(want, rel=3e-13, abs=rounding), (rank, beta2, sds)


@pytest.mark.slow
def test_logpdf_against_mixture():
    points = [(4, 0.4), (1000, 0.0), (1000, 0.5), (10**5, 1e-5), (10**5, 0.5), (10**5, 0.999)]
    with mp.workdps(30):
        for (rank, beta2), sds in itertools.product([*points, (10**6, 0.2)], (-4.0, 0.2, 3.0)):
            x = sds * np.sqrt((1 + beta2) / rank)
            want = float(mp_mixture_log_density(x, rank, beta2))
            got = theory.noise_logpdf(x, rank, beta2=beta2)
            assert got == pytest.approx(want, abs=3e-12), (rank, beta2, sds)


def test_logpdf_special_cases():
    x = np.array([-3.0, -0.5, 0.0, 0.4, 20.0])
    # rank 2, beta 0: Laplace; beta 1: chi^2_rank/rank - 1
    np.testing.assert_allclose(theory.noise_logpdf(x, 2, beta2=0), -2 * np.abs(x), atol=1e-14)
    for rank in (1, 2, 5, 300):
        np.testing.assert_allclose(
            theory.noise_logpdf(x, rank, beta2=1),
            stats.chi2.logpdf(x + 1, rank, scale=1 / rank),
            rtol=1e-12,
        )
    assert theory.noise_logpdf(-0.5, 1, beta2=0.25) == np.inf
    assert np.isfinite(theory.noise_logpdf(-0.5, 3, beta2=0.25))
    # from both sides towards the cusp at y = 0, where K_nu overflows
    for rank in (3, 20, 49):
        at, near = theory.noise_logpdf([-0.5, -0.5 + 1e-12], rank, beta2=0.25)
        assert at == pytest.approx(near, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rank, beta2, reference",
    [
        (1, 0.0, "matched"),
        (1, 0.3, "paper"),
        (2, 0.01, "matched"),
        (5, 0.9, "matched"),
        (60, 0.999, "matched"),
    ],
)
def test_tv_against_mpmath(rank, beta2, reference):
    variance = (1 + beta2 if reference == "matched" else 1.0) / rank
    beta = mp.sqrt(beta2)

    def difference(x):
        return mp.exp(mp_log_density(x, rank, beta2)) - mp.exp(-x * x / (2 * variance)) / mp.sqrt(
            2 * mp.pi * variance
        )

    with mp.workdps(20):
        sd = float(np.sqrt((1 + beta2) / rank))
        grid = [
            -beta + sd * k
            for k in np.concatenate([-np.geomspace(1e-6, 50, 60)[::-1], np.geomspace(1e-6, 60, 60)])
        ]
        values = [difference(x) for x in grid]
        roots = [
            mp.findroot(difference, (a, b), solver="anderson")
            for a, b, fa, fb in zip(grid, grid[1:], values, values[1:], strict=False)
            if fa * fb < 0
        ]
        edges = sorted(
            [
                grid[0],
                *(-beta + sd * k for k in (-8, -3, -1, -0.1, -1e-3, 0, 1e-3, 0.1, 1, 3, 8, 20)),
                grid[-1],
                *roots,
            ]
        )
        want = sum(abs(mp.quad(difference, [a, b])) for a, b in itertools.pairwise(edges)) / 2
    assert theory.tv_exact(rank, 9, beta2=beta2, reference=reference) == pytest.approx(
        float(want), abs=1e-11
    )


def test_third_moment_against_mpmath():
    def given_w(w, b2):
        m, t = mp.sqrt(b2) * (w**2 - 1), mp.sqrt(1 - b2) * w
        z = m / t if t else mp.inf
        third = (2 * t * (m**2 + 2 * t**2) * mp.npdf(z) if t else 0) + (
            (m**3 + 3 * m * t**2) * mp.erf(z / mp.sqrt(2)) if t else abs(m) ** 3
        )
        return 2 * third * mp.npdf(w)

    edges = [0, 1e-4, 1e-2, 0.5, 1 - 1e-3, 1, 1 + 1e-3, 1.5, 3, 6, 15]
    for beta2 in (0.0, 1e-6, 0.4, 1 - 1e-9, 1.0):
        with mp.workdps(20):
            b2 = mp.mpf(beta2)
            ratio = mp.quad(functools.partial(given_w, b2=b2), edges) / (1 + b2) ** mp.mpf(1.5)
        want = 0.4690 * float(ratio) / 20
        got = theory.berry_esseen_bound(400, 9, beta2=beta2)
        assert got == pytest.approx(want, rel=1e-11), beta2


# --- simulation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rank, q, j",
    [(1, [1.0, -2.0, 0.5], 0), (3, [0.3, 0.4, 1.5, 0.2], 2), (8, [1.0, 1.0], 1), (4, [2.0], 0)],
)
def test_simulation_with_a_formed(rank, q, j):
    """A case fails by chance with probability about 1e-6 (KS) and 2e-7 (each moment)."""
    q = np.array(q)
    u = simulated_coordinate(rank, q, j, 200_000, seed=[rank, j])
    beta2 = q[j] ** 2 / (q @ q)
    # the distribution function, by summing the density (rank 1: about its pole)
    edges = -np.sqrt(beta2) + np.concatenate(
        [-np.geomspace(1e-12, 40, 4000)[::-1], [0.0], np.geomspace(1e-12, 40, 4000)]
    )
    middle = (edges[1:] + edges[:-1]) / 2
    mass = np.exp(theory.noise_logpdf(middle, rank, beta2=beta2)) * np.diff(edges)
    cumulative = np.concatenate([[0.0], np.cumsum(mass)])
    assert cumulative[-1] == pytest.approx(1, abs=3e-4)
    distance = np.abs(
        np.interp(np.sort(u), edges, cumulative) - (np.arange(len(u)) + 0.5) / len(u)
    ).max()
    assert distance < 2.7 / np.sqrt(len(u)) + 3e-4  # P(sqrt(N) D > 2.7) = 2 exp(-2 2.7^2)
    variance = theory.noise_variance(rank, len(q), beta2=beta2)
    kurtosis = theory.noise_kurtosis(rank, len(q), beta2=beta2)
    assert abs(np.mean(u**2) - variance) < 5.2 * variance * np.sqrt((kurtosis - 1) / len(u))
    spread = np.std((u**2 / variance) ** 2) / np.sqrt(len(u))
    assert abs(np.mean((u**2 / variance) ** 2) - kurtosis) < 5.2 * spread


# --- bounds, limits, monotonicity ------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(rank=ranks, beta2=beta2s)
def test_lower_exact_upper(rank, beta2):
    exact = theory.tv_exact(rank, 5, beta2=beta2)
    rounding = 1e-12
    assert theory.tv_lower_bound(rank, 5, beta2=beta2) <= exact + rounding
    assert exact <= theory.tv_bound(rank, 5, beta2=beta2) + rounding <= 1 + rounding
    paper = theory.tv_exact(rank, 5, beta2=beta2, reference="paper")
    assert paper <= theory.tv_bound(rank, 5, beta2=beta2, reference="paper") + rounding
    kolmogorov = theory.kolmogorov_exact(rank, 5, beta2=beta2)
    assert kolmogorov <= min(exact, theory.berry_esseen_bound(rank, 5, beta2=beta2)) + rounding


def test_limits_in_rank():
    # c4/8 and the constant of the characteristic function, at beta = 0
    assert theory.tv_exact(10**6, 5, beta2=0) * 1e6 == pytest.approx(0.350075037604, rel=1e-5)
    assert theory.tv_bound(10**6, 5, beta2=0) * 1e6 == pytest.approx(0.350075037604, rel=1e-5)
    assert theory.tv_lower_bound(10**6, 5, beta2=0) * 1e6 == pytest.approx(
        4 * np.exp(-2) / 2, rel=1e-5
    )
    # T(r) sqrt(r) at beta = 1
    assert theory.tv_exact(10**6, 1) * 1e3 == pytest.approx(0.355913477357, rel=1e-5)
    # the paper's Gaussian keeps the wrong variance: TV(N(0, 2), N(0, 1))
    assert theory.tv_exact(10**6, 1, reference="paper") == pytest.approx(0.166064074984, abs=1e-5)


def test_limits_in_beta():
    for rank in (1, 2, 3, 50, 10**5):
        exact = theory.tv_exact(rank, 5, beta2=[0.0, 1e-300, 1 - 2**-53, 1.0])
        assert exact[0] == pytest.approx(exact[1], abs=1e-12), rank
        # the law approaches its limit at the rate sqrt(1 - beta2), here sqrt(2^-53)
        assert exact[2] == pytest.approx(exact[3], abs=2e-7), rank
        assert theory.tv_exact(rank, 1) == exact[3], rank
        # there is no 1/n term against the matched Gaussian: even n = 10^12 leaves a distance
        assert theory.tv_exact(rank, 10**12) > 0.27 / (rank + 3), rank


def test_kolmogorov_by_symmetry():
    r = np.array([1, 4, 30, 500])
    assert np.all(
        theory.kolmogorov_exact(r, 5, beta2=0) <= theory.tv_exact(r, 5, beta2=0) / 2 + 1e-12
    )


def test_bound_falls_with_rank_and_exact_does_not_rise_with_flat_width():
    bound = theory.tv_bound(np.arange(1, 2000)[:, None], [2, 16, 768, 4096])
    assert np.all(np.diff(bound, axis=0) < 0)
    assert np.all(np.diff(theory.tv_exact(16, 2 ** np.arange(12))) < 0)


# --- contract --------------------------------------------------------------------------------

FUNCTIONS = [
    theory.tv_bound,
    theory.tv_exact,
    theory.tv_lower_bound,
    theory.berry_esseen_bound,
    theory.kolmogorov_exact,
    theory.noise_variance,
    theory.noise_kurtosis,
]


def test_scalars_and_arrays():
    for function in FUNCTIONS:
        name = function.__name__
        for rank, n in [(8, 768), (np.int64(8), np.array(768)), (8.0, np.float64(768))]:
            assert type(function(rank, n)) is float, (name, rank, n)
        grid = function([[1], [8], [300]], [1, 2, 768])
        assert grid.shape == (3, 3) and grid.dtype == np.float64, name
        assert grid[1, 2] == function(8, 768) == function(8, 3, beta2=1 / 768), name
        assert function(8, [3, 4], beta2=0.5).shape == (2,), name
        assert function(8, 3, beta2=[0, 0.5, 1]).shape == (3,), name
        assert function(np.zeros((0,)), 3).shape == (0,), name


@pytest.mark.filterwarnings("error")
def test_the_largest_arguments_have_their_known_limits():
    assert theory.noise_logpdf([-1e100, 1e100], 2, beta2=0) == pytest.approx(-2e100)  # Laplace
    # the distance falls as 1 / sqrt(rank)
    ratio = theory.tv_exact(10**10, 5) / theory.tv_exact(10**12, 5)
    assert ratio == pytest.approx(10, rel=1e-4)


def test_bad_input():
    for arguments, words in (
        (dict(rank=0, n=5), "rank .* got 0"),
        (dict(rank=2.5, n=5), "rank .* got 2.5"),
        (dict(rank=float("nan"), n=5), "rank .* got nan"),
        (dict(rank=True, n=5), "rank .* got True"),
        (dict(rank="8", n=5), "rank .* got '8'"),
        (dict(rank=[4, -3], n=5), "rank .* got -3"),
        (dict(rank=None, n=5), "rank .* got None"),
        (dict(rank=float("inf"), n=5), "rank .* got inf"),
        (dict(rank=10**12 + 1, n=5), "rank .* <= 1000000000000, got 1000000000001"),
        (dict(rank=10**30, n=5), "rank .* <= 1000000000000, got 1000000000000000"),
        (dict(rank=8, n=1e300), "n must .* <= 1000000000000, got 1e.300"),
        (dict(rank=8, n=0), "n must .* got 0"),
        (dict(rank=8, n=[1.5]), "n must .* got 1.5"),
        (dict(rank=8, n=5, beta2=-1e-9), "beta2 .* got -1e-09"),
        (dict(rank=8, n=5, beta2=[0.1, 1.01]), "beta2 .* got 1.01"),
        (dict(rank=8, n=5, beta2=float("nan")), "beta2 .* got nan"),
    ):
        for function in FUNCTIONS:
            refused(words, function, **arguments)
    for function in (theory.tv_bound, theory.tv_exact, theory.kolmogorov_exact):
        words = r"reference must be one of .* got 'match'.*matched"
        refused(words, function, 8, 5, reference="match")
    refused(r"x must .* got nan", theory.noise_logpdf, np.nan, 4, beta2=0.1)
    refused(r"x must .* <= 1e.100, got 1e.160", theory.noise_logpdf, 1e160, 4, beta2=0.1)
    refused(r"beta2 must .* got 2", theory.noise_logpdf, 0.0, 4, beta2=2)
