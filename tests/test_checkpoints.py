"""Checkpoints hold all trained weights, for this package and for others; others are refused."""

import itertools
import json
import re
import shutil
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lowrank_dp.data import Example, Task, load_task
from lowrank_dp.evaluation import evaluate
from lowrank_dp.models import describe, load_model, load_tokenizer, save_model, tiny
from lowrank_dp.models.heads import final_layer, head_state
from lowrank_dp.models.labels import label_rows, own_label_names
from lowrank_dp.train.loop import train
from tests.refusals import refused

SEQUENCE = transformers.AutoModelForSequenceClassification
SHAPE = dict(
    vocab_size=800,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=40,
    pad_token_id=0,
    eos_token_id=2,
    bos_token_id=1,
)
ENCODER_DECODER = dict(
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    decoder_start_token_id=2,
)
T5 = dict(
    d_model=16,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=2,
    d_ff=24,
    d_kv=8,
    decoder_start_token_id=0,
)
XLM = dict(emb_dim=16, n_layers=2, n_heads=2)
GPT = dict(n_embd=16, n_layer=2, n_head=2, n_positions=40)
# model type -> what its configuration needs beyond SHAPE
FAMILIES = {
    "bert": {},
    "roberta": {},
    "camembert": {},
    "electra": dict(embedding_size=16),
    "albert": dict(embedding_size=16),
    "deberta": {},
    "deberta-v2": {},
    "mpnet": {},
    "convbert": dict(embedding_size=16),
    "longformer": dict(attention_window=[4, 4]),
    "mobilebert": dict(embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
    "squeezebert": dict(
        embedding_size=16,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        post_attention_groups=1,
        intermediate_groups=2,
        output_groups=2,
    ),
    "distilbert": dict(dim=16, hidden_dim=24, n_layers=2, n_heads=2),
    "bart": ENCODER_DECODER,
    "mbart": ENCODER_DECODER,
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
    "xlnet": dict(d_model=16, n_layer=2, n_head=2, d_inner=24, d_head=8),
    "xlm": XLM,
    "flaubert": XLM,
    "funnel": dict(d_model=16, block_sizes=[1, 1], n_head=2, d_head=8, d_inner=24),
    "fnet": {},
    "modernbert": dict(cls_token_id=1, sep_token_id=2),
    "gpt2": GPT,
    "openai-gpt": GPT,
    "gpt_neo": dict(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]),
    "gpt_neox": {},
    "bloom": dict(n_layer=2, n_head=2),
    "opt": dict(ffn_dim=24, word_embed_proj_dim=16),
    "llama": dict(num_key_value_heads=1),
    "qwen2": dict(num_key_value_heads=1),
    "gemma": dict(num_key_value_heads=1, head_dim=8),
}
NO_LORA = {"squeezebert"}  # whose layers are convolutions
LABELS = ("entailment", "neutral", "contradiction")
TASK = Task(
    "nli",
    "classification",
    3,
    LABELS,
    ("accuracy",),
    {"train": (Example("a", "x", label=0),)},
    "made here",
)


def configuration(name, **changes):
    kind = transformers.CONFIG_MAPPING[name]
    known = {key: value for key, value in SHAPE.items() if hasattr(kind(), key)}
    for shared in ("funnel", "xlnet"):
        if name == shared:
            known = {key: known[key] for key in ("vocab_size", "pad_token_id") if key in known}
    return kind(**known | FAMILIES[name] | changes)


@pytest.fixture(autouse=True)
def quietly():
    """Suppress the reports that transformers prints on each load."""
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity_warning()


def save_base(folder, name, auto=None, seed=0, **changes):
    """Save a backbone with random weights as a language model is saved: without pooler and head."""
    config = configuration(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if auto is None:
            auto = (
                transformers.AutoModelForMaskedLM
                if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
                and name not in ("bart", "mbart")
                else transformers.AutoModel
            )
        auto.from_config(config).save_pretrained(folder)
    tokenizer = tiny.tokenizer("tiny")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(folder)
    return folder


def perturb(model, seed=1):
    """Move every trained parameter, as training does."""
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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "lora-frozen-a"])
def test_every_family_comes_back_here_and_elsewhere(tmp_path, method):
    """A checkpoint gives the same logits in this package, in transformers and in PEFT.

    Head and pooler are new, and the global generator has another state at each load.
    """
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
        torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
        assert "head new" not in describe(again)
        torch.manual_seed(200 + number)
        if method == "full":
            plain = SEQUENCE.from_pretrained(saved)
        else:
            plain = peft.PeftModel.from_pretrained(
                SEQUENCE.from_pretrained(base, num_labels=3), saved
            )
        # a Longformer's last bits differ from call to call
        torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
        assert plain.config.id2label[0] in ("entailment", "LABEL_0")
        with pytest.raises(ValueError, match=r"has no weights for .* drawn at random"):
            load_model(base, task=TASK, new_head=False)


@pytest.mark.slow
def test_the_head_trains_whatever_train_layers_is(tmp_path):
    """The head is what transformers reports as missing; parameters off the pattern are frozen."""
    for name in FAMILIES:
        base = save_base(tmp_path / name, name)
        _, report = SEQUENCE.from_pretrained(base, num_labels=3, output_loading_info=True)
        pattern = {"mobilebert": r"weight$"}.get(
            name, r"([nN]orm|ln_|in_proj|q_lin|SelfAttention\.q).*weight"
        )
        model, _ = load_model(base, kind="classification", num_labels=3, train_layers=pattern)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        head = set(head_state(model))
        on_disk = {"modernbert": {"head.dense.weight", "head.norm.weight"}}.get(name, set())
        assert head == report["missing_keys"] | on_disk and head <= trained, name
        assert all(re.search(pattern, n) for n in trained - head), name
        assert final_layer(model) and model.get_submodule(final_layer(model)).out_features == 3


@pytest.mark.slow
def test_last_blocks_of_every_family(tmp_path):
    """The last block of each list trains; blocks of encoders come before those of decoders."""
    first = {
        "bert": r"\.layer\.0\.",
        "distilbert": r"\.layer\.0\.",
        "xlm": r"\.0\.",
        "bart": r"encoder\.l|decoder\.layers\.0\.",
        "t5": r"encoder\.|decoder\.block\.0\.",
        "gpt_neox": r"\.layers\.0\.",
        "gpt2": r"\.h\.0\.",
    }
    for name, pattern in first.items():
        base = save_base(tmp_path / name, name)

        def names(base=base, **options):
            model, _ = load_model(base, kind="classification", num_labels=2, **options)
            return {n for n, p in model.named_parameters() if p.requires_grad}

        everything, last = names(), names(train_layers=1)
        dropped = everything - last
        assert dropped == {
            n
            for n in everything
            if re.search(pattern, n) or ("embeddings" in n.lower() or "layer_norm_emb" in n)
        }, name
        assert any("lora_B" in n for n in names(method="lora", train_layers=1))
        count = {"bart": 4, "t5": 4}.get(name, 2)
        with pytest.raises(ValueError, match=f"an integer >= 1 and <= {count}"):
            names(train_layers=count + 1)


# --- what is drawn at random is refused by name ----------------------------------------------


def drop(folder, *keys, file="model.safetensors"):
    weights = load_file(folder / file)
    save_file(
        {k: v for k, v in weights.items() if k not in keys},
        folder / file,
        metadata={"format": "pt"},
    )


def test_weights_that_are_not_on_disk_are_refused_by_name(tmp_path):
    base = save_base(tmp_path / "base", "bert", SEQUENCE, num_labels=3)
    for key in (
        "bert.embeddings.word_embeddings.weight",
        "classifier.bias",
        "bert.encoder.layer.1.output.LayerNorm.bias",
        "bert.pooler.dense.bias",
    ):
        broken = tmp_path / key
        shutil.copytree(base, broken)
        drop(broken, key)
        for new_head in (True, False):  # half a layer is no new layer
            with pytest.raises(ValueError, match=f"no weights for {key}: it would be drawn"):
                load_model(broken, new_head=new_head)
    deeper = tmp_path / "deeper"
    for layers in (1, 0):  # a layer that the configuration leaves out is not left out silently
        shutil.rmtree(deeper, ignore_errors=True)
        shutil.copytree(base, deeper)
        edit_json(deeper / "config.json", num_hidden_layers=layers)
        with pytest.raises(ValueError, match=f"holds bert.encoder.layer.{layers}.*has no block"):
            load_model(deeper)
    headless = tmp_path / "headless"
    shutil.copytree(base, headless)
    drop(headless, "classifier.weight", "classifier.bias")
    with pytest.raises(ValueError, match=r"no weights for classifier.bias, classifier.weight: th"):
        load_model(headless, new_head=False)
    assert "head new: classifier.bias, classifier.weight" in describe(load_model(headless)[0])
    with pytest.raises(ValueError, match=r"classifier.bias is \(3,\), not \(5,\)") as caught:
        edit_json(headless / "config.json", architectures=["BertModel"])
        shutil.copy(base / "model.safetensors", headless)
        load_model(headless, kind="classification", num_labels=5)
    assert "\n" not in str(caught.value)


def test_a_pooler_that_an_earlier_version_did_not_save_is_refused(tmp_path):
    base = save_base(tmp_path / "base", "bert")
    model, tokenizer = load_model(base, task=TASK, method="lora")
    save_model(model, tokenizer, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    drop(
        tmp_path / "run",
        *(f"base_model.model.bert.pooler.dense.{n}" for n in ("weight", "bias")),
        file="adapter_model.safetensors",
    )
    edit_json(tmp_path / "run" / "adapter_config.json", modules_to_save=["classifier"])
    with pytest.raises(
        ValueError,
        match=r"have no weights for bert.pooler.dense.bias, "
        r"bert.pooler.dense.weight: they would be drawn",
    ):
        load_model(tmp_path / "run", task=TASK)


def test_initial_head_holds_the_new_pooler_too(tmp_path):
    from lowrank_dp.mia.loading import load_reference

    base = save_base(tmp_path / "base", "bert")
    for method in ("full", "lora"):
        model, _ = load_model(base, task=TASK, method=method, seed=3)
        state = head_state(model)
        assert set(state) == {
            f"{layer}.{p}"
            for layer in ("bert.pooler.dense", "classifier")
            for p in ("weight", "bias")
        }
        expected = logits(model)
        folder = tmp_path / method
        folder.mkdir()
        save_file(state, folder / "initial_head.safetensors")
        reference = load_reference(folder, {"model": str(base), "seed": 9}, TASK)
        assert torch.equal(logits(reference), expected)
    save_file(
        {k: v for k, v in state.items() if "pooler" not in k}, folder / "initial_head.safetensors"
    )
    with pytest.raises(ValueError, match=r"must hold what the base .* lacks, bert.pooler.dense"):
        load_reference(folder, {"model": str(base), "seed": 9}, TASK)
    (folder / "initial_head.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match=r"initial_head.safetensors could not be loaded"):
        load_reference(folder, {"model": str(base), "seed": 9}, TASK)
    (folder / "initial_head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"base: model .* has no weights for .*leave out the att"):
        load_reference(folder, {"model": str(base), "seed": 9}, TASK)
    own = save_base(tmp_path / "own", "bert", SEQUENCE, num_labels=3)
    reference = load_reference(folder, {"model": str(own), "seed": 9}, TASK)
    assert torch.equal(logits(reference), logits(SEQUENCE.from_pretrained(own)))


def test_a_run_on_a_bert_without_pooler_comes_back(tmp_path, base):
    """The checkpoint has the run's last loss, and its reference model the loss before step 1."""
    from lowrank_dp.mia.loading import load_reference

    folder = save_base(tmp_path / "bert", "bert")
    task = load_task(base.task)
    for method in ("full", "lora"):
        config = replace(base, model=str(folder), method=method, learning_rate=1.0)
        result = train(config, tmp_path / method)
        assert "; head new: bert.pooler.dense.bias, bert.pooler.dense.w" in result.description
        manifest = json.loads((tmp_path / method / "membership.json").read_text())
        torch.manual_seed(77)
        model, tokenizer = load_model(tmp_path / method, task=task, new_head=False)
        reference = load_reference(tmp_path / method, manifest["base"], task)
        losses = [
            evaluate(one, tokenizer, task, max_length=40)["loss"] for one in (reference, model)
        ]
        assert losses == pytest.approx([entry["loss"] for entry in result.curve], rel=1e-5)
        assert losses[0] != pytest.approx(losses[1], rel=1e-2)


# --- the order of the labels -----------------------------------------------------------------

OTHER = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")


def save_classifier(folder, name, id2label=OTHER, **changes):
    """Save a classifier with labels of its own and a head on the scale of a trained head."""
    save_base(folder, name, SEQUENCE, num_labels=3, initializer_range=0.5, **changes)
    edit_json(
        folder / "config.json",
        id2label={str(i): n for i, n in enumerate(id2label)},
        label2id={n: i for i, n in enumerate(id2label)},
    )
    return folder


@pytest.mark.slow
def test_labels_are_mapped_by_name(tmp_path):
    for name in ("bert", "roberta", "distilbert", "bart", "t5", "xlnet", "xlm", "gpt2"):
        folder = save_classifier(tmp_path / name, name)
        plain = logits(SEQUENCE.from_pretrained(folder))
        model, tokenizer = load_model(folder, task=TASK)
        assert torch.equal(logits(model), plain[:, [2, 1, 0]]), name
        assert model.config.id2label == dict(enumerate(LABELS))
        assert torch.equal(logits(load_model(folder)[0]), plain)  # without a task there is no order
        save_model(model, tokenizer, tmp_path / "saved")
        again, _ = load_model(tmp_path / "saved", task=TASK, new_head=False)
        assert torch.equal(logits(again), plain[:, [2, 1, 0]]), name


def test_names_of_labels(tmp_path):
    """Names are matched across spellings; default names such as LABEL_0 count as no names."""
    assert label_rows(["Not-Entailment", "entailed"], ["entailment", "not_entailment"], "m") == [
        1,
        0,
    ]
    assert label_rows(["POS", "neg"], ["negative", "positive"], "m") == [1, 0]
    assert label_rows(["LABEL_1", "LABEL_0"], ["negative", "positive"], "m") == [1, 0]
    assert label_rows(["yes", "no"], ["0", "1"], "m") is None  # a task whose labels are numbers
    assert label_rows(["no", "yes"], ["yes", "no"], "m") == [1, 0]
    # row i of the result is the row of the task's label i; a cycle differs from its inverse
    assert label_rows(["c", "a", "b"], ["a", "b", "c"], "m") == [1, 2, 0]
    for own, task in ((["a", "b"], ["a", "c"]), (["a", "A"], ["a", "b"]), (["b"], ["a", "b"])):
        with pytest.raises(
            ValueError,
            match=f"must be the task's {', '.join(task)} in any order, got {', '.join(own)}",
        ):
            label_rows(own, task, "m")
    assert own_label_names({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, "f") is None
    assert own_label_names({"id2label": {"1": "a", "0": "b"}}, "f") == ["b", "a"]
    assert own_label_names({"label2id": {"a": 1, "b": 0}}, "f") == ["b", "a"]
    for bad, message in (
        ({"id2label": ["a"]}, "JSON object"),
        ({"id2label": {"0": 1}}, "labels 0"),
        ({"id2label": {"1": "a", "2": "b"}}, "must name the labels 0 to 1"),
        ({"id2label": {"x": "a"}}, "must name the labels 0 to 0"),
        ({"label2id": {"a": [0]}}, "label2id"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}}, "must have one order"),
    ):
        with pytest.raises(ValueError, match=f"f: .*{message}"):
            own_label_names(bad, "f")
    folder = save_classifier(tmp_path / "bert", "bert", ("sad", "so-so", "glad"))
    with pytest.raises(
        ValueError, match="entailment, neutral, contradiction in any order, got sad, so-so, glad"
    ):
        load_model(folder, task=TASK)
    numbers = replace(TASK, label_names=("0", "1", "2"))
    assert load_model(folder, task=numbers)[0].config.id2label[2] == "glad"


def test_classes_that_fold_alike_are_matched_by_their_exact_names():
    for names in (("US", "us"), ("pos", "positive"), ("a_b", "a-b", "A b")):
        for task in itertools.permutations(names):
            assert [names[row] for row in label_rows(names, task, "m")] == [*task]
    with pytest.raises(ValueError, match="the task's US, us in any order, got US, Us"):
        label_rows(["US", "Us"], ["US", "us"], "m")
    orders = {"id2label": {"0": "US", "1": "us"}, "label2id": {"US": 1, "us": 0}}
    with pytest.raises(ValueError, match="must have one order"):
        own_label_names(orders, "f")


def test_the_problem_must_be_the_head_s(tmp_path):
    folder = save_classifier(tmp_path / "bert", "bert", LABELS)
    for problem, options in (
        ("regression", dict(task=TASK)),
        ("multi_label_classification", {}),
        ("single_label_classification", dict(kind="regression", num_labels=3)),
    ):
        edit_json(folder / "config.json", problem_type=problem)
        with pytest.raises(ValueError, match=f"problem_type of .* got {problem}"):
            load_model(folder, **options)
    score = save_base(tmp_path / "score", "bert", SEQUENCE, num_labels=1)
    assert load_model(score)[0].config.problem_type == "regression"


def adapt(base, folder, tokens=0, seed=1, **options):
    """Save a PEFT adapter as another program does; return the logits of the adapted model."""
    model = SEQUENCE.from_pretrained(base, num_labels=3)
    if tokens:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
    perturb(adapted, seed)
    adapted.save_pretrained(folder, save_embedding_layers=bool(tokens))
    return logits(adapted)


def test_labels_of_adapters_are_mapped_too(tmp_path):
    base = save_classifier(tmp_path / "bert", "bert")
    for number, options in enumerate(
        (
            dict(task_type="SEQ_CLS", target_modules=["query"]),
            dict(target_modules=["query"]),
            dict(target_modules=["query", "classifier"]),
            dict(target_modules=["query", "classifier"], use_dora=True),
        )
    ):
        plain = adapt(base, tmp_path / f"{number}", **options)
        model, _ = load_model(tmp_path / f"{number}", task=TASK, new_head=False)
        torch.testing.assert_close(logits(model), plain[:, [2, 1, 0]])
        assert torch.equal(logits(load_model(tmp_path / f"{number}")[0]), plain)
    trained, tokenizer = load_model(base, task=TASK, method="lora", rank=2)
    perturb(trained)
    save_model(trained, tokenizer, tmp_path / "ours")
    again, _ = load_model(tmp_path / "ours", task=TASK, new_head=False)
    assert torch.equal(logits(again), logits(trained))
    plain = peft.PeftModel.from_pretrained(SEQUENCE.from_pretrained(base), tmp_path / "ours")
    assert torch.equal(logits(plain), logits(trained))


# --- code in a folder ------------------------------------------------------------------------


def test_python_code_of_a_folder_is_never_run(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    marker = tmp_path / "was-run"
    own, known, tokenizer = (save_base(tmp_path / f, "bert") for f in ("own", "known", "words"))
    for folder in (own, known, tokenizer):
        (folder / "custom.py").write_text(
            f"open({str(marker)!r}, 'w')\nclass C: pass\nclass M: pass"
        )
    code = {"AutoConfig": "custom.C", "AutoModelForSequenceClassification": "custom.M"}
    edit_json(own / "config.json", auto_map=code, model_type="of-its-own")
    edit_json(known / "config.json", auto_map=code)
    edit_json(
        tokenizer / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["custom.C", "custom.C"]},
        tokenizer_class="OfItsOwn",
    )
    edit_json(tokenizer / "config.json", model_type="vit")  # which has no tokenizer
    kind = dict(kind="classification", num_labels=2)
    refused(r"config.json: model_type 'of-its-own' needs Python code .* never run", load_model, own)
    refused("of-its-own", load_model, own, **kind)
    refused("of-its-own", load_tokenizer, own)
    refused("custom code", load_tokenizer, tokenizer)
    load_model(known, **kind)  # by transformers' own code
    assert not asked and not marker.exists() and "custom" not in capsys.readouterr().out


# --- adapters --------------------------------------------------------------------------------


def test_an_adapter_on_part_of_the_head(tmp_path):
    base = save_classifier(tmp_path / "roberta", "roberta", LABELS)
    plain = adapt(base, tmp_path / "adapter", target_modules=["classifier.dense"])
    model, _ = load_model(tmp_path / "adapter", new_head=False)
    assert model.config.num_labels == 3
    assert torch.equal(logits(model), plain)
    headless = save_base(tmp_path / "headless", "roberta")
    with pytest.raises(ValueError, match=r"have no weights for classifier.dense.bias, .*at random"):
        load_model(tmp_path / "adapter", kind="classification", num_labels=3, base=str(headless))


def test_an_adapter_in_half_precision(tmp_path):
    """PEFT keeps the head in the type of the base, and a saved value is rounded to it."""
    base = save_classifier(tmp_path / "bert", "bert")
    adapt(base, tmp_path / "adapter", task_type="SEQ_CLS", target_modules=["query"])
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    head = next(value for key, value in saved.items() if "classifier.weight" in key)
    for dtype in (torch.bfloat16, torch.float16):
        model, _ = load_model(tmp_path / "adapter", dtype=dtype)
        loaded = head_state(model)["classifier.weight"]
        assert loaded.dtype == dtype and torch.equal(loaded, head.to(dtype))
        assert not torch.equal(loaded.float(), head)


def test_an_adapter_whose_base_lacks_layers_is_refused(tmp_path):
    base = save_classifier(tmp_path / "bert", "bert", LABELS)
    expected = adapt(base, tmp_path / "adapter", task_type="SEQ_CLS", target_modules=["query"])
    assert torch.equal(logits(load_model(tmp_path / "adapter", task=TASK)[0]), expected)
    moved = tmp_path / "moved"
    shutil.move(base, moved)
    with pytest.raises(ValueError, match=r"base of adapter .*or give another as base"):
        load_model(tmp_path / "adapter", task=TASK)
    model, _ = load_model(tmp_path / "adapter", task=TASK, base=str(moved))
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="must be a full model, got the adapter"):
        load_model(tmp_path / "adapter", task=TASK, base=str(tmp_path / "adapter"))
    shorter = tmp_path / "shorter"
    shutil.copytree(moved, shorter)
    lost = "bert.encoder.layer.1.output.dense.weight"
    drop(shorter, lost)
    with pytest.raises(
        ValueError,
        match=f"base {re.escape(str(shorter))} have no weights for "
        f"{lost}: it would be drawn at random",
    ):
        load_model(tmp_path / "adapter", task=TASK, base=str(shorter))
    file = "adapter_model.safetensors"
    key = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    weights = load_file(tmp_path / "adapter" / file)
    for change, message in (
        ({key: None}, f"no weights for {key}: they would be drawn"),
        ({"base_model.model.more.weight": torch.ones(2)}, "does not have"),
        ({key: torch.ones(3, 16)}, r"of shape \(3, 16\), and the model has"),
    ):
        save_file(
            {k: v for k, v in (weights | change).items() if v is not None},
            tmp_path / "adapter" / file,
        )
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "adapter", task=TASK, base=str(moved))


def test_an_adapter_with_two_added_tokens(tmp_path):
    size = len(tiny.tokenizer("tiny"))
    base = save_classifier(tmp_path / "bert", "bert", LABELS, vocab_size=size)
    folder = tmp_path / "adapter"
    expected = adapt(base, folder, tokens=size + 2, task_type="SEQ_CLS", target_modules=["query"])
    tokenizer = load_tokenizer(str(base))
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_model(folder, task=TASK, new_head=False)
    assert torch.equal(logits(model), expected) and len(tokenizer) == size + 2
    ids = tokenizer("<two> <one>")["input_ids"]
    assert {size, size + 1} <= set(ids)
    assert load_tokenizer(str(folder)).get_vocab()["<two>"] == size + 1
    save_model(model, tokenizer, tmp_path / "again")
    again, _ = load_model(tmp_path / "again", task=TASK)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    drop(
        folder,
        "base_model.model.bert.embeddings.word_embeddings.weight",
        file="adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match="has 2 added tokens for which the model has no embedding"):
        load_model(folder, task=TASK)


def test_a_base_that_was_changed_is_noticed(tmp_path, base):
    """Adapter and reference are refused on a base with different weights of the same shapes."""
    from lowrank_dp.membership.manifest import read_manifest
    from lowrank_dp.mia.loading import load_reference

    folder, task = save_base(tmp_path / "bert", "bert"), load_task(base.task)
    for method in ("full", "lora"):
        train(replace(base, model=str(folder), method=method), tmp_path / method)
    before = {method: load_model(tmp_path / method, task=task)[0] for method in ("full", "lora")}
    told = {
        method: read_manifest(tmp_path / method / "membership.json", base=str(folder)).base
        for method in before
    }
    assert len(told["lora"]["weights"]) == 64
    shutil.copytree(folder, tmp_path / "moved")  # another folder with the same weights is accepted
    moved, _ = load_model(tmp_path / "lora", task=task, base=str(tmp_path / "moved"))
    assert torch.equal(logits(moved), logits(before["lora"]))
    key = "bert.embeddings.word_embeddings.weight"
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {key: 1.5 * weights[key]}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    message = f"was trained on a base with other weights than {re.escape(str(folder))} has now"
    with pytest.raises(ValueError, match=f"checkpoint {re.escape(str(tmp_path))}/lora {message}"):
        load_model(tmp_path / "lora", task=task)
    for method in before:
        with pytest.raises(ValueError, match=message):
            load_reference(tmp_path / method, told[method], task)
        load_reference(tmp_path / method, told[method] | {"model": str(tmp_path / "moved")}, task)
    full, _ = load_model(tmp_path / "full", task=task)  # holds all of its weights itself
    assert torch.equal(logits(full), logits(before["full"]))


# --- damaged and missing files ---------------------------------------------------------------


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    """Without the refusal, transformers would make a tokenizer to which every word is unknown."""
    for name in ("bert", "roberta", "gpt2", "t5"):
        folder = save_classifier(tmp_path / name, name, LABELS)
        kept = {file.name: file.read_bytes() for file in folder.glob("tokenizer*")}
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").write_text(
            json.dumps(
                {"tokenizer_class": f"{transformers.CONFIG_MAPPING[name].__name__[:-6]}Tokenizer"}
            )
        )
        for call in (load_model, load_tokenizer):
            with pytest.raises(ValueError, match="tokenizer"):
                call(str(folder))
        (folder / "tokenizer_config.json").unlink()
        for call in (load_model, load_tokenizer):
            with pytest.raises(
                ValueError,
                match=f"folder {re.escape(str(folder))} holds no "
                "tokenizer: save .* by tokenizer.save_pretrained",
            ):
                call(str(folder))
        for file, content in kept.items():
            (folder / file).write_bytes(content)
        for damage in (
            b"",
            b"{",
            b"[]",
            b"{}",
            kept["tokenizer.json"][:400],
            b"\xff" + kept["tokenizer.json"],
        ):
            (folder / "tokenizer.json").write_bytes(damage)
            with pytest.raises(ValueError, match="tokenizer") as caught:
                load_model(str(folder))
            assert "\n" not in str(caught.value)
    base = save_classifier(tmp_path / "base", "bert", LABELS)
    adapt(base, tmp_path / "adapter", task_type="SEQ_CLS", target_modules=["query"])
    assert (
        load_tokenizer(str(tmp_path / "adapter"))("film")["input_ids"]
        == load_tokenizer(str(base))("film")["input_ids"]
    )
    with pytest.raises(ValueError, match=r"could|hold|must"):
        load_tokenizer(str(tmp_path / "adapter"), base=str(tmp_path / "nowhere"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_mutated_configurations_are_refused_in_one_line(tmp_path, file):
    """A field that is not read may hold any value; a bad value of another field is refused."""
    base = save_classifier(tmp_path / "bert", "bert", LABELS)
    folder = base
    if file.startswith("adapter"):
        folder = tmp_path / "adapter"
        adapt(base, folder, task_type="SEQ_CLS", target_modules=["query"])
    good = (folder / file).read_text()
    refused = set()
    values = (None, "x", [1], {"a": "b"}, -1, 2.5, True) if folder == base else ("x", [1], -1)
    for key in json.loads(good):
        for value in values:
            (folder / file).write_text(json.dumps(json.loads(good) | {key: value}))
            try:
                load_model(folder, task=TASK, new_head=False)
            except ValueError as error:
                refused.add(key)
                assert "\n" not in str(error) and str(tmp_path) in str(error), (key, value)
    expected = {
        "config.json": {"architectures", "id2label", "num_hidden_layers", "model_type"},
        "adapter_config.json": {"r", "target_modules", "base_model_name_or_path"},
    }
    assert expected[file] <= refused
    for text in ("[]", "3", "{", "", "\x00"):
        (folder / file).write_text(text)
        with pytest.raises(ValueError, match=f"{file} must"):
            load_model(folder, task=TASK)


def test_numbers_of_layers_and_labels_that_would_take_hours_are_refused(tmp_path):
    for family, key in (
        ("bert", "num_hidden_layers"),
        ("distilbert", "n_layers"),
        ("bart", "encoder_layers"),
        ("bart", "decoder_layers"),
        ("bert", "num_labels"),
    ):
        base = save_base(tmp_path / f"{family} {key}", family, SEQUENCE, num_labels=3)
        for value in (10**9, 10**400):
            edit_json(base / "config.json", **{key: value})
            with pytest.raises(ValueError, match=rf"config.json: {key} must be at most 10,"):
                load_model(base, task=TASK)


def test_damaged_weights_are_named(tmp_path):
    base = save_classifier(tmp_path / "bert", "bert", LABELS)
    adapt(base, tmp_path / "adapter", task_type="SEQ_CLS", target_modules=["query"])
    for file in (base / "model.safetensors", tmp_path / "adapter" / "adapter_model.safetensors"):
        good = file.read_bytes()
        for damage in (b"", b"broken", good[:300], good[:-5], b"\xff" * 64):
            file.write_bytes(damage)
            with pytest.raises(ValueError, match=f"{file.name} could not be loaded") as caught:
                load_model(file.parent, task=TASK)
            assert "\n" not in str(caught.value)
        file.write_bytes(good)
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part.safetensors"}}')
    with pytest.raises(ValueError, match=r"must hold part.safetensors, which model.safetensors"):
        load_model(base, task=TASK)
