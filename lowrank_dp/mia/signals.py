"""From a checkpoint to numbers about each record: one forward pass, in eval mode and float32.

A checkpoint is a Hugging Face folder, full or PEFT. The reference is the model before fine-tuning:
the base with the head as it was before the first step, which training keeps for this purpose.
What was measured is cached under the hash of the weights and of the records.
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
from lowrank_dp.mia import scores
from lowrank_dp.mia._arrays import Array

LOGITS_AT_A_TIME = 2**24  # in float64: 128 MiB, and a few times that on the way


@dataclass(frozen=True)
class Signals:
    """One value a record, (N,), float64; a field that a task does not have is empty, (0,).

    Attributes:
        loss: of the model, in nats: cross-entropy of the label, squared error, or the mean over
            the target's own tokens.
        correct: 1 where the label has the largest logit of all, else 0 (classification).
        phi: logit confidence: of the label; for texts of exp(-loss); for scores -loss.
        min_k, min_k_plus_plus: of the target's tokens (causal language models).
        error_zone: against the reference's logits (causal language models with a reference).
        reference_loss: the reference's, where there is one.
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
    reference: Any = None,
    template: str | None = None,
) -> Signals:
    """Signals of ``examples`` in their order, from one forward pass of ``model``.

    Every row is padded to ``pad_to`` tokens, as the model was trained, or to the longest row of its
    batch if that is None.

    ``reference`` is the model before fine-tuning, run on the same batches, or ``model`` itself if
    it is a PEFT model whose head did not train: its adapter is then switched off. ``template`` is
    that of ``data.encode``. Every loss that
    is not finite is an error that lists the records' ids; none is dropped.
    """
    rows = encode(examples, tokenizer, kind=task.kind, max_length=max_length, template=template)
    device = next(model.parameters()).device
    found = {field.name: np.full(len(rows), np.nan) for field in fields(Signals)}
    model.eval()
    with torch.no_grad():
        for indices, batch in micro_batches(
            rows, batch_size, tokenizer.pad_token_id, length=pad_to
        ):
            batch = {name: value.to(device) for name, value in batch.items()}
            labels = batch.pop("labels")
            logits = model(**batch).logits.float()
            other = None
            if reference is not None:
                with switched_off(reference, model) as base:
                    other = base(**batch).logits.float()
            for name, values in _SIGNALS[task.kind](logits, labels, other).items():
                found[name][indices] = values
    bad = ~np.isfinite(found["loss"])
    if reference is not None:
        bad |= ~np.isfinite(found["reference_loss"])
    if bad.any():
        ids = [example.id for example, wrong in zip(examples, bad, strict=True) if wrong]
        raise ValueError(
            f"{len(ids)} records have a loss that is not finite, such as "
            f"{', '.join(ids[:5])}: the checkpoint has diverged, or its weights are "
            "damaged"
        )
    empty = np.zeros(0)
    return Signals(
        **{name: empty if np.isnan(values).any() else values for name, values in found.items()}
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
    template: str | None = None,
) -> Array:
    """Norm (N,) of each record's loss gradient over the trainable parameters: white-box."""
    rows = encode(examples, tokenizer, kind=task.kind, max_length=max_length, template=template)
    device = next(model.parameters()).device
    batches = list(micro_batches(rows, batch_size, tokenizer.pad_token_id, length=pad_to))
    model.eval()
    _, norms = clipped_sum_over(
        model,
        ({key: value.to(device) for key, value in batch.items()} for _, batch in batches),
        1.0,
        padding="max-length" if pad_to else "longest",
    )
    found = np.zeros(len(rows))
    found[[i for indices, _ in batches for i in indices]] = norms.double().cpu().numpy()
    return found


def _classification(logits: Tensor, labels: Tensor, other: Tensor | None) -> dict[str, Any]:
    z, y = logits.double().cpu().numpy(), labels.cpu().numpy()
    phi = scores.logit_confidence_from_logits(z, y) if np.isfinite(z).all() else np.nan
    own = np.take_along_axis(z, y[:, None], axis=1)
    correct = (z < own).sum(axis=1) == z.shape[1] - 1  # a tie is no answer
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


def _generation(logits: Tensor, labels: Tensor, other: Tensor | None) -> dict[str, Any]:
    """The targets' tokens of all rows at once, in parts that fit the memory, then row by row.

    Position t is scored by the logits at t - 1.
    """
    rows, places = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    size = max(1, LOGITS_AT_A_TIME // logits.shape[-1])
    parts = [
        _tokens(logits[r, t], labels[r, t + 1], None if other is None else other[r, t])
        for r, t in zip(rows.split(size), places.split(size), strict=True)
    ]
    tokens = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
    ends = np.cumsum(np.bincount(rows.cpu().numpy(), minlength=len(logits)))[:-1]
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
                values["error_zone"] = scores.upward_share(
                    (one["log_p"] - one["reference"])[one["errs"]]
                )
        for field in fields(Signals):
            found.setdefault(field.name, []).append(values.get(field.name, np.nan))
    return found


def _tokens(logits: Tensor, ids: Tensor, other: Tensor | None) -> dict[str, Tensor]:
    """Of tokens ``ids`` (T,) under ``logits`` (T, V), what the scores need; (T,) each."""
    log_p = logits.double().log_softmax(-1)
    own = log_p.gather(1, ids[:, None])[:, 0]
    p = log_p.exp()
    known = log_p.masked_fill(p == 0, 0.0)  # 0 ln 0 = 0
    mean = (p * known).sum(-1)
    sigma = (p * (known - mean[:, None]).square()).sum(-1).sqrt().clamp(min=scores.MIN_SIGMA)
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
    """``reference``, with its adapter disabled where it is the model under attack."""
    if reference is model:
        with model.disable_adapter():
            yield model
    else:
        yield reference


# Models.


# what decides, beside the weights, which numbers a checkpoint gives
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
    """SHA-256 over the safetensors, the configurations and the tokenizer of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.suffix == ".safetensors" or path.name in _DECIDE:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def key(
    folder: str | Path, examples: Sequence[Example], encoding: Mapping[str, Any], *context: str
) -> str:
    """What decides a checkpoint's signals: its weights, the records in their order, their form.

    ``encoding`` has the arguments of `measure` that say how a record becomes tokens.
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.id} {example.content_hash} {example.label}\n".encode())
    return " ".join(
        [weight_hash(folder), digest.hexdigest(), repr(sorted(encoding.items())), *context]
    )


def cached(folder: Path, key: str, compute: Callable[[], Signals]) -> Signals:
    """``compute()``, or what it gave before under the same ``key``; a damaged file is redone."""
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        return artifacts.load_result(folder, name, Signals)
    except (FileNotFoundError, ValueError):
        signals = compute()
        artifacts.save_result(signals, folder, name)
        return signals
