"""The training loop against one-by-one autograd, its privacy against dp-accounting, its guards."""

import json
import math
import random
import warnings
from contextlib import nullcontext
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
import torch
import transformers
from dp_accounting import pld
from scipy import stats
from torch import nn

from lowrank_dp._rounding import rounded_up
from lowrank_dp.data import collate, encode, load_task
from lowrank_dp.evaluation import evaluate
from lowrank_dp.evaluation.models import evaluated_rows
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.membership.units import draw_members, fingerprint, group_units
from lowrank_dp.models import load_model
from lowrank_dp.train import TrainConfig, TrainResult, guards, load_result
from lowrank_dp.train import setup as preparation
from lowrank_dp.train import step as step_module
from lowrank_dp.train.loop import train
from lowrank_dp.train.noise_checks import NoiseCheck
from lowrank_dp.train.records import check_room
from lowrank_dp.train.result import sensitive_fields
from lowrank_dp.train.setup import prepare
from lowrank_dp.train.state import first_state, fresh_generators, new_stream, pack, unpack
from tests.oracles import optimal_values
from tests.tasks import save_bert, write_jsonl

SIGMA, BOUND, BATCH, STEPS, RATE = 0.8, 0.5, 20, 4, 1e-2
COUNT = len(load_task("generated", max_examples=80).train)  # about 80


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
        "max_examples": 80,
        "eval_examples": 30,
        "micro_batch_size": 16,
        "eval_every": 2,
        "seed": 3,
    }
    return TrainConfig(**base | changes)


def tables(**changes):
    return small(
        **{
            "model": "tiny-llama",
            "task": "generated-table",
            "max_examples": 60,
            "batch_size": 8,
            "eval_examples": 12,
            "generate": False,
            **changes,
        }
    )


# The oracle does all that the loop does, one example and one matrix at a time.


def one_by_one(config, *, restore=None, beta=None, seed=3):
    """Return weights by name after and before training, and the number of restored matrices."""
    task = load_task(config.task, max_examples=config.max_examples, seed=config.data_seed)
    model, tokenizer = load_model(
        config.model,
        task=task,
        method=config.method,
        rank=config.rank,
        seed=seed,
        lora_init=config.lora_init,
        train_layers=config.train_layers,
    )
    rows = encode(
        task.train, tokenizer, kind=task.kind, max_length=128 if task.num_labels else None
    )
    units = [[i] for i in range(len(rows))]
    if config.unit == "group":
        groups = {}
        for i, example in enumerate(task.train):
            groups.setdefault(example.group, []).append(i)
        units = list(groups.values())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    beta1 = (
        config.beta1
        if config.beta1 is not None
        else (0.0 if config.optimizer == "sgd" or beta is not None else 0.9)
    )
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(
            p, lr=1.0, momentum=beta1, weight_decay=config.weight_decay
        ),
        "adam": lambda p: torch.optim.Adam(
            p, lr=1.0, betas=(beta1, 0.999), weight_decay=config.weight_decay
        ),
        "adamw": lambda p: torch.optim.AdamW(
            p, lr=1.0, betas=(beta1, 0.999), weight_decay=config.weight_decay
        ),
    }[config.optimizer](list(trained.values()))
    sampler, noise = fresh_generators(config, new_stream(config, 0))
    noisy = not (config.non_private or config.noise_free)
    std = SIGMA_OF[config.noise_multiplier] * config.max_grad_norm if noisy else 0.0
    means = {name: torch.zeros_like(p) for name, p in trained.items()}
    restored = kept = 0
    for step in range(config.steps):
        draws = torch.rand(len(units), generator=sampler, dtype=torch.float64)
        chosen = [
            unit
            for unit, draw in zip(units, draws.tolist(), strict=True)
            if draw < config.batch_size / len(units)
        ]
        if config.unit == "group":
            picks = torch.rand(len(chosen), generator=sampler, dtype=torch.float64).tolist()
            chosen = [
                [unit[math.floor(pick * len(unit))]]
                for unit, pick in zip(chosen, picks, strict=True)
            ]
        total = {name: torch.zeros_like(p) for name, p in trained.items()}
        for (row,) in chosen:
            model.zero_grad()
            model(**collate([rows[row]], tokenizer.pad_token_id)).loss.backward()
            gradients = {name: p.grad for name, p in trained.items()}
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
            factor = 1.0 if config.non_private else min(1.0, config.max_grad_norm / norm)
            for name, gradient in gradients.items():
                total[name] += factor * gradient
        for name in total:
            if noisy:
                total[name] += std * torch.randn(total[name].shape, generator=noise)
        level = std
        if beta is not None:
            for name in total:
                means[name] = beta * means[name] + (1 - beta) * total[name]
            total = {name: mean / (1 - beta ** (step + 1)) for name, mean in means.items()}
            weights = (1 - beta) * beta ** np.arange(step + 1) / (1 - beta ** (step + 1))
            level = std * math.sqrt(float((weights**2).sum()))
        for name, gradient in total.items():
            if restore and gradient.ndim == 2 and min(gradient.shape) > 1:
                total[name], acted = restore(gradient, level)
                restored, kept = restored + acted, kept + (not acted)
        for name, p in trained.items():
            p.grad = total[name] / config.batch_size
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * SCHEDULES[config.schedule][step]
        optimizer.step()
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    return after, before, (restored, kept)


SIGMA_OF = {None: 0.0, 0.8: 0.8, 0.05: 0.05}
SCHEDULES = {
    "constant": [1, 1, 1, 1],
    "linear": [1, 0.75, 0.5, 0.25],
    "constant_with_warmup": [1 / 2, 1, 1, 1],
    "cosine": [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)],
}


def shrink(matrix, std):
    """Shrink by Gavish & Donoho 2017, Frobenius loss; a matrix with all below the edge stays."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = optimal_values(s.tolist(), matrix.shape, std)
    if not values.any():
        return matrix, False
    return (u @ torch.diag(torch.from_numpy(values)) @ vh).to(matrix), True


def weights_of(folder, config):
    task = load_task(config.task, max_examples=config.max_examples, seed=config.data_seed)
    model, _ = load_model(str(folder), task=task, seed=config.seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same_weights(got, want, before, trained, tolerance):
    """Compare to ``tolerance`` of the distance that each parameter moved, in Frobenius norm.

    The comparison is not entry by entry: Adam divides an entry by its own gradient, so where the
    gradient is nearly zero, rounding that differs between processors moves the entry by a part of
    the learning rate.
    """
    assert got.keys() == want.keys()
    for name in want:
        difference = float((got[name] - want[name]).norm())
        moved = float((want[name] - before[name]).norm())
        assert difference <= tolerance * max(moved, 1e-2), (name, difference, moved)
        if not trained(name):
            assert torch.equal(got[name], before[name]), name
    assert max(float((want[name] - before[name]).abs().max()) for name in want) > 1e-3


def always(name):
    return True


def full(name):
    return "embeddings" not in name or "LayerNorm" in name


def lora(name):
    return "lora_" in name or "modules_to_save" in name


def lora_b(name):
    return lora(name) and "lora_A" not in name


EQUAL = [
    ({}, full),
    ({"optimizer": "adam"}, full),
    ({"method": "lora"}, lora),
    ({"method": "lora", "optimizer": "adam", "lora_init": "gaussian"}, lora),
    ({"method": "lora-frozen-a", "optimizer": "adam"}, lora_b),
    ({"method": "lora-frozen-a", "beta1": 0.9, "schedule": "linear"}, lora_b),
    (
        {
            "beta1": 0.5,
            "weight_decay": 0.1,
            "schedule": "constant_with_warmup",
            "warmup_steps": 2,
        },
        full,
    ),
    (
        {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "train_layers": 1},
        always,
    ),
    ({"noise_multiplier": None, "non_private": True, "learning_rate": 0.1}, full),
    (
        {"noise_multiplier": None, "non_private": True, "optimizer": "adam", "method": "lora"},
        lora,
    ),
    ({"noise_multiplier": None, "noise_free": True, "learning_rate": 1.0}, full),
]


@pytest.mark.parametrize(
    ("changes", "trained"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (i > 0)) for i, case in enumerate(EQUAL)],
)
def test_equals_training_one_example_at_a_time(changes, trained, tmp_path):
    config = small(**changes)
    result = train(config, tmp_path)
    want, before, _ = one_by_one(config)
    # without noise, Adam divides even the rounding of a gradient by its own size
    tolerance = 1e-4 if config.adds_noise else 1e-3
    assert_same_weights(weights_of(tmp_path, config), want, before, trained, tolerance)
    assert result.releases == STEPS and load_result(tmp_path) == result


@pytest.mark.slow
def test_equals_it_for_groups_of_rows(tmp_path):
    config = tables(unit="group", optimizer="adam", learning_rate=1e-3)
    result = train(config, tmp_path)
    want, before, _ = one_by_one(config)
    assert_same_weights(weights_of(tmp_path, config), want, before, always, 1e-4)
    task = load_task("generated-table", max_examples=60, seed=0)
    groups = len({example.group for example in task.train})
    assert groups < len(task.train)
    assert result.sample_rate == 8 / groups and result.delta == pytest.approx(groups**-1.1)
    assert "one group" in result.privacy


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1.0},
        {"optimizer": "adam", "method": "lora"},
        {"optimizer": "adam", "momentum_beta": 0.9},
    ],
)
def test_equals_restoring_every_matrix_by_hand(changes, tmp_path):
    """Noise is small, so that some matrices have a value above the edge and some have none."""
    config = small(noise_multiplier=0.05, scheme="optimal", restore_method="exact", **changes)
    train(config, tmp_path)
    want, before, (restored, kept) = one_by_one(config, restore=shrink, beta=config.momentum_beta)
    assert restored >= 4 and kept >= (4 if config.method == "lora" else 0)
    assert_same_weights(weights_of(tmp_path, config), want, before, always, 1e-3)


@pytest.mark.slow
def test_equals_a_running_mean_by_hand(tmp_path):
    config = small(optimizer="adam", momentum_beta=0.7)
    train(config, tmp_path)
    want, before, _ = one_by_one(config, beta=0.7)
    assert_same_weights(weights_of(tmp_path, config), want, before, full, 1e-4)
    # the bias correction and Adam's beta1 = 0 matter: an oracle without either is far off
    other, *_ = one_by_one(small(optimizer="adam", beta1=0.7))
    name = "classifier.weight"
    assert float((other[name] - want[name]).abs().max()) > 1e-3


@pytest.mark.slow
def test_equals_it_for_scores_and_on_a_decoder(tmp_path):
    """The model is a regression on pairs of texts, or a Llama that classifies."""
    for split, count in (("train", 40), ("validation", 10)):
        rows = [
            {"sentence1": f"film {i}", "sentence2": f"plot {i % 7}", "label": i % 5 / 2}
            for i in range(count)
        ]
        write_jsonl(tmp_path / "pairs" / f"{split}.jsonl", rows)
    for name, changes in (
        ("scores", {"task": str(tmp_path / "pairs"), "max_examples": None}),
        ("decoder", {"model": "tiny-llama", "max_examples": 40}),
    ):
        config = small(optimizer="adam", **changes)
        result = train(config, tmp_path / name)
        want, before, _ = one_by_one(config)
        assert_same_weights(weights_of(tmp_path / name, config), want, before, always, 1e-4)
        metrics = {"pearson", "spearman"} if name == "scores" else {"accuracy"}
        assert metrics <= result.curve[-1].keys()


@pytest.mark.slow
def test_mixed_precision_stays_near(tmp_path):
    """bf16 keeps 8 bits of a gradient, an error that is smaller than the noise."""
    for precision in ("float32", "bf16"):
        train(small(precision=precision), tmp_path / precision)
    one, other = (weights_of(tmp_path / name, small()) for name in ("float32", "bf16"))
    largest = max(float((one[name] - other[name]).abs().max()) for name in one)
    assert 0 < largest < 1e-2 * RATE


@pytest.mark.slow
def test_a_filter_of_one_pole_is_the_running_mean(tmp_path):
    by_filter = small(optimizer="adam", filter_b=(0.3,), filter_a=(-0.7,))
    train(by_filter, tmp_path / "filter")
    train(small(optimizer="adam", momentum_beta=0.7), tmp_path / "momentum")
    first, second = (weights_of(tmp_path / name, by_filter) for name in ("filter", "momentum"))
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_micro_batch_size(tmp_path):
    runs = {}
    for size in (1, 5, 64):
        config = small(micro_batch_size=size, optimizer="adam", steps=3)
        train(config, tmp_path / str(size))
        runs[size] = weights_of(tmp_path / str(size), config)
    for name, p in runs[64].items():
        for size in (1, 5):
            assert float((p - runs[size][name]).abs().max()) < 1e-5, (name, size)


@pytest.mark.slow
def test_same_seed_same_bits_and_another_seed_another_run(tmp_path):
    model = str(backbone(tmp_path))
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        before = torch.get_rng_state()
        train(small(seed=seed, steps=2, model=model, dropout=True), tmp_path / name)
        assert torch.equal(torch.get_rng_state(), before)  # dropout drew from its own stream
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again != other


def backbone(folder, dropout=0.1):
    """Save a BERT of two layers with dropout, with random weights."""
    path = folder / "backbone"
    if not path.exists():
        save_bert(
            path,
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=48,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    return path


@pytest.mark.slow
def test_dropout_only_where_it_is_asked_for(tmp_path):
    """Training without --dropout equals training of the same weights configured without dropout."""
    weights = {}
    for name, rate, dropout in (("off", 0.3, False), ("none", 0.0, True), ("on", 0.3, True)):
        folder = tmp_path / name
        folder.mkdir()
        model = backbone(folder, rate)
        train(small(model=str(model), dropout=dropout, steps=2), folder / "run")
        weights[name] = (folder / "run" / "model.safetensors").read_bytes()
    assert weights["off"] == weights["none"] != weights["on"]


# Poisson sampling


def test_an_empty_sample_is_a_release_of_noise(tmp_path):
    """The step of an empty sample moves the weights by the noise alone."""
    seed = next(
        seed
        for seed in range(100)
        if not (
            torch.rand(
                COUNT,
                generator=fresh_generators(config := small(seed=seed), new_stream(config, 0))[0],
                dtype=torch.float64,
            )
            < 1 / COUNT
        ).any()
    )
    config = small(seed=seed, steps=1, batch_size=1, learning_rate=0.5)
    result = train(config, tmp_path)
    assert result.releases == 1 and result.sample_rate == 1 / COUNT
    _, noise = fresh_generators(config, new_stream(config, 0))
    task = load_task("generated", max_examples=80, seed=config.data_seed)
    model, _ = load_model("tiny", task=task, seed=seed)
    got = weights_of(tmp_path, config)
    for name, p in model.named_parameters():
        step = torch.zeros_like(p)
        if p.requires_grad:
            step = 0.5 * SIGMA * BOUND * torch.randn(p.shape, generator=noise)
            assert float(step.abs().max()) > 0.1
        torch.testing.assert_close(got[name], p - step, rtol=0, atol=1e-6)
    assert result.epsilon == pytest.approx(
        GaussianMechanism(SIGMA, BOUND, 1 / COUNT).epsilon(1, result.delta)
    )


@pytest.mark.slow
def test_a_sampled_group_takes_part_with_one_of_its_rows():
    """Over 400 draws: one row per group, each row of a group equally often (false alarm 1e-6)."""
    setup = prepare(tables(unit="group"), 3)
    group_of = {
        tuple(row["input_ids"]): unit
        for unit, positions in enumerate(setup.unit_rows)
        for row in [setup.rows[i] for i in positions]
    }
    assert max(map(len, setup.unit_rows)) == 3
    seen = dict.fromkeys(group_of, 0)
    per_group = [0] * len(setup.unit_rows)
    sampler, again = (torch.Generator().manual_seed(0) for _ in range(2))
    for _ in range(400):
        chosen = step_module._sample(setup.unit_rows, setup.mechanism, sampler, one_each=True)
        rows = [tuple(setup.rows[row]["input_ids"]) for row in chosen]
        groups = [group_of[row] for row in rows]
        drawn = torch.rand(len(per_group), generator=again, dtype=torch.float64)
        taken = (drawn < setup.mechanism.sample_rate).nonzero().flatten().tolist()
        torch.rand(len(taken), generator=again, dtype=torch.float64)
        assert sorted(groups) == taken
        for row, group in zip(rows, groups, strict=True):
            seen[row] += 1
            per_group[group] += 1
    alarms = 1e-6 / (len(seen) + 1)
    for row, group in group_of.items():
        size = len(setup.unit_rows[group])
        if size > 1:
            assert stats.binomtest(seen[row], per_group[group], 1 / size).pvalue > alarms
    expected = 8 / len(per_group)
    assert stats.binomtest(sum(per_group), 400 * len(per_group), expected).pvalue > alarms


# Privacy


def by_dp_accounting(sigma, rate, steps, delta):
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    accountant = pld.PLDAccountant(value_discretization_interval=5e-4)
    return accountant.compose(event, steps).get_epsilon(delta)


@pytest.mark.slow
def test_epsilon_is_that_of_dp_accounting(tmp_path):
    result = train(small(), tmp_path / "plain", keep_model=False)
    document = json.loads((tmp_path / "plain" / "training.json").read_text())
    assert document["epsilon"] == result.epsilon
    assert document["delta"] == result.delta == pytest.approx(COUNT**-1.1)
    exact = by_dp_accounting(SIGMA, BATCH / COUNT, STEPS, document["delta"])
    assert exact - 1e-9 <= document["epsilon"] <= exact * 1.001 + 1e-3
    for words in (
        f"({rounded_up(result.epsilon)}, {rounded_up(result.delta, 6)})-DP after 4 steps",
        "PLD",
        f"Poisson sampling at rate {rounded_up(BATCH / COUNT)}",
        "add or remove one example",
        f"the number of examples ({COUNT}) is public",
        "RDP cross-check",
        "noise_multiplier 0.8",
        "max_grad_norm 0.5",
        "seed 3",
        "not secret",
    ):
        assert words in result.privacy, words
    restored = train(
        small(scheme="optimal", momentum_beta=0.9), tmp_path / "restored", keep_model=False
    )
    assert restored.epsilon == result.epsilon and restored.privacy == result.privacy
    unseeded = train(small(seed=None), tmp_path / "unseeded", keep_model=False)
    assert unseeded.epsilon == result.epsilon and "secret" not in unseeded.privacy


@pytest.mark.slow
def test_a_target_epsilon_is_met(tmp_path):
    config = small(noise_multiplier=None, epsilon=3.0, delta=1e-4, steps=3)
    result = train(config, tmp_path, keep_model=False)
    assert result.epsilon <= 3.0 and result.delta == 1e-4
    exact = by_dp_accounting(result.noise_multiplier, BATCH / COUNT, 3, 1e-4)
    assert 2.98 < exact <= 3.0
    assert by_dp_accounting(result.noise_multiplier - 1e-3, BATCH / COUNT, 3, 1e-4) > exact


def test_a_schedule_begins_at_the_whole_rate_after_its_warm_up():
    """Two of six steps warm up, at half and at full rate; the schedule covers the other four."""
    for schedule, rest in (
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
        ("constant_with_warmup", [1, 1, 1, 1]),
    ):
        rate = prepare(small(steps=6, warmup_steps=2, schedule=schedule), 3).learning_rate
        found = [rate(step) / RATE for step in range(6)]
        assert found == pytest.approx([0.5, 1, *rest]), schedule


def test_large_delta_is_warned_of():
    with pytest.warns(UserWarning, match=f"delta {1 / COUNT:g} is not below 1/N = {1 / COUNT:.3g}"):
        setup = prepare(small(delta=1 / COUNT), 3)
    assert "publishing a whole record" in setup.statement(STEPS)
    assert "publishing" not in prepare(small(delta=0.9 / COUNT), 3).statement(STEPS)


def test_a_step_and_its_restoration_are_timed_apart(monkeypatch):
    """Two steps take 20 s and 7 s, of which restoring takes 3 s and 1 s; a snapshot keeps both."""
    clock = iter([0.0, 10.0, 13.0, 20.0, 100.0, 105.0, 106.0, 107.0])
    setup = prepare(small(), 3)
    state = first_state(setup.config, "a")
    monkeypatch.setattr(step_module, "_seconds", lambda device: next(clock))
    for _ in range(2):
        step_module.take_step(setup, state)
    for timed in (state, unpack(setup, *pack(setup, state))):
        assert (timed.seconds, timed.restore_seconds) == (27.0, 4.0)


def test_the_longest_prompt_decides_how_much_can_be_generated():
    task = load_task("generated-table", max_examples=60)
    _, tokenizer = load_model("tiny-llama", task=task)
    lengths = [len(tokenizer(f"{e.text}\n")["input_ids"]) for e in task.validation]
    room = tokenizer.model_max_length - max(lengths)
    assert min(lengths) < max(lengths) and room > 0
    check_room(tables(max_new_tokens=room), task, tokenizer, None)
    with pytest.raises(ValueError, match=f"max_new_tokens must be <= {room},"):
        check_room(tables(max_new_tokens=room + 1), task, tokenizer, None)


def test_groups_larger_than_an_evaluation_do_not_end_a_run_after_its_last_step(tmp_path):
    for split in ("train", "validation"):
        rows = [{"text": f"row {i}", "label": i % 2, "who": f"user {i % 3}"} for i in range(36)]
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    config = small(
        task=str(tmp_path / "data"),
        group_column="who",
        max_examples=None,
        eval_examples=5,
        batch_size=4,
        steps=1,
    )
    result = train(config, tmp_path / "run", keep_model=False)
    assert result.releases == 1 and math.isfinite(result.train_loss)


@pytest.mark.slow
def test_nothing_is_claimed_where_nothing_holds(tmp_path):
    plain = train(
        small(noise_multiplier=None, non_private=True, steps=1),
        tmp_path / "plain",
        keep_model=False,
    )
    oracle = train(
        small(scheme="oracle", diagnostic=True, steps=1), tmp_path / "oracle", keep_model=False
    )
    ceiling = train(
        small(noise_multiplier=None, noise_free=True, steps=1),
        tmp_path / "ceiling",
        keep_model=False,
    )
    assert "clipped to max_grad_norm" in ceiling.privacy and ceiling.noise_multiplier == 0
    for name, result in (("plain", plain), ("oracle", oracle), ("ceiling", ceiling)):
        document = json.loads((tmp_path / name / "training.json").read_text())
        assert result.epsilon is document["epsilon"] is None
        assert document["privacy"].startswith("NON-PRIVATE") and "-DP" not in document["privacy"]


@pytest.mark.slow
def test_the_oracle_puts_the_best_diagonal_in_place(tmp_path):
    """The oracle puts diag(u^T clean v) between the noisy singular vectors; biases stay noisy."""
    config = small(scheme="oracle", diagnostic=True, steps=1)
    setup = prepare(config, 3)
    before = {name: p.detach().clone() for name, p in setup.trained.items()}
    sampler, noise = fresh_generators(config, new_stream(config, 0))
    rows = step_module._sample(setup.unit_rows, setup.mechanism, sampler, one_each=False)
    clean, _ = step_module.clipped_sum_over(setup.model, setup.batches(rows), BOUND)
    train(config, tmp_path)
    got = weights_of(tmp_path, config)
    for name, total in clean.items():
        noisy = total + SIGMA * BOUND * torch.randn(total.shape, generator=noise)
        if noisy.ndim == 2:
            u, _, vh = torch.linalg.svd(noisy.double(), full_matrices=False)
            noisy = u @ torch.diag(torch.diagonal(u.T @ total.double() @ vh.T)) @ vh
        want = before[name] - RATE * noisy.float() / BATCH
        torch.testing.assert_close(got[name], want, rtol=0, atol=1e-6)


# Guards


def test_a_parameter_outside_the_mechanism_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    sums = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guards.check_covered(model, optimizer, sums)
    guards.check_covered(model, torch.optim.SGD(model[1].parameters(), lr=1.0), sums)
    with pytest.raises(ValueError, match=r"^1.bias would be trained but is neither clipped"):
        guards.check_covered(model, optimizer, sums[:-1])
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match=r"^a parameter outside the model would be trained"):
        guards.check_covered(model, optimizer, sums)


def test_an_optimizer_on_other_tensors_stops_the_run(tmp_path, monkeypatch):
    original = preparation.make_optimizer

    def on_copies(config, model, trained):
        copies = {name: nn.Parameter(p.detach().clone()) for name, p in trained.items()}
        return original(config, model, copies)

    monkeypatch.setattr(preparation, "make_optimizer", on_copies)
    with pytest.raises(ValueError, match="outside the model"):
        train(small(), tmp_path)
    assert not (tmp_path / "training.json").exists()


@pytest.mark.slow
def test_weights_that_do_not_move_stop_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"has not moved in 3 steps .* too small for float32"):
        train(small(learning_rate=1e-12), tmp_path)
    assert not (tmp_path / "training.json").exists()


def test_movement_is_asked_only_of_weights_with_gradients():
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("moved", "idle", "held", "stuck")}
    held = [p for name, p in parameters.items() if name != "stuck"]
    check = guards.MovementCheck(parameters, torch.optim.SGD(held, lr=1.0))
    for name, p in parameters.items():
        p.grad = torch.full((2,), 0.0 if name == "idle" else 1.0)
    check.note()
    parameters["moved"].data[0] = 2.0
    with pytest.raises(ValueError, match=r"^stuck \(one of 1\) has not moved in 5 steps"):
        check.check(5)


def test_a_resumed_run_may_stand_still_at_the_end_of_a_schedule():
    """Steps of 1e-9 from a weight of 1 are lost to rounding, as they are for a norm's weight."""
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("held", "stuck")}
    for resumed, names, words in (
        (False, ["held"], r"^held \(one of 1\) has not moved in 3 steps"),
        (True, ["held"], None),
        (True, ["held", "stuck"], r"^stuck \(one of 1\) has not moved in 3 steps"),
    ):
        optimizer = torch.optim.SGD([parameters["held"]], lr=1e-9)
        some = {name: parameters[name] for name in names}
        check = guards.MovementCheck(some, optimizer, resumed=resumed)
        for _ in range(3):
            for p in some.values():
                p.grad = torch.ones(2)
            optimizer.step()
            check.note()
        with pytest.raises(ValueError, match=words) if words else nullcontext():
            check.check(3)


def test_weights_may_stand_still_while_others_move(tmp_path):
    # while B is near 0, so is the gradient of LoRA's A: its first steps are lost to rounding
    changes = {"method": "lora", "rank": 8, "lora_init": "gaussian", "optimizer": "sgd"}
    plain = small(**changes, non_private=True, noise_multiplier=None, learning_rate=1e-6, steps=4)
    assert len(train(plain, tmp_path).curve) == 3


@pytest.mark.slow
def test_a_run_that_diverges_is_stopped_in_one_line(tmp_path):
    for number, changes in enumerate(
        (
            {"learning_rate": 1e4},
            {"learning_rate": 1e30},
            {"optimizer": "adam", "learning_rate": 1e6},
        )
    ):
        with pytest.raises(ValueError, match=r"lower (the )?learning rate") as error:
            train(small(**changes), tmp_path / str(number))
        assert "\n" not in str(error.value), changes
        assert not (tmp_path / str(number) / "training.json").exists(), changes


def test_loss_guard():
    for loss in (math.nan, math.inf, 50.0):
        with pytest.raises(ValueError, match=r"after 7 steps .*lower the learning rate"):
            guards.check_loss(loss, 0.7, 7)
    guards.check_loss(1.9, 0.01, 7)  # a small first loss: an ordinary loss is no divergence
    guards.check_loss(13.9, 0.7, 7)


SHAPES = {
    "full": {"w": (64, 64), "b": (64,), "head": (2, 64)},
    "lora": {"a": (8, 384), "b": (384, 8), "head": (2, 384)},
    "frozen": {"b": (128, 4)},
    "wide": {"up": (256, 64)},
    "vectors": {"norm": (300,)},
}


def test_right_noise_passes():
    """100 draws per model, false-alarm rate 2e-8 each, with noise far above and below the sums."""
    generator = torch.Generator().manual_seed(0)
    for shapes in SHAPES.values():
        for draw in range(100):
            std = 10.0 ** (draw % 6 - 3)
            clean = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
            noisy = GaussianMechanism(std, 1.0, 0.5).add_noise(clean, generator)
            NoiseCheck(std, 1).check(clean, noisy, spectrum=True)


def test_noise_of_another_size_is_refused():
    for shapes in (SHAPES["full"], SHAPES["lora"]):
        for factor in (0.0, 0.5, 0.9, 1.1, 2.0):
            generator = torch.Generator().manual_seed(0)
            clean = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
            noisy = GaussianMechanism(0.7 * factor, 1.0, 0.5).add_noise(clean, generator)
            with pytest.raises(
                ValueError,
                match=r"noise has a standard deviation .* stated 0.7 by more than chance",
            ):
                NoiseCheck(0.7, 1).check(clean, noisy, spectrum=True)


def test_correlated_noise_of_the_right_size_is_refused():
    """One noise matrix has rank one; another has equal rows."""
    for m, n in ((64, 64), (8, 384), (384, 8), (256, 64)):
        generator = torch.Generator().manual_seed(0)
        rank_one = torch.outer(
            torch.randn(m, generator=generator), torch.randn(n, generator=generator)
        )
        for noise in (rank_one, torch.randn(1, n, generator=generator).expand(m, n)):
            noise = noise / noise.square().mean().sqrt()
            clean = {"w": torch.randn(m, n, generator=generator)}
            noisy = {"w": clean["w"] + 0.5 * noise}
            with pytest.raises(ValueError, match=r"noise of w has a singular value .* correlated"):
                NoiseCheck(0.5, 1).check(clean, noisy, spectrum=True)


@pytest.mark.slow
def test_noise_that_is_off_stops_the_run(tmp_path, monkeypatch):
    right = GaussianMechanism.add_noise

    def weaker(self, sums, generator=None):
        noisy = right(self, sums, generator)
        return {name: 0.9 * noisy[name] + 0.1 * sums[name] for name in sums}

    monkeypatch.setattr(GaussianMechanism, "add_noise", weaker)
    with pytest.raises(ValueError, match="the privacy stated would not hold"):
        train(small(), tmp_path)
    assert not (tmp_path / "training.json").exists()


# Membership


def units(count):
    task = load_task("generated")
    return [[example] for example in task.train[:count]]


@pytest.mark.slow
def test_coins_are_independent_and_fair():
    """200 coins under 300 seeds follow binomial laws (total false-alarm rate 1e-6)."""
    records = units(200)
    coins = np.array([draw_members(records, "bernoulli", seed) for seed in range(300)])
    alarm = 1e-6 / 1000
    assert stats.binomtest(int(coins.sum()), coins.size, 0.5).pvalue > alarm
    for column in coins.T:
        assert stats.binomtest(int(column.sum()), 300, 0.5).pvalue > alarm
    agree = (coins[:, :-1] == coins[:, 1:]).sum(axis=0)  # pairs of consecutive units
    assert all(stats.binomtest(int(count), 300, 0.5).pvalue > alarm for count in agree)
    agree = (coins[:-1] == coins[1:]).sum(axis=1)  # pairs of consecutive seeds
    assert all(stats.binomtest(int(count), 200, 0.5).pvalue > alarm for count in agree)
    # the number of heads varies as a binomial's, unlike that of a fixed half: variance 50
    assert (
        50 * stats.chi2.ppf(1e-7, 299) / 299
        < coins.sum(axis=1).var(ddof=1)
        < (50 * stats.chi2.isf(1e-7, 299) / 299)
    )
    assert draw_members(records, "bernoulli", 5) == coins[5].tolist()


def test_half_and_all():
    records = units(81)
    halves = np.array([draw_members(records, "half", seed) for seed in range(300)])
    assert set(halves.sum(axis=1)) == {40}
    for column in halves.T:
        assert stats.binomtest(int(column.sum()), 300, 40 / 81).pvalue > 1e-8
    assert draw_members(records, "half", 5) == halves[5].tolist()
    # a seed keeps giving the same half: the text that is hashed is part of the contract
    drawn = random.Random("lowrank_dp membership 5").sample(range(81), 40)
    assert np.flatnonzero(halves[5]).tolist() == sorted(drawn)
    assert draw_members(records, "all", 5) == [True] * 81
    with pytest.raises(ValueError, match="did you mean 'bernoulli'"):
        draw_members(records, "bernouli", 5)


SENTENCES = 60


def own_data(folder, *, change=None, text=""):
    """Write a user's own task with SST-2's columns; training record ``change`` gets ``text``."""
    rng = random.Random(0)
    for split, count in (("train", SENTENCES), ("validation", 20)):
        rows = []
        for i in range(count):
            label = rng.randrange(2)
            words = [
                "the",
                rng.choice(["film", "plot", "cast", "score"]),
                "is",
                rng.choice(["fresh", "warm"] if label else ["dull", "flat"]),
                f"number {i}",
            ]
            rows.append({"idx": i, "sentence": " ".join(words), "label": label})
        if split == "train" and change is not None:
            rows[change]["sentence"] = text
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.mark.slow
def test_only_members_are_trained_on(tmp_path):
    """A new text of a non-member changes no bit of the weights; a new text of a member does.

    Each new text has the same coin as the text that it replaces.
    """
    records = load_task(str(own_data(tmp_path / "a" / "data"))).train
    coins = draw_members([[e] for e in records], "bernoulli", 3)
    heads = sum(coins)
    config = small(
        model=str(backbone(tmp_path)),
        task=str(tmp_path / "a" / "data"),
        membership="bernoulli",
        max_examples=None,
        batch_size=heads,
        steps=2,
    )
    assert 20 < heads < 40
    train(config, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "membership.json").read_text())
    assert manifest["is_member"] == [int(coin) for coin in coins]
    member = manifest["is_member"].index(1)
    outsider = manifest["is_member"].index(0)
    files = {}
    for name, change in (("outsider", outsider), ("member", member)):
        texts = (f"an entirely different story about number {i}" for i in range(100))
        text = next(
            text
            for text in texts
            if draw_members([[replace(records[change], text=text)]], "bernoulli", 3)
            == [coins[change]]
        )
        data = own_data(tmp_path / name / "data", change=change, text=text)
        train(replace(config, task=str(data)), tmp_path / name / "run")
        files[name] = (tmp_path / name / "run" / "model.safetensors").read_bytes()
    reference = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert files["outsider"] == reference != files["member"]


@pytest.mark.slow
def test_the_manifest_says_who_without_saying_what(tmp_path):
    config = small(
        model=str(backbone(tmp_path)),
        task=str(own_data(tmp_path / "data")),
        membership="half",
        max_examples=None,
        batch_size=10,
        steps=1,
    )
    result = train(config, tmp_path / "run")
    task = load_task(str(tmp_path / "data"))
    document = json.loads((tmp_path / "run" / "membership.json").read_text())
    assert document["ids"] == [example.id for example in task.train]
    assert document["content_hashes"] == [example.content_hash for example in task.train]
    assert document["is_member"] == [
        int(coin) for coin in draw_members([[e] for e in task.train], "half", 3)
    ]
    assert document["num_members"] == SENTENCES // 2 == sum(document["is_member"])
    assert document["num_records"] == SENTENCES
    assert document["coins"] == {"scheme": "fixed", "probability": 0.5, "seed": 3}
    assert document["schema_version"] == 1 and document["recipe"] == config.recipe()
    before, after = (entry["loss"] for entry in result.curve)
    assert document["eval_loss"] == after != before
    assert document["train_loss"] == result.train_loss
    for name in ("membership.json", "training.json"):
        written = (tmp_path / "run" / name).read_text()
        for example in (*task.train, *task.validation):
            assert example.text not in written and f"number {example.text.split()[-1]}" not in (
                written
            )


@pytest.mark.slow
def test_groups_are_members_as_one(tmp_path):
    train(tables(unit="group", membership="bernoulli", steps=1, batch_size=4), tmp_path)
    document = json.loads((tmp_path / "membership.json").read_text())
    coins = {}
    for group, coin in zip(document["groups"], document["is_member"], strict=True):
        coins.setdefault(group, set()).add(coin)
    assert all(len(values) == 1 for values in coins.values())
    assert {0, 1} == set.union(*coins.values()) and len(coins) < len(document["groups"])
    assert document["coins"]["scheme"] == "bernoulli" and document["unit"] == "group"
    assert document["template"] == {"separator": "\n"}


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["example", "group"])
def test_a_holdout_shares_no_record_with_what_is_trained_on(unit):
    """About 200 units are held out, within 5 standard deviations, and groups are held out whole."""
    config = tables(unit=unit, holdout=200, max_examples=None)
    setup = prepare(config, 3)
    trained_on = {example.group for example in setup.task.train}
    held_out = {example.group for example in setup.task.validation}
    assert not trained_on & held_out
    everything = load_task("generated-table", seed=0).train
    assert held_out <= {example.group for example in everything}
    assert trained_on | held_out == {e.group for e in everything}
    size = len(held_out) if unit == "group" else len(setup.task.validation)
    assert 130 < size < 290
    assert prepare(config, 3).task.validation == setup.task.validation
    with pytest.raises(ValueError, match=r"^holdout must be below the"):
        prepare(tables(unit=unit, holdout=10_000), 3)
    statement = setup.statement(4)
    assert f"{unit}s set aside by holdout are evaluated on, not protected" in statement
    assert f"the number of {unit}s ({len(setup.unit_rows):,}) is public" in statement
    assert "sets of members" not in statement
    half = prepare(tables(unit=unit, membership="half"), 3)
    assert "neighbours are sets of members" in half.statement(4)


@pytest.mark.slow
def test_groups_by_a_column(tmp_path):
    """400 rows of 20 users are 20 groups, not 400; a group takes part with one of its rows."""
    rows = [
        {
            "text": f"the film {i} is {('dull', 'fresh')[i % 2]}",
            "label": i % 2,
            "group": i,
            "user_id": i % 20,
        }
        for i in range(400)
    ]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    config = small(task=str(tmp_path), unit="group", max_examples=None, batch_size=5)
    with (
        warnings.catch_warnings(),
        pytest.raises(
            ValueError,
            match=r"^unit 'group' must come with groups .* group_column \(not read so "
            r"far: 'group', 'user_id'\)$",
        ),
    ):
        warnings.simplefilter("error")
        prepare(config, 3)
    with pytest.warns(UserWarning, match="not read: column 'group'"):
        setup = prepare(replace(config, group_column="user_id"), 3)
    assert [len(unit) for unit in setup.units] == [20] * 20
    assert setup.mechanism.sample_rate == 5 / 20 and "20 of 20 groups" in setup.description
    assert "label from 'label' (2 classes: 0, 1), group from 'user_id'" in setup.description
    taken = step_module._sample(
        setup.unit_rows, setup.mechanism, torch.Generator().manual_seed(0), one_each=True
    )
    rows = [len(batch["input_ids"]) for batch in step_module._batches_of_rank(setup, taken)]
    users = [i // 20 for i in taken]
    assert len(taken) == sum(rows) == len(set(users)) > 0
    with (
        pytest.warns(UserWarning, match=r"not read: column 'user_id'"),
        pytest.warns(UserWarning, match=r"each of the 400 groups of .* is a single row"),
    ):
        prepare(replace(config, group_column="group"), 3)
    with pytest.raises(ValueError, match=r"generated has none that are known: .*unit 'example'"):
        prepare(small(unit="group"), 3)


def test_fingerprint_sees_content_label_and_order():
    records = [unit[0] for unit in units(5)]
    same = fingerprint(records)
    assert fingerprint(list(records)) == same
    others = [
        [replace(records[0], label=1 - records[0].label), *records[1:]],
        [replace(records[0], text=records[0].text.upper()), *records[1:]],
        [replace(records[0], id="another"), *records[1:]],
        records[::-1],
        records[:-1],
    ]
    assert len({same, *map(fingerprint, others)}) == 6
    assert group_units(records, "example") == [[record] for record in records]


# Configuration


BAD = [
    ({"method": "lorra"}, "did you mean 'lora'"),
    ({"optimizer": "adagrad"}, "optimizer must be one of sgd, adam, adamw"),
    (
        {"noise_multiplier": None},
        "exactly one of epsilon, noise_multiplier, non_private and noise_free",
    ),
    ({"epsilon": 1.0}, "got epsilon and noise_multiplier"),
    ({"non_private": True}, "got noise_multiplier and non_private"),
    ({"noise_free": True}, "got noise_multiplier and noise_free"),
    ({"noise_multiplier": 0.0}, "noise_multiplier must be a finite number > 0"),
    ({"noise_multiplier": math.inf}, "noise_multiplier"),
    ({"delta": 1.0}, "delta must be"),
    ({"delta": 0.0}, "delta must be"),
    ({"max_grad_norm": math.inf}, "max_grad_norm"),
    ({"steps": 0}, "steps must be an integer >= 1"),
    ({"steps": 2.5}, "steps"),
    ({"batch_size": True}, "batch_size"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"warmup_steps": 1}, "warmup_steps must be 0 with schedule 'constant'"),
    (
        {"schedule": "linear", "warmup_steps": 5},
        "warmup_steps must be an integer >= 0 and <= 4",
    ),
    ({"scheme": "oracle"}, "diagnostic"),
    ({"diagnostic": True}, "diagnostic must go with"),
    (
        {"noise_multiplier": None, "non_private": True, "scheme": "optimal"},
        "nothing to restore",
    ),
    (
        {"noise_multiplier": None, "noise_free": True, "scheme": "denoise"},
        "nothing to restore",
    ),
    (
        {"noise_multiplier": None, "noise_free": True, "secure_rng": True, "seed": None},
        "without non_private and noise_free, which draw no noise",
    ),
    ({"scheme": "truncate"}, "k must be given"),
    ({"scheme": "denoise", "scheme_options": {"kapa": 1}}, "did you mean 'kappa'"),
    ({"scheme_options": {"k": 1}}, "scheme 'none' takes no options"),
    ({"scheme": "optimal", "scheme_options": {"noise_std": 3}}, "noise_std"),
    ({"scheme": "optimal", "scheme_options": {"noisy": 3}}, "noisy"),
    ({"scheme": "optimal", "scheme_options": {"scheme": "soft"}}, "scheme"),
    ({"scheme": "oracle", "diagnostic": True, "scheme_options": {"foo": 1}}, "foo"),
    ({"momentum_beta": 1.0}, "beta must be"),
    ({"momentum_beta": "0.9"}, "beta must be"),
    ({"momentum_beta": 0.9, "filter_b": (1.0,)}, "must not both be given"),
    ({"filter_a": (0.5,)}, "filter_a must come with filter_b"),
    ({"filter_b": (1.0, -1.0)}, "b must be"),
    ({"filter_b": ("x",)}, "b must be"),
    ({"momentum_beta": 0.9, "beta1": 0.9}, "beta1 must be 0 or left out"),
    ({"filter_b": (1.0,), "beta1": 0.9}, "beta1 must be 0 or left out"),
    ({"beta1": 1.0}, "beta1 must be"),
    ({"secure_rng": True}, "secure_rng must go without a seed"),
]


def test_a_bad_configuration_is_refused_before_anything_is_loaded():
    for changes, words in BAD:
        with pytest.raises(ValueError, match=words) as error:
            small(**changes)
        assert "\n" not in str(error.value), changes


def test_a_configuration_survives_json():
    for config in (
        small(),
        small(
            noise_multiplier=None,
            epsilon=2.0,
            scheme="truncate",
            scheme_options={"k": 3},
            filter_b=(0.5, 0.5),
            method="lora",
            target_modules=("query", "value"),
            train_layers="layer.1",
        ),
    ):
        document = json.loads(json.dumps(config.as_json()))
        assert TrainConfig.from_json(document) == config
        assert config.differences(TrainConfig.from_json(document)) == []
    assert small().differences(small(steps=3, data_seed=2)) == [
        "steps: 4 / 3",
        "data_seed: 0 / 2",
    ]
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        TrainConfig.from_json({"step": 3})


# Checkpoint and evaluation


@pytest.mark.slow
def test_a_full_checkpoint_loads_with_plain_transformers(tmp_path):
    config = small(steps=2)
    result = train(config, tmp_path)
    task = load_task("generated", max_examples=80, seed=0)
    ours, tokenizer = load_model(str(tmp_path), task=task)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [example.text for example in task.validation[:10]]
    assert reader(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    batch = reader(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, ours(**batch).logits)
    assert plain.config.id2label == {0: "negative", 1: "positive"}
    check_files(tmp_path, {"model.safetensors", "config.json", "tokenizer.json"})

    # the last entry of the curve is the checkpoint's score, by the package and by hand
    last = result.curve[-1]
    scores = evaluate(ours, tokenizer, task, max_examples=30, max_length=128)
    assert {name: last[name] for name in scores} == pytest.approx(scores, rel=1e-5)
    again = evaluate(ours, tokenizer, task, max_length=128)  # all of them
    hits, losses = 0, []
    with torch.no_grad():
        for example in task.validation:
            logits = plain(**reader(example.text, return_tensors="pt")).logits[0]
            hits += int(logits.argmax()) == example.label
            losses.append(float(nn.functional.cross_entropy(logits, torch.tensor(example.label))))
    assert again["accuracy"] == pytest.approx(hits / len(task.validation))
    assert again["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert [entry["step"] for entry in result.curve] == [0, 2]
    evaluated, _ = evaluated_rows(tokenizer, task, max_examples=30)  # as the accuracy beside it
    assert result.majority == max(np.bincount([e.label for e in evaluated])) / 30
    members = evaluate(ours, tokenizer, task, "train", max_examples=30, max_length=128)
    assert result.train_loss == pytest.approx(members["loss"], rel=1e-5)
    saved = json.loads((tmp_path / "training.json").read_text())
    assert saved["sensitive"].startswith("train_loss: NON-PRIVATE")
    del saved["sensitive"]  # earlier versions did not write it
    (tmp_path / "training.json").write_text(json.dumps(saved))
    assert load_result(tmp_path) == replace(result, sensitive=TrainResult.sensitive)


def test_the_result_names_the_fields_that_no_mechanism_protects(tmp_path):
    private = sensitive_fields(small())
    assert private.startswith("train_loss: NON-PRIVATE") and "curve, majority" not in private
    assert "seconds, restore_seconds" in private
    held_out = sensitive_fields(small(holdout=8))
    assert "curve, majority: NON-PRIVATE" in held_out and "holdout" in held_out
    for changes in (
        {"noise_multiplier": None, "non_private": True},
        {"noise_multiplier": None, "noise_free": True},
        {"scheme": "oracle", "diagnostic": True},
    ):
        found = sensitive_fields(small(**changes))
        assert found.startswith("train_loss, curve, majority, and every other field"), changes
    config = small(holdout=8, steps=1, batch_size=8)
    result = train(config, tmp_path, keep_model=False)
    assert result.sensitive == held_out == load_result(tmp_path).sensitive


def check_files(folder, expected):
    names = {path.name for path in folder.iterdir()}
    assert expected | {"training.json", "membership.json"} <= names
    assert "snapshots" not in names
    for path in folder.rglob("*"):
        assert not path.name.startswith(".checkpoint-")
        assert not path.name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"))
        assert path.name == ".lock" or not path.name.startswith(".")  # half-written
        assert path.stat().st_mode & 0o444 == 0o444, path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_head_before_training_is_kept(method, tmp_path):
    from safetensors.torch import load_file

    config = small(method=method, steps=2)
    train(config, tmp_path)
    task = load_task("generated", max_examples=80, seed=0)
    untrained, _ = load_model("tiny", task=task, seed=3)
    head = load_file(tmp_path / "initial_head.safetensors")
    assert head.keys() == {"classifier.weight", "classifier.bias"}
    for name, tensor in head.items():
        assert torch.equal(tensor, untrained.state_dict()[name])
    after = {
        name: p
        for name, p in weights_of(tmp_path, config).items()
        if "classifier" in name and "original_module" not in name and name.endswith("weight")
    }
    assert after and all(not torch.equal(p, head["classifier.weight"]) for p in after.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "lora-frozen-a"])
def test_an_adapter_loads_with_plain_peft(method, tmp_path):
    import peft

    config = small(method=method, steps=2, seed=0)
    result = train(config, tmp_path)
    task = load_task("generated", max_examples=80, seed=0)
    ours, tokenizer = load_model(str(tmp_path), task=task)
    base, _ = load_model("tiny", task=task)
    with torch.no_grad():
        base.classifier.weight.zero_()  # the adapter brings its own
    plain = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    batch = tokenizer([e.text for e in task.validation[:10]], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, ours(**batch).logits)
    loss = evaluate(ours, tokenizer, task, max_examples=30, max_length=128)["loss"]
    assert loss == pytest.approx(result.curve[-1]["loss"], rel=1e-5)
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "tiny" and adapter["r"] == 8
    check_files(tmp_path, {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"})


@pytest.mark.slow
def test_an_adapter_on_tiny_loads_whatever_the_seed(tmp_path):
    result = train(small(method="lora", steps=1, seed=3), tmp_path)
    task = load_task("generated", max_examples=80, seed=0)
    model, tokenizer = load_model(str(tmp_path), task=task)
    loss = evaluate(model, tokenizer, task, max_examples=30, max_length=128)["loss"]
    assert loss == pytest.approx(result.curve[-1]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_language_model_loads_and_generates(method, tmp_path):
    import peft

    config = tables(method=method, steps=2, generate=True, max_new_tokens=8, max_examples=40)
    result = train(config, tmp_path)
    assert {"loss", "perplexity", "bleu", "rouge_l"} <= result.curve[-1].keys()
    assert not {"bleu", "rouge_l"} & result.curve[0].keys()
    assert result.majority is None
    assert not (tmp_path / "initial_head.safetensors").exists()
    task = load_task("generated-table", max_examples=40, seed=0)
    ours, tokenizer = load_model(str(tmp_path), task=task)
    if method == "full":
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    else:
        base, _ = load_model("tiny-llama", task=task)
        plain = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt = reader(task.validation[0].text + "\n", return_tensors="pt")
    assert (
        prompt["input_ids"].tolist()
        == tokenizer(task.validation[0].text + "\n", return_tensors="pt")["input_ids"].tolist()
    )
    with torch.no_grad():
        assert torch.equal(plain(**prompt).logits, ours(**prompt).logits)
    written = plain.generate(
        **prompt, max_new_tokens=12, do_sample=False, pad_token_id=reader.pad_token_id
    )
    assert prompt["input_ids"].shape[1] < written.shape[1]


def test_without_a_model_only_the_result_is_left(tmp_path):
    result = train(small(steps=1), tmp_path, keep_model=False)
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {"training.json"}
    assert load_result(tmp_path) == result
    with pytest.raises(ValueError, match=r"must hold a finished run, found no training.json"):
        load_result(tmp_path / "nowhere")


@pytest.mark.slow
def test_what_could_never_be_generated_is_refused_before_the_first_step(tmp_path):
    """A refusal after the last step would come when the privacy is already spent."""
    with pytest.raises(ValueError, match="max_new_tokens"):
        train(tables(generate=True, max_new_tokens=256, steps=1, max_examples=20), tmp_path)
    assert not list(tmp_path.rglob("releases.jsonl"))
