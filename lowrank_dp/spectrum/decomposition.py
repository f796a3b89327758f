"""Singular value decomposition of a matrix with a known noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.spectrum.random_matrix import bulk_edge

_CHUNK = 1 << 22  # number of entries that are converted to float64 at a time


@dataclass(frozen=True)
class Spectrum:
    """Singular value decomposition of ``matrix`` (..., m, n), and the noise level of its entries.

    The summaries are floats for one matrix, and tensors of the batch shape for several.

    Attributes:
        u: (..., m, k) left singular vectors, k = min(m, n).
        s: (..., k) singular values, descending.
        vh: (..., k, n) right singular vectors, as rows.
        noise_std: standard deviation of the noise on each entry, absolute; 0 for a clean matrix.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    noise_std: float

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix."""
        return self.u.shape[-2], self.vh.shape[-1]

    @property
    def edge(self) -> float:
        """Asymptotic bulk edge of pure noise, absolute: ``noise_std * (sqrt(m) + sqrt(n))``."""
        return bulk_edge(self.shape, self.noise_std)

    @property
    def num_above_edge(self) -> int | Tensor:
        """Number of singular values above the bulk edge."""
        return _plain((self.s > self.edge).sum(-1))

    @property
    def entropy(self) -> float | Tensor:
        """Shannon entropy, in nats, of the singular values normalised to sum to one."""
        return _plain(self._entropy())

    @property
    def effective_rank(self) -> float | Tensor:
        """``exp(entropy)``, between 1 and min(m, n) (Roy & Vetterli 2007)."""
        return _plain(self._entropy().exp())

    def _entropy(self) -> Tensor:
        p = self.s / self.s[..., :1]  # these sum to at most min(m, n): no overflow
        p = p / p.sum(-1, keepdim=True)
        return -torch.xlogy(p, p).sum(-1)

    @property
    def stable_rank(self) -> float | Tensor:
        """Squared Frobenius norm over squared operator norm, between 1 and min(m, n)."""
        return _plain(((self.s / self.s[..., :1]) ** 2).sum(-1))

    def overlap(self, clean: Spectrum) -> tuple[Tensor, Tensor]:
        """Squared cosines between the singular vectors of this spectrum and of ``clean``.

        NON-PRIVATE if ``clean`` comes from clean gradients. Vectors are paired by index, so equal
        singular values blur the pairs.

        Returns:
            ``(left, right)``, each (..., k).

        Raises:
            ValueError: if the shapes differ, those of the batches included.
        """
        own, other = ((*x.u.shape[:-1], x.vh.shape[-1]) for x in (self, clean))
        if own != other:
            _validate.fail("clean.shape", f"{own}", other)
        left = (self.u * clean.u).sum(-2) ** 2
        right = (self.vh * clean.vh).sum(-1) ** 2
        return left, right


def _plain(value: Tensor) -> Any:
    """Return a float or int for one matrix, the tensor itself for several."""
    return value.item() if value.ndim == 0 else value


def decompose(matrix: Tensor, noise_std: float) -> Spectrum:
    """Compute the exact thin SVD of ``matrix`` (..., m, n), batched over leading axes.

    Args:
        matrix: float32 or float64, finite, not all zero, on any device.
        noise_std: standard deviation of the noise on each entry, absolute (for a DP-SGD sum:
            ``noise_multiplier * max_grad_norm``); 0 for a clean matrix.

    Raises:
        ValueError: on another shape or type, NaN or infinity, a negative noise level, or an
            all-zero matrix, which has no spectrum.
    """
    _validate.matrix("matrix", matrix)
    noise_std = _validate.real("noise_std", noise_std, low=0)
    unit, scale = to_unit(matrix.detach())
    if bool((unit == 0).all(-1).all(-1).any()):
        raise ValueError("matrix must have a nonzero entry, got all zeros (no gradient reached it)")
    if unit.shape[-2] < unit.shape[-1]:  # LAPACK needs a third of the time for a tall matrix
        right, s, left = torch.linalg.svd(unit.mT, full_matrices=False)
        u, vh = left.mT, right.mT
    else:
        u, s, vh = torch.linalg.svd(unit, full_matrices=False)
    s = s * scale
    if not bool(s.isfinite().all()):
        raise ValueError(
            f"matrix must have singular values that {matrix.dtype} can hold, got infinity"
        )
    return Spectrum(u, s, vh, noise_std)


def to_unit(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Divide matrices (..., m, n) by powers of two that bring their largest entries to [1, 2).

    Squares of the result neither overflow nor vanish, and nothing is rounded. An all-zero matrix
    is divided by 1.

    Returns:
        The divided matrices, and the powers of two (..., 1).
    """
    largest = matrices.abs().amax((-2, -1)).double()
    exponent = torch.frexp(largest).exponent - 1
    scale = torch.where(largest > 0, torch.exp2(exponent.double()), 1.0).to(matrices.dtype)
    return matrices / scale[..., None, None], scale.unsqueeze(-1)


def alignment(a: Tensor, b: Tensor) -> float:
    """Compute the cosine, in [-1, 1], between two tensors of one shape.

    Raises:
        ValueError: if a tensor is all zero or not finite, or the shapes differ.
    """
    _validate.floating("a", a)
    _validate.floating("b", b)
    if a.shape != b.shape:
        _validate.fail("b.shape", f"{tuple(a.shape)}", tuple(b.shape))
    scales = [_power_of_two(x) for x in (a, b)]
    for name, scale in zip("ab", scales, strict=True):
        if scale == 0:
            raise ValueError(f"{name} must have a nonzero entry: no angle to an all-zero matrix")
    dot = a_squared = b_squared = 0.0
    for pair in zip(a.flatten().split(_CHUNK), b.flatten().split(_CHUNK), strict=True):
        x, y = (part.double() / scale for part, scale in zip(pair, scales, strict=True))
        dot += float(x @ y)
        a_squared += float(x @ x)
        b_squared += float(y @ y)
    return max(-1.0, min(1.0, dot / math.sqrt(a_squared * b_squared)))


def _power_of_two(x: Tensor) -> float:
    """Return the power of two that scales the largest entry of a tensor to [1, 2); 0 for zeros."""
    low, high = x.aminmax()
    largest = max(-float(low), float(high))
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest else 0.0
