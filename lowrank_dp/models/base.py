"""Read a model with its head from disk or the hub, and list the weights that are missing."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.models.auto import modeling_auto

from lowrank_dp import _validate
from lowrank_dp._validate import listed
from lowrank_dp.losses import LOSS_OF_KIND
from lowrank_dp.models import tiny
from lowrank_dp.models.backbones import (
    WEIGHTS_IN_WORDS,
    Backbone,
    declared_kind,
    label_count,
    one_line,
    quiet,
)
from lowrank_dp.models.gguf_files import read_once

KINDS = tuple(LOSS_OF_KIND)
_PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}


def load_base(
    backbone: Backbone, kind: str | None, num_labels: int | None, dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """Read a model with a head onto the CPU.

    Args:
        backbone: where the files are; no adapter.
        kind, num_labels: kind and size of the head; None takes them from the checkpoint.
        dtype: type of the weights.

    Returns:
        The model, and the names of the weights that are not on disk, which are drawn from torch's
        global generator. ``model.lowrank_dp_base_weights`` is the digest of the other weights
        (:func:`weights_digest`).

    Raises ValueError if the files do not fit the architecture; the message names a weight of
    another shape.
    """
    kind, num_labels = kind_and_labels(backbone, kind, num_labels)
    head: dict[str, Any] = {}
    if kind != "generation":
        head = {"num_labels": num_labels, "problem_type": _PROBLEMS[kind]}
    auto: Any = (
        transformers.AutoModelForCausalLM
        if kind == "generation"
        else transformers.AutoModelForSequenceClassification
    )
    if backbone.name in tiny.NAMES:
        model, missing = tiny.model(backbone.name, auto, head)
        model = model.to(dtype)
    else:
        with read_once(backbone.load):  # for an adapter's base, which load_model reads here alone
            model, missing = _from_files(backbone, auto, head, dtype)
    if "gguf_file" in backbone.load:  # the weights are dequantised now, so they can be saved
        model.hf_quantizer.remove_quantization_config(model)
        setattr(model.config, WEIGHTS_IN_WORDS, backbone.weights)  # kept in every checkpoint
    model.name_or_path = backbone.name  # PEFT records the name as an adapter's base
    model.lowrank_dp_note = f"{backbone.note}, {type(model).__name__}"
    model.lowrank_dp_base_weights = weights_digest(model, missing)
    return model, missing


def weights_digest(model: Any, left_out: Iterable[str] = ()) -> str:
    """Return the SHA-256 of a model's weights, in hexadecimal, without those in ``left_out``.

    The names of the weights are not hashed, because they differ between versions of transformers.
    The digest is "" for a
    model that is not in float32, because a checkpoint can be loaded in several types.
    """
    skipped, state = set(left_out), model.state_dict()
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in state.values()):
        return ""
    parts = {
        hashlib.sha256(
            p.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        ).hexdigest()
        for name, p in state.items()
        if name not in skipped
    }
    return hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()


def check_base_weights(model: Any, trained_on: object, name: str, base: str) -> None:
    """Raise ValueError if ``base`` is not the model that checkpoint ``name`` was trained on.

    ``trained_on`` is the digest in the checkpoint. None (an earlier version or another program) and
    "" (no digest) pass.
    """
    found = model.lowrank_dp_base_weights
    if trained_on and found and trained_on != found:
        raise ValueError(
            f"checkpoint {name} was trained on a base with other weights than {base} "
            "has now: restore those weights, or give their folder as base"
        )


def fit_tokenizer(model: Any, tokenizer: Any, name: str) -> None:
    """Set one padding token and one maximal length, in tokens, for model and tokenizer.

    Raises ValueError if the tokenizer has tokens for which the model has no embedding.
    """
    table = embedding_table(model)
    rows = sys.maxsize if table is None else table.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"tokenizer of {name} has {len(tokenizer) - rows} added tokens for which "
            f"the model has no embedding ({len(tokenizer):,} tokens, {rows:,} rows): "
            "resize the embeddings and train and save them"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, _context(model))
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def kind_and_labels(
    backbone: Backbone, kind: str | None, num_labels: int | None
) -> tuple[str, int | None]:
    """Determine kind and size of the head from the arguments, or else from the checkpoint.

    Raises ValueError if neither states the kind, or if the checkpoint's own head has another kind
    or size.
    """
    config = backbone.config
    declared = declared_kind(config)
    is_classifier = declared in _PROBLEMS
    causal = (
        "gguf_file" in backbone.load or backbone.name == "tiny-llama" or declared == "generation"
    )
    labels = label_count(config)
    problem = config.get("problem_type")
    if kind is None and num_labels is not None:
        kind = "regression" if num_labels == 1 and problem == "regression" else "classification"
    elif kind is None and is_classifier:
        kind = declared
    elif kind is None and causal:
        kind = "generation"
    elif kind is None:
        raise ValueError(f"task or kind must be given: {backbone.name} has no head of its own")
    kind = _validate.choice("kind", kind, KINDS)
    if kind == "generation":
        encoders = set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
        if backbone.name == "tiny" or (
            config.get("model_type") in encoders and not config.get("is_decoder")
        ):
            raise ValueError(
                f"model must be a causal language model to generate text, and "
                f"{backbone.name} is an encoder; use smollm2 or tiny-llama"
            )
        return kind, None
    if is_classifier and problem not in (None, _PROBLEMS[kind]):
        raise ValueError(
            f"problem_type of {backbone.name} must be {_PROBLEMS[kind]} for {kind}, got {problem}"
        )
    if num_labels is None:
        num_labels = 1 if kind == "regression" else labels if is_classifier else None
    if num_labels is None:
        raise ValueError("num_labels must be given for classification")
    low = 2 if kind == "classification" else 1
    num_labels = _validate.integer("num_labels", num_labels, low=low)
    if is_classifier and labels != num_labels:
        raise ValueError(
            f"num_labels must be {labels} for the head of {backbone.name}, got {num_labels}"
        )
    return kind, num_labels


def _from_files(
    backbone: Backbone, auto: Any, head: dict[str, Any], dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """Read a model that transformers can read, and the names of its missing weights."""
    folder = Path(backbone.path)
    if folder.is_dir() and "gguf_file" not in backbone.load:
        with quiet(), one_line(str(folder / "config.json")):
            transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **head
            )
    before = torch.get_rng_state()
    with quiet(), one_line(f"model {backbone.name}"):
        try:
            model, report = auto.from_pretrained(
                backbone.path,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                **head,
                **backbone.load,
            )
        except RuntimeError as error:
            if "mismatch" in str(error) and (wrong := _other_shapes(folder, auto, head)):
                raise ValueError(
                    f"its configuration and task ask for other shapes than those on "
                    f"disk: {listed(wrong)}"
                ) from None
            raise
    if left_out := _left_out(model, report["unexpected_keys"]):
        raise ValueError(
            f"model {backbone.name} holds {listed(left_out)}, for which its "
            "configuration has no block"
        )
    missing = sorted(report["missing_keys"])
    if not missing and not torch.equal(before, torch.get_rng_state()):
        raise ValueError(
            f"model {backbone.name} draws a buffer at random, which no checkpoint would hold"
        )
    return model, missing


def _left_out(model: Any, unexpected: Iterable[str]) -> list[str]:
    """List weights on disk of blocks that the configuration lacks, such as further layers."""
    known = {re.sub(r"\.\d+\.", ".#.", key) for key in model.state_dict()}
    numbered = {key for key in known if "#" in key}
    return [
        key
        for key in sorted(unexpected)
        if (kind := re.sub(r"\.\d+\.", ".#.", key)) != key
        and (not numbered or any(kind == one or one.endswith(f".{kind}") for one in numbered))
    ]


def _other_shapes(folder: Path, auto: Any, head: dict[str, Any]) -> list[str]:
    """List weights whose shape on disk differs from the shape in the architecture."""
    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, **head
    )
    with torch.device("meta"):
        state = auto.from_config(config, trust_remote_code=False).state_dict()
    wrong = []
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for key in sorted(set(tensors.keys()) & state.keys()):
                shape = tuple(tensors.get_slice(key).get_shape())
                if shape != tuple(state[key].shape):
                    wrong.append(f"{key} is {shape}, not {tuple(state[key].shape)}")
    return wrong


def embedding_table(model: Any) -> Any | None:
    """Return the weight of a model's input embeddings, or None if the model has no such table."""
    try:
        return getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # transformers raises it for a model without such a table
        return None


def _context(model: Any) -> int:
    """Return the model's context: the number of tokens that it has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:  # XLNet has no limit and states -1
        return sys.maxsize
    # RoBERTa and its variants count positions from the padding index on
    offsets = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and module.padding_idx is not None
        and name.endswith("position_embeddings")
    ]
    return positions - max(offsets, default=0)
