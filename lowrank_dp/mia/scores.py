r"""Membership scores: arrays in, one float64 value per record out, higher = more likely a member.

This module has the scores of one model; :mod:`~lowrank_dp.mia.token_scores` has the scores of a
text's tokens and :mod:`~lowrank_dp.mia.shadow_scores` those that need shadow models. All names can
be imported from this module.

Notation: ``loss`` is the cross-entropy of the true class, or the mean negative log-likelihood per
token; ``phi`` is the logit confidence ln(p / (1 - p)) of p = exp(-loss). ``loss`` and ``phi`` are
(N,), ``shadow_*`` are (num_shadows, N), ``shadow_is_member[s, i]`` says whether shadow s was
trained on record i, and ``population_*`` are over Z records that are in no model. The functions of
this module that take one value per record work entry by entry: they also take arrays with more
axes, such as the (num_shadows, N) losses of shadows, and return that shape.

All probabilities are computed as logarithms. Standard deviations divide by the count (ddof 0).
Input that is not finite, empty, or of the wrong shape raises ValueError with the argument's name
and the records at fault; no record is dropped.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lowrank_dp._validate import fail
from lowrank_dp.mia._arrays import Array, real_array
from lowrank_dp.mia.shadow_scores import (
    lira_offline,
    lira_online,
    rmia_log_ratio,
    rmia_offline,
    rmia_online,
)
from lowrank_dp.mia.token_scores import class_indices, error_zone, min_k, min_k_plus_plus

__all__ = [
    "calibrated_score",
    "error_zone",
    "lira_offline",
    "lira_online",
    "logit_confidence",
    "logit_confidence_from_logits",
    "loss_score",
    "min_k",
    "min_k_plus_plus",
    "quantile_score",
    "rmia_log_ratio",
    "rmia_offline",
    "rmia_online",
    "zlib_score",
]


def loss_score(loss: ArrayLike) -> Array:
    """Score by -loss, with the shape of ``loss`` (Yeom et al. 2018, arXiv 1709.01604).

    >>> loss_score([0.5, 2.0])
    array([-0.5, -2. ])
    """
    return -real_array("loss", loss, or_more=True)


def logit_confidence(loss: ArrayLike) -> Array:
    """Compute the logit ln(p / (1 - p)) of p = exp(-loss) (Carlini et al. 2022, arXiv 2112.03570).

    ``loss`` >= 0 is (N,) or has more axes; the result has its shape. A loss that was rounded to
    exactly 0 gets the largest phi, 708.4. `logit_confidence_from_logits` keeps the
    information that such rounding loses.

    >>> logit_confidence([1e4])
    array([-10000.])
    """
    loss = np.maximum(real_array("loss", loss, low=0, or_more=True), np.finfo(np.float64).tiny)
    return -loss - np.log(-np.expm1(-loss))


def logit_confidence_from_logits(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Compute the logit confidence from logits, z_y - ln sum_{j != y} exp z_j.

    The result is exact for logits of any size. ``logits`` is (N, C) with C >= 2, ``labels`` (N,)
    integers in [0, C); the result is (N,). With more axes, the classes are on the last axis of
    ``logits``, and ``labels`` has the other axes.

    >>> logit_confidence_from_logits([[1e4, -1e4], [1e4, 0.0]], [0, 1])
    array([ 20000., -10000.])
    """
    z = real_array("logits", logits, ndim=2, or_more=True)
    if z.shape[-1] < 2:
        fail("logits", "an array of shape (N, C) with at least 2 classes", z.shape)
    own = class_indices("labels", labels, z.shape)[..., None]
    true = np.take_along_axis(z, own, axis=-1)
    others = z.copy()
    np.put_along_axis(others, own, -np.inf, axis=-1)
    top = others.max(axis=-1, keepdims=True)
    return ((true - top) - np.log(np.exp(others - top).sum(axis=-1, keepdims=True)))[..., 0]


def calibrated_score(loss: ArrayLike, reference_loss: ArrayLike) -> Array:
    """Score by reference_loss - loss, with their shape (Watson et al. 2022, arXiv 2111.08440).

    Both are (N,), or of one shape with more axes. ``reference_loss`` is the loss of the base model,
    or the mean loss of the shadows without the record.
    """
    loss = real_array("loss", loss, or_more=True)
    return real_array("reference_loss", reference_loss, shape=loss.shape) - loss


def quantile_score(phi: ArrayLike, predicted_quantile: ArrayLike) -> Array:
    """Score by the excess phi - q(x), with their shape (Bertran et al. 2023, arXiv 2307.03694).

    Both are (N,), or of one shape with more axes. ``predicted_quantile`` is the quantile of phi
    among non-members, predicted from each record's features by a regression on public records.
    """
    phi = real_array("phi", phi, or_more=True)
    return phi - real_array("predicted_quantile", predicted_quantile, shape=phi.shape)


def zlib_score(loss: ArrayLike, text: str | Sequence[str]) -> float | Array:
    """Score by -loss / (bytes of the compressed text) (Carlini et al. 2021, arXiv 2012.07805).

    One loss and one text give a float; N losses and N texts give (N,). ``text`` is the text that
    was scored, without a tail that the model never saw, and is compressed in UTF-8.

    >>> zlib_score(2.0, "aaaaaaaa")
    -0.18181818181818182
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not all(isinstance(entry, str) and entry for entry in texts):
        fail("text", "a non-empty string or a sequence of them", text)
    losses = real_array("loss", loss, shape=() if isinstance(text, str) else (len(texts),))
    score = -losses / [len(zlib.compress(entry.encode())) for entry in texts]
    return float(score[0]) if isinstance(text, str) else score
