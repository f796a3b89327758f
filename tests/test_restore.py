"""Every scheme against naive float64 formulas; the fast path against the exact path."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_dp.restore import (
    EDGE_SCHEMES,
    NON_PRIVATE_SCHEMES,
    SCHEMES,
    GradientRestorer,
    exponential_average,
    oracle_values,
    require_noise,
    restore,
    restore_gradients,
    restore_with_report,
    restored_values,
)
from lowrank_dp.restore import names as light
from lowrank_dp.restore.gradients import _batches
from lowrank_dp.spectrum.random_matrix import NoiseModel
from tests.refusals import refused
from tests.tasks import seeded as generator

SHAPES = [(60, 90), (90, 60), (70, 70), (8, 384), (384, 8), (1, 50), (50, 1)]
CASES = [
    ("none", {}),
    ("hard", {}),
    ("hard", {"threshold": "edge"}),
    ("soft", {}),
    ("soft", {"threshold": "optimal"}),
    ("truncate", {"k": 1}),
    ("optimal", {}),
    ("optimal", {"loss": "operator"}),
    ("optimal", {"loss": "nuclear"}),
    ("denoise", {}),
    ("denoise", {"norm_correction": False}),
    ("denoise", {"kappa": 1.5}),
    ("partial", {}),
    ("partial", {"alpha": 0.8}),
    ("partial", {"target": "power-law"}),
    ("partial", {"target": "exponential", "alpha": 0.3}),
    ("power", {}),
    ("power", {"p": 5}),
    ("power", {"p": 2}),
    ("power", {"p": 1.5}),
    ("polar", {}),
]


def spiked(shape, factors, noise_std=0.7, seed=0, dtype=torch.float64):
    """``(noisy, clean)`` with spikes at ``factors`` times the transition (mn)^(1/4) noise_std."""
    g = generator(seed)
    k = len(factors)
    u, v = (torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0] for n in shape)
    values = torch.tensor(factors, dtype=torch.float64) * noise_std * math.prod(shape) ** 0.25
    clean = (u * values) @ v.T
    noise = noise_std * torch.randn(shape, generator=g, dtype=torch.float64)
    return (clean + noise).to(dtype), clean.to(dtype)


def cosine(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / a.norm() / b.norm())


# --- the oracle: formulas of the papers, one float at a time ------------------------------------


def naive_values(
    s,
    shape,
    noise_std,
    name,
    *,
    threshold=None,
    k=None,
    loss="frobenius",
    kappa=1.0,
    norm_correction=True,
    alpha=0.5,
    target="rmt",
    p=3,
):
    m, n = sorted(shape)
    b, scale = m / n, noise_std * math.sqrt(n)
    edge = noise_std * (math.sqrt(m) + math.sqrt(n))
    lam = scale * math.sqrt(2 * (b + 1) + 8 * b / (b + 1 + math.sqrt(b * b + 14 * b + 1)))

    def shrink(value, loss):
        y = value / scale
        if value <= edge:
            return 0.0
        root = math.sqrt((y * y - b - 1) ** 2 - 4 * b)
        theta = math.sqrt((y * y - b - 1 + root) / 2)
        return (
            scale
            * {
                "frobenius": root / y,
                "operator": theta,
                "nuclear": max(0, (theta**4 - b - math.sqrt(b) * theta * y) / (theta**2 * y)),
            }[loss]
        )

    if name == "none":
        return s
    if name in ("hard", "soft"):
        level = {"optimal": lam, "edge": edge}[
            threshold or ("optimal" if name == "hard" else "edge")
        ]
        return np.array([(v if name == "hard" else v - level) if v > level else 0 for v in s])
    if name == "truncate":
        return np.where(np.arange(len(s)) < k, s, 0)
    if name == "optimal":
        return np.array([shrink(v, loss) for v in s])
    if name == "denoise":
        if s[0] <= kappa * edge:
            return s
        new = np.array([shrink(v, "frobenius") for v in s])
        return new * np.linalg.norm(s) / np.linalg.norm(new) if norm_correction else new
    if name == "partial":
        goal = np.array([shrink(v, "operator") for v in s])
        seen = np.flatnonzero(goal)
        if target != "rmt" and len(seen) >= 2:
            x = np.arange(1.0, len(s) + 1)
            x = np.log(x) if target == "power-law" else x
            slope, offset = np.polyfit(x[seen], np.log(goal[seen]), 1)
            goal = np.exp(offset + slope * x)
        return (1 - alpha) * s + alpha * goal
    if name == "polar":
        theta = np.array([shrink(v, "operator") for v in s]) / scale
        seen = theta[theta > 0]
        left = (seen**4 - b) / (seen**4 + b * seen**2)  # squared cosines: Gavish & Donoho 2017
        right = (seen**4 - b) / (seen**4 + seen**2)
        return np.pad(edge * np.sqrt(left * right), (0, len(s) - len(seen)))
    assert name == "power"
    return s**p / np.linalg.norm(s**p) * np.linalg.norm(s)


def naive(noisy, noise_std, name, below="keep", **options):
    """Matrix restored by numpy's SVD in float64."""
    x = noisy.double().numpy()
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    edge = noise_std * (math.sqrt(x.shape[0]) + math.sqrt(x.shape[1]))
    if name in EDGE_SCHEMES and s[0] <= edge * max(1, options.get("kappa", 1)):
        return x if below == "keep" else 0 * x
    return (u * naive_values(s, x.shape, noise_std, name, **options)) @ vh


def test_schemes_by_their_formulas():
    """Both methods are tested; on these small matrices the fast path uses the exact path."""
    for shape in SHAPES:
        factors = [4.0, 2.0, 1.3, 1.1][: min(shape)]
        for seed, some in enumerate([factors, [20.0], [0.5]]):
            noisy, _ = spiked(shape, some, seed=seed)
            norm = float(noisy.norm())
            for name, options in CASES:
                want = naive(noisy, 0.7, name, **options)
                for method in ("exact", "fast"):
                    case = str((shape, some, name, options, method))
                    got = restore(noisy, 0.7, name, method=method, **options)
                    np.testing.assert_allclose(got, want, atol=1e-9 * norm, err_msg=case)
                    single = restore(noisy.float(), 0.7, name, method=method, **options)
                    assert single.dtype == torch.float32, case
                    np.testing.assert_allclose(single, want, atol=2e-4 * norm, err_msg=case)


def test_values_are_those_of_the_formula():
    for shape in ((60, 90), (90, 60)):
        both = [spiked(shape, factors)[0] for factors in ([4.0, 2.0, 1.3], [0.5])]
        s = torch.linalg.svdvals(torch.stack(both))
        vectors = [np.linalg.svd(noisy.numpy(), full_matrices=False) for noisy in both]
        for (name, options), below in itertools.product(CASES, ("keep", "zero")):
            got = restored_values(s, shape, 0.7, name, below=below, **options)
            for noisy, (u, _, vh), new in zip(both, vectors, got, strict=True):
                np.testing.assert_allclose(
                    (u * new.numpy()) @ vh,
                    naive(noisy, 0.7, name, below=below, **options),
                    atol=1e-9 * float(noisy.norm()),
                    err_msg=str((shape, name, options, below)),
                )


def test_the_light_names_are_those_of_the_schemes():
    assert light.SCHEME_NAMES == tuple(SCHEMES)
    assert (
        light.EDGE_SCHEMES == EDGE_SCHEMES == (*"hard soft optimal denoise partial polar".split(),)
    )
    assert light.NON_PRIVATE_SCHEMES == NON_PRIVATE_SCHEMES == ("oracle",)
    for name, scheme in SCHEMES.items():
        assert scheme.new_values.__name__ == name


def test_pure_functions_of_the_values():
    s = torch.linalg.svdvals(spiked((40, 70), [5.0, 2.0, 1.2])[0])
    copy, noise = s.clone(), NoiseModel((40, 70), 0.7)
    for name, options in CASES:
        case, new_values = str((name, options)), SCHEMES[name].new_values
        got = new_values(s, noise, **options)
        want = naive_values(s.numpy(), (40, 70), 0.7, name, **options)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9, err_msg=case)
        assert torch.equal(s, copy), case
        batch = new_values(torch.stack([s, 2 * s]), noise, **options)
        np.testing.assert_allclose(batch[0], got, rtol=1e-7, atol=1e-7, err_msg=case)


@pytest.mark.parametrize("unit", [1e-25, 1.0, 1e25])
def test_restored_values_are_those_of_the_restored_matrix(unit):
    """Also where float32 cannot hold the squares of the values."""
    s = torch.tensor([[9.0, 3.0, 1.0], [4.0, 3.5, 2.0]])
    own = torch.tensor([[5.0, 1.0, 0.5], [3.0, 2.0, 1.0]])
    for name, options in [*CASES, ("oracle", {"values": own * unit})]:
        new = restored_values(s * unit, (3, 5), unit, name, **options) / unit
        noisy = torch.zeros(2, 3, 5)
        noisy[:, range(3), range(3)] = s * unit
        restored = restore(noisy, unit, name, method="exact", **options)[:, range(3), range(3)]
        torch.testing.assert_close(new, restored / unit, rtol=1e-5, atol=1e-5, msg=name)
        assert (new != 0).any(), name


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_oracle(shape):
    noisy, clean = spiked(shape, [1.5, 1.2, 0.8])
    u, _, vh = np.linalg.svd(noisy.numpy(), full_matrices=False)
    weights = np.array([u[:, i] @ clean.numpy() @ vh[i] for i in range(60)])
    np.testing.assert_allclose(oracle_values(noisy, clean), weights, atol=1e-9)
    profile = oracle_values(noisy, clean, kind="profile")
    np.testing.assert_allclose(profile, np.linalg.svd(clean.numpy(), compute_uv=False), atol=1e-9)
    assert oracle_values(noisy.float(), clean).dtype == torch.float32
    best = restore(noisy, 0.7, "oracle", values=torch.from_numpy(weights))
    np.testing.assert_allclose(best, (u * weights) @ vh, atol=1e-9)
    # no scheme on the same singular vectors comes closer to the clean matrix
    for name, options in CASES:
        other = restore(noisy, 0.7, name, method="exact", **options)
        assert (best - clean).norm() < (other - clean).norm()
        if other.any():
            assert cosine(best, clean) > cosine(other, clean)
    batch = torch.stack([noisy, -2 * noisy])
    values = oracle_values(batch, torch.stack([clean, clean]))
    both = restore(batch, 0.7, "oracle", values=values)
    torch.testing.assert_close(both[0], best)
    torch.testing.assert_close(both[1], best)
    assert NON_PRIVATE_SCHEMES == ("oracle",)


def test_public_profile_as_target():
    noisy, _ = spiked((40, 60), [3.0, 2.0])
    profile = torch.linspace(5, 0, 40) ** 2
    x = noisy.numpy()
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    clean = naive_values(s, x.shape, 0.7, "optimal", loss="operator")
    goal = profile.numpy() / np.linalg.norm(profile.numpy()) * np.linalg.norm(clean)
    for scale in (1.0, 1000.0, 1e-40, 1e300):
        target = scale * profile.double()
        got = restore(noisy, 0.7, "partial", target=target, alpha=0.4)
        np.testing.assert_allclose(got, (u * (0.6 * s + 0.4 * goal)) @ vh, atol=1e-5)


# --- what each scheme promises ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "fast"])
@pytest.mark.parametrize("shape", [(200, 600), (600, 200)])
def test_promises(shape, method):
    noisy, clean = spiked(shape, [4.0, 2.5, 2.0], dtype=torch.float32)
    run = {"method": method}
    norm = noisy.norm()

    def close(a, b, rtol=2e-3):
        assert float((a - b).norm()) <= rtol * float(b.norm())

    close(restore(noisy, 0.7, "denoise", **run).norm(), norm, 1e-5)
    assert restore(noisy, 0.7, "denoise", norm_correction=False, **run).norm() < 0.9 * norm
    for target in ("rmt", "power-law", "exponential"):
        close(restore(noisy, 0.7, "partial", alpha=0, target=target, **run), noisy, 1e-5)
    close(
        restore(noisy, 0.7, "partial", alpha=1, **run),
        restore(noisy, 0.7, "optimal", loss="operator", method="exact"),
        0.02,
    )
    close(restore(noisy, 0.7, "power", p=1, **run), noisy, 1e-5)
    for p in (2, 3, 4, 5, 7):
        restored = restore(noisy, 0.7, "power", p=p, **run)
        close(restored.norm(), norm, 1e-5)
        close(restored, torch.from_numpy(naive(noisy, 0.7, "power", p=p)), 1e-4)
    for k in (1, 2, 5, 24):
        got = restore(noisy, 0.0, "truncate", k=k, **run)
        assert int(torch.linalg.matrix_rank(got.double(), rtol=1e-5)) == k
        best = torch.from_numpy(naive(noisy, 0.7, "truncate", k=k))
        # no rank-k matrix is closer to noisy; the fast path comes within half a per cent
        assert float((got - noisy).norm()) <= 1.005 * float((best - noisy).norm())
    assert torch.equal(restore(noisy, 0.7, "none", **run), noisy)
    error = float((restore(noisy, 0.7, **run) - clean).norm())
    for name, options in (
        ("hard", {}),
        ("soft", {}),
        ("truncate", {"k": 8}),
        ("none", {}),
        ("optimal", {"loss": "nuclear"}),
        ("partial", {}),
    ):
        assert error < float((restore(noisy, 0.7, name, **options, **run) - clean).norm())


def test_kappa_moves_the_trigger():
    noisy, _ = spiked((150, 300), [1.7])
    top = float(torch.linalg.svdvals(noisy)[0])
    edge = 0.7 * (math.sqrt(150) + math.sqrt(300))
    for method in ("exact", "fast"):
        run = {"scheme": "denoise", "method": method}
        restored = restore(noisy, 0.7, **run)
        assert not torch.equal(restored, noisy)
        torch.testing.assert_close(restore(noisy, 0.7, kappa=0.5, **run), restored)
        torch.testing.assert_close(restore(noisy, 0.7, kappa=0.98 * top / edge, **run), restored)
        assert torch.equal(restore(noisy, 0.7, kappa=1.02 * top / edge, **run), noisy)
        assert not restore(noisy, 0.7, kappa=1.02 * top / edge, below="zero", **run).any()


def test_values_between_the_edge_and_the_threshold_are_zeroed():
    """A value above the edge and below lambda* is removed, with both methods."""
    noise = torch.randn(200, 300, generator=generator(0))
    u, s, vh = torch.linalg.svd(noise, full_matrices=False)
    s[0] = 34.0  # edge 31.5, lambda* 36.4
    noisy = (u * s) @ vh
    for method in ("exact", "fast"):
        restored, (report,) = restore_with_report(noisy, 1.0, "hard", method=method)
        assert not restored.any() and report.action == "restored" and report.num_above_edge == 1


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_false_spike_rate(method):
    """Pure noise passes the edge in about one draw of eight, and the level of 1% in one of 100."""
    g = generator(7)
    acted = np.zeros(2)
    for _ in range(150):
        noise = torch.randn(40, 60, generator=g)
        acted += [
            not torch.equal(restore(noise, 1.0, method=method, false_spike_rate=rate), noise)
            for rate in (None, 0.01)
        ]
    assert 8 <= acted[0] <= 32 and acted[1] <= 6
    u, s, vh = torch.linalg.svd(torch.randn(200, 300, generator=g), full_matrices=False)
    s[:2] = torch.tensor([60.0, 31.6])  # the second between the edge 31.46 and the 1% level 31.8
    noisy = (u * s) @ vh
    one = restore(noisy, 1.0, "hard", threshold="edge", false_spike_rate=0.01, method=method)
    two = restore(noisy, 1.0, "hard", threshold="edge", method="exact")
    assert [int(torch.linalg.matrix_rank(x, rtol=1e-4)) for x in (one, two)] == [1, 2]
    whole = restore(noisy, 1.0, "denoise", false_spike_rate=0.01, method=method)
    assert float(whole.norm()) == pytest.approx(float(noisy.norm()), rel=1e-5)
    # a level below the asymptotic edge would count values that no scheme restores
    for rate in (0.2, 0.9):
        _, (report,) = restore_with_report(noise, 1.0, false_spike_rate=rate, method=method)
        assert report.edge == pytest.approx(NoiseModel(tuple(noise.shape), 1.0).edge)


def test_false_spike_rate_reaches_targets_that_extend_below_the_edge():
    """A value between the edge 28.28 and the level of 1e-6, 29.82, has no part in the target."""
    s = np.concatenate([[80.0, 50.0, 29.05], np.linspace(28.0, 0.1, 197)])
    index, public = np.arange(1, 201), np.linspace(1.0, 0.1, 200)
    u, v = (torch.linalg.qr(torch.randn(200, 200, generator=generator(i)))[0] for i in (0, 1))
    noisy = (u * torch.from_numpy(s).float()) @ v.T
    for rate, visible in ((None, s[:3]), (1e-6, s[:2])):
        y = visible / math.sqrt(200)
        theta = math.sqrt(200) * (y + np.sqrt(y**2 - 4)) / 2  # y = theta + 1 / theta if m = n
        count = len(theta)
        power_law = np.polyfit(np.log(index[:count]), np.log(theta), 1)
        exponential = np.polyfit(index[:count], np.log(theta), 1)
        for target, goal in (
            ("rmt", np.pad(theta, (0, 200 - count))),
            ("power-law", np.exp(np.polyval(power_law, np.log(index)))),
            ("exponential", np.exp(np.polyval(exponential, index))),
            (torch.from_numpy(public), public * np.linalg.norm(theta) / np.linalg.norm(public)),
        ):
            options = {"alpha": 0.8, "target": target, "false_spike_rate": rate}
            found = restored_values(torch.from_numpy(s), (200, 200), 1.0, "partial", **options)
            np.testing.assert_allclose(found, 0.2 * s + 0.8 * goal, rtol=1e-6)
            restored = u.T @ restore(noisy, 1.0, "partial", method="exact", **options) @ v
            np.testing.assert_allclose(restored.diagonal(), found, rtol=2e-3)
            large = restored_values(
                torch.from_numpy(s) * 1e15, (200, 200), 1e15, "partial", **options
            )
            np.testing.assert_allclose(large / 1e15, found, rtol=1e-6)


def test_pure_noise():
    for shape in ((40, 60), (200, 500), (500, 200)):
        noise = torch.randn(shape, generator=generator(1))
        noise_std = float(torch.linalg.svdvals(noise)[0]) / sum(map(math.sqrt, shape)) * 1.001
        for case in itertools.product([shape], EDGE_SCHEMES, ("exact", "fast")):
            run = {"scheme": case[1], "method": case[2]}
            kept, (report,) = restore_with_report(noise, noise_std, **run)
            assert torch.equal(kept, noise) and kept.data_ptr() != noise.data_ptr(), case
            assert report.action == "kept" and report.num_above_edge == 0, case
            zeroed, (report,) = restore_with_report(noise, noise_std, below="zero", **run)
            assert not zeroed.any(), case
            assert report.action == "zeroed" and report.norm_after == 0, case


# --- invariances ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, shape",
    [("exact", (30, 50)), ("exact", (50, 30)), ("fast", (150, 260)), ("fast", (260, 150))],
)
def test_invariances(method, shape):
    noisy, _ = spiked(shape, [6.0, 3.0, 2.0])
    g = generator(5)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0] for n in shape
    )
    # the fast path converges to a few per cent, and starts elsewhere when rotated
    tolerance = 1e-8 if method == "exact" else 0.06

    for name, options in CASES:
        if name == "none":
            continue
        run = {"scheme": name, "method": method, **options}
        restored = restore(noisy, 0.7, **run)
        for change, got, want in (
            ("left", restore(left @ noisy, 0.7, **run), left @ restored),
            ("right", restore(noisy @ right, 0.7, **run), restored @ right),
            ("transposed", restore(noisy.T, 0.7, **run), restored.T),
            ("negated", restore(-noisy, 0.7, **run), -restored),
            *(
                (f"scaled by {c}", restore(c * noisy, c * 0.7, **run), c * restored)
                for c in (1e-6, 3.0, 1e9)
            ),
        ):
            assert float((got - want).norm()) <= tolerance * float(want.norm()), (run, change)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 10**6),
    st.sampled_from([case for case in CASES if case[0] != "truncate"]),
    st.floats(1e-3, 1e3),
)
def test_small_shapes(m, n, seed, case, noise_std):
    name, options = case
    noisy = noise_std * 2 * torch.randn(m, n, generator=generator(seed), dtype=torch.float64)
    got = restore(noisy, noise_std, name, **options)
    np.testing.assert_allclose(
        got, naive(noisy, noise_std, name, **options), atol=1e-7 * float(noisy.norm())
    )


# --- inputs, outputs, reports ---------------------------------------------------------------------


def test_input_untouched_and_deterministic():
    noisy, _ = spiked((130, 200), [3.0, 1.2], dtype=torch.float32)
    noisy.requires_grad_()
    copy, state = noisy.detach().clone(), torch.get_rng_state()
    for (name, options), method in itertools.product(CASES, ("exact", "fast")):
        case = (name, options, method)
        torch.set_rng_state(state)
        first = restore(noisy, 0.7, name, method=method, **options)
        assert torch.equal(torch.get_rng_state(), state), case
        torch.manual_seed(12345)  # another global state gives the same result
        assert torch.equal(first, restore(noisy, 0.7, name, method=method, **options)), case
        assert not first.requires_grad and noisy.grad is None, case
        first.mul_(0)
        assert torch.equal(noisy.detach(), copy), case


def test_batch_equals_one_by_one():
    matrices = [
        spiked((130, 160), factors, seed=seed, dtype=torch.float32)[0]
        for seed, factors in enumerate([[3.0, 1.2], [], [9.0] * 3, [1.02], [2.0], [0.1]])
    ]
    batch = torch.stack(matrices)
    for (name, options), method in itertools.product(CASES, ("exact", "fast")):
        got, reports = restore_with_report(batch, 0.7, name, method=method, **options)
        assert got.shape == batch.shape and len(reports) == 6
        for one, matrix, report in zip(got, matrices, reports, strict=True):
            case = str((name, options, method))
            alone, (own,) = restore_with_report(matrix, 0.7, name, method=method, **options)
            np.testing.assert_allclose(one, alone, rtol=1e-5, atol=1e-5, err_msg=case)
            assert report.action == own.action, case
            assert report.num_above_edge == own.num_above_edge, case


def test_half_precision_and_numpy_are_restored_in_float32_and_returned_in_kind():
    noisy = spiked((130, 160), [3.0, 1.2], dtype=torch.float32)[0]
    for (name, options), method in itertools.product(CASES, ("exact", "fast")):
        for dtype in (torch.float16, torch.bfloat16):
            half = noisy.to(dtype)
            case = str((name, options, method, dtype))
            want, (report,) = restore_with_report(half.float(), 0.7, name, method=method, **options)
            got, (own,) = restore_with_report(half, 0.7, name, method=method, **options)
            assert got.dtype == dtype and torch.equal(got, want.to(dtype)), case
            assert own == report and torch.equal(half, noisy.to(dtype)), case
        for dtype in (np.float16, np.float32, np.float64, ">f4"):
            array = noisy.numpy().astype(dtype)
            array.flags.writeable = False
            case = str((name, options, method, dtype))
            own = torch.from_numpy(array.astype(np.float64 if dtype == np.float64 else np.float32))
            want = restore(own, 0.7, name, method=method, **options)
            for view in (array, np.asfortranarray(array), array[::-1][::-1]):
                got = restore(view, 0.7, name, method=method, **options)
                assert isinstance(got, np.ndarray) and got.dtype == array.dtype, case
                np.testing.assert_array_equal(got, want.numpy().astype(dtype), err_msg=case)
    # the corrected norm, 7.5e4, is that of one value, which float16 cannot hold
    large = np.diag([6e4] + 20 * [1e4]).astype(np.float16)
    for matrix in (large, torch.from_numpy(large)):
        refused("can hold its restoration, got .*float16", restore, matrix, 2e3, "denoise")


def test_a_gradient_of_a_convolution_is_left():
    """A convolution's kernel is left as it is, as :func:`attach_restoration` leaves it."""
    kernel = spiked((48, 27), [3.0], dtype=torch.float32)[0].reshape(16, 3, 9, 3)
    for name, options in CASES:
        if "values" in options or "target" in options:
            continue  # tensors that fit one shape
        for noisy in (kernel, kernel.bfloat16(), kernel.unsqueeze(0), kernel.numpy()):
            got, reports = restore_with_report(noisy, 0.7, name, **options)
            assert reports == [] and (got == noisy).all() and got is not noisy, name
            assert got.dtype == noisy.dtype and type(got) is type(noisy), name
    got[:] = 0
    assert kernel.any()
    for arguments, words in (
        ({"noise_std": 0}, "^noise_std must"),
        ({"scheme": "optmal"}, "did you mean 'optimal'"),
        ({"kappa": 1}, "^option of scheme"),
        ({"noisy": torch.full((2, 2, 2, 2), math.nan)}, "^noisy must have finite"),
        (
            {"noisy": torch.ones((2, 2, 2, 2), dtype=torch.int64)},
            "^noisy must be a tensor of float16",
        ),
    ):
        refused(words, restore, **{"noisy": kernel, "noise_std": 0.7} | arguments)


def test_reports():
    noisy, _ = spiked((150, 300), [4.0, 2.0])
    s = np.linalg.svd(noisy.numpy(), compute_uv=False)
    edge = 0.7 * (math.sqrt(150) + math.sqrt(300))
    for method in ("exact", "fast"):
        restored, (report,) = restore_with_report(noisy, 0.7, method=method)
        assert torch.equal(restored, restore(noisy, 0.7, method=method))
        assert (report.scheme, report.shape, report.noise_std) == ("optimal", (150, 300), 0.7)
        assert report.edge == pytest.approx(edge) and report.action == "restored"
        assert report.top == pytest.approx(s[0], rel=1e-4)
        assert report.num_above_edge == 2 == int((s > edge).sum())
        assert report.norm_before == pytest.approx(np.linalg.norm(s))
        assert report.norm_after == pytest.approx(float(restored.norm()))
    report = restore_with_report(noisy, 0.7, "none")[1][0]
    assert report.action == "passed" and report.top is None and report.num_above_edge is None
    report = restore_with_report(noisy, 0.7, "hard", false_spike_rate=0.01)[1][0]
    assert report.edge > edge


def test_gradients_of_a_model():
    grads = {
        "bias": torch.ones(5),
        "w": spiked((60, 90), [3.0])[0].float(),
        "norm": torch.zeros(7),
        "v": torch.randn(60, 90, generator=generator(2)) * 0.1,
        "row": torch.ones(1, 9),
        "lora": spiked((8, 384), [4.0])[0].float(),
    }
    copies = {name: tensor.clone() for name, tensor in grads.items()}
    restored, reports = restore_gradients(grads, 0.7, "optimal", below="zero")
    assert list(restored) == list(grads) and list(reports) == ["w", "v", "lora"]
    for name, tensor in grads.items():
        assert torch.equal(tensor, copies[name])
        want = restore(tensor, 0.7, below="zero") if name in reports else tensor
        assert torch.equal(restored[name], want)
    assert [reports[name].action for name in reports] == ["restored", "zeroed", "restored"]
    assert restore_gradients({}, 0.7) == ({}, {})
    with pytest.raises(ValueError, match=r"^gradient of w: noisy must have finite"):
        restore_gradients({"w": torch.full((3, 3), math.nan)}, 1.0)
    with pytest.raises(ValueError, match=r"^gradient of w must be a torch tensor"):
        restore_gradients({"w": np.ones((3, 3))}, 1.0)


def test_a_noise_level_per_gradient():
    grads = {"w": spiked((60, 90), [3.0])[0], "v": 2 * spiked((60, 90), [2.0], seed=1)[0]}
    restored, reports = restore_gradients(grads, {"w": 0.7, "v": 1.4})
    for name, noise_std in (("w", 0.7), ("v", 1.4)):
        assert torch.equal(restored[name], restore(grads[name], noise_std)), name
        assert reports[name].noise_std == noise_std


def test_only_matrices_alike_share_a_batch():
    def on_a_device(*shape, dtype=torch.float32):
        return torch.empty(shape, device="meta", dtype=dtype)

    grads = {
        "a": on_a_device(3, 4),
        "b": on_a_device(3, 4),
        "louder": on_a_device(3, 4),
        "turned": on_a_device(4, 3),
        "finer": on_a_device(3, 4, dtype=torch.float64),
        "row": on_a_device(1, 4),
        "vector": on_a_device(4),
        "here": torch.ones(3, 4),
        "here too": torch.ones(3, 4),
    }
    noise_stds = dict.fromkeys(grads, 1.0) | {"louder": 2.0}
    alone = [["louder"], ["turned"], ["finer"], ["row"], ["here"], ["here too"]]
    assert _batches(grads, noise_stds, clean=grads) == [["a", "b"], *alone]
    alone.remove(["row"])
    assert _batches(grads, noise_stds, clean=None) == [["a", "b"], *alone]


def test_oracle_from_clean_gradients():
    pairs = {"w": spiked((60, 90), [3.0, 1.0]), "row": spiked((1, 9), [2.0])}
    noisy, clean = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    restored, _ = restore_gradients(noisy | {"b": torch.ones(3)}, 0.7, "oracle", clean=clean)
    for name in pairs:
        values = oracle_values(noisy[name], clean[name])
        assert torch.equal(restored[name], restore(noisy[name], 0.7, "oracle", values=values))
    assert torch.equal(restored["b"], torch.ones(3))
    for scheme in SCHEMES:
        if scheme not in NON_PRIVATE_SCHEMES:
            words = "^clean must not be given for the private scheme"
            refused(words, restore_gradients, noisy, 0.7, scheme, clean=clean)


def test_restorer_keeps_running_means():
    """Each mean is restored at its own noise level, also after a round trip of the state."""
    steps = [
        {"w": spiked((60, 90), [3.0], seed=i)[0], "b.c": torch.full((5,), 1.0 * i)}
        for i in range(4)
    ]
    late = spiked((40, 30), [2.0])[0]
    filters = {"w": exponential_average(0.8), "b.c": exponential_average(0.8)}
    restorer = GradientRestorer("soft", low_pass=exponential_average(0.8), below="zero")
    for step in steps[:3]:
        filters = {name: filters[name].update(step[name], 0.7) for name in step}
        got = restorer.restore(step, 0.7)
        want = restore(filters["w"].mean, filters["w"].noise_std, "soft", below="zero")
        assert torch.equal(got["w"], want) and torch.equal(got["b.c"], filters["b.c"].mean)
    again = GradientRestorer("soft", low_pass=exponential_average(0.8), below="zero")
    again.load_tensors(restorer.tensors(), steps[0])
    shares = []

    def distribute(work, gradients):
        shares.extend(gradients)
        return {name: work({name: gradients[name]})[name] for name in gradients}

    last = steps[3] | {"late": late}
    for one, options in ((restorer, {}), (again, {"distribute": distribute})):
        got = one.restore(last, 0.7, **options)
        torch.testing.assert_close(got["late"], restore(late, 0.7, "soft", below="zero"))
        assert one.reports["late"].noise_std == pytest.approx(0.7)
        assert one.reports["w"].noise_std < 0.5
    assert shares == ["w", "b.c", "late"]
    for name, tensor in restorer.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    before = restorer.tensors()
    refused("^noisy must have finite", restorer.restore, {"w": math.nan * last["w"]}, 0.7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in restorer.tensors().items())
    again.restore(steps[3], 0.7)  # without a gradient of the third parameter, whose mean stays
    torch.testing.assert_close(again.filters["late"].mean, late)
    shares.clear()
    plain = GradientRestorer("none", low_pass=exponential_average(0.8))
    got = plain.restore(last, 0.7, distribute=distribute)
    torch.testing.assert_close(got["w"], last["w"])
    assert not shares  # the identity needs no work that could be distributed
    refused("^k must be given", GradientRestorer, "truncate")


def test_all_zero_without_noise():
    zero = torch.zeros(150, 200)
    for name, options in (("truncate", {"k": 2}), ("power", {}), ("power", {"p": 2}), ("none", {})):
        for method in ("fast", "exact"):
            assert torch.equal(restore(zero, 0.0, name, method=method, **options), zero)


def test_truncate_to_more_than_there_is_keeps_everything():
    head = torch.randn(2, 40, generator=generator(0))
    for method in ("fast", "exact"):
        torch.testing.assert_close(restore(head, 0.0, "truncate", k=8, method=method), head)


def test_rank_below_k():
    low = torch.outer(torch.arange(200.0), torch.arange(150.0))
    for method in ("fast", "exact"):
        restored = restore(low, 0.0, "truncate", k=5, method=method)
        assert float((restored - low).norm()) < 1e-5 * float(low.norm())


# --- the fast path on a large scale ---------------------------------------------------------------

BIG = [(384, 1536), (1536, 384), pytest.param((768, 3072), marks=pytest.mark.slow)]
SPIKES = {
    "none": [],
    "one": [3.0],
    "one near the edge": [1.05],
    "8": [6, 5, 4, 3, 2, 1.5, 1.2, 1.05],
    "20": list(np.linspace(8, 1.02, 20)),
    "40": list(np.geomspace(30, 1.1, 40)),
    "40 weak": list(np.linspace(1.6, 1.05, 40)),
    "40 equal": [2.5] * 40,
}


@pytest.mark.parametrize("shape", BIG)
def test_fast_alignment(shape):
    """The alignment with the clean matrix is at least 0.99 of the exact path's, for each scheme."""
    cases = [("optimal", {}), ("denoise", {}), ("partial", {}), ("optimal", {"loss": "nuclear"})]
    cases, compared = cases if shape[0] != 768 else cases[:1], 0
    for spikes, factors in SPIKES.items():
        noisy, clean = spiked(shape, factors or [0.01], dtype=torch.float32, seed=3)
        u, s, vh = torch.linalg.svd(noisy, full_matrices=False)
        for name, options in cases:
            new = naive_values(s.double().numpy(), shape, 0.7, name, **options)
            if not new.any() or s[0] <= 0.7 * sum(map(math.sqrt, shape)):
                continue
            compared += 1
            exact = (u * torch.from_numpy(new).float()) @ vh
            fast = restore(noisy, 0.7, name, **options)
            assert cosine(fast, clean) >= 0.99 * cosine(exact, clean), (spikes, name, options)
            assert cosine(fast, exact) > 0.98, (spikes, name, options)
    assert compared >= 5 * len(cases)  # all but the weakest spikes stand above the edge


@pytest.mark.parametrize("name", ["optimal", "denoise", "soft"])
def test_fast_alignment_of_spikes_next_to_the_edge(name):
    for seed in range(12):
        noisy, clean = spiked((128, 300), [1.3] * 6, dtype=torch.float32, seed=seed)
        fast, exact = (restore(noisy, 0.7, name, method=method) for method in ("fast", "exact"))
        assert cosine(fast, clean) >= 0.9 * cosine(exact, clean), seed


@pytest.mark.parametrize(
    ("power", "top"), [(1.0, 60), (1.0, 100), (0.7, 20), (1.0, 5)], ids=lambda value: f"{value:g}"
)
def test_a_value_far_above_the_others_hides_none_of_them(power, top):
    """The clean singular values are ``top * i^-power`` times the edge.

    A rule that let the largest value decide when the iteration ends would miss values well above
    the edge.
    """
    size = 512
    seed = generator(0)
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=seed))[0] for _ in range(2))
    values = top * 2 * math.sqrt(size) * torch.arange(1, size + 1.0) ** -power
    clean = (u * values) @ v.T
    noisy = clean + torch.randn(size, size, generator=seed)
    singular = torch.linalg.svdvals(noisy) / (2 * math.sqrt(size))
    for scheme in ("optimal", "hard", "soft", "denoise", "partial"):
        fast, (report,) = restore_with_report(noisy, 1.0, scheme)
        exact = restore(noisy, 1.0, scheme, method="exact")
        assert float((fast - clean).norm()) < 1.02 * float((exact - clean).norm())
        assert float(singular[report.num_above_edge]) < 1.1  # the largest value that was missed


@pytest.mark.parametrize("k", [32, 64, 96, 97])
def test_truncate_keeps_k_values_of_any_size(k):
    """On a spectrum 1/i, and on one value above k - 1 equal ones: no values go missing."""
    size = 800
    seed = generator(1)
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=seed))[0] for _ in range(2))
    power_law = torch.arange(1, size + 1.0) ** -1
    plateau = torch.full((size,), 1e-3)
    plateau[:k], plateau[0] = 1.0, 10.0
    for values in (power_law, plateau):
        matrix = (u * values) @ v.T
        got = restore(matrix, 0.0, "truncate", k=k)
        assert int((torch.linalg.svdvals(got) > 1e-4).sum()) == k
        assert float((got - matrix).norm()) <= 1.005 * float(values[k:].norm())


def test_a_result_of_the_noises_size_needs_noise_of_an_ordinary_size():
    matrix = torch.diag(torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.float64))
    for noise_std in (1e-6, 1.01e-12):
        polar = restore(matrix, noise_std, "polar")
        assert float(polar[0, 0]) == pytest.approx(4 * noise_std, rel=1e-6)
    refused("noise_std must be at least 1e-12 times", lambda: restore(matrix, 1e-15, "polar"))
    refused(
        "noise_std must be at least 1e-12 times",
        lambda: restored_values(matrix.diagonal(), (4, 4), 1e-15, "polar"),
    )


def test_many_spikes_fall_back_to_the_exact_path():
    for shape, factors in (
        ((128, 512), np.full(40, 1.6)),  # a full subspace, with rough values
        ((200, 300), np.linspace(5, 2, 120)),
        ((300, 700), np.full(140, 3.0)),
        ((700, 300), np.full(250, 3.0)),
    ):
        noisy, _ = spiked(shape, list(factors), dtype=torch.float32)
        exact = restore(noisy, 0.7, method="exact")
        np.testing.assert_allclose(
            restore(noisy, 0.7), exact, rtol=1e-4, atol=1e-4, err_msg=str(shape)
        )


def test_wide_dynamic_range_in_single_precision():
    """A spike 1e5 times the edge does not hide a small spike."""
    noisy, clean = spiked((300, 500), [1e5, 3.0])
    want = naive(noisy, 0.7, "optimal")
    noisy = noisy.float()
    got = restore(noisy, 0.7, "optimal").numpy()
    u, _, vh = np.linalg.svd(clean.numpy(), full_matrices=False)
    assert u[:, 1] @ got @ vh[1] == pytest.approx(u[:, 1] @ want @ vh[1], rel=0.02)


# --- bad input ------------------------------------------------------------------------------------

GOOD = torch.eye(4)


def test_bad_matrix():
    for matrix, words in (
        (torch.ones(3), "at least 2 axes"),
        (torch.ones(0, 3), "non-empty"),
        (torch.ones(2, 3, dtype=torch.int64), "float16, bfloat16, float32 or float64"),
        (torch.eye(3).to_sparse(), "a dense tensor with values"),
        (torch.ones(2, 3, device="meta"), "a dense tensor with values"),
        (np.ma.masked_array(np.eye(3), mask=np.eye(3) > 0), "an array without a mask"),
        (np.ones((2, 3), dtype=np.longdouble), "an array of float16, float32 or float64"),
        (torch.ones(2, 3, dtype=torch.complex64), "float32 or float64"),
        (torch.full((2, 3), math.nan), "finite entries"),
        (torch.tensor([[1.0, math.inf]]), "finite entries"),
        (torch.full((3, 3), 3e38), "Frobenius norm"),
        (torch.zeros(2, 3), "nonzero entry"),
        (np.ones((2, 3), dtype=int), "an array of float16, float32 or float64"),
        (np.ones(3), "at least 2 axes"),
        ([[1.0]], "a torch tensor or a numpy array"),
        (None, "a torch"),
    ):
        for scheme in ("optimal", "power", "none"):
            refused(f"^noisy must (be|have) .*{words}", restore, matrix, 1.0, scheme)


def test_bad_arguments():
    for arguments, words in (
        ({"noise_std": 0}, "^noise_std must be a finite number > 0"),
        ({"noise_std": -1}, "^noise_std must"),
        ({"noise_std": math.nan}, "^noise_std must"),
        ({"noise_std": "1"}, "^noise_std must"),
        ({"noise_std": None}, "^noise_std must"),
        ({"scheme": "power", "noise_std": -1}, "^noise_std must be a finite number >= 0"),
        ({"scheme": "optmal"}, "^scheme must be one of .*did you mean 'optimal'"),
        ({"scheme": None}, "^scheme must"),
        ({"method": "exakt"}, "^method must .*'exact'"),
        ({"below": "kep"}, "^below must .*'keep'"),
        ({"false_spike_rate": 0}, "^false_spike_rate must"),
        ({"false_spike_rate": 2}, "^false_spike_rate must"),
        *(
            (
                {"scheme": scheme, "false_spike_rate": 0.01, **options},
                f"^false_spike_rate must be left out for scheme '{scheme}'",
            )
            for scheme, options in (
                ("none", {}),
                ("truncate", {"k": 1}),
                ("power", {}),
                ("oracle", {"values": torch.ones(4)}),
            )
        ),
        ({"los": "frobenius"}, "^option of scheme 'optimal' must .*did you mean 'loss'"),
        ({"scheme": "denoise", "norm": torch.ones(1)}, "^option of scheme 'denoise' must"),
        ({"loss": "frobenious"}, "^loss must .*'frobenius'"),
        ({"scheme": "none", "k": 1}, "^scheme 'none' takes no options"),
        ({"scheme": "hard", "threshold": "edgy"}, "^threshold must .*'edge'"),
        ({"scheme": "soft", "threshold": 3.0}, "^threshold must"),
        ({"scheme": "truncate"}, "^k must be given"),
        ({"scheme": "truncate", "k": 0}, "^k must"),
        ({"scheme": "truncate", "k": "x"}, "^k must"),
        ({"scheme": "truncate", "k": 1.5}, "^k must"),
        ({"scheme": "denoise", "kappa": -1}, "^kappa must"),
        ({"scheme": "denoise", "kappa": None}, "^kappa must"),
        ({"scheme": "denoise", "norm_correction": "False"}, "^norm_correction must be true or f"),
        ({"scheme": "denoise", "norm_correction": "off"}, "^norm_correction must .*got 'off'"),
        ({"scheme": "denoise", "norm_correction": 0}, "^norm_correction must"),
        ({"scheme": "denoise", "norm_correction": None}, "^norm_correction must"),
        ({"scheme": "partial", "alpha": 1.1}, "^alpha must"),
        ({"scheme": "partial", "alpha": "x"}, "^alpha must"),
        ({"scheme": "partial", "target": "powerlaw"}, "^target must .*'power-law'"),
        ({"scheme": "partial", "target": np.ones(4)}, "^target must be a torch tensor"),
        ({"scheme": "partial", "target": torch.ones(3)}, "^target must be a tensor of shape"),
        ({"scheme": "partial", "target": torch.zeros(4)}, "^target must be nonnegative"),
        ({"scheme": "partial", "target": torch.full((4,), math.nan)}, "^target must have finite"),
        ({"scheme": "power", "p": 0}, "^p must"),
        ({"scheme": "power", "p": True}, "^p must"),
        ({"scheme": "power", "p": [1, 2]}, "^p must"),
        ({"scheme": "power", "p": math.inf}, "^p must"),
        ({"scheme": "oracle"}, "^values must be given"),
        ({"scheme": "oracle", "values": [1.0]}, "^values must be a torch tensor"),
        ({"scheme": "oracle", "values": torch.ones(3)}, "^values must be a tensor of shape"),
        ({"scheme": "oracle", "values": torch.full((4,), math.nan)}, "^values must have finite"),
    ):
        for size in (4, 200):
            matrix = 10 * torch.randn(size, size, generator=generator(0))
            refused(words, restore, matrix, **{"noise_std": 1.0, **arguments})


def test_bad_input_of_the_rest():
    for call, words in (
        (lambda: oracle_values(GOOD, torch.eye(3)), "^clean must be"),
        (lambda: oracle_values(GOOD, np.eye(4)), "^clean must be a torch tensor"),
        (lambda: oracle_values(None, GOOD), "^noisy must be a torch tensor"),
        (lambda: restore_gradients({"a": GOOD}, {"b": 1.0}), "^noise_std must hold .*'a'$"),
        (
            lambda: restore_gradients({"a": GOOD}, 1.0, "oracle", clean={}),
            "^clean must hold .*'a'$",
        ),
        (lambda: GradientRestorer(low_pass=0.9), "^low_pass must be a LowPassFilter"),
        (lambda: require_noise("it", GOOD, math.nan), "^noise_std must"),
        (lambda: require_noise("it", GOOD.long(), 1.0), "^it must be a floating-point tensor"),
        (lambda: restored_values(torch.ones(3), 3, 1.0), r"^shape must be \(\.\.\., m, n\)"),
        (lambda: oracle_values(GOOD, GOOD, kind="weight"), "^kind must .*'weights'"),
        (lambda: restored_values(torch.ones(4), (3, 4), 1.0), r"^singular_values must .*\(3, 4\)"),
        (lambda: restored_values(torch.ones(3), (2, 3, 4), 1.0), "^singular_values must be"),
        (lambda: restored_values(torch.ones(2), (2, math.inf), 1.0), "^shape must be an integer"),
        (lambda: restored_values(torch.ones(2), (2, math.nan), 1.0), "^shape must be an integer"),
        (lambda: restored_values(torch.ones(2), (2, 2.5), 1.0), "^shape must be an integer"),
        (lambda: restored_values(torch.ones(1), (True, 4), 1.0), "^shape must be an integer"),
        (
            lambda: restored_values(torch.tensor([1.0, 2.0]), (2, 4), 1.0),
            "^singular_values .*descend",
        ),
        (
            lambda: restored_values(torch.tensor([1.0, -1.0]), (2, 4), 1.0),
            "^singular_values .*nonneg",
        ),
        (
            lambda: restored_values(torch.tensor([math.nan, 1.0]), (2, 4), 1.0),
            "^singular_values must",
        ),
        (lambda: restored_values(torch.ones(2), (2, 4), 0.0), "^noise_std must"),
        (lambda: restored_values(torch.ones(2), (2, 4), 1.0, "best"), "^scheme must"),
        (lambda: restored_values(torch.ones(2), (2, 4), 1.0, k=3), "option of scheme 'optimal'"),
    ):
        refused(words, call)


# --- GPU ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_batch_equals_loop():
    matrices = [
        spiked((160, 300), factors, seed=seed)[0]
        for seed, factors in enumerate([[3.0, 1.5], [0.1], [9.0] * 3])
    ]
    batch = torch.stack(matrices).cuda()
    grads = {str(i): matrix.cuda() for i, matrix in enumerate(matrices)}
    for name, options in CASES:
        case = (name, options)
        got = restore(batch, 0.7, name, **options)
        assert got.is_cuda, case
        for one, matrix in zip(got, matrices, strict=True):
            want = restore(matrix, 0.7, name, method="exact", **options)
            assert float((one.cpu() - want).norm()) <= 0.02 * float(want.norm()), case
        restored, _ = restore_gradients(grads, 0.7, name, **options)
        for i in range(3):
            assert float((restored[str(i)] - got[i]).norm()) <= 1e-9 * float(got[i].norm()), case
