"""Load a backbone with its head and its tokenizer, ready to train."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank_dp import _validate
from lowrank_dp.data.task import Task
from lowrank_dp.models.adapters import load_adapter
from lowrank_dp.models.backbones import Backbone, adapter_file, find_backbone, find_base
from lowrank_dp.models.base import fit_tokenizer, load_base
from lowrank_dp.models.gguf_files import read_once
from lowrank_dp.models.heads import final_layer, is_missing, mark_new
from lowrank_dp.models.labels import name_labels, order_labels
from lowrank_dp.models.names import METHODS
from lowrank_dp.models.tokenizers import has_tokenizer, tokenizer_of
from lowrank_dp.models.trainable import (
    LORA_INITS,
    add_lora,
    choose_trainable,
    embeddings,
    freeze_a,
    is_linear,
)


def load_model(
    name: str,
    *,
    task: Task | None = None,
    kind: str | None = None,
    num_labels: int | None = None,
    method: str = "full",
    rank: int = 8,
    lora_alpha: float | None = None,
    lora_init: str = "peft",
    target_modules: list[str] | None = None,
    train_embeddings: bool = False,
    train_layers: int | str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    revision: str | None = None,
    new_head: bool = True,
    base: str | None = None,
) -> tuple[Any, Any]:
    """Load a model in eval mode, with ``requires_grad`` set by ``method``, and its tokenizer.

    Args:
        name: a name of ``models.NAMES``, a subfolder of the folder that the environment variable
            ``LOWRANK_DP_MODELS`` names, a hub id, a GGUF file (dequantised), or a folder with a
            full model, an adapter or one GGUF file.
        task: the task whose head the model gets. A checkpoint that already is a classifier or a
            causal language model needs neither ``task`` nor ``kind``.
        kind, num_labels: in place of ``task``; ``kind`` is one of ``models.KINDS``.
        method: "full" trains the weights and biases of linear layers (GPT-2's Conv1D included) and
            of layer and RMS norms, and the head. "lora" trains a pair B A beside every linear layer
            of the transformer blocks, and a classifier's head. "lora-frozen-a" does the same with
            A fixed.
        rank, lora_alpha: rank and scale of LoRA. The update is B A times ``lora_alpha / rank``;
            ``lora_alpha`` defaults to ``rank``.
        lora_init: "peft" draws A as PEFT does (Kaiming uniform). "gaussian" draws A from
            N(0, 1/rank) (variance 1/rank), so that E[A^T A] = I, as the theory assumes. (PEFT's own
            option of that name has standard deviation 1/rank.)
        target_modules: names of the linear layers that get a pair, in place of all.
        train_embeddings: whether "full" trains embeddings too. An output layer that shares its
            weight with the embedding counts as embedding.
        train_layers: narrows ``method``: an integer k to the last k blocks and the layers after
            these, a regular expression to the parameters whose names match (``re.search``). The
            head always trains.
        dtype, device: type and device of the model's weights.
        seed: random seed of a new head and of LoRA's A; torch's global generator is unchanged.
        revision: revision of a hub id; None takes the repository's default.
        new_head: whether a missing head may be drawn at random; False for a trained checkpoint.
        base: path of the adapter's base, in place of the path in the adapter.

    The head is the classifier's layers beside its backbone, and a pooler that the backbone lacks.
    All other weights must be on disk; ``describe`` names the new weights. If a checkpoint names its
    labels, its logits are permuted into the order of the task's ``label_names``. For an adapter,
    "full" means the parameters that the adapter trains, and "lora-frozen-a" also fixes A.

    Raises ValueError in one line for an unknown or unreachable model, pickled weights, damaged
    files, an encoder asked to generate, a missing weight outside a new head, labels that are not
    the task's, and a ``train_layers`` or ``target_modules`` that matches nothing. An adapter keeps
    its own form: of the arguments from ``rank`` to ``train_layers``, it takes only the defaults and
    its own ``rank`` and ``lora_alpha``.
    """
    _validate.choice("method", method, METHODS)
    _validate.choice("lora_init", lora_init, LORA_INITS)
    rank = _validate.integer("rank", rank)
    scale = _validate.positive("lora_alpha", rank if lora_alpha is None else lora_alpha)
    seed = _validate.integer("seed", seed, low=0)
    device = parse_device(device)
    labels: tuple[str, ...] = ()
    if task is not None:
        kind, num_labels, labels = task.kind, task.num_labels or None, tuple(task.label_names)
    backbone = find_backbone(name, revision)
    with torch.random.fork_rng(devices=[]), read_once(backbone.load):
        torch.manual_seed(seed)
        if adapter_file(backbone):
            own = has_tokenizer(Path(backbone.path))
            tokenizer = tokenizer_of(backbone if own else find_base(backbone, base))
            model = load_adapter(backbone, base, kind, num_labels, labels, dtype)
            _require_own_form(
                model,
                backbone.name,
                rank=rank,
                lora_alpha=lora_alpha,
                lora_init=lora_init,
                target_modules=target_modules,
                train_embeddings=train_embeddings,
                train_layers=train_layers,
            )
            fit_tokenizer(model, tokenizer, backbone.name)
        else:
            tokenizer = tokenizer_of(backbone)
            model = _load_full(backbone, tokenizer, kind, num_labels, labels, dtype, new_head)
            if method == "full":
                choose_trainable(model, train_embeddings, train_layers)
            else:
                if train_embeddings:
                    raise ValueError("train_embeddings must be False with LoRA, got True")
                model = add_lora(model, rank, scale, lora_init, target_modules, train_layers)
    if method == "lora-frozen-a":
        freeze_a(model)
    return model.to(device).eval(), tokenizer


def describe(model: Any) -> str:
    """Describe a model in one line: backbone, source, numbers of parameters, new weights."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    note = getattr(model, "lowrank_dp_note", type(model).__name__)
    new = ", ".join(getattr(model, "lowrank_dp_new", ()))
    return f"{note}: {total:,} parameters, {trained:,} trained" + (
        f"; head new: {new}" if new else ""
    )


def matrix_parameters(model: nn.Module) -> list[str]:
    """List the names of the trainable 2-D weights of linear layers, in the model's order.

    The list includes LoRA's A and B and a classifier's head, but no embeddings and no norms. The
    weights are stored as (out_features, in_features), those of GPT-2's Conv1D transposed.
    """
    linear = {id(m.weight) for m in model.modules() if is_linear(m)}
    linear -= {id(p) for p in embeddings(model)}
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim == 2 and id(p) in linear
    ]


def _load_full(
    backbone: Backbone,
    tokenizer: Any,
    kind: str | None,
    num_labels: int | None,
    labels: tuple[str, ...],
    dtype: torch.dtype,
    new_head: bool,
) -> Any:
    """Load a full model with its own head, permuted to the task's order, or with a new head."""
    model, missing = load_base(backbone, kind, num_labels, dtype)
    mark_new(model, backbone.name, missing, new_head=new_head)
    last = final_layer(model)
    if last and is_missing(last, missing):
        name_labels(model, None, labels)
    elif last:
        order_labels(model, backbone.config, labels, backbone.name)
    fit_tokenizer(model, tokenizer, backbone.name)
    return model


def _require_own_form(model: Any, name: str, **asked: Any) -> None:
    """Refuse arguments of ``load_model`` that ask for another form than a loaded adapter has."""
    config = model.peft_config[model.active_adapter]
    own = {"rank": getattr(config, "r", None), "lora_alpha": getattr(config, "lora_alpha", None)}
    defaults = inspect.signature(load_model).parameters
    for option, value in asked.items():
        if value != defaults[option].default and value != own.get(option):
            raise ValueError(
                f"{option} must be left out for {name}, an adapter, which keeps its own form, got "
                f"{value!r}"
            )


def parse_device(device: str | torch.device) -> torch.device:
    """Parse a device; raise ValueError if torch does not find the device."""
    chosen = None
    with contextlib.suppress(RuntimeError):
        chosen = torch.device(device)
    if chosen is None or chosen.type == "meta":  # a meta tensor has no values
        _validate.fail("device", "a torch device such as cpu or cuda", str(device))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        _validate.fail("device", "cpu: this torch finds no CUDA device", str(device))
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        _validate.fail("device", f"one of cpu, {', '.join(devices)}", str(device))
    return chosen
