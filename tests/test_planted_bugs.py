"""Privacy bugs, planted one at a time into ``train``: the guard for each bug stops the run.

Planted bugs replace a function that ``train`` calls, so everything around it is as in a real run.

Three faults cannot be detected from inside the process and are therefore not planted here. First,
an adversary knows the seed of the noise, though the generator advances as it should; the privacy
statement names the source of the noise instead. Second, two runs in different folders share a seed
and are both released; the statement of a seeded run says that its noise is not secret. Third, the
accountant itself is wrong; ``test_mechanism`` compares the accountant with another one.
"""

import hashlib
import math
import re
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers.models.bert.modeling_bert import BertPooler

from lowrank_dp.artifacts import runs
from lowrank_dp.data import tasks
from lowrank_dp.grads.clipping import clipped_sum
from lowrank_dp.grads.microbatch import MicroBatch
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.restore import GradientRestorer
from lowrank_dp.train import guards, records
from lowrank_dp.train import loop as module
from lowrank_dp.train import setup as preparation
from lowrank_dp.train import state as saved_state
from lowrank_dp.train import step as step_module
from lowrank_dp.train.layout import Replicated
from lowrank_dp.train.loop import train

STEPS = 30
HEAD = ("classifier.weight", "classifier.bias")
ADD_NOISE, CLIP, DRAW = GaussianMechanism.add_noise, step_module.clipped_sum_over, step_module._draw
NOISED, ASSIGN, PREPARE = Replicated.add_noise, Replicated.assign, preparation.make_mechanism

pytestmark = pytest.mark.usefixtures("one_thread")


# Noise: functions of (standard normal noise by name, step, memory) -> what is added in its place


def noise_bug(change):
    def plant(patch):
        memory = {"step": 0}

        def add_noise(self, sums, generator=None):
            noise = ADD_NOISE(
                replace(self, noise_multiplier=1 / self.max_grad_norm),
                {name: torch.zeros_like(total) for name, total in sums.items()},
                generator,
            )
            changed = change(noise, memory, self)
            memory["step"] += 1
            return {name: total + self.noise_std * changed[name] for name, total in sums.items()}

        patch.setattr(GaussianMechanism, "add_noise", add_noise)

    return plant


def without(chosen):
    return noise_bug(
        lambda noise, memory, mechanism: {
            name: torch.zeros_like(z) if chosen(name) else z for name, z in noise.items()
        }
    )


def each(function):
    return noise_bug(
        lambda noise, memory, mechanism: {name: function(z) for name, z in noise.items()}
    )


def repeated(lag):
    def change(noise, memory, mechanism):
        memory[memory["step"]] = memory.get(memory["step"] - lag, noise)
        return memory[memory["step"]]

    return noise_bug(change)


def negated(noise, memory, mechanism):
    memory["last"] = (
        noise if memory["step"] % 2 == 0 else {name: -z for name, z in memory["last"].items()}
    )
    return memory["last"]


def one_for_two(noise, memory, mechanism):
    first, second = [
        name
        for name in noise
        if name.endswith("self.query.weight") or name.endswith("self.key.weight")
    ]
    return {**noise, second: noise[first].clone()}


def rank_one(noise, memory, mechanism):
    changed = {}
    for name, z in noise.items():
        if z.ndim == 2:
            z = torch.outer(z[:, 0], z[0])
            z = z / z.square().mean().sqrt()
        changed[name] = z
    return changed


def laplace(z):
    return torch.distributions.Laplace(0.0, 0.5**0.5).sample(z.shape)


def uniform(z):
    return (torch.rand(z.shape) - 0.5) * 12**0.5


def seeded_by_step(patch):
    steps = iter(range(1000))
    patch.setattr(
        GaussianMechanism,
        "add_noise",
        lambda self, sums, generator=None: ADD_NOISE(
            self, sums, torch.Generator().manual_seed(next(steps))
        ),
    )


def seeded_anew(patch):
    steps = iter(range(1000))
    patch.setattr(
        GaussianMechanism,
        "add_noise",
        lambda self, sums, generator=None: ADD_NOISE(
            self, sums, generator.manual_seed(next(steps))
        ),
    )


def set_back(patch):
    states = []

    def add_noise(self, sums, generator=None):
        states.append(generator.get_state())
        generator.set_state(states[0])
        return ADD_NOISE(self, sums, generator)

    patch.setattr(GaussianMechanism, "add_noise", add_noise)


def twice(patch):
    patch.setattr(
        GaussianMechanism,
        "add_noise",
        lambda self, sums, generator=None: ADD_NOISE(
            self, ADD_NOISE(self, sums, generator), generator
        ),
    )


def some_clean(patch):
    def add_noise(self, sums, generator=None):
        return {
            name: 0.9 * total + 0.1 * sums[name]
            for name, total in ADD_NOISE(self, sums, generator).items()
        }

    patch.setattr(GaussianMechanism, "add_noise", add_noise)


# Clipping: functions of (each row's gradient, the bound) -> sum


def clip_bug(total_of):
    def plant(patch):
        def clip(model, batches, bound, **arguments):
            rows, norms = [], []
            for batch in batches:
                for row in range(len(batch["labels"])):
                    alone = {key: value[row : row + 1] for key, value in batch.items()}
                    gradient, norm = CLIP(model, [alone], math.inf, **arguments)
                    rows.append(gradient)
                    norms.append(norm)
            if not rows:
                return CLIP(model, [], bound, **arguments)
            return total_of(rows, bound), torch.cat(norms)

        patch.setattr(step_module, "clipped_sum_over", clip)

    return plant


def norm_of(gradient, names=None):
    return math.sqrt(sum(float(gradient[name].square().sum()) for name in names or gradient))


def added(rows):
    return {name: sum(row[name] for row in rows) for name in rows[0]}


def by_factor(factor):
    return clip_bug(
        lambda rows, bound: added(
            [{name: g * factor(row, bound) for name, g in row.items()} for row in rows]
        )
    )


def by_layer(rows, bound):
    return added(
        [
            {name: g * min(1, bound / max(1e-9, float(g.norm()))) for name, g in row.items()}
            for row in rows
        ]
    )


def after_summing(rows, bound):
    total = added(rows)
    return {name: g * min(1, bound / norm_of(total)) for name, g in total.items()}


def bound_times(factor):
    def plant(patch):
        patch.setattr(
            step_module,
            "clipped_sum_over",
            lambda model, batches, bound, **arguments: CLIP(
                model, batches, bound * factor, **arguments
            ),
        )

    return plant


def first_batch_twice(patch):
    def clip(model, batches, bound, **arguments):
        batches = [*batches]
        return CLIP(model, chain(batches[:1], batches), bound, **arguments)

    patch.setattr(step_module, "clipped_sum_over", clip)


def first_row_left_out(patch):
    def clip(model, batches, bound, **arguments):
        batches = [*batches]
        batches[0] = {key: value[1:] for key, value in batches[0].items()}
        return CLIP(model, batches, bound, **arguments)

    patch.setattr(step_module, "clipped_sum_over", clip)


# Sampling: functions of (rows of an honest draw, number of rows, numpy generator) -> rows


def sample_bug(change):
    def plant(patch):
        random, memory = np.random.default_rng(0), {}

        def draw(unit_rows, mechanism, generator, one_each):
            honest = DRAW(unit_rows, mechanism, generator, one_each)
            return [int(row) for row in change(honest, len(unit_rows), random, memory)]

        patch.setattr(step_module, "_draw", draw)

    return plant


def epochs(honest, count, random, memory):
    if not memory.get("left"):
        memory["left"] = random.permutation(count).tolist()
    return [memory["left"].pop() for _ in range(min(len(honest), len(memory["left"])))]


def first_again(honest, count, random, memory):
    return memory.setdefault("rows", honest)


def own_sampler(patch):
    def draw(unit_rows, mechanism, generator, one_each):
        return DRAW(unit_rows, mechanism, torch.Generator(), one_each)

    patch.setattr(step_module, "_draw", draw)


# Head, optimizer, restoration


def head_outside(patch):
    def clip(model, batches, bound, **arguments):
        sums, norms = CLIP(model, batches, bound, **arguments)
        return {name: total for name, total in sums.items() if name not in HEAD}, norms

    patch.setattr(step_module, "clipped_sum_over", clip)


def remember_clean(patch):
    kept = {}

    def add_noise(self, clean, mechanism, generator):
        kept.update({name: total.clone() for name, total in clean.items()})
        return NOISED(self, clean, mechanism, generator)

    patch.setattr(Replicated, "add_noise", add_noise)
    return kept


def clean_to_optimizer(patch):
    kept = remember_clean(patch)
    patch.setattr(
        Replicated,
        "assign",
        lambda self, trained, gradient: ASSIGN(
            self, trained, {name: kept[name] / 10 for name in gradient}
        ),
    )


def clean_added_later(patch):
    kept = remember_clean(patch)
    patch.setattr(
        Replicated,
        "assign",
        lambda self, trained, gradient: ASSIGN(
            self, trained, {name: g + kept[name] / 10 for name, g in gradient.items()}
        ),
    )


def clean_restored(patch):
    kept = remember_clean(patch)
    restore = GradientRestorer.restore
    patch.setattr(
        GradientRestorer,
        "restore",
        lambda self, noisy, *arguments, **options: restore(
            self, {name: kept[name] for name in noisy}, *arguments, **options
        ),
    )


# Accounting and ledger


def other_mechanism(**factors):
    def plant(patch):
        def changed(config, num_units):
            mechanism, delta = PREPARE(config, num_units)
            return replace(
                mechanism,
                **{name: factor * getattr(mechanism, name) for name, factor in factors.items()},
            ), delta

        patch.setattr(preparation, "make_mechanism", changed)

    return plant


def calibrated_for_fewer_steps(patch):
    right = GaussianMechanism.calibrate.__func__
    patch.setattr(
        GaussianMechanism,
        "calibrate",
        classmethod(
            lambda cls, epsilon, delta, steps, *arguments, **options: right(
                cls, epsilon, delta, steps // 2, *arguments, **options
            )
        ),
    )


def ledger_not_written(patch):
    patch.setattr(runs.RunFolder, "begin_release", lambda *arguments: None)


def ledger_halved(patch):
    right = runs.RunFolder.num_releases
    patch.setattr(runs.RunFolder, "num_releases", lambda *arguments: right(*arguments) // 2)


SIZE, CLIPPED = "noise has a standard deviation", "clipped gradients of single rows are not those"
BUGS = {
    "no noise": (without(lambda name: True), SIZE),
    "no noise on the head": (without(HEAD.__contains__), f"{SIZE} in classifier"),
    "no noise on the head's bias": (without("classifier.bias".__eq__), f"{SIZE} in classifier"),
    "no noise on one matrix": (without("bert.pooler.dense.weight".__eq__), f"{SIZE} in .*pool"),
    "no noise on biases": (without(lambda name: name.endswith("bias")), f"{SIZE} in .*bias"),
    "noise over sqrt 2": (each(lambda z: z / 2**0.5), SIZE),
    "noise without C": (
        noise_bug(
            lambda noise, memory, mechanism: {
                name: z / mechanism.max_grad_norm for name, z in noise.items()
            }
        ),
        SIZE,
        {"max_grad_norm": 2.0},
    ),
    "noise over the batch size": (each(lambda z: z / 10), SIZE),
    "noise twice": (twice, SIZE),
    "noise and a share of clean sums": (some_clean, SIZE),
    "noise with a mean": (each(lambda z: z + 0.1), "has a mean that is not 0"),
    "one noise for all steps": (repeated(1), "repeats that of the step before"),
    "one noise for every second step": (repeated(2), "repeats that of 2 steps before"),
    "one noise for every tenth step": (repeated(10), "repeats that of 10 steps before"),
    "noise and its negative": (noise_bug(negated), "repeats that of the step before"),
    "one noise for two matrices": (noise_bug(one_for_two), "noise of .* and of .* is the same"),
    "noise of rank one": (noise_bug(rank_one), "correlated"),
    "every row of the noise the same": (
        each(lambda z: z[:1].expand_as(z)),
        "correlated|has a mean",
    ),
    "uniform noise": (each(uniform), "noise is not normal"),
    "Laplace noise": (each(laplace), "noise is not normal"),
    "noise in float16": (each(lambda z: z.half().float()), "half precision"),
    "noise seeded by the step": (seeded_by_step, "generator of the noise has not moved on"),
    "generator seeded by the step": (seeded_anew, "generator of the noise was seeded anew"),
    "generator set back": (set_back, "generator of the noise .* was set back"),
    "no clipping": (bound_times(math.inf), CLIPPED),
    "C doubled": (bound_times(2), CLIPPED),
    "clipped by layer": (clip_bug(by_layer), CLIPPED),
    "clip factor inverted": (by_factor(lambda row, bound: norm_of(row) / bound), CLIPPED),
    "clipped after summing": (clip_bug(after_summing), CLIPPED),
    "norm of the head alone": (
        by_factor(lambda row, bound: min(1, bound / norm_of(row, HEAD))),
        CLIPPED,
    ),
    "a batch counted twice": (first_batch_twice, "a row was left out, or counts twice"),
    "a row left out": (first_row_left_out, "a row was left out, or counts twice"),
    "samples of a fixed size": (
        sample_bug(lambda honest, count, random, memory: random.choice(count, 10, replace=False)),
        "the sample is of a fixed size",
    ),
    "no sampling": (
        sample_bug(lambda honest, count, random, memory: range(count)),
        "the sample has another size",
    ),
    "the same rows each step": (sample_bug(first_again), "depends on the sample .* before"),
    "rows with replacement": (
        sample_bug(lambda honest, count, random, memory: random.choice(count, len(honest))),
        "the sample has a unit twice",
    ),
    "the rate doubled": (
        sample_bug(
            lambda honest, count, random, memory: np.flatnonzero(random.random(count) < 0.5)
        ),
        "the sample has another size",
    ),
    "a row that is always in": (
        sample_bug(lambda honest, count, random, memory: {*honest, 3}),
        "takes a unit more or less often",
    ),
    "shuffled epochs": (sample_bug(epochs), "the sample (has|is|depends)"),
    "samples from another generator": (own_sampler, "generator of the samples has not moved on"),
    "head outside the mechanism": (head_outside, "classifier.* neither clipped nor noised"),
    "clean sums to the optimizer": (clean_to_optimizer, "not what the mechanism released"),
    "clean sums added after the noise": (clean_added_later, "not what the mechanism released"),
    "clean sums restored": (
        clean_restored,
        "not what the mechanism released",
        {"scheme": "optimal"},
    ),
    "another rate accounted for": (other_mechanism(sample_rate=0.5), "sample_rate of the mech"),
    "another bound accounted for": (other_mechanism(max_grad_norm=0.5), "max_grad_norm of the"),
    "less noise than asked for": (other_mechanism(noise_multiplier=0.8), "noise_multiplier of the"),
    "calibrated for fewer steps": (
        calibrated_for_fewer_steps,
        "gives epsilon .* more than 8",
        {"epsilon": 8.0, "noise_multiplier": None},
    ),
    "ledger not written": (ledger_not_written, "ledger holds 0 releases, and 30 steps were made"),
    "ledger halved": (ledger_halved, "ledger holds 15 releases, and 30 steps were made"),
}


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


# Resumption: what a run that was killed after some steps does with their noise


def half_made(patch, config, folder, steps):
    """A run that is killed three steps after its last snapshot."""
    right = module.take_step

    def step(setup, state):
        if state.step == steps:
            raise InterruptedError
        return right(setup, state)

    with patch.context() as inside, pytest.raises(InterruptedError):
        inside.setattr(module, "take_step", step)
        train(config, folder, show_progress=False)


def noise_drawn_anew(patch):
    """The lost steps are repeated under their names, with other noise: they count once."""
    right = module.unpack

    def unpack(setup, document, tensors):
        state = right(setup, document, tensors)
        if tensors:
            state.noise = type(state.noise)()
        return state

    patch.setattr(module, "unpack", unpack)


def noise_of_earlier_steps(patch):
    """Snapshots hold the noise generator as it was before the first step."""
    right, kept = module.pack, {}

    def pack(setup, state):
        document, tensors = right(setup, state)
        tensors["generator.noise"] = kept.setdefault("state", tensors["generator.noise"])
        return document, tensors

    patch.setattr(module, "pack", pack)


def other_weights(patch):
    """The base has changed, and the lost steps are repeated with their noise on other sums."""
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


# Selection: a subset that one record more or less changes for other records


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
    """The first, the last and those before an evaluation, whatever is restored."""
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
    """A fault within the engine, which every backend shares, is noticed too."""
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
