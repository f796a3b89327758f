"""Architectures of the embedded backbones, and the special tokens of their tokenizer."""

from __future__ import annotations

from typing import Any

NAMES = ("tiny", "tiny-llama")
CONTEXT = 256  # positions, in tokens
VOCABULARY = 768  # tokens, special tokens included
SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
PAD, CLS, SEP, MASK = range(len(SPECIAL_TOKENS))
_WIDTH, _LAYERS, _HEADS = 64, 2, 4


def config(name: str, **head: Any) -> Any:
    """Make the configuration of backbone ``name``: a ``BertConfig`` or a ``LlamaConfig``.

    ``head`` holds further fields, such as ``num_labels``.
    """
    import transformers

    shape = dict(
        vocab_size=VOCABULARY,
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=2 * _WIDTH,
        max_position_embeddings=CONTEXT,
        pad_token_id=PAD,
        initializer_range=_WIDTH**-0.5,
        **head,
    )
    if name == "tiny":
        return transformers.BertConfig(
            **shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    return transformers.LlamaConfig(
        **shape,
        num_key_value_heads=_HEADS // 2,
        bos_token_id=None,
        eos_token_id=SEP,
        tie_word_embeddings=True,
    )
