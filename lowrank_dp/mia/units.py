"""Independent units of records: records that share a group or a text are one unit.

``examples`` are N records with distinct ids and ``is_member`` (N,) is their true membership.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.sparse import csgraph

from lowrank_dp.data import Example
from lowrank_dp.mia._arrays import Array, Mask, boolean_array, real_array
from lowrank_dp.mia.metrics import Auc, auc

Indices = NDArray[np.intp]


def unit_auc(
    scores: ArrayLike,
    examples: Sequence[Example],
    is_member: ArrayLike,
    *,
    confidence: float,
) -> Auc:
    """Compute `metrics.auc` of ``scores`` (N,), averaged over a unit's records on either side.

    Records of one unit have one membership bit and similar scores. If each record counted by
    itself, the interval of the AUC would be too short. Where all units are single records, the
    result equals that of `metrics.auc`.
    """
    return auc(*unit_scores(scores, examples, is_member), confidence=confidence)


def unit_scores(
    scores: ArrayLike, examples: Sequence[Example], is_member: ArrayLike
) -> tuple[Array, Mask]:
    """Average ``scores`` over each unit's members, and over its non-members.

    Returns the means (U,), and whether each is of members (U,).
    """
    values = real_array("scores", scores, shape=(len(examples),))
    return mean_per_unit(values, checked_truth(examples, is_member), unit_numbers(examples))


def unit_numbers(examples: Sequence[Example]) -> Indices:
    """Return the unit number (N,) of each record.

    Records that share a group or a content hash, directly or through other records, are one unit.
    """
    keys = [(example.group or example.id, example.content_hash) for example in examples]
    _, group = np.unique([group for group, _ in keys], return_inverse=True)
    _, content = np.unique([content for _, content in keys], return_inverse=True)
    shape = group.max() + 1, content.max() + 1
    edges = sparse.coo_array((np.ones(len(keys), np.int8), (group, content)), shape)
    nodes = sparse.block_array([[None, edges], [edges.T, None]], format="csr")
    return csgraph.connected_components(nodes, directed=False)[1][group].astype(np.intp)


def mean_per_unit(scores: Array, truth: Mask, units: Indices) -> tuple[Array, Mask]:
    """Average as `unit_scores` does, with the unit numbers ``units`` (N,) given."""
    keys, position = np.unique(2 * units + truth, return_inverse=True)
    return np.bincount(position, scores) / np.bincount(position), keys % 2 == 1


def checked_truth(examples: Sequence[Example], is_member: ArrayLike) -> Mask:
    """Return ``is_member`` as booleans; ValueError unless there are members and non-members."""
    truth = boolean_array("is_member", is_member, (len(examples),))
    if one_sided(truth):
        raise ValueError(
            f"is_member must have members and non-members, got {truth.sum()} of {len(truth)}"
        )
    return truth


def one_sided(truth: Mask) -> bool:
    """Tell whether there are only members or only non-members."""
    return bool(truth.all() or not truth.any())
