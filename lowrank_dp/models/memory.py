"""Memory for the logits of a model with a large vocabulary."""

from __future__ import annotations

import warnings
from typing import Any

ROW_TOKENS = 64  # assumed tokens per row: a public number, since real lengths may be private
COPIES = 4  # logits, their float32 logarithms, and the gradients of both
LIMIT = 4 << 30  # largest number of bytes without a warning


def logits_bytes(vocabulary: int, micro_batch_size: int) -> int:
    """Return the bytes of a micro-batch's logits and their gradients, at ``ROW_TOKENS`` tokens."""
    return COPIES * 4 * ROW_TOKENS * micro_batch_size * vocabulary


def rows_that_fit(model: Any, kind: str, num_rows: int) -> int:
    """Return the number of rows, at most ``num_rows`` and at least 1, whose logits fit ``LIMIT``.

    Args:
        model: the model. ``config.vocab_size`` is the number of logits per token.
        kind: kind of the task. For a task other than "generation", all rows fit.
        num_rows: requested number of rows in memory at a time.
    """
    vocabulary = getattr(model.config, "vocab_size", None)
    if kind != "generation" or not isinstance(vocabulary, int):
        return num_rows
    return min(num_rows, max(1, LIMIT // logits_bytes(vocabulary, 1)))


def warn_of_logits(model: Any, kind: str, micro_batch_size: int) -> None:
    """Warn if the logits of a micro-batch of a causal language model take over ``LIMIT`` bytes.

    The arguments are those of :func:`rows_that_fit`.
    """
    fits = rows_that_fit(model, kind, micro_batch_size)
    if fits < micro_batch_size:
        vocabulary = model.config.vocab_size
        size = logits_bytes(vocabulary, micro_batch_size) / 2**30
        warnings.warn(
            f"micro_batch_size {micro_batch_size} takes up to {size:.0f} GiB for logits "
            f"over {vocabulary:,} tokens at {ROW_TOKENS} tokens per row; {fits} takes 4 GiB, and "
            "the result does not depend on this number",
            stacklevel=3,
        )
