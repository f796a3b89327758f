"""Attacks on checkpoints that were trained elsewhere: positive controls, formats, refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lowrank_dp.commands.mia import app
from lowrank_dp.data import IGNORE, Example, encode, load_task
from lowrank_dp.data.template import Template
from lowrank_dp.mia.attack import Options, attack, load, open_target
from lowrank_dp.models import load_tokenizer
from tests.tasks import run_command, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = "### Input: {prompt}\n### Response: {target}"
SIDE = 50  # number of members, and of non-members


def run(capsys, *arguments):
    return run_command(capsys, app, *arguments)


def overfit(model, batch, steps, rate):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def padded(tokenizer, texts):
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)}


def save(model, folder, tokenizer):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Classifiers, causal language models and adapters, each with its base, members and others.

    Labels are random, so that a model predicts them only from memory. A confident classifier is
    right on half of the non-members, so the best AUC is 3/4 plus what its confidence adds.
    """
    root = tmp_path_factory.mktemp("foreign")
    rng = np.random.default_rng(1)
    texts = [example.text for example in load_task("generated").train[: 2 * SIDE]]
    labels = rng.integers(0, 2, 2 * SIDE).tolist()
    pairs = [(e.text, e.target) for e in load_task("generated-table").train[: 3 * SIDE]]
    rng.shuffle(pairs)
    for side, part in (("in", slice(0, SIDE)), ("out", slice(SIDE, 2 * SIDE))):
        write_jsonl(
            root / f"labels-{side}.jsonl",
            [{"text": t, "label": y} for t, y in zip(texts[part], labels[part], strict=True)],
        )
        write_jsonl(root / f"texts-{side}.jsonl", [{"text": t} for t in texts[part]])
        write_jsonl(
            root / f"pairs-{side}.jsonl", [{"source": s, "target": t} for s, t in pairs[part]]
        )

    torch.manual_seed(0)
    words = load_tokenizer("tiny")
    classifier = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=768,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=0,
        )
    )
    save(classifier, root / "classifier-base", words)
    save(classifier.bert, root / "headless", words)
    batch = words(texts[:SIDE], return_tensors="pt", padding=True)
    overfit(classifier, {**batch, "labels": torch.tensor(labels[:SIDE])}, 80, 1e-2)
    save(classifier, root / "classifier", words)

    pieces = load_tokenizer("tiny-llama")
    config = transformers.GPT2Config(
        vocab_size=len(pieces),
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=pieces.eos_token_id,
    )
    language = transformers.GPT2LMHeadModel(config)
    save(language, root / "lm-base", pieces)
    overfit(language, padded(pieces, texts[:SIDE]), 80, 1e-2)
    save(language, root / "lm", pieces)

    written = [
        "### Input: {}\n### Response: {}".format(*pair) + pieces.eos_token for pair in pairs[:SIDE]
    ]
    templated = transformers.GPT2LMHeadModel.from_pretrained(root / "lm-base")
    overfit(templated, padded(pieces, written), 80, 1e-2)
    save(templated, root / "templated", pieces)

    adapted = get_peft_model(
        transformers.GPT2LMHeadModel.from_pretrained(root / "lm-base"),
        LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=64, target_modules=["c_attn", "c_proj", "c_fc"]
        ),
    )
    overfit(adapted, padded(pieces, texts[:SIDE]), 80, 2e-2)
    save(adapted, root / "adapter", pieces)
    file = root / "adapter" / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/gone/away"})
    )
    return root


def files(place, what):
    return {"members": place / f"{what}-in.jsonl", "nonmembers": place / f"{what}-out.jsonl"}


def words_of(place, model, what, *more):
    return [
        "--model",
        place / model,
        "--members",
        place / f"{what}-in.jsonl",
        "--nonmembers",
        place / f"{what}-out.jsonl",
        *more,
    ]


def found(place, tmp_path, model, **options):
    options = Options(**options)
    return attack(open_target(place / model, options), options, tmp_path / "cache")


def auc(report, name):
    return next(one.auc.value for one in report.attacks if one.name == name)


# --- positive controls: higher is member, by each way to a score ------------------------------


def test_full_texts_are_scored_but_for_the_first_token(place, tmp_path):
    report = found(place, tmp_path, "lm", **files(place, "texts"), base=str(place / "lm-base"))
    for name in ("loss", "base", "zlib", "min-k", "min-k++"):
        assert auc(report, name) > 0.9, name
    assert report.verdict == "LEAKS" and report.learning.better
    assert report.format.template == "{text}" and report.format.origin == "assumed"
    assert report.format.scored == "all tokens but the first"

    tokenizer = load_tokenizer(str(place / "lm"))
    model = transformers.GPT2LMHeadModel.from_pretrained(place / "lm")
    lines = (place / "texts-in.jsonl").read_text().splitlines()
    for i in (0, 3, 17):
        ids = tokenizer(json.loads(lines[i])["text"])["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        naive = np.mean([-float(logs[t - 1, ids[t]]) for t in range(1, len(ids))])
        assert report.scores["loss"][i] == pytest.approx(-naive, rel=1e-4)


def test_a_template_is_what_the_model_was_trained_with(place, tmp_path):
    report = found(place, tmp_path, "templated", **files(place, "pairs"), template=TEMPLATE)
    assert auc(report, "loss") > 0.9 and report.format.origin == "as given"
    other = found(place, tmp_path, "templated", **files(place, "pairs"))
    assert other.format.template is None and other.format.origin == "assumed"
    wrong = -other.scores["loss"][other.is_member].mean()
    assert wrong > 2 * report.learning.loss, "another template hides what was learned"

    tokenizer = load_tokenizer(str(place / "templated"))
    model = transformers.GPT2LMHeadModel.from_pretrained(place / "templated")
    row = json.loads((place / "pairs-in.jsonl").read_text().splitlines()[4])
    prompt = f"### Input: {row['source']}\n### Response: "
    both = tokenizer(prompt + row["target"], return_offsets_mapping=True)
    ids = [*both["input_ids"], tokenizer.eos_token_id]
    own = [*(end > len(prompt) for _, end in both["offset_mapping"]), True]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    naive = np.mean([-float(logs[t - 1, ids[t]]) for t in range(1, len(ids)) if own[t]])
    assert report.scores["loss"][4] == pytest.approx(-naive, rel=1e-4)


def test_a_base_with_its_own_head_is_the_reference(place, tmp_path, capsys):
    report = found(
        place, tmp_path, "classifier", **files(place, "labels"), base=str(place / "classifier-base")
    )
    # 0.68 to 0.82 over some seeds and processors; chance has a standard deviation of 0.06
    assert report.primary == "base" and auc(report, "base") > 0.64 and report.verdict == "LEAKS"
    before, after = (
        transformers.BertForSequenceClassification.from_pretrained(place / name)
        for name in ("classifier-base", "classifier")
    )
    tokenizer = load_tokenizer(str(place / "classifier"))
    row = json.loads((place / "labels-out.jsonl").read_text().splitlines()[2])
    batch = tokenizer([row["text"]], return_tensors="pt")
    with torch.no_grad():
        old, new = (
            -float(m(**batch).logits[0].log_softmax(-1)[row["label"]]) for m in (before, after)
        )
    assert report.scores["base"][SIDE + 2] == pytest.approx(old - new, rel=1e-3, abs=1e-5)

    capsys.readouterr()  # the bars of transformers above
    words = words_of(place, "classifier", "labels", "--base", place / "headless")
    code, _, err = run(capsys, *words, "--attacks", "base", "--output", tmp_path / "no")
    assert code == 2 and err.count("\n") == 1 and "needs a base with its own trained head" in err
    code, out, _ = run(capsys, *words, "--output", tmp_path / "auto")
    assert code == 0 and "not made: base (--base" in out and "trained head" in out
    code, _, err = run(
        capsys,
        *words_of(
            place,
            "classifier",
            "labels",
            "--base",
            place / "classifier",
            "--output",
            tmp_path / "self",
        ),
    )
    assert code == 2 and "the checkpoint itself" in err


def test_base_replaces_what_an_adapter_names(place, tmp_path, capsys):
    code, _, err = run(capsys, *words_of(place, "adapter", "texts", "--output", tmp_path / "no"))
    assert code == 2 and err.count("\n") == 1 and "/gone/away" in err
    report = found(place, tmp_path, "adapter", **files(place, "texts"), base=str(place / "lm-base"))
    assert auc(report, "base") > 0.9 and report.verdict == "LEAKS"
    assert report.base is not None, "the adapter is switched off for the losses before"


def test_signals_on_a_replaced_base_are_not_read(place, tmp_path):
    """The adapter of another program names its base by a path, whose content may change."""
    shutil.copytree(place / "lm-base", tmp_path / "base")
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    named = {"base_model_name_or_path": str(tmp_path / "base")}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))

    def losses(cache):
        options = Options(attacks=("loss",), **files(place, "texts"))
        report = attack(open_target(tmp_path / "adapter", options), options, tmp_path / cache)
        return report.scores["loss"]

    before = losses("kept")
    np.testing.assert_array_equal(losses("kept"), before)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights = {name: 1.5 * weight for name, weight in weights.items()}
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    found = losses("kept")
    assert np.abs(found - before).max() > 1e-3
    np.testing.assert_array_equal(found, losses("fresh"))


@pytest.mark.filterwarnings("always")
def test_a_warning_is_one_line_without_a_place_in_the_source(place, tmp_path, capsys):
    for side in ("in", "out"):
        rows = [
            json.loads(line) for line in (place / f"labels-{side}.jsonl").read_text().splitlines()
        ]
        write_jsonl(tmp_path / f"labels-{side}.jsonl", [row | {"note": 1} for row in rows])
    code, _, err = run(
        capsys,
        "--model",
        place / "classifier",
        "--members",
        tmp_path / "labels-in.jsonl",
        "--nonmembers",
        tmp_path / "labels-out.jsonl",
        "--dry-run",
    )
    assert code == 0 and "warning: " in err
    assert all(
        line.startswith("warning: ") and "not read: column 'note'" in line
        for line in err.splitlines()
    ), err


# --- refusals, all before a forward pass -------------------------------------------------------


def test_no_false_reassurance(place, tmp_path, capsys):
    """An earlier version exited with code 0 in each case, with an AUC of at most about 1/2."""
    (tmp_path / "run").mkdir()
    load_tokenizer(str(place / "classifier")).save_pretrained(tmp_path / "run")
    for folder in ("run/checkpoint-500", "alone"):
        shutil.copytree(
            place / "classifier",
            tmp_path / folder,
            ignore=shutil.ignore_patterns("*token*", "vocab*", "special*"),
        )
    half = (place / "labels-in.jsonl").read_text().splitlines()[: SIDE // 2] + (
        place / "labels-out.jsonl"
    ).read_text().splitlines()[: SIDE // 2]
    (tmp_path / "half.jsonl").write_text("\n".join(half) + "\n")
    shouted = [
        json.dumps({"text": json.loads(line)["text"].upper() + " ", "label": 1}) for line in half
    ]
    (tmp_path / "shouted.jsonl").write_text("\n".join(shouted) + "\n")
    labels = ["--members", place / "labels-in.jsonl", "--nonmembers"]
    other = place / "labels-out.jsonl"
    cases = {
        "no tokenizer": (["--model", tmp_path / "alone", *labels, other], "holds no tokenizer"),
        "tokenizer in the parent": (
            ["--model", tmp_path / "run" / "checkpoint-500", *labels, other],
            "its parent folder run does: copy",
        ),
        "no head": (["--model", place / "headless", *labels, other], "classifier"),
        "a causal LM and labels": (
            ["--model", place / "lm", *labels, other],
            "is a causal language model, and the records have labels",
        ),
        "a classifier and texts": (
            words_of(place, "classifier", "pairs"),
            "is a classifier, and the records have no labels",
        ),
        "members as non-members": (
            ["--model", place / "classifier", *labels, place / "labels-in.jsonl"],
            f"{SIDE} of {SIDE} non-members have the text of a member, first "
            "nonmembers/0, nonmembers/1, nonmembers/2",
        ),
        "half overlap": (
            ["--model", place / "classifier", *labels, tmp_path / "half.jsonl"],
            f"{SIDE // 2} of {SIDE} non-members",
        ),
        "overlap but for case and label": (
            ["--model", place / "classifier", *labels, tmp_path / "shouted.jsonl"],
            f"{SIDE // 2} of {SIDE} non-members",
        ),
        "a template for plain texts": (
            words_of(place, "lm", "texts", "--template", TEMPLATE),
            "must have {text} alone",
        ),
        "a template without target": (
            words_of(place, "templated", "pairs", "--template", "{text}"),
            "must have {target}",
        ),
        "a template for labels": (
            words_of(place, "classifier", "labels", "--template", "{text}"),
            "for causal language models",
        ),
        "no such field": (
            words_of(place, "lm", "texts", "--template", "{words}"),
            "template must be a text with {source}",
        ),
        "too long": (words_of(place, "lm", "texts", "--max-length", "4000"), "max_length"),
        "a target that fills it": (
            words_of(place, "templated", "pairs", "--max-length", "5"),
            "no room for its source",
        ),
        "no attack of labels": (
            words_of(place, "classifier", "labels", "--attacks", "zlib"),
            "needs a causal language model",
        ),
        "no base": (words_of(place, "classifier", "labels", "--attacks", "base"), "give --base"),
    }
    for name, (arguments, message) in cases.items():
        for more in ([], ["--dry-run"]):
            code, out, err = run(capsys, *arguments, "--output", tmp_path / "out", *more)
            assert code == 2 and err.count("\n") == 1 and message in err, (name, more, out, err)
    assert not (tmp_path / "out").exists()


def test_a_model_that_learned_nothing_is_not_called_safe(place, tmp_path):
    """One model is untrained; another model is trained and gets its records in the wrong form."""
    for model, what, options in (("classifier-base", "labels", {}), ("lm-base", "texts", {})):
        report = found(place, tmp_path, model, **files(place, what), **options)
        assert not report.learning.better, model
        assert report.verdict.startswith(("NOTHING LEARNED: ", "BELOW CHANCE", "INVALID")), model
        assert "no leak" not in report.verdict
    shutil.copytree(place / "lm", tmp_path / "copy")
    options = Options(**files(place, "texts"), base=str(tmp_path / "copy"))
    report = attack(open_target(place / "lm", options), options, tmp_path / "cache")
    assert "base" not in {one.name for one in report.attacks}
    assert "fine-tuning changed nothing" in report.unavailable["base"]


def test_a_checkpoint_without_a_template_says_what_it_assumes(place, tmp_path, capsys):
    for words, line in (
        (
            words_of(place, "lm", "texts"),
            "plain text (text from 'text') written as '{text}', not cut (assumed); scored: all "
            "tokens but the first",
        ),
        (
            words_of(place, "templated", "pairs", "--max-length", "90"),
            "prompt and target (prompt from 'source', target from 'target'), cut to 90 tokens (as "
            "given); scored: the target's tokens and the end of sequence",
        ),
        (
            words_of(
                place, "classifier", "labels", "--text-column", "text", "--label-column", "label"
            ),
            "text and label (text from 'text', label from 'label' (2 classes: 0, 1)), not cut "
            "(assumed); scored: the label",
        ),
    ):
        code, out, err = run(capsys, *words, "--dry-run")
        assert code == 0 and line in out, (out, err)
    for side in ("in", "out"):  # classes that are words, of a model that names none
        rows = [json.loads(row) for row in open(place / f"labels-{side}.jsonl", encoding="utf-8")]
        named = [{"text": row["text"], "label": "ny"[row["label"]]} for row in rows]
        write_jsonl(tmp_path / f"named-{side}.jsonl", named)
    named = ["--members", tmp_path / "named-in.jsonl", "--nonmembers", tmp_path / "named-out.jsonl"]
    order = "(2 classes: n, y)) in sorted order (assumed: id2label of the checkpoint names no"
    for config, assumed in (({}, True), ({"id2label": {"0": "y", "1": "n"}}, False)):
        folder = tmp_path / f"checkpoint-{assumed}"
        shutil.copytree(place / "classifier", folder)
        document = json.loads((folder / "config.json").read_text()) | config
        document.pop("label2id", None)
        (folder / "config.json").write_text(json.dumps(document))
        code, out, err = run(capsys, "--model", folder, *named, "--dry-run")
        assert code == 0 and (order in out) is assumed, (out, err)
    code, out, _ = run(
        capsys, *words_of(place, "classifier", "labels", "--output", tmp_path, "--json")
    )
    document = json.loads(out)
    assert code == 0 and document["format"] == {
        "columns": "text and label (text from 'text', label from 'label' (2 classes: 0, 1))",
        "template": None,
        "max_length": None,
        "scored": "the label",
        "origin": "assumed",
    }
    assert document["learning"]["better"] is True and document["left_out"] == []


# --- records ---------------------------------------------------------------------------------


def test_labels_count_in_the_models_own_classes(place, tmp_path):
    """Labels are matched by number or by name, and never by their rank in a file."""
    rows = {
        side: [
            json.loads(line) for line in (place / f"labels-{side}.jsonl").read_text().splitlines()
        ]
        for side in ("in", "out")
    }
    only_ones = [row for row in rows["in"] if row["label"] == 1]
    only_ones += [{"text": f"{row['text']} indeed", "label": 1} for row in only_ones][:30]
    write_jsonl(tmp_path / "ones.jsonl", only_ones)
    options = Options(members=tmp_path / "ones.jsonl", nonmembers=place / "labels-out.jsonl")
    records = open_target(place / "classifier", options).records
    assert records.task.num_labels == 2
    assert {e.label for e, bit in zip(records.examples, records.is_member, strict=True) if bit} == {
        1
    }
    write_jsonl(tmp_path / "two.jsonl", [row | {"label": 2} for row in rows["out"]])
    with pytest.raises(ValueError, match=r"two.jsonl: labels must be below 2, as in the model"):
        open_target(
            place / "classifier",
            Options(members=place / "labels-in.jsonl", nonmembers=tmp_path / "two.jsonl"),
        )


def test_copies_count_once(place, tmp_path):
    """A repeated row counted twice would make every interval too short."""
    lines = (place / "labels-in.jsonl").read_text()
    (tmp_path / "thrice.jsonl").write_text(lines * 3)
    options = Options(members=tmp_path / "thrice.jsonl", nonmembers=place / "labels-out.jsonl")
    records = open_target(place / "classifier", options).records
    assert records.is_member.sum() == SIDE and len(records.left_out) == 2 * SIDE


# --- templates ---------------------------------------------------------------------------------


def test_templates():
    tokenizer = load_tokenizer("tiny-llama")
    example = Example("x/0", "name[The Mill], food[Thai]", target="The Mill serves Thai food.")
    for text in (
        "{source}\\n{target}",
        "Q: {prompt} A:{response}",
        "{target}",
        "{source}{target}",
        TEMPLATE,
        "a{prompt}b{target}c",
    ):
        before, source, between, scored = Template.parse(text).parts(example)
        whole = text.replace("\\n", "\n")
        for field in ("source", "prompt"):
            whole = whole.replace(f"{{{field}}}", example.text)
        for field in ("target", "response"):
            whole = whole.replace(f"{{{field}}}", example.target)
        assert before + source + between + scored == whole, text
        (row,) = encode([example], tokenizer, kind="generation", template=text)
        ids = tokenizer(whole)["input_ids"]
        assert row["input_ids"] == [*ids, tokenizer.eos_token_id], text
        labelled = [t for t in row["labels"] if t != IGNORE]
        assert row["input_ids"][-len(labelled) :] == labelled
        assert "serves Thai food." in tokenizer.decode(labelled), text
        assert "name[" not in tokenizer.decode(labelled), text
        if "{target}" != text:  # truncation removes the end of the source only
            (short,) = encode(
                [example],
                tokenizer,
                kind="generation",
                template=text,
                max_length=len(row["input_ids"]) - 3,
            )
            assert len(short["input_ids"]) == len(row["input_ids"]) - 3
            assert [t for t in short["labels"] if t != IGNORE] == labelled
            first = next(
                i
                for i, (a, b) in enumerate(zip(short["input_ids"], row["input_ids"], strict=False))
                if a != b
            )
            kept = tokenizer.decode(short["input_ids"][:first])
            assert (before + source).startswith(kept.strip()), text
    plain = Example("x/1", "The Mill serves Thai food.")
    (row,) = encode([plain], tokenizer, kind="generation", template="{text}")
    ids = tokenizer(plain.text)["input_ids"]
    assert row == {"input_ids": ids, "labels": [IGNORE, *ids[1:]]}
    (row,) = encode([plain], tokenizer, kind="generation", template="{text}", max_length=4)
    assert row["input_ids"] == ids[:4]
    for text in (
        "",
        "{target}{source}",
        "{source}",
        "{source}{source}{target}",
        "{x}",
        "{text}{x}",
        "{text}{target}",
        "{}",
        "{target}{target}",
        3,
    ):
        with pytest.raises(ValueError, match="template must be a text with"):
            Template.parse(text)
    for examples, options, message in (
        ([plain], {"template": "{target}"}, "x/1 must have a target"),
        ([Example("x/2", "a")], {"template": "{text}", "max_length": 1}, "x/2 has 1 tokens"),
        ([example], {"template": TEMPLATE, "max_length": 4}, "leaves no room"),
        ([example], {"template": "{text}", "with_target": False}, "template must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(examples, tokenizer, kind="generation", **options)


def test_loading_does_not_run_the_model(place, monkeypatch):
    """Loading, which --dry-run does too, makes no forward pass."""

    def forward(*arguments, **options):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", forward)
    options = Options(**files(place, "texts"), base=str(place / "lm-base"))
    assert len(load(open_target(place / "lm", options), options).rows) == 2 * SIDE
