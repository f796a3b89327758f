"""Save signals under a hash of what they were computed from, and read them instead of a repeat."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lowrank_dp import artifacts
from lowrank_dp.data import Example
from lowrank_dp.models.base import weights_digest

S = TypeVar("S")

# files on which the signals of a checkpoint depend, beside the weights
_DECIDE = (
    "config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)


def weight_hash(folder: str | Path) -> str:
    """Hash the safetensors, the configurations and the tokenizer of a checkpoint (SHA-256)."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.suffix == ".safetensors" or path.name in _DECIDE:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def cache_key(
    folder: str | Path, examples: Sequence[Example], encoding: Mapping[str, Any], *context: str
) -> str:
    """Compose the key of a checkpoint's signals: its weights, the records and their encoding.

    ``encoding`` has the arguments of `measure` that determine the tokens of a record and the
    precision; ``context`` is appended unchanged.
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.id} {example.content_hash} {example.label}\n".encode())
    return " ".join(
        [weight_hash(folder), digest.hexdigest(), repr(sorted(encoding.items())), *context]
    )


def reference_key(
    model: Any, rows: Sequence[Mapping[str, Any]], encoding: Mapping[str, Any]
) -> str | None:
    """Compose the key of the model before fine-tuning, which all its checkpoints share.

    ``model`` may have an adapter, which does not enter the key; ``rows`` are the token rows of
    ``data.encode``, and ``encoding`` is that of :func:`cache_key`. None if the weights have no
    digest (``models.base.weights_digest``).
    """
    adapters = {*getattr(model, "peft_config", {})}
    added = [name for name in model.state_dict() if adapters & {*name.split(".")}]
    if not (weights := weights_digest(model, added)):
        return None
    parts = [
        weights,
        model.config.to_json_string(),
        *map(repr, rows),
        repr(sorted(encoding.items())),
    ]
    return f"reference {hashlib.sha256(chr(10).join(parts).encode()).hexdigest()}"


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
