"""Find the non-members whose text is, or nearly is, the text of a member.

A text that is a member's and a non-member's is no evidence for either. ``examples`` are N records
with distinct ids and ``is_member`` (N,) is their true membership.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from lowrank_dp import _validate
from lowrank_dp._terminal import progress
from lowrank_dp.data import Example
from lowrank_dp.mia._arrays import Array
from lowrank_dp.mia.units import Indices, checked_truth

# Jaccard similarity of character 5-grams. Above 0.8, two texts of 50 characters differ by a word's
# ending, and two texts of 200 characters by a short word.
NEAR, NGRAM = 0.8, 5
_BLOCK = 256  # number of non-members compared at a time
_PAIRS = 2**14  # number of pairs whose similarity is computed at a time


@dataclass(frozen=True)
class Pair:
    """Ids of a member and of a non-member, and the similarity of their texts, at most 1."""

    member: str
    nonmember: str
    similarity: float


def overlap(examples: Sequence[Example], is_member: ArrayLike) -> tuple[Pair, ...]:
    """Find the non-members whose text is also a member's, each with the first such member.

    Texts are the same if their content hashes are: case, white space and labels do not count.
    """
    truth = checked_truth(examples, is_member)
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
    """Find the non-members whose text is nearly a member's, each with the most similar member.

    The similarity is the Jaccard similarity, in [0, 1], of the sets of character 5-grams, in lower
    case and without accents. No pair of a similarity of at least ``threshold`` in (0, 1] is missed.
    Non-members that `overlap` finds are left out; texts under 5 characters have no 5-gram, so only
    `overlap` compares them.

    Two records of such a similarity share at least one n-gram of the rarest 1 - ``threshold`` of
    their n-grams (Chaudhuri et al., ICDE 2006; Bayardo et al., WWW 2007). Only pairs that share one
    are compared, in blocks, so that memory is linear in N. Raises ValueError for a threshold out of
    range, and if all records are members or none is.
    """
    threshold = _validate.real("threshold", threshold, low=0, high=1, low_open=True)
    truth = checked_truth(examples, is_member)
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
        order = np.lexsort((right, -alike, left))  # the best pair of each non-member comes first
        order = order[alike[order] >= threshold]
        _, best = np.unique(left[order], return_index=True)
        pairs += [
            Pair(examples[int(right[at])].id, examples[int(left[at])].id, float(alike[at]))
            for at in order[best]
        ]
    return tuple(pairs)


def text_parts(example: Example) -> tuple[str | None, ...]:
    """Return the texts of a record: text, second text, target; None for a missing text."""
    return example.text, example.text_pair, example.target


def whole_text(example: Example) -> str:
    """Join the texts of a record, one per line."""
    return "\n".join(part for part in text_parts(example) if part is not None)


def _grams(examples: Sequence[Example]) -> sparse.csr_array:
    """Return the indicator matrix (N, G) of the records' n-grams, for G n-grams in all."""
    from sklearn.feature_extraction.text import HashingVectorizer  # imported when used: 1 s

    hashed = HashingVectorizer(
        analyzer="char",
        ngram_range=(NGRAM, NGRAM),
        n_features=2**31 - 1,
        binary=True,
        norm=None,
        strip_accents="unicode",
        alternate_sign=False,
        dtype=np.float32,
    ).transform(map(whole_text, examples))
    found, columns = np.unique(hashed.indices, return_inverse=True)
    return sparse.csr_array(
        (hashed.data, columns.astype(np.int32), hashed.indptr), shape=(len(examples), len(found))
    )


def _rarest(grams: sparse.csr_array, threshold: float) -> sparse.csr_array:
    """Keep, of a row with s columns, the s - ceil(threshold s) + 1 columns of the fewest rows.

    Two rows of Jaccard similarity ``threshold`` share at least ceil(threshold s) columns. If none
    of these were among the rarest columns of both rows, one of the rows would have too few left.
    """
    size = np.diff(grams.indptr)
    rows = np.repeat(np.arange(len(size)), size)
    frequency = np.bincount(grams.indices, minlength=grams.shape[1])[grams.indices]
    order = np.lexsort((grams.indices, frequency, rows))
    place = np.arange(len(rows)) - grams.indptr[:-1][rows]  # within its row, rarest first
    kept = order[place < (size - np.ceil(threshold * size - 1e-9) + 1)[rows]]
    return sparse.csr_array(
        (np.ones(len(kept), np.float32), (rows[kept], grams.indices[kept])), shape=grams.shape
    )


def _similarities(grams: sparse.csr_array, left: Indices, right: Indices) -> Array:
    """Compute the Jaccard similarity of the rows ``left`` with the rows ``right``, (P,)."""
    size, shared = np.diff(grams.indptr), np.empty(len(left))
    for start in range(0, len(left), _PAIRS):
        chunk = slice(start, start + _PAIRS)
        shared[chunk] = grams[left[chunk]].multiply(grams[right[chunk]]).sum(axis=1)
    return shared / (size[left] + size[right] - shared)
