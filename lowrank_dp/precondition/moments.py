"""Factored second moments of gradients, along a few steps of training on public data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank_dp import _validate

_LEAST_ENTRY = 1e-150  # float64 holds the square of this number, and the inverse of the square


class Moment(NamedTuple):
    """Row and column means of the squared entries of a gradient (m, n), or their mean over steps.

    Attributes:
        row: (m,) float64, >= 0: mean of each row, in the units of the squared gradient.
        col: (n,) float64, >= 0: mean of each column, in the units of the squared gradient.
    """

    row: Tensor
    col: Tensor


def second_moment(gradient: Tensor) -> Moment:
    """Return the row and column means of a matrix's squared entries (Adafactor, arXiv 1804.04235).

    Raises ValueError if ``gradient`` is not a matrix of finite entries, or if its largest entry is
    so large or so small that float64 does not hold its square (below 1e-150 or above 1e150).
    """
    _validate.matrix("gradient", gradient)
    if gradient.ndim != 2:
        _validate.fail("gradient", "a matrix (m, n)", tuple(gradient.shape))
    largest = float(gradient.abs().max())
    if largest and not _LEAST_ENTRY <= largest <= 1 / _LEAST_ENTRY:
        _validate.fail(
            "gradient",
            f"a matrix whose largest entry is in [{_LEAST_ENTRY:g}, {1 / _LEAST_ENTRY:g}]",
            largest,
        )
    squares = gradient.double().square()
    return Moment(squares.mean(1), squares.mean(0))


def public_moments(
    parameters: Mapping[str, nn.Parameter],
    gradients: Iterable[Callable[[], Mapping[str, Tensor]]],
    *,
    learning_rate: float = 1e-3,
) -> dict[str, Moment]:
    """Train on public data without noise, and return the mean second moment of each matrix.

    The optimizer is Adam (beta1 0.9, beta2 0.999). At the end, the parameters get their initial
    values back.

    Args:
        parameters: the trained parameters, by name.
        gradients: one function per step. The function returns the gradients of PUBLIC data at the
            present values of the parameters, by name. The unit of the gradients does not matter.
        learning_rate: learning rate of Adam, above 0.

    Returns:
        The mean over the steps of :func:`second_moment`, for each parameter that is a matrix.

    Raises:
        ValueError: if ``learning_rate`` is not above 0, if there is no step, if a parameter has no
            gradient, or if the gradient of a matrix is refused by :func:`second_moment`.
    """
    _validate.positive("learning_rate", learning_rate)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.Adam(list(parameters.values()), lr=learning_rate)
    totals: dict[str, Moment] = {}
    steps = 0
    try:
        for gradient in gradients:
            found = gradient()
            if missing := [name for name in parameters if name not in found]:
                _validate.fail(
                    "gradients", "of every parameter", f"none of {_validate.listed(missing)}"
                )
            for name, p in parameters.items():
                p.grad = found[name].to(p.dtype)
                if p.ndim == 2:
                    moment = second_moment(found[name])
                    totals[name] = (
                        Moment(totals[name].row + moment.row, totals[name].col + moment.col)
                        if name in totals
                        else moment
                    )
            optimizer.step()
            steps += 1
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.grad = None
                p.copy_(before[name])
    if not steps:
        _validate.fail("gradients", "at least one step of public data", "none")
    return {name: Moment(total.row / steps, total.col / steps) for name, total in totals.items()}
