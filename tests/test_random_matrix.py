"""Random-matrix formulas against integrals, brute force, and simulated matrices."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, optimize, special, stats

from lowrank_dp.restore import restore_with_report
from lowrank_dp.spectrum import random_matrix as rmt
from tests.refusals import refused

ASPECTS = st.floats(1e-3, 1.0)
SHAPES = [(40, 100), (100, 40), (50, 50), (1, 30), (7, 3000)]


def t64(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- the bulk ---------------------------------------------------------------------------------


def test_edge():
    for shape, noise_std, edge in (
        ((100, 400), 0.5, 15.0),
        ((400, 100), 0.5, 15.0),
        ((9, 9), 2.0, 12.0),
        ((1, 1), 1.0, 2.0),
        ((3, 4, 25, 36), 1.0, 11.0),
        ((100, 400), 0.0, 0.0),
    ):
        assert rmt.bulk_edge(shape, noise_std) == pytest.approx(edge, rel=1e-15), shape


def test_density_integrates_to_one():
    for shape, noise_std in itertools.product(SHAPES, (0.01, 3.0)):
        pdf = functools.partial(rmt.marchenko_pastur_pdf, shape=shape, noise_std=noise_std)
        edge = rmt.bulk_edge(shape, noise_std)
        low = noise_std * abs(math.sqrt(shape[0]) - math.sqrt(shape[1]))
        total, _ = integrate.quad(pdf, low, edge, limit=200)
        assert total == pytest.approx(1, abs=1e-6), (shape, noise_std)
        outside = np.array([-edge, 0.999 * low - 1e-9 * edge, 1.001 * edge])
        assert (pdf(outside) == 0).all(), (shape, noise_std)


def test_density_of_a_square_matrix_at_zero_is_its_limit():
    """The quarter circle of radius 2 has the height 1 / pi times its radius."""
    at_zero, near, unknown = rmt.marchenko_pastur_pdf([0.0, 1e-9, math.nan], (4, 4), 0.5)
    assert at_zero == pytest.approx(2 / math.pi, rel=1e-12) == near and math.isnan(unknown)
    assert rmt.marchenko_pastur_pdf(0.0, (4, 5), 0.5) == 0


@pytest.mark.parametrize("shape", [(300, 800), (800, 300), (400, 400)])
def test_bulk_matches_simulated_noise(shape):
    noise = 0.7 * np.random.default_rng(0).standard_normal(shape)
    s = np.linalg.svd(noise, compute_uv=False)
    grid = np.linspace(0, rmt.bulk_edge(shape, 0.7), 20001)
    density = rmt.marchenko_pastur_pdf(grid, shape, 0.7)
    cdf = integrate.cumulative_trapezoid(density, grid, initial=0)
    distance = stats.kstest(s, lambda x: np.interp(x, grid, cdf)).statistic
    assert distance < 5 / min(shape)  # singular values repel each other: i.i.d. draws are farther
    quantiles = rmt.marchenko_pastur_quantiles(min(shape), shape, 0.7)
    assert (np.diff(quantiles) < 0).all()
    np.testing.assert_allclose(quantiles, s, atol=0.02 * s[0])


def test_quantiles_invert_the_density():
    for shape in SHAPES[:3]:
        pdf = functools.partial(rmt.marchenko_pastur_pdf, shape=shape, noise_std=2.0)
        low = 2 * abs(math.sqrt(shape[0]) - math.sqrt(shape[1]))
        quantiles = rmt.marchenko_pastur_quantiles(5, shape, 2.0)
        for value, level in zip(quantiles, (0.9, 0.7, 0.5, 0.3, 0.1), strict=True):
            below, _ = integrate.quad(pdf, low, value, limit=200)
            assert below == pytest.approx(level, abs=1e-5), (shape, level)


@functools.cache
def top_values(shape, count):
    rng = np.random.default_rng(list(shape))
    return np.array([np.linalg.norm(rng.standard_normal(shape), 2) for _ in range(count)])


def test_false_spike_rate():
    """The share of pure-noise draws above the level is within 4 standard errors of the rate."""
    count = 1500
    for shape, rate in itertools.product([(64, 96), (150, 50)], (0.2, 0.05, 0.01)):
        above = (top_values(shape, count) > rmt.bulk_edge(shape, 1.0, false_spike_rate=rate)).mean()
        # a tenth of the rate is allowed for the gamma approximation and the finite size
        limit = 4 * math.sqrt(rate * (1 - rate) / count) + 0.1 * rate
        assert abs(above - rate) < limit, (shape, rate)


def test_asymptotic_edge_is_exceeded_one_time_in_eight():
    above = (top_values((64, 96), 1500) > rmt.bulk_edge((64, 96), 1.0)).mean()
    assert 0.08 < above < 0.18
    assert rmt.bulk_edge((64, 96), 1.0, false_spike_rate=0.01) > rmt.bulk_edge((64, 96), 1.0)
    levels = [rmt.bulk_edge((64, 96), 2.0, false_spike_rate=r) for r in (0.3, 0.1, 0.01, 1e-4)]
    assert levels == sorted(levels)
    assert levels[0] == pytest.approx(rmt.bulk_edge((96, 64), 2.0, false_spike_rate=0.3), rel=1e-12)


def test_false_spike_level_of_a_vector_is_exact():
    """The norm of a vector of 1 is half-normal, of 2 Rayleigh, of n chi: P(n/2, level^2/2)."""
    for rate in (0.9, 0.5, 0.05, 1e-3, 1e-12):
        level = {n: rmt.bulk_edge((1, n), 2.0, false_spike_rate=rate) / 2 for n in (1, 2, 768)}
        assert math.erfc(level[1] / math.sqrt(2)) == pytest.approx(rate, rel=1e-9)
        assert math.exp(-(level[2] ** 2) / 2) == pytest.approx(rate, rel=1e-9)
        assert special.gammaincc(384, level[768] ** 2 / 2) == pytest.approx(rate, rel=1e-9)
        assert rmt.bulk_edge((768, 1), 2.0, false_spike_rate=rate) == 2 * level[768]
    _, (report,) = restore_with_report(torch.tensor([[9.0, 1.0]]), 1.0, false_spike_rate=0.01)
    assert report.edge == pytest.approx(math.sqrt(2 * math.log(100)), rel=1e-9)


def test_false_spike_rate_of_short_sides_is_as_near_as_documented():
    rng = np.random.default_rng(3)
    for shape, count in (((2, 2), 100_000), ((3, 40), 50_000), ((8, 8), 50_000)):
        matrices = rng.standard_normal((count, *shape))
        squares = np.linalg.eigvalsh(matrices @ matrices.transpose(0, 2, 1))[:, -1]
        for rate in (0.5, 0.2, 0.05):
            above = (squares > rmt.bulk_edge(shape, 1.0, false_spike_rate=rate) ** 2).mean()
            assert 0.85 * rate < above < 1.25 * rate, (shape, rate)


def test_tracy_widom_quantiles():
    """Upper quantiles of the Tracy-Widom law (Bejan 2005): 0.9793 at 5%, 2.0234 at 1%."""
    m, n = 400, 900
    a, b = math.sqrt(m - 0.5), math.sqrt(n - 0.5)
    for rate, value in ((0.05, 0.9793), (0.01, 2.0234), (0.1, 0.4501)):
        squared = rmt.bulk_edge((m, n), 1.0, false_spike_rate=rate) ** 2
        quantile = (squared - (a + b) ** 2) / ((a + b) * (1 / a + 1 / b) ** (1 / 3))
        assert quantile == pytest.approx(value, abs=0.01)


# --- spikes -----------------------------------------------------------------------------------


@given(ASPECTS, st.floats(1.0 + 1e-6, 1e4))
def test_spike_map_round_trip(aspect, factor):
    theta = aspect**0.25 * factor
    y = rmt.visible_value(t64(theta), aspect)
    want = math.sqrt((theta + 1 / theta) * (theta + aspect / theta))
    assert float(y) == pytest.approx(want, rel=1e-12)
    # near the edge, y changes with the square of theta's distance, which costs half of the digits
    rel = 3e-8 + 1e-14 / (factor - 1)
    assert float(rmt.clean_value(y, aspect)) == pytest.approx(theta, rel=rel)


@given(ASPECTS, st.floats(0, 1))
def test_invisible_spikes(aspect, factor):
    theta = t64(aspect**0.25 * factor)
    edge = 1 + math.sqrt(aspect)
    assert float(rmt.visible_value(theta, aspect)) == pytest.approx(edge, rel=1e-12)
    assert [float(c) for c in rmt.overlaps(theta, aspect)] == [0, 0]
    for shrink in (rmt.clean_value, *SHRINKERS.values()):
        assert float(shrink(t64(edge * factor), aspect)) == 0


SHRINKERS = {
    "frobenius": rmt.shrink_frobenius,
    "operator": rmt.shrink_operator,
    "nuclear": rmt.shrink_nuclear,
}


@given(ASPECTS, st.floats(1.0 + 1e-6, 1e4))
def test_formulas_of_the_literature(aspect, factor):
    """Inverse map and Frobenius shrinker as printed, in 50 digits, since they cancel in doubles."""
    import mpmath as mp

    with mp.workdps(50):
        b = mp.mpf(aspect)
        y = float((1 + mp.sqrt(b)) * factor)
        root = mp.sqrt((mp.mpf(y) ** 2 - b - 1) ** 2 - 4 * b)
        theta = mp.sqrt((mp.mpf(y) ** 2 - b - 1 + root) / 2)
        nuclear = max((theta**4 - b - mp.sqrt(b) * theta * y) / (theta**2 * y), 0)
        signal = theta**4 - b
        short, long = signal / (theta**4 + b * theta**2), signal / (theta**4 + theta**2)
        want = [float(v) for v in (theta, root / y, nuclear)]
    got = [
        float(f(t64(y), aspect))
        for f in (rmt.clean_value, rmt.shrink_frobenius, rmt.shrink_nuclear)
    ]
    assert got == pytest.approx(want, rel=1e-9, abs=1e-12 * y)
    measured = [float(c) for c in rmt.overlaps(t64(float(theta)), aspect)]
    assert measured == pytest.approx([float(short), float(long)], rel=1e-9, abs=1e-12)
    # the Frobenius shrinker is theta times both cosines
    assert got[1] == pytest.approx(float(theta * mp.sqrt(short * long)), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("aspect", [1.0, 0.3, 1e-3])
def test_single_precision_near_and_far(aspect):
    """float32 agrees with float64 at the same y, next to the edge and without overflow far away."""
    edge = 1 + math.sqrt(aspect)
    y = torch.tensor(
        [0.0, 1e-30, edge * 0.99, edge * 1.001, edge * 1.1, 50.0, 1e5, 1e12, 1e20, 1e30]
    )
    for shrink in (rmt.clean_value, *SHRINKERS.values()):
        got, want = shrink(y, aspect), shrink(y.double(), aspect)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=3e-4, atol=1e-6)
        assert torch.isfinite(got).all()
        assert (got <= y * (1 + 1e-6)).all() and (got >= 0).all()
    for got in rmt.overlaps(y, aspect):
        assert torch.isfinite(got).all() and ((got >= 0) & (got <= 1)).all()
        assert float(got[-1]) == 1


@functools.cache
def spiked(shape, theta, rounds=6):
    """Mean top singular value (units of scale) and squared cosines (left, right) of one spike."""
    rng = np.random.default_rng([*shape, int(theta * 1000)])
    scale = 0.3 * math.sqrt(max(shape))
    rows = []
    for _ in range(rounds):
        u, v = (x / np.linalg.norm(x) for x in map(rng.standard_normal, shape))
        noisy = theta * scale * np.outer(u, v) + 0.3 * rng.standard_normal(shape)
        left, s, right = np.linalg.svd(noisy, full_matrices=False)
        rows.append((s[0] / scale, (left[:, 0] @ u) ** 2, (right[0] @ v) ** 2))
    return np.mean(rows, axis=0)


@pytest.mark.parametrize("shape", [(150, 900), (900, 150), (400, 400)])
@pytest.mark.parametrize("theta", [1.15, 1.5, 3.0])
def test_visible_value_and_overlaps_by_simulation(shape, theta):
    aspect = min(shape) / max(shape)
    y, left, right = spiked(shape, theta)
    assert float(rmt.visible_value(t64(theta), aspect)) == pytest.approx(y, rel=0.02)
    short, long = (float(c) for c in rmt.overlaps(t64(theta), aspect))
    if shape[0] > shape[1]:
        left, right = right, left
    assert (short, long) == pytest.approx((left, right), abs=0.05 if theta > 1.2 else 0.15)
    if shape[0] != shape[1]:
        assert short > long + 0.02  # the shorter vector is estimated better
        assert left > right + 0.02


# --- shrinkers ----------------------------------------------------------------------------------


def asymptotic_loss(eta, theta, aspect, loss):
    """Loss of the estimate eta of a clean spike along the noisy vectors, as a 2 x 2 problem."""
    short, long = (float(c) for c in rmt.overlaps(t64(theta), aspect))
    c, d = math.sqrt(short), math.sqrt(long)
    clean = np.array([[theta, 0], [0, 0]])
    outer = np.outer([c, math.sqrt(1 - short)], [d, math.sqrt(1 - long)])
    s = np.linalg.svd(clean - eta * outer, compute_uv=False)
    return {"frobenius": (s**2).sum(), "operator": s[0], "nuclear": s.sum()}[loss]


def test_shrinkers_minimise_their_asymptotic_loss():
    for case in itertools.product((1.0, 0.4, 0.05), (1.05, 1.3, 2.0, 6.0), SHRINKERS):
        aspect, factor, loss = case
        theta = factor * aspect**0.25
        y = rmt.visible_value(t64(theta), aspect)
        eta = float(SHRINKERS[loss](y, aspect))
        if loss == "operator" and aspect < 1:  # theta minimises this loss for a square matrix only
            assert eta == pytest.approx(theta, rel=1e-6), case
            continue
        cost = functools.partial(asymptotic_loss, theta=theta, aspect=aspect, loss=loss)
        grid = np.linspace(0, 1.5 * theta + 1, 400)
        start = grid[np.argmin([cost(e) for e in grid])]
        step = grid[1] - grid[0]
        best = optimize.minimize_scalar(
            cost,
            bounds=(max(start - step, 0), start + step),
            method="bounded",
            options={"xatol": 1e-10},
        )
        lowest = min(best.fun, cost(0.0))
        assert cost(eta) <= lowest + 1e-7 * theta, case
        want = best.x if best.fun <= lowest else 0
        assert eta == pytest.approx(want, abs=2e-4 * theta), case


def losses_by_simulation(shape):
    """Simulate total losses of shrunk spiked matrices: loss name -> shrinker name -> loss."""
    rng = np.random.default_rng(5)
    aspect, scale = rmt.aspect_and_scale(shape, 1.0)
    totals = {loss: dict.fromkeys(SHRINKERS, 0.0) for loss in SHRINKERS}
    for _ in range(4):
        u, v = (np.linalg.qr(rng.standard_normal((side, 3)))[0] for side in shape)
        clean = (u * np.array([1.35, 1.6, 2.0]) * aspect**0.25 * scale) @ v.T
        left, s, right = np.linalg.svd(clean + rng.standard_normal(shape), full_matrices=False)
        for name, shrink in SHRINKERS.items():
            # only the spikes: noise is above the edge now and then
            new = scale * shrink(torch.from_numpy(s[:3] / scale), aspect).numpy()
            error = np.linalg.svd((left[:, :3] * new) @ right[:3] - clean, compute_uv=False)
            totals["frobenius"][name] += (error**2).sum()
            totals["operator"][name] += error[0]
            totals["nuclear"][name] += error.sum()
    return totals


def test_each_shrinker_wins_at_its_own_loss():
    for shape in ((200, 400), (400, 200)):
        for loss, totals in losses_by_simulation(shape).items():
            assert min(totals, key=totals.get) == loss, (shape, loss, totals)


def test_hard_threshold():
    """At lambda*, keeping and removing a spike give the same loss (Gavish & Donoho 2014)."""
    assert rmt.hard_threshold(1.0) == pytest.approx(4 / math.sqrt(3), rel=1e-15)
    for aspect in (1.0, 0.5, 0.1, 1e-3):
        level = rmt.hard_threshold(aspect)
        theta = float(rmt.clean_value(t64(level), aspect))
        cost = asymptotic_loss(level, theta, aspect, "frobenius")
        assert cost == pytest.approx(theta**2, rel=1e-9), aspect
        root = math.sqrt(aspect**2 + 14 * aspect + 1)
        want = math.sqrt(2 * (aspect + 1) + 8 * aspect / (aspect + 1 + root))
        assert level == pytest.approx(want, rel=1e-15), aspect


# --- bad input --------------------------------------------------------------------------------


def test_bad_input():
    for call, name in (
        (lambda: rmt.bulk_edge((5,), 1.0), "shape"),
        (lambda: rmt.bulk_edge(5, 1.0), "shape"),
        (lambda: rmt.bulk_edge((0, 5), 1.0), "shape"),
        (lambda: rmt.bulk_edge((2.5, 5), 1.0), "shape"),
        (lambda: rmt.bulk_edge((4, 5), -1.0), "noise_std"),
        (lambda: rmt.bulk_edge((4, 5), math.nan), "noise_std"),
        (lambda: rmt.bulk_edge((4, 5), "1"), "noise_std"),
        (lambda: rmt.bulk_edge((4, 5), 1.0, false_spike_rate=0), "false_spike_rate"),
        (lambda: rmt.bulk_edge((4, 5), 1.0, false_spike_rate=1), "false_spike_rate"),
        (lambda: rmt.aspect_and_scale((4, 5), 0.0), "noise_std"),
        (lambda: rmt.marchenko_pastur_pdf(1.0, (4, 5), 0.0), "noise_std"),
        (lambda: rmt.marchenko_pastur_pdf(1.0, (0, 5), 1.0), "shape"),
        (lambda: rmt.marchenko_pastur_quantiles(0, (4, 5), 1.0), "count"),
        (lambda: rmt.marchenko_pastur_quantiles(3, (4, 5), -1.0), "noise_std"),
    ):
        refused(f"^{name} must be", call)
