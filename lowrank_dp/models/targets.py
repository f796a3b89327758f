"""Logits of a language model at the tokens that predict a target, and at no other token.

Of a prompt, of padding and of a row's last token, no logits enter the loss. Since a head treats
each token separately, the head may leave these tokens out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from lowrank_dp.losses import IGNORE, next_token_targets
from lowrank_dp.models.heads import without_adapter


@dataclass(frozen=True)
class TargetOutput:
    """Output of a model on a batch, at the N tokens that predict a target, row after row.

    Attributes:
        loss: the model's own loss, the mean over all targets; None if the model gives none.
        logits: (N, V).
        targets: (B, T), the token that each position predicts, or -100.
    """

    loss: Tensor | None
    logits: Tensor
    targets: Tensor


def separate_head(model: Any) -> nn.Linear | None:
    """Return the linear layer that gives the logits of a causal language model, or None.

    The model must declare ``logits_to_keep``, as transformers' causal language models do whose
    logits may be computed at some tokens only. A head with an adapter is not returned.
    """
    base = without_adapter(model)
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return None
    head = base.get_output_embeddings()
    return head if type(head) is nn.Linear else None


def run_at_targets(model: Any, head: nn.Linear, batch: Mapping[str, Any]) -> TargetOutput:
    """Run the model on a batch with ``labels`` (B, T); compute logits at the targets only.

    The head receives one row of N + 1 tokens: the N tokens that predict a target, and a token of
    zeros. The model receives their targets as the labels of this row, one token later, and so
    computes the mean loss that it computes on the whole batch.

    Raises:
        ValueError: if the head's input has no axes (B, T).
    """
    targets = next_token_targets(batch["labels"])
    chosen = targets != IGNORE

    def choose(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        (states,) = inputs
        if states.shape[:2] != chosen.shape:
            raise ValueError(
                f"the head's input has shape {tuple(states.shape)} for labels {tuple(chosen.shape)}"
            )
        return functional.pad(states[chosen.to(states.device)], (0, 0, 0, 1)).unsqueeze(0)

    labels = functional.pad(targets[chosen].unsqueeze(0), (1, 0), value=IGNORE)
    hook = head.register_forward_pre_hook(choose)
    try:
        output = model(**{**batch, "labels": labels})
    finally:
        hook.remove()
    logits: Tensor = output.logits
    return TargetOutput(getattr(output, "loss", None), logits[0, :-1], targets)
