"""Rows are kept apart, or the model is refused: through train, on public rows."""

import json

import pytest
import torch
import transformers

from lowrank_dp.grads import clipped_sum_over
from lowrank_dp.models import load_tokenizer
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.setup import prepare

SIZES = dict(vocab_size=768, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=24, max_position_embeddings=160, pad_token_id=0)
MINDING = {
    "fnet": transformers.FNetConfig(**SIZES),
    "xlnet": transformers.XLNetConfig(vocab_size=768, d_model=16, n_layer=2, n_head=2, d_inner=24,
                                      pad_token_id=0),
    "mobilebert": transformers.MobileBertConfig(
        **{**SIZES, "hidden_size": 16}, embedding_size=16, intra_bottleneck_size=16,
        true_hidden_size=16, num_feedforward_networks=1),
    "funnel": transformers.FunnelConfig(
        vocab_size=768, block_sizes=[1, 1], num_decoder_layers=1, d_model=16, n_head=2, d_head=8,
        d_inner=24, pad_token_id=0),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder of 128 short records and one long one, and one for each model."""
    folder = tmp_path_factory.mktemp("minding")
    (folder / "data").mkdir()
    for split, count in (("train", 129), ("validation", 8)):
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(
            {"sentence": "the film was a very dull " + "film " * (120 if i == 128 else 0),
             "label": i % 2}) + "\n" for i in range(count)))
    tokenizer = load_tokenizer("tiny")
    for name, config in MINDING.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():  # padding's row of a trained embedding is not zero
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def config_of(places, name, **changes):
    return TrainConfig(**{**dict(
        model=str(places / name), task=str(places / "data"), steps=1, batch_size=8, max_length=128,
        noise_multiplier=1.0, seed=0, train_layers=".", max_grad_norm=1.0), **changes})


@pytest.mark.parametrize("name", MINDING)
def test_a_model_that_minds_padding_is_refused_and_accepted_with_public_lengths(
        places, name, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"take no notice of padding.*--padding max-length"):
        prepare(config_of(places, name), 0)
    config = config_of(places, name, padding="max-length")
    setup = prepare(config, 0)
    assert setup.pad_to == 128 and "each padded to 128 tokens" in setup.description

    def total(rows):
        from lowrank_dp import data
        batches = (batch for _, batch in data.micro_batches(
            rows, config.micro_batch_size, setup.tokenizer.pad_token_id, length=setup.pad_to))
        return clipped_sum_over(setup.model, batches, 1.0, padding="max-length")[0]

    without, together = total(setup.rows[:128]), total(setup.rows)
    moved = sum(float((together[n] - without[n]).double().square().sum()) for n in together) ** 0.5
    assert moved <= 1 + 1e-4
