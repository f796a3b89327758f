"""Per-example loss functions, one per kind of task.

The formulas are those of transformers' heads. A function takes the logits and labels of a batch
and returns the loss of each row alone, so that the gradient of a row follows from its own loss.
B is rows, T positions, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

IGNORE = -100  # label without a target: torch's cross-entropy and transformers leave it out


def _token_mean(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over each row's own targets (B,), and the number of targets (B,)."""
    losses = functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    counts = targets.ne(IGNORE).view(len(targets), -1).sum(1)
    return losses.view(len(targets), -1).sum(1) / counts, counts


def next_token_targets(labels: Tensor) -> Tensor:
    """Return the token (B, T) that each position predicts, or ``IGNORE``, from labels (B, T)."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def losses_at_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over each row's own targets (B,), and the number of targets (B,).

    Args:
        logits: (N, V), at the N positions with a target, row after row.
        targets: (B, T) tokens, or ``IGNORE`` where there is no target.
    """
    chosen = targets != IGNORE
    each = functional.cross_entropy(logits, targets[chosen], reduction="none")
    losses = each.new_zeros(targets.shape).masked_scatter(chosen, each)
    counts = chosen.sum(1)
    return losses.sum(1) / counts, counts


def _next_token(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return _token_mean(logits, next_token_targets(labels))


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


# (logits, labels) -> (loss of each row (B,), weight of the row in the mean loss of a batch (B,)).
# Logits are (B, K), or (B, T, K) for the two token losses, whose labels are (B, T).
LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "single_label_classification": _single_label,
    "multi_label_classification": _multi_label,
    "regression": _squared_error,
    "next_token": _next_token,
    "each_token": _token_mean,
}

# kind of task -> name of its loss in LOSSES
LOSS_OF_KIND = {
    "classification": "single_label_classification",
    "regression": "regression",
    "generation": "next_token",
}
