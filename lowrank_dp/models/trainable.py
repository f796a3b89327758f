"""Which parameters of a model train: all of some layers, or LoRA pairs beside them."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_dp import _validate


def choose_trainable(model: nn.Module, train_embeddings: bool,
                     train_layers: int | str | None) -> None:
    """Set ``requires_grad``: linear layers and norms, narrowed by ``train_layers``, and the head.

    A weight shared with an embedding counts as embedding.
    """
    tables = {id(p) for p in embeddings(model)}
    head = {id(p) for module in head_modules(model).values() for p in module.parameters()}
    wanted = {id(p) for m in model.modules() for p in m.parameters(recurse=False)
              if isinstance(m, (nn.Linear, Conv1D)) or _is_norm(m)} - tables - head
    wanted |= tables if train_embeddings else set()
    named = dict(model.named_parameters())
    names = [name for name, p in named.items() if id(p) in wanted]
    if not names:
        raise ValueError("model must have linear layers to train, found none")
    chosen = set(_narrow(model, names, train_layers))
    for name, p in named.items():
        p.requires_grad_(name in chosen or id(p) in head)


def _narrow(model: nn.Module, names: list[str], train_layers: int | str | None) -> list[str]:
    """The parameter names that ``train_layers`` leaves."""
    if train_layers is None:
        return names
    if isinstance(train_layers, str):
        try:
            kept = [name for name in names if re.search(train_layers, name)]
        except re.error as error:
            raise ValueError(f"train_layers must be a regular expression ({error}), "
                             f"got {train_layers!r}") from None
        if not kept:
            raise ValueError(f"train_layers {train_layers!r} matches no trainable parameter, such "
                             f"as {names[0]}")
        return kept
    prefix, count = blocks(model)
    first = count - _validate.integer("train_layers", train_layers, high=count)
    everything = [name for name, _ in model.named_parameters()]
    start = next(i for i, name in enumerate(everything) if name.startswith(f"{prefix}.{first}."))
    return [name for name in names if name in set(everything[start:])]


def add_lora(model: Any, rank: int, alpha: float, init: str, target_modules: list[str] | None,
             train_layers: int | str | None) -> Any:
    """The model with LoRA pairs; its head, if it has one, trains in full."""
    import peft

    prefix, _ = blocks(model)
    head = list(head_modules(model))
    linear = {name: m for name, m in model.named_modules()
              if isinstance(m, (nn.Linear, Conv1D)) and name.split(".")[0] not in head}
    inside = [name for name in linear if name.startswith(f"{prefix}.")]
    if target_modules is not None:
        inside = [name for name in linear if any(
            name == target or name.endswith(f".{target}") for target in target_modules)]
        if not inside:
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            _validate.fail("target_modules", f"names of linear layers such as {', '.join(known)}",
                           target_modules)
    kept = _narrow(model, [f"{name}.weight" for name in inside], train_layers)
    targets = [name.removesuffix(".weight") for name in kept]
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if head else "CAUSAL_LM", r=rank, lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=targets, modules_to_save=head or None,
        fan_in_fan_out=isinstance(linear[targets[0]], Conv1D))
    note = model.lowrank_dp_note
    with warnings.catch_warnings():   # peft 0.21 calls a name that transformers 5.23 renames
        warnings.simplefilter("ignore", FutureWarning)
        adapted: Any = peft.get_peft_model(model, config)
    if init == "gaussian":
        for name, p in adapted.named_parameters():
            if "lora_A" in name:
                nn.init.normal_(p, std=rank ** -0.5)
    adapted.lowrank_dp_note = f"{note}, LoRA of rank {rank} on {len(targets)} layers"
    return adapted


def freeze_a(model: Any) -> None:
    """Fix LoRA's A as it is."""
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    model.lowrank_dp_note = f"{model.lowrank_dp_note}, A frozen"


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """A sequence classifier's head by its name: ``classifier`` or ``score``; none for an LM."""
    return {name: module for name, module in model.named_children()
            if name in ("classifier", "score")}


def blocks(model: Any) -> tuple[str, int]:
    """The name and the length of the list of transformer blocks."""
    depth = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, depth
    raise ValueError(f"model must have a list of {depth} transformer blocks, found none")


def embeddings(model: nn.Module) -> list[nn.Parameter]:
    """The embedding tables, those of output layers that share them included."""
    return [m.get_parameter("weight") for m in model.modules() if isinstance(m, nn.Embedding)]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
