"""Compute the metrics of predicted labels and of generated texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowrank_dp import _validate
from lowrank_dp.data import Task

# metric -> whether a larger value is better
HIGHER_IS_BETTER: dict[str, bool] = {
    "loss": False,
    "perplexity": False,
    "accuracy": True,
    "f1": True,
    "matthews": True,
    "pearson": True,
    "spearman": True,
    "bleu": True,
    "rouge_l": True,
}

Array = NDArray[np.float64]


def label_metrics(names: Iterable[str], outputs: Any, labels: Any) -> dict[str, float]:
    """Compute metrics of predicted classes or scores, by name.

    ``accuracy``, and ``f1`` of class 1 against class 0, are fractions in [0, 1]; ``matthews``,
    ``pearson`` and ``spearman`` are correlations in [-1, 1]. As in GLUE's tables, a metric is 0.0
    where it is undefined: a correlation with constant predictions or labels, and F1 if class 1 is
    neither predicted nor present.

    Args:
        names: names of the metrics.
        outputs: logits (N, C) of C > 1 classes, of which the largest is the prediction; or
            predicted classes or scores, (N,) or (N, 1). Tensors, arrays or lists.
        labels: classes or scores, (N,).

    Raises:
        ValueError: for an unknown name, shapes that do not fit, no entries, entries that are not
            finite, and F1 of classes other than 0 and 1.

    >>> label_metrics(["accuracy", "f1", "matthews"], [1, 1, 0, 1], [1, 0, 0, 1])
    {'accuracy': 0.75, 'f1': 0.8, 'matthews': 0.5773502691896258}
    >>> label_metrics(["pearson"], [2.0, 2.0, 2.0], [0.0, 1.0, 5.0])
    {'pearson': 0.0}
    """
    names = [_validate.choice("metric", name, _LABEL_METRICS) for name in names]
    predictions, truth = _float64("outputs", outputs), _float64("labels", labels)
    if predictions.ndim == 2 and predictions.shape[1] > 1:
        if scores := {"pearson", "spearman"}.intersection(names):
            _validate.fail("outputs", f"(N,) or (N, 1) for {min(scores)}", predictions.shape)
        predictions = predictions.argmax(1).astype(np.float64)
    elif predictions.ndim == 2:
        predictions = predictions[:, 0]
    if truth.ndim != 1 or predictions.shape != truth.shape:
        _validate.fail(
            "outputs and labels",
            "of shapes (N,) or (N, C) and (N,)",
            (predictions.shape, truth.shape),
        )
    return {name: float(_LABEL_METRICS[name](predictions, truth)) for name in names}


def text_metrics(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Compute ``bleu`` and ``rouge_l`` of texts with one or more references, both in [0, 100].

    BLEU (Papineni et al., ACL 2002) is sacrebleu's corpus score with its defaults: 13a tokens, case
    kept, exponential smoothing. ROUGE-L (Lin, 2004) is rouge-score's F-measure without stemming,
    the maximum over a text's references, averaged over texts; ROUGE-L ignores case and all
    characters except ASCII letters and digits.

    Blank references are left out, because a blank reference would be the closest in length to a
    text that is cut short. A text whose references are all blank is left out of both scores.

    Args:
        hypotheses: the generated texts.
        references: the references of each text.

    Raises:
        ValueError: for no texts, lists of different lengths, a text without any reference, or
            references that are all blank.

    >>> text_metrics(["the cat sat on the mat"], [["a cat sat", "the cat sat on the mat"]])
    {'bleu': 100.0, 'rouge_l': 100.0}
    """
    if isinstance(hypotheses, str) or not hypotheses or len(hypotheses) != len(references):
        _validate.fail(
            "hypotheses and references",
            "non-empty lists of one length",
            (len(hypotheses), len(references)),
        )
    for i, several in enumerate(references):
        if isinstance(several, str) or not several:
            _validate.fail(f"references[{i}]", "a non-empty list of strings", several)
    pairs = [
        (text, kept)
        for text, several in zip(hypotheses, references, strict=True)
        if (kept := [reference for reference in several if reference.strip()])
    ]
    if not pairs:
        raise ValueError("references must hold a text that is not blank, got none")
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import BLEU

    # sacrebleu takes the first, second, ... references of all texts, with None for a missing one.
    # force=True silences its advice to detokenise: texts are scored as they are.
    streams = [*map(list, zip_longest(*(kept for _, kept in pairs)))]
    bleu = BLEU(force=True).corpus_score([text for text, _ in pairs], streams).score
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score_multi(kept, text)["rougeL"].fmeasure for text, kept in pairs]
    return {"bleu": min(bleu, 100.0), "rouge_l": 100 * float(np.mean(rouge))}


# Label metrics: predictions (N,), labels (N,) -> value. The libraries are slow to import, so each
# library is imported when its metric is used.


def _float64(name: str, values: Any) -> Array:
    array = torch.as_tensor(values).detach().double().cpu().numpy()
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite and non-empty, got shape {array.shape}")
    return array


def _accuracy(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(labels, predictions)


def _f1(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import f1_score

    if not np.isin([predictions, labels], (0, 1)).all():
        raise ValueError("outputs and labels must be classes 0 and 1 for f1, got others")
    return f1_score(labels, predictions, zero_division=0.0)


def _matthews(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, predictions)


def _pearson(predictions: Array, labels: Array) -> float:
    from scipy.stats import pearsonr

    return pearsonr(predictions, labels).statistic


def _spearman(predictions: Array, labels: Array) -> float:
    from scipy.stats import spearmanr

    return spearmanr(predictions, labels).statistic


def _zero_if_constant(
    correlation: Callable[[Array, Array], float],
) -> Callable[[Array, Array], float]:
    """Wrap ``correlation`` to return 0.0, without a warning, for constant predictions or labels."""
    return lambda predictions, labels: (
        0.0 if np.ptp(predictions) == 0 or np.ptp(labels) == 0 else correlation(predictions, labels)
    )


_LABEL_METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _zero_if_constant(_matthews),
    "pearson": _zero_if_constant(_pearson),
    "spearman": _zero_if_constant(_spearman),
}


def majority(task: Task) -> float | None:
    """Return the accuracy, in [0, 1], of always predicting the validation split's commonest label.

    The result is None for a task without classes, and NaN for an empty validation split.
    """
    if task.kind != "classification":
        return None
    labels = [example.label for example in task.validation]
    return max(map(labels.count, set(labels))) / len(labels) if labels else math.nan
