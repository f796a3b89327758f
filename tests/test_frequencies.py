"""Rotary frequencies that the longest row of a batch decides are refused before private data."""

import pytest
import torch
import transformers

from lowrank_dp.grads import precheck
from lowrank_dp.grads.clipping import clipped_sum, clipped_sum_over
from lowrank_dp.models import load_tokenizer
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.setup import prepare
from tests.oracles import refusal_of
from tests.tasks import case, write_reviews

SIZES = dict(
    vocab_size=768,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=24,
    max_position_embeddings=160,
    pad_token_id=0,
    initializer_range=0.5,
)
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0, 16.0, 32.0, 64.0],
    "factor": 2.5,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


def phi3(**rope):
    config = transformers.Phi3Config(
        **SIZES, original_max_position_embeddings=64, rope_parameters=rope
    )
    torch.manual_seed(0)
    return transformers.Phi3ForSequenceClassification(config).eval()


def llama(**rope):
    config = transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 64})
    config.rope_parameters = rope
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(config).eval()


def per_layer_type(**rope):
    """Make a model whose sliding layers have the default type, and whose full layers do not."""
    config = transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": dict(DEFAULT),
            "full_attention": {**rope, "original_max_position_embeddings": 64},
        },
    )
    torch.manual_seed(0)
    model = transformers.Gemma3TextForSequenceClassification(config).eval()
    model.get_input_embeddings().requires_grad_(False)  # no backend but the loop has a rule for it
    return model


def batch_of(lengths):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 768, mask.shape, generator=generator)
    labels = torch.arange(len(lengths)) % 2
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


def test_one_long_row_moves_the_sum_by_more_than_the_bound(monkeypatch):
    """Without the refusal, row 9 of 100 tokens changes the gradients of the eight rows before."""
    monkeypatch.setattr(precheck, "require_fixed_frequencies", lambda *arguments: None)
    batch = batch_of([20, 30, 40, 50, 33, 21, 60, 15, 100])
    without = {
        name: value[:8] if value.ndim == 1 else value[:8, :60] for name, value in batch.items()
    }
    for model, allowed in (
        (phi3(**LONG_ROPE), False),
        (llama(**DYNAMIC), False),
        (phi3(**DEFAULT), True),
    ):
        before, after = (
            clipped_sum(model, rows, 1.0, check_rows=False)[0] for rows in (without, batch)
        )
        moved = sum(float((after[n] - before[n]).square().sum()) for n in after) ** 0.5
        assert (moved <= 1 + 1e-4) == allowed, (type(model), moved)


def test_a_batch_beyond_the_limit_is_refused_in_every_form():
    """The limit is the original context, or the context for dynamic frequencies."""
    at_most, beyond = batch_of([64, 9]), batch_of([65, 9])
    for make, rope in ((phi3, LONG_ROPE), (per_layer_type, LONG_ROPE), (llama, DYNAMIC)):
        with case(make.__name__):
            for backend in ("bookkeeping", "loop"):
                clipped_sum(make(**rope), at_most, 1.0, backend=backend, check_rows=False)
                for check_rows in (True, False):
                    message = refusal_of(
                        clipped_sum,
                        make(**rope),
                        beyond,
                        1.0,
                        backend=backend,
                        check_rows=check_rows,
                    )
                    assert (
                        f"(rope type {rope['rope_type']!r}) if one row has more than 64" in message
                    )
                    assert "--max-length 64" in message
                    assert ("--padding max-length" in message) == (rope is LONG_ROPE)
    for make, rope in ((phi3, DEFAULT), (per_layer_type, DEFAULT)):
        clipped_sum(make(**rope), beyond, 1.0)


def test_a_public_length_is_enough_for_long_rope_and_not_for_dynamic():
    """The frequencies of "dynamic" stay those of the longest batch so far, also outside the sum."""
    rows = [batch_of([100, 30]), batch_of([100, 100])]
    clipped_sum_over(phi3(**LONG_ROPE), rows, 1.0, padding="max-length")
    with pytest.raises(ValueError, match=r"'dynamic'.*\(training: --max-length 64\)$"):
        clipped_sum_over(llama(**DYNAMIC), rows, 1.0, padding="max-length")
    model, batch = llama(**DYNAMIC), batch_of([100])
    with torch.no_grad():
        before = float(model(**batch).loss)
        model(**batch_of([150]))
        assert abs(float(model(**batch).loss) - before) > 1e-3


def test_training_refuses_before_a_record_is_encoded(tmp_path, monkeypatch):
    tokenizer = load_tokenizer("tiny")
    for name, model in (
        ("long", phi3(**LONG_ROPE)),
        ("default", phi3(**DEFAULT)),
        ("dynamic", llama(**DYNAMIC)),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    task = write_reviews(tmp_path / "data")
    base = dict(task=str(task), noise_multiplier=1.0, batch_size=8, seed=0)

    def setup(name, **changes):
        return prepare(TrainConfig(model=str(tmp_path / name), **base, **changes), 0)

    assert setup("default").max_length == 128
    assert setup("long", max_length=64).max_length == 64
    assert setup("long", padding="max-length").pad_to == 128
    assert setup("dynamic").max_length == 64  # texts are cut to the context
    monkeypatch.setattr("lowrank_dp.train.setup.encode", lambda *rest, **more: pytest.fail("read"))
    message = refusal_of(setup, "long")
    assert "more than 64 tokens" in message and "--max-length 64), or pad every" in message
