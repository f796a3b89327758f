"""Book-keeping on a compiled graph compared with ordinary book-keeping, and its refusals."""

import gc
import json
import re
import shutil
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager, eager
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from lowrank_dp.artifacts.runs import RunFolder
from lowrank_dp.grads.clipping import clipped_sum, clipped_sum_over
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.models.trainable import add_lora
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.loop import train
from tests.oracles import refusal_of

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = dict(
    vocab_size=53,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=24,
    pad_token_id=1,
)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Draw the same weights and batches in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture
def graphs(monkeypatch):
    """Collect every graph that dynamo makes; the graphs run without a C++ compiler.

    ``graphs.lower`` says whether AOT autograd traces the graphs first, as it does for inductor.
    """
    made = Graphs()

    def backend(graph, inputs):
        made.append(graph)
        return (aot_eager if made.lower else eager)(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield made
    torch._dynamo.reset()


class Graphs(list):
    lower = False


def make(name):
    torch.manual_seed(0)
    model = {
        "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),  # shared position ids
        "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(  # Conv1D
                vocab_size=53, n_embd=16, n_layer=1, n_head=2, n_positions=24
            )
        ),
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)
        ),
        "lora": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
    }[name]()
    if name == "lora":
        model.lowrank_dp_note = "a model"
        model.requires_grad_(False)
        model = add_lora(model, 2, 2.0, "gaussian", None, None)
        for parameter_name, p in model.named_parameters():  # else A has no gradient
            if "lora_B" in parameter_name:
                nn.init.normal_(p)
    return model.eval()


def batch_of(model, rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 53, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    classes = "Classification" in type(model).__name__
    labels = torch.arange(rows) % 2 if classes else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def assert_same(got, want, tolerance=1e-5):
    largest = max(float(total.abs().max()) for total in want.values())
    assert got.keys() == want.keys()
    for name, total in want.items():
        assert got[name].dtype == total.dtype
        assert float((got[name] - total).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("roberta", "gpt2", "llama", "lora")),
    ],
)
def test_sums_and_norms_are_those_of_book_keeping(name, graphs):
    """Micro-batches of different rows and lengths share graphs, each of which is made once."""
    graphs.lower = name == "gpt2"  # test_inductor lowers BERT
    model = make(name)
    parts = [
        batch_of(model, rows, length, seed)
        for seed, (rows, length) in enumerate([(3, 7), (4, 5), (1, 9), (3, 6), (5, 11), (2, 7)])
    ]
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    want, norms = clipped_sum_over(model, parts, 0.5)
    got, same = clipped_sum_over(model, parts, 0.5, backend="compiled")
    assert float(norms.max()) > 0.5  # some are clipped
    torch.testing.assert_close(same, norms, rtol=1e-4, atol=1e-6)
    assert_same(got, want)
    count = len(graphs)
    again, _ = clipped_sum_over(model, [batch_of(model, 6, 8), *parts], 0.5, backend="compiled")
    assert 1 <= count == len(graphs) and again.keys() == want.keys()
    assert before == [(n, p.requires_grad) for n, p in model.named_parameters()]
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_another_choice_of_layers_is_another_graph(graphs):
    """A graph uses the current weights, not the weights at the time when the graph was made."""
    model = Model().requires_grad_(True)
    assert len(clipped_sum(model, TOY_BATCH, 0.5, backend="compiled")[0]) == 3
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    model.table.requires_grad_(False)
    for labels in ([0, 1, 1], [1, 1, 0]):
        batch = {**TOY_BATCH, "labels": torch.tensor(labels)}
        want, _ = clipped_sum(model, batch, 0.5)
        got, _ = clipped_sum(model, batch, 0.5, backend="compiled")
        assert [*got] == ["layer.weight", "layer.bias"]
        assert_same(got, want)


def test_a_model_is_not_kept_alive(graphs):
    model = Model()
    clipped_sum(model, TOY_BATCH, 0.5, backend="compiled")
    assert graphs
    kept = weakref.ref(model)
    del model
    graphs.clear()
    torch._dynamo.reset()
    gc.collect()
    assert kept() is None


@pytest.mark.slow
def test_bf16(graphs):
    """Sums differ from book-keeping's by rounding of bfloat16, and from those of float32."""
    model = make("llama")
    batch = batch_of(model, 4, 7)
    want, norms = clipped_sum(model, batch, 0.5, autocast_dtype=torch.bfloat16)
    got, same = clipped_sum(model, batch, 0.5, autocast_dtype=torch.bfloat16, backend="compiled")
    torch.testing.assert_close(same, norms, rtol=3e-2, atol=0)
    assert_same(got, want, 5e-2)
    exact, _ = clipped_sum(model, batch, 0.5, backend="compiled")
    assert not any(torch.equal(exact[name], got[name]) for name in got)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    """The default compiler, inductor, gives the same sums and norms."""
    torch._dynamo.reset()
    model = make("bert")
    parts = [batch_of(model, 3, 7), batch_of(model, 4, 5, 1)]
    want, norms = clipped_sum_over(model, parts, 0.5)
    got, same = clipped_sum_over(model, parts, 0.5, backend="compiled")
    torch.testing.assert_close(same, norms, rtol=1e-4, atol=1e-6)
    assert_same(got, want)


def same(hidden):
    return hidden


class Model(nn.Module):
    """A frozen embedding, and one layer whose input and output a test may change."""

    def __init__(self, twist=same, before=same):
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 4), nn.Linear(4, 2)
        self.table.requires_grad_(False)
        self.twist, self.before = twist, before

    def forward(self, input_ids, labels=None):
        output = self.layer(self.before(self.table(input_ids)))
        logits = self.twist(output.flatten(1, -2)[:, 0])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


TOY_BATCH = {
    "input_ids": torch.arange(15).view(3, 5) % 9,
    "labels": torch.tensor([0, 1, 1]),
}


def branching(hidden):
    return hidden * 2 if bool(hidden.sum() > 0) else hidden


def otherwise(hidden):
    return hidden * 1.1 if torch.compiler.is_compiling() else hidden


def test_what_cannot_be_compiled_is_refused_in_one_line(graphs):
    batch = {**TOY_BATCH, "input_ids": torch.ones(3, 5).long()}  # rows that branch alike
    two_positions, another_axis = (lambda x: x[:, :2]), (lambda x: x[:, :, None])
    for case, (model, words) in {
        "branching": (Model(branching), "could not be compiled"),
        "other values": (
            Model(otherwise),
            "must give gradients of the same norms when compiled, and gives others",
        ),
        "two of five positions": (Model(before=two_positions), "could not be compiled"),
        "another axis": (Model(before=another_axis), r"output of shape \(3, 5, 1, 2\), which"),
    }.items():
        want, _ = clipped_sum(model, batch, 1.0)
        for _ in range(2):  # the first attempt leaves no state behind
            message = refusal_of(clipped_sum, model, batch, 1.0, backend="compiled")
            assert re.search(words, message) and "\n" not in message, (case, message)
        assert "forward" not in vars(model.layer) and model.layer.weight.requires_grad, case
        assert_same(clipped_sum(model, batch, 1.0)[0], want)  # book-keeping still works


def test_batches_and_modes_that_no_graph_is_made_for(graphs):
    batch = {"pixels": torch.ones(3, 5), "labels": torch.tensor([0, 1, 1])}
    with pytest.raises(
        ValueError, match="tensor 'input_ids' for the compiled backend, got pixels, lab"
    ):
        clipped_sum(Model(), batch, 1.0, backend="compiled")
    model = make("bert").train()
    with pytest.raises(ValueError, match="must be without dropout to be compiled"):
        clipped_sum(model, batch_of(model, 3, 7), 0.5, backend="compiled")
    assert not graphs


def test_bad_values_are_refused_as_elsewhere(graphs):
    model = Model()
    clipped_sum(model, TOY_BATCH, 0.5, backend="compiled")
    assert graphs
    with pytest.raises(ValueError, match="batch row 1 has no target"):
        batch = {**TOY_BATCH, "labels": torch.tensor([0, -100, 1])}
        clipped_sum(model, batch, 0.5, backend="compiled")
    with pytest.raises(ValueError, match="tensor 'labels'"):
        clipped_sum(model, {"input_ids": TOY_BATCH["input_ids"]}, 0.5, backend="compiled")


# In training


@pytest.mark.slow
def test_a_compiled_run_trains_as_another(base, graphs, tmp_path):
    config = replace(base, steps=3, noise_multiplier=0.3, learning_rate=1e-2)
    want = train(config, tmp_path / "plain", show_progress=False)
    got = train(replace(config, compile=True), tmp_path / "compiled", show_progress=False)
    assert graphs and got.epsilon == want.epsilon
    assert got.curve[-1]["loss"] == pytest.approx(want.curve[-1]["loss"], rel=1e-4)
    assert got.curve[-1]["loss"] != want.curve[0]["loss"]


@pytest.mark.slow
def test_steps_that_were_lost_count_again(base, graphs, tmp_path, monkeypatch):
    """Another graph may round differently: its sums with the same noise are a second release."""
    config = replace(base, steps=5, snapshot_every=2, compile=True)
    begin = RunFolder.begin_release

    def full(self, stream, step, *digests):
        if step == 3:
            raise OSError("no space left")
        begin(self, stream, step, *digests)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "begin_release", full)
        with pytest.raises(OSError, match="no space left"):
            train(config, tmp_path, show_progress=False)
    result = train(config, tmp_path, resume=True, show_progress=False)
    assert result.releases == 3 + 3  # steps 0 to 2, and 2 to 4
    mechanism = GaussianMechanism(base.noise_multiplier, 1.0, base.batch_size / 40)
    assert result.epsilon == mechanism.epsilon(6, result.delta)
    assert json.loads((tmp_path / "training.json").read_text())["config"]["compile"] is True


def test_what_does_not_go_together():
    for other in ("dropout", "shard"):
        with pytest.raises(ValueError, match=f"compile must go without {other}"):
            TrainConfig(non_private=True, compile=True, **{other: True})
