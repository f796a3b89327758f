"""Read the head of a checkpoint from its configuration, without its weights.

The configuration may come from anywhere, so every field is checked; a missing field is None.
``models.load_model`` checks whether the weights fit the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowrank_dp.models.backbones import check_config, declared_kind, find_backbone, read_json


@dataclass(frozen=True)
class Checkpoint:
    """The head of a checkpoint.

    Attributes:
        kind: "classification", "regression", "generation", or None if the folder does not say.
        num_labels: number of classes, or None if the folder does not say.
        label_names: names of the classes in the model's order; () for LABEL_0, LABEL_1, and so on.
        is_adapter: whether the folder holds a PEFT adapter and no whole model.
    """

    kind: str | None = None
    num_labels: int | None = None
    label_names: tuple[str, ...] = ()
    is_adapter: bool = False


def read_checkpoint(folder: Path, base: str = "") -> Checkpoint:
    """Read the head that ``folder`` declares.

    An adapter that does not declare its task has the head of its base: ``base``, or the model that
    the adapter names. Raises ValueError for a damaged configuration.
    """
    if (file := folder / "adapter_config.json").is_file():
        kinds = {"CAUSAL_LM": "generation", "SEQ_CLS": "classification"}
        document = read_json(file)
        task_type = document.get("task_type")
        if isinstance(task_type, str) and task_type in kinds:
            return Checkpoint(kinds[task_type], is_adapter=True)
        try:
            backbone = find_backbone(base or str(document.get("base_model_name_or_path")))
        except ValueError:  # loading the model raises the error, with the reason
            return Checkpoint(is_adapter=True)
        return replace(_head(Path(backbone.path) / "config.json", backbone.config), is_adapter=True)
    if (file := folder / "config.json").is_file():
        check_config(config := read_json(file), file)
        return _head(file, config)
    return Checkpoint()


def has_label_head(model: str) -> bool:
    """Tell whether ``model`` (a name, hub id or folder) is a classifier by its configuration."""
    backbone = find_backbone(model)
    return _head(Path(backbone.path) / "config.json", backbone.config).kind in (
        "classification",
        "regression",
    )


def load_checkpoint(folder: Path, base: str, **arguments: Any) -> tuple[Any, Any]:
    """Load the model and the tokenizer of ``folder``; no weight is drawn at random.

    ``base`` replaces the base model that an adapter names; "" takes the adapter's. ``arguments`` go
    to ``models.load_model``. Raises ValueError as ``models.load_model`` does; for a folder without
    a tokenizer, the message says whether the parent folder has one, as is common for a trainer's
    ``checkpoint-500``.
    """
    from lowrank_dp.models import load_model  # imported when used: it imports transformers
    from lowrank_dp.models.tokenizers import has_tokenizer

    if base and (folder / "adapter_config.json").is_file():
        arguments["base"] = base
    try:
        return load_model(str(folder), new_head=False, **arguments)
    except ValueError as error:
        above = folder.absolute().parent
        if "tokenizer" in str(error) and has_tokenizer(above) and not has_tokenizer(folder):
            raise ValueError(
                f"{folder} holds no tokenizer, and its parent folder {above.name} "
                "does: copy the tokenizer's files from there into the checkpoint"
            ) from None
        raise


def _head(file: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Read the head that a configuration declares; ``file`` is named in errors."""
    kind = declared_kind(config)
    if kind is None or kind == "generation":
        return Checkpoint(kind)
    labels = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # transformers' default
    if (
        not isinstance(labels, dict)
        or not labels
        or sorted(labels) != sorted(map(str, range(len(labels))))
        or not all(isinstance(v, str) for v in labels.values())
    ):
        raise ValueError(
            f"{file}: id2label must be an object that gives each class number from 0 "
            f"its name, got {labels!r:.80}"
        )
    own = tuple(labels[str(i)] for i in range(len(labels)))
    unnamed = own == tuple(f"LABEL_{i}" for i in range(len(own)))
    return Checkpoint(kind, len(own), () if unnamed else own)
