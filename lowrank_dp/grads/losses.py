"""The loss of each row alone, from the logits that gave the model's own loss of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from lowrank_dp.grads.layers import wide
from lowrank_dp.grads.work import Work

IGNORED = -100  # the label that transformers leaves out of a loss


def _token_mean(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over each row's own targets, and their number."""
    losses = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(),
                                      ignore_index=IGNORED, reduction="none")
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
    losses = functional.binary_cross_entropy_with_logits(logits, labels.to(logits),
                                                         reduction="none")
    return losses.mean(1), labels.new_ones(len(logits))


# logits, labels -> each row's loss (B,) and its weight in the batch's loss (B,)
LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "single_label_classification": _single_label, "multi_label_classification": _multi_label,
    "regression": _squared_error, "next_token": _next_token, "each_token": _token_mean}
# what transformers calls its models -> the loss; None: the config's problem_type says it
LOSS_OF_CLASS = {
    "ForSequenceClassification": None, "ForTokenClassification": "each_token",
    "ForMaskedLM": "each_token", "ForCausalLM": "next_token", "LMHeadModel": "next_token"}


def forward_losses(work: Work) -> Tensor:
    """The model's loss on each row alone (B,), from one forward, checked against its own loss."""
    _labels(work)
    with work.autocast:
        output = work.model(**work.batch)
    return losses_of(work, getattr(output, "loss", None), getattr(output, "logits", None))[1]


def losses_of(work: Work, own: Any, logits: Any) -> tuple[str, Tensor]:
    """The kind of loss whose mean is the model's ``own``, and each row's (B,)."""
    if own is None:
        no_loss()
    if not isinstance(logits, Tensor):
        raise ValueError("model must return .logits beside .loss, from which the loss of each "
                         'example follows; backend="loop" needs only .loss')
    logits, labels = wide(logits), _labels(work).to(logits.device)
    matching = []
    for kind in _loss_kinds(work.model, logits, labels):
        losses, weights = row_losses(work, kind, logits)
        mean = float((losses.detach() * weights).sum() / weights.sum())
        tolerance = 2e-2 if own.dtype in (torch.bfloat16, torch.float16) else 2e-5
        if math.isclose(mean, float(own.detach()), rel_tol=tolerance, abs_tol=1e-6):
            matching.append((kind, losses))
    if len(matching) != 1:
        found = "fits several" if matching else "is another"
        raise ValueError(
            "model must have the plain classification, regression or token loss, a mean of one "
            f"term an example or token; its loss on this batch, {float(own.detach()):.6g}, {found} "
            f'({", ".join(LOSSES)}): switch off what it adds, or use backend="loop"')
    return matching[0]


def row_losses(work: Work, kind: str, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and weights (B,), of one kind; refuses rows without a target or a finite loss."""
    losses, weights = LOSSES[kind](logits, _labels(work).to(logits.device))
    work.require(weights > 0, f"has no target: every label is {IGNORED}")
    work.require(losses.detach().isfinite(), "has a loss that is not finite")
    return losses, weights


def _labels(work: Work) -> Tensor:
    labels = work.batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError("batch must hold a tensor 'labels' for this backend, "
                         f"got {', '.join(map(str, work.batch))}")
    return labels


def _loss_kinds(model: Any, logits: Tensor, labels: Tensor) -> list[str]:
    """The losses that the model may be using, by its class if that tells, and by shapes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    integer, rows = not labels.is_floating_point(), len(labels)
    fitting = {
        "single_label_classification": integer and labels.numel() == rows and logits.ndim == 2,
        "multi_label_classification": logits.ndim == 2 and labels.shape == logits.shape,
        "regression": logits.ndim <= 2 and labels.numel() == logits.numel(),
        "next_token": integer and logits.ndim == 3 and labels.shape == logits.shape[:2],
        "each_token": integer and logits.ndim == 3 and labels.shape == logits.shape[:2]}
    problem = getattr(getattr(base, "config", None), "problem_type", None)
    known = [kind or problem for ancestor in type(base).__mro__
             for part, kind in LOSS_OF_CLASS.items()
             if part in ancestor.__name__ and (kind or problem)][:1]
    return [kind for kind, fits in fitting.items()
            if fits and len(logits) == rows and (not known or kind in known)]


def no_loss() -> NoReturn:
    """Raise: the model gave none."""
    raise ValueError("batch must hold the labels (a tensor 'labels') from which the model computes "
                     "its .loss, got an output without loss")
