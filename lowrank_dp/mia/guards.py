"""What must be looked at before an attack's numbers: could they come from anything but training?

If members and non-members were not drawn alike, a classifier that never sees the model tells them
apart, and an attack may do no more ("Blind Baselines", Das et al. 2024, arXiv 2406.16201; "SoK",
Meeus et al. 2024, arXiv 2406.17975). If a text is on both sides, its membership means nothing.

Everywhere, ``examples`` are N records with distinct ids and ``is_member`` (N,) is the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse, special
from scipy.sparse import csgraph
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from lowrank_dp import _validate
from lowrank_dp._terminal import progress
from lowrank_dp.data import Example
from lowrank_dp.mia._arrays import Array, Mask, membership, real_array
from lowrank_dp.mia.metrics import Auc, auc

CONFIDENCE = 0.99  # of the shift check: a false alarm in one of a hundred audits
OK, INVALID = "ok", "INVALID (shift)"
# Jaccard similarity of character 5-grams: above, two texts of 50 characters differ by a word's
# ending, and two of 200 by a short word.
NEAR, NGRAM = 0.8, 5
_BLOCK = 256  # non-members compared at a time
_PAIRS = 2**14  # pairs whose similarity is worked out at a time

Labels = NDArray[np.intp]


# --- are the two sides drawn alike? ----------------------------------------------------------


def blind_baseline(
    examples: Sequence[Example], is_member: ArrayLike, *, seed: int = 0, folds: int = 5
) -> Auc:
    """AUC of telling members apart by their words and length alone, with a 99% interval.

    A logistic regression on the records' words, lengths and labels is fitted forwards: the records
    are dealt into ``folds`` by ``seed``, and each fold but the first is scored by a model of the
    folds before it. The result is the mean of the folds' AUCs, weighted by their precision.
    Records of one group, and copies of one text, are in one fold and count as one: their scores
    are averaged, on either side.

    ``se`` and ``ci`` are by the law without a shift, in which membership is independent of the
    texts: there the value has mean 1/2, and 1/2 is outside ``ci`` in at most about 1% of audits.
    Far from 1/2 the interval is an approximation.

    Scores of different folds are never compared, because each fold has its own model, and its
    intercept leans against its own fold: members that are in a fold are missing from what it was
    fitted to, which pulls a pooled AUC below 1/2. Nor is this ordinary cross-validation, where
    fold A is scored by what was learned from B, and B by what was learned from A. For scores
    linear in the labels these are the same sum over pairs of records, counted twice, so that the
    mean has twice the variance that independent folds would give. Forwards, each fold's AUC has
    mean 1/2 given all before it, so they are uncorrelated and their variances add.

    Raises ``ValueError`` if no fold has both sides and a model: too few records or groups.
    """
    truth = _truth(examples, is_member)
    folds = _validate.integer("folds", folds, low=2)
    units = _units(examples)
    generator = np.random.default_rng(_validate.integer("seed", seed, low=0))
    fold = (generator.permutation(units.max() + 1) % folds)[units]
    features = _features(examples)
    found = []
    for number in range(1, folds):
        seen, now = fold < number, fold == number
        if _one_sided(truth[seen]) or _one_sided(truth[now]):
            continue
        model = LogisticRegression(solver="liblinear").fit(features[seen], truth[seen])
        scores, sides = _by_unit(model.decision_function(features[now]), truth[now], units[now])
        n1, n0 = int(sides.sum()), int((~sides).sum())
        # the Mann-Whitney statistic's variance where all orders are alike; with ties it is less
        found.append((roc_auc_score(sides, scores), (n0 + n1 + 1) / (12 * n0 * n1)))
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


def unit_auc(
    scores: ArrayLike,
    examples: Sequence[Example],
    is_member: ArrayLike,
    *,
    confidence: float = CONFIDENCE,
) -> Auc:
    """`metrics.auc` of ``scores`` (N,), averaged over the records of a group on either side.

    Rows that share a source record share its coin and have like scores: counted one by one, they
    would make the interval of AUC too short. Where all groups are single records it is the same.
    """
    return auc(*unit_scores(scores, examples, is_member), confidence=confidence)


def unit_scores(
    scores: ArrayLike, examples: Sequence[Example], is_member: ArrayLike
) -> tuple[Array, Mask]:
    """Mean score of each group's members and of its non-members, and which of both it is."""
    values = real_array("scores", scores, shape=(len(examples),))
    return _by_unit(values, _truth(examples, is_member), _units(examples))


def shift_verdict(blind: Auc, base: Auc | None) -> str:
    """ "ok", or "INVALID (shift)" if 1/2 is outside one of the intervals.

    ``blind`` is from `blind_baseline`, ``base`` the `unit_auc` of the untuned base model's loss
    (minus it), at 99% both, so that of audits without a shift at most some 2% are called invalid.
    ``base`` is None where that model is not known: then the words alone decide.
    """
    aucs = [blind] if base is None else [blind, base]
    return OK if all(low <= 0.5 <= high for low, high in (a.ci for a in aucs)) else INVALID


def _units(examples: Sequence[Example]) -> Labels:
    """A number for each record, the same for all that share a group or a content hash."""
    keys = [(example.group or example.id, example.content_hash) for example in examples]
    _, group = np.unique([group for group, _ in keys], return_inverse=True)
    _, content = np.unique([content for _, content in keys], return_inverse=True)
    shape = group.max() + 1, content.max() + 1
    edges = sparse.coo_array((np.ones(len(keys), np.int8), (group, content)), shape)
    nodes = sparse.block_array([[None, edges], [edges.T, None]], format="csr")
    return csgraph.connected_components(nodes, directed=False)[1][group].astype(np.intp)


def _by_unit(scores: Array, truth: Mask, units: Labels) -> tuple[Array, Mask]:
    """Mean score of each unit's members and of its non-members, where it has any; which it is."""
    keys, position = np.unique(2 * units + truth, return_inverse=True)
    return np.bincount(position, scores) / np.bincount(position), keys % 2 == 1


def _features(examples: Sequence[Example]) -> sparse.csr_array:
    """Words as they are written, with the lengths of the texts and the label, (N, F).

    Made without a look at who is a member, so they may be made of all records at once.
    """
    words = HashingVectorizer(
        n_features=2**18, alternate_sign=False, lowercase=False, token_pattern=r"\w+|[^\w\s]"
    ).transform(map(_whole, examples))
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
                *(math.log1p(len(part or "")) for part in _parts(example)),
                label if isinstance(label, float) else 0.0,
            ]
            for example, label in zip(examples, labels, strict=True)
        ]
    )
    numbers = (numbers - numbers.mean(axis=0)) / np.maximum(numbers.std(axis=0), 1e-9)
    return sparse.hstack([words, classes, numbers], format="csr")


def _parts(example: Example) -> tuple[str | None, ...]:
    return example.text, example.text_pair, example.target


def _whole(example: Example) -> str:
    return "\n".join(part for part in _parts(example) if part is not None)


# --- is something on both sides? -------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Ids of a member and of a non-member, and how alike their texts are, at most 1."""

    member: str
    nonmember: str
    similarity: float


def overlap(examples: Sequence[Example], is_member: ArrayLike) -> tuple[Pair, ...]:
    """Non-members whose text is also a member's, each with the first such member.

    Texts are the same if their content hashes are (case, white space and labels don't count).
    """
    truth = _truth(examples, is_member)
    first: dict[str, str] = {}
    for example, bit in zip(examples, truth, strict=True):
        if bit:
            first.setdefault(example.content_hash, example.id)
    return tuple(
        Pair(first[content], example.id, 1.0)
        for example, bit in zip(examples, truth, strict=True)
        if not bit and (content := example.content_hash) in first
    )


def near_duplicates(
    examples: Sequence[Example], is_member: ArrayLike, *, threshold: float = NEAR
) -> tuple[Pair, ...]:
    """Non-members whose text is nearly a member's, each with the member most like it.

    Two records are alike by the Jaccard similarity of their sets of character 5-grams, lower case
    and without accents, at least ``threshold`` in (0, 1]; records in `overlap` are left out, and
    texts under 5 characters are compared there only. All pairs that are so alike are found: they
    share one of the rarest 1 - ``threshold`` of their n-grams (Chaudhuri et al., ICDE 2006;
    Bayardo et al., WWW 2007), and only such pairs are compared, in blocks, so that memory stays
    linear in N.
    """
    threshold = _validate.real("threshold", threshold, low=0, high=1, low_open=True)
    truth = _truth(examples, is_member)
    copied = {pair.nonmember for pair in overlap(examples, truth)}
    members = np.flatnonzero(truth)
    others = np.flatnonzero(~truth & [example.id not in copied for example in examples])
    grams = _grams(examples)
    rare, size = _rarest(grams, threshold), np.diff(grams.indptr)
    in_members = rare[members].T.tocsr()
    pairs: list[Pair] = []
    for start in progress(range(0, len(others), _BLOCK), "near-duplicates"):
        rows = others[start : start + _BLOCK]
        candidates = (rare[rows] @ in_members).tocoo()
        left, right = rows[candidates.row], members[candidates.col]
        short, long = np.sort([size[left], size[right]], axis=0)
        left, right = (side[short >= threshold * long] for side in (left, right))
        alike = _similarities(grams, left, right)
        order = np.lexsort((right, -alike, left))  # of each non-member, the best comes first
        order = order[alike[order] >= threshold]
        _, best = np.unique(left[order], return_index=True)
        pairs += [
            Pair(examples[int(right[at])].id, examples[int(left[at])].id, float(alike[at]))
            for at in order[best]
        ]
    return tuple(pairs)


def _grams(examples: Sequence[Example]) -> sparse.csr_array:
    """Which n-grams each record has, as ones, (N, G) for G n-grams in all."""
    hashed = HashingVectorizer(
        analyzer="char",
        ngram_range=(NGRAM, NGRAM),
        n_features=2**31 - 1,
        binary=True,
        norm=None,
        strip_accents="unicode",
        alternate_sign=False,
        dtype=np.float32,
    ).transform(map(_whole, examples))
    found, columns = np.unique(hashed.indices, return_inverse=True)
    return sparse.csr_array(
        (hashed.data, columns.astype(np.int32), hashed.indptr), shape=(len(examples), len(found))
    )


def _rarest(grams: sparse.csr_array, threshold: float) -> sparse.csr_array:
    """Of each row of size s, the s - ceil(threshold s) + 1 columns that the fewest rows have.

    Two rows of Jaccard similarity ``threshold`` share at least ceil(threshold s) columns; were
    none of them among the rarest of both, one of the two would have too few left.
    """
    size = np.diff(grams.indptr)
    rows = np.repeat(np.arange(len(size)), size)
    frequency = np.bincount(grams.indices, minlength=grams.shape[1])[grams.indices]
    order = np.lexsort((grams.indices, frequency, rows))
    place = np.arange(len(rows)) - grams.indptr[:-1][rows]  # in its row, rarest first
    kept = order[place < (size - np.ceil(threshold * size - 1e-9) + 1)[rows]]
    return sparse.csr_array(
        (np.ones(len(kept), np.float32), (rows[kept], grams.indices[kept])), shape=grams.shape
    )


def _similarities(grams: sparse.csr_array, left: Labels, right: Labels) -> Array:
    """Jaccard similarity of each row in ``left`` with the one in ``right`` beside it, (P,)."""
    size, shared = np.diff(grams.indptr), np.empty(len(left))
    for start in range(0, len(left), _PAIRS):
        chunk = slice(start, start + _PAIRS)
        shared[chunk] = grams[left[chunk]].multiply(grams[right[chunk]]).sum(axis=1)
    return shared / (size[left] + size[right] - shared)


# --- arguments -------------------------------------------------------------------------------


def _truth(examples: Sequence[Example], is_member: ArrayLike) -> Mask:
    """``is_member`` as booleans, with both sides there."""
    truth = membership("is_member", is_member, (len(examples),))
    if _one_sided(truth):
        raise ValueError(
            f"is_member must have members and non-members, got {truth.sum()} of {len(truth)}"
        )
    return truth


def _one_sided(truth: Mask) -> bool:
    return bool(truth.all() or not truth.any())
