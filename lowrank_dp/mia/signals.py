"""Measure a checkpoint's signals of each record: one forward pass, in eval mode.

A checkpoint is a Hugging Face folder, full or PEFT. The reference is the model before fine-tuning.
Signals are cached under a hash of the weights and of the records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_dp import artifacts
from lowrank_dp.data import IGNORE, Example, Task, encode, micro_batches
from lowrank_dp.grads.clipping import clipped_sum_over
from lowrank_dp.losses import LOSSES
from lowrank_dp.mia import scores, token_scores
from lowrank_dp.mia._arrays import Array
from lowrank_dp.models.memory import rows_that_fit
from lowrank_dp.models.precision import autocast, autocast_dtype_of
from lowrank_dp.models.targets import logits_at_targets

# Number of logits that are scored at a time, in float64, on a CPU and on a GPU. On a CPU, the
# intermediate results then fit the processor's cache, in memory that is used again.
LOGITS_IN_CACHE, LOGITS_IN_MEMORY = 2**19, 2**24


@dataclass(frozen=True)
class Signals:
    """One value per record, (N,), float64; a field that a task does not have is empty, (0,).

    Attributes:
        loss: the model's loss: the cross-entropy of the label in nats, the squared error, or the
            mean cross-entropy of the target's tokens in nats.
        reference_loss: the reference's loss, if there is a reference.
        correct: 1 if the label has strictly the largest logit, else 0 (classification).
        phi: logit confidence of the label, or of exp(-loss) for texts; -loss for regression.
        min_k, min_k_plus_plus: scores of the target's tokens (causal language models).
        error_zone: score against the reference's logits (causal language models).
    """

    loss: Array
    reference_loss: Array
    correct: Array
    phi: Array
    min_k: Array
    min_k_plus_plus: Array
    error_zone: Array


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
    reference: Any = None,
    template: str | None = None,
    add_inputs: Callable[[Sequence[Mapping[str, Any]], Mapping[str, Tensor]], Any] | None = None,
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
        reference: the model before fine-tuning, which runs on the same batches; or ``model`` itself
            if it is a PEFT model whose head was not trained; its adapter is then switched off.
        add_inputs: as in ``evaluation.evaluate``.

    Raises ValueError with the records' ids if a loss is not finite; no record is dropped.
    """
    rows = encode(examples, tokenizer, kind=task.kind, max_length=max_length, template=template)
    device = next(model.parameters()).device
    batch_size = rows_that_fit(model, task.kind, batch_size)
    found = {field.name: np.full(len(rows), np.nan) for field in fields(Signals)}
    dtype = autocast_dtype_of(precision)
    model.eval()
    with torch.no_grad():
        for indices, batch in micro_batches(
            rows, batch_size, tokenizer.pad_token_id, length=pad_to, device=device
        ):
            labels = batch.pop("labels")
            if add_inputs is not None:
                batch = dict(add_inputs([rows[i] for i in indices], batch))
            logits, targets = _logits(model, task, batch, labels, dtype)
            other = None
            if reference is not None:
                with switched_off(reference, model) as base:
                    other, _ = _logits(base, task, batch, labels, dtype)
            for name, values in _SIGNALS[task.kind](logits, targets, other).items():
                found[name][indices] = values
    _require_finite(examples, found, with_reference=reference is not None)
    empty = np.zeros(0)
    return Signals(
        **{name: empty if np.isnan(values).any() else values for name, values in found.items()}
    )


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


def _classification(logits: Tensor, labels: Tensor, other: Tensor | None) -> dict[str, Any]:
    z, y = logits.double().cpu().numpy(), labels.cpu().numpy()
    phi = scores.logit_confidence_from_logits(z, y) if np.isfinite(z).all() else np.nan
    own = np.take_along_axis(z, y[:, None], axis=1)
    correct = (z < own).sum(axis=1) == z.shape[1] - 1  # a tie is not correct
    return {
        "phi": phi,
        "correct": correct,
        **_losses("single_label_classification", logits, labels, other),
    }


def _regression(logits: Tensor, labels: Tensor, other: Tensor | None) -> dict[str, Any]:
    found = _losses("regression", logits, labels, other)
    return {"phi": -found["loss"], **found}


def _losses(kind: str, logits: Tensor, labels: Tensor, other: Tensor | None) -> dict[str, Any]:
    both = {"loss": logits} | ({} if other is None else {"reference_loss": other})
    return {
        name: LOSSES[kind](values.double(), labels)[0].cpu().numpy()
        for name, values in both.items()
    }


def _generation(logits: Tensor, targets: Tensor, other: Tensor | None) -> dict[str, Any]:
    """Score the targets' tokens of all rows, in parts that fit the memory, and reduce per row.

    ``logits`` and ``other``, those of the reference, are (N, V); ``targets`` (B, T) holds N tokens.
    """
    chosen = targets != IGNORE
    at_a_time = LOGITS_IN_CACHE if logits.device.type == "cpu" else LOGITS_IN_MEMORY
    size = max(1, at_a_time // logits.shape[-1])
    columns = [logits, targets[chosen], *([] if other is None else [other])]
    parts = [_tokens(*part) for part in zip(*(c.split(size) for c in columns), strict=True)]
    tokens = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
    ends = np.cumsum(chosen.sum(1).cpu().numpy())[:-1]
    found: dict[str, list[float]] = {}
    for row in zip(*(np.split(values, ends) for values in tokens.values()), strict=True):
        one = dict(zip(tokens, row, strict=True))
        loss = -one["log_p"].mean()
        values = {"loss": loss}
        if np.isfinite(loss):
            values |= {
                "phi": float(scores.logit_confidence([loss])[0]),
                "min_k": scores.min_k(one["log_p"]),
                "min_k_plus_plus": scores.min_k(one["standardised"]),
            }
        if other is not None:
            values["reference_loss"] = -one["reference"].mean()
            if np.isfinite(loss):
                values["error_zone"] = token_scores.upward_share(
                    (one["log_p"] - one["reference"])[one["errs"]]
                )
        for field in fields(Signals):
            found.setdefault(field.name, []).append(values.get(field.name, np.nan))
    return found


def _tokens(logits: Tensor, ids: Tensor, other: Tensor | None = None) -> dict[str, Tensor]:
    """Compute the values that the scores need of tokens ``ids`` (T,), each (T,).

    ``logits`` and ``other``, those of the reference, are (T, V).
    """
    log_p = logits.double().log_softmax(-1)
    own = log_p.gather(1, ids[:, None])[:, 0]
    p = log_p.exp()
    known = log_p.masked_fill(p == 0, 0.0)  # 0 ln 0 = 0
    mean = (p * known).sum(-1)
    sigma = (p * (known - mean[:, None]).square()).sum(-1).sqrt().clamp(min=token_scores.MIN_SIGMA)
    found = {"log_p": own, "standardised": (own - mean) / sigma, "errs": own < log_p.amax(-1)}
    if other is not None:
        found["reference"] = other.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return found


_SIGNALS: Mapping[str, Callable[[Tensor, Tensor, Tensor | None], dict[str, Any]]] = {
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


# --- cache -----------------------------------------------------------------------------------

# files on which the signals of a checkpoint depend, beside the weights
_DECIDE = (
    "config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)


def weight_hash(folder: str | Path) -> str:
    """Hash the safetensors, the configurations and the tokenizer of a checkpoint (SHA-256)."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.suffix == ".safetensors" or path.name in _DECIDE:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def cache_key(
    folder: str | Path, examples: Sequence[Example], encoding: Mapping[str, Any], *context: str
) -> str:
    """Compose the key of a checkpoint's signals: its weights, the records and their encoding.

    ``encoding`` has the arguments of `measure` that determine the tokens of a record and the
    precision; ``context`` is appended unchanged.
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.id} {example.content_hash} {example.label}\n".encode())
    return " ".join(
        [weight_hash(folder), digest.hexdigest(), repr(sorted(encoding.items())), *context]
    )


def cached(folder: Path, key: str, compute: Callable[[], Signals]) -> Signals:
    """Return the signals saved under ``key``; compute and save them if missing or damaged."""
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        return artifacts.load_result(folder, name, Signals)
    except (FileNotFoundError, ValueError):
        signals = compute()
        artifacts.save_result(signals, folder, name)
        return signals
