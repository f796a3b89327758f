"""Logits of a language model at the tokens that predict a target, and at no other token.

The loss does not use the logits at a prompt's tokens (except its last), at padding, or at a row's
last token. A linear head treats each token separately, so the head may leave these tokens out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_dp.losses import (
    IGNORE,
    LOSS_OF_KIND,
    LOSSES,
    losses_at_targets,
    next_token_targets,
)
from lowrank_dp.models.heads import without_adapter

_ONCE = "model must run its output layer once, on all tokens, and return the layer's logits; "
_EXCLUDED = ("shift_labels", "logits_to_keep")  # entries of a batch that fit all tokens only


@dataclass(frozen=True)
class TargetOutput:
    """Output of a model on a batch, at the N tokens that predict a target, row after row.

    Attributes:
        loss: the model's own loss, the mean over all targets; None if no loss was asked for, or the
            model gives none.
        logits: (N, V).
        targets: (B, T), the token that each position predicts, or -100.
    """

    loss: Tensor | None
    logits: Tensor
    targets: Tensor


def separate_head(model: Any, batch: Mapping[str, Any] | None = None) -> nn.Linear | None:
    """Return the linear layer that gives the logits of a causal language model, or None.

    The model must declare ``logits_to_keep``, as do the causal language models of transformers that
    can compute logits at some tokens only. A head with an adapter is not returned, since its layers
    may be trained, and neither is the head of a compiled model, which may ignore hooks. The result
    is also None if ``batch`` is given and holds an entry that needs the logits of all tokens.
    """
    base = without_adapter(model)
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return None
    compiled = hasattr(base, "_orig_mod") or getattr(base, "_compiled_call_impl", None) is not None
    if compiled or any(name in (batch or ()) for name in _EXCLUDED):
        return None
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return head if type(head) is nn.Linear else None


def run_at_targets(
    model: Any, head: nn.Module, batch: Mapping[str, Any], *, own_loss: bool = False
) -> TargetOutput:
    """Run the model on a batch with ``labels`` (B, T); compute logits at the targets only.

    The head receives one row of N + 1 tokens: the N tokens that predict a target, and a token of
    zeros. With ``own_loss``, the model receives their targets as the labels of this row, one token
    later, and so computes the mean loss that it computes on the whole batch. Layers after the head
    must treat each token separately, too.

    A model that applies its head by other means than a call (a fused kernel) returns the logits of
    all tokens, of which those at the targets are taken; it can't be asked for its own loss.

    Raises:
        ValueError: if the model calls the head more than once, or not on states (B, T, d), or with
            ``own_loss`` not at all; or does not return the head's logits.
    """
    targets = next_token_targets(batch["labels"])
    chosen = targets != IGNORE
    seen: list[tuple[int, ...]] = []

    def choose(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        (states,) = inputs
        seen.append(tuple(states.shape[:2]))
        if seen[-1] != tuple(chosen.shape):
            raise ValueError(
                f"model must run its output layer on all tokens {tuple(chosen.shape)}, got "
                f"{seen[-1]}: remove what selects tokens from the batch"
            )
        return functional.pad(states[chosen.to(states.device)], (0, 0, 0, 1)).unsqueeze(0)

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if own_loss:
        inputs["labels"] = functional.pad(targets[chosen].unsqueeze(0), (1, 0), value=IGNORE)
    hook = head.register_forward_pre_hook(choose)
    try:
        output = model(**inputs)
    except ValueError as error:
        if seen or not own_loss:
            raise
        raise ValueError(_ONCE + f"it ran the layer 0 times ({error})") from error
    finally:
        hook.remove()
    logits, loss = getattr(output, "logits", None), getattr(output, "loss", None)
    expected = (1, int(chosen.sum()) + 1)
    if not isinstance(logits, Tensor):
        raise ValueError(
            "model must return .logits beside .loss, from which the loss of each example follows"
        )
    if not seen and not own_loss and logits.shape[:2] == chosen.shape:
        return TargetOutput(None, logits[chosen.to(logits.device)], targets)
    if len(seen) != 1 or logits.shape[:2] != expected:
        raise ValueError(
            _ONCE + f"it ran the layer {len(seen)} times and returned logits {tuple(logits.shape)}"
        )
    return TargetOutput(loss, logits[0, :-1], targets)


def logits_at_targets(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the logits (N, V) at the N tokens that predict a target, and the targets (B, T).

    ``batch`` holds ``labels`` (B, T). Without a :func:`separate_head`, these logits are taken from
    those of all tokens. Raises ValueError as :func:`run_at_targets` does.
    """
    head = separate_head(model, batch)
    if head is not None:
        output = run_at_targets(model, head, batch)
        return output.logits, output.targets
    targets = next_token_targets(batch["labels"])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return logits[(targets != IGNORE).to(logits.device)], targets


def row_losses(model: Any, batch: Mapping[str, Any], kind: str) -> Tensor:
    """Compute the loss of each row (B,), in float64 and in nats, or in squared units of a label.

    The model's own loss of a batch weights the rows of a language model by their numbers of
    targets, so its mean over a split depends on the micro-batches. The mean of these losses does
    not.

    Args:
        model: model with the head of the kind.
        batch: the model's inputs, with ``labels``.
        kind: kind of task, a key of ``losses.LOSS_OF_KIND``.

    Raises:
        ValueError: as :func:`run_at_targets` does.
    """
    name = LOSS_OF_KIND[kind]
    if name == "next_token":
        # float64 over a whole vocabulary would take most of the time
        logits, targets = logits_at_targets(model, batch)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return losses_at_targets(logits.to(dtype), targets)[0].double()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return LOSSES[name](model(**inputs).logits.double(), batch["labels"])[0]
