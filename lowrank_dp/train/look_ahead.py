"""Look-ahead of DiSK: gradients are computed ahead of the weights, along their last movement.

Let x_t be the weights, d = x_t - x_(t-1) their last movement, and kappa a gain. DiSK (Zhang et al.,
arXiv 2410.03883) releases the noisy sum of the clipped per-example gradients

    c grad f(x_t + gamma d) + (1 - c) grad f(x_t),    c = (1 - kappa) / (kappa gamma),

and filters the releases by ``restore.kalman_filter``. This module implements the case
gamma = (1 - kappa) / kappa, in which the second term is zero. Each example has one gradient, which
is computed at x_t + gamma d and clipped to the norm C. A step is therefore one release of
sensitivity C, as without DiSK. The point x_t + gamma d depends on earlier releases only. In the
first step, d is 0. (The authors' scripts take gamma = 0.5 at kappa = 0.7, for which the second term
has the weight 1/7.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LookAhead:
    """Look-ahead of a run, with the last movement of its parameters.

    Attributes:
        movement: parameter name -> ``x_t - x_(t-1)``; empty before the first step, and without
            DiSK. The movement is computed from releases, so the movement may be published.
    """

    def __init__(self, gamma: float | None) -> None:
        """Start without movement; ``gamma`` is the length in units of the movement, or None."""
        self._gamma = gamma
        self.movement: dict[str, Tensor] = {}

    @contextmanager
    def applied(self, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Move the parameters ahead within the block, and restore their exact values after it."""
        if self._gamma is None or not self.movement:
            yield
            return
        here = {name: p.detach().clone() for name, p in trained.items()}
        with torch.no_grad():
            for name, p in trained.items():
                p.add_(self.movement[name], alpha=self._gamma)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(here[name])

    @contextmanager
    def measured(self, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Record the movement of the parameters within the block."""
        if self._gamma is None:
            yield
            return
        before = {name: p.detach().clone() for name, p in trained.items()}
        yield
        self.movement = {name: p.detach() - before[name] for name, p in trained.items()}
