"""DP-Muon: orthogonalised momentum of noisy gradients, with an optional bias correction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.optim.noise_level import NOISE_LEVEL, require_full_precision

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Newton-Schulz coefficients of torch.optim.Muon
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon for matrices and AdamW for other parameters, on noisy gradients (arXiv 2605.12994).

    Muon keeps the running mean ``M <- momentum M + (1 - momentum) g`` of a matrix's noisy gradients
    and steps by ``W <- W - lr * .2 sqrt(max(m, n)) * T(M / |M|)``. T orthogonalises a matrix: five
    Newton-Schulz iterations map a singular value x to ``f(x)``, near 1. The step is that of
    ``torch.optim.Muon`` without Nesterov's term. Its scale matches AdamW, so that matrices and
    other parameters share one learning rate. Muon and AdamW read noisy gradients only, so their
    steps are post-processing.

    With ``bias_correction``, the step is that of DP-MuonBC. To leading order, noise of standard
    deviation tau on the entries of M shifts the mean of the orthogonalised matrix by ``tau^2 / 2``
    times the Laplacian of T. DP-MuonBC subtracts this shift (:func:`bias_corrected`).

    Only the abstract of the paper and a summary of DP-Muon were available, and neither gives the
    algorithm of DP-MuonBC. The correction of this class is derived from the abstract ("removes the
    leading output-level bias term" of a "matrix-valued heat-smoothing bias"). The paper clips the
    gradient of each matrix separately; ``lowrank_dp.train`` clips all parameters together.

    Args:
        matrices: parameters with two axes that Muon updates. Embeddings should be in ``others``.
        others: all other parameters, which AdamW updates.
        lr: learning rate of Muon and AdamW, > 0.
        momentum: decay of the running mean, and AdamW's beta1; in [0, 1).
        beta2: AdamW's beta2, in [0, 1).
        weight_decay: decoupled weight decay of Muon and AdamW, >= 0.
        bias_correction: whether to correct the orthogonalised matrix for the noise. The matrices
            must then be float32 or float64.
        mean_noise_std: standard deviation of the noise on each entry of ``p.grad``, absolute, in
            the units of ``p.grad``, >= 0. For a mean over a batch, this is ``noise_multiplier *
            max_grad_norm / batch_size``. Required with ``bias_correction``, and refused without.
            With it, the matrices' parameter group has an entry ``mean_noise_std``; assign a new
            value if the noise level changes.

    Raises:
        ValueError: on a bad argument.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor] = (),
        *,
        lr: float = 1e-3,
        momentum: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 0.0,
        bias_correction: bool = False,
        mean_noise_std: float | None = None,
    ) -> None:
        _validate.positive("lr", lr)
        _validate.real("weight_decay", weight_decay, low=0)
        for name, beta in (("momentum", momentum), ("beta2", beta2)):
            _validate.real(name, beta, low=0, high=1, high_open=True)
        if _validate.boolean("bias_correction", bias_correction):
            mean_noise_std = _validate.real(NOISE_LEVEL, mean_noise_std, low=0)
        elif mean_noise_std is not None:
            raise ValueError(f"{NOISE_LEVEL} must be left out without bias_correction")
        matrices, others = _tensors("matrices", matrices), _tensors("others", others)
        for matrix in matrices:
            if matrix.ndim != 2:
                _validate.fail("matrices", "parameters with two axes", tuple(matrix.shape))
        if bias_correction:
            require_full_precision("matrices", matrices)
        self._inner: list[torch.optim.Optimizer] = []
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        if matrices and bias_correction:
            self._inner.append(
                _BiasCorrected(matrices, **shared, momentum=momentum, std=mean_noise_std or 0.0)
            )
        elif matrices:
            self._inner.append(
                torch.optim.Muon(
                    matrices,
                    lr=lr,
                    weight_decay=weight_decay,
                    momentum=momentum,
                    nesterov=False,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others or not matrices:
            self._inner.append(torch.optim.AdamW(others, **shared, betas=(momentum, beta2)))
        super().__init__([group for inner in self._inner for group in inner.param_groups], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise ``ValueError`` after construction, since a group belongs to Muon or to AdamW."""
        if len(self.param_groups) == len(self._inner):
            raise ValueError(
                "Muon must be given all parameters when it is made, got another group: make a new "
                "Muon with the parameters among its matrices or others"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step along the gradients in ``.grad``; a closure is not accepted."""
        if closure is not None:
            raise ValueError("step must be called without a closure: .grad must contain the noise")
        for inner, group in zip(self._inner, self.param_groups, strict=True):
            # loading a state replaces param_groups and state
            inner.param_groups, inner.state = [group], self.state
            inner.step()


def _tensors(name: str, values: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors as a list; raise ValueError for groups, modules or named parameters."""
    found = list(values) if isinstance(values, Iterable) else [values]
    for value in found:
        if not isinstance(value, Tensor):
            _validate.fail(name, "an iterable of parameters", type(value).__name__)
    return found


class _BiasCorrected(torch.optim.Optimizer):
    """``torch.optim.Muon`` with :func:`bias_corrected` in place of the orthogonalised matrix."""

    def __init__(
        self,
        matrices: Sequence[Tensor],
        lr: float,
        weight_decay: float,
        momentum: float,
        std: float,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, NOISE_LEVEL: std}
        super().__init__(matrices, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        momentum, rate = group["momentum"], group["lr"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
                state["noise_variance"] = torch.zeros((), device=p.device)
            state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            own = ((1 - momentum) * group[NOISE_LEVEL]) ** 2
            state["noise_variance"].mul_(momentum**2).add_(own)
            update = bias_corrected(
                state["momentum_buffer"], math.sqrt(float(state["noise_variance"]))
            )
            p.mul_(1 - rate * group["weight_decay"])
            p.add_(update, alpha=-rate * 0.2 * math.sqrt(max(p.shape)))


def bias_corrected(matrix: Tensor, noise_std: float) -> Tensor:
    """Orthogonalise a noisy matrix, and subtract the leading bias that the noise causes.

    For noise Z of independent N(0, 1) entries, ``E T(M + tau Z) = T(M) + tau^2 / 2 * (Laplacian of
    T)(M) + O(tau^4)``. The result is ``T(N) - tau^2 / 2 * (Laplacian of T)(N)`` for the noisy N. T
    applies an odd function f to the singular values. The Laplacian of T also acts on the singular
    values alone: with m <= n and divided differences ``f[.]``, it maps ``x_i`` to

        f''(x_i) + sum over j != i of (f[x_i, x_i, x_j] + f[x_i, x_i, -x_j])
        + (n - m) (f'(x_i) / x_i - f(x_i) / x_i^2).

    Args:
        matrix: (m, n), float32 or float64.
        noise_std: standard deviation tau of the noise on each entry, absolute, >= 0.

    Returns:
        The corrected matrix, in the shape and type of ``matrix``. The norm ``|matrix|`` counts as a
        constant. A matrix of zeros gives zeros.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    wide = wide.double()
    norm = float(torch.linalg.matrix_norm(wide))
    if norm == 0:
        return torch.zeros_like(matrix)
    unit = wide / norm
    squares, u = torch.linalg.eigh(unit @ unit.mT)
    x = squares.clamp(min=1e-18).sqrt()
    values, slope, curvature = _newton_schulz(x)
    laplacian = curvature + _between(x, values, slope, curvature)
    laplacian += (wide.shape[1] - wide.shape[0]) * (slope / x - values / x**2)
    tau = noise_std / norm
    gains = (values - tau**2 / 2 * laplacian) / x
    result = (u * gains) @ (u.mT @ unit)
    return (result if wide.shape == matrix.shape else result.mT).to(matrix.dtype)


def _newton_schulz(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return f(x), f'(x) and f''(x) of the composed Newton-Schulz polynomials."""
    a, b, c = _COEFFICIENTS
    slope, curvature = torch.ones_like(x), torch.zeros_like(x)
    for _ in range(_ITERATIONS):
        first = a + 3 * b * x**2 + 5 * c * x**4
        second = 6 * b * x + 20 * c * x**3
        curvature = second * slope**2 + first * curvature
        slope = first * slope
        x = a * x + b * x**3 + c * x**5
    return x, slope, curvature


def _between(x: Tensor, values: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    """Return the sum over j != i of ``f[x_i, x_i, x_j] + f[x_i, x_i, -x_j]``."""
    total = torch.zeros_like(x)
    for sign in (1.0, -1.0):
        apart = x[:, None] - sign * x
        near = apart.abs() < 1e-6
        apart = torch.where(near, 1.0, apart)
        differences = (values[:, None] - sign * values) / apart
        terms = torch.where(near, curvature[:, None] / 2, (slope[:, None] - differences) / apart)
        total += terms.fill_diagonal_(0).sum(-1)
    return total
