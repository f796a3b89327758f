"""Gauss-Legendre quadrature on panels, and bisection on many brackets at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lowrank_dp.theory._arrays import Array

Function = Callable[[Array], Array]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_MAX_HALVINGS = 60


def panel_nodes(left: Array, right: Array) -> Array:
    """Gauss-Legendre nodes (panels, 16) of each panel [left, right]."""
    return (left + right)[:, None] / 2 + (right - left)[:, None] / 2 * _NODES


def panel_integrals(function: Function, left: Array, right: Array) -> Array:
    """Integral of ``function`` over each panel [left, right], by one Gauss-Legendre rule."""
    return (right - left) / 2 * (function(panel_nodes(left, right)) @ _WEIGHTS)


def integrate(function: Function, edges: Array, tolerance: float = 1e-14) -> float:
    """Integral over [edges[0], edges[-1]]; each panel is halved until its value is stable.

    Args:
        function: vectorised integrand.
        edges: ascending panel edges. They must separate the features of the integrand: a feature
            much narrower than its panel can fall between the nodes.
        tolerance: largest absolute change of a panel's integral when the panel is halved.
    """
    left, right = edges[:-1], edges[1:]
    whole = panel_integrals(function, left, right)
    total = 0.0
    for _ in range(_MAX_HALVINGS):
        middle = (left + right) / 2
        first = panel_integrals(function, left, middle)
        second = panel_integrals(function, middle, right)
        open_ = np.abs(first + second - whole) > tolerance
        total += float(np.sum((first + second)[~open_]))
        left, right = (
            np.concatenate([left[open_], middle[open_]]),
            np.concatenate([middle[open_], right[open_]]),
        )
        whole = np.concatenate([first[open_], second[open_]])
        if not left.size:
            break
    return total + float(np.sum(whole))


def bisect(function: Function, low: Array, high: Array, iterations: int = 60) -> Array:
    """Find the root of ``function`` in each bracket, without evaluating the ends.

    ``function(low)`` is assumed to be below zero and ``function(high)`` above; swap the ends of a
    bracket for a decreasing function.
    """
    for _ in range(iterations):
        middle = (low + high) / 2
        above = function(middle) > 0
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2
