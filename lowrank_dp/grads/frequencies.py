"""Refusal of rotary frequencies that all rows of a batch share and the longest row decides.

Two rope types of transformers (``modeling_rope_utils.dynamic_rope_update``) choose the frequencies
of a whole batch by the largest position in the batch:

- "longrope" has one set of frequencies for batches up to the original context, and another set for
  longer batches. Each forward chooses anew.
- "dynamic" computes its frequencies from the length of a batch beyond the context, and keeps them
  until a longer batch or a batch below the context arrives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lowrank_dp.grads.alone import PAD_PUBLICLY


def require_fixed_frequencies(model: nn.Module, length: float, padding: str) -> None:
    """Raise ``ValueError`` if a row of up to ``length`` tokens may change other rows' frequencies.

    Args:
        model: the model.
        length: largest number of tokens of a row, padding included.
        padding: "longest" or "max-length".
    """
    for kind, limit in _limits(model):
        # With one public length, every batch gets the same frequencies by "longrope". By "dynamic",
        # a longer batch outside of the sum, such as one of an evaluation, would still decide.
        paddable = kind == "longrope"
        if length <= limit or (paddable and padding == "max-length"):
            continue
        raise ValueError(
            f"model changes the rotary frequencies of all rows in a micro-batch (rope type "
            f"{kind!r}) if one row has more than {limit} tokens, so that a longer row changes the "
            f"gradients of other rows: cut every row to {limit} tokens (training: --max-length "
            f"{limit}){f', or {PAD_PUBLICLY}' if paddable else ''}"
        )


def chooses_frequencies(module: nn.Module) -> bool:
    """Return whether the module has rotary frequencies that may depend on the length of a batch."""
    return "rope_type" in vars(module)


def _limits(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield rope types, and the number of tokens up to which their frequencies are fixed."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        found = vars(module).get("rope_type")  # one, or one per type of layer
        for layer, kind in (found if isinstance(found, Mapping) else {None: found}).items():
            if kind == "longrope":
                rope = module.config.rope_parameters
                rope = rope if layer is None else rope[layer]
                yield kind, rope["original_max_position_embeddings"]
            elif isinstance(kind, str) and "dynamic" in kind:
                yield kind, module.config.max_position_embeddings
