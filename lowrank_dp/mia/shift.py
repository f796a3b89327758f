"""Test for a distribution shift between members and non-members.

If members and non-members are not drawn from one distribution, a classifier that never sees the
model can distinguish them, and an attack may measure nothing else ("Blind Baselines", Das et al.
2024, arXiv 2406.16201; "SoK", Meeus et al. 2024, arXiv 2406.17975).

``examples`` are N records with distinct ids and ``is_member`` (N,) is their true membership.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse, special
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from lowrank_dp import _validate
from lowrank_dp.data import Example
from lowrank_dp.mia.duplicates import text_parts, whole_text
from lowrank_dp.mia.metrics import Auc, chance_variance
from lowrank_dp.mia.units import checked_truth, mean_per_unit, one_sided, unit_numbers

CONFIDENCE = 0.99  # confidence of the test: a false alarm in 1 of 100 audits
OK, INVALID = "ok", "INVALID (shift)"


def blind_baseline(
    examples: Sequence[Example], is_member: ArrayLike, *, seed: int = 0, folds: int = 5
) -> Auc:
    """Compute the AUC of a classifier of membership by the texts alone, with a 99% interval.

    A logistic regression on the records' words, lengths and labels is fitted forwards: ``seed``
    distributes the records over ``folds``, and each fold but the first is scored by a model of the
    folds before. The result is the mean of the folds' AUCs, weighted by their precision. Records of
    one group, and copies of one text, are in one fold and count as one: their scores are averaged,
    on either side.

    ``se`` and ``ci`` are computed under the hypothesis of no shift, in which membership is
    independent of the texts: then the value has mean 1/2, and 1/2 is outside ``ci`` in at most
    about 1% of audits. Far from 1/2 the interval is an approximation.

    Scores of different folds are not compared. Each fold has its own model, whose intercept is
    biased against the fold: members in a fold are missing from the records that the model was
    fitted to, which pulls a pooled AUC below 1/2. The procedure also differs from ordinary
    cross-validation, in which fold A is scored by a model of B, and B by a model of A. For scores
    that are linear in the labels, both directions are the same sum over pairs of records, counted
    twice, so that the mean has twice the variance of independent folds. In the forward order,
    each fold's AUC has mean 1/2 given all folds before, so the AUCs are uncorrelated and their
    variances add.

    Raises ValueError if no fold has both sides and a model: too few records or groups.
    """
    truth = checked_truth(examples, is_member)
    folds = _validate.integer("folds", folds, low=2)
    units = unit_numbers(examples)
    generator = np.random.default_rng(_validate.integer("seed", seed, low=0))
    fold = (generator.permutation(units.max() + 1) % folds)[units]
    features = _features(examples)
    found = []
    for number in range(1, folds):
        before, now = fold < number, fold == number
        if one_sided(truth[before]) or one_sided(truth[now]):
            continue
        model = LogisticRegression(solver="liblinear").fit(features[before], truth[before])
        scores, sides = mean_per_unit(
            model.decision_function(features[now]), truth[now], units[now]
        )
        n1, n0 = int(sides.sum()), int((~sides).sum())
        found.append((roc_auc_score(sides, scores), chance_variance(n1, n0)))
    if not found:
        raise ValueError(
            f"examples must have members and non-members in several groups for the "
            f"shift check, got {len(truth)} records in {units.max() + 1} groups: add "
            "records of other groups"
        )
    values, variances = np.array(found).T
    precision = (1 / variances).sum()
    value, se = float((values / variances).sum() / precision), float(precision**-0.5)
    reach = float(special.ndtri((1 + CONFIDENCE) / 2)) * se
    return Auc(value, se, (max(0.0, value - reach), min(1.0, value + reach)))


def shift_verdict(blind: Auc, base: Auc | None) -> str:
    """Return ``OK``, or ``INVALID`` if 1/2 is outside one of the intervals.

    ``blind`` is from `blind_baseline`, ``base`` the `units.unit_auc` of minus the loss before
    fine-tuning, both at 99%: without a shift, at most about 2% of audits are called invalid.
    ``base`` is None if that model is not known; then the texts alone decide.
    """
    aucs = [blind] if base is None else [blind, base]
    return OK if all(low <= 0.5 <= high for low, high in (a.ci for a in aucs)) else INVALID


def _features(examples: Sequence[Example]) -> sparse.csr_array:
    """Return features (N, F): the words as written, the lengths of the texts, and the label.

    The features do not depend on membership, so they may be made from all records at once.
    """
    words = HashingVectorizer(
        n_features=2**18, alternate_sign=False, lowercase=False, token_pattern=r"\w+|[^\w\s]"
    ).transform(map(whole_text, examples))
    words = words[:, np.bincount(words.indices, minlength=words.shape[1]) > 1]
    labels = [example.label for example in examples]
    _, code = np.unique(
        [str(label) if isinstance(label, int) else "" for label in labels], return_inverse=True
    )
    rows = np.arange(len(code), dtype=np.int32)  # scikit-learn takes no wider indices
    classes = sparse.coo_array((np.ones(len(code)), (rows, code.astype(np.int32))))
    numbers = np.array(
        [
            [
                *(math.log1p(len(part or "")) for part in text_parts(example)),
                label if isinstance(label, float) else 0.0,
            ]
            for example, label in zip(examples, labels, strict=True)
        ]
    )
    numbers = (numbers - numbers.mean(axis=0)) / np.maximum(numbers.std(axis=0), 1e-9)
    return sparse.hstack([words, classes, numbers], format="csr")
