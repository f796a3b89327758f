"""Choose which parameters train: whole layers or LoRA pairs beside them, and the head."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_dp import _validate
from lowrank_dp.models.heads import head_modules

LORA_INITS = ("peft", "gaussian")


def choose_trainable(
    model: nn.Module, train_embeddings: bool, train_layers: int | str | None
) -> None:
    """Set ``requires_grad`` on linear layers and norms, narrowed by ``train_layers``, and the head.

    The whole head trains for any ``train_layers``. A weight that is shared with an embedding counts
    as an embedding. Raises ValueError if there is no linear layer, or if ``train_layers`` matches
    no parameter.
    """
    tables = {id(p) for p in embeddings(model)}
    head = {id(p) for module in head_modules(model).values() for p in module.parameters()}
    wanted = (
        {
            id(p)
            for m in model.modules()
            for p in m.parameters(recurse=False)
            if is_linear(m) or _is_norm(m)
        }
        - tables
        - head
    )
    wanted |= tables if train_embeddings else set()
    named = dict(model.named_parameters())
    names = [name for name, p in named.items() if id(p) in wanted]
    if not names:
        raise ValueError("model must have linear layers to train, found none")
    chosen = set(_narrow(model, names, train_layers))
    for name, p in named.items():
        p.requires_grad_(name in chosen or id(p) in head)


def _narrow(model: nn.Module, names: list[str], train_layers: int | str | None) -> list[str]:
    """Select the parameter names that ``train_layers`` admits."""
    if train_layers is None:
        return names
    if isinstance(train_layers, str):
        try:
            kept = [name for name in names if re.search(train_layers, name)]
        except re.error as error:
            raise ValueError(
                f"train_layers must be a regular expression ({error}), got {train_layers!r}"
            ) from None
        if not kept:
            raise ValueError(
                f"train_layers {train_layers!r} matches no trainable parameter, such as {names[0]}"
            )
        return kept
    found = blocks(model)
    first = len(found) - _validate.integer("train_layers", train_layers, high=len(found))
    everything = [name for name, _ in model.named_parameters()]
    start = next(i for i, name in enumerate(everything) if _inside(name, found[first]))
    before = [module for block in found[:first] for module in block]
    after = {name for name in everything[start:] if not _inside(name, before)}
    return [name for name in names if name in after]


def add_lora(
    model: Any,
    rank: int,
    alpha: float,
    init: str,
    target_modules: list[str] | None,
    train_layers: int | str | None,
) -> Any:
    """Add LoRA pairs beside the linear layers of the model's blocks, and return the PEFT model.

    The head trains in full, as PEFT's ``modules_to_save``, with which it is also saved. Raises
    ValueError if the blocks have no linear layer (SqueezeBERT's are convolutions).
    """
    import peft

    head = list(head_modules(model))
    targets = lora_targets(model, target_modules, train_layers)
    transposed = {is_transposed(model.get_submodule(name)) for name in targets}
    if len(transposed) > 1:
        _validate.fail("target_modules", "all Linear or all Conv1D layers", targets)
    kind: Any = "SEQ_CLS" if head else "CAUSAL_LM"
    config = peft.LoraConfig(
        task_type=kind,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=targets,
        modules_to_save=head or None,
        fan_in_fan_out=True in transposed,
    )
    note = model.lowrank_dp_note
    with warnings.catch_warnings():  # peft 0.21 uses a name that transformers 5.23 renames
        warnings.simplefilter("ignore", FutureWarning)
        adapted: Any = peft.get_peft_model(model, config)
    if init == "gaussian":
        for name, p in adapted.named_parameters():
            if "lora_A" in name:
                nn.init.normal_(p, std=rank**-0.5)
    adapted.lowrank_dp_note = f"{note}, LoRA of rank {rank} on {len(targets)} layers"
    return adapted


def lora_targets(
    model: Any, target_modules: list[str] | None, train_layers: int | str | None
) -> list[str]:
    """List the linear layers that LoRA adapts, in the model's order, without the head.

    ``model`` is the model without LoRA. Raises ValueError if the blocks have no linear layer, or no
    layer that the arguments select.
    """
    head = list(head_modules(model))
    linear = [name for name, m in model.named_modules() if is_linear(m) and not _inside(name, head)]
    inside = _lora_layers(model, linear, target_modules)
    kept = _narrow(model, [f"{name}.weight" for name in inside], train_layers)
    return [name.removesuffix(".weight") for name in kept]


def _lora_layers(model: Any, linear: list[str], target_modules: list[str] | None) -> list[str]:
    """Select, of the names ``linear``, the layers of the blocks, or those in ``target_modules``."""
    if target_modules is None:
        names = list(itertools.chain(*blocks(model)))
        found = [name for name in linear if _inside(name, names)]
    else:
        found = [
            name
            for name in linear
            if any(name == target or name.endswith(f".{target}") for target in target_modules)
        ]
        if linear and not found:
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            _validate.fail(
                "target_modules",
                f"names of linear layers such as {', '.join(known)}",
                target_modules,
            )
    if not found:
        raise ValueError(
            f"method must be full for {type(model).__name__}: its blocks have no "
            "linear layer that LoRA could be added to"
        )
    return found


def freeze_a(model: Any) -> None:
    """Freeze LoRA's A in every pair, and note this in the model's description."""
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    model.lowrank_dp_note = f"{model.lowrank_dp_note}, A frozen"


def blocks(model: Any) -> list[list[str]]:
    """List the transformer blocks in the model's order, each as the names of its modules.

    Blocks are the entries of the outermost ``nn.ModuleList`` of layers or norms; blocks of an
    encoder come before those of a decoder. A model such as XLM keeps one list for each part of a
    block (attentions, norms, ...); lists with one parent and one length are joined. Raises
    ValueError for a model without such a list.
    """
    head = list(head_modules(model))
    lists: dict[tuple[str, int], list[str]] = {}
    seen: list[str] = []
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and not _inside(name, [*seen, *head])
            and any(
                is_linear(m) or isinstance(m, nn.Conv1d) or _is_norm(m) for m in module.modules()
            )
        ):
            seen.append(name)
            lists.setdefault((name.rpartition(".")[0], len(module)), []).append(name)
    if not lists:
        raise ValueError(
            f"model must have a list of transformer blocks, found none in {type(model).__name__}"
        )
    return [
        [f"{name}.{i}" for name in names]
        for (_, length), names in lists.items()
        for i in range(length)
    ]


def _inside(name: str, modules: Iterable[str]) -> bool:
    """Tell whether a module or parameter is one of ``modules``, or inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def embeddings(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the embeddings, which output layers may share."""
    return [m.get_parameter("weight") for m in model.modules() if isinstance(m, nn.Embedding)]


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer, GPT-2's Conv1D included."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_transposed(layer: nn.Module) -> bool:
    """Tell whether a linear layer stores its weight as (in, out), as GPT-2's Conv1D does."""
    return isinstance(layer, Conv1D)


def as_out_in(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Return a linear layer's weight, or the gradient of its weight, as (out, in).

    The function is its own inverse.
    """
    return matrix.T if is_transposed(layer) else matrix


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
