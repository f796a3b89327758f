"""Frobenius norms of noisy matrices, and the checks that need no other pass over the entries."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.restore.plan import ORDINARY
from lowrank_dp.spectrum.decomposition import to_unit


def finite_norms(noisy: Tensor) -> Tensor:
    """Check the matrices, and return their Frobenius norms (...,).

    A norm is finite only if all entries are, so one pass over the entries suffices.
    """
    _validate.matrix("noisy", noisy, check_finite=False)
    norms = frobenius_norms(noisy.detach())
    if not bool(norms.isfinite().all()):
        _validate.matrix("noisy", noisy)  # raises an error, unless only the norm overflowed
        raise ValueError(
            f"noisy must have a Frobenius norm that {noisy.dtype} can hold, got infinity"
        )
    return norms


def frobenius_norms(matrices: Tensor) -> Tensor:
    """Frobenius norms (...,), also where the square of an entry would vanish or overflow."""
    norms = torch.linalg.matrix_norm(matrices)
    if bool(((norms > 1 / ORDINARY) & (norms < ORDINARY)).all()):
        return norms
    unit, scale = to_unit(matrices)
    return torch.linalg.matrix_norm(unit) * scale.squeeze(-1)


def refuse_zeros(norms: Tensor, noise_std: float) -> None:
    """Raise ValueError if a norm is 0 and ``noise_std`` is not: the noise was not added."""
    if noise_std > 0 and bool((norms == 0).any()):
        raise ValueError(
            f"noisy must have a nonzero entry, got all zeros: noise of noise_std = "
            f"{noise_std:g} was not added to it"
        )


def is_ordinary(norms: Tensor, noise_std: float) -> bool:
    """Return whether squared singular values, also relative to the noise, are ordinary."""
    relative = norms.double() / (noise_std or 1.0)
    return all(bool(((x > 1 / ORDINARY) & (x < ORDINARY)).all()) for x in (norms, relative))
