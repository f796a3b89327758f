"""Projection noise against naive formation of A, the exact laws, and real PEFT layers."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
from scipy import integrate, stats
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_dp import lora, theory
from lowrank_dp.commands.lora import app
from tests.oracles import assert_refused
from tests.refusals import refused
from tests.tasks import run_command, seeded

F64 = torch.float64


def vector(n, seed=1, dtype=F64):
    return torch.randn(n, generator=seeded(seed), dtype=dtype)


def formed(q, rank, num_samples, seed=2):
    """Draw noise of projections whose A is formed, from numpy's generator: the oracle."""
    a = np.random.default_rng(seed).standard_normal((num_samples, rank, len(q))) / math.sqrt(rank)
    q = q.numpy()
    return np.einsum("srn,sr->sn", a, a @ q) - q


# --- the sampler ----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("direction", ["coordinate", "along q", "across q", "norm"])
def test_sampler_has_the_distribution_of_formed_projections(rank, direction):
    # 12 two-sample tests at 1e-3 each; the seed is fixed, so the result does not change
    q, count = vector(6), 20_000
    across = torch.linalg.qr(torch.stack([q, vector(6, 3)], 1))[0][:, 1].numpy()
    view = {
        "coordinate": lambda u: u[:, 0],
        "along q": lambda u: u @ q.numpy(),
        "across q": lambda u: u @ across,
        "norm": lambda u: np.linalg.norm(u, axis=1),
    }
    samples = lora.sample_noise(q, rank, count, generator=seeded()).numpy()
    p = stats.ks_2samp(view[direction](samples), view[direction](formed(q, rank, count))).pvalue
    assert p > 1e-3


@pytest.mark.parametrize(
    ("rank", "n"), [pytest.param(1, 2, marks=pytest.mark.slow), (3, 40), (64, 768)]
)
def test_sampled_coordinate_follows_the_exact_law(rank, n):
    q = vector(n).abs()
    samples = lora.sample_noise(q, rank, 4000, generator=seeded()).numpy()[:, 0]
    norm = float(q.norm())
    beta2 = float(q[0] / norm) ** 2
    x = np.sort(samples / norm)
    sd = math.sqrt((1 + beta2) / rank)
    pole = -math.sqrt(beta2)

    def cdf(value):
        edges = [-12 * sd - 1, *sorted({pole, value} if pole < value else {value})]
        return sum(
            integrate.quad(
                lambda t: math.exp(theory.noise_logpdf(t, rank, beta2=beta2)), a, b, limit=200
            )[0]
            for a, b in itertools.pairwise(edges)
        )

    at = x[::200]  # the supremum over a subset can only be smaller
    expected = np.array([cdf(value) for value in at])
    empirical = (np.arange(len(x)) + 0.5)[::200] / len(x)
    assert np.abs(expected - empirical).max() < 1.95 / math.sqrt(len(x))  # KS, error rate 1e-3


def test_covariance_has_twice_the_variance_along_q():
    rank, n, count = 4, 5, 200_000
    q = vector(n)
    u = lora.sample_noise(q, rank, count, generator=seeded())
    exact = (q @ q * torch.eye(n, dtype=F64) + torch.outer(q, q)) / rank
    measured = u.T @ u / count
    assert float((measured - exact).abs().max()) < 0.02 * float(exact.diagonal().max())
    assert float(u.mean(0).abs().max()) < 4.5 * math.sqrt(float(exact.diagonal().max()) / count)


def test_sampler_measures_the_variance_and_the_kurtosis_of_the_formula():
    q = torch.tensor([0.6, 0.8, 0.0], dtype=F64)
    u = lora.sample_noise(q, 8, 400_000, generator=seeded())
    for j, beta2 in enumerate((0.36, 0.64, 0.0)):
        assert float(u[:, j].var()) == pytest.approx(
            theory.noise_variance(8, 3, beta2=beta2), rel=0.02
        )
        assert stats.kurtosis(u[:, j].numpy(), fisher=False) == pytest.approx(
            theory.noise_kurtosis(8, 3, beta2=beta2), rel=0.05
        )


def test_one_dimension_is_a_shifted_chi_squared():
    u = lora.sample_noise(torch.tensor([-2.0], dtype=F64), 3, 20_000, generator=seeded())
    assert stats.kstest((u[:, 0].numpy() / -2 + 1) * 3, stats.chi2(3).cdf).pvalue > 1e-3


def test_sampler_keeps_dtype_and_input_and_is_reproducible():
    q = vector(7, dtype=torch.float32)
    before = q.clone()
    first, again = (lora.sample_noise(q, 2, 5, generator=seeded(4)) for _ in range(2))
    assert first.dtype == torch.float32 and first.shape == (5, 7)
    assert torch.equal(first, again) and torch.equal(q, before)
    assert not torch.equal(lora.sample_noise(q, 2, 5), lora.sample_noise(q, 2, 5))


def test_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    lora.sample_noise(vector(4), 2, 3)
    lora.project(torch.ones(2, 3), 2)
    lora.matched_noise(torch.ones(2, 3), 2)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_extreme_norms_neither_overflow_nor_vanish(scale):
    u = lora.sample_noise(vector(50, dtype=torch.float32) * scale, 4, 100, generator=seeded())
    assert bool(u.isfinite().all()) and float(u.abs().min()) > 0


# --- projection -----------------------------------------------------------------------------


def test_projection_uses_one_a_for_all_rows():
    g = torch.stack([vector(9), 2 * vector(9), vector(9, 5)])
    y = lora.project(g, 3, generator=seeded())
    torch.testing.assert_close(y[1], 2 * y[0])
    assert torch.linalg.matrix_rank(y) == 2
    assert theory.symmetry_score(y.numpy(), g.numpy()) < 1e-14


def test_projection_is_the_formula_with_the_drawn_a():
    g = torch.stack([vector(9), vector(9, 5)])
    a = lora.draw_a(3, 9, generator=seeded(), dtype=F64)
    torch.testing.assert_close(
        lora.project(g, 3, generator=seeded()), g @ (a.T @ a), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_projection_is_unbiased(init):
    g, generator, count = torch.stack([vector(4), vector(4, 6)]), seeded(), 20_000
    mean = sum(lora.project(g, 2, init=init, generator=generator) for _ in range(count)) / count
    sd = g.norm(dim=1, keepdim=True) * math.sqrt(2 / 2 / count)  # at most, beta2 = 1
    assert bool(((mean - g).abs() < 4.5 * sd).all())  # 8 entries at 7e-6 each


def test_matched_noise_has_the_entrywise_variance_of_projection():
    g, generator = torch.stack([vector(3), 3 * vector(3, 6)]), seeded()
    draws = torch.stack([lora.matched_noise(g, 5, generator=generator) for _ in range(20_000)])
    exact = (g.square().sum(1, keepdim=True) + g.square()) / 5
    torch.testing.assert_close(draws.var(0), exact, rtol=0.05, atol=0)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e20), (F64, 1e200)])
def test_matched_noise_of_any_scale(dtype, scale):
    """A scaled row has the scaled noise: its squares neither overflow nor vanish."""
    g = torch.stack([vector(4), vector(4), torch.zeros(4)]).to(dtype)
    factor = torch.tensor([[scale], [1 / scale], [1.0]], dtype=dtype)
    plain, scaled = (lora.matched_noise(x, 3, generator=seeded()) for x in (g, factor * g))
    assert bool((plain[:2] != 0).all()) and not bool(plain[2].any())
    torch.testing.assert_close(scaled / factor, plain)
    moments = lora.measure_noise(factor * g, 3, 2, generator=seeded())
    assert moments.variance_exact == pytest.approx((4 + 1) / 4 / 3)  # (n + 1) / (n rank)


@pytest.mark.parametrize("rank", [1, 2, 16])
def test_measured_moments_agree_with_the_formula(rank):
    q = vector(64)[None]
    m = lora.measure_noise(q, rank, 4000, generator=seeded())
    beta2 = (q / q.norm()).square().numpy()
    assert m.variance_exact == pytest.approx(theory.noise_variance(rank, 64, beta2=beta2).mean())
    assert m.kurtosis_exact == pytest.approx(theory.noise_kurtosis(rank, 64, beta2=beta2).mean())
    # intervals widened from 95 % to 3.5 sigma
    assert abs(m.variance - m.variance_exact) < 1.8 * m.variance_ci
    assert abs(m.kurtosis - m.kurtosis_exact) < 1.8 * m.kurtosis_ci


def test_half_widths_are_those_of_the_normal_approximation():
    g, rank, count = torch.stack([vector(6), vector(6, 2)]), 3, 40
    m = lora.measure_noise(g, rank, count, generator=seeded())
    rows, generator = g / g.norm(dim=1, keepdim=True), seeded()
    variance = (1 + rows.square()) / rank
    draws = [(lora.project(rows, rank, generator=generator) - rows).square() for _ in range(count)]
    for found, values in (
        (m.variance_ci, [float(square.mean()) for square in draws]),
        (m.kurtosis_ci, [float((square / variance).square().mean()) for square in draws]),
    ):
        want = stats.norm.ppf(0.975) * np.std(values, ddof=1) / math.sqrt(count)
        assert found == pytest.approx(want, rel=1e-6)


def test_kaiming_a_has_less_noise_along_a_spike_than_a_gaussian_one():
    spike = torch.tensor([[1.0]], dtype=F64)  # n = 1: the coordinate that carries all of q
    for init, exact in (("gaussian", 2 / 8), ("kaiming", 0.8 / 8)):
        m = lora.measure_noise(spike, 8, 20_000, init=init, generator=seeded())
        assert m.variance_exact == pytest.approx(exact)
        assert abs(m.variance - exact) < 1.8 * m.variance_ci


def test_rows_without_a_gradient_are_left_out():
    g = torch.stack([vector(6), torch.zeros(6, dtype=F64)])
    assert lora.measure_noise(g, 2, 50, generator=seeded()) == lora.measure_noise(
        g[:1], 2, 50, generator=seeded()
    )


# --- the identity on real PEFT layers ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(("init", "alpha"), [(True, 16), ("gaussian", 4), (True, 1)])
def test_one_step_of_a_peft_layer_is_the_projected_full_gradient(kind, init, alpha):
    torch.manual_seed(0)
    rank, rate, n, m = 4, 0.3, 10, 6
    base = nn.Linear(n, m) if kind == "linear" else Conv1D(m, n)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=["0"],
        init_lora_weights=init,
        fan_in_fan_out=kind == "conv1d",
    )
    x, target = torch.randn(5, n, dtype=F64), torch.randn(5, m, dtype=F64)

    full = nn.Sequential(base).double()
    (full(x) - target).square().sum().backward()
    gradient = base.weight.grad.clone() if kind == "linear" else base.weight.grad.T.clone()

    model = peft.get_peft_model(full, config).double()
    layer = model.base_model.model[0]
    a = layer.lora_A["default"].weight.requires_grad_(False)
    b = layer.lora_B["default"].weight
    assert not b.any()
    (model(x) - target).square().sum().backward()
    with torch.no_grad():
        b -= rate * b.grad
    moved = layer.get_delta_weight("default")
    moved = moved if kind == "linear" else moved.T
    expected = -rate * layer.scaling["default"] ** 2 * (gradient @ a.T) @ a
    moved = moved.detach()
    assert float((moved - expected).norm() / expected.norm()) < 1e-12


# --- bad input --------------------------------------------------------------------------------


def test_bad_input_is_one_error_that_names_the_argument():
    for call, name in (
        (lambda: lora.sample_noise(torch.zeros(3), 2, 1), "q"),
        (lambda: lora.sample_noise(torch.ones(2, 3), 2, 1), "q"),
        (lambda: lora.sample_noise(torch.tensor([1.0, math.nan]), 2, 1), "q"),
        (lambda: lora.sample_noise(torch.ones(3, dtype=torch.int64), 2, 1), "q"),
        (lambda: lora.sample_noise(np.ones(3), 2, 1), "q"),
        (lambda: lora.sample_noise(torch.ones(0), 2, 1), "q"),
        (lambda: lora.sample_noise(torch.ones(3), 0, 1), "rank"),
        (lambda: lora.sample_noise(torch.ones(3), 2.5, 1), "rank"),
        (lambda: lora.sample_noise(torch.ones(3), 2, 0), "num_samples"),
        (lambda: lora.sample_noise(torch.ones(3), 2, 1, generator=0), "generator"),
        (lambda: lora.project(torch.ones(3), 2), "gradient"),
        (lambda: lora.project(torch.ones(2, 3, 4), 2), "gradient"),
        (lambda: lora.project(torch.full((2, 3), math.inf), 2), "gradient"),
        (lambda: lora.project(torch.ones(2, 3), 0), "rank"),
        (lambda: lora.project(torch.ones(2, 3), 2, init="peft"), "init"),
        (lambda: lora.measure_noise(torch.zeros(2, 3), 2, 5), "gradient"),
        (lambda: lora.measure_noise(torch.ones(2, 3), 2, 1), "num_draws"),
        (lambda: lora.matched_noise(torch.ones(2, 3), -1), "rank"),
        (lambda: lora.draw_a(2, 3, dtype=torch.int64), "dtype"),
        (lambda: lora.draw_a(2, 3, dtype="float32"), "dtype"),
        (lambda: lora.draw_a(2, 3, device="bogus"), "device"),
        (lambda: lora.draw_a(2, 3, device=None), "device"),
    ):
        refused(f"^{name} must ", call)


def test_a_gradient_of_zeros_projects_to_zeros():
    assert not lora.project(torch.zeros(2, 3), 2).any()


# --- the command line --------------------------------------------------------------------------


@pytest.mark.slow
def test_command_measures_prints_and_saves(tmp_path, capsys):
    words = (
        "--model tiny --task generated --rank 2 --rank 8 --batch-size 8 --draws 20 --seed 1 --json"
    )
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_dp.lora", *words.split(), "--output", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    saved = json.loads((tmp_path / "lora.json").read_text())
    assert printed["privacy"].startswith("NON-PRIVATE") and printed["privacy"] == saved["privacy"]
    assert saved["config"]["ranks"] == [2, 8]
    exact = [row["variance_exact"] for row in printed["rows"] if row["rank"] == 8]
    assert exact and all(0.125 < value < 0.13 for value in exact)
    (tmp_path / "full" / "lora.npz").mkdir(parents=True)  # a file that can't be written
    few = ("--model tiny --task generated --rank 2 --batch-size 2 --draws 2 --json").split()
    code, out, err = run_command(capsys, app, *few, "--output", tmp_path / "full")
    assert code == 2 and "lora.npz could not be written (Is a directory)" in err
    assert json.loads(out)["rows"]  # the measurement is not lost


def test_bad_command_is_one_line_and_exit_2(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for words in (
        ("--rank", "0", "--model", "tiny", "--task", "generated"),
        ("--model", "no-such-model", "--task", "generated"),
        ("--rank", "x"),
        ("--no-such-option",),
    ):
        assert_refused(run_command(capsys, app, *words))
