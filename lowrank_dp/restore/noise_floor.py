"""Check that a gradient is large enough to hold its stated noise."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from scipy.special import gammaincinv
from torch import Tensor

from lowrank_dp import _validate


def require_noise(
    name: str, noisy: Tensor, noise_std: float, *, remedy: str = "add the noise first"
) -> None:
    """Raise ``ValueError`` if ``noisy`` is too small to hold noise of ``noise_std``, or not finite.

    A gradient that holds the noise is refused at most once in 1e12 draws. A gradient without the
    noise is accepted if its norm is large enough.

    Args:
        name: subject of the message, such as "gradient of parameter 0".
        noisy: floating-point tensor of any shape.
        noise_std: standard deviation of the noise on each entry, absolute, >= 0.
        remedy: last words of the message.
    """
    noise_std = _validate.real("noise_std", noise_std, low=0)
    if not noisy.is_floating_point():
        _validate.fail(name, "a floating-point tensor", noisy.dtype)
    # float64 also holds the squares of the smallest and largest entries of float32
    norm = float(torch.linalg.vector_norm(noisy, dtype=torch.float64))
    least = noise_std * least_norm(noisy.numel())
    if not math.isfinite(norm) and not bool(noisy.isfinite().all()):
        raise ValueError(f"{name} must have finite entries, got NaN or infinity")
    if norm < least:
        raise ValueError(
            f"{name} {tuple(noisy.shape)} must hold noise of standard deviation {noise_std:.4g} "
            f"per entry, whose norm is at least {least:.4g}, got norm {norm:.4g}: {remedy}"
        )


@lru_cache(maxsize=1024)
def least_norm(entries: int) -> float:
    """Nine tenths of the norm that standard normal noise falls below once in 1e12 draws.

    With a signal the squared norm is noncentral chi-squared, which is stochastically larger than
    the central law used here. The factor 0.9 allows for a noise level that is stated roughly.
    """
    return 0.9 * math.sqrt(2 * float(gammaincinv(entries / 2, 1e-12)))
