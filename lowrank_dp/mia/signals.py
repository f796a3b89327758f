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
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from lowrank_dp import artifacts
from lowrank_dp.artifacts import runs
from lowrank_dp.data import IGNORE, Example, Task, encode, micro_batches
from lowrank_dp.evaluation import LOSS_OF_KIND
from lowrank_dp.grads import LOSSES, clipped_sum_over
from lowrank_dp.mia import scores
from lowrank_dp.models import load_model

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Signals:
    """One value a record, (N,), float64; a field that a task does not have is empty, (0,).

    Attributes:
        loss: of the model, in nats: cross-entropy of the label, squared error, or the mean over
            the target's own tokens.
        phi: logit confidence: of the label; for texts of exp(-loss); for scores -loss.
        min_k, min_k_plus_plus: of the target's tokens (causal language models).
        error_zone: against the reference's logits (causal language models with a reference).
        reference_loss: the reference's, where there is one.
    """

    loss: Array
    reference_loss: Array
    phi: Array
    min_k: Array
    min_k_plus_plus: Array
    error_zone: Array


def measure(model: Any, tokenizer: Any, task: Task, examples: Sequence[Example], *,
            max_length: int | None = None, batch_size: int = 64, reference: Any = None
            ) -> Signals:
    """Signals of ``examples`` in their order, from one forward pass of ``model``.

    ``reference`` is the model before fine-tuning, run on the same batches, or ``model`` itself if
    it is a PEFT model whose head did not train: its adapter is then switched off. Every loss that
    is not finite is an error that lists the records' ids; none is dropped.
    """
    rows = encode(examples, tokenizer, kind=task.kind, max_length=max_length)
    device = next(model.parameters()).device
    found = {field.name: np.full(len(rows), np.nan) for field in fields(Signals)}
    model.eval()
    with torch.no_grad():
        for indices, batch in micro_batches(rows, batch_size, tokenizer.pad_token_id):
            batch = {name: value.to(device) for name, value in batch.items()}
            labels = batch.pop("labels")
            logits = model(**batch).logits.float()
            other = None
            if reference is not None:
                with switched_off(reference, model) as base:
                    other = base(**batch).logits.double()
                found["reference_loss"][indices] = LOSSES[LOSS_OF_KIND[task.kind]](
                    other, labels)[0].cpu().numpy()
            for name, values in _SIGNALS[task.kind](logits, labels, other).items():
                found[name][indices] = values
    bad = ~np.isfinite(found["loss"])
    if reference is not None:
        bad |= ~np.isfinite(found["reference_loss"])
    if bad.any():
        ids = [example.id for example, wrong in zip(examples, bad, strict=True) if wrong]
        raise ValueError(f"{len(ids)} records have a loss that is not finite, such as "
                         f"{', '.join(ids[:5])}: the checkpoint has diverged, or its weights are "
                         "damaged")
    empty = np.zeros(0)
    return Signals(**{name: empty if np.isnan(values).any() else values
                      for name, values in found.items()})


def gradient_norms(model: Any, tokenizer: Any, task: Task, examples: Sequence[Example], *,
                   max_length: int | None = None, batch_size: int = 64) -> Array:
    """Norm (N,) of each record's loss gradient over the trainable parameters: white-box."""
    rows = encode(examples, tokenizer, kind=task.kind, max_length=max_length)
    device = next(model.parameters()).device
    batches = list(micro_batches(rows, batch_size, tokenizer.pad_token_id))
    model.eval()
    _, norms = clipped_sum_over(model, ({key: value.to(device) for key, value in batch.items()}
                                        for _, batch in batches), 1.0)
    found = np.zeros(len(rows))
    found[[i for indices, _ in batches for i in indices]] = norms.double().cpu().numpy()
    return found


def _classification(logits: Tensor, labels: Tensor, other: Tensor | None) -> dict[str, Any]:
    z, y = logits.double().cpu().numpy(), labels.cpu().numpy()
    loss, _ = LOSSES["single_label_classification"](logits.double(), labels)
    return {"loss": loss.cpu().numpy(),
            "phi": scores.logit_confidence_from_logits(z, y) if np.isfinite(z).all() else np.nan}


def _regression(logits: Tensor, labels: Tensor, other: Tensor | None) -> dict[str, Any]:
    loss, _ = LOSSES["regression"](logits.double(), labels)
    return {"loss": loss.cpu().numpy(), "phi": -loss.cpu().numpy()}


def _generation(logits: Tensor, labels: Tensor, other: Tensor | None) -> dict[str, Any]:
    """Token by token: position t is scored by the logits at t - 1."""
    found: dict[str, list[float]] = {}
    for row in range(len(logits)):
        wanted = labels[row, 1:] != IGNORE
        tokens = labels[row, 1:][wanted].cpu().numpy()
        z = logits[row, :-1][wanted].double()
        log_probs = z.log_softmax(-1).cpu().numpy()[np.arange(len(tokens)), tokens]
        z_array = z.cpu().numpy()
        loss = -log_probs.mean()
        one = {"loss": loss}
        if np.isfinite(loss):
            one |= {"phi": float(scores.logit_confidence([loss])[0]),
                    "min_k": scores.min_k(log_probs),
                    "min_k_plus_plus": scores.min_k_plus_plus(z_array, tokens)}
            if other is not None:
                reference = other[row, :-1][wanted].cpu().numpy()
                one["error_zone"] = scores.error_zone(z_array, reference, tokens)
        for name, value in one.items():
            found.setdefault(name, [np.nan] * len(logits))[row] = value
    return found


_SIGNALS: Mapping[str, Callable[[Tensor, Tensor, Tensor | None], dict[str, Any]]] = {
    "classification": _classification, "regression": _regression, "generation": _generation}


@contextmanager
def switched_off(reference: Any, model: Any) -> Iterator[Any]:
    """``reference``, with its adapter disabled where it is the model under attack."""
    if reference is model:
        with model.disable_adapter():
            yield model
    else:
        yield reference


# Models.

def load_reference(folder: str | Path, base: Mapping[str, Any], task: Task, *,
                   device: str = "cpu") -> Any:
    """The model before fine-tuning: the manifest's base, with the head that training kept."""
    model, _ = load_model(base["model"], task=task, seed=base["seed"], device=device)
    head = Path(folder) / runs.INITIAL_HEAD
    if task.kind != "generation":
        if not head.is_file():
            raise ValueError(f"{folder} must hold {head.name}, the classifier's head before "
                             "training: without it nothing can be calibrated; leave out the "
                             "attack 'base'")
        _, unexpected = model.load_state_dict(load_file(head), strict=False)
        if unexpected:
            raise ValueError(f"{head} must fit the base model, got {unexpected[0]}")
    return model.eval()


def weight_hash(folder: str | Path) -> str:
    """SHA-256 over the safetensors and configurations of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.suffix == ".safetensors" or path.name in ("config.json", "adapter_config.json"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def key(folder: str | Path, examples: Sequence[Example], max_length: int | None,
        *context: str) -> str:
    """What decides a checkpoint's signals: its weights, the records in their order, their cut."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.id} {example.content_hash} {example.label}\n".encode())
    return " ".join([weight_hash(folder), digest.hexdigest(), str(max_length), *context])


def cached(folder: Path, key: str, compute: Callable[[], Signals]) -> Signals:
    """``compute()``, or what it gave before under the same ``key``; a damaged file is redone."""
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return Signals(**{field.name: file[field.name] for field in fields(Signals)})
    except FileNotFoundError:
        pass
    except Exception:  # what a damaged zip raises is open-ended, and nothing is lost
        path.unlink(missing_ok=True)
    signals = compute()
    with artifacts.atomic_write(path) as file:
        np.savez_compressed(file, allow_pickle=False,
                            **{field.name: getattr(signals, field.name)
                               for field in fields(Signals)})
    return signals
