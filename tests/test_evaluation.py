"""Losses, scores and generated texts of models against loops of one example."""

import copy
import math
import random
import re
from collections import Counter
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from sacrebleu import BLEU
from sklearn import metrics as sklearn_metrics

from lowrank_dp import evaluation
from lowrank_dp.data import Example, encode, load_task, subset
from lowrank_dp.evaluation import (
    HIGHER_IS_BETTER,
    evaluate,
    generate_texts,
)
from lowrank_dp.evaluation.models import _groups
from lowrank_dp.models import load_model, tiny
from tests.oracles import greedy as greedy_after
from tests.oracles import naive_bleu, naive_rouge, refusal_of
from tests.tasks import case, needs_data


def few(name, size):
    """Return a task with at most ``size`` examples in each split."""
    task = load_task(name)
    return replace(
        task,
        splits={
            split: subset(examples, size, f"0/{split}") for split, examples in task.splits.items()
        },
    )


TABLES = few("generated-table", 40)
GREEN = few("generated", 37)
# the same sentences with three classes, and with scores
THREE = replace(
    GREEN,
    kind="classification",
    num_labels=3,
    metrics=("accuracy", "matthews"),
    splits={"validation": tuple(replace(e, label=i % 3) for i, e in enumerate(GREEN.validation))},
)
SCORES = replace(
    GREEN,
    kind="regression",
    num_labels=1,
    metrics=("pearson", "spearman"),
    splits={"validation": tuple(replace(e, label=len(e.text) / 20) for e in GREEN.validation)},
)
F1 = replace(GREEN, metrics=("accuracy", "f1", "matthews"))


@pytest.fixture(scope="module")
def llama():
    """A small pretrained Llama, a copy with perturbed weights, and their tokenizer."""
    sure, tokenizer = load_model("tiny-llama", task=TABLES)
    unsure, _ = load_model("tiny-llama", task=TABLES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in unsure.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return sure, unsure, tokenizer


def sources_of(examples):
    return list(dict.fromkeys(e.text for e in examples))


def rows_of(task, tokenizer, split="validation"):
    return [(e, encode([e], tokenizer, kind=task.kind)[0]) for e in task.split(split)]


def greedy(model, tokenizer, source, max_new_tokens):
    """Generate the greedy text of one source by the oracle."""
    (row,) = encode([Example("x", source)], tokenizer, kind="generation", with_target=False)
    return greedy_after(model, tokenizer, row["input_ids"], max_new_tokens)


# --- labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [F1, THREE, SCORES], ids=["two", "three", "scores"])
def test_labels_against_one_example_at_a_time(task):
    model, tokenizer = load_model("tiny", task=task)
    losses, outputs, labels = [], [], []
    inputs = [
        {k: torch.tensor([v]) for k, v in row.items() if k != "labels"}
        for _, row in rows_of(task, tokenizer)
    ]
    with torch.no_grad():
        # a new head may predict one class for all texts; centred logits differ in sign
        model.classifier.bias -= torch.cat([model(**x).logits for x in inputs]).mean(0)
        for example, x in zip(task.validation, inputs, strict=True):
            logits = model(**x).logits[0].double()
            labels.append(example.label)
            if task.kind == "regression":
                losses.append(float((logits[0] - example.label) ** 2))
                outputs.append(float(logits[0]))
            else:
                losses.append(float(logits.exp().sum().log() - logits[example.label]))
                outputs.append(int(logits.argmax()))
    if task.kind == "regression":
        # the scores of a new head are nearly equal, so rounding decides their ranks
        want = {"pearson": np.corrcoef(outputs, labels)[0, 1]}
    else:
        assert len(set(outputs)) > 1
        want = {
            "accuracy": sklearn_metrics.accuracy_score(labels, outputs),
            "matthews": sklearn_metrics.matthews_corrcoef(labels, outputs),
        }
    if task is F1:
        want["f1"] = sklearn_metrics.f1_score(labels, outputs)
    for batch_size in (1, 7, 64):
        found = evaluate(model, tokenizer, task, batch_size=batch_size)
        assert list(found) == ["loss", *task.metrics]
        assert all(type(value) is float for value in found.values())
        assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        for name, value in want.items():
            assert found[name] == pytest.approx(value, rel=1e-3 if name == "pearson" else 1e-12)


# --- losses of texts ---------------------------------------------------------------------------


def test_generation_loss_against_one_example_at_a_time(llama):
    model, _, tokenizer = llama
    means, total, tokens = [], 0.0, 0
    with torch.no_grad():
        for example, row in rows_of(TABLES, tokenizer):
            target = tokenizer(example.target)["input_ids"] + [tokenizer.eos_token_id]
            start = len(row["input_ids"]) - len(target)
            assert row["input_ids"][start:] == target
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
            own = [
                float(logits[start + i - 1].logsumexp(0) - logits[start + i - 1, token])
                for i, token in enumerate(target)
            ]
            means.append(np.mean(own))
            total, tokens = total + sum(own), tokens + len(own)
    for batch_size in (1, 7, 64):
        found = evaluate(model, tokenizer, TABLES, batch_size=batch_size)
        assert list(found) == ["loss", "perplexity"]
        assert found["loss"] == pytest.approx(np.mean(means), rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    # the two means weigh long texts differently, so they differ
    assert abs(math.log(found["perplexity"]) - found["loss"]) > 1e-3


def test_worse_models_have_larger_losses(llama):
    sure, unsure, tokenizer = llama
    good, bad = (evaluate(model, tokenizer, TABLES) for model in (sure, unsure))
    assert not HIGHER_IS_BETTER["loss"] and good["loss"] < bad["loss"]
    assert not HIGHER_IS_BETTER["perplexity"] and 1 < good["perplexity"] < bad["perplexity"]


def test_perplexity_beyond_floats_is_infinite(llama):
    class Certain(torch.nn.Module):
        """A model that always predicts token 7, which never occurs."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask):
            logits = torch.zeros(*input_ids.shape, 768)
            logits[..., 7] = 1000.0
            return transformers.modeling_outputs.CausalLMOutput(logits=logits)

    found = evaluate(Certain(), llama[2], TABLES)
    assert found["loss"] == pytest.approx(1000) and found["perplexity"] == math.inf


# --- the model is left alone -------------------------------------------------------------------


def test_mode_gradients_and_generator_are_left_alone():
    model, tokenizer = load_model("tiny", task=F1)
    want = evaluate(model, tokenizer, F1)
    assert not any(module.training for module in model.modules())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert evaluate(model, tokenizer, F1, max_examples=1000) == want  # no dropout
    assert evaluate(model, tokenizer, F1, max_examples=10) != want
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="finite"):
        evaluate(model, tokenizer, F1)
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()


def test_half_precision_is_measured_in_single(llama):
    """Losses are computed in float32: a loss in bfloat16 would be wrong in the third digit."""
    _, _, tokenizer = llama
    model, _ = load_model("tiny-llama", task=TABLES, dtype=torch.bfloat16)
    losses = []
    with torch.no_grad():
        for _, row in rows_of(TABLES, tokenizer):
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            assert logits.dtype == torch.bfloat16
            losses.append(
                float(
                    torch.nn.functional.cross_entropy(
                        logits.double(), torch.tensor(row["labels"][1:])
                    )
                )
            )
    found = evaluate(model, tokenizer, TABLES, batch_size=1)["loss"]
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("task", [TABLES, F1], ids=["texts", "labels"])
def test_mixed_precision_against_one_example_at_a_time(task):
    """Logits are computed in bfloat16, losses in float32; texts are generated in float32."""
    model, tokenizer = load_model("tiny-llama" if task is TABLES else "tiny", task=task)
    losses = []
    with torch.no_grad():
        for _, row in rows_of(task, tokenizer):
            inputs = {k: torch.tensor([v]) for k, v in row.items() if k != "labels"}
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(**inputs).logits
            assert logits.dtype == torch.bfloat16
            labels = torch.tensor(row["labels"]).flatten()
            if task is TABLES:
                logits, labels = logits[0, :-1], labels[1:]
            losses.append(float(torch.nn.functional.cross_entropy(logits.double(), labels)))
    found = evaluate(model, tokenizer, task, batch_size=1, autocast_dtype=torch.bfloat16)
    single = evaluate(model, tokenizer, task, batch_size=1)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert single["loss"] != pytest.approx(np.mean(losses), rel=1e-5)


def test_texts_are_generated_without_mixed_precision(llama):
    model, _, tokenizer = llama
    dtypes = []
    handle = model.lm_head.register_forward_hook(
        lambda module, args, output: dtypes.append(output.dtype)
    )
    evaluate(
        *(model, tokenizer, TABLES), generate=True, max_new_tokens=3, autocast_dtype=torch.bfloat16
    )
    handle.remove()
    texts, losses = dtypes[:-1], dtypes[-1]  # all losses are those of one batch
    assert texts and {*texts} == {torch.float32} and losses == torch.bfloat16


# --- generating --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "which", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["sure", "unsure"]
)
def test_texts_against_a_greedy_loop(llama, which):
    model, tokenizer = llama[which], llama[2]
    sources = sources_of(TABLES.validation)[:12]
    want = {source: greedy(model, tokenizer, source, 24) for source in sources}
    ended = [tokens[-1] == tokenizer.eos_token_id for _, tokens in want.values()]
    assert any(ended) and not all(ended)  # both kinds of ending occur
    for batch_size in (1, 5, 64):
        random.Random(batch_size).shuffle(sources)
        assert generate_texts(
            model, tokenizer, sources, max_new_tokens=24, batch_size=batch_size
        ) == [want[source][0] for source in sources]


@pytest.mark.slow
def test_texts_of_lora(llama):
    _, _, tokenizer = llama
    model, _ = load_model("tiny-llama", task=TABLES, method="lora", rank=2)
    sources = sources_of(TABLES.validation)[:6]
    plain = generate_texts(model, tokenizer, sources)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    model.train()
    moved = generate_texts(model, tokenizer, sources, max_new_tokens=20)
    assert model.training and moved != plain
    model.eval()
    assert moved == [greedy(model, tokenizer, source, 20)[0] for source in sources]


def test_texts_of_a_model_that_counts_positions(llama):
    """GPT-2 adds an embedding of the position, which padding on the left must not shift."""
    tokenizer = llama[2]
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=768,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            eos_token_id=2,
            bos_token_id=2,
            initializer_range=0.3,
        )
    ).eval()
    sources = [e.text for e in TABLES.validation[:12]]
    want = [greedy(model, tokenizer, source, 8)[0] for source in sources]
    assert generate_texts(model, tokenizer, sources, max_new_tokens=8) == want
    with pytest.raises(ValueError, match="of the 128 tokens of the model's context, got 120"):
        generate_texts(model, tokenizer, sources, max_new_tokens=120)


def test_the_checkpoints_own_decoding_is_not_used(llama):
    model, _, tokenizer = llama
    sources = sources_of(TABLES.validation)[:4]
    want = generate_texts(model, tokenizer, sources)
    before = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        repetition_penalty=3.0,
        num_beams=4,
        no_repeat_ngram_size=1,
        eos_token_id=5,
        pad_token_id=0,
    )
    try:
        state = torch.get_rng_state()
        assert generate_texts(model, tokenizer, sources) == want
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        model.generation_config = before


def test_no_decoding_setting_of_the_checkpoint_is_used(llama, monkeypatch):
    model, _, tokenizer = llama
    sources = sources_of(TABLES.validation)[:2]
    want = [greedy(model, tokenizer, source, 12)[0] for source in sources]
    for changes in (
        {"sequence_bias": {(300,): 50.0}},
        {"guidance_scale": 3.0},
        {"forced_eos_token_id": tokenizer.eos_token_id, "max_length": 8},
        {"max_time": 1e-9},
        {"num_return_sequences": 2},
        {"stop_strings": [" "]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"return_dict_in_generate": True, "output_scores": True},
        {"min_new_tokens": 12},
    ):
        own = transformers.GenerationConfig()
        for name, value in changes.items():  # its constructor refuses some of them
            setattr(own, name, value)
        monkeypatch.setattr(model, "generation_config", own)
        with case(changes):
            assert generate_texts(model, tokenizer, sources, max_new_tokens=12) == want
            assert model.generation_config is own
            assert all(getattr(own, name) == value for name, value in changes.items())
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="out of memory"):
        broken.setattr(model, "forward", Mock(side_effect=RuntimeError("out of memory")))
        generate_texts(model, tokenizer, sources)
    assert model.generation_config is own


def test_every_special_token_that_ends_a_text_ends_it(llama, monkeypatch):
    """Llama and Gemma have several; here, a token of the text becomes one."""
    model, _, tokenizer = llama
    source = sources_of(TABLES.validation)[0]
    _, tokens = greedy(model, tokenizer, source, 12)
    last = tokens.index(tokens[5])
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"additional_special_tokens": [more.convert_ids_to_tokens(tokens[5])]})
    ends = [tokens[5], tokenizer.eos_token_id]
    monkeypatch.setattr(
        model, "generation_config", transformers.GenerationConfig(eos_token_id=ends)
    )
    (text,) = generate_texts(model, more, [source], max_new_tokens=12)
    assert text == tokenizer.decode(tokens[:last])


@pytest.mark.slow
def test_beams_find_likelier_texts(llama):
    _, model, tokenizer = llama
    sources = sources_of(TABLES.validation)[:12]

    def loss(texts):
        pairs = tuple(
            Example(f"x/{i}", source, target=text, group=source)
            for i, (source, text) in enumerate(zip(sources, texts, strict=True))
        )
        task = replace(TABLES, splits={"validation": pairs})
        return evaluate(model, tokenizer, task)["loss"]

    one, four = (generate_texts(model, tokenizer, sources, num_beams=beams) for beams in (1, 4))
    assert one != four and loss(four) < loss(one)
    assert four == generate_texts(model, tokenizer, sources, num_beams=4, batch_size=5)


@torch.no_grad()
def test_beams_are_compared_by_their_mean_log_likelihood(llama):
    """Beam search equals transformers' own with length_penalty 1; penalty 0 chooses other texts."""
    _, model, tokenizer = llama
    sources, best = sources_of(TABLES.validation)[:5], {0.0: [], 1.0: []}
    for source in sources:
        (row,) = encode([Example("x", source)], tokenizer, kind="generation", with_target=False)
        prompt = torch.tensor([row["input_ids"]])
        for penalty, texts in best.items():
            settings = transformers.GenerationConfig(
                num_beams=4,
                max_new_tokens=16,
                length_penalty=penalty,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            written = model.eval().generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )
            texts.append(tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True))
    found = generate_texts(model, tokenizer, sources, num_beams=4, max_new_tokens=16)
    assert found == best[1.0] != best[0.0]


def test_max_length_cuts_the_prompt(llama):
    model, _, tokenizer = llama
    source = sources_of(TABLES.validation)[0]
    ids = tokenizer(source)["input_ids"][:9]
    want = greedy(model, tokenizer, tokenizer.decode(ids), 12)[0]
    assert generate_texts(model, tokenizer, [source], max_length=10, max_new_tokens=12) == [want]
    full = tiny.CONTEXT - len(tokenizer(source + "\n")["input_ids"])
    assert generate_texts(model, tokenizer, [source], max_new_tokens=full)
    with pytest.raises(ValueError, match=f"max_new_tokens must be <= {full}"):
        generate_texts(model, tokenizer, [source], max_new_tokens=full + 1)
    with pytest.raises(ValueError, match=r"sources\[1\] has \d+ tokens.*give a max_length"):
        generate_texts(model, tokenizer, [source, source * 40])


# --- the parts together ------------------------------------------------------------------------


def shuffled(task):
    """Shuffle the examples, so that the references of a source are far apart."""
    examples = list(task.validation)
    random.Random(0).shuffle(examples)
    return replace(task, splits={"validation": tuple(examples)})


def test_each_source_is_written_once_and_meets_all_its_references(llama, monkeypatch):
    model, _, tokenizer = llama
    task = shuffled(TABLES)
    references = {}
    for e in task.validation:
        references.setdefault(e.text, []).append(e.target)
    assert len({len(several) for several in references.values()}) > 1
    asked = []

    def last_reference(model, tokenizer, sources, **options):
        asked.append((sources, options))
        return [references[source][-1] for source in sources]

    monkeypatch.setattr(evaluation.models, "generate_texts", last_reference)
    found = evaluate(
        model,
        tokenizer,
        task,
        generate=True,
        num_beams=3,
        max_new_tokens=9,
        batch_size=4,
        max_length=200,
    )
    assert found["bleu"] == 100 and found["rouge_l"] == pytest.approx(100)
    ((sources, options),) = asked
    assert sorted(sources) == sorted(references)
    assert options == {"num_beams": 3, "max_new_tokens": 9, "batch_size": 4, "max_length": 200}


@pytest.mark.slow
def test_generated_texts_are_scored(llama):
    model, _, tokenizer = llama
    texts, references = {}, {}
    for e in TABLES.validation:
        references.setdefault(e.text, []).append(e.target)
        texts[e.text] = texts.get(e.text) or greedy(model, tokenizer, e.text, 24)[0]
    # the naive loop splits at spaces: join the tokens of sacrebleu by spaces
    split = BLEU().tokenizer
    want = naive_bleu(
        [split(texts[source]) for source in references],
        [[*map(split, several)] for several in references.values()],
    )
    found = evaluate(model, tokenizer, shuffled(TABLES), generate=True, max_new_tokens=24)
    assert list(found) == ["loss", "perplexity", "bleu", "rouge_l"]
    assert found["bleu"] == pytest.approx(want) and 30 < want < 95
    plain = re.compile(r"[^a-z0-9]+")
    want = np.mean(
        [
            max(
                naive_rouge(*(plain.sub(" ", t.lower()) for t in (texts[source], r)))
                for r in several
            )
            for source, several in references.items()
        ]
    )
    assert found["rouge_l"] == pytest.approx(want)


def test_max_examples_keeps_whole_groups(llama):
    model, _, tokenizer = llama
    full = load_task("generated-table")
    sizes, kept = (Counter(e.group for e in task.validation) for task in (full, TABLES))
    assert 37 < kept.total() <= 40 and all(sizes[group] == n for group, n in kept.items())
    want = evaluate(model, tokenizer, TABLES)
    assert evaluate(model, tokenizer, full, max_examples=40) == want
    assert evaluate(model, tokenizer, full, max_examples=40, seed=1) != want
    assert evaluate(model, tokenizer, full, "test", max_examples=40) == evaluate(
        model, tokenizer, TABLES, "test"
    )


@pytest.mark.slow
@needs_data
def test_real_tables(llama):
    model, _, tokenizer = llama
    found = evaluate(
        model,
        tokenizer,
        load_task("e2e"),
        "test",
        generate=True,
        max_examples=40,
        max_new_tokens=20,
        max_length=200,
    )
    assert found["loss"] > 0 and found["perplexity"] > 1
    assert 0 < found["rouge_l"] < 100 and 0 <= found["bleu"] < 100
    dart = load_task("dart")
    blank = next(e for e in dart.test if not e.target)
    task = dart.select([e.id for e in dart.test if e.group == blank.group], "test")
    assert len(task.test) == 2
    found = evaluate(model, tokenizer, task, "test", generate=True, max_new_tokens=20)
    assert all(math.isfinite(value) for value in found.values())
    only = evaluate(model, tokenizer, dart.select([blank.id], "test"), "test")
    assert math.log(only["perplexity"]) == pytest.approx(only["loss"])  # the end token alone
    with pytest.raises(ValueError, match="not blank"):
        evaluate(model, tokenizer, dart.select([blank.id], "test"), "test", generate=True)


@needs_data
def test_real_sentences():
    task = load_task("cola")
    model, tokenizer = load_model("tiny", task=task)
    found = evaluate(model, tokenizer, task, max_examples=50)
    assert list(found) == ["loss", "matthews"] and 0.3 < found["loss"] < 2


# --- bad input ---------------------------------------------------------------------------------


def test_bad_input(llama):
    cases = [
        (lambda m, t: evaluate(m, t, TABLES, "dev"), "no dev split"),
        (
            lambda m, t: evaluate(m, t, TABLES.select([], "validation")),
            "got none: choose another",
        ),
        (lambda m, t: evaluate(m, t, TABLES, max_examples=0), "^max_examples must be"),
        (lambda m, t: evaluate(m, t, TABLES, batch_size=0), "^batch_size must be"),
        (lambda m, t: evaluate(m, t, TABLES, generate=True, num_beams=0), "^num_beams must be"),
        (
            lambda m, t: evaluate(m, t, TABLES, generate=True, max_new_tokens=1.5),
            "^max_new_tokens mu",
        ),
        (
            lambda m, t: evaluate(m, t, TABLES, generate=True, max_new_tokens=250),
            r"^max_new_tokens must be <= 2\d\d, .*smaller max_length",
        ),
        (
            lambda m, t: evaluate(m, t, F1, generate=True),
            "^generate must be False for generated, a classification task",
        ),
        (lambda m, t: evaluate(m, t, THREE), r"^model must have the head of generated.*\(37, 3\)"),
        (
            lambda m, t: evaluate(
                m,
                t,
                replace(TABLES, splits={"validation": (Example("x/1", "name[A]", target="A."),)}),
                generate=True,
            ),
            "^x/1 must have a group",
        ),
        (lambda m, t: generate_texts(m, t, []), "^sources must be"),
        (lambda m, t: generate_texts(m, t, "name[A]"), "^sources must be"),
        (
            lambda m, t: generate_texts(load_model("tiny", task=F1)[0], t, ["name[A]"]),
            "^model must be a causal",
        ),
        (
            lambda m, t: generate_texts(
                load_model("tiny-llama", task=F1, method="lora")[0], t, ["a"]
            ),
            "^model must be a causal",
        ),
    ]
    for number, (call, words) in enumerate(cases):
        message = refusal_of(call, llama[0], llama[2])
        assert re.search(words, message) and "\n" not in message, (number, words, message)


def test_logits_that_are_not_finite():
    classifier, words = load_model("tiny", task=F1)
    writer, tokenizer = load_model("tiny-llama", task=TABLES)
    for value in (math.nan, math.inf):
        with torch.no_grad():
            classifier.classifier.bias[1] = value
            writer.model.norm.weight[3] = value
        message = refusal_of(evaluate, classifier, words, F1)
        assert re.search(r"NaN or infinity for generated/validation/\d+: train", message), value
        message = refusal_of(evaluate, writer, tokenizer, TABLES)
        assert "infinity for generated-table/validation" in message, value
        for num_beams in (1, 2):
            message = refusal_of(generate_texts, writer, tokenizer, ["a"], num_beams=num_beams)
            assert "infinity for the next token" in message, (value, num_beams)


def test_scores_from_the_logits_at_the_targets_are_those_from_all_logits(monkeypatch):
    model, tokenizer = load_model("tiny-llama", task=TABLES)
    assert evaluation.models.separate_head(model) is model.lm_head
    found = evaluate(model, tokenizer, TABLES, batch_size=7)
    monkeypatch.setattr(evaluation.models, "separate_head", lambda model: None)
    assert evaluate(model, tokenizer, TABLES, batch_size=7) == pytest.approx(found, rel=1e-6)


def test_logits_that_are_not_finite_are_those_of_the_named_example():
    writer, tokenizer = load_model("tiny-llama", task=TABLES)
    rows = [{*row["input_ids"]} for row in encode(TABLES.validation, tokenizer, kind=TABLES.kind)]
    number = Counter(token for row in rows for token in row)
    index, token = next((i, t) for i, row in enumerate(rows) for t in row if number[t] == 1)
    writer.lm_head.weight = torch.nn.Parameter(writer.lm_head.weight.detach().clone())
    with torch.no_grad():
        writer.model.embed_tokens.weight[token] = math.nan
    message = refusal_of(evaluate, writer, tokenizer, TABLES)
    assert f"infinity for {TABLES.validation[index].id}:" in message


def test_one_text_is_one_source_whatever_its_group():
    texts = [("a b", "1"), ("c", "1"), ("A  b", "2"), ("c", "1")]
    examples = [Example(str(i), text, target="t", group=g) for i, (text, g) in enumerate(texts)]
    assert [[e.id for e in group] for group in _groups(examples)] == [["0", "2"], ["1", "3"]]
