"""Measure a checkpoint's signals of each record: one forward pass, in eval mode.

A checkpoint is a Hugging Face folder, full or PEFT. The reference is the model before fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_dp.data import IGNORE, Example, Task, encode, micro_batches
from lowrank_dp.grads.clipping import clipped_sum_over
from lowrank_dp.losses import LOSS_OF_KIND, LOSSES
from lowrank_dp.mia import scores, token_scores
from lowrank_dp.mia._arrays import Array
from lowrank_dp.models.memory import rows_that_fit
from lowrank_dp.models.precision import autocast, autocast_dtype_of
from lowrank_dp.models.targets import logits_at_targets

# Number of logits that are scored at a time, in float64, on a CPU and on a GPU. On a CPU, the
# intermediate results then fit the processor's cache, in memory that is used again.
LOGITS_IN_CACHE, LOGITS_IN_MEMORY = 2**19, 2**24

AddInputs = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Tensor]], Any]
_Score = Callable[[Tensor, Tensor], dict[str, Tensor]]  # logits (T, V), ids (T,) -> values (T,)


@dataclass(frozen=True)
class Signals:
    """One value per record, (N,), float64; a field that a task does not have is empty, (0,).

    Attributes:
        loss: the model's loss: the cross-entropy of the label in nats, the squared error, or the
            mean cross-entropy of the target's tokens in nats.
        reference_loss: the loss of the model before fine-tuning, if that model is known.
        correct: 1 if the label has strictly the largest logit, else 0 (classification).
        phi: logit confidence of the label, or of exp(-loss) for texts; -loss for regression.
        min_k, min_k_plus_plus: scores of the target's tokens (causal language models).
        error_zone: score against the model before fine-tuning (causal language models).
    """

    loss: Array
    reference_loss: Array
    correct: Array
    phi: Array
    min_k: Array
    min_k_plus_plus: Array
    error_zone: Array


@dataclass(frozen=True)
class Reference:
    """What other signals are compared with, measured on the model before fine-tuning.

    Attributes:
        loss: loss of each record, (N,), as in :class:`Signals`.
        log_p: log-probability in nats of each token of the targets, record after record, (T,);
            empty, (0,), for a task without texts to generate.
        num_tokens: number of these tokens of each record, (N,) or (0,).
    """

    loss: Array
    log_p: Array
    num_tokens: Array

    def by_record(self) -> list[Array]:
        """Return the log-probabilities of each record; no list for a task without texts."""
        return np.split(self.log_p, np.cumsum(self.num_tokens)[:-1]) if len(self.log_p) else []


def measure(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    max_length: int | None = None,
    pad_to: int | None = None,
    batch_size: int = 64,
    precision: str = "float32",
    reference: Reference | None = None,
    template: str | None = None,
    add_inputs: AddInputs | None = None,
) -> Signals:
    """Measure the signals of ``examples``, in their order, by one forward pass of ``model``.

    Args:
        model, tokenizer: a checkpoint's model and tokenizer.
        task, examples: the records and their task.
        max_length, template: as in ``data.encode``.
        pad_to: length that every row is padded to, as in training; None pads to the longest row of
            the batch.
        batch_size: number of records per forward pass. If their logits would take more than 4 GiB,
            fewer records are taken.
        precision: precision of the forward pass: "float32", or "bf16" for bf16 autocast. Scores are
            computed from the logits in float64.
        reference: :func:`measure_reference` of the same records and arguments, on the model before
            fine-tuning.
        add_inputs: as in ``evaluation.evaluate``.

    Raises ValueError with the records' ids if a loss is not finite; no record is dropped.
    """
    encoding: dict[str, Any] = {"max_length": max_length, "pad_to": pad_to, "template": template}
    found = {field.name: np.full(len(examples), np.nan) for field in fields(Signals)}
    log_p = reference.by_record() if reference is not None else []
    for indices, logits, targets in _forward(
        model, tokenizer, task, examples, batch_size, precision, add_inputs, **encoding
    ):
        other = [log_p[i] for i in indices] if log_p else None
        for name, values in _SIGNALS[task.kind](logits, targets, other).items():
            found[name][indices] = values
    if reference is not None:
        found["reference_loss"] = reference.loss
    _require_finite(examples, found, with_reference=reference is not None)
    empty = np.zeros(0)
    return Signals(
        **{name: empty if np.isnan(values).any() else values for name, values in found.items()}
    )


def measure_reference(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    precision: str = "float32",
    **encoding: Any,
) -> Reference:
    """Measure the model before fine-tuning on ``examples``; the arguments are those of `measure`.

    A loss that is not finite is an error of `measure`, which reads the result.
    """
    loss = np.full(len(examples), np.nan)
    tokens = [np.zeros(0)] * len(examples)
    for indices, logits, targets in _forward(
        model, tokenizer, task, examples, batch_size, precision, None, **encoding
    ):
        if task.kind != "generation":
            loss[indices] = _losses(task.kind, logits, targets)
            continue
        for i, row in zip(indices, _per_row(_own_log_p, logits, targets), strict=True):
            tokens[i], loss[i] = row["log_p"], -row["log_p"].mean()
    counts = [len(row) for row in tokens]
    return Reference(loss, np.concatenate(tokens), np.array(counts if any(counts) else []))


def _forward(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    precision: str,
    add_inputs: AddInputs | None,
    *,
    pad_to: int | None = None,
    **encoding: Any,
) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
    """Yield the indices of the records of each batch, with the result of :func:`_logits`."""
    rows = encode(examples, tokenizer, kind=task.kind, **encoding)
    device = next(model.parameters()).device
    batch_size = rows_that_fit(model, task.kind, batch_size)
    dtype = autocast_dtype_of(precision)
    model.eval()
    for indices, batch in micro_batches(
        rows, batch_size, tokenizer.pad_token_id, length=pad_to, device=device
    ):
        labels = batch.pop("labels")
        if add_inputs is not None:
            batch = dict(add_inputs([rows[i] for i in indices], batch))
        with torch.no_grad():
            logits, targets = _logits(model, task, batch, labels, dtype)
        yield indices, logits, targets


def _logits(
    model: Any,
    task: Task,
    batch: Mapping[str, Any],
    labels: Tensor,
    autocast_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return logits in float32 and what they are scored by.

    For a generation task, these are the logits (N, V) at the N tokens that predict a target, and
    the targets (B, T); for other tasks the logits (B, C) and the labels (B,).
    """
    with autocast(labels.device, autocast_dtype):
        if task.kind == "generation":
            logits, targets = logits_at_targets(model, {**batch, "labels": labels})
        else:
            logits, targets = model(**batch).logits, labels
    return logits.float(), targets


def _require_finite(
    examples: Sequence[Example], found: Mapping[str, Array], *, with_reference: bool
) -> None:
    bad = ~np.isfinite(found["loss"])
    if with_reference:
        bad |= ~np.isfinite(found["reference_loss"])
    if bad.any():
        ids = [example.id for example, wrong in zip(examples, bad, strict=True) if wrong]
        raise ValueError(
            f"{len(ids)} records have a loss that is not finite, such as "
            f"{', '.join(ids[:5])}: the checkpoint has diverged, or its weights are "
            "damaged"
        )


def gradient_norms(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    max_length: int | None = None,
    pad_to: int | None = None,
    batch_size: int = 64,
    precision: str = "float32",
    template: str | None = None,
) -> Array:
    """Compute the norm (N,) of each record's loss gradient over the trainable parameters.

    The norm is of the unclipped gradient. This signal is white-box. The arguments are those of
    `measure`.
    """
    rows = encode(examples, tokenizer, kind=task.kind, max_length=max_length, template=template)
    device = next(model.parameters()).device
    batch_size = rows_that_fit(model, task.kind, batch_size)
    batches = list(
        micro_batches(rows, batch_size, tokenizer.pad_token_id, length=pad_to, device=device)
    )
    model.eval()
    _, norms = clipped_sum_over(
        model,
        (batch for _, batch in batches),
        1.0,
        padding="max-length" if pad_to else "longest",
        autocast_dtype=autocast_dtype_of(precision),
    )
    found = np.zeros(len(rows))
    found[[i for indices, _ in batches for i in indices]] = norms.double().cpu().numpy()
    return found


def _classification(logits: Tensor, labels: Tensor, _: Any) -> dict[str, Any]:
    z, y = logits.double().cpu().numpy(), labels.cpu().numpy()
    phi = scores.logit_confidence_from_logits(z, y) if np.isfinite(z).all() else np.nan
    own = np.take_along_axis(z, y[:, None], axis=1)
    correct = (z < own).sum(axis=1) == z.shape[1] - 1  # a tie is not correct
    return {"phi": phi, "correct": correct, "loss": _losses("classification", logits, labels)}


def _regression(logits: Tensor, labels: Tensor, _: Any) -> dict[str, Any]:
    loss = _losses("regression", logits, labels)
    return {"phi": -loss, "loss": loss}


def _losses(kind: str, logits: Tensor, labels: Tensor) -> Array:
    return LOSSES[LOSS_OF_KIND[kind]](logits.double(), labels)[0].cpu().numpy()


def _generation(
    logits: Tensor, targets: Tensor, reference: Sequence[Array] | None
) -> dict[str, Any]:
    """Reduce the scores of the targets' tokens to one value per row.

    ``logits`` (N, V), ``targets`` (B, T) with N tokens; ``reference`` has the log-probabilities of
    each row's tokens under the model before fine-tuning.
    """
    found: dict[str, list[float]] = {}
    for i, row in enumerate(_per_row(_tokens, logits, targets)):
        loss = -row["log_p"].mean()
        values = {"loss": loss}
        if np.isfinite(loss):
            values |= {
                "phi": float(scores.logit_confidence([loss])[0]),
                "min_k": scores.min_k(row["log_p"]),
                "min_k_plus_plus": scores.min_k(row["standardised"]),
            }
            if reference is not None:
                values["error_zone"] = token_scores.upward_share(
                    (row["log_p"] - reference[i])[row["errs"]]
                )
        for field in fields(Signals):
            found.setdefault(field.name, []).append(values.get(field.name, np.nan))
    return found


def _per_row(score: _Score, logits: Tensor, targets: Tensor) -> Iterator[dict[str, Array]]:
    """Yield the scores of the targets' tokens of each row, computed in parts that fit the memory.

    ``logits`` (N, V) are those at the N tokens of ``targets`` (B, T); ``score`` maps a part of the
    logits and its tokens to named values per token.
    """
    chosen = targets != IGNORE
    at_a_time = LOGITS_IN_CACHE if logits.device.type == "cpu" else LOGITS_IN_MEMORY
    size = max(1, at_a_time // logits.shape[-1])
    parts = list(map(score, logits.split(size), targets[chosen].split(size)))
    tokens = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
    ends = np.cumsum(chosen.sum(1).cpu().numpy())[:-1]
    for row in zip(*(np.split(values, ends) for values in tokens.values()), strict=True):
        yield dict(zip(tokens, row, strict=True))


def _own_log_p(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Return the log-probabilities (T,) of tokens ``ids`` (T,) under ``logits`` (T, V)."""
    return {"log_p": logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]}


def _tokens(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Compute what the scores need of tokens ``ids`` (T,), each (T,), from ``logits`` (T, V)."""
    log_p = logits.double().log_softmax(-1)
    own = log_p.gather(1, ids[:, None])[:, 0]
    p = log_p.exp()
    known = log_p.masked_fill(p == 0, 0.0)  # 0 ln 0 = 0
    mean = (p * known).sum(-1)
    sigma = (p * (known - mean[:, None]).square()).sum(-1).sqrt().clamp(min=token_scores.MIN_SIGMA)
    return {"log_p": own, "standardised": (own - mean) / sigma, "errs": own < log_p.amax(-1)}


_SIGNALS: Mapping[str, Callable[[Tensor, Tensor, Any], dict[str, Any]]] = {
    "classification": _classification,
    "regression": _regression,
    "generation": _generation,
}


@contextmanager
def switched_off(reference: Any, model: Any) -> Iterator[Any]:
    """Yield the reference; if ``reference`` is ``model``, disable the adapter in the block."""
    if reference is model:
        with model.disable_adapter():
            yield model
    else:
        yield reference
