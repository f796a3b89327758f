"""The preconditioner against autograd on ``r c^T * gradient``, numpy, and closed forms of SGD."""

import copy
import functools
import hashlib
import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lowrank_dp.data import load_task
from lowrank_dp.data.generated import public_sentiment, public_tables, sentiment, tables
from lowrank_dp.evaluation import evaluate
from lowrank_dp.grads import clipped_sum, layers
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.models import load_model
from lowrank_dp.models.scaled import (
    Scale,
    ScaledLinear,
    change_scale,
    full_weights,
    remove_scales,
    scalable_layers,
    scale_layers,
    scaled_layers,
)
from lowrank_dp.optim import attach_preconditioner
from lowrank_dp.precondition import (
    Moment,
    NoisyMoments,
    joint_scales,
    public_moments,
    public_rows,
    refresh_scales,
    second_moment,
)
from lowrank_dp.precondition.public import _order as step_rows
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.loop import train
from lowrank_dp.train.setup import prepare
from lowrank_dp.train.state import first_state
from lowrank_dp.train.step import take_step
from tests.oracles import clip_one_by_one, refusal_of
from tests.tasks import Stop, case, save_bert, seeded, write_reviews
from tests.test_grads import build, make_batch, worst

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*ackward hook.*:UserWarning"),  # Opacus's hooks
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),
    pytest.mark.filterwarnings("ignore:Optimal order:UserWarning"),
]


def random_scales(model, seed=0, spread=1.0):
    """Return log-normal scales for every layer that can have scales."""
    generator = seeded(seed)

    def draw(count):
        return torch.exp(spread * torch.randn(count, generator=generator))

    return {
        name: Scale(*map(draw, layer.weight.shape))
        for name, layer in scalable_layers(model).items()
    }


def outer(scale):
    return scale.row.double()[:, None] * scale.col.double()


def scaled_one_by_one(model, batch, scales, bound):
    """Scale the gradient of an ordinary model by ``r c^T``, clip row by row by autograd, add up."""
    names = {f"{name}.weight": outer(scale) for name, scale in scales.items()}
    total, norms = {}, []
    for row in range(len(batch["labels"])):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        gradient, _ = clip_one_by_one(model, one, math.inf)
        for name, factor in names.items():
            gradient[name] = gradient[name] * factor
        norm = torch.stack([g.norm() for g in gradient.values()]).norm()
        norms.append(norm)
        for name, g in gradient.items():
            total[name] = total.get(name, 0) + g * min(1.0, bound / float(norm))
    return total, torch.stack(norms)


@pytest.mark.parametrize("arch", ["bert", "gpt2"])
def test_every_backend_clips_the_scaled_gradient(arch):
    for method in ("full", "lora", "frozen-a"):
        model, batch = build(arch, "sequence", method), make_batch()
        batch["position_ids"] = torch.arange(2, 9).repeat(5, 1)  # Opacus needs them by row
        scales = random_scales(model)
        assert scales, method
        _, norms = scaled_one_by_one(model, batch, scales, math.inf)
        expected = scaled_one_by_one(model, batch, scales, float(norms.median()))
        scale_layers(model, scales)
        for backend in ("bookkeeping", "loop", "opacus"):
            with case(arch, method, backend):
                found = clipped_sum(model, batch, float(norms.median()), backend=backend)
                assert worst(found, expected) < 1e-5


@pytest.mark.slow
def test_the_compiled_backend_clips_the_scaled_gradient(without_cpp):
    model, batch = build("bert"), make_batch()
    scales = random_scales(model)
    expected = scaled_one_by_one(model, batch, scales, 0.5)
    scale_layers(model, scales)
    assert worst(clipped_sum(model, batch, 0.5, backend="compiled"), expected) < 1e-5


@pytest.mark.parametrize("arch", ["bert", "gpt2", "llama"])
def test_scales_leave_the_function_and_a_state_dict_of_full_weights(arch):
    task = "causal" if arch == "llama" else "sequence"
    for method in ("full", "lora"):
        model, batch = build(arch, task, method), make_batch(task)
        before, state = model(**batch).logits, copy.deepcopy(model.state_dict())
        scales = random_scales(model)
        scale_layers(model, scales)
        assert set(scaled_layers(model)) == set(scales) and not scalable_layers(model)
        assert model.state_dict().keys() == state.keys()
        top = float(before.detach().abs().max())
        torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=2e-6 * top)
        stored = model.state_dict()[f"{next(iter(scales))}.weight"]
        want = state[f"{next(iter(scales))}.weight"].double() / outer(next(iter(scales.values())))
        torch.testing.assert_close(stored.double(), want, rtol=1e-5, atol=1e-7)
        full = full_weights(model, model.state_dict())
        torch.testing.assert_close(full, dict(state), rtol=1e-5, atol=1e-7)
        remove_scales(model)
        assert not scaled_layers(model) and scalable_layers(model).keys() == scales.keys()
        torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=1e-5, atol=1e-7)


def test_tied_and_frozen_weights_get_no_scales():
    model = build("gpt2", "causal")  # its output layer shares the embedding's weight
    assert "lm_head" not in scalable_layers(model)
    model = build("bert")
    for p in model.bert.parameters():
        p.requires_grad_(False)
    assert [*scalable_layers(model)] == ["classifier"]
    one = nn.Linear(3, 3)
    shared = nn.Sequential(one, nn.Linear(3, 3))
    shared[1].weight = one.weight
    assert not scalable_layers(shared)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**20), st.floats(0.0, 2.0), st.floats(0.01, 10.0))
def test_one_row_moves_the_sum_by_the_clipping_norm_at_most(seed, spread, bound):
    model = scaled_bert(seed, spread)
    batch = make_batch(rows=4, seed=seed)
    with_row, _ = clipped_sum(model, batch, bound, check_rows=False)
    for left_out in range(4):
        rest = {key: value[[i for i in range(4) if i != left_out]] for key, value in batch.items()}
        without, _ = clipped_sum(model, rest, bound, check_rows=False)
        moved = torch.stack([(with_row[n] - without[n]).double().norm() for n in with_row]).norm()
        assert float(moved) <= bound * (1 + 2e-4)


@functools.lru_cache(maxsize=1)
def plain_bert():
    return build("bert")


def scaled_bert(seed, spread):
    model = copy.deepcopy(plain_bert())
    scale_layers(model, random_scales(model, seed, spread))
    return model


def test_moments_and_scales_are_those_of_numpy():
    rng = np.random.default_rng(0)
    matrices = {"a": rng.normal(size=(3, 5)), "b": 40 * rng.normal(size=(4, 2))}
    moments = {name: second_moment(torch.tensor(matrix)) for name, matrix in matrices.items()}
    for power in (0.0, 0.125, 0.25):
        with case(power):
            raw = {
                name: np.outer((m**2).mean(1) ** -power, (m**2).mean(0) ** -power)
                for name, m in matrices.items()
            }
            entries = np.concatenate([r.ravel() for r in raw.values()])
            scales = joint_scales(moments, power)
            for name, factor in raw.items():
                want = factor / np.sqrt((entries**2).mean())
                np.testing.assert_allclose(outer(scales[name]).numpy(), want, rtol=1e-12)
    equal = joint_scales(moments, 0.25, equal_rows=("a",))["a"]
    assert float(equal.row.max()) == float(equal.row.min()) and float(equal.col.std()) > 0


def test_scales_do_not_depend_on_the_unit_of_the_moments():
    row, col = torch.tensor([1.0, 2, 6]).double(), torch.tensor([3.0, 3, 1, 5]).double()
    for power in (0.0, 0.125, 0.5):
        raw = np.outer(row.numpy() ** -power, col.numpy() ** -power)
        want = raw / np.sqrt((raw**2).mean())
        for unit in (1e-300, 1e-160, 1e-100, 1.0, 1e160, 1e300):
            (scale,) = joint_scales({"a": Moment(unit * row, unit * col)}, power).values()
            np.testing.assert_allclose(outer(scale).numpy(), want, rtol=1e-12, err_msg=f"{unit}")
    far = {"a": Moment(row, col), "b": Moment(1e-300 * row, 1e-300 * col)}
    assert all((outer(scale) > 0).all() for scale in joint_scales(far, 0.125).values())
    with pytest.raises(ValueError, match="moments must differ less between matrices"):
        joint_scales(far, 0.5)


def test_the_power_has_one_default_wherever_it_is_given():
    doors = (joint_scales, attach_preconditioner)
    found = {inspect.signature(door).parameters["power"].default for door in doors}
    assert found == {TrainConfig.precondition_power} == {0.125}


def test_scales_of_dead_rows_and_dead_matrices_stay_bounded():
    zero = Moment(torch.zeros(2).double(), torch.zeros(3).double())
    dead = Moment(torch.tensor([2.0, 0.0]).double(), torch.tensor([1.0, 1.0]).double())
    scales = joint_scales({"zero": zero, "dead": dead}, 0.25)
    assert scales["zero"].row.tolist() == [1, 1] and scales["zero"].col.tolist() == [1, 1, 1]
    ratio = scales["dead"].row[1] / scales["dead"].row[0]
    assert float(ratio) == pytest.approx((1e-6 / 2) ** -0.25)
    assert float((outer(scales["dead"]) ** 2).mean()) == pytest.approx(1)


def test_bad_arguments_are_named(tmp_path):
    odd = tmp_path / "odd.csv"
    odd.write_text("words,class\ngood film,1\n")
    few = write_reviews(tmp_path / "few", train=20)
    moment = {"a": second_moment(torch.ones(2, 3))}
    for word, call in (
        ("power", lambda: joint_scales(moment, 0.6)),
        ("power", lambda: joint_scales(moment, -0.1)),
        ("moment of a", lambda: joint_scales({"a": Moment(-moment["a"].row, moment["a"].col)})),
        ("gradient", lambda: second_moment(torch.full((2, 2), math.nan))),
        ("gradient", lambda: second_moment(torch.ones(2, 2, 2))),
        ("1e+150], got 1e+200", lambda: second_moment(1e200 * torch.ones(2, 2).double())),
        ("1e+150], got 1e-200", lambda: second_moment(1e-200 * torch.ones(2, 2).double())),
        ("learning_rate", lambda: public_moments({}, [], learning_rate=0.0)),
        ("gradients", lambda: public_moments({"a": nn.Parameter(torch.ones(1))}, [])),
        ("none of a", lambda: public_moments({"a": nn.Parameter(torch.ones(1))}, [dict])),
        ("equal_rows must be", lambda: joint_scales(moment, equal_rows="a")),
        ("kind classification", lambda: public_rows("generated-table", load_task("generated"), 9)),
        ("known name", lambda: public_rows("no/such/file.csv", load_task("generated"), 9)),
        ("rename its columns", lambda: public_rows(str(odd), load_task("generated"), 9)),
        ("precondition_rows 1", lambda: public_rows(str(few), load_task("generated"), 1)),
    ):
        with case(word):
            assert word in refusal_of(call)


def test_public_training_is_adam_and_leaves_no_trace():
    """Moments equal those of Adam by its formulas, and the parameters keep their values."""
    target = torch.arange(6.0).view(2, 3)
    p, q = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.zeros(3))
    found = public_moments(
        {"p": p, "q": q},
        [lambda: {"p": (p - target).detach() * 3, "q": torch.ones(3)}] * 4,
        learning_rate=0.1,
    )
    assert torch.equal(p, torch.ones(2, 3)) and torch.equal(q, torch.zeros(3)) and p.grad is None
    w, m, v, squares = np.ones((2, 3)), 0.0, 0.0, []
    for step in range(1, 5):
        g = 3 * (w - target.numpy())
        squares.append(g**2)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - 0.1 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    assert [*found] == ["p"]
    mean = np.mean(squares, axis=0)
    np.testing.assert_allclose(found["p"].row.numpy(), mean.mean(1), rtol=1e-5)
    np.testing.assert_allclose(found["p"].col.numpy(), mean.mean(0), rtol=1e-5)


def test_noisy_moments_are_those_of_the_clean_gradient_on_average():
    """The mean over 2,000 steps is within 5 standard errors; correct code fails once in 10^5."""
    generator = seeded(3)
    clean = (
        torch.randn(4, 6, generator=generator).double()
        * torch.tensor([3.0, 1, 1, 0.0])[:, None].double()
    )
    scale, sigma, steps = Scale(torch.tensor([0.5, 2, 1, 1]), torch.linspace(0.5, 2, 6)), 0.7, 2000
    moments = NoisyMoments()
    for _ in range(steps):
        noise = sigma * torch.randn(4, 6, generator=generator).double()
        moments.add({"a": outer(scale) * clean + noise}, {"a": scale}, sigma)
    found, want = moments.moments()["a"], second_moment(clean)
    # variance of (x + N(0, s^2))^2 is 4 x^2 s^2 + 2 s^4
    factor = outer(scale)
    variance = (4 * (factor * clean) ** 2 * sigma**2 + 2 * sigma**4) / factor**4 / steps
    assert bool(((found.row - want.row)[:3].abs() <= 5 * (variance.sum(1).sqrt() / 6)[:3]).all())
    assert bool(((found.col - want.col).abs() <= 5 * variance.sum(0).sqrt() / 4).all())
    # a row without signal counts as the standard error of its mean, or more by chance (2 in 100)
    error = float((2 * sigma**4 / factor**4).sum(1)[3].sqrt() / 6 / math.sqrt(steps))
    assert error * 0.999 <= float(found.row[3]) <= 2 * error
    again = NoisyMoments()
    again.load_tensors(moments.tensors())
    assert again.steps == steps and torch.equal(again.moments()["a"].col, found.col)


@pytest.mark.parametrize("kind", ["sgd", "adam", "amsgrad"])
def test_new_scales_leave_function_and_momentum_of_the_full_weight(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    scale_layers(model, random_scales(model))
    optimizer = {
        "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
        "adam": torch.optim.Adam,
        "amsgrad": functools.partial(torch.optim.AdamW, amsgrad=True),
    }[kind](model.parameters(), lr=0.1)
    x = torch.randn(5, 4)
    model(x).square().sum().backward()
    optimizer.step()
    before, layer = model(x), model[0]
    old = Scale(layer.row_scale.clone(), layer.col_scale.clone())
    state = {key: value.clone() for key, value in optimizer.state[layer.weight].items()}
    refresh_scales(
        model,
        optimizer,
        {
            name: second_moment(torch.randn(w.weight.shape))
            for name, w in scaled_layers(model).items()
        },
        0.25,
    )
    torch.testing.assert_close(model(x), before)
    new = Scale(layer.row_scale, layer.col_scale)
    assert not torch.allclose(new.row, old.row)
    ratio = (outer(new) / outer(old)).float()
    exponents = {"momentum_buffer": 1} if kind == "sgd" else {"exp_avg": 1, "exp_avg_sq": 2}
    exponents |= {"max_exp_avg_sq": 2} if kind == "amsgrad" else {}
    for key, exponent in exponents.items():
        torch.testing.assert_close(optimizer.state[layer.weight][key], state[key] * ratio**exponent)


def test_public_text_is_disjoint_from_generated_tasks_and_fits_the_classes():
    for public, private in (
        (public_sentiment(200, 0), sentiment(0)),
        (public_tables(100, 0), tables(0)),
    ):
        texts = {text for text, _ in public}
        assert len(texts) == len(public)
        # a text is public by its hash, whatever its seed is
        assert {hashlib.sha256(text.encode()).digest()[0] % 4 for text in texts} == {0}
        others = {text for split in private.values() for text, _ in split}
        assert 0 not in {hashlib.sha256(text.encode()).digest()[0] % 4 for text in others}
    task = load_task("generated")
    rows = public_rows("generated", task, 50)
    assert len(rows.examples) == 50 and {e.label for e in rows.examples} == {0, 1}


def test_public_steps_take_all_rows_in_turn_and_in_another_order_each_time():
    order = step_rows(6, 4, 6)
    rows = [row for step in order for row in step]
    assert [len(step) for step in order] == [4] * 6 and order == step_rows(6, 4, 6)
    rounds = [rows[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(one) == [*range(6)] for one in rounds)
    assert len({tuple(one) for one in rounds}) == 4  # fails by chance once in 100, for one seed
    assert [sorted(step) for step in step_rows(3, 256, 2)] == [[0, 1, 2]] * 2


# --- in train


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Make a BERT of one layer with random weights, and a private and a public task."""
    folder = tmp_path_factory.mktemp("places")
    save_bert(folder / "model", hidden_size=16, num_hidden_layers=1, intermediate_size=24)
    write_reviews(folder / "data")
    write_reviews(folder / "public", other_texts, train=30)
    return folder


def other_texts(rows):
    """Prefix each text, so that no text is one of the private task's."""
    return [row | {"sentence": f"they say: {row['sentence']}"} for row in rows]


def make_config(places, **changes):
    base = {
        "model": str(places / "model"),
        "task": str(places / "data"),
        "steps": 7,
        "batch_size": 10,
        "noise_multiplier": 0.6,
        "learning_rate": 0.1,
        "optimizer": "sgd",
        "beta1": 0.9,
        "eval_every": 2,
        "snapshot_every": 3,
        "micro_batch_size": 8,
        "seed": 5,
        "precondition": "generated",
    }
    power, of_text = (
        {"precondition_power": 0.25},
        {"precondition_rows": 20, "precondition_steps": 3},
    )
    read = {"none": {}, "noisy": power | {"precondition_every": 2}}
    return TrainConfig(**base | read.get(changes.get("precondition"), power | of_text) | changes)


def test_a_step_moves_the_full_weight_by_the_scaled_noisy_sum(places):
    """SGD has the closed form W - rate / B * r c^T * (noisy sum), with the clean part r c^T * G."""
    config = make_config(places, beta1=0.0)
    setup = prepare(config, 5)
    state = first_state(config, "x")
    before = full_weights(setup.model, copy.deepcopy(setup.model.state_dict()))
    clean, noisy = take_step(setup, state)
    after = full_weights(setup.model, setup.model.state_dict())
    layers = scaled_layers(setup.model)
    assert len(layers) == 8
    for name, layer in layers.items():
        with case(name):
            key = f"{name}.weight"
            factor = (layer.row_scale[:, None] * layer.col_scale).double()
            want = before[key] - 0.1 / 10 * factor * noisy[key].double()
            torch.testing.assert_close(after[key].double(), want, rtol=1e-4, atol=1e-6)
            noise = (noisy[key] - clean[key]).double()
            assert float(noise.square().mean().sqrt()) == pytest.approx(0.6, rel=0.5)
    scales = [Scale(layer.row_scale, layer.col_scale) for layer in layers.values()]
    squares = torch.cat([outer(scale).square().flatten() for scale in scales])
    assert float(squares.mean()) == pytest.approx(1, rel=1e-5)
    rows = layers["classifier"].row_scale
    assert float(rows.max()) == float(rows.min())


KINDS = {
    "public": {},
    "noisy": {"precondition": "noisy"},
    "noisy, adam": {"precondition": "noisy", "optimizer": "adam", "beta1": None},
    "lora": {"method": "lora", "rank": 3, "scheme": "optimal"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_the_unbroken_one_and_is_saved_with_full_weights(
    places, tmp_path, monkeypatch, kind
):
    config = make_config(places, **KINDS[kind])
    train(config, tmp_path / "whole", show_progress=False)
    original, calls = GaussianMechanism.add_noise, []

    def breaking(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise Stop
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GaussianMechanism, "add_noise", breaking)
        with pytest.raises(Stop):
            train(config, tmp_path / "broken", show_progress=False)
    result = train(config, tmp_path / "broken", resume=True, show_progress=False)
    assert result.releases == config.steps
    (whole,), (broken,) = (
        [*(tmp_path / name).glob("*model.safetensors")] for name in ("whole", "broken")
    )
    assert whole.read_bytes() == broken.read_bytes()
    task = load_task(config.task)
    model, tokenizer = load_model(str(tmp_path / "whole"), task=task)
    assert not scaled_layers(model)
    scores = evaluate(model, tokenizer, task, "validation", max_length=64, batch_size=8)
    assert scores["loss"] == pytest.approx(result.curve[-1]["loss"], rel=1e-4)


def test_the_scaled_model_is_examined_too(places, monkeypatch):
    """A rule that leaves out the scales is found on public rows, before a private row is read."""
    config = make_config(places)
    prepare(config, 3)
    monkeypatch.setitem(layers.RULES[ScaledLinear], "weight", layers.RULES[nn.Linear]["weight"])
    with pytest.raises(ValueError, match="get another gradient by backend 'bookkeeping'"):
        prepare(config, 3)


def test_vectors_are_frozen_on_request(places):
    for freeze in (False, True):
        setup = prepare(make_config(places, precondition_freeze_vectors=freeze), 5)
        assert any(p.ndim == 1 for p in setup.trained.values()) is not freeze
        assert sum(p.ndim == 2 for p in setup.trained.values()) == 8


def test_noisy_scales_change_and_public_ones_do_not(places):
    for source, moves in (("noisy", True), ("generated", False)):
        with case(source):
            config = make_config(places, precondition=source, noise_multiplier=0.05)
            setup, state = prepare(config, 5), first_state(config, "x")
            layer = scaled_layers(setup.model)["classifier"]
            first = layer.col_scale.clone()
            if moves:
                assert torch.equal(first, torch.ones_like(first))
            take_step(setup, state)
            assert torch.equal(layer.col_scale, first)
            take_step(setup, state)
            assert torch.equal(layer.col_scale, first) is not moves
            # the classes of the public text are not those of the task
            equal = {
                name: len(one.row_scale.unique()) == 1
                for name, one in scaled_layers(setup.model).items()
            }
            assert equal["classifier"] and not all(equal.values())


def test_the_statement_says_what_is_public(places, tmp_path):
    def statement(**changes):
        config = make_config(places, steps=1, **changes)
        return train(config, tmp_path / f"{len([*tmp_path.iterdir()])}", show_progress=False)

    result = statement()
    assert "preconditioner from text that must be public: the package's" in result.privacy
    assert result.epsilon == statement(precondition="none").epsilon > 0
    assert "preconditioner from the run's own noisy sums" in statement(precondition="noisy").privacy
    assert "text that must be public: public from" in (
        statement(precondition=str(places / "public")).privacy
    )
    own = {"precondition": str(places / "data")}
    assert "private one" in refusal_of(make_config, places, **own)
    result = statement(**own, diagnostic=True)
    assert result.epsilon is None and result.privacy.startswith("NON-PRIVATE: the preconditioner")


def test_a_copy_of_the_private_records_is_not_public(places, tmp_path):
    def in_capitals(rows):
        return [row | {"sentence": f" {row['sentence'].upper()}"} for row in rows]

    copies = {
        "copy": write_reviews(tmp_path / "copy"),
        "subset": write_reviews(tmp_path / "subset", train=9),
        "superset": write_reviews(tmp_path / "superset", train=900),
        "spelling": write_reviews(tmp_path / "spelling", in_capitals),
        "the file in the private folder": places / "data" / "train.jsonl",
    }
    for name, path in copies.items():
        with case(name):
            message = refusal_of(prepare, make_config(places, precondition=str(path)), 5)
            assert "holds the private training texts of data" in message and "\n" not in message


def test_options_out_of_range_or_in_conflict_are_refused(places, monkeypatch):
    monkeypatch.setenv("HOME", str(places))
    for changes, words in (
        ({"precondition": "generatd"}, ("precondition must be one of", "did you mean 'generated'")),
        ({"precondition": "cola", "task": "CoLA"}, ("public task", "diagnostic")),
        ({"precondition_power": 0.7}, ("precondition_power",)),
        ({"precondition_rate": 0}, ("precondition_rate",)),
        ({"precondition_steps": 0}, ("precondition_steps",)),
        ({"precondition_rows": 0}, ("precondition_rows",)),
        ({"precondition_every": 0}, ("precondition_every",)),
        ({"precondition": "noisy", "shard": True}, ("noisy", "shard")),
        ({"precondition": "noisy", "momentum_beta": 0.9, "beta1": None}, ("noisy", "mean")),
        ({"diagnostic": True}, ("diagnostic",)),
        ({"precondition": ""}, ("precondition must be a name or a path",)),
        ({"precondition": "no/such.csv"}, ("precondition must be one of", "an existing path")),
        ({"precondition": "~/data"}, ("public task", "diagnostic")),
        ({"precondition": "none", "precondition_freeze_vectors": True}, ("precondition too",)),
    ):
        with case(changes):
            message = refusal_of(make_config, places, **changes)
            assert message.count("\n") == 0 and all(word in message for word in words), message


# --- with Opacus


def opacus_gradients(mode, power=0.25):
    """A preconditioned model, and the gradients that Opacus gives the optimizer without noise."""
    from opacus import PrivacyEngine

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    plain = copy.deepcopy(model)
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    public = [(torch.randn(7, 6), torch.arange(7) % 3) for _ in range(3)]
    handle = attach_preconditioner(
        model, public, lambda m, batch: cross_entropy(m(batch[0]), batch[1]), power=power
    )
    torch.testing.assert_close(model(x), plain(x))
    loss = nn.CrossEntropyLoss()
    wrapped, optimizer, *rest, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=loss,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=8),
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    seen = {}
    optimizer.original_optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    loss = rest[0] if rest else loss
    loss(wrapped(x), y).backward()
    optimizer.step()
    return model, plain, (x, y), seen, handle


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_opacus_clips_the_scaled_gradient(mode):
    model, plain, (x, y), seen, handle = opacus_gradients(mode)
    layers = scaled_layers(model)
    factors = {f"{n}.weight": outer(Scale(m.row_scale, m.col_scale)) for n, m in layers.items()}
    assert float(factors["0.weight"].std()) > 0.01
    total = {}
    for row in range(8):
        loss = cross_entropy(plain(x[row : row + 1]), y[row : row + 1])
        names, parameters = zip(*plain.named_parameters(), strict=True)
        gradient = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        for name, factor in factors.items():
            gradient[name] = gradient[name] * factor
        norm = float(torch.stack([g.double().norm() for g in gradient.values()]).norm())
        for name, g in gradient.items():
            total[name] = total.get(name, 0) + g.double() * min(1, 0.3 / norm) / 8
    for name, want in total.items():
        torch.testing.assert_close(seen[name].double(), want, rtol=1e-4, atol=1e-6)
    after = model.eval()(x)  # Opacus counts no forward in this mode
    handle.remove()
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    torch.testing.assert_close(model(x), after)
    before = plain[0].weight.double()
    want = before - 0.1 * factors["0.weight"] * total["0.weight"]
    torch.testing.assert_close(model[0].weight.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_state_dict_loads_into_the_plain_model_and_resumes(mode):
    model, plain, (x, _), _, _ = opacus_gradients(mode)
    after = model.eval()(x)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    assert set(saved) == set(plain.state_dict())
    unbroken = copy.deepcopy(model[0].weight)
    plain.load_state_dict(saved)
    torch.testing.assert_close(plain(x), after)
    resumed, _, _, _, _ = opacus_gradients(mode)  # the same public batches give the same scales
    with torch.no_grad():
        resumed[0].weight.zero_()
    resumed.load_state_dict(saved)
    torch.testing.assert_close(resumed.eval()(x), after)
    torch.testing.assert_close(resumed[0].weight, unbroken)
    wrong = saved | {"0.weight": torch.zeros(2, 2)}
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        resumed.load_state_dict(wrong)


def test_layers_whose_parent_reads_their_weights_get_no_scales():
    """In eval mode without gradients, torch runs this layer as one function of its weights."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(24, 3))
    x, y = torch.randn(5, 3, 8), torch.arange(5) % 3
    with torch.no_grad():
        before = model.eval()(x)
    attach_preconditioner(
        model.train(), [(x, y)], lambda m, batch: cross_entropy(m(batch[0]), batch[1])
    )
    assert list(scaled_layers(model)) == ["2"]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), before)


def test_attaching_twice_or_to_no_layer_is_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    batch = [(torch.eye(3), torch.tensor([0, 1, 1]))]

    def loss_of(model, batch):
        return cross_entropy(model(batch[0]), batch[1])

    half = copy.deepcopy(model).to(torch.bfloat16)
    batch16 = torch.eye(3, dtype=torch.bfloat16), torch.tensor([0, 1, 1])
    for arguments, options, word in (
        ((nn.Tanh(), batch, loss_of), {}, "model must be"),
        ((model, [], loss_of), {}, "gradients must be"),
        ((model, batch, loss_of), {"power": 2}, "power"),
        ((model, batch, loss_of), {"learning_rate": -1}, "learning_rate"),
        ((model, batch, lambda m, b: m(b[0])[0]), {}, "loss_of must be"),
        ((model, batch, lambda m, b: loss_of(m, b).detach()), {}, "loss_of must be"),
        ((model, batch, lambda m, b: loss_of(m, b).item()), {}, "loss_of must be"),
        ((half, [batch16], loss_of), {}, "gradient must be a float32 or float64 tensor"),
    ):
        assert word in refusal_of(attach_preconditioner, *arguments, **options)
    from opacus import GradSampleModule

    wrapped = GradSampleModule(copy.deepcopy(model))
    assert "before make_private" in refusal_of(attach_preconditioner, wrapped, batch, loss_of)
    attach_preconditioner(model, batch, loss_of)
    assert "have no scales" in refusal_of(attach_preconditioner, model, batch, loss_of)
    change_scale(model[0], Scale(torch.ones(2), torch.ones(3)))
