"""Verdicts on larger models, computed from the results of :mod:`.tasks_large`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lowrank_dp.experiments.intervals import mean_and_interval
from lowrank_dp.experiments.tasks_large import AVERAGES, SCHEMES, STAGES, Result

LOW = 0.5  # share of the largest possible effective rank below which a rank counts as low


class Verdict(NamedTuple):
    """Claim, verdict, and reason with the numbers behind the verdict, as text."""

    claim: str
    verdict: str
    reason: str


def verdicts(result: Result) -> list[Verdict]:
    """Judge two claims on one result: low rank of gradients, and benefit of restoration.

    A claim is reproduced if all its comparisons hold, reproduced within limits if some hold, and
    not reproduced if none holds. A gradient has low rank if its median effective rank, mean over
    starts, is below half of the largest possible rank. Restoration brings a gradient nearer to the
    clean gradient if the 95% t-interval, over starts, of the difference of the cosines is above 0.
    """
    return [_low_rank(result), _nearer(result)]


def _word(holds: np.ndarray) -> str:
    if holds.all():
        return "reproduced"
    if not holds.any():
        return "not reproduced"
    return f"reproduced within limits: in {int(holds.sum())} of {holds.size} comparisons"


def _percent(shares: np.ndarray) -> str:
    low, high = (f"{100 * value:.0f}" for value in (shares.min(), shares.max()))
    return f"{low}%" if low == high else f"{low} to {high}%"


def _low_rank(result: Result) -> Verdict:
    share = result.effective_rank.mean(axis=2)  # (K, 2, clean or noisy)
    clean, noisy = share[..., 0], share[..., 1]
    return Verdict(
        "A layer's gradient in fine-tuning has few large singular values",
        _word(clean < LOW),
        f"Median effective rank {_percent(clean)} of the largest possible, with noise "
        f"{_percent(noisy)}",
    )


def _nearer(result: Result) -> Verdict:
    cosines = [
        [result.starts(scheme, average) for scheme in range(len(SCHEMES))]
        for average in range(len(AVERAGES))
    ]
    gains = np.stack([optimal - noisy for noisy, optimal, _ in cosines])  # (averages, K, 2, W)
    mean, half = mean_and_interval(gains, axis=-1)
    parts = []
    for case, stage in result.rows:
        one = result.config.cases[case]
        texts = [
            f"{noisy[case, stage].mean():.3f} → {optimal[case, stage].mean():.3f} "
            f"({zeroed[case, stage].mean():.3f} zeroed)"
            for noisy, optimal, zeroed in cosines
        ]
        parts.append(f"{one.task}, B = {one.batch_size}, {STAGES[stage]}: {'; '.join(texts)}")
    return Verdict(
        "Restoring the singular values from the noisy gradient alone brings it nearer to the clean "
        "one",
        _word(mean - half > 0),
        f"Cosine with the clean sum, noisy → optimal, {'; '.join(AVERAGES)}: {'. '.join(parts)}",
    )
