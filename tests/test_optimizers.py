"""Optimizers that know the noise, against loops over entries, torch's own and differences."""

import itertools
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from lowrank_dp.optim import AdamBC, Muon
from lowrank_dp.optim.muon import bias_corrected
from tests.refusals import refused
from tests.tasks import seeded

SHAPES = [(5, 7), (7, 5), (6,)]
STEPS = 4


def gradients(seed=0):
    return [
        [torch.randn(shape, generator=g) for shape in SHAPES for g in [seeded(seed + 10 * step)]]
        for step in range(STEPS)
    ]


def parameters():
    return [nn.Parameter(torch.full(shape, 0.5)) for shape in SHAPES]


def run(optimizer, weights, steps):
    for grads in steps:
        for p, grad in zip(weights, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()


def naive_adam_bc(start, grads, *, lr, betas, stds, floor, decay):
    """Compute DP-AdamBC entry by entry from its definition, with all weights of all steps."""
    x, seen = start, []
    for t, grad in enumerate(grads):
        seen.append(grad + decay * x)
        one, two = (
            [(1 - b) * b ** (t - i) / (1 - b ** (t + 1)) for i in range(t + 1)] for b in betas
        )
        m = sum(w * g for w, g in zip(one, seen, strict=True))
        v = sum(w * g * g for w, g in zip(two, seen, strict=True))
        phi = sum(w * s * s for w, s in zip(two, stds, strict=False))
        x -= lr * m / (math.sqrt(max(v - phi, floor * phi)) + 1e-8)
    return x


def test_adam_bc_by_its_formula():
    steps = gradients()
    for stds, floor, decay in (
        ([0.8] * 4, 0.3, 0.0),
        ([0.8] * 4, 1e-3, 0.1),
        ([0.2, 2, 1, 0.5], 0.3, 0),
    ):
        weights = parameters()
        optimizer = AdamBC(
            weights, 0.1, (0.7, 0.9), mean_noise_std=1.0, floor=floor, weight_decay=decay
        )
        for std, grads in zip(stds, steps, strict=True):
            optimizer.param_groups[0]["mean_noise_std"] = std
            run(optimizer, weights, [grads])
        floored = 0
        for i, p in enumerate(weights):
            for place in itertools.product(*map(range, p.shape)):
                series = [float(grads[i][place]) for grads in steps]
                want = naive_adam_bc(
                    0.5, series, lr=0.1, betas=(0.7, 0.9), stds=stds, floor=floor, decay=decay
                )
                assert p[place].item() == pytest.approx(want, rel=1e-4, abs=1e-5), (stds, place)
                floored += np.mean(np.square(series)) < np.mean(np.square(stds))
        assert floored > 10  # the floor was needed


def test_adam_bc_without_noise_is_adam():
    ours, theirs = parameters(), parameters()
    run(AdamBC(ours, 0.1, mean_noise_std=0.0, weight_decay=0.1), ours, gradients())
    run(torch.optim.Adam(theirs, 0.1, weight_decay=0.1), theirs, gradients())
    torch.testing.assert_close(ours, theirs)


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest():
    ours, theirs = parameters(), parameters()
    run(Muon(ours[:2], ours[2:], lr=0.1, momentum=0.8, weight_decay=0.1), ours, gradients())
    for group, inner in (
        (
            slice(2),
            torch.optim.Muon(
                theirs[:2],
                lr=0.1,
                momentum=0.8,
                weight_decay=0.1,
                nesterov=False,
                adjust_lr_fn="match_rms_adamw",
            ),
        ),
        (slice(2, 3), torch.optim.AdamW(theirs[2:], lr=0.1, betas=(0.8, 0.999), weight_decay=0.1)),
    ):
        run(inner, theirs[group], [grads[group] for grads in gradients()])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_rate_that_is_assigned_reaches_both_kinds():
    for correct in (False, True):
        weights = parameters()
        optimizer = Muon(
            weights[:2],
            weights[2:],
            lr=0.1,
            bias_correction=correct,
            mean_noise_std=0.1 if correct else None,
        )
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        run(optimizer, weights, gradients())
        torch.testing.assert_close(weights, parameters())


def newton_schulz(x):
    """Iterate as torch.optim.Muon does on matrices, in float64, on a matrix of norm near 1."""
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def test_bias_correction_is_half_the_laplacian():
    """Second differences along every entry of a matrix of unit norm share no formula with it."""
    for shape in ((3, 5), (4, 4), (5, 2)):
        x = torch.randn(shape, generator=seeded(1), dtype=torch.float64)
        x /= x.norm()
        h, tau, laplacian = 1e-4, 0.01, torch.zeros_like(x)
        for place in itertools.product(*map(range, shape)):
            bump = torch.zeros_like(x)
            bump[place] = h
            laplacian += newton_schulz(x + bump) + newton_schulz(x - bump) - 2 * newton_schulz(x)
        want = newton_schulz(x) - tau**2 / 2 * laplacian / h**2
        assert float((tau**2 / 2 * laplacian / h**2).norm()) > 0.01
        torch.testing.assert_close(bias_corrected(x, tau), want, rtol=1e-4, atol=1e-4)
        # the result depends only on the ratio of matrix and noise
        torch.testing.assert_close(bias_corrected(50 * x, 50 * tau), want, rtol=1e-4, atol=1e-4)
    equal = torch.eye(4, dtype=torch.float64)  # equal values: limits of divided differences
    near = equal + 1e-4 * torch.diag(torch.arange(4.0, dtype=torch.float64))
    torch.testing.assert_close(
        bias_corrected(equal, 0.02), bias_corrected(near, 0.02), rtol=0, atol=1e-2
    )
    assert not bias_corrected(torch.zeros(3, 4), 0.1).any()


def test_bias_correction_removes_most_of_the_bias():
    """The mean is over 4,000 draws; without correction the bias is 8 standard errors or more."""
    clean = torch.randn(4, 6, generator=seeded(2), dtype=torch.float64)
    clean, generator = clean / clean.norm(), seeded(3)
    draws = 4000
    plain, corrected = (torch.zeros_like(clean) for _ in range(2))
    squares = 0.0
    for _ in range(draws):
        noisy = clean + 0.02 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
        one = bias_corrected(noisy, 0.0)
        plain, corrected = plain + one / draws, corrected + bias_corrected(noisy, 0.02) / draws
        squares += float((one - bias_corrected(clean, 0.0)).square().sum()) / draws
    error = math.sqrt(squares / draws)  # of a mean, over all entries
    bias, left = (float((mean - bias_corrected(clean, 0.0)).norm()) for mean in (plain, corrected))
    assert bias > 8 * error and left < bias / 2, (bias, left, error)


def test_muon_bc_by_a_naive_loop():
    steps, std, momentum = gradients(), 0.3, 0.8
    weights = parameters()
    optimizer = Muon(
        weights[:2],
        weights[2:],
        lr=0.1,
        momentum=momentum,
        weight_decay=0.1,
        bias_correction=True,
        mean_noise_std=std,
    )
    run(optimizer, weights, steps)
    for i in (0, 1):
        want, buffer = np.full(SHAPES[i], 0.5), np.zeros(SHAPES[i])
        for t, grads in enumerate(steps):
            buffer = momentum * buffer + (1 - momentum) * grads[i].double().numpy()
            tau = std * math.sqrt(sum(((1 - momentum) * momentum**k) ** 2 for k in range(t + 1)))
            update = bias_corrected(torch.from_numpy(buffer), tau).numpy()
            want = want * (1 - 0.1 * 0.1) - 0.1 * 0.2 * math.sqrt(7) * update
        np.testing.assert_allclose(weights[i].detach(), want, atol=1e-5)
    other = parameters()
    run(Muon(other[:2], other[2:], lr=0.1, momentum=momentum, weight_decay=0.1), other, steps)
    near = parameters()  # without noise it is torch's Muon, which works in bfloat16
    run(
        Muon(
            near[:2],
            near[2:],
            lr=0.1,
            momentum=momentum,
            weight_decay=0.1,
            bias_correction=True,
            mean_noise_std=0.0,
        ),
        near,
        steps,
    )
    torch.testing.assert_close(near, other, rtol=0, atol=0.02)
    assert float((near[0] - weights[0]).detach().norm()) > 0.01


def test_a_saved_state_continues_to_the_bit():
    steps = gradients()
    for make in (
        lambda w: AdamBC(w, 0.1, mean_noise_std=0.7),
        lambda w: Muon(w[:2], w[2:], lr=0.1),
        lambda w: Muon(w[:2], w[2:], lr=0.1, bias_correction=True, mean_noise_std=0.7),
    ):
        whole, half = parameters(), parameters()
        run(make(whole), whole, steps)
        first = make(half)
        run(first, half, steps[:2])
        saved = first.state_dict()
        tensors = {
            f"{i}.{key}": value
            for i, entry in saved["state"].items()
            for key, value in entry.items()
        }
        state = {}
        for name, value in load(save(tensors)).items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
        resumed = [nn.Parameter(p.detach().clone()) for p in half]
        second = make(resumed)
        second.load_state_dict({"state": state, "param_groups": deepcopy(saved["param_groups"])})
        run(second, resumed, steps[2:])
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_in_opacus():
    from opacus.optimizers import DPOptimizer

    for make in (
        lambda w: AdamBC([w], 0.1, mean_noise_std=0.05),
        lambda w: Muon([w], lr=0.1, bias_correction=True, mean_noise_std=0.05),
    ):
        weight = nn.Parameter(torch.zeros(6, 8))
        optimizer = DPOptimizer(
            make(weight), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=20
        )
        weight.grad_sample = torch.ones(20, 6, 8)
        optimizer.step()
        assert weight.detach().any() and weight.detach().isfinite().all()


def test_groups_of_adam_bc_have_their_own_options():
    steps = gradients()
    whole, apart = parameters(), parameters()
    run(AdamBC(whole[:1], 0.2, mean_noise_std=0.7, floor=0.1), whole[:1], [s[:1] for s in steps])
    run(AdamBC(whole[1:], 0.1, mean_noise_std=0.4), whole[1:], [s[1:] for s in steps])
    own = {"params": apart[:1], "lr": 0.2, "mean_noise_std": 0.7, "floor": 0.1}
    optimizer = AdamBC([own], 0.1, mean_noise_std=0.4)
    optimizer.add_param_group({"params": apart[1:]})
    run(optimizer, apart, steps)
    torch.testing.assert_close(apart, whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_correction_in_half_precision_is_refused(dtype):
    weights = [nn.Parameter(torch.zeros(3, 4, dtype=dtype))]
    refused("params must be float32 or float64", lambda: AdamBC(weights, mean_noise_std=0.1))
    refused(
        "params must be float32 or float64",
        lambda: AdamBC(parameters(), mean_noise_std=0.1).add_param_group({"params": weights}),
    )
    refused(
        "matrices must be float32 or float64",
        lambda: Muon(weights, bias_correction=True, mean_noise_std=0.1),
    )
    Muon(weights)


def test_muon_refuses_a_later_group_before_a_weight_moves():
    for options in ({}, {"bias_correction": True, "mean_noise_std": 0.1}):
        weights = parameters()
        optimizer = Muon(weights[:2], lr=0.1, **options)
        words = "Muon must be given all parameters when it is made"
        refused(words, optimizer.add_param_group, {"params": weights[2:]})
        assert len(deepcopy(optimizer).param_groups) == 1


def test_bad_arguments():
    weights = parameters()
    for words, make in (
        ("mean_noise_std must be", lambda: AdamBC(weights, mean_noise_std=-1.0)),
        ("floor must be", lambda: AdamBC(weights, mean_noise_std=1.0, floor=0.0)),
        ("betas must be", lambda: AdamBC(weights, betas=(1.0, 0.9), mean_noise_std=1.0)),
        ("betas must be a pair", lambda: AdamBC(weights, betas=(0.9,), mean_noise_std=1.0)),
        ("betas must be a pair", lambda: AdamBC(weights, betas=(0.9,) * 3, mean_noise_std=1.0)),
        ("betas must be a pair", lambda: AdamBC(weights, betas=0.9, mean_noise_std=1.0)),
        *(
            (
                f"{name} must be",
                lambda name=name, bad=bad: AdamBC(
                    [{"params": weights, name: bad}], mean_noise_std=1.0
                ),
            )
            for name, bad in (
                ("mean_noise_std", -1.0),
                ("floor", -5.0),
                ("lr", -1.0),
                ("eps", 0.0),
                ("weight_decay", -1.0),
                ("betas", (0.9, 1.0)),
            )
        ),
        ("lr must be", lambda: Muon(weights[:2], lr=-1.0)),
        ("momentum must be", lambda: Muon(weights[:2], momentum=1.0)),
        ("mean_noise_std must be", lambda: Muon(weights[:2], bias_correction=True)),
        ("mean_noise_std must be", lambda: Muon([], weights, bias_correction=True)),
        (
            "mean_noise_std must be left out without bias_correction",
            lambda: Muon(weights[:2], mean_noise_std=0.1),
        ),
        (
            "mean_noise_std must be a finite number >= 0",
            lambda: Muon(weights[:2], bias_correction=True, mean_noise_std=-1.0),
        ),
        ("bias_correction must be", lambda: Muon(weights[:2], bias_correction="False")),
        ("matrices must be parameters with two axes", lambda: Muon(weights)),
        ("matrices must be an iterable of param.*'dict'", lambda: Muon([{"params": weights[:2]}])),
        ("matrices must be an iterable of param.*'Linear'", lambda: Muon(nn.Linear(2, 2))),
        ("others must be an iterable of param.*'Linear'", lambda: Muon([], [nn.Linear(2, 2)])),
        ("without a closure", lambda: AdamBC(weights, mean_noise_std=1.0).step(lambda: 0.0)),
        ("without a closure", lambda: Muon(weights[:2]).step(lambda: 0.0)),
    ):
        refused(words, make)
