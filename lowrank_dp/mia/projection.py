"""Is a record in a released first step? The symmetry of ``B A`` tells (white-box).

One full-batch step of gradient descent on LoRA with a frozen A leaves ``B = -rate G A^T``, so
``B A`` is a multiple of ``G A^T A``, and ``(B A) G^T`` is symmetric for the true G alone: a shared
projection of a matrix is not private (Hu et al., arXiv 2601.21719; `theory.symmetry_score`). The
adversary knows the weights before that step and every other record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from lowrank_dp.data import Example, Task, encode, micro_batches
from lowrank_dp.losses import LOSS_OF_KIND, LOSSES
from lowrank_dp.mia.signals import Array
from lowrank_dp.mia.target import load_reference
from lowrank_dp.theory import symmetry_score
from lowrank_dp.train import TrainResult

# what makes B A one projected gradient of known records
NEEDED = {
    "method": "lora-frozen-a",
    "optimizer": "sgd",
    "steps": 1,
    "unit": "example",
    "weight_decay": 0.0,
    "non_private": True,
    "dropout": False,
}
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def unavailable_reason(result: TrainResult | None) -> str:
    """What of the recipe stands in the attack's way; "" if nothing does."""
    if result is None:
        return "it needs training.json"
    wrong = [
        f"{name} {wanted!r}"
        for name, wanted in NEEDED.items()
        if getattr(result.config, name) != wanted
    ]
    if result.sample_rate != 1:
        wrong.append("batch_size the number of members, so that none is left out by chance")
    return f"it needs a recipe with {', '.join(wrong)}" if wrong else ""


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
    """Symmetry score without each record less that with it, (N,); the true one is near 0.

    ``examples`` must be all records of the run with their truth ``is_member`` (N,), which stands
    for the adversary's knowledge of the others. Takes two backward passes a record, on one layer:
    of those that the adapter changes, the last by name.
    """
    layer, released = _released(Path(folder) / "adapter_model.safetensors")
    model = load_reference(folder, base, task, device=device)
    weight = model.get_parameter(f"{layer}.weight")

    def each() -> Iterator[tuple[bool, Array]]:
        return zip(
            is_member,
            _gradients(model, weight, task, examples, base, max_length, pad_to),
            strict=True,
        )

    total = sum(member * gradient for member, gradient in each())
    found = []
    for member, gradient in each():  # again: all of them at once may not fit the memory
        absent, present = total - member * gradient, total + (not member) * gradient
        found.append(symmetry_score(released, absent) - symmetry_score(released, present))
    return np.array(found)


def _released(file: Path) -> tuple[str, Array]:
    """The adapted layer that is last by name, and its B A in float64."""
    with safe_open(file, framework="pt") as tensors:
        name = max(key for key in tensors.keys() if key.endswith(_A))
        a = tensors.get_tensor(name).double().numpy()
        b = tensors.get_tensor(name.removesuffix(_A) + _B).double().numpy()
    return name.removeprefix(_PREFIX).removesuffix(_A), b @ a


def _gradients(
    model: Any,
    weight: Tensor,
    task: Task,
    examples: Sequence[Example],
    base: Mapping[str, Any],
    max_length: int | None,
    pad_to: int | None,
) -> Iterator[Array]:
    """The gradient of each record's loss in one layer, in order."""
    from lowrank_dp.models import load_tokenizer

    tokenizer = load_tokenizer(base["model"])
    rows = encode(examples, tokenizer, kind=task.kind, max_length=max_length)
    weight.requires_grad_(True)
    for row in rows:
        ((_, batch),) = micro_batches([row], 1, tokenizer.pad_token_id, length=pad_to)
        batch = {name: value.to(weight.device) for name, value in batch.items()}
        labels = batch.pop("labels")
        loss = LOSSES[LOSS_OF_KIND[task.kind]](model(**batch).logits, labels)[0].sum()
        yield torch.autograd.grad(loss, weight)[0].double().cpu().numpy()
