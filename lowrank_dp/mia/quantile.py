"""Predict the non-members' quantile of a record's confidence from features of the record.

The quantile attack needs one model and no shadows (Bertran et al. 2023, arXiv 2307.03694): a
regression on public records, which minimises the pinball loss, predicts the model's confidence in a
record that the model was not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

from lowrank_dp.data import Example
from lowrank_dp.mia._arrays import Array
from lowrank_dp.mia.duplicates import text_parts

QUANTILE = 0.9  # 1 minus the intended false-positive rate at a score threshold of 0
MIN_POPULATION = 100  # with fewer records, fewer than ten are above the quantile


def features(examples: Sequence[Example], reference_loss: Array) -> Array:
    """Return features (N, F): ln(1 + characters) of each text, the label, the reference loss.

    A missing label is 0. An empty ``reference_loss`` (0,) is left out.
    """
    known = [reference_loss] if len(reference_loss) else []
    return np.column_stack(
        [
            *(
                [np.log1p(len(text or "")) for text in texts]
                for texts in zip(*map(text_parts, examples), strict=True)
            ),
            [0.0 if e.label is None else float(e.label) for e in examples],
            *known,
        ]
    )


def predicted_quantile(
    population: Array, population_phi: Array, wanted: Array, *, seed: int = 0
) -> Array:
    """Predict the ``QUANTILE`` of phi at the features ``wanted`` (N, F), shape (N,).

    ``population`` (Z, F) and ``population_phi`` (Z,) are the features and the logit confidences of
    records that are in no model. ``seed`` is the random seed of the regression.
    """
    model = HistGradientBoostingRegressor(loss="quantile", quantile=QUANTILE, random_state=seed)
    return np.asarray(model.fit(population, population_phi).predict(wanted))
