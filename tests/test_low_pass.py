"""Running means of noisy gradients against naive loops, scipy's filter and simulated noise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy import signal

from lowrank_dp.restore import LowPassFilter, exponential_average, kalman_filter, restore
from tests.refusals import refused
from tests.tasks import seeded

FILTERS = {
    "mean of 3": ((1.0, 1.0, 1.0), ()),
    "order 1": ((0.4,), (-0.6,)),
    "order 1, two inputs": ((0.1, 0.2), (-0.9,)),
    "order 2": (tuple(signal.butter(2, 0.3)[0]), tuple(signal.butter(2, 0.3)[1][1:])),
    "order 2, one input": ((0.3,), (-0.5, -0.2)),
}


def feed(state, inputs, stds):
    for value, std in zip(inputs, stds, strict=True):
        state = state.update(torch.as_tensor(value), std)
    return state


def test_exponential_average_is_the_bias_corrected_mean():
    rng = np.random.default_rng(0)
    inputs, stds = rng.standard_normal((7, 3, 4)), rng.uniform(0.5, 2, 7)
    for beta in (0.0, 0.5, 0.9):
        state, running = exponential_average(beta), np.zeros((3, 4))
        for step, (value, std) in enumerate(zip(inputs, stds, strict=True), start=1):
            state = state.update(torch.from_numpy(value), std)
            running = beta * running + (1 - beta) * value
            weight = (1 - beta) * beta ** np.arange(step)[::-1] / (1 - beta**step)
            np.testing.assert_allclose(state.mean, running / (1 - beta**step), rtol=1e-12)
            want = math.sqrt(((weight * stds[:step]) ** 2).sum())
            assert state.noise_std == pytest.approx(want, rel=1e-12), (beta, step)
            assert state.mean.dtype == torch.float64


def test_against_scipys_filter():
    rng = np.random.default_rng(1)
    inputs, stds = rng.standard_normal((9, 2, 3)), rng.uniform(0.5, 2, 9)
    for name, (b, a) in FILTERS.items():
        state = LowPassFilter(b=b, a=a)
        for step in range(1, 10):
            case = f"{name}, step {step}"
            state = state.update(torch.from_numpy(inputs[step - 1]), stds[step - 1])
            filtered = signal.lfilter(b, (1.0, *a), inputs[:step], axis=0)[-1]
            constant = signal.lfilter(b, (1.0, *a), np.ones(step))[-1]
            impulse = signal.lfilter(b, (1.0, *a), np.eye(1, step)[0])[::-1]
            np.testing.assert_allclose(
                state.mean, filtered / constant, rtol=1e-9, atol=1e-12, err_msg=case
            )
            want = np.linalg.norm(impulse * stds[:step]) / abs(constant)
            assert state.noise_std == pytest.approx(want, rel=1e-9), case


def test_a_steady_start_against_scipys_initial_state():
    """A steady start assumes that the first input was there before, in output and noise weights."""
    rng = np.random.default_rng(4)
    inputs, stds = rng.standard_normal((7, 3)), rng.uniform(0.5, 2, 7)
    for name, (b, a) in FILTERS.items():
        state, a = LowPassFilter(b=b, a=a, steady_start=True), (1.0, *a)
        gain = sum(b) / sum(a)
        initial = signal.lfilter_zi(b, a)
        for step in range(1, 8):
            state = state.update(torch.from_numpy(inputs[step - 1]), stds[step - 1])
            past = initial[:, None] * inputs[:1]
            filtered = signal.lfilter(b, a, inputs[:step], axis=0, zi=past)[0][-1]
            np.testing.assert_allclose(state.mean, filtered / gain, rtol=1e-9, err_msg=name)
            weights = [
                signal.lfilter(b, a, unit, zi=initial * unit[0])[0][-1] for unit in np.eye(step)
            ]
            want = np.linalg.norm(np.array(weights) * stds[:step]) / abs(gain)
            assert state.noise_std == pytest.approx(want, rel=1e-9), (name, step)
    refused("not zero for a steady start", LowPassFilter, b=(1.0,), a=(-1.0,), steady_start=True)


def test_the_kalman_filter_of_disk():
    inputs, kappa = np.random.default_rng(5).standard_normal((6, 4)), 0.7
    state, want = kalman_filter(kappa), inputs[0]
    for t, value in enumerate(inputs):
        state = state.update(torch.from_numpy(value), 2.0)
        want = value if t == 0 else (1 - kappa) * want + kappa * value
        np.testing.assert_allclose(state.mean, want, rtol=1e-12)
    weights = [(1 - kappa) ** 5, *(kappa * (1 - kappa) ** (5 - i) for i in range(1, 6))]
    assert state.noise_std == pytest.approx(2 * np.linalg.norm(weights), rel=1e-12)
    for kappa in (0.0, 1.1, math.nan):
        refused("kappa must be", kalman_filter, kappa)


def test_naive_loop():
    inputs = np.random.default_rng(2).standard_normal((6, 4))
    for name, (b, a) in FILTERS.items():
        out, ones = [], []
        for t in range(6):
            out.append(
                sum(b[i] * inputs[t - i] for i in range(len(b)) if i <= t)
                - sum(a[i] * out[t - 1 - i] for i in range(len(a)) if i < t)
            )
            ones.append(
                sum(b[i] for i in range(len(b)) if i <= t)
                - sum(a[i] * ones[t - 1 - i] for i in range(len(a)) if i < t)
            )
        state = feed(LowPassFilter(b=b, a=a), inputs, [1.0] * 6)
        np.testing.assert_allclose(state.mean, out[-1] / ones[-1], rtol=1e-9, err_msg=name)


def test_noise_std_by_simulation():
    """20000 entries of pure noise whose level changes from step to step: within 3%."""
    stds = [1.0, 0.2, 3.0, 1.5, 0.7]
    for start in (exponential_average(0.8), LowPassFilter(*FILTERS["order 2"])):
        generator = seeded()
        state = feed(start, [std * torch.randn(20000, generator=generator) for std in stds], stds)
        assert float(state.mean.std()) == pytest.approx(state.noise_std, rel=0.03), start


@given(st.floats(0, 0.999), st.integers(1, 30))
def test_a_constant_comes_back(beta, steps):
    state = feed(exponential_average(beta), [np.full(3, 5.0)] * steps, [2.0] * steps)
    np.testing.assert_allclose(state.mean, 5, rtol=1e-9)
    assert 0 < state.noise_std <= 2.0 * (1 + 1e-9)
    assert len(state.outputs) == len(state.weights) == 1 and len(state.inputs) == 0


def test_state_is_frozen_and_separate():
    value = torch.ones(2, 2)
    first = exponential_average(0.5).update(value, 1.0)
    mean = first.mean.clone()
    value.mul_(100)
    second = first.update(value, 1.0)
    assert torch.equal(first.mean, mean) and not torch.equal(second.mean, mean)
    assert first.noise_std == 1.0 and second.noise_std < 1
    state = LowPassFilter(b=(1.0, 1.0)).update(value, 1.0)  # keeps its inputs
    value.zero_()
    assert torch.equal(state.update(value, 1.0).mean, torch.full((2, 2), 50.0))
    grad = torch.ones(2, 2, requires_grad=True)
    assert not exponential_average(0.5).update(grad, 1.0).mean.requires_grad


def test_average_lifts_a_signal_over_the_edge():
    """A spike that is below the edge in every gradient is above the edge in their mean."""
    generator = seeded(3)
    u, v = (torch.linalg.qr(torch.randn(n, 1, generator=generator))[0] for n in (60, 90))
    clean = 8.0 * u @ v.T  # the transition is at (60 * 90) ** 0.25 = 8.6
    state = exponential_average(0.9)
    for _ in range(20):
        noisy = clean + torch.randn(60, 90, generator=generator)
        state = state.update(noisy, 1.0)
    restored = restore(state.mean, state.noise_std, below="zero")

    def cosine(matrix):
        return float((matrix * clean).sum() / matrix.norm().clamp(min=1e-30) / clean.norm())

    assert cosine(restored) > 0.8 > 0.5 > cosine(restore(noisy, 1.0))


def test_a_state_survives_as_tensors():
    """After a round trip through safetensors, the filter continues to the bit."""
    many_poles = tuple(0.1 * i for i in range(1, 13)), (-0.05,) * 12
    for name, (b, a) in {**FILTERS, "many poles": many_poles}.items():
        for seen in (0, 1, 2, 6):
            inputs = torch.randn(seen + 13, 3, 5, generator=seeded(4))
            stds = [0.5 + 0.1 * i for i in range(seen + 13)]
            state = feed(LowPassFilter(b=b, a=a), inputs[:seen], stds[:seen])
            stored = load(save(state.tensors()))
            again = LowPassFilter(b=b, a=a).with_tensors(stored)
            for value, std in zip(inputs[seen:], stds[seen:], strict=True):
                state, again = state.update(value, std), again.update(value, std)
                assert torch.equal(state.mean, again.mean), (name, seen)
                assert state.noise_std == again.noise_std, (name, seen)
            for kept in ("inputs", "outputs", "weights"):
                assert len(getattr(again, kept)) == len(getattr(state, kept)), (name, seen, kept)


def test_a_stored_state_is_a_copy():
    state = LowPassFilter(b=(0.5, 0.5)).update(torch.ones(2, 2), 1.0)
    stored = state.tensors()
    again = LowPassFilter(b=(0.5, 0.5)).with_tensors(stored)
    want = state.update(torch.ones(2, 2), 1.0)
    for tensor in stored.values():
        tensor.fill_(77.0)
    got = again.update(torch.ones(2, 2), 1.0)
    assert torch.equal(got.mean, want.mean) and got.noise_std == want.noise_std
    assert all(tensor.dtype in (torch.float32, torch.float64) for tensor in stored.values())


def test_bad_input():
    for call, words in (
        (lambda: exponential_average(1.0), "^beta must be"),
        (lambda: exponential_average(-0.1), "^beta must be"),
        (lambda: exponential_average(math.nan), "^beta must be"),
        (lambda: exponential_average("0.9"), "^beta must be"),
        (lambda: LowPassFilter(b=()), "^b must be"),
        (lambda: LowPassFilter(b=(1.0, -1.0)), "^b must be"),
        (lambda: LowPassFilter(b=(math.inf,)), "^b must be"),
        (lambda: LowPassFilter(b=0.5), "^b must be a tuple of numbers"),
        (lambda: LowPassFilter(b=(0.1, 0.2, -0.3)), "^b must be"),  # the sum is 6e-17
        (lambda: LowPassFilter(b=(0.0, 1.0)), "^b and a must .* at step 1 is 0$"),
        (lambda: LowPassFilter(b=(0.5, -0.5, 1.0)), "^b and a must .* at step 2 is 0$"),
        (lambda: LowPassFilter(b=(1.0,), a=(-0.7, -0.3), steady_start=True), "^a must be"),
        (lambda: LowPassFilter(b=(1.0,), a=("x",)), "^a must be"),
        (lambda: exponential_average(0.5).update(torch.ones(2), -1.0), "^noise_std must be"),
        (lambda: exponential_average(0.5).update(torch.ones(2), math.inf), "^noise_std must be"),
        (lambda: exponential_average(0.5).update(np.ones(2), 1.0), "^noisy must be a torch tensor"),
        (
            lambda: exponential_average(0.5).update(torch.ones(2, dtype=torch.int64), 1.0),
            "^noisy must be",
        ),
        (lambda: exponential_average(0.5).update(torch.ones(2).half(), 1.0), "^noisy must be"),
        (
            lambda: exponential_average(0.5).update(torch.tensor([math.nan]), 1.0),
            "^noisy must have finite",
        ),
        (
            lambda: exponential_average(0.5).update(torch.ones(2), 1.0).update(torch.ones(3), 1.0),
            "^noisy must be",
        ),
        (lambda: exponential_average(0.5).mean, "must have seen a gradient"),
        (lambda: exponential_average(0.5).noise_std, "must have seen a gradient"),
    ):
        refused(words, call)
