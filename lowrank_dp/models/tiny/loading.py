"""Load an embedded backbone and its tokenizer from the files in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_dp.models.tiny.architecture import CLS, CONTEXT, SEP, config

FOLDER = Path(__file__).parent
TOKENIZER = "tokenizer.json"  # of both backbones


def weights_file(name: str) -> str:
    """Name of the safetensors file with the weights of backbone ``name``."""
    return f"{name}.safetensors"


def tokenizer(name: str, folder: Path = FOLDER) -> Any:
    """Load the tokenizer of backbone ``name``.

    The tokenizer of ``tiny`` writes ``[CLS] text [SEP]``. The tokenizer of ``tiny-llama`` writes
    the bare text; its end of sequence is ``[SEP]``.
    """
    import tokenizers
    import transformers

    core = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    if name == "tiny":
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
        )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[SEP]",
        model_max_length=CONTEXT,
        model_input_names=[i for i in inputs if name == "tiny" or i != "token_type_ids"],
    )


def model(name: str, auto: Any, head: dict[str, Any]) -> tuple[Any, list[str]]:
    """Build backbone ``name`` under a head, and load the weights of the backbone.

    Args:
        name: one of ``architecture.NAMES``.
        auto: the transformers auto class that chooses the head.
        head: fields of the configuration that the head needs.

    Returns:
        The model on the CPU in float32, and the names of the weights of its new head. The head is
        drawn from torch's global generator, after the other weights, which the file then replaces.
    """
    from safetensors.torch import load_file

    built = auto.from_config(config(name, **head), trust_remote_code=False)
    weights = load_file(FOLDER / weights_file(name))
    built.load_state_dict(weights, strict=False)
    state = built.state_dict()
    loaded = {state[key].data_ptr() for key in weights}  # a tied weight is loaded with its twin
    missing = [key for key, tensor in state.items() if tensor.data_ptr() not in loaded]
    if lost := [key for key in missing if key.startswith(f"{built.base_model_prefix}.")]:
        raise RuntimeError(f"{weights_file(name)} has no weight {lost[0]}")
    return built, missing
