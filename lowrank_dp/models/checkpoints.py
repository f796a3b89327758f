"""Write a checkpoint, which holds every weight that is not in its base."""

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
    """Write a Hugging Face folder: safetensors, configuration and tokenizer, no pickle.

    For a PEFT model the folder holds the adapter with its ``modules_to_save``, which include a new
    head and a new pooler, and a ``config.json`` with the order of the labels and the digest of the
    base's weights, so that the adapter is not loaded on another base.

    ``weights``, under the same names, replaces the model's state dict. Raises OSError if a file
    cannot be written.
    """
    options: dict[str, Any] = {} if weights is None else {"state_dict": dict(weights)}
    with quiet():
        if hasattr(model, "get_base_model"):
            base = model.get_base_model()
            # PEFT's default, "auto", asks the hub for the size of the base's vocabulary
            embeddings = getattr(model, "lowrank_dp_embeddings", False)
            model.save_pretrained(folder, save_embedding_layers=embeddings, **options)
            config = copy.deepcopy(base.config)
            config.architectures = [type(base).__name__.removeprefix("FSDP")]
            setattr(config, BASE_WEIGHTS, getattr(base, "lowrank_dp_base_weights", ""))
            config.save_pretrained(folder)
        else:
            model.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
