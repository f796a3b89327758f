"""Load the tokenizer of a backbone; refuse the empty tokenizer that transformers would make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from lowrank_dp.models import tiny
from lowrank_dp.models.backbones import (
    Backbone,
    adapter_file,
    find_backbone,
    find_base,
    one_line,
    quiet,
)


def load_tokenizer(name: str, *, revision: str | None = None, base: str | None = None) -> Any:
    """Load the tokenizer of a backbone, with a padding token.

    An adapter's folder may hold a tokenizer; otherwise the tokenizer of its base is loaded
    (``base`` replaces the path in the adapter). Raises ValueError in one line if the folder holds
    no tokenizer, a damaged tokenizer, or a tokenizer with an empty vocabulary.
    """
    backbone = find_backbone(name, revision)
    if adapter_file(backbone) and not _files(Path(backbone.path)):
        backbone = find_base(backbone, base)
    return tokenizer_of(backbone)


def tokenizer_of(backbone: Backbone) -> Any:
    """Load the tokenizer of a backbone that has been found, as :func:`load_tokenizer` does."""
    if backbone.name in tiny.NAMES:
        return tiny.tokenizer(backbone.name)
    folder = Path(backbone.path)
    local = folder.is_dir() and "gguf_file" not in backbone.load
    if local and not _files(folder):
        _refuse(folder, "holds no tokenizer")
    load = {k: v for k, v in backbone.load.items() if k != "use_safetensors"}
    with quiet(), one_line(f"tokenizer of {backbone.name}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            backbone.path, trust_remote_code=False, **load
        )
        names = {"tokenizer.json", *type(tokenizer).vocab_files_names.values()}
        words = (
            tokenizer.get_vocab().keys()
            - set(tokenizer.all_special_tokens)
            - {str(token) for token in tokenizer.added_tokens_decoder.values()}
        )
    if type(tokenizer).vocab_files_names and not (
        words and (not local or any((folder / file).is_file() for file in names))
    ):
        _refuse(folder, "holds a tokenizer without a vocabulary, to which all words are unknown")
    if tokenizer.pad_token_id is None:  # GPT-2, Llama: padding is masked, so any token is fine
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"tokenizer of {backbone.name} must have a pad, eos or unk token")
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds any file of a tokenizer."""
    return bool(_files(folder))


def _files(folder: Path) -> list[str]:
    """List the files of a tokenizer in a folder."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [
        name
        for name in names
        if name.endswith((".model", ".spm"))
        or name.startswith(("tokenizer", "vocab", "merges", "bpe.codes", "tekken"))
    ]


def _refuse(folder: Path, what: str) -> None:
    raise ValueError(
        f"folder {folder} {what}: save there the tokenizer of the original model, "
        f"by tokenizer.save_pretrained({str(folder)!r})"
    )
