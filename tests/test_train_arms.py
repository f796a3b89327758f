"""Optimizers and filters of `train` against a loop over examples with updates in numpy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_dp.data import collate, encode, load_task
from lowrank_dp.models import load_model, matrix_parameters
from lowrank_dp.optim.muon import bias_corrected
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.look_ahead import LookAhead
from lowrank_dp.train.loop import train
from lowrank_dp.train.optimizers import update
from lowrank_dp.train.setup import prepare
from lowrank_dp.train.state import first_state, fresh_generators, new_stream, pack, unpack
from lowrank_dp.train.step import take_step
from tests.refusals import refused

SIGMA, BOUND, BATCH, STEPS, RATE = 0.5, 0.5, 20, 4, 1e-2
STD = SIGMA * BOUND / BATCH  # of the mean gradient

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**changes):
    base = {
        "model": "tiny",
        "task": "generated",
        "noise_multiplier": SIGMA,
        "max_grad_norm": BOUND,
        "steps": STEPS,
        "batch_size": BATCH,
        "learning_rate": RATE,
        "optimizer": "sgd",
        "max_examples": 60,
        "eval_examples": 10,
        "micro_batch_size": 16,
        "eval_every": 100,
        "seed": 3,
    }
    return TrainConfig(**base | changes)


def naive(config, step, ahead=0.0):
    """Train with ``step(weights, mean gradients, state, t, matrices)`` in numpy; return weights.

    Gradients are taken one example at a time, at the weights plus ``ahead`` times the last
    movement.
    """
    task = load_task(config.task, max_examples=config.max_examples, seed=0)
    model, tokenizer = load_model(config.model, task=task, seed=config.seed)
    rows = encode(task.train, tokenizer, kind=task.kind, max_length=128)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {n for n in matrix_parameters(model) if min(trained[n].shape) > 1}
    sampler, noise = fresh_generators(config, new_stream(config, 0))
    weights = {n: p.detach().double().numpy().copy() for n, p in trained.items()}
    start = {n: w.copy() for n, w in weights.items()}
    last, state = {n: w.copy() for n, w in weights.items()}, {}
    for t in range(config.steps):
        with torch.no_grad():
            for n, p in trained.items():
                p.copy_(torch.from_numpy(weights[n] + ahead * (weights[n] - last[n])))
        draws = torch.rand(len(rows), generator=sampler, dtype=torch.float64).tolist()
        total = {n: torch.zeros_like(p) for n, p in trained.items()}
        for row, draw in zip(rows, draws, strict=True):
            if draw >= config.batch_size / len(rows):
                continue
            model.zero_grad()
            model(**collate([row], tokenizer.pad_token_id)).loss.backward()
            norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in trained.values()))
            for n, p in trained.items():
                total[n] += min(1.0, BOUND / norm) * p.grad
        for n in total:
            total[n] += SIGMA * BOUND * torch.randn(total[n].shape, generator=noise)
        mean = {n: value.double().numpy() / config.batch_size for n, value in total.items()}
        last = {n: w.copy() for n, w in weights.items()}
        step(weights, mean, state, t, matrices)
    return weights, start


def trained_by(config):
    """Weights after the steps of the package, with the final setup and state."""
    setup = prepare(config, config.seed)
    state = first_state(config, new_stream(config, 0))
    for _ in range(config.steps):
        take_step(setup, state)
    return {n: p.detach().double().numpy() for n, p in setup.trained.items()}, setup, state


def assert_equal_to(config, step, ahead=0.0, tolerance=1e-4):
    got, *_ = trained_by(config)
    want, start = naive(config, step, ahead)
    for n in want:
        moved = np.linalg.norm(want[n] - start[n])
        assert np.linalg.norm(got[n] - want[n]) <= tolerance * max(moved, 1e-3), n
    assert max(np.abs(want[n] - start[n]).max() for n in want) > 1e-3


def adam(weights, mean, state, t, matrices=(), *, beta1=0.9, correct=lambda v: v, skip=False):
    """Adam, with ``correct`` applied to the bias-corrected second moment."""
    for n, g in mean.items():
        if n in matrices or (skip and not g.any()):
            continue
        m, v, k = state.get(n, (0.0, 0.0, 0))
        m, v, k = beta1 * m + (1 - beta1) * g, 0.999 * v + 0.001 * g * g, k + 1
        state[n] = m, v, k
        root = np.sqrt(correct(v / (1 - 0.999**k)))
        weights[n] -= RATE * m / (1 - beta1**k) / (root + 1e-8)


def test_adam_bc():
    floor, phi = 0.2, STD**2
    config = small(optimizer="adam-bc", noise_floor=floor)
    assert_equal_to(
        config,
        lambda w, g, s, t, m: adam(w, g, s, t, correct=lambda v: np.maximum(v - phi, floor * phi)),
    )


@pytest.mark.slow
def test_adam_bc_on_a_running_mean_knows_its_noise():
    """In LP-DPAdamBC of DOPPLER, the noise of the mean falls from step to step."""
    beta, floor = 0.6, 0.3

    def step(weights, mean, state, t, matrices):
        state["g"] = [*state.get("g", []), mean]
        of_step = [(1 - beta) * beta**k / (1 - beta ** (t + 1)) for k in range(t + 1)][::-1]
        averaged = {
            n: sum(w * g[n] for w, g in zip(of_step, state["g"], strict=True)) for n in mean
        }
        state["std"] = [*state.get("std", []), STD * math.sqrt(sum(w * w for w in of_step))]
        seen = [0.001 * 0.999 ** (t - i) / (1 - 0.999 ** (t + 1)) for i in range(t + 1)]
        phi = sum(w * s * s for w, s in zip(seen, state["std"], strict=True))
        adam(
            weights,
            averaged,
            state,
            t,
            beta1=0.0,
            correct=lambda v: np.maximum(v - phi, floor * phi),
        )

    assert_equal_to(small(optimizer="adam-bc", momentum_beta=beta), step)


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adam", marks=pytest.mark.slow)])
def test_disk(optimizer):
    kappa = 0.7

    def step(weights, mean, state, t, matrices):
        before = state.get("filtered", mean)
        state["filtered"] = {n: (1 - kappa) * before[n] + kappa * g for n, g in mean.items()}
        if optimizer == "adam":
            return adam(weights, state["filtered"], state.setdefault("adam", {}), t)
        for n in weights:
            weights[n] -= 0.5 * state["filtered"][n]

    config = small(
        optimizer=optimizer,
        disk_kappa=kappa,
        **({"learning_rate": 0.5} if optimizer == "sgd" else {}),
    )
    assert_equal_to(config, step, ahead=0.3 / 0.7)
    with pytest.raises(AssertionError):  # the point at which gradients are taken matters
        assert_equal_to(config, step, ahead=0.0)


def test_the_look_ahead_puts_the_weights_back_to_the_bit():
    p = {"w": nn.Parameter(torch.tensor([0.1, 1e8, -3.0]))}
    look = LookAhead(0.3)
    with look.applied(p):
        assert torch.equal(p["w"], torch.tensor([0.1, 1e8, -3.0]))  # the weights have not moved yet
    with look.measured(p), torch.no_grad():
        p["w"] += 1.0
    here = p["w"].detach().clone()
    with pytest.raises(ValueError, match="within"), look.applied(p):
        torch.testing.assert_close(p["w"].detach(), here + 0.3 * look.movement["w"])
        raise ValueError("within")
    assert torch.equal(p["w"], here)


def muon(update, vectors=adam):
    def step(weights, mean, state, t, matrices):
        for n in matrices:
            state[n] = 0.9 * state.get(n, 0.0) + 0.1 * mean[n]
            scale = 0.2 * math.sqrt(max(state[n].shape))
            weights[n] -= RATE * scale * update(torch.from_numpy(state[n]), t).numpy()
        vectors(weights, mean, state, t, matrices)

    return step


def momentum_std(t):
    return STD * math.sqrt(sum((0.1 * 0.9**k) ** 2 for k in range(t + 1)))


def test_muon_bc():
    config = small(optimizer="muon-bc")
    assert_equal_to(config, muon(lambda m, t: bias_corrected(m, momentum_std(t))), tolerance=2e-3)


@pytest.mark.slow
def test_muon():
    """torch's Muon works in bfloat16, whose rounding is about 1%."""
    config = small(optimizer="muon")
    assert_equal_to(config, muon(lambda m, t: bias_corrected(m, 0.0)), tolerance=0.05)


def test_embeddings_and_vectors_are_not_muons():
    setup = prepare(small(optimizer="muon", train_embeddings=True), 3)
    names = {id(p): n for n, p in setup.trained.items()}
    of_muon, of_adam = ({names[id(p)] for p in g["params"]} for g in setup.optimizer.param_groups)
    assert of_muon == {n for n in matrix_parameters(setup.model) if min(setup.trained[n].shape) > 1}
    assert any("embeddings" in n for n in of_adam) and not any("embeddings" in n for n in of_muon)
    assert of_muon | of_adam == {*setup.trained}


def restored_by(new_values):
    """Return a step of SGD at rate 1 on matrices whose singular values are replaced."""

    def step(weights, mean, state, t, matrices):
        for n, g in mean.items():
            if g.ndim == 2 and min(g.shape) > 1:
                u, s, vh = np.linalg.svd(g, full_matrices=False)
                edge = STD * sum(map(math.sqrt, g.shape))
                acts = s[0] > edge
                state["acts"] = state.get("acts", 0) + acts
                g = (u * new_values(s, g.shape, edge)) @ vh if acts else 0 * g
            weights[n] -= g

    return step


def operator_shrunk(s, shape):
    """Clean values, in units of the noise's scale, that the spiked model gives for noisy values."""
    m, n = sorted(shape)
    y, b = s / (STD * math.sqrt(n)), m / n
    seen = np.maximum(y, 1 + math.sqrt(b))
    square = seen**2 - b - 1
    theta = np.sqrt((square + np.sqrt(np.maximum(square**2 - 4 * b, 0))) / 2)
    return np.where(y > 1 + math.sqrt(b), theta, 0), b, STD * math.sqrt(n)


def polar(s, shape, edge):
    theta, b, _ = operator_shrunk(s, shape)
    t = np.maximum(theta, 1e-9)
    cosines = np.sqrt(
        (t**4 - b) / (t**4 + b * t**2) * (t**4 - b) / (t**4 + t**2), where=theta > 0, out=0 * t
    )
    return edge * cosines


def power_law(s, shape, edge, alpha=0.9):
    theta, _, scale = operator_shrunk(s, shape)
    goal, seen = theta * scale, np.flatnonzero(theta)
    if len(seen) >= 2:
        x = np.log(np.arange(1.0, len(s) + 1))
        slope, offset = np.polyfit(x[seen], np.log(goal[seen]), 1)
        goal = np.exp(offset + slope * x)
    return (1 - alpha) * s + alpha * goal


@pytest.mark.parametrize(
    ("scheme", "options", "new_values"),
    [
        ("polar", {}, polar),
        ("partial", {"target": "power-law", "alpha": 0.9}, power_law),
    ],
)
def test_schemes_in_training(scheme, options, new_values, monkeypatch):
    """The noise is reduced to a fifth, so that some matrices have a value above the edge."""
    monkeypatch.setitem(globals(), "SIGMA", 0.05)
    monkeypatch.setitem(globals(), "STD", 0.05 * BOUND / BATCH)
    config = small(
        noise_multiplier=0.05,
        scheme=scheme,
        scheme_options=options,
        below="zero",
        learning_rate=1.0,
    )
    assert_equal_to(config, restored_by(new_values), tolerance=1e-3)


def test_a_gradient_of_zeros_moves_nothing_and_stops_the_clock():
    late = torch.tensor([[3.0, -2.0]])
    moved = {}
    for skip in (False, True):
        p = nn.Parameter(torch.zeros(1, 2))
        optimizer = torch.optim.Adam([p], betas=(0.0, 0.999))
        for t in range(25):
            p.grad = torch.zeros(1, 2) if t < 24 else late.clone()
            update(optimizer, 0.1, 0.0, skip_zeros=skip)
        moved[skip] = p.detach().abs()
    torch.testing.assert_close(moved[True], torch.full((1, 2), 0.1))
    torch.testing.assert_close(moved[False], torch.full((1, 2), 0.1 * 5), rtol=0.02, atol=0)


NEW = [
    {"optimizer": "adam-bc"},
    {"optimizer": "adam-bc", "filter_b": (0.15, -0.05), "filter_a": (-0.9,)},
    {"optimizer": "muon"},
    {"optimizer": "muon-bc"},
    {"optimizer": "adam", "disk_kappa": 0.7},
    {"disk_kappa": 0.5, "scheme": "polar", "below": "zero", "skip_zeros": True},
]


@pytest.mark.slow
def test_a_snapshot_holds_every_new_state():
    """Two steps, a snapshot, a new setup and two steps give the same bits as four steps."""
    for changes in NEW:
        config = small(noise_multiplier=0.05, **changes)
        want, *_ = trained_by(config)
        setup, state = prepare(config, 3), first_state(config, new_stream(config, 0))
        for _ in range(2):
            take_step(setup, state)
        document, tensors = pack(setup, state)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        again = prepare(config, 3)
        resumed = unpack(again, document, tensors)
        assert not resumed.restarted and resumed.step == 2
        for _ in range(2):
            take_step(again, resumed)
        for n, p in again.trained.items():
            np.testing.assert_array_equal(
                p.detach().double().numpy(), want[n], err_msg=str(changes)
            )


@pytest.mark.slow
def test_every_new_arm_trains_and_claims_the_same_epsilon(tmp_path):
    claims = set()
    for i, changes in enumerate([{}, *NEW]):
        result = train(small(**changes), tmp_path / str(i), keep_model=False)
        claims.add((result.epsilon, result.releases, result.delta))
    assert len(claims) == 1


def test_filters_are_those_of_the_papers():
    disk = small(disk_kappa=0.7).low_pass
    assert (disk.b, disk.steady_start) == ((0.7,), True) and disk.a == pytest.approx((-0.3,))
    assert small(disk_kappa=0.7).look_ahead == pytest.approx(3 / 7)
    assert small(disk_kappa=0.7, optimizer="adam").averaging == 0.9
    assert small(momentum_beta=0.7, optimizer="muon").averaging == 0.0
    assert small(optimizer="muon").averaging == 0.9
    assert small(optimizer="muon-bc", momentum_beta=0.7).averaging == 0.0
    assert small(optimizer="muon-bc", disk_kappa=0.7, beta1=0.0).averaging == 0.0


def test_what_cannot_be_is_refused():
    for changes, words in (
        ({"optimizer": "adambc"}, "did you mean 'adam-bc'"),
        ({"optimizer": "muonbc"}, "did you mean 'muon-bc'"),
        ({"scheme": "polr"}, "did you mean 'polar'"),
        ({"scheme": "polar", "scheme_options": {"k": 1}}, "scheme 'polar' takes no options"),
        (
            {"scheme": "partial", "scheme_options": {"target": "powerlaw"}},
            "did you mean 'power-law'",
        ),
        ({"optimizer": "adam-bc", "scheme": "optimal"}, "'adam-bc' must go with scheme 'none'"),
        ({"optimizer": "muon-bc", "scheme": "optimal"}, "'muon-bc' must go with scheme 'none'"),
        ({"optimizer": "muon-bc", "disk_kappa": 0.7}, "must go with beta1 0, got 0.9"),
        ({"noise_floor": 0.0}, "noise_floor must be"),
        ({"disk_kappa": 0.0}, "disk_kappa must be"),
        ({"disk_kappa": 1e-300}, "disk_kappa must be"),
        ({"disk_kappa": 1.5}, "disk_kappa must be"),
        ({"disk_kappa": 0.7, "momentum_beta": 0.9}, "momentum_beta and disk_kappa must not both"),
        ({"optimizer": "muon", "shard": True}, "shard must go without optimizer 'muon'"),
        ({"target_modules": ("query",)}, "target_modules must go with method 'lora'"),
        # fields that nothing would read
        ({"below": "zero"}, "below must go with a scheme"),
        ({"restore_method": "exact"}, "restore_method must go with a scheme"),
        ({"optimizer": "muon-bc", "noise_floor": 0.9}, "noise_floor must go with optimizer 'adam"),
        ({"rank": 4}, "rank must go with method 'lora'"),
        ({"lora_alpha": 32.0}, "lora_alpha must go with method 'lora'"),
        ({"precondition_power": 0.1}, "precondition_power must go with a preconditioner"),
        ({"precondition": "generated", "precondition_every": 3}, "with precondition 'noisy'"),
        ({"precondition": "noisy", "precondition_rows": 9}, "with a preconditioner from public"),
        (
            {"optimizer": "adam-bc", "momentum_beta": 0.9, "shard": True},
            "shard must go without optimizer 'adam-bc' on a running mean",
        ),
        ({"disk_kappa": 0.7, "shard": True}, "shard must go without disk_kappa"),
        ({"skip_zeros": True, "shard": True}, "shard must go without skip_zeros"),
    ):
        refused(words, small, **changes)
