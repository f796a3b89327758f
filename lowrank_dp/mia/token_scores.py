"""Membership scores of one text from its tokens; a higher score means more likely a member.

``token_logits`` is (T, V): row t scores ``token_ids[t]``, so the rows are already shifted. A logit
of -inf excludes a token of the vocabulary and contributes nothing. Each function returns a float,
and raises ValueError for a bad argument.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowrank_dp._validate import fail, real
from lowrank_dp.mia._arrays import Array, real_array

# below this standard deviation, the square that Min-K%++ divides by underflows
MIN_SIGMA = float(np.sqrt(np.finfo(np.float64).tiny))


def min_k(token_log_probs: ArrayLike, *, fraction: float = 0.2) -> float:
    """Compute Min-K%, the mean of the lowest log-probabilities (Shi et al., arXiv 2310.16789).

    ``token_log_probs`` is (T,) with T >= 1, in nats. The lowest ``fraction`` in (0, 1] of the
    tokens counts: their number is rounded down, but is at least 1.

    >>> min_k([-1.0, -4.0, -2.0], fraction=0.7)
    -3.0
    """
    return _mean_of_lowest(real_array("token_log_probs", token_log_probs), fraction)


def min_k_plus_plus(
    token_logits: ArrayLike, token_ids: ArrayLike, *, fraction: float = 0.2
) -> float:
    """Compute Min-K%++, the Min-K% of (ln p - mu) / sigma (Zhang et al., arXiv 2404.02936).

    mu and sigma are the mean and the standard deviation of ln p over the vocabulary, weighted by p.
    ``token_logits`` is (T, V), ``token_ids`` (T,).
    """
    # the logits are ln p up to a constant per row, which cancels in the standardised value
    logits, own = _below_top("token_logits", token_logits, token_ids)
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    logits = np.where(p > 0, logits, 0.0)  # 0 ln 0 = 0
    mean = (p * logits).sum(axis=1)
    variance = (p * (logits - mean[:, None]) ** 2).sum(axis=1)
    sigma = np.maximum(np.sqrt(variance), MIN_SIGMA)
    return _mean_of_lowest((own - mean) / sigma, fraction)


def error_zone(
    token_logits: ArrayLike, reference_token_logits: ArrayLike, token_ids: ArrayLike
) -> float:
    """Compute EZ, the upward share of change at wrongly predicted tokens (arXiv 2601.12104).

    With d = ln p - ln p_reference of the true tokens that are not the model's most likely tokens,
    the score is up / (up + down) in [0, 1], up = sum max(d, 0), down = sum max(-d, 0). The score
    orders texts as up / down does, and is also defined where down is 0. A text without a wrong
    token, or without a change, scores 0.5. Both logits are (T, V), ``token_ids`` is (T,).
    """
    logits, own = _below_top("token_logits", token_logits, token_ids)
    reference, own_reference = _below_top(
        "reference_token_logits", reference_token_logits, token_ids
    )
    if reference.shape != logits.shape:
        fail(
            "reference_token_logits",
            f"of the shape of token_logits, {logits.shape}",
            f"shape {reference.shape}",
        )
    log_p, log_reference = (
        true - np.log(np.exp(row).sum(axis=1))
        for true, row in ((own, logits), (own_reference, reference))
    )
    return upward_share((log_p - log_reference)[own < 0])  # tokens that are not the likeliest


def upward_share(change: Array) -> float:
    """Compute up / (up + down) of the changes (T,), as in `error_zone`; 0.5 for no change."""
    up, total = np.maximum(change, 0).sum(), np.abs(change).sum()
    return float(up / total) if total > 0 else 0.5


def class_indices(name: str, value: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.intp]:
    """Return ``value`` as integers in [0, shape[-1]) of shape ``shape[:-1]``; else ValueError."""
    array, (*entries, top) = np.asarray(value), shape
    if array.dtype.kind not in "iu" or array.shape != tuple(entries):
        fail(name, f"integers of shape {tuple(entries)}", f"{array.dtype} of shape {array.shape}")
    if array.min() < 0 or array.max() >= top:
        fail(name, f"integers in [0, {top})", f"some from {array.min()} to {array.max()}")
    return array.astype(np.intp)


def _below_top(name: str, token_logits: ArrayLike, token_ids: ArrayLike) -> tuple[Array, Array]:
    """Subtract each row's largest logit: all logits (T, V), and those of the true tokens (T,)."""
    logits = real_array(name, token_logits, ndim=2, finite=False)
    true = np.arange(len(logits)), class_indices("token_ids", token_ids, logits.shape)
    top = logits.max(axis=1, keepdims=True)
    if not (np.isfinite(top).all() and np.isfinite(logits[true]).all()):
        fail(name, "below infinity, and finite at token_ids", "infinity")
    return logits - top, logits[true] - top[:, 0]


def _mean_of_lowest(values: Array, fraction: float) -> float:
    fraction = real("fraction", fraction, low=0, high=1, low_open=True)
    k = max(1, int(fraction * len(values)))
    return float(np.partition(values, k - 1)[:k].mean())
