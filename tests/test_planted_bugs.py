"""Privacy bugs, planted one at a time into ``train``: the guard for each bug stops the run.

``planted_bugs`` holds the bugs, which replace a function that ``train`` calls.

Three faults cannot be detected from inside the process, and are therefore not planted here. First,
an adversary may know the seed of the noise, while the generator advances as it should; the privacy
statement names the source of the noise instead. Second, two runs in different folders may share a
seed and both be released; the statement of a seeded run says that its noise is not secret. Third,
the accountant itself may be wrong; ``test_mechanism`` compares the accountant with another one.
"""

import hashlib
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers.models.bert.modeling_bert import BertPooler

from lowrank_dp.data import tasks
from lowrank_dp.grads.clipping import clipped_sum
from lowrank_dp.grads.microbatch import MicroBatch
from lowrank_dp.train import guards, records
from lowrank_dp.train import loop as module
from lowrank_dp.train import setup as preparation
from lowrank_dp.train import state as saved_state
from lowrank_dp.train.loop import train
from tests.planted_bugs import BUGS, CLIPPED, STEPS

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {"no noise", "no clipping", "the same rows each step", "clean sums to the optimizer"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in BUGS]
)
def test_a_planted_bug_stops_the_run_by_name(name, base, tmp_path, monkeypatch):
    plant, words, *changes = BUGS[name]
    plant(monkeypatch)
    config = replace(base, steps=STEPS, **(changes[0] if changes else {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with pytest.raises(ValueError, match=words) as error:
            train(config, tmp_path / "run", show_progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "training.json").exists()


# Resumption: how a killed run uses the noise of the steps after its last snapshot


def half_made(patch, config, folder, steps):
    """Start a run that is killed three steps after its last snapshot."""
    right = module.take_step

    def step(setup, state):
        if state.step == steps:
            raise InterruptedError
        return right(setup, state)

    with patch.context() as inside, pytest.raises(InterruptedError):
        inside.setattr(module, "take_step", step)
        train(config, folder, show_progress=False)


def noise_drawn_anew(patch):
    """Plant a bug: lost steps draw new noise under their old numbers, and count once."""
    right = module.unpack

    def unpack(setup, document, tensors):
        state = right(setup, document, tensors)
        if tensors:
            state.noise = type(state.noise)()
        return state

    patch.setattr(module, "unpack", unpack)


def noise_of_earlier_steps(patch):
    """Plant a bug: snapshots hold the noise generator as it was before the first step."""
    right, kept = module.pack, {}

    def pack(setup, state):
        document, tensors = right(setup, state)
        tensors["generator.noise"] = kept.setdefault("state", tensors["generator.noise"])
        return document, tensors

    patch.setattr(module, "pack", pack)


def other_weights(patch):
    """Plant a bug: the base has changed, and lost steps add their old noise to other sums."""
    patch.setattr(saved_state, "changed", lambda before, now: [])
    right = preparation.load_model

    def load_model(*arguments, **options):
        model, tokenizer = right(*arguments, **options)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
        return model, tokenizer

    patch.setattr(preparation, "load_model", load_model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant, begun_with, words",
    [
        (noise_drawn_anew, False, "step 7 was repeated with other noise"),
        (noise_of_earlier_steps, True, "step 7 (was repeated with other|has the noise of step 1)"),
        (other_weights, False, "step 7 was repeated with other sums"),
    ],
)
def test_a_bug_of_resuming_stops_the_run_by_name(
    plant, begun_with, words, base, tmp_path, monkeypatch
):
    config = replace(base, steps=12, snapshot_every=6, seed=None)
    if begun_with:
        plant(monkeypatch)
    half_made(monkeypatch, config, tmp_path, 9)
    if not begun_with:
        plant(monkeypatch)
    with pytest.raises(ValueError, match=words) as error:
        train(config, tmp_path, resume=True, show_progress=False)
    assert "\n" not in str(error.value) and not (tmp_path / "training.json").exists()


@pytest.mark.slow
def test_an_honest_run_is_resumed(base, tmp_path, monkeypatch):
    config = replace(base, steps=12, snapshot_every=6, seed=None)
    half_made(monkeypatch, config, tmp_path, 9)
    assert train(config, tmp_path, resume=True, show_progress=False).releases == 12


# Selection: one more or one fewer record changes which other records are in the subset


def first_rows(rows, probability, *key):
    count = int(probability * len(rows))
    return tuple(rows[:count]), tuple(rows[count:])


def smallest_hashes(rows, probability, *key):
    order = sorted(range(len(rows)), key=lambda i: hash_of(rows[i], *key))
    kept = {*order[: int(probability * len(rows))]}
    return (
        tuple(row for i, row in enumerate(rows) if i in kept),
        tuple(row for i, row in enumerate(rows) if i not in kept),
    )


def shuffled(rows, probability, *key):
    order = np.random.default_rng(0).permutation(len(rows))
    kept = {*order[: int(probability * len(rows))].tolist()}
    return (
        tuple(row for i, row in enumerate(rows) if i in kept),
        tuple(row for i, row in enumerate(rows) if i not in kept),
    )


def hash_of(row, *key):
    return hashlib.sha256(f"{key} {row.text}".encode()).digest()


@pytest.mark.slow
def test_a_bug_of_selection_stops_the_run_by_name(base, tmp_path, monkeypatch):
    for number, choose in enumerate((first_rows, smallest_hashes, shuffled)):
        for place, changes, words in (
            (tasks, {"max_examples": 20}, "max_examples"),
            (records, {"holdout": 10}, "holdout"),
        ):
            with (
                monkeypatch.context() as patch,
                pytest.raises(ValueError, match=f"{words} does not choose each record by itself"),
            ):
                patch.setattr(place, "partition", choose)
                train(
                    replace(base, batch_size=4, **changes),
                    tmp_path / f"{number} {words}",
                    show_progress=False,
                )
    for number, choose in enumerate(
        (
            lambda units, *rest: [i < len(units) // 2 for i in range(len(units))],
            lambda units, *rest: np.random.default_rng(0).random(len(units)) < 0.5,
        )
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="'bernoulli' does n"):
            patch.setattr(records, "draw_members", choose)
            train(
                replace(base, batch_size=4, membership="bernoulli"),
                tmp_path / f"{number}",
                show_progress=False,
            )
    for changes in ({"max_examples": 20}, {"holdout": 10}, {"membership": "bernoulli"}):
        preparation.prepare(replace(base, batch_size=4, **changes), 0)


def test_a_scheme_that_reads_clean_gradients_is_refused_whatever_the_config_says(base, tmp_path):
    config = replace(base, scheme="none")
    object.__setattr__(config, "scheme", "oracle")  # past the check of the configuration
    with pytest.raises(ValueError, match="'oracle' reads clean gradients"):
        train(config, tmp_path / "run", show_progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scheme": "optimal"},
        {"scheme": "optimal", "momentum_beta": 0.9},
        {"scheme": "oracle", "diagnostic": True},
        {"precision": "bf16"},
        {"dropout": True},
        {"method": "lora"},
        {"batch_size": 40},
        {"batch_size": 1},
        {"max_grad_norm": 1e-3},
        {"seed": None},
        {"non_private": True, "noise_multiplier": None},
    ],
    ids=str,
)
def test_an_honest_run_is_not_stopped(changes, base, tmp_path):
    result = train(replace(base, steps=STEPS, **changes), tmp_path / "run", show_progress=False)
    assert result.releases == STEPS


def test_which_steps_are_examined_closely(base, tmp_path, monkeypatch):
    """With every restoration: the first step, the last step, and steps before an evaluation."""
    look = guards.check_clipping
    for number, changes in enumerate(
        (
            {},
            {"scheme": "optimal"},
            {"momentum_beta": 0.9},
            {"filter_b": (0.5, 0.5)},
            {"scheme": "oracle", "diagnostic": True},
        )
    ):
        config, folder = replace(base, steps=8, eval_every=4, **changes), tmp_path / f"{number}"
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(
                guards, "check_clipping", lambda *a, s=seen, **k: s.append(0) or look(*a, **k)
            )
            train(config, folder, show_progress=False)
        assert len(seen) == 3, changes


# Stops that depend on private rows: public rows come in batches of fewer than MANY

MANY = 8
POOL, CLASSIFY = BertPooler.forward, transformers.BertForSequenceClassification.forward


def mixing(self, hidden_states):
    rows = len(hidden_states)
    return POOL(self, hidden_states + hidden_states.mean(0) if rows >= MANY else hidden_states)


def with_loss(change):
    def forward(self, **batch):
        output = CLASSIFY(self, **batch)
        if len(batch["input_ids"]) >= MANY and torch.is_grad_enabled():
            change(output)
        return output

    return forward


def auxiliary(output):
    output.loss = output.loss + 0.01


def not_finite(output):
    output.logits = output.logits * math.nan
    output.loss = output.loss * math.nan


@pytest.mark.slow
def test_a_stop_by_private_rows_names_none_of_their_numbers(base, tmp_path, monkeypatch):
    for name, patched, forward, words in (
        ("mixing", BertPooler, mixing, r"loss of row \d+ is not the same alone and in the batch"),
        (
            "auxiliary",
            transformers.BertForSequenceClassification,
            with_loss(auxiliary),
            "plain classification, regression or token loss",
        ),
        (
            "not finite",
            transformers.BertForSequenceClassification,
            with_loss(not_finite),
            r"batch row \d+ has a loss that is not finite",
        ),
    ):
        with monkeypatch.context() as patch, torch.random.fork_rng(devices=[]):
            patch.setattr(patched, "forward", forward)
            with pytest.raises(ValueError, match=words) as error:
                train(replace(base, steps=STEPS), tmp_path / name, show_progress=False)
        assert not re.search(r"\d\.|\de[-+]?\d|nan|inf\b", str(error.value)), error.value


def test_factors_and_gradients_of_the_engine_are_not_the_judge_of_themselves():
    """A fault in a part of the engine that all backends share is found too."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.linear = torch.nn.Linear(3, 2)
    model.unused = torch.nn.Linear(2, 2)

    def forward(x, labels):
        logits = model.linear(x)
        return SimpleNamespace(
            loss=torch.nn.functional.cross_entropy(logits, labels), logits=logits
        )

    model.forward = forward
    batch = {"x": torch.randn(2, 3), "labels": torch.tensor([0, 1])}
    model.linear.weight.grad = torch.ones(2, 3)

    def clip_by(backend):
        return lambda batch, bound: clipped_sum(
            model, batch, bound, backend=backend, check_rows=False
        )[0]

    guards.check_clipping(model, batch, 0.01, clip_by("bookkeeping"))
    assert bool((model.linear.weight.grad == 1).all()) and model.linear.bias.grad is None
    right = MicroBatch.clip

    def wrong(self, squared):
        norms, factors = right(self, squared)
        return norms, factors * 1.1

    for backend in ("bookkeeping", "loop"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MicroBatch, "clip", wrong)
            with pytest.raises(ValueError, match=CLIPPED):
                guards.check_clipping(model, batch, 0.01, clip_by(backend))


def test_a_row_whose_gradient_is_rounding_error_is_no_fault_in_half_precision(monkeypatch):
    """A row that the model fits almost exactly has a gradient of 1e-6, turned by the rounding."""
    exact, turned = torch.tensor([3.0, 4.0]) * 1e-6, torch.tensor([4.0, 3.0]) * 1e-6
    unit = torch.tensor([1.0, 0.0])
    given = {torch.bfloat16: [{"w": turned}], None: [{"w": exact}]}
    monkeypatch.setattr(
        guards, "row_gradients", lambda model, batch, autocast_dtype=None: given[autocast_dtype]
    )

    def check(**precision):
        guards.check_clipping(None, {}, 1.0, lambda batch, norm: {"w": unit * norm}, **precision)

    half = {"autocast_dtype": torch.bfloat16}
    check(**half)  # differs from autograd by 0.63, and autograd from itself by 0.28
    with pytest.raises(ValueError, match="not those that autograd gives"):
        check()  # in full precision nothing is allowed
    given[None] = [{"w": torch.tensor([0.736, 0.677])}]  # turned by 0.1, too little for 0.63
    with pytest.raises(guards.Diverged, match="lower the learning rate, or train in float32"):
        check(**half)
    given[None] = given[torch.bfloat16]  # nor where rounding turns nothing
    with pytest.raises(ValueError, match="not those that autograd gives"):
        check(**half)
