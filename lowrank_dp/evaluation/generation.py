"""Generate texts from source texts with a causal language model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.data import Example, encode, micro_batches
from lowrank_dp.evaluation.inference import evaluating, fail_not_finite

if TYPE_CHECKING:
    from transformers import GenerationConfig


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
    settings are ignored, except that its special tokens that end a text end one here. A text ends
    before the tokenizer's end token, or before such a token, and holds no special tokens. The model
    runs in eval mode. Its mode and its settings are restored, also after an error.

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
    settings = _plain_decoding(model, tokenizer, num_beams, max_new_tokens)
    texts = [""] * len(prompts)
    with evaluating(model), _decoding_by(model, settings):
        device = next(model.parameters()).device
        for indices, batch in micro_batches(
            prompts, batch_size, tokenizer.pad_token_id, side="left", device=device
        ):
            written = _generate(model, tokenizer, batch, settings)
            for i, text in zip(indices, written, strict=True):
                texts[i] = text
    return texts


def _plain_decoding(
    model: Any, tokenizer: Any, num_beams: int, max_new_tokens: int
) -> GenerationConfig:
    """Make settings without any of the checkpoint's, except for the special tokens that end a text.

    Chat models have several such tokens, and most checkpoints of them sample at random.
    """
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    own_ends = special.intersection(own if isinstance(own, list) else [own])
    return GenerationConfig(
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({tokenizer.eos_token_id, *own_ends}),
        pad_token_id=tokenizer.pad_token_id,
    )


@contextmanager
def _decoding_by(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Replace the settings of the model, which would fill the fields that ``settings`` leaves open.

    An adapter and its base may each have settings.
    """
    owners = [m for m in model.modules() if vars(m).get("generation_config") is not None]
    before = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = settings
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            owner.generation_config = own


def _generate(
    model: Any, tokenizer: Any, batch: dict[str, Tensor], settings: GenerationConfig
) -> list[str]:
    """Generate one text per row of a batch of prompts, which are padded on the left."""
    written = model.generate(
        **batch, generation_config=settings, logits_processor=[_require_finite]
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
