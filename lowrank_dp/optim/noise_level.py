"""Key of the noise level in parameter groups, and the precision that a correction needs."""

from __future__ import annotations

from collections.abc import Iterable

import torch

NOISE_LEVEL = "mean_noise_std"  # absolute, in the units of ``p.grad``; read at every step


def require_full_precision(name: str, parameters: Iterable[torch.Tensor]) -> None:
    """Raise ``ValueError`` unless all parameters are float32 or float64.

    A correction is a small difference of two moments, which half precision does not hold.
    """
    for parameter in parameters:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} must be float32 or float64 for a correction for the noise, got "
                f"{parameter.dtype}: train in mixed precision by torch.autocast instead"
            )
