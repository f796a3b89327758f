"""The non-members' quantile of a record's confidence, from what is known of it without the model.

One model and no shadows (Bertran et al. 2023, arXiv 2307.03694): a regression on public records
that minimises the pinball loss predicts how confident a model is in such a record if it was not
trained on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

from lowrank_dp.data import Example
from lowrank_dp.mia.signals import Array

QUANTILE = 0.9  # 1 - the false-positive rate that the threshold of 0 aims at
MIN_POPULATION = 100  # of fewer, the highest tenth is a handful


def features(examples: Sequence[Example], reference_loss: Array) -> Array:
    """Lengths in log characters, label, and the untuned model's loss where known; (N, F)."""
    known = [reference_loss] if len(reference_loss) else []
    return np.column_stack(
        [
            *(
                [np.log1p(len(text or "")) for text in texts]
                for texts in zip(*((e.text, e.text_pair, e.target) for e in examples), strict=True)
            ),
            [0.0 if e.label is None else float(e.label) for e in examples],
            *known,
        ]
    )


def predicted_quantile(
    population: Array, population_phi: Array, wanted: Array, *, seed: int = 0
) -> Array:
    """The ``QUANTILE`` of phi at the features ``wanted`` (N, F), shape (N,).

    ``population`` (Z, F) and ``population_phi`` (Z,) are of records that are in no model.
    """
    model = HistGradientBoostingRegressor(loss="quantile", quantile=QUANTILE, random_state=seed)
    return np.asarray(model.fit(population, population_phi).predict(wanted))
