"""How well a model does on a task: its loss, and the metrics that papers report.

:func:`evaluate` takes a model, its tokenizer and a task. The parts serve alone as well:
:func:`label_metrics` on predictions, :func:`generate_texts`, and :func:`text_metrics` on texts.
The metrics are those of scikit-learn, scipy, sacrebleu and rouge-score; losses are one an example,
as ``lowrank_dp.grads`` defines them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lowrank_dp import _validate
from lowrank_dp.data import Example, Task, encode, micro_batches, subset
from lowrank_dp.data.examples import record_group
from lowrank_dp.evaluation.metrics import label_metrics, text_metrics
from lowrank_dp.losses import LOSS_OF_KIND, LOSSES

# A checkpoint may bring its own way of decoding (chat models sample); these settings undo it.
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


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    split: str = "validation",
    *,
    max_length: int | None = None,
    pad_to: int | None = None,
    batch_size: int = 64,
    max_examples: int | None = None,
    generate: bool = False,
    num_beams: int = 1,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """Loss and metrics of ``model`` on one split of ``task``, by name.

    The model runs in eval mode, without gradients, on the device where it is, and gets its mode
    back; logits are float32. Nothing is sampled, so no random generator is touched.

    Args:
        model: a transformers or PEFT model with the head of the task's kind.
        tokenizer: the model's, as ``load_model`` gives it.
        task: what to evaluate on.
        split: a split that the task has.
        max_length: in tokens, as in ``data.encode``; it cuts the rows whose loss is computed and
            the prompts to generate from.
        pad_to: in tokens: every row whose loss is computed is padded on the right to this length,
            for models that were trained so; None pads each batch to its longest row.
        batch_size: examples in memory at a time; results don't depend on it beyond rounding.
        max_examples: evaluate a random subset of at most so many examples, drawn from ``seed`` in
            whole groups by ``data.subset``.
        generate: for a generation task, also write a text for each source and score it.
        num_beams: 1 is greedy.
        max_new_tokens: where a text is cut off that hasn't ended by itself.
        seed: of the subset.

    Returns:
        ``loss``, always: the mean over examples of each example's own loss. In nats the
        cross-entropy (classification) or its mean over the example's own target tokens, the end
        token among them (generation); the squared error in squared units of the label
        (regression).

        Classification and regression: each of ``task.metrics``, see :func:`label_metrics`.

        Generation: ``perplexity``, per token over the corpus, so that long texts count for more
        than in ``loss``: exp of the negative log-likelihood of all target tokens of all
        references, divided by their number. With ``generate`` also ``bleu`` and ``rouge_l``
        (:func:`text_metrics`) of one text per distinct source, against all
        references that the split has for it.

    Raises:
        ValueError: an empty split, ``generate`` on labels, a model with another head or logits
            that are not finite, and what :func:`generate_texts` and ``data.encode`` refuse.
    """
    examples = task.split(split)
    if not examples:
        raise ValueError(
            f"{task.name} must have examples in its {split} split, got none: choose "
            "another split, or keep more examples"
        )
    if generate and task.kind != "generation":
        raise ValueError(f"generate must be False for {task.name}, a {task.kind} task, got True")
    if max_examples is not None:
        examples = subset(
            examples, _validate.integer("max_examples", max_examples), f"{seed}/{split}"
        )
    rows = encode(examples, tokenizer, kind=task.kind, max_length=max_length)
    of_texts: dict[str, float] = {}
    if generate:
        groups = _groups(examples)
        texts = generate_texts(
            model,
            tokenizer,
            [group[0].text for group in groups],
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            max_length=max_length,
        )
        of_texts = text_metrics(texts, [[e.target or "" for e in group] for group in groups])
    with _evaluating(model):
        losses, counts, logits = _forward(
            model,
            task,
            examples,
            micro_batches(rows, batch_size, tokenizer.pad_token_id, length=pad_to),
        )
    found = {"loss": float(losses.mean())}
    if task.kind == "generation":
        found["perplexity"] = float(((losses * counts).sum() / counts.sum()).exp())
        return found | of_texts
    return found | label_metrics(task.metrics, logits, [e.label for e in examples])


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
    """One text for each of ``sources``, in their order: what the model writes until its end token.

    Prompts are those of ``data.encode``, source and line break, cut to ``max_length`` tokens if
    given. Decoding is greedy, or a beam search with ``num_beams`` > 1, also where the checkpoint's
    own settings say otherwise. The texts hold no special tokens. The model gets its mode back.

    Raises ``ValueError`` in one line: no sources, a model that can't generate or whose logits are
    not finite, a prompt that leaves no room for ``max_new_tokens`` in the model's context.
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
    longest = max(len(prompt["input_ids"]) for prompt in prompts)
    context = min(
        tokenizer.model_max_length,
        getattr(model.config, "max_position_embeddings", None) or sys.maxsize,
    )
    if longest + max_new_tokens > context:
        raise ValueError(
            f"max_new_tokens must be <= {context - longest}, what a prompt of "
            f"{longest} tokens leaves of the model's context of {context}, got "
            f"{max_new_tokens}; or cut the prompts by a smaller max_length"
        )
    device = next(model.parameters()).device
    texts = [""] * len(prompts)
    with _evaluating(model):
        for indices, batch in micro_batches(
            prompts, batch_size, tokenizer.pad_token_id, side="left"
        ):
            written = model.generate(
                **{name: value.to(device) for name, value in batch.items()},
                **_PLAIN_DECODING,
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                logits_processor=[_require_finite],
            )
            new_tokens = written[:, batch["input_ids"].shape[1] :]
            for i, text in zip(
                indices,
                tokenizer.batch_decode(
                    new_tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
                ),
                strict=True,
            ):
                texts[i] = text
    return texts


# Running the model.


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards the mode of every module is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _forward(
    model: Any,
    task: Task,
    examples: Sequence[Example],
    batches: Iterable[tuple[list[int], dict[str, Tensor]]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Each example's loss (N,), its number of targets (N,), and its logits (N, C), if labelled."""
    device = next(model.parameters()).device
    losses, counts = torch.zeros(2, len(examples), dtype=torch.float64)
    kept = torch.zeros(len(examples), task.num_labels)
    for indices, batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        wanted = (
            (len(indices), task.num_labels)
            if task.num_labels
            else (*labels.shape, logits.shape[-1])
        )
        if logits.shape != wanted:
            raise ValueError(
                f"model must have the head of {task.name}, with logits of shape "
                f"{wanted}, got {tuple(logits.shape)}: load it with task=task"
            )
        finite = logits.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            _not_finite(examples[indices[int(finite.logical_not().nonzero()[0])]].id)
        loss, count = LOSSES[LOSS_OF_KIND[task.kind]](logits, labels)
        losses[indices], counts[indices] = loss.double().cpu(), count.double().cpu()
        if task.num_labels:
            kept[indices] = logits.cpu()
    return losses, counts, kept


def _require_finite(tokens: Tensor, scores: Tensor) -> Tensor:
    """A logits processor that changes nothing; minus infinity is a token that may not come."""
    if not bool((scores < torch.inf).all()):
        _not_finite("the next token of a prompt")
    return scores


def _not_finite(where: str) -> NoReturn:
    raise ValueError(
        f"model must give finite logits, got NaN or infinity for {where}: train it "
        "with a lower learning rate, or load it in float32"
    )


def _groups(examples: Iterable[Example]) -> list[list[Example]]:
    """The examples that share a source, in order of first appearance."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        if not example.group:
            raise ValueError(f"{example.id} must have a group, which its references share")
        groups.setdefault(record_group("", example.text), []).append(example)
    return list(groups.values())


# Label metrics: predictions (N,), labels (N,) -> value. Their libraries take half a second each to
# import, so only for those who ask.
