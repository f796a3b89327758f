"""Restoration of all gradients of a model, step by step, with or without running means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.restore.low_pass import LowPassFilter
from lowrank_dp.restore.oracle import oracle_values
from lowrank_dp.restore.plan import check_arguments
from lowrank_dp.restore.restoration import Report, restore_with_report
from lowrank_dp.restore.schemes import SCHEMES

Tensors = Mapping[str, Tensor]
Distribute = Callable[[Callable[[Tensors], Tensors], Tensors], Tensors]


def restore_gradients(
    noisy: Tensors,
    noise_std: float | Mapping[str, float],
    scheme: str = "optimal",
    *,
    clean: Tensors | None = None,
    **arguments: Any,
) -> tuple[dict[str, Tensor], dict[str, Report]]:
    """Restore every matrix among the noisy gradients of a model; other tensors pass unchanged.

    Args:
        noisy: parameter name -> gradient. Matrices with both sides above 1 are restored, on a GPU
            in one batch per shape, type and noise level.
        noise_std: standard deviation of the noise on each entry, absolute: one number for all
            gradients, or a number per name.
        scheme: a name in ``SCHEMES``.
        clean: NON-PRIVATE: clean gradients under the same names, from which the scheme oracle
            takes its values (kind "weights"); also of matrices with a side of 1. None for every
            other scheme.
        arguments: keyword arguments of :func:`restore`.

    Returns:
        The gradients under the same names in the same order, and a report per matrix.

    Raises:
        ValueError: as :func:`restore`, naming the gradient; on ``clean`` with a private scheme; and
            on a gradient without a noise level or without a clean gradient.
    """
    if clean is not None and SCHEMES[_validate.choice("scheme", scheme, SCHEMES)].private:
        raise ValueError(f"clean must not be given for the private scheme {scheme!r}")
    noise_stds = noise_std if isinstance(noise_std, Mapping) else dict.fromkeys(noisy, noise_std)
    restored = dict(noisy)
    reports: dict[str, Report] = {}
    for names in _batches(noisy, noise_stds, clean):
        matrices = [noisy[name] for name in names]
        try:
            if clean is not None:
                values = [
                    oracle_values(matrix, clean[name])
                    for name, matrix in zip(names, matrices, strict=True)
                ]
                arguments = arguments | {"values": torch.stack(values)}
            # a single matrix need not be copied
            batch = torch.stack(matrices) if len(names) > 1 else matrices[0].unsqueeze(0)
            batch, report = restore_with_report(batch, noise_stds[names[0]], scheme, **arguments)
        except ValueError as error:
            raise ValueError(f"gradient of {', '.join(names)}: {error}") from error
        restored.update(zip(names, batch, strict=True))
        reports.update(zip(names, report, strict=True))
    return restored, {name: reports[name] for name in noisy if name in reports}


def _batches(
    noisy: Tensors, noise_stds: Mapping[str, float], clean: Tensors | None
) -> list[list[str]]:
    """Names of the matrices that are restored in one batch; on a CPU, each matrix by itself."""
    smallest_side = 2 if clean is None else 1
    batches: dict[tuple, list[str]] = {}
    for name, tensor in noisy.items():
        if not isinstance(tensor, Tensor):
            _validate.fail(f"gradient of {name}", "a torch tensor", type(tensor).__name__)
        if is_matrix(tensor, smallest_side):
            for given, values in (("noise_std", noise_stds), ("clean", clean)):
                if values is not None and name not in values:
                    raise ValueError(f"{given} must hold every matrix of noisy, got no {name!r}")
            alike = (tensor.shape, tensor.dtype, tensor.device, noise_stds[name])
            batches.setdefault((name,) if tensor.device.type == "cpu" else alike, []).append(name)
    return list(batches.values())


def is_matrix(tensor: Tensor, smallest_side: int = 2) -> bool:
    """Return whether a gradient is restored: a matrix with both sides >= ``smallest_side``.

    Vectors, and gradients of three or more axes, are left unchanged.
    """
    return tensor.ndim == 2 and min(tensor.shape) >= smallest_side


class GradientRestorer:
    """Restorer of the noisy gradients of successive steps, with running means as state.

    With a ``low_pass`` filter, the running mean of each parameter's noisy gradients takes the place
    of the gradient before the restoration. Running means over different numbers of steps hold
    different noise; each is restored at its own noise level. All state is computed from noisy
    gradients, so the restoration is post-processing (except for the scheme oracle).

    Attributes:
        filters: parameter name -> running mean of its noisy gradients so far; empty without
            ``low_pass``.
        reports: parameter name -> report of the last restoration, for each matrix that this process
            restored.
    """

    def __init__(
        self, scheme: str = "optimal", *, low_pass: LowPassFilter | None = None, **arguments: Any
    ) -> None:
        """Check the arguments; raise ``ValueError`` on a bad argument.

        Args:
            scheme: a name in ``SCHEMES``.
            low_pass: the filter before its first input, or None for no running mean.
            arguments: keyword arguments of :func:`restore`.
        """
        # the values of the oracle come from the clean gradients of each step
        self._scheme = SCHEMES[_validate.choice("scheme", scheme, SCHEMES)]
        if self._scheme.private:
            check_arguments(scheme, **arguments)
        if low_pass is not None and not isinstance(low_pass, LowPassFilter):
            _validate.fail("low_pass", "a LowPassFilter", type(low_pass).__name__)
        if low_pass is not None and low_pass.outputs:
            raise ValueError("low_pass must be a filter without inputs so far: make a new filter")
        self._scheme_name, self._arguments, self._low_pass = scheme, arguments, low_pass
        self.filters: dict[str, LowPassFilter] = {}
        self.reports: dict[str, Report] = {}

    def restore(
        self,
        noisy: Tensors,
        noise_std: float,
        *,
        clean: Tensors | None = None,
        distribute: Distribute | None = None,
    ) -> Tensors:
        """Restore the gradients of one step, or their running means, and advance the state.

        If an error is raised, the state stays as it was.

        Args:
            noisy: parameter name -> noisy gradient of this step. Running means of parameters
                without a gradient in this step stay as they are.
            noise_std: standard deviation of the noise on each entry of ``noisy``, absolute.
            clean: NON-PRIVATE: clean gradients for the scheme oracle, None for every other scheme.
            distribute: function ``(work, gradients)`` that shares ``work``, which treats each
                matrix by itself, among processes; None does the work in this process.

        Returns:
            The restored gradients, or restored running means, by parameter name.

        Raises:
            ValueError: as :func:`restore_gradients`.
        """
        filters = self._advanced(noisy, noise_std)
        gradients = {name: low_pass.mean for name, low_pass in filters.items()} or noisy
        noise_stds = {name: low_pass.noise_std for name, low_pass in filters.items()} or noise_std
        reports: dict[str, Report] = {}

        def work(some: Tensors) -> Tensors:
            restored, of_matrices = restore_gradients(
                some, noise_stds, self._scheme_name, clean=clean, **self._arguments
            )
            reports.update(of_matrices)
            return restored

        restored = gradients
        if not self._scheme.is_identity:
            restored = work(gradients) if distribute is None else distribute(work, gradients)
        self.filters |= filters
        self.reports = reports
        return restored

    def noise_std(self, noise_std: float) -> float:
        """Return the noise level of the last filtered gradients before restoration, absolute.

        Args:
            noise_std: standard deviation of the noise on an entry of the noisy gradients, absolute.
                Without a filter, this value is returned. With a filter, every parameter must have
                had a gradient in every step.
        """
        return next((low_pass.noise_std for low_pass in self.filters.values()), noise_std)

    def _advanced(self, noisy: Tensors, noise_std: float) -> dict[str, LowPassFilter]:
        """Filters of the parameters in ``noisy`` after this step; empty without ``low_pass``."""
        start = self._low_pass
        if start is None:
            return {}
        return {
            name: self.filters.get(name, start).update(gradient, noise_std)
            for name, gradient in noisy.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the state: ``NAME.KEY`` -> tensor, with the keys of `LowPassFilter.tensors`.

        The state is computed from noisy gradients, so it may be published. The tensors can be saved
        by safetensors.
        """
        return {
            f"{name}.{key}": tensor
            for name, low_pass in self.filters.items()
            for key, tensor in low_pass.tensors().items()
        }

    def load_tensors(self, tensors: Tensors, parameters: Tensors) -> None:
        """Continue from a state of :meth:`tensors`.

        Args:
            tensors: the state; copied to the devices of the parameters.
            parameters: name -> parameter. States under other names are left out.
        """
        states: dict[str, dict[str, Tensor]] = {}
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition(".")
            if name in parameters:
                states.setdefault(name, {})[key] = tensor
        if self._low_pass is not None:
            self.filters = {
                name: self._low_pass.with_tensors(state, parameters[name].device)
                for name, state in states.items()
            }
