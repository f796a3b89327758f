"""Checked arguments of one restoration, and the levels that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.restore.schemes import SCHEMES, Scheme
from lowrank_dp.spectrum.random_matrix import NoiseModel, check_rate, check_sides

ORDINARY = 1e12  # float32 holds the square of this number, and the inverse of the square


@dataclass(frozen=True)
class Plan:
    """Checked arguments of a restoration of matrices (L, m, n), with defaults and levels.

    Attributes:
        scheme, options: the scheme, and all its options.
        noise: noise on every entry, absolute.
        method: "fast" or "exact".
        below: "keep" or "zero".
        edge: singular values at or below this level are treated as noise, absolute.
        activation_level: the top singular value must exceed this level for the scheme to act,
            absolute.
        bulk_factor: factor by which the scheme multiplies values up to the edge.
    """

    scheme: Scheme
    options: dict[str, Any]
    noise: NoiseModel
    method: str
    below: str
    edge: float
    activation_level: float
    bulk_factor: float

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of each matrix."""
        return self.noise.shape[-2], self.noise.shape[-1]

    @property
    def needs_all_values(self) -> bool:
        """Whether the scheme needs more singular values than the leading ones."""
        return self.scheme.needs_all_values(self.shape, self.options)

    @property
    def count(self) -> int:
        """Number of leading singular values that the scheme keeps whatever their size, or 1."""
        return self.options.get("k", 1)

    def new_values(self, s: Tensor, norm: Tensor) -> Tensor:
        """Values of the scheme in place of ``s`` (L, k), which may be the leading values only.

        ``norm`` (L,) holds the Frobenius norms of the matrices.
        """
        extra: dict[str, Any] = {"norm": norm} if self.scheme.reads_norm else {}
        # the scheme itself leaves out values up to the bulk edge
        if self.scheme.reads_level and self.edge > self.noise.edge:
            extra["level"] = self.edge
        if self.needs_all_values or not self.scheme.reads_noise_level:
            return self.scheme.new_values(s, self.noise, **self.options, **extra)
        above = s > self.edge
        new = self.scheme.new_values(
            torch.where(above, s, 0.0), self.noise, **self.options, **extra
        )
        return torch.where(above, new, self.bulk_factor * s)

    def leaves_alone(self, top: Tensor) -> Tensor:
        """Return whether the scheme leaves a matrix with top singular value ``top`` unchanged.

        ``top`` and the result have one entry per matrix.
        """
        if not self.scheme.reads_noise_level:
            return torch.zeros_like(top, dtype=torch.bool)
        return top <= self.activation_level

    def of_matrices(self, first: int, last: int) -> Plan:
        """Return the plan for the matrices ``first`` to ``last - 1`` of the batch."""
        if not self.scheme.per_matrix:
            return self
        own = {
            name: self.options[name].reshape(-1, min(self.shape))[first:last]
            for name in self.scheme.per_matrix
        }
        return replace(self, options=self.options | own)

    def in_units_of(self, unit: float) -> Plan:
        """Return the plan for the same matrices divided by ``unit``.

        Raises ``ValueError`` if the noise is below 1e-12 of ``unit`` and decides the new values.
        """
        own = {name: self.options[name] / unit for name in self.scheme.per_matrix}
        noise_std = edge = activation_level = 0.0
        if self.scheme.is_noise_sized and self.noise.noise_std < unit / ORDINARY:
            raise ValueError(
                f"noise_std must be at least {1 / ORDINARY:g} times the largest entry for scheme "
                f"'{self.scheme.new_values.__name__}', whose result has the size of the noise, got "
                f"{self.noise.noise_std:g}"
            )
        if self.noise.noise_std > 0:  # beyond these bounds, the ratio makes no difference
            noise_std = min(max(self.noise.noise_std / unit, 1 / ORDINARY), ORDINARY)
            edge, activation_level = (
                level / self.noise.noise_std * noise_std
                for level in (self.edge, self.activation_level)
            )
        return replace(
            self,
            options=self.options | own,
            noise=NoiseModel(self.noise.shape, noise_std),
            edge=edge,
            activation_level=activation_level,
        )


def check_arguments(
    scheme: str = "optimal",
    shape: tuple[int, ...] | None = None,
    /,
    *,
    method: str = "fast",
    below: str = "keep",
    false_spike_rate: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Check the arguments of :func:`restore` other than the matrix and its noise level.

    ``shape`` (..., m, n) is the shape of the noisy matrices, or None where the shape is not known.

    Returns:
        The options of the scheme, with defaults filled in.

    Raises:
        ValueError: naming the argument.
    """
    _validate.choice("scheme", scheme, SCHEMES)
    _validate.choice("method", method, ["fast", "exact"])
    _validate.choice("below", below, ["keep", "zero"])
    if false_spike_rate is not None:
        check_rate(false_spike_rate)
        if not SCHEMES[scheme].reads_noise_level:
            raise ValueError(
                f"false_spike_rate must be left out for scheme {scheme!r}, which treats no value "
                "as noise"
            )
    return SCHEMES[scheme].complete(options, shape)


def make_plan(
    shape: tuple[int, ...],
    noise_std: float,
    scheme: str = "optimal",
    /,
    *,
    method: str = "fast",
    below: str = "keep",
    false_spike_rate: float | None = None,
    **options: Any,
) -> Plan:
    """Make the plan for matrices (..., m, n); raise ``ValueError`` on a bad argument."""
    options = check_arguments(
        scheme,
        shape,
        method=method,
        below=below,
        false_spike_rate=false_spike_rate,
        **options,
    )
    chosen = SCHEMES[scheme]
    noise_std = _validate.real("noise_std", noise_std, low=0, low_open=chosen.reads_noise_level)
    noise = NoiseModel(check_sides(shape), noise_std)
    edge = noise.edge
    if false_spike_rate is not None:
        edge = max(edge, noise.false_spike_level(float(false_spike_rate)))
    activation_level = max(edge, chosen.activation_factor(options) * noise.edge)
    bulk_factor = chosen.bulk_factor(options)
    return Plan(chosen, options, noise, method, below, edge, activation_level, bulk_factor)
