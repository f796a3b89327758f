"""Head of a classifier: its layers, and the layers that were drawn at random."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lowrank_dp._validate import listed


def head_modules(model: Any) -> dict[str, nn.Module]:
    """Return the modules of a sequence classifier's head by name; {} for a language model.

    The head is every direct child with parameters beside the backbone (``base_model`` of
    transformers). A pooler inside the backbone belongs to the head if the pooler was not on disk
    and was drawn with the head (:func:`mark_new`).
    """
    backbone = getattr(model, "base_model", model)
    if backbone is model or not type(model).__name__.endswith("ForSequenceClassification"):
        return {}
    head = {
        name: module
        for name, module in model.named_children()
        if module is not backbone and any(True for _ in module.parameters())
    }
    poolers = {
        found[1]: model.get_submodule(found[1])
        for key in getattr(model, "lowrank_dp_new", ())
        if key.split(".")[0] not in head and (found := _pooler(key))
    }
    return head | poolers


def final_layer(model: Any) -> str:
    """Return the name of the linear layer that gives a classifier's logits; "" if there is none."""
    found = ""
    for name, head in head_modules(model).items():
        if _pooler(f"{name}."):
            continue  # a pooler may be listed after the head, but its output is the head's input
        for inner, module in head.named_modules(prefix=name):
            if isinstance(module, nn.Linear):
                found = inner
    return found


def head_weights(model: Any) -> set[str]:
    """Return the names of the parameters of a classifier's head, or of an output layer.

    ``model`` is a model without an adapter.
    """
    modules = list(head_modules(model).values())
    if hasattr(model, "get_output_embeddings") and (output := model.get_output_embeddings()):
        modules.append(output)
    head = {id(p) for module in modules for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in head}


def without_adapter(model: Any) -> Any:
    """Return the base model of a PEFT model; return any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_state(model: Any) -> dict[str, Tensor]:
    """Copy the head's present weights to the CPU, under names without PEFT's prefixes.

    A name is, for example, "classifier.weight". A pooler that was drawn at random is included.
    """
    state = {}
    for head, module in head_modules(without_adapter(model)).items():
        trained = getattr(module, "modules_to_save", None)
        module = trained["default"] if trained is not None else module
        for name, tensor in module.state_dict().items():
            state[f"{head}.{name}"] = tensor.detach().cpu().clone()
    return state


def mark_new(model: Any, name: str, missing: Sequence[str], *, new_head: bool) -> None:
    """Record in ``model.lowrank_dp_new`` the names of the weights that were drawn at random.

    Raises ValueError with the names of the weights that must not be drawn at random: all of them
    with ``new_head=False``, and otherwise all but whole layers of the head and of a pooler.
    """
    model.lowrank_dp_new = tuple(sorted(missing))
    head = head_modules(model)
    refused = [
        key
        for key in model.lowrank_dp_new
        if not new_head
        or not any(key.startswith(f"{part}.") for part in head)
        or not _whole_layer(model, key, missing)
    ]
    if refused:
        raise ValueError(
            f"model {name} has no weights for {listed(refused)}: "
            f"{'it' if len(refused) == 1 else 'they'} would be drawn at random"
        )


def _pooler(key: str) -> re.Match[str] | None:
    """Match the module ``...pooler`` that a parameter is in."""
    return re.match(r"((?:.+\.)?pooler)\.", key)


def _whole_layer(model: Any, key: str, missing: Sequence[str]) -> bool:
    """Tell whether all parameters of the layer that ``key`` is in are missing."""
    layer = key.rpartition(".")[0]
    own = {
        f"{layer}.{name}" for name, _ in model.get_submodule(layer).named_parameters(recurse=False)
    }
    return own <= set(missing)


def is_missing(layer: str, missing: Sequence[str]) -> bool:
    """Tell whether a layer has weights among those that are not on disk."""
    return any(key.startswith(f"{layer}.") for key in missing)
