"""Projection attack: test by the symmetry of ``B A`` whether a record is in a released step.

One full-batch step of gradient descent on LoRA with a frozen A leaves ``B = -rate G A^T``. So
``B A`` is a multiple of ``G A^T A``, and ``(B A) G^T`` is symmetric for the true G alone: a shared
projection of a matrix is not private (Hu et al., arXiv 2601.21719; `theory.symmetry_score`). The
attack is white-box: the adversary knows the weights before that step and all other records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from lowrank_dp.data import Example, Task, encode, micro_batches
from lowrank_dp.losses import LOSS_OF_KIND, LOSSES
from lowrank_dp.mia._arrays import Array
from lowrank_dp.mia.loading import load_reference
from lowrank_dp.models import load_tokenizer
from lowrank_dp.models.adapters import PREFIX
from lowrank_dp.models.trainable import as_out_in
from lowrank_dp.theory import symmetry_score

_A, _B = ".lora_A.weight", ".lora_B.weight"


def projection_scores(
    folder: str | Path,
    base: Mapping[str, Any],
    task: Task,
    examples: Sequence[Example],
    is_member: np.ndarray,
    *,
    max_length: int | None = None,
    pad_to: int | None = None,
    device: str = "cpu",
) -> Array:
    """Compute the symmetry score without each record minus the score with the record, (N,).

    The symmetry score of the true gradient sum is near 0, so a member's difference is positive and
    a non-member's negative. Each record takes two backward passes, on one layer: of the layers
    that the adapter changes, the one whose name sorts last.

    Args:
        folder: the checkpoint, with the adapter.
        base: the manifest's ``base``, as in ``loading.load_reference``.
        task, examples: all records of the run.
        is_member: (N,) true membership; for each record, the adversary is assumed to know the
            membership of all other records.
        max_length, pad_to: lengths in tokens, as in ``signals.measure``.
        device: device on which the gradients are computed.
    """
    layer, released = _released_product(Path(folder) / "adapter_model.safetensors")
    model = load_reference(folder, base, task, device=device)

    def each() -> Iterator[tuple[bool, Array]]:
        return zip(
            is_member,
            _gradients(model, layer, task, examples, base, max_length, pad_to),
            strict=True,
        )

    total = sum(member * gradient for member, gradient in each())
    found = []
    for member, gradient in each():  # computed again: all gradients at once may not fit the memory
        absent, present = total - member * gradient, total + (not member) * gradient
        found.append(symmetry_score(released, absent) - symmetry_score(released, present))
    return np.array(found)


def _released_product(file: Path) -> tuple[str, Array]:
    """Return the name of the adapted layer that sorts last, and its B A (out, in) in float64."""
    with safe_open(file, framework="pt") as tensors:
        name = max(key for key in tensors.keys() if key.endswith(_A))
        a = tensors.get_tensor(name).double().numpy()
        b = tensors.get_tensor(name.removesuffix(_A) + _B).double().numpy()
    return name.removeprefix(PREFIX).removesuffix(_A), b @ a


def _gradients(
    model: Any,
    layer: str,
    task: Task,
    examples: Sequence[Example],
    base: Mapping[str, Any],
    max_length: int | None,
    pad_to: int | None,
) -> Iterator[Array]:
    """Compute the gradient (out, in) of each record's loss in one layer, in float64, in order."""
    tokenizer = load_tokenizer(base["model"])
    rows = encode(examples, tokenizer, kind=task.kind, max_length=max_length)
    linear = model.get_submodule(layer)
    weight = linear.weight.requires_grad_(True)
    for row in rows:
        ((_, batch),) = micro_batches(
            [row], 1, tokenizer.pad_token_id, length=pad_to, device=weight.device
        )
        labels = batch.pop("labels")
        loss = LOSSES[LOSS_OF_KIND[task.kind]](model(**batch).logits, labels)[0].sum()
        gradient = as_out_in(linear, torch.autograd.grad(loss, weight)[0])
        yield gradient.double().cpu().numpy()
