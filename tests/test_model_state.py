"""A model that a forward changes is refused, and is as it was before after every clipped sum."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from lowrank_dp.grads.clipping import clipped_sum, row_gradients
from lowrank_dp.models import load_tokenizer
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.setup import prepare
from tests.oracles import refusal_of
from tests.tasks import write_reviews

BACKENDS = ("bookkeeping", "compiled", "opacus", "loop")
NOT_COMPILED = ("bookkeeping", "opacus", "loop")
SIZES = dict(
    vocab_size=768,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    num_labels=2,
    pad_token_id=0,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
pytestmark = pytest.mark.filterwarnings("ignore:.*ackward hook.*:UserWarning")


@pytest.fixture(autouse=True)
def fixed_seed():
    """Draw the same weights in any order of the tests."""
    torch.manual_seed(0)


class Small(nn.Module):
    """Embedding, something in between, mean over positions, head."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def between(self, x):
        return x

    def forward(self, input_ids, labels=None):
        logits = self.head(torch.tanh(self.between(self.words(input_ids))).mean(1))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


class Normalising(Small):
    """Keeps running statistics of the rows in training mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(8, track_running_stats=True)

    def between(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Switching(Small):
    """Runs another layer from the first batch of up to 64 positions on."""

    def __init__(self):
        super().__init__()
        self.way, self.layer = "sparse", nn.Tanh()

    def between(self, x):
        if self.way == "sparse" and x.shape[1] <= 64:
            self.way, self.layer = "full", nn.Sigmoid()
        return self.layer(x)


class Writing(Small):
    """Keeps a mean of the rows in a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.code = nn.Parameter(torch.zeros(8), requires_grad=False)

    def between(self, x):
        with torch.no_grad():
            self.code.lerp_(x.mean((0, 1)), 0.5)
        return x


class Averaging(Small):
    """Keeps a mean of the rows in a number."""

    def __init__(self, value):
        super().__init__()
        self.mean = value

    def between(self, x):
        self.mean = 0.5 * self.mean + 0.5 * float(x.detach().mean())
        return x


class Caching(Small):
    """Counts its calls, and keeps tables for the longest batch so far."""

    def __init__(self):
        super().__init__()
        self.calls, self.length, self.positions = 0, None, None
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.zeros(1))
        self.register_buffer("mask", None)

    def between(self, x):
        self.calls += 1
        self.batches += 1
        if self.length is None or self.length < x.shape[1]:
            self.length, self.last = x.shape[1], True
            self.positions = torch.arange(self.length) / 8
            self.table, self.mask = self.positions.cos(), torch.ones(self.length)
        length = x.shape[1]
        return x + (self.table * self.mask + self.positions)[:length, None] / length


def batch_of(rows=5, length=7):
    generator = torch.Generator().manual_seed(3)
    return {
        "input_ids": torch.randint(1, 50, (rows, length), generator=generator),
        "labels": torch.arange(rows) % 2,
    }


def state_of(model):
    """Every buffer's values, and the other attributes and submodules of every module."""
    return {
        name: (
            {key: None if b is None else b.tolist() for key, b in module._buffers.items()},
            dict(module._modules),
            {key: value for key, value in vars(module).items() if not isinstance(value, dict)},
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("make", "line"),
    [
        (Normalising, r"^model must keep nothing of the .* buffer norm\.running_mean: put"),
        (Switching, r"^model must run every .* way from 'sparse' to 'full': set it to 'full"),
        (Writing, r"^model must leave its parameters .* writes to parameter code: switch off"),
        (
            lambda: Averaging(0.25),
            r"^model must keep nothing of the .* changes attribute mean: put",
        ),
    ],
)
def test_a_model_that_a_forward_changes_is_refused_by_every_backend(make, line, backend):
    model = make().train()
    before = state_of(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=line):
            clipped_sum(model, batch_of(), 1.0, backend=backend)
    assert state_of(model) == before


@pytest.mark.parametrize("backend", NOT_COMPILED)
def test_no_value_of_a_row_stays_on_a_model_that_is_not_examined(backend):
    for make in (Normalising, Switching, lambda: Averaging(0.25), Caching):
        model = make().train()
        before = state_of(model)
        clipped_sum(model, batch_of(), 1.0, micro_batch_size=2, backend=backend, check_rows=False)
        row_gradients(model, batch_of())
        assert state_of(model) == before


@pytest.mark.parametrize("backend", NOT_COMPILED)
def test_counters_lengths_and_tables_are_accepted_and_restored(backend):
    for model in (Caching(), Normalising().eval()):
        before = state_of(model)
        expected = clipped_sum(model, batch_of(), 1.0, backend=backend)[1]
        assert state_of(model) == before
        model(**batch_of(length=11))  # a table that is in use
        kept = state_of(model)
        found = clipped_sum(model, batch_of(), 1.0, micro_batch_size=2, backend=backend)[1]
        torch.testing.assert_close(found, expected)
        assert state_of(model) == kept


# Models of transformers.


def bigbird(attention_type):
    config = transformers.BigBirdConfig(
        **SIZES,
        attention_type=attention_type,
        max_position_embeddings=160,
        block_size=8,
        num_random_blocks=1,
    )
    model = transformers.BigBirdForSequenceClassification(config)
    model.bert.embeddings.requires_grad_(False)  # Opacus has no rule for positions
    return model


@pytest.mark.parametrize("backend", NOT_COMPILED)
def test_ibert_is_refused_only_in_training_mode(backend):
    config = transformers.IBertConfig(**SIZES, max_position_embeddings=40)
    model = transformers.IBertForSequenceClassification(config)
    model.ibert.requires_grad_(False)
    before = state_of(model.train())
    with pytest.raises(ValueError, match=r"changes buffer ibert\.embeddings\.\S*x_min: put"):
        clipped_sum(model, batch_of(), 1.0, backend=backend)
    assert state_of(model) == before
    clipped_sum(model.eval(), batch_of(), 1.0, backend=backend)


@pytest.mark.parametrize("backend", NOT_COMPILED)
def test_bigbird_runs_with_the_attention_of_its_configuration_or_is_refused(backend):
    short, long = batch_of(), batch_of(3, 72)
    model = bigbird("block_sparse").eval()
    before = state_of(model)
    for check_rows in (True, False):
        if check_rows:
            message = refusal_of(clipped_sum, model, short, 1.0, backend=backend)
            assert "changes bert.attention_type from 'block_sparse' to 'original_full'" in message
        else:
            clipped_sum(model, short, 1.0, backend=backend, check_rows=False)
        assert state_of(model) == before
    for attention in ("block_sparse", "original_full"):  # every row has one public length
        clipped_sum(bigbird(attention).eval(), long, 1.0, backend=backend, padding="max-length")
    clipped_sum(bigbird("original_full").eval(), short, 1.0, backend=backend)


def test_training_refuses_another_attention_on_public_rows(tmp_path, monkeypatch):
    for name in ("block_sparse", "original_full"):
        bigbird(name).save_pretrained(tmp_path / name)
        load_tokenizer("tiny").save_pretrained(tmp_path / name)
    task = str(write_reviews(tmp_path / "data"))

    def setup(name):
        base = dict(task=task, noise_multiplier=1.0, batch_size=8, seed=0)
        return prepare(TrainConfig(model=str(tmp_path / name), **base), 0)

    assert setup("original_full").model.bert.attention_type == "original_full"
    monkeypatch.setattr("lowrank_dp.train.setup.digests", lambda *rest: pytest.fail("accepted"))
    assert "'original_full' before (train: in config.json)" in refusal_of(setup, "block_sparse")
