"""Joint law against reference values, mpmath, limits, and simulations that form A."""

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


def released(rank, q, count, seed):
    """Return ``count`` draws of A^T A q, each with an A that is formed."""
    a = np.random.default_rng(seed).standard_normal((count, rank, len(q))) / np.sqrt(rank)
    return np.einsum("srn,sr->sn", a, a @ np.asarray(q))


def test_reference_joint():
    rows = REFERENCE["joint_tv"]
    for reference in ("matched", "paper"):
        rank, n, want = ([row[key] for row in rows] for key in ("r", "n", f"tv_{reference}"))
        got = theory.joint_tv(rank, n, reference=reference)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-11, err_msg=reference)


def test_reference_upper_and_limit():
    rows = REFERENCE["joint_tv"]
    r, n = (np.array([row[key] for row in rows]) for key in ("r", "n"))
    np.testing.assert_allclose(
        theory.joint_tv_upper_bound(r, n), [row["upper"] for row in rows], atol=1e-11
    )
    np.testing.assert_allclose(
        theory.joint_tv_limit((n - 1) / r), [row["arctan_limit"] for row in rows], atol=1e-11
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "rank, n, reference",
    [
        (1, 2, "matched"),
        (1, 30, "paper"),
        (5, 4, "matched"),
        (40, 2, "paper"),
        (30, 300, "matched"),
    ],
)
def test_joint_tv_against_mpmath(rank, n, reference):
    """The oracle integrates the complement, the excess of the Gaussian, by another quadrature."""
    k, variance = n - 1, (2 if reference == "matched" else 1) / mp.mpf(rank)
    r = mp.mpf(rank)

    def tail(t, s):
        lower = mp.gammainc(mp.mpf(k) / 2, 0, t / 2, regularized=True) if t < mp.inf else mp.mpf(1)
        return lower if s > 1 else 1 - lower  # the event where the Gaussian is larger

    def log_p(s):
        return r / 2 * mp.log(r / 2) - mp.loggamma(r / 2) + (r / 2 - 1) * mp.log(s) - r * s / 2

    def log_g(s):
        return -((s - 1) ** 2) / (2 * variance) - mp.log(2 * mp.pi * variance) / 2

    def alpha(s):
        return log_p(s) - log_g(s) - mp.mpf(k) / 2 * mp.log(s)

    def excess(s):
        t = max(mp.mpf(0), -2 * alpha(s) / (1 - 1 / s))
        return mp.exp(log_g(s)) * tail(t, s) - mp.exp(log_p(s)) * tail(t / s, s)

    with mp.workdps(18):
        sd = float(mp.sqrt(variance))
        offsets = np.concatenate(
            [[1e-4, 1e-3, 1e-2, 0.05], np.linspace(0.1, 1, 10), np.linspace(1.25, 9, 25)]
        )
        edges = [e for e in sorted({0.0, 1.0, *(1 + sd * offsets), *(1 - sd * offsets)}) if e >= 0]
        roots = [
            mp.findroot(alpha, pair, solver="anderson")
            for pair in itertools.pairwise(edges[1:])
            if alpha(pair[0]) * alpha(pair[1]) < 0
        ]
        below_zero = mp.ncdf(-1 / mp.sqrt(variance))
        want = below_zero + mp.quad(excess, sorted([*edges, *roots]), maxdegree=5)
    assert theory.joint_tv(rank, n, reference=reference) == pytest.approx(float(want), abs=1e-10)


@pytest.mark.parametrize("rank, q", [(2, [0.7, -1.1, 0.4]), (9, [1.0, 2.0])])
def test_joint_tv_by_simulation(rank, q):
    """TV = E_p max(0, 1 - g/p), with A formed, within 5.2 standard errors (2e-7 by chance)."""
    q = np.array(q)
    y = released(rank, q, 100_000, seed=rank)
    log_p = theory.projection_logpdf(y, q, rank)
    assert np.all(np.isfinite(log_p))
    covariances = {
        "matched": q @ q * np.eye(len(q)) + np.outer(q, q),
        "paper": q @ q * np.eye(len(q)),
    }
    for reference, covariance in covariances.items():
        log_g = stats.multivariate_normal(q, covariance / rank).logpdf(y)
        excess = np.maximum(0, 1 - np.exp(np.minimum(log_g - log_p, 50)))
        error = excess.std() / np.sqrt(len(y))
        assert abs(excess.mean() - theory.joint_tv(rank, len(q), reference=reference)) < 5.2 * error


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 10**5), n=st.integers(1, 10**6))
def test_lower_exact_upper(rank, n):
    exact = theory.joint_tv(rank, n)
    assert 0 <= theory.joint_tv_lower_bound(rank, n) <= exact + 1e-10
    assert exact <= theory.joint_tv_upper_bound(rank, n) + 1e-10
    assert exact >= theory.tv_exact(rank, n) - 1e-10  # one coordinate reveals less


def test_lower_bound_is_nearly_the_best_of_its_family():
    eta = np.linspace(1e-4, 0.9999, 100_000)
    for rank, n in [(1, 10**4), (4, 10**5), (100, 10**6)]:
        best = np.max(
            1 - 2 / ((n - 1) * eta**2) - np.sqrt(rank / (4 * np.pi)) * np.log((1 + eta) / (1 - eta))
        )
        assert 0.995 * best < theory.joint_tv_lower_bound(rank, n) < best + 1e-6, (rank, n)


def test_one_coordinate_is_the_coordinate_law():
    for reference in ("matched", "paper"):
        r = np.array([1, 2, 7, 5000])
        np.testing.assert_array_equal(
            theory.joint_tv(r, 1, reference=reference), theory.tv_exact(r, 1, reference=reference)
        )


def test_limits():
    assert theory.joint_tv(10**5, 10**5) == pytest.approx(theory.joint_tv_limit(1), abs=1e-4)
    assert theory.joint_tv(10**5, 4 * 10**5) == pytest.approx(0.5, abs=1e-4)
    assert theory.joint_tv(10**6, 2) < 1e-3
    assert theory.joint_tv(10**6, 2, reference="paper") == pytest.approx(0.166064074984, abs=1e-5)
    assert theory.joint_tv(1, 10**6) > 0.99 and theory.joint_tv_lower_bound(1, 10**6) > 0.9


def test_monotone_in_width():
    # proved, since it is a marginal of the wider problem
    assert np.all(np.diff(theory.joint_tv(8, [1, 2, 3, 10, 100, 1000])) > 0)


# --- density of A^T A q ----------------------------------------------------------------------


def test_reference_density():
    for row in REFERENCE["log_density"]:
        got = theory.projection_logpdf(row["y"], row["q"], row["r"])
        assert got == pytest.approx(row["logdensity"], abs=5e-12)


def test_density_against_the_closed_form():
    rng = np.random.default_rng(0)
    for rank, n in [(1, 1), (1, 3), (16, 8), (5, 200), (10**5, 30)]:
        q = rng.standard_normal(n)
        s = rng.chisquare(rank) / rank
        y = s * q + np.sqrt(s / rank) * np.linalg.norm(q) * rng.standard_normal(n) * (n > 1)
        with mp.workdps(40):
            qm, ym, r = [mp.mpf(v) for v in q], [mp.mpf(v) for v in y], mp.mpf(rank)
            qy, yy = mp.fdot(qm, ym), mp.fdot(ym, ym)
            want = (
                r / 2 * mp.log(r / 2)
                - mp.loggamma(r / 2)
                - mp.mpf(n - 1) / 2 * mp.log(2 * mp.pi / r)
                - (r - 1) / 2 * mp.log(mp.fdot(qm, qm))
                + (r - n - 1) / 2 * mp.log(qy)
                - r * yy / (2 * qy)
            )
        assert theory.projection_logpdf(y, q, rank) == pytest.approx(
            float(want), rel=1e-12, abs=1e-11
        )


def test_density_integrates_to_the_known_moments():
    q, rank = np.array([0.6, -0.8]), 7
    axis = np.linspace(-7, 7, 1401)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    p = np.exp(theory.projection_logpdf(grid, q, rank)) * (axis[1] - axis[0]) ** 2
    assert p.sum() == pytest.approx(1, abs=1e-4)
    mean = np.einsum("ij,ijk->k", p, grid)
    np.testing.assert_allclose(mean, q, atol=1e-4)
    covariance = np.einsum("ij,ijk,ijl->kl", p, grid - q, grid - q)
    np.testing.assert_allclose(covariance, (np.eye(2) + np.outer(q, q)) / rank, atol=1e-4)


def test_density_is_that_of_the_projection():
    """E_p[p'/p] = P'(support of p), with A formed; fails by chance with probability 2e-7."""
    q, other, rank = np.array([1.0, 0.3, -0.2]), np.array([0.9, 0.5, 0.0]), 6
    y = released(rank, q, 200_000, seed=5)
    ratio = np.exp(theory.projection_logpdf(y, other, rank) - theory.projection_logpdf(y, q, rank))
    angle = np.arccos(q @ other / np.linalg.norm(q) / np.linalg.norm(other))
    want = 1 - theory.privacy_floor(rank, angle=angle)
    assert abs(ratio.mean() - want) < 5.2 * ratio.std() / np.sqrt(len(y))


def test_density_shapes_and_support():
    q = np.array([1.0, 2.0])
    assert type(theory.projection_logpdf([1.0, 1.0], q, 3)) is float
    assert theory.projection_logpdf(np.ones((4, 5, 2)), q, 3).shape == (4, 5)
    assert theory.projection_logpdf(np.ones((4, 1, 2)), q, [3, 4, 5]).shape == (4, 3)
    assert theory.projection_logpdf([-2.0, 1.0], q, 3) == -np.inf  # q . y = 0
    assert theory.projection_logpdf([-2.0, 0.5], q, 3) == -np.inf


@pytest.mark.filterwarnings("error")
def test_density_of_any_scale():
    """With c q for q, the density at c y is that of q at y, over c^n."""
    y, q, rank = np.array([1.5, 0.3, -2.0]), np.array([0.8, 0.0, -0.6]), 4
    base = theory.projection_logpdf(y, q, rank)
    for scale in (1e-300, 1e-200, 1e200, 1e300):
        found = theory.projection_logpdf(scale * y, scale * q, rank)
        assert found == pytest.approx(base - 3 * np.log(scale), rel=1e-12), scale
    # at n = 1 and rank 2, A^T A is exponential of mean 1
    assert theory.projection_logpdf([1e200], [1e200], 2) == pytest.approx(-1 - np.log(1e200))
    for far in ([1e308, 1e308, 0.0], [1e308, -1e308, 1.0]):
        assert theory.projection_logpdf(far, 1e-300 * q, rank) == -np.inf
    assert theory.projection_logpdf([1e-300, 0.0, 0.0], 1e300 * q, rank) == -np.inf


def test_density_bad_input():
    for y, q, rank, words in (
        ([1.0, 1.0], [1.0, 2.0, 3.0], 3, "y must .* got 'shape"),
        ([1.0], [0.0], 3, "q must be a vector with a positive norm"),
        ([1.0, np.nan], [1.0, 2.0], 3, "y must .* got nan"),
        ([1.0], 1.0, 3, "q must .* got 1.0"),
        ([1.0], [1.0], 0, "rank must .* got 0"),
    ):
        refused(words, theory.projection_logpdf, y, q, rank)


def test_arguments():
    assert type(theory.joint_tv(8, 768)) is float
    assert theory.joint_tv([[8], [16]], [1, 2, 3]).shape == (2, 3)
    assert type(theory.joint_tv_limit(2)) is float
    for function in (theory.joint_tv, theory.joint_tv_upper_bound, theory.joint_tv_lower_bound):
        refused(r"rank must .* got 0", function, 0, 5)
        refused(r"n must .* got 2.5", function, 3, 2.5)
    refused(r"reference must .* got 'both'", theory.joint_tv, 8, 768, reference="both")
    refused(r"ratio must .* got -1", theory.joint_tv_limit, -1)
