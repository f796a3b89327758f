"""Scales from a run's own noisy sums, refreshed every few steps: post-processing of releases.

A preconditioner that is delayed, and so less noisy, is that of DP^2 (Li et al. 2023, arXiv
2212.00309); here it acts before clipping in every step, and is factored.

A row mean of n squared entries of a noisy sum holds noise of known mean and small variance, so the
noise's share can be subtracted. The noisy sums are those of the stored weights; each is brought
back to the metric of the full weights before it counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dp.models.scaled import Scale, change_scale, scaled_layers
from lowrank_dp.precondition.moments import Moment
from lowrank_dp.precondition.scaling import joint_scales

# how each entry of an optimizer's state changes if gradients are multiplied by a factor
_POWER_OF_FACTOR = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2}
_KEYS = ("row", "col", "row_variance", "col_variance")


class NoisyMoments:
    """Second moments of full-weight gradients, estimated from noisy sums of stored weights.

    Attributes:
        steps: number of sums per matrix so far.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._sums: dict[str, dict[str, Tensor]] = {}

    def add(
        self, noisy: Mapping[str, Tensor], scales: Mapping[str, Scale], noise_std: float
    ) -> None:
        """Add the sums of one step.

        Args:
            noisy: noisy sums (m, n) of the stored weights, by name.
            scales: the scales under which they were computed.
            noise_std: standard deviation of the noise on each entry, absolute.
        """
        for name, scale in scales.items():
            row, col = scale.row.double().square(), scale.col.double().square()
            excess = (noisy[name].double().square() - noise_std**2) / (row[:, None] * col)
            # the square of N(0, s^2) has variance 2 s^4
            variance = 2 * noise_std**4 / (row.square()[:, None] * col.square())
            m, n = excess.shape
            new = {
                "row": excess.mean(1),
                "col": excess.mean(0),
                "row_variance": variance.sum(1) / n**2,
                "col_variance": variance.sum(0) / m**2,
            }
            known = self._sums.setdefault(name, {key: torch.zeros_like(new[key]) for key in _KEYS})
            for key, value in new.items():
                known[key] += value
        self.steps += 1

    def moments(self) -> dict[str, Moment]:
        """Return the mean moments; a mean counts as its own standard error if it is below that."""
        return {
            name: Moment(
                *(
                    torch.maximum(sums[side], sums[f"{side}_variance"].sqrt()) / self.steps
                    for side in ("row", "col")
                )
            )
            for name, sums in self._sums.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors under flat names."""
        found = {
            f"{name}:{key}": value
            for name, sums in self._sums.items()
            for key, value in sums.items()
        }
        return found | {"steps": torch.tensor(self.steps)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`tensors`."""
        tensors = dict(tensors)
        self.steps, self._sums = int(tensors.pop("steps")), {}
        for key, value in tensors.items():
            name, _, kind = key.rpartition(":")
            self._sums.setdefault(name, {})[kind] = value.clone()


def refresh_scales(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    moments: Mapping[str, Moment],
    power: float,
    equal_rows: tuple[str, ...] = (),
) -> None:
    """Give the scaled layers new scales, and express weights and momentum in the new metric.

    The function of the model and the direction of the momentum, as a change of the full weights'
    gradient, stay the same.

    Args:
        model: a model with scaled layers.
        optimizer: SGD, Adam or AdamW of its stored weights.
        moments: moments of full-weight gradients, by the layer's name.
        power: as in :func:`joint_scales`.
        equal_rows: as in :func:`joint_scales`.
    """
    layers = scaled_layers(model)
    for name, scale in joint_scales(moments, power, equal_rows=equal_rows).items():
        factor = change_scale(layers[name], scale)
        state: dict[str, Any] = optimizer.state.get(layers[name].weight, {})
        for key, exponent in _POWER_OF_FACTOR.items():
            if isinstance(value := state.get(key), Tensor):
                value.mul_(factor.row[:, None] ** exponent).mul_(factor.col**exponent)
