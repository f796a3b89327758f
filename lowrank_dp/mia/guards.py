"""Checks that run with every attack: could members be told apart without the model?

An attack says something about a model only if members and non-members were drawn alike. A
classifier that sees nothing but the texts, and the model before fine-tuning, must both be blind
(Duan et al. 2024, arXiv 2402.07841; Das et al. 2024, arXiv 2406.16201).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from lowrank_dp.data import Example
from lowrank_dp.mia import metrics

CONFIDENCE = 0.99
INVALID = "INVALID (shift)"
SIMILAR = 0.9  # cosine of character trigrams from which two texts count as near-duplicates
_BLOCK = 1024


def blind_baseline(examples: Sequence[Example], is_member: np.ndarray, *, seed: int = 0,
                   folds: int = 5) -> metrics.Auc:
    """AUC, with a 99% interval, of a classifier that sees words and lengths but never the model.

    Logistic regression on a bag of words and the log length, cross-fitted; a record's copies and
    its group stay in one fold. Scores of different folds come from different classifiers, each
    shifted against its own test fold, so they are never pooled: the AUC is the mean over folds,
    and its standard error follows from DeLong's in each.
    """
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    texts = [_text(example) for example in examples]
    words = HashingVectorizer(n_features=2**14, alternate_sign=False, norm="l2")
    features = _with_lengths(words.transform(texts), texts)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    truth = np.asarray(is_member, dtype=bool)
    found = []
    for train, test in splitter.split(features, truth, _clusters(examples)):
        if len(np.unique(truth[train])) < 2 or min(np.bincount(truth[test], minlength=2)) < 2:
            continue
        model = LogisticRegression(max_iter=500).fit(features[train], truth[train])
        found.append(metrics.auc(model.decision_function(features[test]), truth[test]))
    if not found:
        raise ValueError(f"records must be enough for {folds} folds of both sides, got "
                         f"{len(examples)}: attack more of them")
    value = float(np.mean([one.value for one in found]))
    se = float(np.sqrt(np.sum([one.se**2 for one in found])) / len(found))
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * se
    return metrics.Auc(value, se, (max(0.0, value - half), min(1.0, value + half)))


def shift_verdict(blind: metrics.Auc, untuned: metrics.Auc | None) -> str:
    """"ok", or "INVALID (shift)" where either 99% interval leaves out chance."""
    for auc in filter(None, (blind, untuned)):
        if not auc.ci[0] <= 0.5 <= auc.ci[1]:
            return INVALID
    return "ok"


def overlap(examples: Sequence[Example], is_member: np.ndarray) -> list[tuple[str, str]]:
    """(member's id, non-member's id) for texts that are on both sides, one pair a text."""
    sides: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for example, member in zip(examples, is_member, strict=True):
        sides[int(member)].setdefault(example.content_hash, example.id)
    return [(sides[1][content], other) for content, other in sides[0].items()
            if content in sides[1]]


def near_duplicates(examples: Sequence[Example], is_member: np.ndarray, *,
                    threshold: float = SIMILAR) -> list[tuple[str, str]]:
    """(member's id, its nearest non-member's id) where their character trigrams are alike.

    Cosine of at least ``threshold`` between counts of character trigrams; exact copies are not
    repeated here. In blocks, so that memory grows with the records and not with their square.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    grams = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 3), n_features=2**18,
                              alternate_sign=False, norm="l2")
    truth = np.asarray(is_member, dtype=bool)
    matrix = grams.transform([_text(example) for example in examples])
    inside, outside = np.flatnonzero(truth), np.flatnonzero(~truth)
    others = matrix[outside].T.tocsc()
    pairs = []
    for start in range(0, len(inside), _BLOCK):
        rows = inside[start:start + _BLOCK]
        similar = (matrix[rows] @ others).tocsr()
        for i, row in enumerate(rows):
            values = similar.data[similar.indptr[i]:similar.indptr[i + 1]]
            columns = similar.indices[similar.indptr[i]:similar.indptr[i + 1]]
            for column in columns[np.argsort(-values)][:int((values >= threshold).sum())]:
                one, other = examples[row], examples[outside[column]]
                if one.content_hash != other.content_hash:
                    pairs.append((one.id, other.id))
                    break
    return pairs


def _text(example: Example) -> str:
    return " ".join(filter(None, (example.text, example.text_pair, example.target)))


def _with_lengths(words: Any, texts: Sequence[str]) -> Any:
    """Sparse features with two columns more: standardised log numbers of characters and words."""
    from scipy.sparse import csr_matrix, hstack

    lengths = np.log1p([[len(text), len(text.split())] for text in texts])
    spread = lengths.std(axis=0)
    scaled = (lengths - lengths.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return hstack([words, csr_matrix(scaled)]).tocsr()


def _clusters(examples: Sequence[Example]) -> np.ndarray:
    """A number for each set of records that share a group or a text, directly or in a chain."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    keys: dict[str, int] = {}
    pairs = [(i, keys.setdefault(key, len(keys))) for i, example in enumerate(examples)
             for key in (example.content_hash, f"group {example.group or example.id}")]
    rows, columns = zip(*pairs, strict=True)
    count = len(examples)
    joined = csr_matrix((np.ones(len(pairs)), (rows, np.array(columns) + count)),
                        shape=(count + len(keys),) * 2)
    return connected_components(joined, directed=False)[1][:count]
