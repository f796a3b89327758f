"""Metrics of labels and texts, compared with formulas by hand and naive loops."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu import BLEU

from lowrank_dp.data import TASKS
from lowrank_dp.evaluation import HIGHER_IS_BETTER, label_metrics, text_metrics
from tests.oracles import naive_bleu, naive_rouge, refusal_of

# --- labels ------------------------------------------------------------------------------------

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
    """Pearson by its formula, Spearman as Pearson of mean ranks; both ignore scale and shift."""

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
    """Every metric has a direction, in which the metric moves from bad answers to good answers."""
    named = {name for spec in TASKS.values() if spec for name in spec.metrics}
    assert HIGHER_IS_BETTER.keys() == named | {"loss", "perplexity"}
    labels = [0, 1, 1, 0, 1]
    names = ["accuracy", "f1", "matthews", "pearson", "spearman"]
    good = label_metrics(names, labels, labels) | text_metrics(["a b c d e"], [["a b c d e"]])
    bad = label_metrics(names, [1, 0, 0, 1, 1], labels) | text_metrics(["a b d e"], [["a b c d e"]])
    assert good == pytest.approx(dict.fromkeys(names, 1.0) | {"bleu": 100.0, "rouge_l": 100.0})
    assert all(HIGHER_IS_BETTER[name] and good[name] > bad[name] for name in good)


# --- texts -------------------------------------------------------------------------------------

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


def test_bad_input():
    cases = [
        (lambda: label_metrics(["acuracy"], [1], [1]), "did you mean 'accuracy'"),
        (lambda: label_metrics(["accuracy"], [], []), "^outputs must be finite"),
        (
            lambda: label_metrics(["accuracy"], [math.nan, 1], [0, 1]),
            "^outputs must be finite",
        ),
        (
            lambda: label_metrics(["pearson"], [1.0, 2.0], [0, math.inf]),
            "^labels must be finite",
        ),
        (
            lambda: label_metrics(["accuracy"], [1, 0, 1], [1, 0]),
            "^outputs and labels must be",
        ),
        (
            lambda: label_metrics(["accuracy"], torch.ones(2, 2, 2), [1, 0]),
            "^outputs and labels",
        ),
        (
            lambda: label_metrics(["accuracy"], [1, 0], [[1], [0]]),
            "^outputs and labels must be",
        ),
        (lambda: label_metrics(["pearson"], torch.eye(2), [1, 0]), "for pearson"),
        (lambda: label_metrics(["f1"], [0, 2], [0, 1]), "classes 0 and 1 for f1"),
        (lambda: text_metrics([], []), "^hypotheses and references must be"),
        (lambda: text_metrics("text", [["a"]] * 4), "^hypotheses and references must be"),
        (lambda: text_metrics(["a", "b"], [["a"]]), "^hypotheses and references must be"),
        (lambda: text_metrics(["a", "b"], [["a"], []]), r"^references\[1\] must be"),
        (lambda: text_metrics(["a"], ["a"]), r"^references\[0\] must be"),
        (lambda: text_metrics(["a"], [["", " "]]), "^references must hold a text"),
    ]
    for number, (call, words) in enumerate(cases):
        message = refusal_of(call)
        assert re.search(words, message) and "\n" not in message, (number, words, message)


@pytest.mark.parametrize(("outputs", "labels"), [([0, 2, 1], [0, 1, 1]), ([0, 1, 1], [0, 2, 1])])
def test_f1_wants_two_classes_of_predictions_and_of_labels(outputs, labels):
    with pytest.raises(ValueError, match="must be classes 0 and 1 for f1"):
        label_metrics(["f1"], outputs, labels)
