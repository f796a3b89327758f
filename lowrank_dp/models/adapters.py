"""Load a PEFT adapter on its base; refuse weights that are in neither."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lowrank_dp._validate import listed
from lowrank_dp.models.backbones import (
    Backbone,
    check_config,
    find_base,
    label_count,
    one_line,
    quiet,
    read_json,
)
from lowrank_dp.models.base import check_base_weights, embedding_table, load_base
from lowrank_dp.models.heads import final_layer, is_missing
from lowrank_dp.models.labels import (
    label_rows,
    name_labels,
    order_labels,
    own_label_names,
    permute_rows,
)

PREFIX = "base_model.model."  # prefix of the base model's parameter names in a PEFT model
BASE_WEIGHTS = "base_weights_sha256"  # key of an adapter's config.json: digest of its base


def load_adapter(
    backbone: Backbone,
    base: str | None,
    kind: str | None,
    num_labels: int | None,
    label_names: tuple[str, ...],
    dtype: torch.dtype,
) -> Any:
    """Load the PEFT model in ``backbone.path`` on its base, with logits ordered as ``label_names``.

    Raises ValueError if the base is missing; a weight is neither in the base nor in the adapter;
    the base has other weights than the digest in the adapter's folder says; the adapter holds a
    weight that the model lacks or has in another shape; or the adapter's labels are not the task's.
    """
    import peft

    folder = Path(backbone.path)
    config = _adapter_config(folder)
    found = find_base(backbone, base)
    with one_line(str(folder / "adapter_model.safetensors")):
        given = load_file(folder / "adapter_model.safetensors")
    own = _own_config(folder, found)
    if kind is None:
        kind = _kind(config, own, given)
    if kind == "classification" and num_labels is None:
        num_labels = _label_count(given, own)
    model, missing = load_base(found, kind, num_labels, dtype)
    check_base_weights(model, own.get(BASE_WEIGHTS), backbone.name, found.name)
    layer = final_layer(model)
    if layer and not is_missing(layer, missing) and f"{PREFIX}{layer}.weight" not in given:
        order_labels(model, found.config, label_names, found.name)
    _resize(model, given)
    with quiet(), one_line(f"adapter {folder}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: Any = peft.PeftModel.from_pretrained(
            model, folder, is_trainable=True, ignore_mismatched_sizes=True
        )
        state = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    _check_loaded(loaded, state, given, backbone.name)
    if absent := [key for key in missing if PREFIX + key not in given]:
        raise ValueError(
            f"adapter {backbone.name} and its base {found.name} have no weights for "
            f"{listed(absent)}: {'it' if len(absent) == 1 else 'they'} would be drawn "
            "at random"
        )
    if layer:
        _order_loaded(model, state, layer, own, label_names, backbone.name)
    loaded.lowrank_dp_embeddings = _embedding(model) in map(_bare, given)
    loaded.lowrank_dp_note = f"{backbone.name} (adapter) on {model.lowrank_dp_note}"
    return loaded


def _adapter_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"adapter {folder} must hold adapter_model.safetensors, found none")
    import peft

    config = read_json(file)
    with one_line(str(file)):
        peft.PeftConfig.from_pretrained(str(folder))
    for name, kinds in (
        ("task_type", str),
        ("modules_to_save", list),
        ("r", int),
        ("target_modules", (str, list)),
    ):
        if not isinstance(config.get(name), (kinds, type(None))):
            raise ValueError(f"{file}: {name} is of the wrong type, got {config[name]!r}")
    return config


def _own_config(folder: Path, base: Backbone) -> dict[str, Any]:
    """Read the configuration that gives the adapter's labels: its own, or else its base's.

    Runs of an earlier version wrote no config.json and trained in the order of their task; for
    these runs the labels of the base are left out.
    """
    if (file := folder / "config.json").is_file():
        config = read_json(file)
        check_config(config, file)
        return config
    if (folder / "training.json").is_file():
        return {
            name: value
            for name, value in base.config.items()
            if name not in ("id2label", "label2id")
        }
    return base.config


def _kind(config: dict[str, Any], own: dict[str, Any], given: dict[str, Tensor]) -> str | None:
    """Return the kind of head that the adapter was trained with; None if it follows the base."""
    if config.get("task_type") == "CAUSAL_LM":
        return "generation"
    if config.get("task_type") != "SEQ_CLS" and not _head_rows(given):
        return None
    return "regression" if own.get("problem_type") == "regression" else "classification"


def _label_count(given: dict[str, Tensor], own: dict[str, Any]) -> int:
    """Return the size of the adapter's own head, or else the number in its configuration."""
    rows = _head_rows(given)
    return rows[-1] if rows else label_count(own)


def _head_rows(given: dict[str, Tensor]) -> list[int]:
    """List the numbers of rows of the adapter's layers that can be a classifier's last layer."""
    return [
        tensor.shape[0]
        for key, tensor in given.items()
        if tensor.ndim == 2
        and re.search(r"\.(classifier|score|out_proj|logits_proj|summary|linear_out)\.weight$", key)
        and not re.search(r"\.lora_|\.\d+\.", key)
    ]


def _embedding(model: Any) -> str:
    """Return the name of the input embedding's weight; "" if the model has no embedding table."""
    table = embedding_table(model)
    return next((name for name, p in model.named_parameters() if p is table), "")


def _bare(key: str) -> str:
    """Translate the name of a weight in an adapter's file to the name in the base."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def _resize(model: Any, given: dict[str, Tensor]) -> None:
    """Resize the embedding table to the adapter's, which holds rows for added tokens."""
    name = _embedding(model)
    rows = [tensor.shape[0] for key, tensor in given.items() if name and _bare(key) == name]
    if rows and rows[0] != model.get_input_embeddings().weight.shape[0]:
        with quiet():
            model.resize_token_embeddings(rows[0], mean_resizing=False)


def _check_loaded(
    loaded: Any, state: dict[str, Tensor], given: dict[str, Tensor], name: str
) -> None:
    """Raise ValueError unless the file and the adapter's part of the model agree.

    Every weight of the file must be in the model, with its value, and every weight of the adapter
    must be in the file.
    """
    if lost := sorted(state.keys() - given.keys()):
        raise ValueError(
            f"adapter {name} has no weights for {listed(lost)}: they would be drawn at random"
        )
    base = {PREFIX + key: p for key, p in loaded.get_base_model().state_dict().items()}
    for key, tensor in given.items():
        value = state.get(key, base.get(key))
        if value is None:
            raise ValueError(f"adapter {name} holds {key}, which the model does not have")
        if value.shape != tensor.shape:
            raise ValueError(
                f"adapter {name} has {key} of shape {tuple(tensor.shape)}, and the "
                f"model has {tuple(value.shape)}"
            )
        # PEFT rounds what it loads to the type of the model
        if not torch.equal(tensor.to(value), value) and bool(tensor.isfinite().all()):
            raise ValueError(
                f"adapter {name} holds {key}, which PEFT does not restore: name it in "
                "modules_to_save"
            )


def _order_loaded(
    model: Any,
    state: dict[str, Tensor],
    layer: str,
    own: dict[str, Any],
    label_names: tuple[str, ...],
    name: str,
) -> None:
    """Permute the rows of the head's last layer that come from the adapter."""
    names = own_label_names(own, f"config.json of {name}")
    rows = label_rows(names, label_names, name)
    tensors = {
        key: p
        for key, p in state.items()
        if key.startswith(f"{PREFIX}{layer}.") and "lora_A" not in key
    }
    if rows is not None and any(tensor.shape[0] != len(rows) for tensor in tensors.values()):
        raise ValueError(
            f"labels of {name} can't be brought into the task's order: the adapter "
            f"changes the head by {listed(sorted(tensors))}"
        )
    if rows is not None:
        permute_rows(list(tensors.values()), rows)
    name_labels(model, names, label_names)
