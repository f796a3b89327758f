"""Writing a checkpoint that holds everything which is not in the base on disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_dp.models.adapters import BASE_WEIGHTS
from lowrank_dp.models.backbones import quiet


def save_model(
    model: Any, tokenizer: Any, folder: str | Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write a Hugging Face folder: safetensors, configuration, tokenizer; no pickle.

    A PEFT model leaves its adapter with ``modules_to_save``, to which a new head and a new pooler
    belong, and a ``config.json`` that gives the order of the labels and a digest of the base's
    weights, so that the adapter is not loaded on another base. ``weights`` replaces the
    model's own state dict, under the same names.
    """
    options: dict[str, Any] = {} if weights is None else {"state_dict": dict(weights)}
    with quiet():
        if hasattr(model, "get_base_model"):
            base = model.get_base_model()
            # "auto" would ask the hub for the base model's vocabulary
            embeddings = getattr(model, "lowrank_dp_embeddings", False)
            model.save_pretrained(folder, save_embedding_layers=embeddings, **options)
            config = copy.deepcopy(base.config)
            config.architectures = [type(base).__name__.removeprefix("FSDP")]
            setattr(config, BASE_WEIGHTS, getattr(base, "lowrank_dp_base_weights", ""))
            config.save_pretrained(folder)
        else:
            model.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
