"""Second computation of a preconditioner's scales from the releases, to check the run's scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lowrank_dp.models.scaled import Scale, scaled_layers
from lowrank_dp.precondition import NoisyMoments, joint_scales
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.preconditioning import class_rows


class ExpectedScales:
    """Scales that a run must have if its scales depend on public text or on releases alone.

    Scales from public text must stay as they are before the first step. Scales from noisy sums are
    computed a second time, from the releases that :meth:`add` receives.

    Args:
        model: the model before the first step, with or without scaled layers.
        config: configuration of the run.
    """

    def __init__(self, model: Any, config: TrainConfig) -> None:
        self._model, self._config = model, config
        self._expected = {
            name: Scale(layer.row_scale.clone(), layer.col_scale.clone())
            for name, layer in scaled_layers(model).items()
        }
        self._moments = NoisyMoments()

    def deviation(self) -> float:
        """Return the largest difference between a scale of the model and its expected value.

        The difference is relative to the expected value. For a model without scaled layers, the
        result is 0.
        """
        most = 0.0
        for name, layer in scaled_layers(self._model).items():
            for found, expected in zip(
                (layer.row_scale, layer.col_scale), self._expected[name], strict=True
            ):
                most = max(most, float(((found - expected).abs() / expected).max()))
        return most

    def add(self, released: Mapping[str, Tensor], noise_std: float) -> None:
        """Add the releases of one step. Call this method before the run refreshes its scales.

        Args:
            released: noisy sums of the stored weights, by parameter name.
            noise_std: standard deviation of the noise on each entry, absolute.
        """
        config = self._config
        if config.precondition != "noisy":
            return
        sums = {name: released[f"{name}.weight"] for name in self._expected}
        self._moments.add(sums, self._expected, noise_std)
        if self._moments.steps % config.precondition_every == 0:
            self._expected = {
                name: Scale(scale.row.to(sums[name].dtype), scale.col.to(sums[name].dtype))
                for name, scale in joint_scales(
                    self._moments.moments(),
                    config.precondition_power,
                    equal_rows=class_rows(self._model),
                ).items()
            }
