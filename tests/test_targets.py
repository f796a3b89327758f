"""Logits at the targets alone, compared with the logits of the whole model."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, BartConfig, Gemma2Config, GPT2Config, LlamaConfig
from transformers.models.bart.modeling_bart import BartForCausalLM

from lowrank_dp.data import load_task
from lowrank_dp.grads import losses
from lowrank_dp.grads.clipping import clipped_sum
from lowrank_dp.losses import IGNORE, LOSSES, losses_at_targets, next_token_targets
from lowrank_dp.mia import signals
from lowrank_dp.models import load_model, targets
from lowrank_dp.models.targets import row_losses, run_at_targets, separate_head
from tests.oracles import clip_one_by_one, refusal_of

VOCAB, PAD = 53, 1
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        pad_token_id=PAD,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=24, pad_token_id=PAD
    ),
    "gemma2": Gemma2Config(  # whose logits pass through tanh
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        pad_token_id=PAD,
        final_logit_softcapping=0.2,
    ),
}


def build(name):
    """Build a causal language model whose last block is trained."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    blocks = model.transformer.h if name == "gpt2" else model.model.layers
    model.requires_grad_(False)
    blocks[-1].requires_grad_(True)
    return model


def batch_of():
    """Build rows of a prompt without targets, a text with targets, and padding on the right."""
    prompts, lengths = (3, 1, 4, 2), (7, 6, 9, 4)
    torch.manual_seed(1)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    labels = torch.full_like(ids, IGNORE)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        ids[row, :length] = torch.randint(3, VOCAB, (length,))
        labels[row, prompt:length] = ids[row, prompt:length]
    labels[1, 0] = ids[1, 0]  # label of the first token, which no position predicts
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_logits_are_those_of_the_whole_model(name):
    model, batch = build(name), batch_of()
    whole = model(**batch)
    found = run_at_targets(model, separate_head(model), batch, own_loss=True)
    targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    assert torch.equal(found.targets, targets)
    torch.testing.assert_close(found.logits, whole.logits[targets != IGNORE])
    torch.testing.assert_close(found.loss, whole.loss)
    each, counts = losses_at_targets(found.logits, found.targets)
    expected, expected_counts = LOSSES["next_token"](whole.logits, batch["labels"])
    torch.testing.assert_close(each, expected)
    assert counts.tolist() == expected_counts.tolist() == [4, 5, 5, 2]


@pytest.mark.parametrize("name", CONFIGS)
def test_clipped_sums_equal_the_loop(name):
    model, batch = build(name), batch_of()
    found, norms = clipped_sum(model, batch, 0.5)
    expected, expected_norms = clip_one_by_one(model, batch, 0.5)
    torch.testing.assert_close(norms, expected_norms.to(norms), rtol=1e-5, atol=0)
    for key, total in found.items():
        torch.testing.assert_close(total, expected[key].to(total), rtol=1e-4, atol=1e-6)


def test_half_precision_and_lora_equal_all_logits(monkeypatch):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model, batch = get_peft_model(build("llama"), lora).eval(), batch_of()
    torch.manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    options = {"autocast_dtype": torch.bfloat16, "check_rows": False}
    found, norms = clipped_sum(model, batch, 0.5, **options)
    monkeypatch.setattr(losses, "separate_head", lambda *given: None)
    expected, expected_norms = clipped_sum(model, batch, 0.5, **options)
    torch.testing.assert_close(norms, expected_norms, rtol=2e-2, atol=0)
    for key, total in found.items():
        if expected[key].norm() > 0:
            assert (total - expected[key]).norm() < 0.05 * expected[key].norm(), key
    assert sum(bool(total.norm() > 0.01) for total in found.values()) > 4


def sizes_of_head(model, batch):
    """Return the shapes of the logits that the head gives during a clipped sum of the batch."""
    seen = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda m, args, output: seen.append(tuple(output.shape)))
    try:
        clipped_sum(model, batch, 1.0, check_rows=False)
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_row_losses_are_the_models_own_loss_of_each_row_alone(name):
    model, batch = build(name), batch_of()
    with torch.no_grad():
        found = row_losses(model, batch, "generation")
        alone = [
            model(**{key: value[i : i + 1] for key, value in batch.items()}).loss.item()
            for i in range(len(batch["labels"]))
        ]
        whole = model(**batch).loss.item()
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(alone, rel=1e-5)
    assert abs(float(found.mean()) - whole) > 1e-4  # the rows have 3, 6, 5 and 2 targets


def test_a_frozen_head_sees_the_targets_and_one_token_more():
    batch = batch_of()
    alone, together = sizes_of_head(build("llama"), batch)
    assert alone == (1, 9, VOCAB)  # the first row by itself
    assert together == (1, 4 + 5 + 5 + 2 + 1, VOCAB)


def test_a_trained_head_and_a_tied_embedding_see_every_token():
    for trained in ("lm_head", "model.embed_tokens"):
        model, batch = build("llama"), batch_of()
        model.lm_head.weight = model.model.embed_tokens.weight
        model.get_submodule(trained).requires_grad_(True)
        assert sizes_of_head(model, batch)[-1] == (4, 9, VOCAB)


def test_a_trained_bias_of_a_frozen_head_sees_every_token():
    model, batch = build("llama"), batch_of()
    model.lm_head.bias = nn.Parameter(torch.zeros(VOCAB))
    assert sizes_of_head(model, batch)[-1] == (4, 9, VOCAB)
    found, _ = clipped_sum(model, batch, 0.5)
    expected, _ = clip_one_by_one(model, batch, 0.5)
    torch.testing.assert_close(
        found["lm_head.bias"], expected["lm_head.bias"].float(), rtol=1e-4, atol=1e-6
    )


def test_models_without_a_separate_head():
    adapted = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["lm_head"]))
    assert separate_head(adapted) is None
    inner = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert separate_head(inner) is inner.get_base_model().lm_head
    assert separate_head(nn.Linear(2, 2)) is None
    assert separate_head(torch.compile(build("llama"))) is None
    assert separate_head(build("llama"), {"logits_to_keep": 2}) is None
    # the loss of this class is that of the same token, not of the next one
    shared = dict(vocab_size=VOCAB, d_model=16, decoder_layers=1, decoder_attention_heads=2)
    bart = BartForCausalLM(BartConfig(**shared, decoder_ffn_dim=24, is_decoder=True))
    bart.requires_grad_(False)
    bart.model.decoder.layers.requires_grad_(True)
    assert "is none of" in refusal_of(clipped_sum, bart.eval(), batch_of(), 1.0, check_rows=False)


def test_the_head_is_left_as_it_was():
    model = build("llama")
    head = separate_head(model)
    run_at_targets(model, head, batch_of())
    assert not head._forward_pre_hooks
    with pytest.raises(ValueError, match="model must run its output layer on all tokens"):
        run_at_targets(model, head, {**batch_of(), "logits_to_keep": 2})
    assert not head._forward_pre_hooks
    other = nn.Linear(2, 2)  # a layer that the model does not call
    with pytest.raises(ValueError, match="it ran the layer 0 times"):
        run_at_targets(model, other, batch_of(), own_loss=True)
    found = run_at_targets(model, other, batch_of())
    torch.testing.assert_close(found.logits, run_at_targets(model, head, batch_of()).logits)
    assert found.loss is None
    with pytest.raises(ValueError, match="model must return"):
        run_at_targets(model, head, {**batch_of(), "return_dict": False})


def test_membership_signals_need_the_targets_logits_only(monkeypatch):
    """All signals equal those from the logits of all tokens; the adapter's base counts too."""
    task = load_task("generated-table", max_examples=40)
    adapted, tokenizer = load_model("tiny-llama", task=task, method="lora", rank=2)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(0))
    tokens: list[int] = []
    head = separate_head(adapted)
    head.register_forward_hook(lambda module, inputs, output: tokens.append(output[..., 0].numel()))

    def measure():
        records = (adapted, tokenizer, task, task.train[:20])
        with adapted.disable_adapter():
            before = signals.measure_reference(*records)
        return signals.measure(*records, reference=before)

    few = measure()
    assert len(tokens) == 2 and tokens[0] == tokens[1]  # without the adapter, and with
    monkeypatch.setattr(targets, "separate_head", lambda model, batch=None: None)
    whole = measure()
    for field in fields(signals.Signals):
        found, wanted = getattr(few, field.name), getattr(whole, field.name)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6, err_msg=field.name)
    assert tokens[0] < tokens[2] == tokens[3]
    assert np.abs(few.loss - few.reference_loss).max() > 0.01


def test_a_row_without_target_and_another_loss_are_refused():
    batch = batch_of()
    batch["labels"][2] = IGNORE
    assert "batch row 2 has no target" in refusal_of(clipped_sum, build("gpt2"), batch, 1.0)
    model = build("llama")
    plain = model.loss_function
    model.loss_function = lambda **given: plain(**given) * 1.01
    assert "is none of" in refusal_of(clipped_sum, model, batch_of(), 1.0, check_rows=False)


def test_targets_of_the_next_token():
    labels = torch.tensor([[5, IGNORE, 6], [IGNORE, 7, IGNORE]])
    assert next_token_targets(labels).tolist() == [[IGNORE, 6, IGNORE], [7, IGNORE, IGNORE]]
