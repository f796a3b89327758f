"""Preconditioner's scales from a run's own noisy sums: post-processing of releases.

The scales are refreshed every few steps. DP^2 (Li et al. 2023, arXiv 2212.00309) also refreshes a
preconditioner with delay, so that its noise averages out. The preconditioner of this module acts
before clipping in every step, and is of rank one.

The mean of the squared entries of a row of a noisy sum contains noise of known mean and small
variance, so this mean can be subtracted. The noisy sums are gradients of the stored weights. Each
noisy sum is divided by ``r c^T``, which gives the gradient of the full weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dp.models.scaled import Scale, change_scale, scaled_layers
from lowrank_dp.precondition.moments import Moment
from lowrank_dp.precondition.scaling import joint_scales

# power of the factor by which each entry of the optimizer's state changes with the gradients
_POWER_OF_FACTOR = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
_KEYS = ("row", "col", "row_variance", "col_variance")


class NoisyMoments:
    """Second moments of full-weight gradients, estimated from noisy sums of stored weights.

    Attributes:
        steps: number of noisy sums per matrix so far.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._sums: dict[str, dict[str, Tensor]] = {}

    def add(
        self, noisy: Mapping[str, Tensor], scales: Mapping[str, Scale], noise_std: float
    ) -> None:
        """Add the noisy sums of one step.

        Args:
            noisy: noisy sums (m, n) of the stored weights' gradients, by name.
            scales: scales of the layers in this step, by name.
            noise_std: standard deviation of the noise on each entry of ``noisy``, absolute.
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
        """Return the mean moments; each row or column mean is at least its standard error."""
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
        """Set the state to that of ``tensors``, a result of :meth:`tensors`."""
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
    """Give the scaled layers new scales, and rescale stored weights and optimizer state to match.

    The full weights, and therefore the outputs of the model, do not change. The momentum stays the
    same gradient of the full weights.

    Args:
        model: a model with scaled layers.
        optimizer: SGD, Adam or AdamW of the stored weights, with or without amsgrad.
        moments: moments of full-weight gradients, by the layer's name.
        power: exponent of :func:`joint_scales`, in [0, 0.5].
        equal_rows: as in :func:`joint_scales`.

    Raises:
        ValueError: in the cases of :func:`joint_scales`.
    """
    layers = scaled_layers(model)
    for name, scale in joint_scales(moments, power, equal_rows=equal_rows).items():
        factor = change_scale(layers[name], scale)
        state: dict[str, Any] = optimizer.state.get(layers[name].weight, {})
        for key, exponent in _POWER_OF_FACTOR.items():
            if isinstance(value := state.get(key), Tensor):
                value.mul_(factor.row[:, None] ** exponent).mul_(factor.col**exponent)
