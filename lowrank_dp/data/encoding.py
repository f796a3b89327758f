"""Encode examples as token rows: special tokens, truncation and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lowrank_dp import _validate
from lowrank_dp.data.examples import Example
from lowrank_dp.data.template import Template
from lowrank_dp.losses import IGNORE, LOSS_OF_KIND

SEPARATOR = "\n"  # between the source and the target of a generation example


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    kind: str,
    max_length: int | None = None,
    with_target: bool = True,
    template: str | None = None,
) -> list[dict[str, Any]]:
    """Encode examples as token rows, one row per example, in order.

    A row has ``input_ids``, ``labels`` (with ``with_target``) and, for a tokenizer with segment
    ids, ``token_type_ids``.

    - Classification and regression: a row holds the text or the pair, with the tokenizer's special
      tokens. Tokens beyond ``max_length`` are cut from the longer text of a pair.
    - Generation: a row holds source, line break, target and end of sequence. Labels are -100 before
      the target. Tokens beyond ``max_length`` are cut from the end of the source, never from the
      target. ``with_target=False`` gives the prompts alone, to generate from.

    ``template`` (see :meth:`Template.parse`) is for causal language models that another program
    trained. The written text is then tokenised as a whole, with the tokenizer's own special
    tokens. With ``{target}``, the target and the text after it are labelled, and an end of sequence
    is added. With ``{text}``, all tokens except the first are labelled, no end of sequence is
    added, and tokens beyond ``max_length`` are cut from the end.

    ``max_length`` is in tokens; with None, nothing is cut. Raises ValueError for a ``max_length``
    that leaves no token of a text beside the special tokens and, with the example's id, for a text
    longer than the model's context and for a target that leaves no room for its source.
    """
    _validate.choice("kind", kind, LOSS_OF_KIND)
    if not examples:
        _validate.fail("examples", "non-empty", examples)
    context = tokenizer.model_max_length if tokenizer.model_max_length < 1e9 else None
    if max_length is not None:
        max_length = _validate.integer("max_length", max_length, high=context or math.inf)
    if template is not None:
        if kind != "generation" or not with_target:
            _validate.fail(
                "template", "None, except for texts that a causal language model scores", template
            )
        form = Template.parse(template)
        rows = (
            _encode_plain(examples, tokenizer, max_length, form)
            if form.plain
            else (_encode_template(examples, tokenizer, max_length, form))
        )
    else:
        build = _encode_generation if kind == "generation" else _encode_classification
        rows = build(examples, tokenizer, max_length, with_target)
    for example, row in zip(examples, rows, strict=True):
        if context and len(row["input_ids"]) > context:
            raise ValueError(
                f"{example.id} has {len(row['input_ids'])} tokens, more than the "
                f"model's context of {context}; give a max_length to cut it"
            )
    return rows


def _encode_classification(
    examples: Sequence[Example], tokenizer: Any, max_length: int | None, with_target: bool
) -> list[dict[str, Any]]:
    """Encode texts or pairs with a class or a score."""
    pairs = [e.text_pair for e in examples if e.text_pair is not None]
    if pairs and len(pairs) < len(examples):
        raise ValueError("examples must all have a text_pair, or none")
    _require_cuttable(tokenizer, max_length, 2 if pairs else 1)
    encoded = tokenizer(
        [e.text for e in examples],
        pairs or None,
        max_length=max_length,
        truncation=max_length is not None,
        verbose=False,
    )
    # a tokenizer without special tokens makes no token of a blank text, but a model needs one
    blank = [tokenizer.eos_token_id]
    rows: list[dict[str, Any]] = [{"input_ids": ids or blank} for ids in encoded["input_ids"]]
    for i, kinds in enumerate(encoded.get("token_type_ids", ())):
        rows[i]["token_type_ids"] = kinds or [0]
    if with_target:
        for example, row in zip(examples, rows, strict=True):
            if example.label is None:
                raise ValueError(f"{example.id} must have a label")
            row["labels"] = example.label
    return rows


def _encode_generation(
    examples: Sequence[Example], tokenizer: Any, max_length: int | None, with_target: bool
) -> list[dict[str, Any]]:
    """Encode source, separator, target and end of sequence."""
    _require_eos(tokenizer)

    def tokens(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    # source and target are tokenised apart, so that the prompt does not depend on the target
    opening = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
    separator = tokens([SEPARATOR])[0]
    sources = tokens([e.text for e in examples])
    targets: list[list[int]] = [[] for _ in examples]
    if with_target:
        if missing := [e.id for e in examples if e.target is None]:
            raise ValueError(f"{missing[0]} must have a target")
        targets = [
            [*ids, tokenizer.eos_token_id] for ids in tokens([e.target or "" for e in examples])
        ]
    rows = []
    for example, source, target in zip(examples, sources, targets, strict=True):
        source = _cut(example, source, len(opening) + len(separator), len(target), max_length)
        prompt = [*opening, *source, *separator]
        row = {"input_ids": prompt + target}
        if with_target:
            row["labels"] = [IGNORE] * len(prompt) + target
        rows.append(row)
    return rows


def _cut(
    example: Example, source: list[int], others: int, target: int, max_length: int | None
) -> list[int]:
    """Cut the source to the tokens that fit beside the target and ``others`` more tokens."""
    if max_length is None:
        return source
    room = max_length - others - target
    if room < min(1, len(source)):
        raise ValueError(
            f"{example.id} has {f'a target of {target}' if target else f'{others} other'} tokens, "
            f"which leaves no room for its source in a max_length of {max_length}: give at least "
            f"{others + target + min(1, len(source))}"
        )
    return source[:room]


def _encode_template(
    examples: Sequence[Example], tokenizer: Any, max_length: int | None, template: Template
) -> list[dict[str, Any]]:
    """Encode written texts; the characters that each token covers tell where the target starts."""
    _require_eos(tokenizer)
    if not tokenizer.is_fast:
        raise ValueError(
            "template must come with a tokenizer that tells which characters a token covers: "
            "save the checkpoint with its fast tokenizer (tokenizer.json)"
        )
    parts = [template.parts(example) for example in examples]
    encoded = tokenizer(
        ["".join(four) for four in parts], return_offsets_mapping=True, verbose=False
    )
    rows = []
    for example, four, ids, spans in zip(
        examples, parts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        begin, end, scored = (sum(map(len, four[:count])) for count in (1, 2, 3))
        # a token that spans the template's last space and the target's first word is the target's
        first = next(
            (i for i, (left, right) in enumerate(spans) if right > max(scored, left)), len(ids)
        )
        inside = [
            i for i, (left, right) in enumerate(spans[:first]) if begin <= left < right <= end
        ]
        start, stop = (inside[0], inside[-1] + 1) if inside else (first, first)
        target = ids[first:]
        if target[-1:] != [tokenizer.eos_token_id]:
            target = [*target, tokenizer.eos_token_id]
        source = _cut(example, ids[start:stop], first - (stop - start), len(target), max_length)
        prompt = [*ids[:start], *source, *ids[stop:first]]
        rows.append({"input_ids": prompt + target, "labels": [IGNORE] * len(prompt) + target})
    return rows


def _encode_plain(
    examples: Sequence[Example], tokenizer: Any, max_length: int | None, template: Template
) -> list[dict[str, Any]]:
    """Encode whole texts; the first token is not labelled, because no token precedes it."""
    _require_cuttable(tokenizer, max_length, 1)
    encoded = tokenizer(
        [template.parts(example)[3] for example in examples],
        verbose=False,
        max_length=max_length,
        truncation=max_length is not None,
    )
    rows = []
    for example, ids in zip(examples, encoded["input_ids"], strict=True):
        if len(ids) < 2:
            raise ValueError(
                f"{example.id} has {len(ids)} tokens, and a text must have at least 2, "
                "because the first is not scored: leave the text out, or give a larger max_length"
            )
        rows.append({"input_ids": ids, "labels": [IGNORE, *ids[1:]]})
    return rows


def _require_cuttable(tokenizer: Any, max_length: int | None, texts: int) -> None:
    """Raise ValueError if ``max_length`` leaves less than one token for each of the texts.

    Below the number of special tokens, the tokenizer cuts nothing.
    """
    special = tokenizer.num_special_tokens_to_add(pair=texts == 2)
    if max_length is not None and max_length < special + texts:
        _validate.fail(
            "max_length",
            f"an integer >= {special + texts}, for {special} special tokens and at least one "
            f"token of {'each text of a pair' if texts == 2 else 'the text'}",
            max_length,
        )


def _require_eos(tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an end-of-sequence token to generate text")
