"""Privacy profiles against reference values, mpmath, limits, and simulations that form A."""

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
from lowrank_dp.artifacts import load_result
from lowrank_dp.experiments import vector_privacy
from lowrank_dp.theory._special import log_chi2_cdf, log_chi2_survival
from lowrank_dp.theory.privacy import PROFILE_ERROR
from tests.refusals import refused

REFERENCE = json.loads((Path(__file__).parent / "data" / "theory_ref.json").read_text())
ARTIFACTS = Path(__file__).parent.parent / "paper_artifacts"
ROWS = {
    key: np.array([row[key] for row in REFERENCE["hockey_stick"]])
    for key in REFERENCE["hockey_stick"][0]
}


def test_reference_profile():
    got = theory.privacy_profile(
        ROWS["eps"], ROWS["r"], ROWS["n"], angle=ROWS["theta"], norm_ratio=ROWS["kappa"]
    )
    assert np.all(np.abs(got - ROWS["delta"]) <= 1e-11 + ROWS["conv_err"])


def test_reference_gaussian_reading_and_floor():
    got = theory.gaussian_privacy_profile(
        ROWS["eps"], ROWS["r"], angle=ROWS["theta"], norm_ratio=ROWS["kappa"]
    )
    # angles are rounded to 11 digits, and the smallest values are the most sensitive to that
    np.testing.assert_allclose(got, ROWS["delta_gauss_paper"], rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(
        theory.privacy_floor(ROWS["r"], angle=ROWS["theta"]), ROWS["floor"], rtol=1e-9, atol=1e-300
    )


def test_reference_gap():
    for row in REFERENCE["gaussian_reading_gap"]:
        pair = dict(angle=row["theta"], norm_ratio=row["kappa"])
        r, n = row["r"], row["n"]
        assert theory.privacy_profile(1, r, n, **pair) == pytest.approx(
            row["delta_exact_eps1"], abs=2e-8
        )
        assert theory.privacy_profile(0, r, n, **pair) == pytest.approx(row["tv_exact"], abs=2e-8)
        assert theory.gaussian_privacy_profile(0, r, **pair) == pytest.approx(
            row["tv_gauss"], rel=1e-6
        )
        if row["eps_exact_1e5"] not in (None, "inf", float("inf")):
            # the larger of the two directions, which for a rotation are equal
            got = theory.privacy_profile(row["eps_exact_1e5"], r, n, **pair)
            assert got == pytest.approx(1e-5, rel=1e-3)


def mp_profile(epsilon, rank, n, theta, kappa):
    """Integrate the same reduction in high precision, by tanh-sinh with mpmath."""
    r, theta, kappa, epsilon = mp.mpf(rank), mp.mpf(theta), mp.mpf(kappa), mp.mpf(epsilon)
    half_dof = (r + n - 1) / 2
    z = mp.beta(mp.mpf(1) / 2, r / 2)

    def integrand(phi):
        c = mp.cos(phi - theta) / mp.cos(phi)
        if c <= 0 or kappa * c == 1:
            return mp.mpf(0)
        v = (
            2
            * ((r - 1) * mp.log(kappa) - (r - n - 1) / 2 * mp.log(kappa * c) - epsilon)
            / (1 - 1 / (kappa * c))
        )
        v = max(v, mp.mpf(0))
        ends = (0, v / 2) if kappa * c > 1 else (v / 2, mp.inf)
        other = (0, v / (2 * kappa * c)) if kappa * c > 1 else (v / (2 * kappa * c), mp.inf)
        return (
            mp.cos(phi) ** (r - 1) * mp.gammainc(half_dof, *ends, regularized=True)
            - mp.exp(epsilon)
            * mp.cos(phi - theta) ** (r - 1)
            * mp.gammainc(half_dof, *other, regularized=True)
        ) / z

    floor = mp.betainc(r / 2, 0.5, 0, mp.sin(theta) ** 2, regularized=True) / 2
    if theta > mp.pi / 2:
        floor = 1 - floor
    c_zero = theta - mp.pi / 2
    marks = [mp.atan((1 / kappa - mp.cos(theta)) / mp.sin(theta))]
    if r != n + 1:
        c = mp.exp(2 * ((r - 1) * mp.log(kappa) - epsilon) / (r - n - 1)) / kappa
        marks.append(mp.atan((c - mp.cos(theta)) / mp.sin(theta)))
    edges = [
        c_zero,
        *(c_zero + (mp.pi / 2 - c_zero) * mp.mpf(k) / 24 for k in range(1, 24)),
        mp.pi / 2,
        *(m for m in marks if c_zero < m < mp.pi / 2),
    ]
    return floor + mp.quad(integrand, sorted(edges), maxdegree=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "epsilon, rank, n, theta, kappa",
    [
        (0.0, 2, 2, 1.0, 1.0),
        (1.0, 1, 5, 0.3, 1.0),
        (0.5, 6, 5, 0.8, 1.3),
        (3.0, 3, 8, 2.6, 0.4),
        (2.0, 8, 40, 1.5, 2.0),
        (1000.0, 1, 300, 1.2, 1.0),
        (60.0, 1, 46, 1e-3, 1.5e-3),
        (0.002, 40, 400, 0.05, 1.0),
    ],
)
def test_profile_against_mpmath(epsilon, rank, n, theta, kappa):
    with mp.workdps(18):
        want = float(mp_profile(epsilon, rank, n, theta, kappa))
    assert theory.privacy_profile(epsilon, rank, n, angle=theta, norm_ratio=kappa) == pytest.approx(
        want, abs=1e-9
    )


def unbounded_profile(epsilon, rank, n, angles):
    """Delta of vectors of one norm, by the trapezoid rule over all of tan(phi), with its tails."""
    t = np.sinh(np.linspace(-60, 60, 60_001))[None]  # sqrt(rank) tan(phi) is Student t
    weight = stats.t.pdf(t, rank) * np.gradient(t[0])
    angle = np.asarray(angles)[:, None]
    c = np.cos(angle) + np.sin(angle) * t / np.sqrt(rank)  # (q' . y) / (q . y)
    floor = np.where(c <= 0, weight, 0).sum(axis=1)
    c = np.where((c > 0) & (c != 1), c, np.e)
    with np.errstate(over="ignore", invalid="ignore"):
        v = np.maximum(2 * (-(rank - n - 1) / 2 * np.log(c) - epsilon) / (1 - 1 / c), 0)
        p, other = (
            np.where(c > 1, stats.chi2.cdf(x, rank + n - 1), stats.chi2.sf(x, rank + n - 1))
            for x in (v, v / c)
        )
        gain = np.maximum(p - np.exp(epsilon) * c ** (rank - 1) * np.where(p > 0, other, 0), 0)
    inside = np.where(np.isfinite(gain) & (c != np.e), gain, 0)
    return floor + (weight * inside).sum(axis=1)


def test_a_small_delta_is_not_below_the_truth():
    for rank, angles in ((16, [1e-3, 3e-3]), (64, [1e-3, 1.6e-3, 2.6e-3, 0.01])):
        truth = unbounded_profile(1.0, rank, 768, angles)
        found = theory.privacy_profile(1.0, rank, 768, angle=angles)
        assert (found >= truth * (1 - 1e-4)).all() and (found <= truth + PROFILE_ERROR).all(), rank


def test_the_saved_table_shows_no_delta_that_is_not_computed():
    result = load_result(ARTIFACTS, "vector_privacy", vector_privacy.Result)
    config = result.config
    columns, rows = vector_privacy.table(result)
    saved = (ARTIFACTS / "vector_privacy.csv").read_text(encoding="utf-8").splitlines()
    assert saved == [",".join(cells) for cells in (columns, *rows)]
    bound, bounds = f"< {PROFILE_ERROR:g}", 0
    assert bound in vector_privacy.CAPTION
    column, at = columns.index("exact delta at epsilon 1"), iter(rows)
    for rank in config.ranks:
        for angle, truth in zip(
            config.angles, unbounded_profile(1.0, rank, config.width, config.angles), strict=True
        ):
            row = next(at)
            assert (row[0], float(row[1])) == (str(rank), angle)
            if row[column] == bound:
                assert truth < PROFILE_ERROR, row
                bounds += 1
            else:
                assert float(row[column]) == pytest.approx(truth, rel=6e-3), row
                assert float(row[column]) >= PROFILE_ERROR, row
    assert 0 < bounds < len(rows)


@pytest.mark.parametrize(
    "rank, n, theta, kappa",
    [(1, 4, 0.4, 1.0), (5, 3, 1.1, 0.7), (12, 30, 0.2, 1.1), (3, 6, 2.5, 1.0), (4, 8, 0.0, 1.5)],
)
def test_profile_by_simulation(rank, n, theta, kappa):
    """delta = E max(0, 1 - e^(epsilon - L)), with A formed; 5.2 standard errors (2e-7 by chance).

    The privacy loss L is the log-ratio of the densities of the release, so the reduction to an
    angle and a chi^2 variable is not used.
    """
    count = 100_000
    a = np.random.default_rng([rank, n]).standard_normal((count, rank, n)) / np.sqrt(rank)
    q, other = np.zeros(n), np.zeros(n)
    q[0] = 1.7
    other[:2] = 1.7 * kappa * np.cos(theta), 1.7 * kappa * np.sin(theta)
    y = np.einsum("srn,sr->sn", a, a @ q)
    loss = theory.projection_logpdf(y, q, rank) - theory.projection_logpdf(y, other, rank)
    assert abs(np.mean(loss == np.inf) - theory.privacy_floor(rank, angle=theta)) < 5.2 * 0.5 / (
        np.sqrt(count)
    )
    for epsilon in (0.0, 0.7, 3.0, 30.0):
        excess = np.maximum(0, -np.expm1(np.minimum(epsilon - loss, 1.0)))
        got = theory.privacy_profile(epsilon, rank, n, angle=theta, norm_ratio=kappa)
        assert abs(excess.mean() - got) < 5.2 * excess.std() / np.sqrt(count) + 2e-4 * (got < 1e-3)


def test_same_direction_is_two_gamma_laws():
    # theta = 0: r |y|^2 / (q . y) is chi^2_N, times kappa under q'
    for epsilon, r, n, kappa in [(0.0, 3, 1, 2.0), (0.2, 5, 30, 0.9), (1.0, 64, 4096, 1.1)]:
        dof = r + n - 1
        v = 2 * (dof / 2 * np.log(kappa) - epsilon) / (1 - 1 / kappa)
        tail = stats.chi2.cdf if kappa > 1 else stats.chi2.sf
        want = tail(v, dof) - np.exp(epsilon) * tail(v / kappa, dof)
        got = theory.privacy_profile(epsilon, r, n, angle=0, norm_ratio=kappa)
        assert got == pytest.approx(want, abs=1e-13)
    # n = 1, kappa = 1/2: A^T A q is gamma, and so is A^T A q'
    scale = 2 / 3
    y = np.linspace(1e-9, 40, 400_001)
    p, other = stats.gamma(1.5, scale=scale).pdf(y), stats.gamma(1.5, scale=scale / 2).pdf(y)
    want = np.maximum(p - np.exp(0.3) * other, 0).sum() * (y[1] - y[0])
    assert theory.privacy_profile(0.3, 3, 1, angle=0, norm_ratio=0.5) == pytest.approx(
        want, abs=1e-6
    )


def test_special_pairs():
    for rank, n in [(1, 1), (4, 1), (3, 768), (1000, 5)]:
        assert theory.privacy_profile(0.0, rank, n, angle=0) == 0
        assert theory.privacy_profile(2.0, rank, n, angle=np.pi) == 1
        assert theory.gaussian_privacy_profile(0.0, rank, angle=0) == 0
    # the profile is continuous at theta = 0 and pi
    assert theory.privacy_profile(0.0, 4, 16, angle=1e-9) < 1e-8
    assert theory.privacy_profile(1.0, 4, 16, angle=1e-9, norm_ratio=1.1) == pytest.approx(
        theory.privacy_profile(1.0, 4, 16, angle=0, norm_ratio=1.1), abs=1e-7
    )
    assert theory.privacy_profile(1.0, 4, 16, angle=np.pi - 1e-5) > 1 - 1e-9


def test_huge_epsilon_leaves_the_floor():
    pairs = [(1, 5, 1.0, 1.0), (3, 40, 2.0, 2.0), (8, 2, 0.5, 0.01)]
    for epsilon, (rank, n, angle, ratio) in itertools.product([1e4, 1e6, 1e100, 1e308], pairs):
        got = theory.privacy_profile(epsilon, rank, n, angle=angle, norm_ratio=ratio)
        floor, case = theory.privacy_floor(rank, angle=angle), (epsilon, rank, n, angle, ratio)
        assert floor <= got <= floor + 0.05 * (epsilon < 1e5) + 1e-3, case
        reading = theory.gaussian_privacy_profile(epsilon, rank, angle=angle, norm_ratio=ratio)
        assert reading == 0, case


def test_floor():
    # rank 1: the in-plane angle is uniform; theta = pi/2: a coin
    np.testing.assert_allclose(
        theory.privacy_floor(1, angle=[0.3, 1.0, 2.5]),
        np.array([0.3, 1.0, 2.5]) / np.pi,
        atol=1e-15,
    )
    np.testing.assert_allclose(theory.privacy_floor([1, 8, 10**5], angle=np.pi / 2), 0.5)
    np.testing.assert_allclose(
        theory.privacy_floor(6, angle=1.0) + theory.privacy_floor(6, angle=np.pi - 1.0), 1
    )


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 10**5),
    n=st.integers(2, 10**6),
    angle=st.floats(0, np.pi),
    log_ratio=st.floats(-3, 3),
    epsilon=st.floats(0, 50),
)
def test_profile_properties(rank, n, angle, log_ratio, epsilon):
    pair = dict(angle=angle, norm_ratio=float(np.exp(log_ratio)))
    delta = theory.privacy_profile([0, epsilon, epsilon + 1], rank, n, **pair)
    # every profile decreases in epsilon and is at least 1 - e^epsilon (1 - TV)
    assert delta[0] + 1e-9 >= delta[1] >= delta[2] - 1e-9
    assert delta[1] >= 1 - np.exp(epsilon) * (1 - delta[0]) - 1e-9 * np.exp(epsilon)
    assert 1 >= delta[2] >= theory.privacy_floor(rank, angle=angle)
    if n > 2:  # the narrower release is a function of the wider one
        assert theory.privacy_profile(epsilon, rank, n // 2 + 1, **pair) <= delta[1] + 1e-9


def test_direction_does_not_matter_for_a_rotation_but_does_for_norms():
    assert theory.privacy_profile(0, 8, 64, angle=0.3, norm_ratio=1.2) == pytest.approx(
        theory.privacy_profile(0, 8, 64, angle=0.3, norm_ratio=1 / 1.2), abs=1e-10
    )  # TV
    one, other = (theory.privacy_profile(1, 8, 64, angle=0.3, norm_ratio=k) for k in (1.2, 1 / 1.2))
    assert abs(one - other) > 1e-3


def test_not_monotone_in_rank():
    rows = REFERENCE["u_shape_n4096_rotation_0.05"]
    ranks = np.array([row["r"] for row in rows])
    angle = 2 * np.arcsin(0.05 / 2)
    tv = theory.privacy_profile(0, ranks, 4096, angle=angle)
    np.testing.assert_allclose(tv, [row["tv_exact"] for row in rows], atol=2e-9)
    np.testing.assert_allclose(
        theory.privacy_profile(1, ranks, 4096, angle=angle),
        [row["delta1_exact"] for row in rows],
        atol=2e-9,
    )
    steps = np.diff(tv)
    assert steps[0] < 0 < steps[-1]
    # the Gaussian reading is monotone: "smaller rank, more private"
    assert np.all(np.diff(theory.gaussian_privacy_profile(0, ranks, angle=angle)) > 0)


def test_collapse_with_width():
    delta = theory.privacy_profile(5, 4, [10**2, 10**4, 10**6, 10**8], angle=0.2)
    assert np.all(np.diff(delta) > 0) and delta[-1] > 0.99


def test_gaussian_reading_against_mpmath():
    with mp.workdps(250):
        for epsilon, rank, angle, ratio in [
            (1, 1, 0.05, 1.0),
            (0, 7, 1e-6, 1.0),
            (3, 64, 2.0, 0.3),
            (40, 8, 0.1, 1.0),
        ]:
            a, k = mp.mpf(angle), mp.mpf(ratio)
            mu = mp.sqrt(rank * (1 + k * k - 2 * k * mp.cos(a)))
            shift = epsilon / mu
            want = mp.ncdf(mu / 2 - shift) - mp.exp(epsilon) * mp.ncdf(-mu / 2 - shift)
            got = theory.gaussian_privacy_profile(epsilon, rank, angle=angle, norm_ratio=ratio)
            assert got == pytest.approx(float(want), rel=1e-8, abs=1e-300)


@pytest.mark.parametrize("dof", [2, 21, 700, 10**6])
def test_deep_chi2_tails(dof):
    with mp.workdps(40):
        for sds in (-30.0, -3.0, 3.0, 80.0):
            x = dof + sds * np.sqrt(2 * dof)
            if x <= 0:
                x = 1e-5 ** (40 / dof) if dof > 2 else 1e-300
            if dof > 700 and abs(sds) > 3:
                # mpmath's own is out of reach: the slope of the logarithm, -1/2 + (a-1)/x + hazard
                function = log_chi2_cdf if sds < 0 else log_chi2_survival
                low, high = function(np.array([x - 1, x + 1]), dof)
                middle = function(np.array([x]), dof)[0]
                hazard = np.exp(stats.chi2.logpdf(x, dof) - middle) * (1 if sds < 0 else -1)
                assert (high - low) / 2 == pytest.approx(hazard, rel=1e-5)
                continue
            a, half = mp.mpf(dof) / 2, mp.mpf(x) / 2
            lower = mp.gammainc(a, 0, half, regularized=True)
            upper = mp.gammainc(a, half, mp.inf, regularized=True)
            assert log_chi2_cdf(np.array([x]), dof)[0] == pytest.approx(
                float(mp.log(lower)), rel=1e-11, abs=1e-12
            )
            assert log_chi2_survival(np.array([x]), dof)[0] == pytest.approx(
                float(mp.log(upper)), rel=1e-11, abs=1e-12
            )


@pytest.mark.filterwarnings("error")
def test_the_extreme_ratios_of_norms_are_told_apart_without_a_warning():
    ratios = [1e-100, 1e100]
    found = theory.privacy_profile(0.5, 4, 10, angle=[[0.0], [0.1], [3.0]], norm_ratio=ratios)
    np.testing.assert_allclose(found, 1.0, rtol=1e-12)


def test_scalars_and_arrays():
    assert type(theory.privacy_profile(1, 8, 768, angle=0.1)) is float
    assert type(theory.gaussian_privacy_profile(1, 8, angle=0.1)) is float
    assert type(theory.privacy_floor(8, angle=0.1)) is float
    grid = theory.privacy_profile([0, 1], [[4], [8], [16]], 64, angle=0.1)
    assert grid.shape == (3, 2)
    assert grid[2, 1] == theory.privacy_profile(1, 16, 64, angle=0.1)
    assert theory.gaussian_privacy_profile(1, 8, angle=[0.1, 0.2], norm_ratio=1.1).shape == (2,)


def test_bad_input():
    for changed, words in (
        (dict(epsilon=-0.1), "epsilon must .* got -0.1"),
        (dict(epsilon=np.nan), "epsilon .* got nan"),
        (dict(epsilon=np.inf), "epsilon .* got inf"),
        (dict(rank=0), "rank must .* got 0"),
        (dict(rank=1.5), "rank .* got 1.5"),
        (dict(n=0), "n must .* got 0"),
        (dict(angle=-0.1), "angle must .* got -0.1"),
        (dict(angle=3.2), "angle must .* got 3.2"),
        (dict(norm_ratio=0), "norm_ratio must .* >= 1e-100 and <= 1e.100, got 0"),
        (dict(norm_ratio=1e-300), "norm_ratio must .* got 1e-300"),
        (dict(norm_ratio=1e101), "norm_ratio must .* got 1e.101"),
        (dict(norm_ratio=np.nan), "norm_ratio .* got nan"),
        (dict(n=1, angle=0.5), "angle must be 0 or pi when n is 1, got 0.5"),
    ):
        arguments = dict(epsilon=1.0, rank=8, n=16, angle=0.1, norm_ratio=1.0) | changed
        refused(words, theory.privacy_profile, **arguments)
        if "n" not in changed:
            del arguments["n"]
            refused(words, theory.gaussian_privacy_profile, **arguments)
