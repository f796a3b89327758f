"""Architectures of transformers: the clipped sum is right, or refused in one line."""

import collections
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_dp.grads.clipping import clipped_sum
from lowrank_dp.models.trainable import choose_trainable
from tests.oracles import clip_one_by_one

pytestmark = pytest.mark.slow
TYPES = {
    "sequence": """albert bert big_bird bloom camembert canine convbert ctrl data2vec-text deberta
        deberta-v2 distilbert electra ernie esm eurobert exaone4 falcon flaubert fnet funnel gemma
        glm4 gpt2 gpt_bigcode gpt_neox gptj helium ibert layoutlm mobilebert modernbert mpnet mpt
        nystromformer olmo2 openai-gpt opt persimmon phi3 rembert roberta roformer squeezebert tapas
        xlm xlm-roberta-xl xlnet yoso""",
    "causal": """arcee biogpt gemma2 gpt2 gptj granite glm lfm2 llama mamba mistral nemotron
        olmo phi qwen2 qwen3 smollm3 starcoder2 stablelm xglm modernbert-decoder rwkv""",
}


VOCAB = 101
SIZES = {
    16: (
        "hidden_size",
        "d_model",
        "n_embd",
        "dim",
        "embedding_size",
        "emb_dim",
        "d_embed",
        "word_embed_proj_dim",
        "attention_hidden_size",
        "intra_bottleneck_size",
        "true_hidden_size",
        "rotary_dim_base",
        "hidden_size_per_layer_input",
    ),
    2: (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "encoder_layers",
        "decoder_layers",
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
        "num_key_value_heads",
        "num_feedforward_networks",
    ),
    24: (
        "intermediate_size",
        "d_inner",
        "n_inner",
        "ffn_dim",
        "d_ff",
        "hidden_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "dim_ff",
        "ffn_hidden_size",
    ),
    64: ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"),
    8: ("head_dim", "d_head", "d_kv"),
    0.0: (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "hidden_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "summary_last_dropout",
        "classifier_dropout",
        "seq_classif_dropout",
        "resid_dropout",
        "embedding_dropout",
        "ff_dropout",
        "qkv_dropout",
        "layerdrop",
        "pooler_dropout",
        "activation_dropout_prob",
        "attn_dropout",
        "summary_first_dropout",
        "attention_dropout_prob",
    ),
}
OWN = {  # sizes that depend on other sizes, and what depends on the length of rows
    "gptj": dict(rotary_dim=4),
    "codegen": dict(rotary_dim=4),
    "funnel": dict(block_sizes=[1, 1], num_decoder_layers=1),
    "big_bird": dict(attention_type="original_full"),  # that of short rows
}


def config_of(model_type, **changes):
    """Configuration of an architecture, in which every size with a known name is made tiny."""
    kind = transformers.CONFIG_MAPPING[model_type]
    known = vars(kind())
    names = {*known, *getattr(kind, "attribute_map", {})}
    sizes = {name: value for value, listed in SIZES.items() for name in listed if name in names}
    tokens = {
        name: i
        for i, name in enumerate(
            ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")
        )
        if name in names or i < 3
    }
    return kind(**{**sizes, **tokens, "vocab_size": VOCAB, **OWN.get(model_type, {}), **changes})


def build(model_type, kind, method="full"):
    """A classifier ("sequence") or causal language model ("causal"), trained in full or by LoRA."""
    changes = dict(num_labels=3) if kind == "sequence" else {}
    if kind == "causal" and "is_decoder" in vars(config_of(model_type)):
        changes["is_decoder"] = True
    auto = {
        "sequence": transformers.AutoModelForSequenceClassification,
        "causal": transformers.AutoModelForCausalLM,
    }[kind]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_config(config_of(model_type, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    if method == "full":
        choose_trainable(model, train_embeddings=False, train_layers=None)
    if method == "lora":
        linear = [
            n
            for n, m in model.named_modules()
            if isinstance(m, (nn.Linear, Conv1D))
            and m.weight.shape != (VOCAB, 16)
            and n.split(".")[0]
            not in ("classifier", "score", "lm_head", "qa_outputs", "classification_head")
        ]
        conv = any(isinstance(m, Conv1D) for m in model.modules())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(
                model,
                LoraConfig(
                    r=2, target_modules=linear, fan_in_fan_out=conv, init_lora_weights=False
                ),
            )
    return model.eval()


def batch_of(kind, padded, rows=4, length=9):
    """Rows of random tokens; padded rows have four lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            mask[row, length - row :] = 0
    ids[mask == 0] = 0
    labels = (
        torch.randint(0, 3, (rows,), generator=generator)
        if kind == "sequence"
        else ids.masked_fill(mask == 0, -100)
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def outcome(model, batch):
    """``"right"``, ``"refused"``, or a description of the fault."""
    try:
        sums, norms = clipped_sum(model, batch, 0.1)
    except ValueError as error:
        line = str(error)
        return "refused" if line and "\n" not in line else f"not one line: {line}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    off = deviation(model, batch, sums, norms)
    if 1e-5 <= off < 1e-4:  # perhaps rounding of float32: decide in float64
        model = model.double()
        off = deviation(model, batch, *clipped_sum(model, batch, 0.1))
    return "right" if off < 1e-5 else f"wrong by {off:.1e}"


def deviation(model, batch, sums, norms):
    """Largest relative error of a norm or of a parameter's sum (at least 1% of the whole norm)."""
    total, true = clip_one_by_one(model, batch, 0.1, own_length=True)
    whole = torch.stack([t.norm() for t in total.values()]).norm()
    off = max(
        float((sums[name] - total[name]).norm() / torch.maximum(t.norm(), 1e-2 * whole))
        for name, t in total.items()
    )
    return max(off, float(((norms - true) / true).abs().max()))


@pytest.mark.filterwarnings("ignore")
def test_every_architecture_is_right_or_refused():
    table = {}
    for kind, names in TYPES.items():
        for name in names.split():
            for method in ("full", "lora"):
                try:
                    model = build(name, kind, method)
                except ValueError:
                    table[name, kind, method, "not built"] = "refused"  # no layer to adapt or train
                    continue
                for padded in (True, False):
                    way = "padded" if padded else "unpadded"
                    table[name, kind, method, way] = outcome(model, batch_of(kind, padded))
    for case, found in table.items():
        print(*case, found)
    counts = collections.Counter(found for found in table.values())
    print(len({case[:2] for case in table}), "architectures:", dict(counts))
    wrong = {case: found for case, found in table.items() if found not in ("right", "refused")}
    assert not wrong, "\n".join(f"{case} {found}" for case, found in wrong.items())
    assert counts["right"] > 2 * counts["refused"]
    assert table["fnet", "sequence", "full", "padded"] == "refused"
    assert table["fnet", "sequence", "full", "unpadded"] == "right"
    for name in ("opt", "xlnet"):  # one list of tokens; positions first
        assert table[name, "sequence", "full", "unpadded"] == "right"
