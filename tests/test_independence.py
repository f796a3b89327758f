"""Models that mix rows are refused, and no row contributes more than C."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lowrank_dp.data import collate, micro_batches
from lowrank_dp.grads.backends import recheck_norms
from lowrank_dp.grads.clipping import clipped_sum, clipped_sum_over
from lowrank_dp.grads.factors import Outer, materialize_if_cheaper, squared_norms, weighted_sum
from lowrank_dp.grads.recording import Tape
from lowrank_dp.models import load_tokenizer
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.setup import prepare
from tests.oracles import clip_one_by_one, refusal_of
from tests.tasks import write_jsonl

SIZES = dict(
    vocab_size=768,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=160,
    pad_token_id=0,
)
MINDING = {
    "fnet": transformers.FNetConfig(**SIZES),
    "xlnet": transformers.XLNetConfig(
        vocab_size=768, d_model=16, n_layer=2, n_head=2, d_inner=24, pad_token_id=0
    ),
    "mobilebert": transformers.MobileBertConfig(
        **{**SIZES, "hidden_size": 16},
        embedding_size=16,
        intra_bottleneck_size=16,
        true_hidden_size=16,
        num_feedforward_networks=1,
    ),
}


@pytest.fixture(autouse=True)
def fixed_seed():
    """Draw the same weights and batches in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Make a folder with a task of 128 short records and one long record, and with the models."""
    folder = tmp_path_factory.mktemp("minding")
    for split, count in (("train", 129), ("validation", 8)):
        words = ["the film was a very dull " + "film " * (120 * (i == 128)) for i in range(count)]
        rows = [{"sentence": text, "label": i % 2} for i, text in enumerate(words)]
        write_jsonl(folder / "data" / f"{split}.jsonl", rows)
    tokenizer = load_tokenizer("tiny")
    for name, config in MINDING.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():  # the embedding of the padding token must not be zero
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def config_of(places, name, **changes):
    return TrainConfig(
        **{
            **dict(
                model=str(places / name),
                task=str(places / "data"),
                steps=1,
                batch_size=8,
                max_length=128,
                noise_multiplier=1.0,
                seed=0,
            ),
            **changes,
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MINDING)
def test_a_model_that_minds_padding_is_refused_and_accepted_with_public_lengths(places, name):
    with pytest.raises(ValueError, match=r"take no notice of padding.*--padding max-length"):
        prepare(config_of(places, name), 0)
    config = config_of(places, name, padding="max-length")
    setup = prepare(config, 0)
    assert setup.pad_to == 128 and "each padded to 128 tokens" in setup.description

    def total(rows):
        batches = (
            batch
            for _, batch in micro_batches(
                rows, config.micro_batch_size, setup.tokenizer.pad_token_id, length=setup.pad_to
            )
        )
        return clipped_sum_over(setup.model, batches, 1.0, padding="max-length")[0]

    without, together = total(setup.rows[:128]), total(setup.rows)
    moved = sum(float((together[n] - without[n]).double().square().sum()) for n in together) ** 0.5
    assert moved <= 1 + 1e-4


def test_padding_to_a_public_length_and_its_bad_input(places):
    rows = [{"input_ids": [5, 6], "labels": 1}, {"input_ids": [7], "labels": 0}]
    batch = collate(rows, 0, length=4)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0], [7, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert [b["input_ids"].shape for _, b in micro_batches(rows, 1, 0, length=3)] == [(1, 3)] * 2
    with pytest.raises(ValueError, match=r"^rows must have at most the 1 tokens .* got 2"):
        collate(rows, 0, length=1)
    with pytest.raises(ValueError, match=r"^padding must be one of longest, max-length"):
        config_of(places, "fnet", padding="max_length")
    with pytest.raises(ValueError, match=r"^max_length must be given .* give --max-length$"):
        prepare(
            TrainConfig(
                model="tiny-llama",
                task="generated-table",
                noise_multiplier=1.0,
                seed=0,
                batch_size=4,
                padding="max-length",
            ),
            0,
        )
    model = Small("")
    with pytest.raises(ValueError, match=r"^micro-batches must all have one length .* 7 and 9"):
        clipped_sum_over(model, [batch_of(), batch_of(length=9)], 1.0, padding="max-length")


def test_the_library_refuses_padding_that_matters_in_every_backend_and_mode():
    class Averaging(Small):
        def forward(self, input_ids, attention_mask, labels):
            return super().forward(input_ids, labels)

    lengths = torch.tensor([7, 5, 7, 3, 6])[:, None]
    batch = {**batch_of(), "attention_mask": (torch.arange(7) < lengths).long()}
    for backend in ("bookkeeping", "loop"):
        model = Averaging("")
        whole = {**batch, "attention_mask": torch.ones(5, 7).long()}
        clipped_sum(model, whole, 1.0, backend=backend)  # no padding yet
        with pytest.raises(ValueError, match=r"no notice of padding.*padding=\"max-length\""):
            clipped_sum(model, batch, 1.0, backend=backend)
        clipped_sum(model, batch, 1.0, backend=backend, padding="max-length")


def out(logits, labels):
    return SimpleNamespace(loss=functional.cross_entropy(logits, labels), logits=logits)


class Small(nn.Module):
    """Embedding, layer, mean over positions, head; ``how`` names what is unusual in the forward."""

    def __init__(self, how, width=8, layer=None):
        super().__init__()
        self.how, self.e, self.head = how, nn.Embedding(50, width), nn.Linear(width, 3)
        self.p = nn.Embedding(20, width) if how.startswith("p") else None
        self.layer = nn.Linear(width, width) if layer is None else layer

    def forward(self, input_ids, labels):
        x = self.e(input_ids)
        if self.p is not None:
            position = self.p(torch.arange(input_ids.shape[1])[None])
            x = (
                x
                + {
                    "p[0]": lambda: position[0],
                    "p.mean": lambda: position.mean(0),
                    "p.sum": lambda: position.sum(0),
                    "p": lambda: position,
                }[self.how]()
            )
        if self.how == "transposed":
            x = self.layer(x.transpose(0, 1)).transpose(0, 1)
        elif self.how == "flat":
            x = self.layer(x.mean(1))
        elif self.how == "one list":
            x = self.layer(x.flatten(0, 1)).view(x.shape)
        elif self.how == "one list, positions first":
            x = (
                self.layer(x.transpose(0, 1).flatten(0, 1))
                .unflatten(0, (x.shape[1], len(x)))
                .transpose(0, 1)
            )
        else:
            x = self.layer(input_ids if isinstance(self.layer, nn.Embedding) else x)
        if self.how == "mixed":
            x = x - x.mean(0)
        elif self.how == "next":
            x = x + x.roll(1, 0)
        elif self.how == "mixed in training" and self.training:
            x = functional.dropout(x, 0.5, True) - x.mean(0)
        return out(
            self.head(
                torch.tanh(change(self.how, x)).flatten(1, -2).mean(1)
                if x.ndim == 3
                else torch.tanh(change(self.how, x))
            ),
            labels,
        )


def change(how, y):
    """Change ``y`` in place if ``how`` names a change."""
    if how in ("mul_", "flat"):
        y.mul_(2)
    elif how == "add_":
        y.add_(1).mul_(3)
    elif how == "relu_":
        functional.relu_(y)
    elif how == "index":
        y[..., 0] = 0
        y[:, 1] *= 3
    elif how == "view":
        y.view(-1).mul_(2)
    elif how == "dropout_":
        functional.dropout(y, 0.0, True, inplace=True).mul_(3)
    return y


def batch_of(rows=5, length=7):
    generator = torch.Generator().manual_seed(3)
    return {
        "input_ids": torch.randint(0, 50, (rows, length), generator=generator),
        "labels": torch.randint(0, 3, (rows,), generator=generator),
    }


def require_loop(model, batch, backend="bookkeeping"):
    total, true = clip_one_by_one(model, batch, 0.3)
    sums, norms = clipped_sum(model, batch, 0.3, backend=backend)
    torch.testing.assert_close(norms.double(), true, rtol=1e-5, atol=1e-9)
    for name, t in total.items():
        torch.testing.assert_close(sums[name].double(), t, rtol=1e-4, atol=1e-6)


def test_outputs_changed_in_place_have_the_gradients_of_the_loop():
    layers = {
        "linear": lambda: nn.Linear(8, 8),
        "no bias": lambda: nn.Linear(8, 8, bias=False),
        "norm": lambda: nn.LayerNorm(8),
        "rms": lambda: nn.RMSNorm(8),
        "embedding": lambda: nn.Embedding(50, 8),
        "conv1d": lambda: Conv1D(8, 8),
    }
    for make in layers.values():
        for how in ("mul_", "flat", "add_", "relu_", "index", "view", "dropout_"):
            torch.manual_seed(0)
            layer = make()
            if how == "flat" and isinstance(layer, nn.Embedding):
                continue
            require_loop(Small(how, layer=layer), batch_of())
            require_loop(Small(how, layer=layer), batch_of(rows=1))


@pytest.mark.filterwarnings("ignore:.*ackward hook.*:UserWarning")
def test_a_model_that_mixes_rows_is_refused_where_rows_run_together():
    for how in ("mixed", "next", "mixed in training"):
        for backend in ("bookkeeping", "opacus"):
            model = Small(how).train()
            with pytest.raises(ValueError, match=r"^model must keep the rows of a batch apart"):
                clipped_sum(model, batch_of(), 1.0, backend=backend)
    require_loop(Small("mixed").eval(), batch_of(), backend="loop")
    clipped_sum(Small("mixed in training").eval(), batch_of(), 1.0)
    model = Small("")  # a model that mixes rows only after it was examined
    clipped_sum(model, batch_of(), 1.0)
    model.how = "mixed"
    with pytest.raises(ValueError, match=r"^model must keep .* row 0 is .* in the batch"):
        clipped_sum(model, batch_of(), 1.0)


@pytest.mark.filterwarnings("ignore:.*ackward hook.*:UserWarning")
def test_layouts_and_shared_positions_are_refused_or_right():
    for how in ("transposed", "one list", "one list, positions first"):
        for length in (16, 9, 1):
            batch = batch_of(16, length)
            if how != "one list, positions first" or length == 1:
                require_loop(Small(how, 16), batch)
                require_loop(Small(how, 16, nn.LayerNorm(16)), batch)
            else:
                with pytest.raises(ValueError, match=r"layer\.bias .*get another gradient"):
                    clipped_sum(Small(how, 16), batch, 1.0)
            if length > 1:
                with pytest.raises(ValueError, match=r"layer\.weight, layer\.bias"):
                    clipped_sum(Small(how, 16), batch, 1.0, backend="opacus")
        # the first micro-batch has one position, which fits both layouts
        model = Small("transposed", 16)
        parts = [batch_of(3, 1), batch_of(5, 5), batch_of(4, 6)]
        sums, norms = clipped_sum_over(model, parts, 0.3)
        totals, true = zip(*(clip_one_by_one(model, part, 0.3) for part in parts), strict=True)
        torch.testing.assert_close(norms.double(), torch.cat(true), rtol=1e-5, atol=1e-9)
        for name in sums:
            torch.testing.assert_close(
                sums[name].double(), sum(t[name] for t in totals), rtol=1e-4, atol=1e-6
            )
    for how in ("p[0]", "p.mean", "p.sum"):
        with pytest.raises(ValueError, match=r"^model parameters .*p\.weight.* get another grad"):
            clipped_sum(Small(how), batch_of(), 1.0)
        with pytest.raises(ValueError, match=r"^model parameters p\.weight have no exact"):
            clipped_sum(Small(how), batch_of(), 1.0, backend="opacus")
        require_loop(Small(how), batch_of(), backend="loop")
        require_loop(Small(how), batch_of(rows=1))
    require_loop(Small("p"), batch_of())


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, unit, weight):
        ctx.save_for_backward(unit, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, grad):
        unit, weight = ctx.saved_tensors
        return grad * weight, (grad * unit).sum((0, 1)) / 2


class OwnRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8) + 0.5), 1e-6

    def forward(self, x):
        return Halved.apply(x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt(), self.weight)


def test_a_backward_that_is_not_autograds_and_gradient_hooks_are_refused_by_name():
    model = Small("", layer=OwnRMSNorm())
    with pytest.raises(
        ValueError,
        match=r"^model parameters layer\.weight get another gradient by "
        r"backend 'bookkeeping' .*: freeze them .* or use .*backend=\"loop\"$",
    ):
        clipped_sum(model, batch_of(), 1.0)
    require_loop(model, batch_of(), backend="loop")
    for add in ("register_hook", "register_post_accumulate_grad_hook"):
        model = Small("")
        handle = getattr(model.head.weight, add)(lambda g: None)
        for backend in ("bookkeeping", "opacus", "loop"):
            with pytest.raises(ValueError, match=r"^model parameter head\.weight has a gradient"):
                clipped_sum(model, batch_of(), 1.0, backend=backend)
        handle.remove()
        require_loop(model, batch_of())


@pytest.mark.filterwarnings("ignore:.*ackward hook.*:UserWarning")
def test_a_model_that_remembers_rows_is_refused_even_by_the_loop():
    class Remembering(Small):
        last = 0.0

        def forward(self, input_ids, labels):
            x = self.layer(self.e(input_ids))
            before, self.last = self.last, x.detach().mean()
            return out(self.head(torch.tanh(x + before)).mean(1), labels)

    with pytest.raises(ValueError, match=r"^model must keep no memory of the rows"):
        clipped_sum(Remembering(""), batch_of(), 1.0, backend="loop")


@pytest.mark.filterwarnings("ignore:.*ackward hook.*:UserWarning")
def test_layers_that_opacus_cannot_take_are_one_line_each_time():
    class Twice(Small):
        def forward(self, input_ids, labels):
            x = self.e(input_ids)
            return out(self.head(self.layer(x, x)).mean(1), labels)

    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    for model in (Twice("", layer=nn.Bilinear(8, 8, 8)), Small("", layer=spectral).eval()):
        for _ in range(2):
            with pytest.raises(
                ValueError,
                match=r"^model cannot be run by this backend "
                r"\((?!Trying).*: use backend=\"loop\"$",
            ):
                clipped_sum(model, batch_of(), 1.0, backend="opacus")
        require_loop(model, batch_of(), backend="loop")


def test_the_model_is_as_it_was_after_the_examination():
    class Counting(Small):
        def __init__(self):
            super().__init__("")
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, input_ids, labels):
            self.calls += 1
            x = functional.dropout(self.e(input_ids), 0.5, self.training)
            return out(self.head(self.layer(x).mean(1)), labels)

    model = Counting().train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    clipped_sum(model, batch_of(), 1.0)
    assert model.calls == 0
    torch.manual_seed(1)
    first = clipped_sum(model, batch_of(), 1.0)[1]  # examined before
    torch.manual_seed(1)
    second = clipped_sum(model.train(), batch_of(rows=5), 1.0)[1]
    assert torch.equal(first, second)
    assert model.training and (model.head.weight.grad == 1).all()
    torch.manual_seed(1)  # a fresh model, whose examination draws nothing from the generator
    fresh = Counting().train()
    fresh.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    assert torch.equal(clipped_sum(fresh, batch_of(), 1.0)[1], first)


def test_labels_and_ids_that_the_model_does_not_know_are_named_by_row():
    model = transformers.AutoModelForSequenceClassification.from_config(
        transformers.BertConfig(**SIZES, num_labels=3)
    ).eval()
    ids = torch.randint(1, 700, (4, 6))
    for labels, line in (
        ([0, 1, 3, 0], r"^batch row 2 has label 3: labels must be from 0 to 2"),
        ([0, -1, 2, 0], r"^batch row 1 has label -1"),
        (torch.tensor([0, 1, 2, 0], dtype=torch.int32), r"^batch row 0 has a label of .*int32"),
        ([0.0, 1.0, 2.0, 0.0], r"^batch row 0 has a label of torch.float32"),
        ([[0, 1], [1, 2], [0, 0], [1, 1]], r"^batch row 0 has labels of shape \(2,\)"),
    ):
        batch = {"input_ids": ids, "labels": torch.as_tensor(labels)}
        for backend in ("bookkeeping", "opacus", "loop"):
            message = refusal_of(clipped_sum, model, batch, 1.0, backend=backend)
            assert re.search(line, message), (line, backend, message)
    with pytest.raises(ValueError, match=r"^batch row 3 cannot be run by the model \(index out"):
        clipped_sum(
            model,
            {
                "input_ids": torch.where(torch.arange(4)[:, None] == 3, 900, ids),
                "labels": torch.tensor([0, 1, 2, 0]),
            },
            1.0,
        )
    for backend in ("bookkeeping", "loop"):
        with pytest.raises(ValueError, match=r"^batch row 1 cannot be run .*Target 5 is out of"):
            clipped_sum(
                Small(""), {**batch_of(3), "labels": torch.tensor([0, 5, 1])}, 1.0, backend=backend
            )


# Ghost norms of positions that cancel.


def test_opposite_positions_move_the_sum_by_at_most_the_bound():
    class Opposite(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(512, 512)

        def forward(self, x, labels):
            y = self.linear(x)
            logits = 100 * (y[:, 0] - y[:, 1]).sum(1)
            return SimpleNamespace(loss=functional.mse_loss(logits, labels), logits=logits)

    for seed in range(3):
        torch.manual_seed(seed)
        x = 1e4 * torch.randn(1, 1, 512)
        x = torch.cat([x, x + 1e-4 * torch.randn(1, 1, 512)], 1)
        batch = {"x": x, "labels": torch.tensor([1e3])}
        sums, _ = clipped_sum(Opposite(), batch, 1.0, check_rows=False)
        assert torch.cat([s.double().flatten() for s in sums.values()]).norm() <= 1 + 1e-4


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    scales=st.lists(st.floats(-20, 18), min_size=2, max_size=6),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.0, 1e-7, 1e-4, 1.0]),
    bound=st.sampled_from([1e-3, 1.0, 1e3]),
    ids=st.booleans(),
    half=st.booleans(),
)
def test_no_row_contributes_more_than_the_bound(data, scales, seed, spread, bound, ids, half):
    """Positions nearly cancel, at any scale within float32, for every kind of factor."""
    generator = torch.Generator().manual_seed(seed)
    count, rows, cols = len(scales), 40, 48
    left = torch.randn(1, rows, generator=generator).expand(count, rows).clone()
    right = torch.randn(1, cols, generator=generator).expand(count, cols).clone()
    signs = torch.tensor([(-1.0) ** t for t in range(count)])[:, None]
    left = left * (1 + spread * torch.randn(count, rows, generator=generator)) * signs
    right = right * (1 + spread * torch.randn(count, cols, generator=generator))
    first = data.draw(st.floats(-20, 18))
    same = data.draw(st.booleans())  # one scale for all positions makes them cancel
    down = torch.tensor([scales[0] if same else s for s in scales])[:, None]
    left, right = left * 10.0**first, right * 10.0 ** down.clamp(max=36 - max(first, 0.0))
    assume(bool(left.isfinite().all()) and bool(right.isfinite().all()))
    if half:
        left, right = left.bfloat16(), right.bfloat16()
    whole = [Outer(left[None], right[None])]
    if ids:
        whole = [Outer(torch.randint(0, 3, (1, count), generator=generator), right[None])]
    elif count > 3:  # a weight that is used twice
        whole = [Outer(left[None, :2], right[None, :2]), Outer(left[None, 2:], right[None, 2:])]
    tape = Tape(factors={"w": materialize_if_cheaper(whole)})
    tape.squares["w"] = squared_norms(tape.factors["w"])
    recheck_norms(tape)
    norm = tape.squares["w"].squared.sqrt()
    shape = torch.Size((3 if ids else rows, cols))
    part = weighted_sum(tape.factors["w"], (bound / norm).clamp(max=1).float(), shape)
    assert part.isfinite().all() and norm.isfinite().all()
    assert float(part.double().norm()) <= bound * (1 + 1e-4)


def test_norms_whose_squares_leave_float32_are_exact():
    for left, right in ((1e18, 1e18), (1e-20, 1e18), (1e12, 1e12), (1e-12, 1e-12), (1e-19, 1e-2)):
        for positions in (1, 2):
            factors = [
                Outer(torch.full((1, positions, 8), left), torch.full((1, positions, 9), right))
            ]
            tape = Tape(factors={"w": factors}, squares={"w": squared_norms(factors)})
            recheck_norms(tape)
            norm = float(tape.squares["w"].squared.sqrt())
            assert norm == pytest.approx(left * right * positions * 72**0.5, rel=1e-5)
            formed = [torch.full((1, 8, 9), left * right)]
            tape = Tape(factors={"w": formed}, squares={"w": squared_norms(formed)})
            recheck_norms(tape)
            assert float(tape.squares["w"].squared.sqrt()) == pytest.approx(
                float(formed[0].double().norm()), rel=1e-6
            )


class Rounding(nn.Module):
    """Model whose loss of a row depends on the row's padding, by rounding and by ``real``.

    As in the models of transformers, a part computes in float32, whatever the dtype of the rest.
    """

    def __init__(self, real):
        super().__init__()
        self.words, self.head, self.real = nn.Embedding(32, 8), nn.Linear(8, 3), real

    def forward(self, input_ids, attention_mask, labels):
        length = input_ids.shape[1]
        states = self.words(input_ids)
        states = states * (1 + 400 * torch.finfo(states.dtype).eps * length + self.real * length)
        single = states.float() * (1 + 8 * torch.finfo(torch.float32).eps * length)
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        pooled = (single.to(states.dtype) * mask).sum(1) / mask.sum(1)
        loss = functional.cross_entropy(self.head(pooled), labels)
        return SimpleNamespace(loss=loss, logits=self.head(pooled))


def test_rounding_is_told_from_dependence_in_float64():
    """Parts in float32 do not make the repetition in float64 doubtful."""
    batch = {
        "input_ids": torch.arange(1, 25).view(2, 12),
        "attention_mask": torch.tensor([[1] * 4 + [0] * 8, [1] * 12]),
        "labels": torch.tensor([0, 2]),
    }
    model = Rounding(0.0)
    losses = [
        functional.cross_entropy(
            model(**{k: v[:1, :n] if v.ndim > 1 else v[:1] for k, v in batch.items()}).logits,
            batch["labels"][:1],
        )
        for n in (4, 12)
    ]
    gradients = [torch.autograd.grad(loss, model.head.weight)[0] for loss in losses]
    assert (gradients[0] - gradients[1]).norm() > 2e-4 * gradients[0].norm(), "more than allowed"
    before = {name: p.clone() for name, p in model.named_parameters()}
    sums, _ = clipped_sum(model, batch, 1.0)
    expected = clip_one_by_one(model, batch, 1.0)[0]
    for name, total in sums.items():
        torch.testing.assert_close(total.double(), expected[name], rtol=1e-3, atol=1e-6)
        assert torch.equal(model.get_parameter(name), before[name])
    with pytest.raises(ValueError, match="model must take no notice of padding"):
        clipped_sum(Rounding(1e-4), batch, 1.0)
