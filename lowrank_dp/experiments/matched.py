"""Values of training runs at the point where a loss first falls to a given level.

A method that learns less leaks less, so membership inference is compared at equal losses. A
held-out loss falls and then rises, so it passes a level twice; the first time counts.
"""

from __future__ import annotations

import numpy as np


def at_level(loss: np.ndarray, values: np.ndarray, level: float) -> np.ndarray:
    """Interpolate ``values`` at the point where ``loss`` first falls to ``level``.

    Args:
        loss: (..., T) loss after increasing numbers of steps; NaN for a run that stopped.
        values: (..., T) values to interpolate, such as an AUC.
        level: level of the loss, in the unit of ``loss``.

    Returns:
        (...,) values, interpolated linearly in the loss between the last point above ``level`` and
        the first point at or below ``level``; NaN if the loss does not fall to ``level``. The
        values are never extrapolated: a run whose first loss is at or below ``level`` passed the
        level before the first point, so its value is NaN, even if the loss rises and falls again.
    """
    before, after = loss[..., :-1], loss[..., 1:]
    falls = (before > level) & (after <= level)  # a comparison with NaN is false
    first = falls.argmax(axis=-1)[..., None]

    def pick(array: np.ndarray) -> np.ndarray:
        return np.take_along_axis(array, first, axis=-1)[..., 0]

    with np.errstate(invalid="ignore", divide="ignore"):
        share = (pick(before) - level) / (pick(before) - pick(after))
    read = pick(values[..., :-1]) + share * (pick(values[..., 1:]) - pick(values[..., :-1]))
    return np.where(falls.any(axis=-1) & ~(loss[..., 0] <= level), read, np.nan)


def common_level(loss: np.ndarray, levels: tuple[float, ...]) -> float:
    """Return the level, among ``levels``, to which the loss (..., T) of the most runs falls.

    If equally many runs fall to several levels, the lowest of these is returned.
    """
    reached = {
        level: int(np.isfinite(at_level(loss, loss, level)).sum()) for level in sorted(levels)
    }
    return max(reached, key=lambda level: reached[level])
