"""Loss functions per kind of task, and the label that they leave out."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

IGNORED = -100  # the label that transformers leaves out of a loss


def _token_mean(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over each row's own targets, and their number."""
    losses = functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    counts = targets.ne(IGNORED).view(len(targets), -1).sum(1)
    return losses.view(len(targets), -1).sum(1) / counts, counts


def _next_token(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return _token_mean(logits, functional.pad(labels[:, 1:], (0, 1), value=IGNORED))


def _single_label(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return _token_mean(logits, labels.view(len(logits)))


def _squared_error(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses = functional.mse_loss(logits, labels.view_as(logits).to(logits), reduction="none")
    return losses.view(len(logits), -1).mean(1), labels.new_ones(len(logits))


def _multi_label(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses = functional.binary_cross_entropy_with_logits(
        logits, labels.to(logits), reduction="none"
    )
    return losses.mean(1), labels.new_ones(len(logits))


# logits, labels -> each row's loss (B,) and its weight in the batch's loss (B,)
LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "single_label_classification": _single_label,
    "multi_label_classification": _multi_label,
    "regression": _squared_error,
    "next_token": _next_token,
    "each_token": _token_mean,
}


# the name in grads.LOSSES of each kind of task's loss
LOSS_OF_KIND = {
    "classification": "single_label_classification",
    "regression": "regression",
    "generation": "next_token",
}


IGNORE = -100  # the label that torch's cross-entropy leaves out
