"""Values of training runs read where a loss first falls to a given level.

A method that learns less leaks less, so that membership inference is compared at one loss. A
held-out loss falls and rises again: it has one value at two stages of training, of which the
earlier is read.
"""

from __future__ import annotations

import numpy as np


def at_level(loss: np.ndarray, values: np.ndarray, level: float) -> np.ndarray:
    """Return ``values`` where ``loss`` first falls to ``level``, interpolated and not extrapolated.

    Args:
        loss: (..., T) loss after rising numbers of steps; NaN for a run that stopped.
        values: (..., T) the values to read, such as an AUC.
        level: the loss to read at, in the unit of ``loss``.

    Returns:
        (...,) linear interpolation, in the loss, between the two numbers of steps around the first
        fall from above ``level`` to ``level`` or below; NaN where there is none.
    """
    before, after = loss[..., :-1], loss[..., 1:]
    falls = (before > level) & (after <= level)  # a comparison with NaN is false
    first = falls.argmax(axis=-1)[..., None]

    def pick(array: np.ndarray) -> np.ndarray:
        return np.take_along_axis(array, first, axis=-1)[..., 0]

    with np.errstate(invalid="ignore", divide="ignore"):
        share = (pick(before) - level) / (pick(before) - pick(after))
    read = pick(values[..., :-1]) + share * (pick(values[..., 1:]) - pick(values[..., :-1]))
    return np.where(falls.any(axis=-1), read, np.nan)


def common_level(loss: np.ndarray, levels: tuple[float, ...]) -> float:
    """Return the one of ``levels`` to which the loss (..., T) of the most runs falls.

    If equally many runs fall to several levels, the lowest of these is returned.
    """
    reached = {
        level: int(np.isfinite(at_level(loss, loss, level)).sum()) for level in sorted(levels)
    }
    return max(reached, key=lambda level: reached[level])
