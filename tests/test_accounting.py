"""Bounds on epsilon, compared with exact profiles by mpmath and with dp-accounting."""

import json
import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
from scipy import optimize

from lowrank_dp import accounting, privacy_loss
from lowrank_dp.mechanism import GaussianMechanism
from tests.tasks import case

REFERENCE = json.loads((Path(__file__).parent / "data" / "accounting.json").read_text())


def epsilon(sigma, rate, steps, delta):
    return GaussianMechanism(sigma, 1.0, rate).epsilon(steps, delta)


def exact_step(rate, sigma, delta, sign):
    """Epsilon of one sampled step from its two distributions, by mpmath."""
    with mpmath.workdps(45):

        def spent(e):
            growth = mpmath.expm1(sign * e) + rate
            if growth <= 0:
                return mpmath.mpf(0)
            x = sigma * mpmath.log(growth / rate) + mpmath.mpf(1) / 2 / sigma
            base, moved = mpmath.ncdf(-sign * x), mpmath.ncdf(-sign * (x - 1 / sigma))
            mixed = (1 - rate) * base + rate * moved
            return mixed - mpmath.exp(e) * base if sign > 0 else base - mpmath.exp(e) * mixed

        low, high = mpmath.mpf(0), mpmath.mpf(300)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(middle) > delta else (low, middle)
        return float(high)


def test_stored_references():
    """Epsilon is never below the exact value, and at most 5% above the best reference."""
    assert len(REFERENCE) == 60
    for row in REFERENCE:
        setting = (row["sigma"], row["rate"], row["steps"], row["delta"])
        found = epsilon(*setting)
        if "exact" in row:
            assert row["exact"] <= found <= row["exact"] * (1 + 1e-6) + 1e-12, row
            continue
        best = min(row["rdp"], row.get("pld", math.inf))
        assert found <= 1.05 * best, (found, row)
        if "pld" in row:  # the discretised reference is up to 1.5% too large
            assert found >= 0.985 * row["pld"], (found, row)


def test_lines_of_the_table_of_faults():
    assert epsilon(754.8, 0.01, 100_000, 1e-5) == pytest.approx(0.0103, abs=1e-4)
    assert epsilon(1.0, 1e-4, 10**6, 1e-5) <= 0.482  # a PLD with a fine interval gives .459
    assert epsilon(10.0, 1.0, 1, 1e-18) == pytest.approx(0.829, abs=1e-3)
    assert epsilon(1000.0, 0.01, 1000, 1e-6) == pytest.approx(0.00074, abs=1e-5)
    for target, delta, steps, rate in ((0.1, 1e-5, 100_000, 0.01), (1e-3, 1e-6, 1000, 0.01)):
        found = GaussianMechanism.calibrate(target, delta, steps, rate)
        assert 0.999 * target <= found.epsilon(steps, delta) <= target
    assert GaussianMechanism.calibrate(0.1, 1e-5, 100_000, 0.01).noise_multiplier < 98


def test_one_step_is_exact_in_both_directions():
    """Epsilon is exact down to delta = 1e-20.

    A difference of numbers near 1 could not resolve so small a delta.
    """
    for rate, sigma in ((0.1, 1.0), (1e-4, 0.4), (0.9, 5.0)):
        for delta in (1e-4, 1e-12, 1e-20):
            exact = max(exact_step(rate, sigma, delta, sign) for sign in (1, -1))
            found = epsilon(sigma, rate, 1, delta)
            assert exact * (1 - 1e-12) - 1e-12 <= found, (rate, sigma, delta)
            assert found <= exact * (1 + 1e-4) + 1e-9, (rate, sigma, delta)


def test_rounding_never_puts_epsilon_below_the_truth():
    """A divergence that rounding error hides gives no bound, and does not count as 0."""
    for sigma, rate, delta in ((100.0, 1e-12, 1e-15), (100.0, 1e-12, 1e-30), (100.0, 1e-6, 1e-150)):
        exact = max(exact_step(rate, sigma, delta, sign) for sign in (1, -1))
        assert 0 < exact <= epsilon(sigma, rate, 1, delta), (sigma, rate, delta)
    # at one order the divergence is hidden and at another it is not: the second one still counts
    assert accounting._divergences(10.0, 1e-9, 0)[0] == math.inf
    assert accounting.renyi_epsilon(10.0, 1e-9, 1000, 1e-12) < 0.01


def test_a_tail_far_from_the_centre_of_the_tilted_losses_is_not_lost():
    """At a small rate and delta the loss has a heavy tail, which the transform can't resolve."""
    for sigma, rate, delta in (
        (2.5781879908272143, 2.198167195824941e-05, 7.587046790566805e-56),
        (1.92211, 1.13779e-05, 1.509e-39),
        (1.6810910753900852, 1.851121978389598e-4, 5.1496037026807525e-40),
        (2.578, 2.2e-5, 1e-70),
    ):
        exact = max(exact_step(rate, sigma, delta, sign) for sign in (1, -1))
        assert exact <= epsilon(sigma, rate, 1, delta) <= 1.1 * exact, (sigma, rate, delta)
    for sigma, rate, delta, steps in (
        (1.8143366798434728, 0.000335822964833593, 1.8612448112467768e-43, 2),
        (1.2789892138757566, 3.640734259413379e-05, 1.4748656702097721e-57, 3),
        (0.8202761146484964, 4.1887662111869943e-05, 3.0097541203777437e-18, 2),
    ):
        reach = math.sqrt(2 * (math.log(steps / delta) + 7))
        lowest, one, infinite = privacy_loss._one_step(sigma, rate, 1e-3, reach, 1)
        whole = one  # sums of products of probabilities alone keep their relative precision
        for _ in range(steps - 1):
            whole = np.convolve(whole, one)
        losses = 1e-3 * (steps * lowest + np.arange(len(whole)))
        low, high = 0.0, float(losses[-1])
        for _ in range(50):
            middle = (low + high) / 2
            spent = float((whole * -np.expm1(np.minimum(middle - losses, 0.0))).sum())
            low, high = (middle, high) if spent > delta - steps * infinite else (low, middle)
        found = privacy_loss.loss_epsilon(sigma, rate, steps, delta, 1e-3)
        assert high * (1 - 1e-9) <= found <= 1.1 * high, (sigma, rate, delta, steps)


def test_composed_losses_are_exact_where_nothing_is_sampled_out():
    """At a rate of nearly 1 the PLD is never below the exact epsilon, and at most 3% above."""
    for sigma, steps in ((1.0, 1), (50.0, 10**4), (300.0, 10**6), (0.5, 3)):
        for delta in (1e-3, 1e-12, 1e-20):
            exact = accounting.gaussian_epsilon(math.sqrt(steps) / sigma, delta)
            found = privacy_loss.loss_epsilon(sigma, 1 - 1e-13, steps, delta, 1e-3)
            assert exact * (1 - 1e-8) <= found <= exact * 1.03, (sigma, steps, delta)


def exact_composed(rate, sigma, steps, delta, sign, near):
    """Epsilon of sampled steps by a contour integral, without a discretised loss.

    With K(z) = log E exp(z loss), delta(epsilon) is the integral of exp(steps K(z) - z epsilon) /
    (2 pi i z (z + 1)) along c + i t for any c > 0, here the saddle point. Both integrals are by the
    trapezoid rule, which for analytic functions is exact to rounding.
    """

    def log_moment(z):
        power = (z + 1 if sign > 0 else -z)[:, None]
        high = max(0.0, float(power.real.max())) + 14 * sigma
        x = np.linspace(-14 * sigma, high, int(12 * (high + 14 * sigma) / min(sigma, sigma**2)))
        ratio = (x - 0.5) / sigma**2
        loss = np.logaddexp(math.log1p(-rate), math.log(rate) + ratio)
        loss = np.where(ratio < 20, np.log1p(rate * np.expm1(np.minimum(ratio, 20))), loss)
        log_density = (
            math.log((x[1] - x[0]) / sigma / math.sqrt(2 * math.pi)) - (x / sigma) ** 2 / 2
        )
        top = (log_density + power.real * loss).max(1)
        if top.max() < 0:  # the mean of expm1 keeps its relative precision
            return np.log1p((np.exp(log_density) * np.expm1(power * loss)).sum(1))
        return top + np.log(np.exp(log_density + power * loss - top[:, None]).sum(1))

    def exponent(log_c):
        c = math.exp(log_c)
        return steps * log_moment(np.array([c + 0j])).real[0] - c * near - log_c - math.log1p(c)

    c = math.exp(optimize.minimize_scalar(exponent, bounds=(-5, 10), method="bounded").x)
    three = log_moment(c * np.array([0.99, 1, 1.01]) + 0j).real
    width = (steps * (three[0] - 2 * three[1] + three[2]) / (c / 100) ** 2 + c**-2) ** -0.5
    step = min(width / 3, c / 5)
    t = step * np.arange(int(200 * width / step))
    z = c + 1j * t
    moments = np.concatenate([log_moment(part) for part in np.array_split(z, len(z) // 20 + 1)])
    curve = np.exp(steps * (moments - three[1])) / (z * (z + 1))
    curve[0] /= 2
    assert abs(curve[-1]) < 1e-8 * abs(curve[0]), "the integral is cut off"

    def excess(epsilon):
        value = (curve * np.exp(-1j * t * epsilon)).sum().real * step / math.pi
        if value <= 0:  # rounding of a sum far below its terms: delta here is far below ``delta``
            return -math.inf
        return math.log(value) + steps * three[1] - c * epsilon - math.log(delta)

    if excess(0.9 * near) < 0:  # the other direction decides
        return 0.9 * near
    return optimize.brentq(excess, 0.9 * near, 1.05 * near)


def test_composed_steps_against_the_exact_integral():
    """Epsilon is at least exact and at most 1% above, in both directions, down to delta 1e-20."""
    for rate, sigma, steps, delta in (
        (0.01, 1.0, 2000, 1e-5),
        (0.01, 1.0, 2000, 1e-15),
        (0.002, 0.8, 20_000, 1e-20),
        (0.05, 5.0, 10**6, 1e-8),
        (0.5, 50.0, 300, 1e-12),
        (0.95, 3.0, 100, 1e-20),
        (1e-4, 100.0, 10**6, 1e-10),
        (0.003, 20.0, 10_000, 1e-3),
        (0.02, 0.6, 1000, 1e-6),
    ):
        found = epsilon(sigma, rate, steps, delta)
        exact = max(exact_composed(rate, sigma, steps, delta, sign, found) for sign in (1, -1))
        assert exact * (1 - 1e-7) <= found <= 1.01 * exact, (rate, sigma, steps, delta, exact)


def all_divergences(sigma, rate):
    starts = range(0, len(accounting._ORDERS), accounting._BLOCK)
    return np.concatenate([accounting._divergences(sigma, rate, start) for start in starts])


def test_renyi_divergences_at_integers_are_binomial_sums():
    for sigma, rate in ((1.0, 0.01), (0.4, 1e-4), (700.0, 0.01), (5.0, 0.9), (1000.0, 1e-6)):
        found = dict(zip(accounting._ORDERS, all_divergences(sigma, rate), strict=True))
        for order in (2.0, 3.0, 10.0, 40.0):
            with mpmath.workdps(40):
                moment = sum(
                    mpmath.binomial(order, k)
                    * mpmath.mpf(rate) ** k
                    * (1 - mpmath.mpf(rate)) ** (order - k)
                    * mpmath.exp(mpmath.mpf(k * k - k) / 2 / mpmath.mpf(sigma) ** 2)
                    for k in range(int(order) + 1)
                )
                exact = float(mpmath.log(moment) / (order - 1))
            assert found[order] == pytest.approx(exact, rel=1e-5 if rate < 1e-5 else 1e-8, abs=0), (
                sigma,
                rate,
                order,
            )


def divergences_one_by_one(sigma, rate):
    """Renyi divergences by the trapezoid rule, on a grid per order, up to 200,000 grid points."""
    interval, found = min(sigma / 4, sigma**2 / 4), []
    for order in accounting._ORDERS:
        low, high = -40 * sigma, order + 40 * sigma
        if (high - low) / interval > 200_000:
            break
        x = np.arange(low, high, interval)
        log_ratio = (x - 0.5) / sigma**2
        loss = np.logaddexp(math.log1p(-rate), math.log(rate) + log_ratio)
        small = log_ratio < 30
        loss[small] = np.log1p(rate * np.expm1(log_ratio[small]))
        power = order * loss
        growth = np.maximum(power, 0) + np.log(-np.expm1(-np.abs(power)) + 1e-300)
        logs = -(x**2) / 2 / sigma**2 - math.log(sigma * math.sqrt(2 * math.pi) / interval) + growth
        total = (np.sign(power) * np.exp(logs - logs.max())).sum()
        moment = logs.max() + math.log(total) if total > 0 else -math.inf
        found.append(np.logaddexp(0, moment) / (order - 1))
    return np.array(found)


def test_renyi_epsilon_is_the_smallest_over_all_orders():
    """The search stops early, and returns the result of a search over all orders."""
    stopped = 0
    for sigma, rate, steps, delta in (
        (0.27, 0.004, 2, 1e-4),
        (0.6, 0.02, 1000, 1e-6),
        (1.0, 0.01, 1, 1e-12),
        (1.0, 1e-4, 10**6, 1e-5),
        (5.0, 0.9, 10, 0.1),
        (30.0, 0.3, 10, 1e-5),
        (20.0, 0.9, 2, 1e-4),
        (700.0, 0.01, 100, 1e-8),
        (0.05, 1e-3, 5, 1e-6),
    ):
        divergences = steps * divergences_one_by_one(sigma, rate)
        epsilons = [
            0.0
            if delta**2 + math.expm1(-divergence) > 0
            else divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
            for order, divergence in zip(accounting._ORDERS, divergences, strict=False)
        ]
        found = accounting.renyi_epsilon(sigma, rate, steps, delta)
        assert found == pytest.approx(max(0.0, min(epsilons)) * (1 + 1e-9), rel=1e-13, abs=0), (
            sigma,
            rate,
            steps,
            delta,
        )
        stopped += len(epsilons) - int(np.argmin(epsilons)) > 2 * accounting._BLOCK
    assert stopped >= 4  # settings in which the smallest epsilon is not in the last blocks


@pytest.mark.slow
def test_monotone_in_everything():
    """Epsilon is monotone in each argument, up to 1%, the error of the discretisation."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        sigma, rate = 10 ** rng.uniform(-0.3, 2), 10 ** rng.uniform(-4, 0)
        steps, delta = int(10 ** rng.uniform(0, 4)), 10 ** rng.uniform(-15, -4)
        here = epsilon(sigma, rate, steps, delta)
        for more in (
            (sigma / 1.1, rate, steps, delta),
            (sigma, min(1, 1.1 * rate), steps, delta),
            (sigma, rate, 2 * steps, delta),
            (sigma, rate, steps, delta / 10),
        ):
            assert epsilon(*more) >= 0.99 * here, ((sigma, rate, steps, delta), more)


@pytest.mark.slow
def test_calibrated_noise_is_the_smallest_and_takes_no_many_evaluations(monkeypatch):
    calls, bound = [], accounting.bound
    monkeypatch.setattr(accounting, "bound", lambda *a: calls.append(a) or bound(*a))
    for target, delta, steps, rate in (
        (8, 1e-5, 500, 0.0304),
        (0.01, 1e-20, 10**5, 1e-4),
        (10, 1e-8, 10**5, 1e-5),
        (1e-3, 1e-5, 10**6, 1.0),
    ):
        calls.clear()
        sigma = GaussianMechanism.calibrate(target, delta, steps, rate).noise_multiplier
        assert len(calls) <= 25
        assert epsilon(sigma, rate, steps, delta) <= target
        assert epsilon(sigma - 2e-4 * max(1, sigma), rate, steps, delta) > target


def test_memory_does_not_grow_with_the_number_of_steps(monkeypatch):
    """Against the central-limit epsilon, which is exact in the limit of many steps."""
    monkeypatch.setattr(privacy_loss.fft, "rfft", None)  # takes gigabytes here
    for sigma, rate, steps in ((20.0, 1e-3, 10**9), (100.0, 1e-3, 10**10)):
        found = accounting.bound(sigma, rate, steps, 1e-5)
        mu = rate * math.sqrt(steps * math.expm1(sigma**-2))
        limit = accounting.gaussian_epsilon(mu, 1e-5)
        with case(sigma, rate, steps):
            assert found.accountant == "RDP"
            assert limit < found.epsilon < 1.1 * limit


def test_a_statement_names_the_bound():
    assert "accountant: PLD, interval 0.001 (" in GaussianMechanism(1.0, 1.0, 0.1).statement(
        10, 1e-5
    )
    assert "accountant: exact" in GaussianMechanism(1.0, 1.0, 1.0).statement(10, 1e-5)
