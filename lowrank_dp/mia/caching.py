"""Save signals under a hash of their inputs, so that no signal is computed twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lowrank_dp import artifacts
from lowrank_dp._json import json_digest
from lowrank_dp.train.identity import digests

S = TypeVar("S")

# suffixes of files with weights or a vocabulary, and names of other files that decide the signals
_SUFFIXES = (".safetensors", ".gguf", ".model", ".spm")
_DECIDE = (
    "config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)


def weight_hash(folder: str | Path) -> str:
    """Hash the weights, the configurations and the tokenizer in a folder (SHA-256)."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.is_file() and (path.suffix in _SUFFIXES or path.name in _DECIDE):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def signals_key(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    encoding: Mapping[str, Any],
    *,
    reference: Any = None,
) -> str:
    """Compose the key of a checkpoint's signals.

    The key holds digests of the loaded weights, those of an adapter's base included, because the
    files of a base may be replaced under the same path.

    Args:
        model, tokenizer: the loaded checkpoint.
        rows: the records as token rows of ``data.encode``.
        encoding: the arguments of ``signals.measure`` that decide the precision and, with ``rows``,
            the inputs of the model.
        reference: the model before fine-tuning, which may be ``model``; None if not known.
    """
    before: object = None
    if reference is not None:
        before = "adapter off" if reference is model else digests(reference, tokenizer, rows)
    return f"signals {json_digest([digests(model, tokenizer, rows), before, encoding])}"


def reference_key(
    model: Any, rows: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> str:
    """Compose the key of the model before fine-tuning, which all its checkpoints share.

    Args:
        model: the model. An adapter does not enter the key, so it must be switched off.
        rows: the records as token rows of ``data.encode``.
        arguments: all else that decides the signals to the last bit, such as the batch size.
    """
    adapters = {*getattr(model, "peft_config", {})}
    digest = hashlib.sha256(f"{model.config.to_json_string()} {torch.get_num_threads()}".encode())
    digest.update(repr(sorted(arguments.items())).encode())
    for row in rows:
        digest.update(repr(row).encode())
    # the names differ between a model and the same model with an adapter, the order does not
    for name, weight in model.state_dict().items():
        if not adapters & {*name.split(".")}:
            digest.update(f"{weight.device.type} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"reference {digest.hexdigest()}"


def cached(folder: Path, key: str | None, kind: type[S], compute: Callable[[], S]) -> S:
    """Return the ``kind`` saved under ``key``; compute and save it if missing or damaged.

    Without a key, it is computed and not saved.
    """
    if key is None:
        return compute()
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        return artifacts.load_result(folder, name, kind)
    except (FileNotFoundError, ValueError):
        found = compute()
        artifacts.save_result(found, folder, name)
        return found
