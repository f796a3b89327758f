"""Running means of noisy gradients, with a known noise level.

Restoring the running mean of a sequence of noisy gradients restores the momentum of an optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.signal import lfilter
from torch import Tensor

from lowrank_dp import _validate

_ROUNDING = 1e-9  # a sum of coefficients that is smaller, relative to its terms, counts as zero
_CHECKED_STEPS = 1000  # number of steps at which the response of a filter is checked


@dataclass(frozen=True)
class LowPassFilter:
    """Bias-corrected linear filter over a sequence of noisy gradients, with a known noise level.

    The output is ``m_t = sum_i b_i g_(t-i) - sum_i a_i m_(t-i)``, divided by the filter's response
    to a constant sequence of ones. The filter reads released gradients only, and so is
    post-processing. :func:`exponential_average` is a first-order filter; filters of higher order
    are those of DOPPLER (Zhang et al., arXiv 2408.13460).

    Attributes:
        b, a: coefficients of the last inputs and of the last outputs, the newest first.
        steady_start: whether the filter starts from the steady state of a constant input equal to
            the first input. If False, inputs and outputs before the first are zero.
        inputs, outputs: the last inputs and outputs, the newest first, as many as the coefficients
            refer to.
        weights: per kept output, the weight (t,) of every input so far, oldest first.
        noise_stds: (t,) standard deviation of the noise on an entry of each input, absolute.

    Raises:
        ValueError: on coefficients that are not a tuple of finite numbers; if the filter's response
            to a constant is zero, up to rounding, at a step at which the output would be divided by
            the response; on a steady start of a filter without a steady state (``1 + sum(a)`` is
            zero, up to rounding).

    >>> state = exponential_average(0.5).update(torch.ones(2, 2), 1.0).update(torch.ones(2, 2), 1.0)
    >>> state.mean[0, 0].item(), round(state.noise_std, 4)
    (1.0, 0.7454)
    """

    b: tuple[float, ...]
    a: tuple[float, ...] = ()
    steady_start: bool = False
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    weights: tuple[np.ndarray, ...] = ()
    noise_stds: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        for name, coefficients in (("b", self.b), ("a", self.a)):
            if not isinstance(coefficients, tuple):
                _validate.fail(name, "a tuple of numbers", coefficients)
            for value in coefficients:
                _validate.real(name, value)
        if not self.outputs:
            self._require_response()

    def _require_response(self) -> None:
        """Raise ValueError if the response to a constant vanishes, so that no mean is defined."""
        gain, feedback = sum(self.b), 1 + sum(self.a)
        if abs(gain) <= _ROUNDING * sum(map(abs, self.b)):
            _validate.fail("b", "coefficients whose sum is not zero", self.b)
        if self.steady_start:
            if abs(feedback) <= _ROUNDING * (1 + sum(map(abs, self.a))):
                wanted = "coefficients with 1 + sum(a) not zero for a steady start"
                _validate.fail("a", wanted, self.a)
            return
        with np.errstate(over="ignore", invalid="ignore"):
            response = lfilter(self.b, (1.0, *self.a), np.ones(_CHECKED_STEPS))
        vanishing = np.flatnonzero(~(np.abs(response) > _ROUNDING * sum(map(abs, self.b))))
        if len(vanishing):
            step = int(vanishing[0])
            raise ValueError(
                "b and a must give a response to a constant that is finite and not zero, got "
                f"{self.b} and {self.a}, whose response at step {step + 1} is {response[step]:.3g}"
            )

    def update(self, noisy: Tensor, noise_std: float) -> LowPassFilter:
        """Return the filter after one more noisy gradient.

        Args:
            noisy: float32 or float64, of the shape of the earlier gradients; copied.
            noise_std: standard deviation of the noise on each entry, absolute, >= 0.

        Raises:
            ValueError: on a bad argument.
        """
        noise_std = _validate.real("noise_std", noise_std, low=0)
        _validate.floating("noisy", noisy)
        if self.outputs and noisy.shape != self.outputs[0].shape:
            _validate.fail("noisy", f"of shape {tuple(self.outputs[0].shape)}", tuple(noisy.shape))
        if self.steady_start and not self.outputs:
            return self._steady(noisy.detach().clone(), noise_std)
        steps = len(self.noise_stds) + 1
        inputs = (noisy.detach().clone(), *self.inputs)[: len(self.b)]
        weight = np.zeros(steps)
        output = torch.zeros_like(noisy)
        for i, (b, tensor) in enumerate(zip(self.b, inputs, strict=False)):
            output = output.add(tensor, alpha=b)
            weight[max(steps - 1 - i, 0)] += b  # earlier inputs are copies of the first input
        for a, tensor, past in zip(self.a, self.outputs, self.weights, strict=False):
            output = output.sub(tensor, alpha=a)
            weight[: len(past)] -= a * past
        keep = max(len(self.a), 1)
        return replace(
            self,
            inputs=inputs[: len(self.b) - 1],
            outputs=(output, *self.outputs)[:keep],
            weights=(weight, *self.weights)[:keep],
            noise_stds=np.append(self.noise_stds, noise_std),
        )

    def _steady(self, noisy: Tensor, noise_std: float) -> LowPassFilter:
        """Return the filter in the steady state of the constant input ``noisy``."""
        gain, keep = sum(self.b) / (1 + sum(self.a)), max(len(self.a), 1)
        return replace(
            self,
            inputs=tuple(noisy.clone() for _ in self.b[1:]),
            outputs=tuple(noisy * gain for _ in range(keep)),
            weights=(np.array([gain]),) * keep,
            noise_stds=np.array([noise_std]),
        )

    @property
    def mean(self) -> Tensor:
        """Weighted mean of the gradients so far; the weights sum to one."""
        self._require_input()
        return self.outputs[0] / float(self.weights[0].sum())

    @property
    def noise_std(self) -> float:
        """Noise level of ``mean``, absolute: ``sqrt(sum (w_i noise_std_i)^2)``."""
        self._require_input()
        weight = self.weights[0] / self.weights[0].sum()
        return float(np.linalg.norm(weight * self.noise_stds))

    def tensors(self) -> dict[str, Tensor]:
        """Return the state without the coefficients, as tensors under flat names."""
        numbered = [
            ("input", self.inputs),
            ("output", self.outputs),
            ("weights", tuple(map(torch.from_numpy, self.weights))),
        ]
        state = {
            f"{kind}{i}": tensor for kind, tensors in numbered for i, tensor in enumerate(tensors)
        }
        return state | {"noise_stds": torch.from_numpy(self.noise_stds)}

    def with_tensors(
        self, state: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> LowPassFilter:
        """Return this filter in a state of :meth:`tensors`, copied to ``device``."""

        def numbered(kind: str) -> list[Tensor]:
            names = [name for name in state if name.rstrip("0123456789") == kind]
            return [state[f"{kind}{i}"].detach() for i in range(len(names))]

        return replace(
            self,
            inputs=tuple(t.to(device, copy=True) for t in numbered("input")),
            outputs=tuple(t.to(device, copy=True) for t in numbered("output")),
            weights=tuple(t.cpu().numpy().copy() for t in numbered("weights")),
            noise_stds=state["noise_stds"].cpu().numpy().copy(),
        )

    def _require_input(self) -> None:
        if not self.outputs:
            raise ValueError("LowPassFilter must have seen a gradient first: call update")


def exponential_average(beta: float) -> LowPassFilter:
    """Make the bias-corrected filter ``m_t = beta m_(t-1) + (1 - beta) g_t``, 0 <= beta < 1.

    Raises:
        ValueError: if ``beta`` is out of range.
    """
    beta = _validate.real("beta", beta, low=0, high=1, high_open=True)
    return LowPassFilter(b=(1 - beta,), a=(-beta,))


def kalman_filter(kappa: float) -> LowPassFilter:
    """Make DiSK's filter ``m_t = (1 - kappa) m_(t-1) + kappa g_t``, ``m_1 = g_1``, 0 < kappa <= 1.

    The filter is a Kalman filter with a constant gain (Zhang et al., arXiv 2410.03883). The first
    input keeps the weight ``(1 - kappa)^(t-1)``; :func:`exponential_average` corrects this bias,
    and this filter does not. DiSK also moves the point at which gradients are taken: see
    ``disk_kappa`` of ``TrainConfig``.

    Raises:
        ValueError: if ``kappa`` is out of range.
    """
    kappa = _validate.real("kappa", kappa, low=0, low_open=True, high=1)
    return LowPassFilter(b=(kappa,), a=(kappa - 1,), steady_start=True)
