"""Scales of rows and columns from factored second moments, normalised over all layers together."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from lowrank_dp import _validate
from lowrank_dp.models.scaled import Scale
from lowrank_dp.precondition.moments import Moment

LEAST = 1e-6  # lower limit of row and column means, relative to the matrix's mean square


def joint_scales(
    moments: Mapping[str, Moment],
    power: float = 0.125,
    *,
    equal_rows: Collection[str] = (),
) -> dict[str, Scale]:
    """Return ``r_i = a row_i^-power`` and ``c_j = a col_j^-power`` of each matrix.

    All matrices share the factor ``a``, for which the mean square of ``r_i c_j`` over all entries
    of all matrices is 1. A matrix of small gradients therefore gets larger scales than a matrix of
    large gradients. Row and column means below ``LEAST`` times the mean of the matrix are raised to
    this limit. A matrix whose moment is 0 gets scales of 1, and does not count in ``a``.

    Args:
        moments: second moments, by name of the matrix; the common unit does not matter.
        power: p, in [0, 0.5]. p = 0 gives scales of 1. With p = 1/4, the steps of SGD on the
            stored weights scale with the inverse root of the second moment, as Adam's steps do.
        equal_rows: names of matrices whose rows get one common scale, from the mean of their row
            means; a name without a moment is ignored. An example is a classifier's last layer: its
            rows are the classes of the private task, and the public text has other classes.

    Returns:
        Name of each matrix -> scales r (m,) and c (n,).

    Raises:
        ValueError: if ``power`` is out of range, ``equal_rows`` is a string, a moment is negative
            or not finite, or the moments of two matrices differ by so large a factor that the
            square of a scale overflows.
    """
    _validate.real("power", power, low=0, high=0.5)
    if isinstance(equal_rows, str):
        _validate.fail("equal_rows", "a collection of names", equal_rows)
    largest = 0.0
    for name, moment in moments.items():
        for part in moment:
            if not bool((part >= 0).all() and part.isfinite().all()):
                raise ValueError(f"moment of {name} must be finite and >= 0")
            largest = max(largest, float(part.max()))
    found: dict[str, Scale] = {}
    squares, entries = 0.0, 0
    for name, moment in moments.items():
        if not bool(moment.row.any()):
            continue
        # the unit drops out; in this one, squares of scales overflow only if matrices differ widely
        row, col = (part.double() / largest for part in moment)
        level = float(row.mean())
        if name in equal_rows:
            row = torch.full_like(row, level)
        scale = Scale(*(part.clamp(min=LEAST * level).pow(-power) for part in (row, col)))
        found[name] = scale
        squares += float(scale.row.square().sum() * scale.col.square().sum())
        entries += len(row) * len(col)
    factor = (entries / squares) ** 0.25 if found else 1.0
    if not 0 < factor < math.inf:
        raise ValueError(
            f"moments must differ less between matrices for power {power:g}: squares of their "
            "scales overflow in float64"
        )
    return {
        name: Scale(found[name].row * factor, found[name].col * factor)
        if name in found
        else Scale(torch.ones_like(moment.row), torch.ones_like(moment.col))
        for name, moment in moments.items()
    }
