"""Test whether a model has learned anything about its own members.

If a model has learned nothing, an attack on the model finds nothing, and the result is no evidence:
the model may have been loaded with another tokenizer, another order of labels, or a part of its
weights. Therefore the members' losses are compared with chance, the best prediction that does not
depend on the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from lowrank_dp.data import IGNORE, Example
from lowrank_dp.mia import metrics, units
from lowrank_dp.mia._arrays import Array
from lowrank_dp.mia.signals import Signals

ERROR = 0.01  # probability that a model at chance is called better than chance


@dataclass(frozen=True)
class Learning:
    """Loss and accuracy on the members, and those of chance.

    Attributes:
        loss: mean loss of the members, in nats (squared error for regression).
        chance_loss: mean loss of the best prediction that does not depend on the record: the
            frequencies of the labels among the members, their mean score, or, for texts, the
            frequencies of the tokens in the other members (one added to each count).
        uniform_loss: ln of the number of classes or of tokens; None for regression.
        accuracy, majority: share of members that are classified correctly, and share of their most
            frequent label; None unless the task is classification.
        reference_loss: mean loss of the members under the model before fine-tuning, or None.
        better: whether the model is better than chance on its members and, for texts, better than
            the model before fine-tuning, if known. At most about ``ERROR`` of the models that are
            not better are called better.
    """

    loss: float
    chance_loss: float
    uniform_loss: float | None
    accuracy: float | None
    majority: float | None
    reference_loss: float | None
    better: bool

    @property
    def description(self) -> str:
        """Comparison with chance, in one line."""
        words = f"members' loss {self.loss:.3g}, chance {self.chance_loss:.3g}"
        if self.uniform_loss is not None:
            words += f" (uniform {self.uniform_loss:.3g})"
        if self.reference_loss is not None:
            words += f", before fine-tuning {self.reference_loss:.3g}"
        if self.accuracy is not None:
            words += f"; accuracy {self.accuracy:.3f}, most frequent label {self.majority:.3f}"
        return words


def judge_learning(
    kind: str,
    examples: Sequence[Example],
    is_member: np.ndarray,
    found: Signals,
    chance: Array,
    classes: int,
) -> Learning:
    """Compare the members' losses with ``chance`` (N,), the result of `chance_losses`.

    ``found`` has the signals of the N ``examples`` first; ``classes`` is the number of classes, or
    of tokens in the vocabulary. Records that share a group or a text count as one.
    """
    count = len(examples)
    loss = found.loss[:count]
    gain = _lower_bound(
        chance - loss, examples, is_member, ERROR / (2 if kind == "classification" else 1)
    )
    better = gain > 0
    accuracy = majority = reference = None
    if kind == "classification":
        right = found.correct[:count][is_member]
        accuracy = float(right.mean())
        majority = float(np.exp(-chance[is_member]).max())
        low, _ = metrics.clopper_pearson(int(right.sum()), right.size, confidence=1 - ERROR)
        better = better or low > majority
    if len(found.reference_loss):
        before = found.reference_loss[:count]
        reference = float(before[is_member].mean())
        if kind == "generation":
            better = better and _lower_bound(before - loss, examples, is_member, ERROR) > 0
    return Learning(
        float(loss[is_member].mean()),
        float(chance[is_member].mean()),
        float(np.log(classes)) if kind != "regression" else None,
        accuracy,
        majority,
        reference,
        bool(better),
    )


def chance_losses(
    kind: str,
    examples: Sequence[Example],
    is_member: np.ndarray,
    rows: Sequence[Mapping[str, Any]],
    vocabulary: int,
) -> Array:
    """Compute each record's loss (N,) under the best prediction that does not depend on the record.

    ``rows`` are the encoded ``examples``; the prediction is made from members alone. For texts, a
    record's own tokens are left out of the counts.
    """
    if kind == "generation":
        return _unigram_losses(rows, is_member, vocabulary)
    labels = np.array([example.label for example in examples], dtype=np.float64)
    inside = labels[is_member]
    if kind == "regression":
        return (labels - inside.mean()) ** 2
    values, counts = np.unique(inside, return_counts=True)
    share = dict(zip(values.tolist(), counts / inside.size, strict=True))
    # a label that no member has gets the share of one more record
    return -np.log([share.get(float(label), 1 / (inside.size + 1)) for label in labels])


def _unigram_losses(
    rows: Sequence[Mapping[str, Any]], is_member: np.ndarray, vocabulary: int
) -> Array:
    scored = [np.array([t for t in row["labels"] if t != IGNORE], dtype=np.int64) for row in rows]
    vocabulary = max(vocabulary, 1 + max(int(tokens.max()) for tokens in scored))
    inside = [tokens for tokens, bit in zip(scored, is_member, strict=True) if bit]
    counts = np.bincount(np.concatenate(inside), minlength=vocabulary).astype(np.float64)
    losses = []
    for tokens, bit in zip(scored, is_member, strict=True):
        own = bit * (tokens[:, None] == tokens).sum(axis=1)
        total = counts.sum() - bit * len(tokens) + vocabulary
        losses.append(np.log(total) - np.log(counts[tokens] - own + 1).mean())
    return np.array(losses)


def _lower_bound(
    gain: Array, examples: Sequence[Example], is_member: np.ndarray, error: float
) -> float:
    """Bound the members' mean gain from below (one-sided, Student's t over units)."""
    values, inside = units.unit_scores(gain, examples, is_member)
    own = values[inside]
    spread = own.std(ddof=1) / np.sqrt(own.size)
    return float(own.mean() - special.stdtrit(own.size - 1, 1 - error) * spread)
