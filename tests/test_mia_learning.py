"""Test of whether a model learned anything about its members, and the verdicts that follow."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from lowrank_dp.data import IGNORE, Example
from lowrank_dp.mia import learning, metrics, report, shift
from lowrank_dp.mia import verdict as verdicts
from lowrank_dp.mia.signals import Signals

NONE = np.zeros(0)


def signals_of(loss, correct=NONE, before=NONE):
    return Signals(
        loss=np.asarray(loss),
        reference_loss=np.asarray(before),
        correct=np.asarray(correct, dtype=float),
        phi=-np.asarray(loss),
        min_k=NONE,
        min_k_plus_plus=NONE,
        error_zone=NONE,
    )


def records(labels):
    return tuple(
        Example(f"x/{i}", f"text {i}", label=y, group=f"x/{i}") for i, y in enumerate(labels)
    )


def judged(labels, logits, members):
    """Judge what a model learned from its logits (N, C), with losses by softmax."""
    examples, labels = records(labels), np.asarray(labels)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    correct = logits[rows, labels] > others.max(1)
    truth = np.arange(len(labels)) < members
    chance = learning.chance_losses("classification", examples, truth, [], logits.shape[1])
    return learning.judge_learning(
        "classification",
        examples,
        truth,
        signals_of(-log_p[rows, labels], correct),
        chance,
        logits.shape[1],
    )


def test_chance_is_the_best_answer_that_knows_nothing():
    labels = [0, 0, 0, 1, 2, 1, 0]
    truth = np.array([1, 1, 1, 1, 0, 0, 0], bool)
    found = learning.chance_losses("classification", records(labels), truth, [], 3)
    right = -np.log([3 / 4, 3 / 4, 3 / 4, 1 / 4, 1 / 5, 1 / 4, 3 / 4])
    np.testing.assert_allclose(found, right)
    scores = [0.5, 1.5, 4.0]
    found = learning.chance_losses("regression", records(scores), np.array([1, 1, 0], bool), [], 1)
    np.testing.assert_allclose(found, [0.25, 0.25, 9.0])
    # texts, by a loop: counts of the tokens of the other members, plus 1 for each of 6 tokens
    texts = [[1, 1, 2], [3], [2, 4, 2, 2], [5, 1]]
    rows = [{"labels": [IGNORE, *tokens]} for tokens in texts]
    truth = np.array([1, 1, 1, 0], bool)
    found = learning.chance_losses("generation", records([None] * 4), truth, rows, 6)
    for i, tokens in enumerate(texts):
        others = [t for j, more in enumerate(texts) if truth[j] and j != i for t in more]
        losses = [-np.log((others.count(t) + 1) / (len(others) + 6)) for t in tokens]
        assert found[i] == pytest.approx(np.mean(losses), rel=1e-12), i


def test_a_model_that_knows_nothing_passes_in_one_of_a_hundred():
    """300 models per kind: at a rate of .01, 12 or more pass with probability 6e-5 (binomial)."""
    rng = np.random.default_rng(0)
    for name, make in {
        "random logits": lambda n: rng.normal(0, 1, (n, 3)),
        "confident and random": lambda n: rng.normal(0, 8, (n, 3)),
        "one class": lambda n: np.tile([3.0, 0.0, -1.0], (n, 1)),
        "uniform": lambda n: np.zeros((n, 3)),
        "the true frequencies": lambda n: np.tile(np.log([0.6, 0.3, 0.1]), (n, 1)),
    }.items():
        passed = sum(
            judged(rng.choice(3, 80, p=[0.6, 0.3, 0.1]), make(80), 40).better for _ in range(300)
        )
        assert passed < 12, (name, passed)
    assert stats.binom.sf(11, 300, 0.01) < 1e-4


def test_a_model_that_knows_something_is_found():
    rng = np.random.default_rng(1)
    for name, accuracy, scale in (
        ("right and sure", 1.0, 5.0),
        ("barely sure", 0.97, 0.3),
        ("too sure of itself", 0.9, 60.0),
    ):
        labels = rng.integers(0, 2, 200)
        said = np.where(rng.random(200) < accuracy, labels, 1 - labels)
        logits = scale * np.stack([said == 0, said == 1], 1)
        found = judged(labels, logits, 100)
        assert found.better, name
        assert found.accuracy == pytest.approx((said == labels)[:100].mean())
        assert found.majority == pytest.approx(max(np.bincount(labels[:100])) / 100)
    swapped = judged(labels, -logits, 100)
    assert not swapped.better, "swapped labels count as knowledge"


def test_texts_must_beat_the_model_before():
    """A language model is better than chance before fine-tuning, so its base is the comparison."""
    rng = np.random.default_rng(2)
    examples, truth = records([None] * 60), np.arange(60) < 30
    chance, before = np.full(60, 5.0), 3 + rng.normal(0, 0.3, 60)
    for gain, better in ((0.5, True), (0.0, False), (-0.5, False)):
        loss = before - gain + rng.normal(0, 0.01, 60)
        found = learning.judge_learning(
            "generation", examples, truth, signals_of(loss, before=before), chance, 100
        )
        assert found.better is better, gain
        assert found.reference_loss == pytest.approx(before[:30].mean())
    alone = learning.judge_learning("generation", examples, truth, signals_of(before), chance, 100)
    assert alone.better and alone.uniform_loss == pytest.approx(np.log(100))


def verdict(
    auc, *, better=True, found="ok", sampling="bernoulli", near=0, name="base", other=0.5, tied=0
):
    learned = learning.Learning(0.7, 0.69, 0.693, 0.5, 0.51, None, better)
    attack = report.Attack(name, metrics.Auc(sum(auc) / 2, 0.1, auc), {}, None)
    second = report.Attack("zlib", metrics.Auc(other, 0.1, (other - 0.2, other + 0.2)), {}, None)
    facts = (learned, 0.6, sampling, near, 100, tied)
    return verdicts.verdict(verdicts.Evidence((second, attack), name, found, *facts))


def test_verdicts():
    """No verdict says that there is no leak."""
    assert verdict((0.55, 0.8)) == verdict((0.55, 0.8), better=False) == "LEAKS"
    assert verdict((0.4, 0.6), found=shift.INVALID) == "INVALID (shift)"
    assert verdict((0.2, 0.4)).startswith("BELOW CHANCE") and "NOTHING" not in verdict((0.2, 0.4))
    assert "NOTHING LEARNED" in verdict((0.2, 0.4), better=False)
    nothing = verdict((0.4, 0.6), better=False)
    assert nothing.startswith("NOTHING LEARNED: ") and "loaded or shown" in nothing
    assert "no leak" not in nothing and "accuracy 0.500, most frequent label 0.510" in nothing
    found = verdict((0.4, 0.57))
    assert found == (
        "no leak found by base. Power: with this number of records the attack finds "
        "an AUC of 0.600 in 80% of audits; an AUC above 0.570 is excluded (97.5%), a "
        "smaller leak or a stronger attack is not"
    )
    assert "weak attack" in verdict((0.4, 0.6), name="loss")
    assert verdict((0.4, 0.6), near=10).endswith("10 of 100 non-members are nearly a member's text")
    # of given non-members at most a fifth may be nearly members' texts
    assert verdict((0.4, 0.6), sampling=None, near=20).startswith("no leak found")
    for near in (21, 50):
        assert verdict((0.4, 0.6), sampling=None, near=near).startswith(
            f"INVALID (near-duplicates): {near} of 100"
        )


def test_an_attack_with_equal_scores_is_no_evidence():
    """A finding stands, whatever the share of equal scores."""
    for share, ends in ((1.0, True), (0.9, True), (0.89, False)):
        found = verdict((0.4, 0.6), tied=share)
        assert found.startswith("NO EVIDENCE (equal scores): base") == ends, share
        assert ("excluded" in found) != ends, share
    assert verdict((0.51, 0.6), tied=0.95) == "LEAKS"
    assert verdict((0.4, 0.49), tied=0.95).startswith("BELOW CHANCE")
    assert verdict((0.4, 0.6), tied=1.0, better=False).startswith("NOTHING LEARNED")
    assert verdict((0.4, 0.6), tied=1.0, other=0.73).startswith("LEAKS by zlib")


def test_a_leak_that_only_another_attack_finds_is_not_called_safe():
    """Two attacks share a level of 97.5%: the AUC must be 2.24 standard errors above 1/2."""
    for better in (True, False):
        for primary in ((0.4, 0.6), (0.2, 0.4)):
            found = verdict(primary, better=better, other=0.73)
            assert found.startswith("LEAKS by zlib, AUC 0.730") and "no leak" not in found
            assert "LEAKS" not in verdict(primary, better=better, other=0.72)
    assert "--members and --nonmembers were swapped" in verdict((0.2, 0.4))


def test_a_verdict_names_what_is_not_known_of_the_training():
    def words(kind, origin, reference_loss):
        target = SimpleNamespace(
            records=SimpleNamespace(kind=kind), format=SimpleNamespace(origin=origin)
        )
        learned = learning.Learning(0.7, 0.69, 0.693, None, None, reference_loss, True)
        return report._caveat(target, learned)

    assert words("classification", "membership.json", None) == ""
    assert words("generation", "as given", 0.7) == ""
    assert words("generation", "as given", None).endswith("give --base")
    assert words("classification", "assumed", None).endswith("a leak: give --max-length")
    assert words("generation", "assumed", 0.7).endswith("give --template and --max-length")


def test_what_an_attack_would_have_found():
    """By simulation, scores of two normal laws with this AUC exclude 1/2 in 80% of audits."""
    rng = np.random.default_rng(3)
    truth = np.arange(240) < 100
    auc = verdicts.detectable_auc(truth)
    gap = np.sqrt(2) * stats.norm.ppf(auc)
    found = [
        metrics.auc(rng.normal(0, 1, 240) + gap * truth, truth).ci[0] > 0.5 for _ in range(400)
    ]
    assert np.mean(found) == pytest.approx(0.8, abs=0.08)
