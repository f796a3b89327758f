"""Eval mode without gradients, and the error for logits that are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode without gradients; restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class NotFinite(ValueError):
    """Logits that are not finite."""


def fail_not_finite(where: str) -> NoReturn:
    """Raise :class:`NotFinite`; ``where`` names the example."""
    raise NotFinite(
        f"model must give finite logits, got NaN or infinity for {where}: train it "
        "with a lower learning rate, or load it in float32"
    )
