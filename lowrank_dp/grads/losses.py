"""The loss of each row alone, from the logits that gave the model's own loss of the batch."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lowrank_dp.grads.factors import wide
from lowrank_dp.grads.microbatch import Batch, MicroBatch, UnsupportedParameters, copied
from lowrank_dp.losses import IGNORED, LOSSES

APART = (
    "no clipping of rows bounds what a record does to such a model; use a model that handles "
    'each row by itself, or backend="loop"'
)


# what transformers calls its models -> the loss; None: the config's problem_type says it
LOSS_OF_CLASS = {
    "ForSequenceClassification": None,
    "ForTokenClassification": "each_token",
    "ForMaskedLM": "each_token",
    "ForCausalLM": "next_token",
    "LMHeadModel": "next_token",
}


def forward_losses(work: MicroBatch) -> Tensor:
    """The model's loss on each row alone (B,), from one forward, checked against its own loss."""
    _labels(work)
    output = forward(work)
    losses = losses_of(work, getattr(output, "loss", None), getattr(output, "logits", None))[1]
    require_alone(work, losses)
    return losses


def forward(work: MicroBatch) -> Any:
    """The model's output on the batch; ``ValueError`` that names the first row it cannot run."""
    with work.autocast:
        try:
            return work.model(**work.batch)
        except (torch.OutOfMemoryError, UnsupportedParameters):
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            for row in range(work.num_rows):
                try:
                    with torch.no_grad():
                        work.model(**copied(work.batch, [row]))
                except (IndexError, RuntimeError, ValueError) as reason:
                    raise ValueError(
                        f"batch row {work.first_row + row} cannot be run by the model "
                        f"({first_line(reason)}): correct its labels and ids"
                    ) from error
            raise


def first_line(error: Exception) -> str:
    """The first line of an error's message, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def require_alone(work: MicroBatch, losses: Tensor) -> None:
    """Refuse a model whose loss of the first row depends on the rows beside it.

    ``losses`` are those in the batch (B,); ``work.alone`` is the first row's by itself, or None.
    The rows may be private, so the message names the row and none of the losses.
    """
    if work.alone is None:
        return
    own, here = float(work.alone), float(losses[0].detach())
    half = work.alone.dtype in (torch.bfloat16, torch.float16) or not isinstance(
        work.autocast, nullcontext
    )
    if math.isfinite(own) and abs(own - here) > loss_tolerance(half) * max(1.0, abs(own)):
        raise ValueError(
            "model must keep the rows of a batch apart, and the loss of row "
            f"{work.first_row} is not the same alone and in the batch: {APART}"
        )


def loss_tolerance(half: bool) -> float:
    """How far rounding may move a loss, relative to the loss or to 1."""
    return 5e-2 if half else 1e-4


def check_labels(model: nn.Module, batch: Batch, first_row: int) -> None:
    """Refuse labels that are no classes of the model, by the row; of other losses nothing is known.

    Looks at the labels alone, before the model sees them: on a GPU an index out of range ends the
    process.
    """
    base = _base(model)
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
        return  # a 0 or 1 for each class, as transformers reads it
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
    bad = (bad & (rows != IGNORED)).any(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        wrong = next(
            int(label)
            for label in rows[row]
            if label != IGNORED and not 0 <= label < (classes or math.inf)
        )
        raise ValueError(
            f"batch row {first_row + row} has label {wrong}: labels must be from 0 to "
            + (f"{classes - 1}" if classes else "the number of classes less 1")
            + f", or {IGNORED} where there is no target"
        )


def _num_classes(base: Any, kind: str) -> int | None:
    """How many classes the model's head tells apart; None where that is not known."""
    if kind == "single_label_classification" or "ForTokenClassification" in type(base).__name__:
        return base.config.num_labels
    head: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    return None if weight is None or weight.ndim != 2 else len(weight)


def losses_of(work: MicroBatch, own: Any, logits: Any) -> tuple[str, Tensor]:
    """The kind of loss whose mean is the model's ``own``, and each row's (B,)."""
    if own is None:
        no_loss()
    if not isinstance(logits, Tensor):
        raise ValueError(
            "model must return .logits beside .loss, from which the loss of each "
            'example follows; backend="loop" needs only .loss'
        )
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
            f"term an example or token; its loss on this batch {found} "
            f'({", ".join(LOSSES)}): switch off what it adds, or use backend="loop"'
        )
    return matching[0]


def row_losses(work: MicroBatch, kind: str, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and weights (B,), of one kind; refuses rows without a target or a finite loss."""
    losses, weights = LOSSES[kind](logits, _labels(work).to(logits.device))
    work.require(weights > 0, f"has no target: every label is {IGNORED}")
    work.require(losses.detach().isfinite(), "has a loss that is not finite")
    return losses, weights


def _labels(work: MicroBatch) -> Tensor:
    labels = work.batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError(
            "batch must hold a tensor 'labels' for this backend, "
            f"got {', '.join(map(str, work.batch))}"
        )
    return labels


def _loss_kinds(model: Any, logits: Tensor, labels: Tensor) -> list[str]:
    """The losses that the model may be using, by its class if that tells, and by shapes."""
    base = _base(model)
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
        for part, kind in LOSS_OF_CLASS.items()
        if _is_a(base, part) and (kind or problem)
    ][:1]
    return [
        kind
        for kind, fits in fitting.items()
        if fits and len(logits) == rows and (not known or kind in known)
    ]


def _base(model: Any) -> Any:
    """The model below a PEFT adapter, or the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_a(base: Any, part: str) -> bool:
    """Whether ``part`` is in the name of the model's class or of an ancestor."""
    return any(part in ancestor.__name__ for ancestor in type(base).__mro__)


def _kind_of_class(base: Any) -> str | None:
    """The loss that a transformers model is known to have by its class and configuration."""
    for part, kind in LOSS_OF_CLASS.items():
        if _is_a(base, part):
            config = base.config
            return (
                kind
                or config.problem_type
                or ("regression" if config.num_labels == 1 else "single_label_classification")
            )
    return None


def no_loss() -> NoReturn:
    """Raise: the model gave none."""
    raise ValueError(
        "batch must hold the labels (a tensor 'labels') from which the model computes "
        "its .loss, got an output without loss"
    )
