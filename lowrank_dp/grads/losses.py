"""Loss of each row of a micro-batch, recovered from the logits of one forward.

A model returns the mean loss of a batch. The functions here find the kind of loss whose mean equals
the model's own, and compute the loss of each row from the logits by ``lowrank_dp.losses``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lowrank_dp._terminal import first_line
from lowrank_dp.grads.factors import HALF_DTYPES, upcast
from lowrank_dp.grads.microbatch import Batch, MicroBatch, UnsupportedParameters, copy_rows
from lowrank_dp.grads.tolerances import loss_tolerance
from lowrank_dp.losses import IGNORE, LOSSES, losses_at_targets
from lowrank_dp.models.heads import without_adapter
from lowrank_dp.models.targets import run_at_targets, separate_head

APART = (
    "clipping each row does not bound the influence of a record on such a model; use a model that "
    'treats each row by itself, or backend="loop"'
)

# part of a transformers class name -> kind of loss; None: the config's problem_type names it
_LOSS_OF_CLASS = {
    "ForSequenceClassification": None,
    "ForTokenClassification": "each_token",
    "ForMaskedLM": "each_token",
    "ForCausalLM": "next_token",
    "LMHeadModel": "next_token",
}


def forward_losses(micro_batch: MicroBatch) -> Tensor:
    """Loss of each row alone (B,), from one forward.

    Raises:
        ValueError: if the mean of the losses is not the model's own loss, or the loss of the first
            row is not its loss alone.
    """
    labels, head = _labels(micro_batch), separate_head(micro_batch.model, micro_batch.batch)
    if head is not None and _is_frozen(head) and _is_next_token(micro_batch, labels):
        losses = _losses_at_targets(micro_batch, head)
    else:
        output = forward(micro_batch)
        _, losses = match_loss(
            micro_batch, getattr(output, "loss", None), getattr(output, "logits", None)
        )
    require_loss_alone(micro_batch, losses)
    return losses


def _is_frozen(layer: nn.Module) -> bool:
    return not any(p.requires_grad for p in layer.parameters())


def _is_next_token(micro_batch: MicroBatch, labels: Tensor) -> bool:
    """Return whether the class names the next-token loss, and every row has a target."""
    return (
        _kind_of_class(without_adapter(micro_batch.model)) == "next_token"
        and labels.ndim == 2
        and bool((labels[:, 1:] != IGNORE).any(1).all())
    )


def _losses_at_targets(micro_batch: MicroBatch, head: nn.Linear) -> Tensor:
    """Loss of each row (B,), from the logits at the targets alone."""
    output = forward(micro_batch, partial(run_at_targets, micro_batch.model, head, own_loss=True))
    if output.loss is None:
        fail_without_loss()
    losses, weights = losses_at_targets(
        upcast(output.logits), output.targets.to(output.logits.device)
    )
    micro_batch.require(losses.detach().isfinite(), "has a loss that is not finite")
    if not _is_mean(output.loss, losses, weights):
        _fail_other_loss("is none of")
    return losses


def forward(micro_batch: MicroBatch, run: Callable[[Batch], Any] | None = None) -> Any:
    """Output of the model on the micro-batch, or of ``run(batch)``, which runs the model.

    Raises:
        ValueError: naming the first row that the model cannot run by itself.
    """
    with micro_batch.autocast:
        try:
            return run(micro_batch.batch) if run else micro_batch.model(**micro_batch.batch)
        except (torch.OutOfMemoryError, UnsupportedParameters):
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            for row in range(micro_batch.num_rows):
                try:
                    with torch.no_grad():
                        micro_batch.model(**copy_rows(micro_batch.batch, [row]))
                except (IndexError, RuntimeError, ValueError) as reason:
                    raise ValueError(
                        f"batch row {micro_batch.first_row + row} cannot be run by the model "
                        f"({first_line(reason)}): correct its labels and ids"
                    ) from error
            raise


def require_loss_alone(micro_batch: MicroBatch, losses: Tensor) -> None:
    """Refuse a model whose loss of the first row depends on the other rows of the batch.

    ``losses`` (B,) are the rows' losses in the batch; ``micro_batch.loss_alone`` is the loss of the
    first row by itself. The message names the row but no loss, since the rows may be private.
    """
    if micro_batch.loss_alone is None:
        return
    own, here = float(micro_batch.loss_alone), float(losses[0].detach())
    half = micro_batch.loss_alone.dtype in HALF_DTYPES or not isinstance(
        micro_batch.autocast, nullcontext
    )
    if math.isfinite(own) and abs(own - here) > loss_tolerance(half) * max(1.0, abs(own)):
        raise ValueError(
            "model must keep the rows of a batch apart, and the loss of row "
            f"{micro_batch.first_row} is not the same alone and in the batch: {APART}"
        )


def check_labels(model: nn.Module, batch: Batch, first_row: int) -> None:
    """Refuse labels that are not classes of the model.

    The labels are checked before the model runs, since an index out of range ends the process on a
    GPU. Models whose kind of loss is unknown are not checked.

    Raises:
        ValueError: naming the first row (``first_row`` is added to its index) and its label.
    """
    base = without_adapter(model)
    labels, kind = batch.get("labels"), _kind_of_class(base)
    if not isinstance(labels, Tensor) or kind not in (
        "single_label_classification",
        "next_token",
        "each_token",
    ):
        return
    rows = labels.flatten(1) if labels.ndim > 1 else labels[:, None]
    if (
        labels.is_floating_point()
        and kind == "single_label_classification"
        and rows.shape[1] == base.config.num_labels
        and base.config.problem_type is None
    ):
        return  # transformers reads these labels as one 0 or 1 per class
    if labels.dtype != torch.int64:
        raise ValueError(
            f"batch row {first_row} has a label of {labels.dtype}: labels must be "
            "int64 classes or tokens (labels.long())"
        )
    if kind == "single_label_classification" and rows.shape[1] != 1:
        raise ValueError(
            f"batch row {first_row} has labels of shape {tuple(labels.shape[1:])}: "
            "a row must have one class"
        )
    classes = _num_classes(base, kind)
    bad = (rows < 0) | (rows >= classes) if classes else rows < 0
    bad = (bad & (rows != IGNORE)).any(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        wrong = next(
            int(label)
            for label in rows[row]
            if label != IGNORE and not 0 <= label < (classes or math.inf)
        )
        raise ValueError(
            f"batch row {first_row + row} has label {wrong}: labels must be from 0 to "
            + (f"{classes - 1}" if classes else "the number of classes less 1")
            + f", or {IGNORE} where there is no target"
        )


def _num_classes(base: Any, kind: str) -> int | None:
    """Number of classes of the model's head; None if the number is unknown."""
    if kind == "single_label_classification" or "ForTokenClassification" in type(base).__name__:
        return base.config.num_labels
    head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    return None if weight is None or weight.ndim != 2 else len(weight)


def match_loss(micro_batch: MicroBatch, own: Any, logits: Any) -> tuple[str, Tensor]:
    """Kind of loss whose weighted mean over the batch is the model's ``own``, and row losses (B,).

    Raises:
        ValueError: if the model gave no loss or no logits, or if not exactly one kind matches.
    """
    if own is None:
        fail_without_loss()
    if not isinstance(logits, Tensor):
        raise ValueError(
            "model must return .logits beside .loss, from which the loss of each "
            'example follows; backend="loop" needs only .loss'
        )
    logits, labels = upcast(logits), _labels(micro_batch).to(logits.device)
    matching = []
    for kind in _loss_kinds(micro_batch.model, logits, labels):
        losses, weights = row_losses(micro_batch, kind, logits)
        if _is_mean(own, losses, weights):
            matching.append((kind, losses))
    if len(matching) != 1:
        _fail_other_loss("fits several of" if matching else "is none of")
    return matching[0]


def _is_mean(own: Tensor, losses: Tensor, weights: Tensor) -> bool:
    """Return whether the model's ``own`` loss is the weighted mean of the rows' losses (B,)."""
    mean = float((losses.detach() * weights).sum() / weights.sum())
    tolerance = 2e-2 if own.dtype in HALF_DTYPES else 2e-5
    return math.isclose(mean, float(own.detach()), rel_tol=tolerance, abs_tol=1e-6)


def _fail_other_loss(found: str) -> NoReturn:
    raise ValueError(
        "model must have the plain classification, regression or token loss, a mean of one "
        f"term per example or token; its loss on this batch {found} "
        f'({", ".join(LOSSES)}): switch off what it adds, or use backend="loop"'
    )


def row_losses(micro_batch: MicroBatch, kind: str, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (B,) of one kind, and their weights (B,) in the mean loss of the batch.

    Raises:
        ValueError: naming the first row that has no target or no finite loss.
    """
    losses, weights = LOSSES[kind](logits, _labels(micro_batch).to(logits.device))
    micro_batch.require(weights > 0, f"has no target: every label is {IGNORE}")
    micro_batch.require(losses.detach().isfinite(), "has a loss that is not finite")
    return losses, weights


def _labels(micro_batch: MicroBatch) -> Tensor:
    labels = micro_batch.batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError(
            "batch must hold a tensor 'labels' for this backend, "
            f"got {', '.join(map(str, micro_batch.batch))}"
        )
    return labels


def _loss_kinds(model: Any, logits: Tensor, labels: Tensor) -> list[str]:
    """Kinds of loss that fit the shapes and, where it determines the loss, the model's class."""
    base = without_adapter(model)
    integer, rows = not labels.is_floating_point(), len(labels)
    fitting = {
        "single_label_classification": integer and labels.numel() == rows and logits.ndim == 2,
        "multi_label_classification": logits.ndim == 2 and labels.shape == logits.shape,
        "regression": logits.ndim <= 2 and labels.numel() == logits.numel(),
        "next_token": integer and logits.ndim == 3 and labels.shape == logits.shape[:2],
        "each_token": integer and logits.ndim == 3 and labels.shape == logits.shape[:2],
    }
    problem = getattr(getattr(base, "config", None), "problem_type", None)
    known = [
        kind or problem
        for part, kind in _LOSS_OF_CLASS.items()
        if _is_a(base, part) and (kind or problem)
    ][:1]
    return [
        kind
        for kind, fits in fitting.items()
        if fits and len(logits) == rows and (not known or kind in known)
    ]


def _is_a(base: Any, part: str) -> bool:
    """Return whether the name of the model's class, or of a base class, contains ``part``."""
    return any(part in ancestor.__name__ for ancestor in type(base).__mro__)


def _kind_of_class(base: Any) -> str | None:
    """Kind of loss of a transformers model, by its class and configuration; None if unknown."""
    for part, kind in _LOSS_OF_CLASS.items():
        if _is_a(base, part):
            config = base.config
            return (
                kind
                or config.problem_type
                or ("regression" if config.num_labels == 1 else "single_label_classification")
            )
    return None


def fail_without_loss() -> NoReturn:
    """Raise ``ValueError`` for a model whose output has no loss."""
    raise ValueError(
        "batch must hold the labels (a tensor 'labels') from which the model computes "
        "its .loss, got an output without loss"
    )
