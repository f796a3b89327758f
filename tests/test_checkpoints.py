"""A checkpoint holds what was trained, or it is not loaded: by this package and by others."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lowrank_dp.data import Example, Task
from lowrank_dp.models import describe, load_model, load_tokenizer, save_model, tiny
from lowrank_dp.models.heads import final_layer, head_modules, head_state

SEQUENCE = transformers.AutoModelForSequenceClassification
SHAPE = dict(vocab_size=800, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=24, max_position_embeddings=40, pad_token_id=0, eos_token_id=2,
             bos_token_id=1)
ENCODER_DECODER = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                       decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
                       decoder_start_token_id=2)
T5 = dict(d_model=16, num_layers=2, num_decoder_layers=2, num_heads=2, d_ff=24, d_kv=8,
          decoder_start_token_id=0)
XLM = dict(emb_dim=16, n_layers=2, n_heads=2)
GPT = dict(n_embd=16, n_layer=2, n_head=2, n_positions=40)
# model type -> what its configuration needs beyond SHAPE
FAMILIES = {
    "bert": {}, "roberta": {}, "camembert": {}, "electra": dict(embedding_size=16),
    "albert": dict(embedding_size=16), "deberta": {}, "deberta-v2": {}, "mpnet": {},
    "convbert": dict(embedding_size=16), "longformer": dict(attention_window=[4, 4]),
    "mobilebert": dict(embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
    "squeezebert": dict(embedding_size=16, q_groups=2, k_groups=2, v_groups=2,
                        post_attention_groups=1, intermediate_groups=2, output_groups=2),
    "distilbert": dict(dim=16, hidden_dim=24, n_layers=2, n_heads=2),
    "bart": ENCODER_DECODER, "mbart": ENCODER_DECODER, "t5": T5, "mt5": T5, "umt5": T5,
    "xlnet": dict(d_model=16, n_layer=2, n_head=2, d_inner=24, d_head=8), "xlm": XLM,
    "flaubert": XLM, "funnel": dict(d_model=16, block_sizes=[1, 1], n_head=2, d_head=8, d_inner=24),
    "fnet": {}, "modernbert": dict(cls_token_id=1, sep_token_id=2),
    "gpt2": GPT, "openai-gpt": GPT, "gpt_neo": dict(
        num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]),
    "gpt_neox": {}, "bloom": dict(n_layer=2, n_head=2),
    "opt": dict(ffn_dim=24, word_embed_proj_dim=16), "llama": dict(num_key_value_heads=1),
    "qwen2": dict(num_key_value_heads=1), "gemma": dict(num_key_value_heads=1, head_dim=8),
}
NO_LORA = {"squeezebert"}  # whose layers are convolutions
LABELS = ("entailment", "neutral", "contradiction")
TASK = Task("nli", "classification", 3, LABELS, ("accuracy",),
            {"train": (Example("a", "x", label=0),)}, "made here")


def configuration(name, **changes):
    kind = transformers.CONFIG_MAPPING[name]
    known = {key: value for key, value in SHAPE.items() if hasattr(kind(), key)}
    for shared in ("funnel", "xlnet"):
        if name == shared:
            known = {key: known[key] for key in ("vocab_size", "pad_token_id") if key in known}
    return kind(**known | FAMILIES[name] | changes)


def save_base(folder, name, auto=None, seed=0, **changes):
    """A backbone at random weights, as a language model saves it: without pooler or head."""
    config = configuration(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if auto is None:
            auto = (transformers.AutoModelForMaskedLM if type(config) in
                    transformers.MODEL_FOR_MASKED_LM_MAPPING and name not in (
                        "bart", "mbart") else transformers.AutoModel)
        auto.from_config(config).save_pretrained(folder)
    tokenizer = tiny.tokenizer("tiny")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(folder)
    return folder


def perturb(model, seed=1):
    """What training does to everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))


def batch():
    ids = torch.randint(5, 700, (3, 9), generator=torch.Generator().manual_seed(5))
    ids[:, -1] = 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- every family comes back -----------------------------------------------------------------

@pytest.mark.parametrize("method", ["full", "lora", "lora-frozen-a"])
def test_every_family_comes_back_here_and_elsewhere(tmp_path, method):
    """With a new head and pooler, in a process whose generators are elsewhere."""
    families = FAMILIES if method != "lora-frozen-a" else ["bert", "distilbert", "xlnet"]
    for number, name in enumerate(families):
        base, saved = save_base(tmp_path / f"{name}", name), tmp_path / f"{name}-saved"
        if name in NO_LORA and method != "full":
            with pytest.raises(ValueError, match="method must be full for SqueezeBert"):
                load_model(base, task=TASK, method=method)
            continue
        model, tokenizer = load_model(base, task=TASK, method=method, rank=2, seed=number)
        _, report = SEQUENCE.from_pretrained(base, num_labels=3, output_loading_info=True)
        new = sorted(report["missing_keys"])
        assert describe(model).endswith(f"; head new: {', '.join(new)}"), name
        perturb(model)
        expected = logits(model)
        save_model(model, tokenizer, saved)
        torch.manual_seed(100 + number)
        again, _ = load_model(saved, task=TASK, new_head=False, seed=7)
        assert torch.equal(logits(again), expected), name
        assert "head new" not in describe(again)
        torch.manual_seed(200 + number)
        if method == "full":
            plain = SEQUENCE.from_pretrained(saved)
        else:
            plain = peft.PeftModel.from_pretrained(
                SEQUENCE.from_pretrained(base, num_labels=3), saved)
        assert torch.equal(logits(plain), expected), name
        assert plain.config.id2label[0] in ("entailment", "LABEL_0")
        with pytest.raises(ValueError, match="has no weights for .* drawn at random"):
            load_model(base, task=TASK, new_head=False)


def test_the_head_trains_whatever_train_layers_is(tmp_path):
    """And the rest is frozen: what transformers reports as missing is what is the head."""
    for name in FAMILIES:
        base = save_base(tmp_path / name, name)
        _, report = SEQUENCE.from_pretrained(base, num_labels=3, output_loading_info=True)
        pattern = "(norm|ln|LayerNorm).*weight"
        model, _ = load_model(base, kind="classification", num_labels=3, train_layers=pattern)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        head = set(head_state(model))
        assert head == report["missing_keys"] <= trained, name
        assert all("norm" in n.lower() or "ln" in n for n in trained - head), name
        assert final_layer(model) and model.get_submodule(final_layer(model)).out_features == 3


def test_last_blocks_of_every_family(tmp_path):
    """The last block, of each list if there are several; encoders come before decoders."""
    first = {"bert": r"\.layer\.0\.", "distilbert": r"\.layer\.0\.", "xlm": r"\.0\.",
             "bart": r"encoder\.l|decoder\.layers\.0\.|layernorm_embedding",
             "t5": r"encoder\.|decoder\.block\.0\.", "gpt_neox": r"\.layers\.0\.",
             "gpt2": r"\.h\.0\."}
    import re
    for name, pattern in first.items():
        base = save_base(tmp_path / name, name)
        def names(**options):
            model, _ = load_model(base, kind="classification", num_labels=2, **options)  # noqa: B023
            return {n for n, p in model.named_parameters() if p.requires_grad}
        everything, last = names(), names(train_layers=1)
        dropped = everything - last
        assert dropped == {n for n in everything if re.search(pattern, n) or (
            "embeddings" in n.lower() or "layer_norm_emb" in n)}, name
        assert any("lora_B" in n for n in names(method="lora", train_layers=1))
        count = {"bart": 4, "t5": 4}.get(name, 2)
        with pytest.raises(ValueError, match=f"an integer >= 1 and <= {count}"):
            names(train_layers=count + 1)


# --- what is drawn at random is refused by name ----------------------------------------------

def drop(folder, *keys, file="model.safetensors"):
    weights = load_file(folder / file)
    save_file({k: v for k, v in weights.items() if k not in keys}, folder / file,
              metadata={"format": "pt"})


def test_weights_that_are_not_on_disk_are_refused_by_name(tmp_path):
    base = save_base(tmp_path / "base", "bert", SEQUENCE, num_labels=3)
    for key in ("bert.embeddings.word_embeddings.weight", "classifier.bias",
                "bert.encoder.layer.1.output.LayerNorm.bias", "bert.pooler.dense.bias"):
        broken = tmp_path / key
        shutil.copytree(base, broken)
        drop(broken, key)
        for new_head in (True, False):  # half a layer is no new layer
            with pytest.raises(ValueError, match=f"no weights for {key}: it would be drawn"):
                load_model(broken, new_head=new_head)
    headless = tmp_path / "headless"
    shutil.copytree(base, headless)
    drop(headless, "classifier.weight", "classifier.bias")
    with pytest.raises(ValueError, match="no weights for classifier.bias, classifier.weight: they"):
        load_model(headless, new_head=False)
    assert "head new: classifier.bias, classifier.weight" in describe(load_model(headless)[0])
    with pytest.raises(ValueError, match=r"classifier.bias is \(3,\), not \(5,\)") as caught:
        edit_json(headless / "config.json", architectures=["BertModel"])
        shutil.copy(base / "model.safetensors", headless)
        load_model(headless, kind="classification", num_labels=5)
    assert "\n" not in str(caught.value)
    for name in tiny.NAMES:
        with pytest.raises(ValueError, match="drawn at random"):
            load_model(name, kind="classification", num_labels=2, new_head=False)


def test_a_pooler_that_an_earlier_version_did_not_save_is_refused(tmp_path):
    base = save_base(tmp_path / "base", "bert")
    model, tokenizer = load_model(base, task=TASK, method="lora")
    save_model(model, tokenizer, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    drop(tmp_path / "run", *(f"base_model.model.bert.pooler.dense.{n}" for n in ("weight", "bias")),
         file="adapter_model.safetensors")
    edit_json(tmp_path / "run" / "adapter_config.json", modules_to_save=["classifier"])
    with pytest.raises(ValueError, match="have no weights for bert.pooler.dense.bias, "
                                         "bert.pooler.dense.weight: they would be drawn"):
        load_model(tmp_path / "run", task=TASK)


def test_initial_head_holds_the_new_pooler_too(tmp_path):
    from lowrank_dp.mia.signals import load_reference
    base = save_base(tmp_path / "base", "bert")
    for method in ("full", "lora"):
        model, _ = load_model(base, task=TASK, method=method, seed=3)
        state = head_state(model)
        assert set(state) == {f"{layer}.{p}" for layer in ("bert.pooler.dense", "classifier")
                              for p in ("weight", "bias")}
        expected = logits(model)
        folder = tmp_path / method
        folder.mkdir()
        save_file(state, folder / "initial_head.safetensors")
        reference = load_reference(folder, {"model": str(base), "seed": 9}, TASK)
        assert torch.equal(logits(reference), expected)
    save_file({k: v for k, v in state.items() if "pooler" not in k},
              folder / "initial_head.safetensors")
    with pytest.raises(ValueError, match="must hold what the base .* lacks, bert.pooler.dense"):
        load_reference(folder, {"model": str(base), "seed": 9}, TASK)
    (folder / "initial_head.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match="initial_head.safetensors could not be loaded"):
        load_reference(folder, {"model": str(base), "seed": 9}, TASK)
    (folder / "initial_head.safetensors").unlink()
    with pytest.raises(ValueError, match="base: model .* has no weights for .*leave out the att"):
        load_reference(folder, {"model": str(base), "seed": 9}, TASK)
    own = save_base(tmp_path / "own", "bert", SEQUENCE, num_labels=3)
    reference = load_reference(folder, {"model": str(own), "seed": 9}, TASK)
    assert torch.equal(logits(reference), logits(SEQUENCE.from_pretrained(own)))
