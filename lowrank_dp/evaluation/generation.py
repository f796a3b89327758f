"""Generate texts from source texts with a causal language model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.data import Example, encode, micro_batches
from lowrank_dp.evaluation.inference import evaluating, fail_not_finite

# These settings replace a checkpoint's own decoding settings (chat models sample at random).
_PLAIN_DECODING = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "use_cache": True,
}


def generate_texts(
    model: Any,
    tokenizer: Any,
    sources: Sequence[str],
    *,
    num_beams: int = 1,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    max_length: int | None = None,
) -> list[str]:
    """Generate one text per source, in the order of ``sources``.

    Decoding is greedy, or a beam search if ``num_beams`` > 1; the checkpoint's own decoding
    settings are ignored. A text ends before the end token and holds no special tokens. The model
    runs in eval mode, and its mode is restored.

    Args:
        model: a causal language model.
        tokenizer: the model's tokenizer, from ``load_model``.
        sources: source texts; a prompt is a source text and a line break, as in ``data.encode``.
        num_beams: number of beams, >= 1.
        max_new_tokens: maximal length of a generated text, in tokens, >= 1.
        batch_size: number of prompts in memory at a time.
        max_length: maximal length of a prompt, in tokens; longer prompts are cut. None cuts none.

    Raises:
        ValueError: if there are no sources, the model cannot generate, its logits are not finite,
            or a prompt leaves no room for ``max_new_tokens`` in the model's context.
    """
    num_beams = _validate.integer("num_beams", num_beams)
    max_new_tokens = _validate.integer("max_new_tokens", max_new_tokens)
    if isinstance(sources, str) or not sources:
        _validate.fail("sources", "a non-empty list of strings", sources)
    if not getattr(model, "can_generate", lambda: False)():
        _validate.fail(
            "model",
            "a causal language model to generate text (smollm2 or tiny-llama)",
            type(model).__name__,
        )
    prompts = encode(
        [Example(f"sources[{i}]", text) for i, text in enumerate(sources)],
        tokenizer,
        kind="generation",
        max_length=max_length,
        with_target=False,
    )
    _require_room(model, tokenizer, prompts, max_new_tokens)
    texts = [""] * len(prompts)
    with evaluating(model):
        device = next(model.parameters()).device
        for indices, batch in micro_batches(
            prompts, batch_size, tokenizer.pad_token_id, side="left", device=device
        ):
            written = _generate(model, tokenizer, batch, num_beams, max_new_tokens)
            for i, text in zip(indices, written, strict=True):
                texts[i] = text
    return texts


def _generate(
    model: Any, tokenizer: Any, batch: dict[str, Tensor], num_beams: int, max_new_tokens: int
) -> list[str]:
    """Generate one text per row of a batch of prompts, which are padded on the left."""
    written = model.generate(
        **batch,
        **_PLAIN_DECODING,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=[_require_finite],
    )
    new_tokens = written[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(
        new_tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def _require_room(
    model: Any, tokenizer: Any, prompts: Sequence[dict[str, Any]], max_new_tokens: int
) -> None:
    """Raise ValueError if a prompt leaves no room for ``max_new_tokens`` in the model's context."""
    longest = max(len(prompt["input_ids"]) for prompt in prompts)
    context = min(
        tokenizer.model_max_length,
        getattr(model.config, "max_position_embeddings", None) or sys.maxsize,
    )
    if longest + max_new_tokens > context:
        raise ValueError(
            f"max_new_tokens must be <= {context - longest}, because the longest prompt takes "
            f"{longest} of the {context} tokens of the model's context, got "
            f"{max_new_tokens}; or cut the prompts by a smaller max_length"
        )


def _require_finite(tokens: Tensor, scores: Tensor) -> Tensor:
    """Return the logits; raise ValueError for NaN or infinity (-inf marks an excluded token)."""
    if not bool((scores < float("inf")).all()):
        fail_not_finite("the next token of a prompt")
    return scores
