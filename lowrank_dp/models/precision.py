"""Precision of forward and backward passes: its names, and the context that sets it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from lowrank_dp import _validate

# name of a precision -> dtype of mixed precision; None keeps the dtype of the model
AUTOCAST_DTYPES: dict[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16}


def autocast_dtype_of(precision: str) -> torch.dtype | None:
    """Return the dtype of mixed precision by its name; raises ValueError for another name."""
    _validate.choice("precision", precision, AUTOCAST_DTYPES)
    return AUTOCAST_DTYPES[precision]


def autocast(device: torch.device | str, dtype: torch.dtype | None) -> AbstractContextManager:
    """Return autocast to ``dtype`` on a device, or a context that does nothing for None.

    A context should cover one batch: it keeps the weights that it has cast until it ends.

    Raises:
        ValueError: if ``dtype`` is neither None nor bfloat16.
    """
    if dtype not in AUTOCAST_DTYPES.values():
        _validate.fail(
            "autocast_dtype", "None or torch.bfloat16 (float16 would need loss scaling)", dtype
        )
    return torch.autocast(torch.device(device).type, dtype) if dtype else nullcontext()
