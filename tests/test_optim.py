"""Optimizer hook against gradients restored by hand, Opacus's noise and Opacus's accountant."""

import copy
import io
import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from opacus import PrivacyEngine
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer
from opacus.schedulers import ExponentialNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from safetensors.torch import load, save
from scipy import stats
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lowrank_dp.optim as optim
from lowrank_dp.optim import attach_restoration, hook, restoration_of
from lowrank_dp.restore import LowPassFilter, exponential_average, kalman_filter, restore
from lowrank_dp.restore.noise_floor import least_norm
from tests.refusals import refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),
    pytest.mark.filterwarnings("ignore:Optimal order:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning"),
    pytest.mark.filterwarnings("ignore:Expected.*empty batches:UserWarning"),
]
MODES = ["hooks", "functorch", "ew", "ghost"]
SIGMA, BOUND, EXAMPLES, BATCH = 1.5, 0.8, 120, 30


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, 12, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def private(mode="hooks", inner=torch.optim.SGD, learning_rate=0.5, wrap=True, **arguments):
    """Return model, optimizer, loader, loss and engine, with fixed seeds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    engine = PrivacyEngine()
    arguments = {"noise_multiplier": SIGMA, "max_grad_norm": BOUND} | arguments
    loss = nn.CrossEntropyLoss()
    wrapped, optimizer, *loss, loader = engine.make_private(
        module=model,
        optimizer=inner(model.parameters(), lr=learning_rate),
        criterion=loss,
        data_loader=DataLoader(data(), batch_size=BATCH),
        grad_sample_mode=mode,
        noise_generator=torch.Generator().manual_seed(1),
        wrap_model=wrap,
        **arguments,
    )
    loss = loss[0] if loss else cross_entropy
    return wrapped if wrap else model, optimizer, loader, loss, engine


def record(optimizer, kept):
    """Append to ``kept`` a copy of every gradient that the inner optimizer gets after this call."""

    def hook(inner, args, kwargs):
        kept.append([p.grad.clone() for group in inner.param_groups for p in group["params"]])

    return optimizer.original_optimizer.register_step_pre_hook(hook)


def epoch(model, optimizer, loader, loss):
    for x, y in loader:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def is_matrix(tensor):
    return tensor.ndim == 2 and min(tensor.shape) > 1


# Opacus itself refuses expanded weights without its wrapper
@pytest.mark.parametrize(
    "mode, wrap", [(mode, wrap) for mode in MODES for wrap in (True, False) if wrap or mode != "ew"]
)
def test_equals_restoring_by_hand_in_every_mode(mode, wrap):
    model, optimizer, loader, loss, engine = private(mode, wrap=wrap)
    before, noisy, restored = weights(model), [], []
    record(optimizer, noisy)
    handle = attach_restoration(optimizer, "soft")
    record(optimizer, restored)
    epoch(model, optimizer, loader, loss)
    std = SIGMA * BOUND / optimizer.expected_batch_size
    want = before
    for old, new in zip(noisy, restored, strict=True):
        by_hand = [restore(g, std, "soft") if is_matrix(g) else g for g in old]
        torch.testing.assert_close(new, by_hand, rtol=1e-5, atol=1e-7)
        want = [w - 0.5 * g for w, g in zip(want, by_hand, strict=True)]
    torch.testing.assert_close(weights(model), want, rtol=1e-4, atol=1e-6)
    assert len(noisy) == len(loader) == len(engine_steps(engine))
    assert sorted(handle.reports) == ["0", "2"]
    assert handle.reports["0"].noise_std == pytest.approx(std)


def engine_steps(engine):
    return [step for *_, count in engine.accountant.history for step in range(count)]


def test_epsilon_and_noise_are_those_of_stock_opacus():
    plain, with_one_line = private(), private()
    gradients = [], []
    handle = attach_restoration(with_one_line[1])
    handle.remove()
    for (model, optimizer, loader, loss, _), kept in zip(
        (plain, with_one_line), gradients, strict=True
    ):
        record(optimizer, kept)
        torch.manual_seed(5)
        if kept is gradients[1]:
            attach_restoration(optimizer, below="zero")
        epoch(model, optimizer, loader, loss)
    assert plain[4].get_epsilon(1e-5) == with_one_line[4].get_epsilon(1e-5) > 0
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=0, atol=0)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(weights(plain[0]), weights(with_one_line[0]), strict=True)
    )


def test_scheme_none_changes_nothing():
    plain, passed = private(), private()
    attach_restoration(passed[1], "none")
    for model, optimizer, loader, loss, _ in (plain, passed):
        torch.manual_seed(5)
        epoch(model, optimizer, loader, loss)
    torch.testing.assert_close(weights(plain[0]), weights(passed[0]), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_once_per_logical_step_under_the_batch_memory_manager(mode):
    model, optimizer, loader, loss, engine = private(mode)
    attached = []
    attach_restoration(optimizer)
    record(optimizer, attached)
    micro = 0
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=8, optimizer=optimizer
    ) as small:
        for x, y in small:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            micro += 1
    assert len(attached) == len(loader) == len(engine_steps(engine)) < micro


def test_accumulated_batches_lower_the_noise():
    model, optimizer, loader, loss, _ = private(poisson_sampling=False)
    handle, steps = attach_restoration(optimizer), 0
    for index, (x, y) in enumerate(loader):
        loss(model(x), y).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            std = SIGMA * BOUND / (BATCH * 2)
            assert handle.reports["0"].noise_std == pytest.approx(std)
    assert steps == 2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_noise_level_against_what_opacus_draws(reduction):
    """Gradients of zero leave only noise, whose level agrees within 6 standard errors."""
    weight = nn.Parameter(torch.zeros(200, 150))
    optimizer = DPOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        noise_multiplier=SIGMA,
        max_grad_norm=BOUND,
        expected_batch_size=32,
        loss_reduction=reduction,
        generator=torch.Generator().manual_seed(0),
    )
    schedule = ExponentialNoise(optimizer, gamma=0.5)
    noisy, handle = [], attach_restoration(optimizer)
    record(optimizer, noisy)
    for _ in range(3):
        weight.grad_sample = torch.zeros(4, 200, 150)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        measured, error = float(noisy[-1][0].std()), 1 / (2 * weight.numel()) ** 0.5
        assert handle.reports["0"].noise_std == pytest.approx(measured, rel=6 * error)
        assert handle.reports["0"].action == "kept"


def adaclip(weight):
    return AdaClipDPOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        noise_multiplier=SIGMA,
        max_grad_norm=BOUND,
        expected_batch_size=32,
        generator=torch.Generator().manual_seed(0),
        target_unclipped_quantile=0.0,
        clipbound_learning_rate=1.0,
        max_clipbound=10.0,
        min_clipbound=0.01,
        unclipped_num_std=1.0,
    )


def test_adaclip_moves_its_bound_after_the_noise():
    weight = nn.Parameter(torch.zeros(200, 150))
    optimizer = adaclip(weight)
    noisy, bounds, handle = [], [], attach_restoration(optimizer)
    record(optimizer, noisy)
    for _ in range(3):
        weight.grad_sample = torch.zeros(50, 200, 150)
        bounds.append(float(optimizer.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
        measured, error = float(noisy[-1][0].std()), 1 / (2 * weight.numel()) ** 0.5
        assert handle.reports["0"].noise_std == pytest.approx(measured, rel=6 * error)
    assert bounds[2] < 0.5 * bounds[1] < 0.25 * bounds[0]


def test_adaclip_is_resumed_at_the_bound_that_the_loop_saved():
    """Opacus's state_dict lacks AdaClip's bound, so the loop saves the bound and sets it again.

    The loop may set the bound before or after the restoration is attached.
    """
    generator = torch.Generator().manual_seed(1)
    steps = 0.3 * torch.randn(4, 50, 20, 15, generator=generator) / 300**0.5

    def step(weight, optimizer, gradients):
        for samples in gradients:
            weight.grad_sample = samples
            optimizer.step()
            optimizer.zero_grad()

    weight = nn.Parameter(torch.zeros(20, 15))
    optimizer = adaclip(weight)
    handle = attach_restoration(optimizer, momentum_beta=0.5)
    step(weight, optimizer, steps[:2])
    saved = [optimizer.max_grad_norm, optimizer.state_dict(), optimizer.generator.get_state()]
    saved, start = copy.deepcopy(saved), weight.detach().clone()
    step(weight, optimizer, steps[2:])
    assert saved[0] < 0.5 * BOUND and float(optimizer.max_grad_norm) != float(saved[0])
    for order in (("bound", "attach", "load"), ("attach", "load", "bound")):
        fresh = nn.Parameter(start.clone())
        second = adaclip(fresh)
        second.generator.set_state(saved[2])
        for action in order:
            if action == "bound":
                second.max_grad_norm = saved[0].clone()  # AdaClip changes it in place
            elif action == "load":
                second.load_state_dict(saved[1])
            else:
                again = attach_restoration(second, momentum_beta=0.5)
        step(fresh, second, steps[2:])
        assert again.reports["0"].noise_std == handle.reports["0"].noise_std, order
        torch.testing.assert_close(fresh, weight, rtol=0, atol=0)
        again.remove()
        assert "update_max_grad_norm" not in vars(second)


def test_ddp_averages_the_noise_over_workers():
    weight = nn.Parameter(torch.zeros(20, 10))
    optimizer = DPOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        noise_multiplier=SIGMA,
        max_grad_norm=BOUND,
        expected_batch_size=16,
    )
    optimizer.world_size = 4  # as DistributedDPOptimizer has it
    handle = attach_restoration(optimizer, mean_noise_std=None)
    weight.grad_sample = torch.zeros(4, 20, 10)
    assert optimizer.pre_step()
    weight.grad /= optimizer.world_size  # as its reduce_gradients does
    optimizer.original_optimizer.step()
    assert handle.reports["0"].noise_std == pytest.approx(SIGMA * BOUND / 64)


def noisy_problem(inner=torch.optim.SGD, dtype=torch.float32, **settings):
    """Parameters (matrix, bias, kernel, frozen, unused) in two groups, optimizer, and gradients."""
    torch.manual_seed(0)
    shapes = [(20, 12), (20,), (4, 3, 2, 2), (6, 6), (5, 5)]
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    parameters[3].requires_grad_(False)
    signal = torch.randn(20, 1) @ torch.randn(1, 12)
    steps = []
    for _ in range(6):
        grads = [torch.randn(shape) * 0.1 for shape in shapes[:3]]
        grads[0] += signal * 0.3
        steps.append([g.to(dtype) for g in grads])
    optimizer = inner([{"params": parameters[:2]}, {"params": parameters[2:]}], **settings)
    return parameters, optimizer, steps


def run(parameters, optimizer, steps):
    for grads in steps:
        for parameter, grad in zip(parameters, grads, strict=False):
            parameter.grad = grad.clone()
        optimizer.step()
        optimizer.zero_grad()


def test_any_torch_optimizer():
    for inner, settings in (
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}),
        (torch.optim.Adam, {"lr": 0.1}),
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    ):
        parameters, optimizer, steps = noisy_problem(inner, **settings)
        attach_restoration(optimizer, mean_noise_std=0.1)
        run(parameters, optimizer, steps)
        by_hand, other, _ = noisy_problem(inner, **settings)
        restored = [[restore(g, 0.1) if g.ndim == 2 else g for g in grads] for grads in steps]
        run(by_hand, other, restored)
        for parameter, want in zip(parameters, by_hand, strict=True):
            assert torch.equal(parameter, want), inner


def test_bfloat16_is_restored_in_float32():
    parameters, optimizer, steps = noisy_problem(dtype=torch.bfloat16, lr=1.0)
    attach_restoration(optimizer, mean_noise_std=0.1)
    run(parameters, optimizer, steps[:1])
    want = -restore(steps[0][0].float(), 0.1).bfloat16()
    assert torch.equal(parameters[0], want)


def test_momentum_restores_the_running_mean_at_its_own_noise():
    parameters, optimizer, steps = noisy_problem(lr=1.0)
    handle = attach_restoration(optimizer, mean_noise_std=0.1, momentum_beta=0.8)
    states = [exponential_average(0.8) for _ in range(3)]
    want = [torch.zeros_like(p) for p in parameters[:3]]
    for grads in steps:
        run(parameters, optimizer, [grads])
        states = [s.update(g, 0.1) for s, g in zip(states, grads, strict=True)]
        means = [restore(states[0].mean, states[0].noise_std), states[1].mean, states[2].mean]
        want = [w - mean for w, mean in zip(want, means, strict=True)]
        torch.testing.assert_close(parameters[:3], want)
        assert handle.reports["0"].noise_std == pytest.approx(states[0].noise_std)
    assert handle.reports["0"].noise_std < 0.05


def test_means_of_unequal_age_keep_their_own_noise():
    parameters, optimizer, steps = noisy_problem(lr=1.0)
    handle = attach_restoration(optimizer, mean_noise_std=0.1, momentum_beta=0.8)
    run(parameters, optimizer, steps[:3])
    parameters[4].grad = torch.randn(5, 5) * 0.1
    run(parameters, optimizer, steps[3:4])
    assert handle.reports["4"].noise_std == pytest.approx(0.1) != handle.reports["0"].noise_std


def test_state_dict_continues_identically(tmp_path):
    parameters, optimizer, steps = noisy_problem(lr=1.0)
    handle = attach_restoration(optimizer, mean_noise_std=0.1, momentum_beta=0.8)
    run(parameters, optimizer, steps[:3])
    state = handle.state_dict()
    assert set(state) == {"momentum_beta"} | {
        f"{index}.{key}" for index in range(3) for key in ("output", "weights", "noise_stds")
    }
    torch.save(state, tmp_path / "state.pt")
    others = []
    for stored in (torch.load(tmp_path / "state.pt", weights_only=True), load(save(state))):
        resumed, second, _ = noisy_problem(lr=1.0)
        with torch.no_grad():
            for new, old in zip(resumed, parameters, strict=True):
                new.copy_(old)
        attach_restoration(second, mean_noise_std=0.1, momentum_beta=0.8).load_state_dict(stored)
        run(resumed, second, steps[3:])
        others.append(resumed)
    run(parameters, optimizer, steps[3:])
    for resumed in others:
        torch.testing.assert_close(resumed, parameters, rtol=0, atol=0)


FILTERS = [
    LowPassFilter(b=(0.15, -0.05), a=(-0.9,)),  # DOPPLER
    LowPassFilter(b=(0.3, 0.2, 0.1)),
    kalman_filter(0.7),
]


def test_any_filter_is_restored_at_its_own_noise_and_continues_identically():
    for low_pass in FILTERS:
        parameters, optimizer, steps = noisy_problem(lr=1.0)
        handle = attach_restoration(optimizer, mean_noise_std=0.1, low_pass=low_pass)
        states, want = [low_pass] * 3, [torch.zeros_like(p) for p in parameters[:3]]
        for t, grads in enumerate(steps):
            run(parameters, optimizer, [grads])
            states = [s.update(g, 0.1) for s, g in zip(states, grads, strict=True)]
            means = [restore(states[0].mean, states[0].noise_std), states[1].mean, states[2].mean]
            want = [w - mean for w, mean in zip(want, means, strict=True)]
            torch.testing.assert_close(parameters[:3], want)
            assert handle.reports["0"].noise_std == pytest.approx(states[0].noise_std)
            if t == 2:
                state = load(save(handle.state_dict()))
                resumed, second, _ = noisy_problem(lr=1.0)
                with torch.no_grad():
                    for new, old in zip(resumed, parameters, strict=True):
                        new.copy_(old)
        attach_restoration(second, mean_noise_std=0.1, low_pass=low_pass).load_state_dict(state)
        run(resumed, second, steps[3:])
        torch.testing.assert_close(resumed, parameters, rtol=0, atol=0)


def test_a_filters_state_must_be_the_same_filters():
    handles = []
    cold = replace(kalman_filter(0.7), steady_start=False)
    for low_pass in (*FILTERS, cold, None):
        parameters, optimizer, steps = noisy_problem(lr=1.0)
        handles.append(attach_restoration(optimizer, mean_noise_std=0.1, low_pass=low_pass))
        run(parameters, optimizer, steps[:1])
    for here in handles:
        for there in handles:
            if here is there:
                there.load_state_dict(here.state_dict())
            else:
                words = r"low_pass_[ab] of the state must be"
                refused(words, there.load_state_dict, here.state_dict())
    _, optimizer, _ = noisy_problem(lr=1.0)
    for arguments, words in (
        ({"low_pass": FILTERS[0], "momentum_beta": 0.9}, "must not both be given"),
        ({"low_pass": 0.9}, "low_pass must be a LowPassFilter"),
    ):
        refused(words, attach_restoration, optimizer, mean_noise_std=0.1, **arguments)


def test_polar_in_an_optimizer():
    """The step of a matrix is at most as large as the noise's edge, for a gradient of any size."""
    for size in (1.0, 100.0):
        parameters, optimizer, steps = noisy_problem(lr=1.0)
        attach_restoration(optimizer, "polar", mean_noise_std=0.1, below="zero")
        grad = size * steps[0][0]
        run(parameters, optimizer, [[grad, *steps[0][1:]]])
        edge = 0.1 * (20**0.5 + 12**0.5)
        top = float(torch.linalg.matrix_norm(parameters[0].detach(), 2))
        assert 0.5 * edge < top < edge
        torch.testing.assert_close(-parameters[0].detach(), restore(grad, 0.1, "polar"))


def test_state_dict_must_fit():
    _, optimizer, _ = noisy_problem(lr=1.0)
    handle = attach_restoration(optimizer, mean_noise_std=0.1)
    assert handle.state_dict() == {}
    handle.load_state_dict({})
    parameters, optimizer, steps = noisy_problem(lr=1.0)
    other = attach_restoration(optimizer, mean_noise_std=0.1, momentum_beta=0.8)
    run(parameters, optimizer, steps[:1])
    state = other.state_dict()
    refused(r"momentum_beta .* must be None", handle.load_state_dict, state)
    wrong = {"0.output": torch.ones(2, 2)}
    refused(r"parameter 0 must be of shape \(20, 12\)", other.load_state_dict, state | wrong)
    for wrong in ({"99.output": torch.ones(2)}, {"unknown": torch.ones(2)}):
        refused("state must fit", other.load_state_dict, state | wrong)


def test_remove_really_removes():
    parameters, optimizer, steps = noisy_problem(lr=1.0)
    handle = attach_restoration(optimizer, mean_noise_std=0.1)
    with pytest.raises(ValueError, match="attached yet"):
        attach_restoration(optimizer, mean_noise_std=0.1)
    handle.remove()
    handle.remove()
    run(parameters, optimizer, steps[:1])
    assert torch.equal(parameters[0], -steps[0][0])
    attach_restoration(optimizer, mean_noise_std=0.1)


def test_bad_arguments_are_refused_before_training():
    for arguments, words in (
        ({"scheme": "oracle", "values": torch.ones(12)}, "diagnosis only"),
        ({"scheme": "optmal"}, "did you mean 'optimal'"),
        ({"mean_noise_std": None}, "mean_noise_std must be"),
        ({"mean_noise_std": 0.0}, "mean_noise_std must be"),
        ({"momentum_beta": 1.0}, "beta must be"),
        ({"scheme": "truncate"}, "k must be given"),
        ({"scheme": "truncate", "k": 0}, "k must be an integer >= 1"),
        ({"kappa": 2.0}, "kappa"),
        (
            {"low_pass": exponential_average(0.5).update(torch.ones(2), 1.0)},
            "without inputs so far",
        ),
        ({"below": "drop"}, "below must be one of"),
        ({"scheme": "partial", "target": torch.ones(5)}, r"target must .* shape \(12,\)"),
    ):
        _, optimizer, _ = noisy_problem(lr=1.0)
        refused(words, attach_restoration, optimizer, **({"mean_noise_std": 0.1} | arguments))
        attach_restoration(optimizer, mean_noise_std=0.1)  # after the refusal nothing is attached
    words = "optimizer must be an Opacus DPOptimizer or a torch"
    refused(words, attach_restoration, nn.Linear(2, 2), mean_noise_std=0.1)


def test_an_optimizer_that_corrects_for_the_noise_is_refused():
    """A restored matrix holds less noise than such an optimizer would subtract."""
    for make in (
        lambda w: optim.AdamBC([w], mean_noise_std=1.0),
        lambda w: optim.Muon([w], bias_correction=True, mean_noise_std=1.0),
    ):
        weight = nn.Parameter(torch.zeros(4, 4))
        words = "optimizer must not correct for the noise"
        refused(words, attach_restoration, make(weight), mean_noise_std=1.0)
        wrapped = DPOptimizer(
            make(weight), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4
        )
        refused(words, attach_restoration, wrapped)
    attach_restoration(optim.Muon([weight]), mean_noise_std=1.0)


def test_opacus_without_noise_or_with_a_stated_one_is_refused():
    _, optimizer, *_ = private()
    refused("read from the optimizer", attach_restoration, optimizer, mean_noise_std=0.1)
    optimizer.noise_multiplier = 0.0
    refused(r"noise_multiplier .* must be > 0", attach_restoration, optimizer)


def test_gradients_without_the_stated_noise_are_refused():
    for momentum_beta in (None, 0.8):
        parameters, optimizer, _ = noisy_problem(lr=1.0)
        handle = attach_restoration(
            optimizer, mean_noise_std=0.1, momentum_beta=momentum_beta, scheme="none"
        )
        nan = torch.full((20, 12), torch.nan)
        for grad, words in (
            (0.001 * torch.ones(20, 12), r"parameter 0 \(20, 12\) must hold noise"),
            (torch.zeros(20, 12), r"parameter 0 \(20, 12\) must hold noise"),
            (nan, "NaN or infinity"),
        ):
            parameters[0].grad = grad
            refused(words, optimizer.step)
            assert torch.equal(parameters[0], torch.zeros(20, 12))
            # a refused step leaves the running means as they were
            assert len(handle.state_dict()) == (0 if momentum_beta is None else 1)


def test_the_floor_on_the_norm_is_never_crossed_by_noise():
    generator = torch.Generator().manual_seed(0)
    for entries in (4, 16, 100, 2500):
        norms = torch.randn(20_000, entries, generator=generator).norm(dim=1)
        assert least_norm(entries) < float(norms.min())
    assert least_norm(10**8) == pytest.approx(0.9e4, rel=1e-3)
    # nine tenths of a norm that noise falls below once in 1e12 draws
    for entries in (1, 2, 30, 1000):
        assert stats.chi(entries).cdf(least_norm(entries) / 0.9) == pytest.approx(1e-12, rel=1e-6)


def test_a_closure_is_refused():
    _, optimizer, _ = noisy_problem(lr=1.0)
    attach_restoration(optimizer, mean_noise_std=0.1)
    optimizer.step(None)
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(ValueError, match="without a closure"):
            call()


def test_shards_and_sparse_gradients_are_refused():
    from torch.distributed.tensor import DTensor  # no process group: any subclass's marker does

    assert hasattr(DTensor, "full_tensor")
    parameters, optimizer, steps = noisy_problem(lr=1.0)
    parameters[0].full_tensor = lambda: None
    with pytest.raises(ValueError, match="parameter 0 must be one dense tensor"):
        attach_restoration(optimizer, mean_noise_std=0.1)
    del parameters[0].full_tensor
    attach_restoration(optimizer, mean_noise_std=0.1)
    parameters[0].grad = steps[0][0].to_sparse()
    with pytest.raises(ValueError, match="parameter 0 must be one dense tensor"):
        optimizer.step()


def trainer(tmp_path, callback, **settings):
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(12, 10)

        def forward(self, x, labels):
            return {"loss": cross_entropy(self.layer(x), labels)}

    class NoisyTrainer(Trainer):  # stands for one that also clips each example
        generator = torch.Generator().manual_seed(3)
        noisy = ()

        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            for p in model.parameters():
                p.grad += 0.2 * torch.randn(p.shape, generator=self.generator)
            self.noisy = [*self.noisy, model.layer.weight.grad.clone()]
            return loss

    x, labels = data().tensors
    rows = [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]
    model = Model()
    settings = {"max_grad_norm": 0.0} | settings
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=20,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=0.5,
        **settings,
    )
    return NoisyTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        callbacks=[callback],
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None),
    )


def test_hugging_face_callback(tmp_path):
    callback = optim.RestorationCallback("soft", mean_noise_std=0.2)
    run = trainer(tmp_path, callback, lr_scheduler_type="constant")
    want = run.model.layer.weight.detach().clone()
    run.train()
    for grad in run.noisy:
        want -= 0.5 * restore(grad, 0.2, "soft")
    assert len(run.noisy) == 4
    torch.testing.assert_close(run.model.layer.weight.detach(), want)
    first = callback.handle
    run.train()  # attaches anew
    assert callback.handle is not first
    assert not hook.unwrap(run.optimizer)._optimizer_step_pre_hooks


def test_hugging_face_clipping_is_refused(tmp_path):
    run = trainer(tmp_path, optim.RestorationCallback(mean_noise_std=0.2), max_grad_norm=1.0)
    with pytest.raises(ValueError, match="max_grad_norm of TrainingArguments must be 0"):
        run.train()


def test_importing_stays_light():
    code = "import sys, lowrank_dp.optim; assert not {'opacus', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
def test_the_example_runs():
    example = Path(__file__).parent.parent / "examples" / "opacus_restoration.py"
    done = subprocess.run(
        [sys.executable, str(example)], check=True, capture_output=True, text=True, timeout=120
    )
    lines = done.stdout.splitlines()
    epsilons = [line.split("epsilon")[1] for line in lines]
    losses = [float(line.split("loss")[1].split()[0]) for line in lines]
    assert len(lines) == 2
    assert epsilons[0] == epsilons[1]
    assert max(losses) < 1.3  # the untrained model has log 4 = 1.386; the example claims no order


def test_an_optimizer_with_a_restoration_refuses_to_be_pickled():
    """A pickled or shallow copy would lose the hooks of torch, and step without restoration."""

    def pickled(optimizer):
        return pickle.loads(pickle.dumps(optimizer))

    def saved(optimizer):
        torch.save(optimizer, io.BytesIO())

    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        weight = torch.nn.Parameter(torch.zeros(4, 4))
        optimizer = kind([weight], lr=1.0)
        handle = attach_restoration(optimizer, mean_noise_std=1.0)
        for copied in (copy.copy, pickled, saved):
            for thing in (optimizer, {"in": [optimizer]}, handle):
                if copied is copy.copy and thing is not optimizer:
                    continue  # which shares the optimizer
                refused(r"^an optimizer .* must not be pickled .*remove\(\) the", copied, thing)
        state = copy.deepcopy(optimizer.state_dict())
        handle.remove()
        handle.remove()
        for copied in (copy.copy, copy.deepcopy, pickled):
            other = copied(optimizer)
            other.load_state_dict(state)
            again = attach_restoration(other, mean_noise_std=1.0)
            parameter = other.param_groups[0]["params"][0]
            parameter.grad = torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0]))
            other.step()
            assert parameter.grad[0, 0] == pytest.approx(65**0.5) and not parameter.grad[1:].any()
            again.remove()


def test_a_deep_copy_restores_in_the_same_state():
    for inner in (torch.optim.SGD, torch.optim.Adam):
        parameters, optimizer, steps = noisy_problem(inner, lr=0.5)
        handle = attach_restoration(optimizer, mean_noise_std=0.1, low_pass=FILTERS[2])
        run(parameters, optimizer, steps[:3])
        pair = parameters, optimizer  # a copy of both, so that the optimizer moves the copies
        others, second = copy.deepcopy(pair)
        kept = {name: tensor.clone() for name, tensor in handle.state_dict().items()}
        own = restoration_of(second)
        assert own is not handle and restoration_of(optimizer) is handle
        run(others, second, steps[3:])
        for name, tensor in handle.state_dict().items():
            assert torch.equal(tensor, kept[name]), name  # the states are separate
        run(parameters, optimizer, steps[3:])
        torch.testing.assert_close(others, parameters, rtol=0, atol=0)
        copied = copy.deepcopy(own)  # a handle is copied with its optimizer
        assert copied is not own and copied._inner is not second
        third = copy.deepcopy(second)
        own.remove()
        assert restoration_of(second) is None and restoration_of(third) is not None
        others[0].grad = steps[0][0].clone()
        second.step()
        assert torch.equal(others[0].grad, steps[0][0])  # no restoration is left


def test_a_copy_of_opacus_is_refused():
    """Opacus's own deepcopy fails without a restoration too, and leaves its class patched."""
    _, optimizer, *_ = private()
    handle = attach_restoration(optimizer)
    for thing in (optimizer, optimizer.original_optimizer, handle):
        for copied in (copy.deepcopy, pickle.dumps):
            refused("DPOptimizer not by copy.deepcopy", copied, thing)
    handle.remove()
    copy.deepcopy(optimizer.original_optimizer)


def copied_weights(parameters):
    with torch.no_grad():
        fresh, *_ = noisy_problem(lr=1.0)
        for new, old in zip(fresh, parameters, strict=True):
            new.copy_(old)
    return fresh


def test_the_optimizers_own_state_dict_holds_the_running_means():
    """The state passes through a file, and is loaded before or after a restoration is attached."""
    settings = {"betas": (0.0, 0.999)}
    cases = [{"momentum_beta": 0.8}, *({"low_pass": low_pass} for low_pass in FILTERS)]
    for arguments in cases:
        parameters, optimizer, steps = noisy_problem(torch.optim.Adam, lr=0.1, **settings)
        arguments = {"mean_noise_std": 0.1} | arguments
        attach_restoration(optimizer, **arguments)
        run(parameters, optimizer, steps[:3])
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        ended = []
        for attach_first in (True, False):
            fresh = copied_weights(parameters)
            groups = [{"params": fresh[:2]}, {"params": fresh[2:]}]
            second = torch.optim.Adam(groups, lr=0.1, **settings)
            if attach_first:
                attach_restoration(second, **arguments)
            file.seek(0)
            second.load_state_dict(torch.load(file, weights_only=True))
            if not attach_first:
                attach_restoration(second, **arguments)
            assert hook.STATE not in second.state
            run(fresh, second, steps[3:])
            ended.append(fresh)
        run(parameters, optimizer, steps[3:])
        for fresh in ended:
            torch.testing.assert_close(fresh, parameters, rtol=0, atol=0)


def test_a_state_dict_without_the_right_running_means():
    parameters, optimizer, steps = noisy_problem(lr=1.0)
    handle = attach_restoration(optimizer, mean_noise_std=0.1, momentum_beta=0.8)
    run(parameters, optimizer, steps[:2])
    state = optimizer.state_dict()
    handle.remove()
    assert hook.STATE not in optimizer.state_dict()["state"]
    for beta in (None, 0.9):  # another filter is refused: nothing is attached and nothing is loaded
        _, second, _ = noisy_problem(lr=1.0)
        second.load_state_dict(state)
        refused("momentum_beta of the state", attach_restoration, second,
                mean_noise_std=0.1, momentum_beta=beta)  # fmt: skip
        assert restoration_of(second) is None
        _, second, _ = noisy_problem(lr=1.0)
        attach_restoration(second, mean_noise_std=0.1, momentum_beta=beta)
        refused("momentum_beta of the state", second.load_state_dict, state)
    plain, second, _ = noisy_problem(lr=1.0)  # an optimizer without restoration may load it
    second.load_state_dict(state)
    with pytest.warns(UserWarning, match="holds the running means of a restoration"):
        run(plain, second, steps[:1])
    assert torch.equal(plain[0], -steps[0][0])
    attach_restoration(second, mean_noise_std=0.1, momentum_beta=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(plain, second, steps[1:2])
    _, second, _ = noisy_problem(lr=1.0)
    attach_restoration(second, mean_noise_std=0.1, momentum_beta=0.8)
    with pytest.warns(UserWarning, match="holds no running means"):
        second.load_state_dict(noisy_problem(lr=1.0)[1].state_dict())


def test_a_second_momentum_is_warned_of():
    parameters = noisy_problem(lr=1.0)[0]
    averaged = {"momentum_beta": 0.8}
    doppler, disk = ({"low_pass": low_pass} for low_pass in (FILTERS[0], FILTERS[2]))
    for optimizer, filtered, words in (
        (torch.optim.Adam(parameters), averaged, r"betas\[0\] of Adam should be 0 .* got 0.9"),
        (torch.optim.AdamW(parameters), doppler, r"betas\[0\] of AdamW should be 0"),
        (torch.optim.SGD(parameters, momentum=0.5), averaged, "momentum of SGD .* got 0.5"),
        (optim.Muon(parameters[:1]), averaged, "momentum of Muon should be 0"),
        (torch.optim.Adam(parameters, betas=(0.0, 0.9)), averaged, None),
        (torch.optim.SGD(parameters), averaged, None),
        (torch.optim.Adam(parameters), {}, None),
        (torch.optim.Adam(parameters), disk, None),  # DiSK filters the gradients of Adam
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attach_restoration(optimizer, mean_noise_std=0.1, **filtered)
        assert len(caught) == (words is not None), (optimizer, filtered)
        if words:
            assert re.search(words, str(caught[0].message)), str(caught[0].message)
            assert caught[0].filename == __file__  # the line of the caller


@pytest.mark.slow
def test_a_resumed_trainer_ends_with_the_weights_of_one_that_was_not_stopped(tmp_path):
    """With a real Trainer, the checkpoint holds the running means beside Adam's moments."""
    from transformers import Trainer, TrainingArguments

    from lowrank_dp.models import load_model, load_tokenizer

    tokenizer = load_tokenizer("tiny")
    texts = [f"a film of {word} number {n}" for n in range(8) for word in ("good", "bad")]
    rows = [
        {**tokenizer(text, padding="max_length", max_length=24), "labels": int("bad" in text)}
        for text in texts
    ]

    class NoisyTrainer(Trainer):  # stands for one that also clips each example
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            for p in model.parameters():
                if p.grad is not None:
                    p.grad += 0.01 * torch.randn(p.shape)  # of the generator that Trainer restores
            return loss

    def trained(folder, steps, resume=None, drop=False, **filtered):
        model, _ = load_model("tiny", kind="classification", num_labels=2)
        args = TrainingArguments(
            output_dir=str(folder), max_steps=steps, save_steps=2, save_strategy="steps",
            per_device_train_batch_size=4, max_grad_norm=0.0, adam_beta1=0.0, learning_rate=1e-2,
            lr_scheduler_type="constant", report_to=[], disable_tqdm=True, use_cpu=True, seed=3,
        )  # fmt: skip
        callback = optim.RestorationCallback(mean_noise_std=0.01, **filtered)
        run = NoisyTrainer(model=model, args=args, train_dataset=rows, callbacks=[callback])
        if drop:
            path = Path(resume) / "optimizer.pt"
            state = torch.load(path, weights_only=True)
            del state["state"][hook.STATE]
            torch.save(state, path)
        run.train(resume_from_checkpoint=resume)
        return [p.detach().clone() for p in model.parameters()]

    averaged = {"momentum_beta": 0.8}
    whole = trained(tmp_path / "whole", 4, **averaged)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")  # where another process was stopped
    resumed = trained(tmp_path / "resumed", 4, checkpoint, **averaged)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    with pytest.warns(UserWarning, match="holds no running means .* start anew"):
        other = trained(tmp_path / "lost", 4, checkpoint, drop=True, **averaged)
    assert any(not torch.equal(a, b) for a, b in zip(other, whole, strict=True))
