"""Evaluate a model on a task: compute the loss and the task's metrics.

The metrics are those of scikit-learn, scipy, sacrebleu and rouge-score
(:mod:`lowrank_dp.evaluation.metrics`); the losses are those of :mod:`lowrank_dp.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.data import Example, Task, encode, micro_batches, subset
from lowrank_dp.data.examples import record_group
from lowrank_dp.evaluation.generation import generate_texts
from lowrank_dp.evaluation.inference import evaluating, fail_not_finite
from lowrank_dp.evaluation.metrics import label_metrics, text_metrics
from lowrank_dp.losses import IGNORE, LOSS_OF_KIND, LOSSES, losses_at_targets
from lowrank_dp.models.precision import autocast
from lowrank_dp.models.targets import TargetOutput, run_at_targets, separate_head

Row = Mapping[str, Any]
Batch = Mapping[str, Any]


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
    encoded: tuple[Sequence[Example], Sequence[Row]] | None = None,
    add_inputs: Callable[[Sequence[Row], Batch], Batch] | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Compute the loss and the metrics of ``model`` on one split of ``task``, by name.

    The model runs in eval mode, without gradients, on its own device; its mode is restored. Losses
    are computed in float32. Only the choice of a subset is random, by ``seed``.

    Args:
        model: a transformers or PEFT model with the head of the task's kind.
        tokenizer: the model's tokenizer, from ``load_model``.
        task: the task.
        split: name of a split of the task.
        max_length: longest row, in tokens, as in ``data.encode``; longer rows and longer prompts
            are cut. None cuts nothing.
        pad_to: length in tokens to which every row is padded on the right, for models that were
            trained with such rows; None pads each batch to its longest row. The prompts of
            ``generate`` are not padded to this length.
        batch_size: number of examples in memory at a time, which affects results by rounding only.
        max_examples: size of a random subset to evaluate on, drawn by ``data.subset`` in whole
            groups, or from one group if each is larger; None evaluates on all examples.
        generate: for a generation task, whether to generate and score a text per source.
        num_beams: number of beams; 1 decodes greedily.
        max_new_tokens: longest generated text, in tokens.
        seed: random seed of the subset.
        encoded: result of :func:`evaluated_rows` for the same arguments, to save time in repeated
            evaluations; None encodes the examples.
        add_inputs: function from the encoded rows of a batch and the batch to the batch that the
            model receives; None passes the batch unchanged. Text generation does not use this
            function.
        autocast_dtype: dtype of mixed precision for the logits, such as ``torch.bfloat16``, or None
            for the dtype of the model. Text generation always has the dtype of the model.

    Returns:
        ``loss``, always: the mean over examples of each example's own loss. The loss of an example
        is, for classification, the cross-entropy in nats; for generation, the mean cross-entropy in
        nats of the example's target tokens, the end token included; for regression, the squared
        error in squared units of the label.

        For classification and regression: each of ``task.metrics``, see :func:`label_metrics`.

        For generation: ``perplexity`` per token of the corpus, which is
        ``exp(-log-likelihood / number)`` of the target tokens of all references; long texts have
        more weight in the perplexity than in ``loss``. With ``generate`` also ``bleu`` and
        ``rouge_l`` (:func:`text_metrics`) of one text per distinct source, against all references
        of that source in the split.

    Raises:
        ValueError: for an empty split, ``generate`` on a task with labels, a model with another
            head or with logits that are not finite, and as :func:`generate_texts` and
            ``data.encode`` do.
    """
    if generate and task.kind != "generation":
        raise ValueError(f"generate must be False for {task.name}, a {task.kind} task, got True")
    examples, rows = encoded or evaluated_rows(
        tokenizer, task, split, max_length=max_length, max_examples=max_examples, seed=seed
    )
    text_scores: dict[str, float] = {}
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
        text_scores = text_metrics(texts, [[e.target or "" for e in group] for group in groups])
    device = next(model.parameters()).device
    batches: Iterable[tuple[list[int], dict[str, Tensor]]] = micro_batches(
        rows, batch_size, tokenizer.pad_token_id, length=pad_to, device=device
    )
    if add_inputs is not None:
        batches = _added(batches, rows, add_inputs)
    with evaluating(model):
        losses, counts, logits = _forward(model, task, examples, batches, autocast_dtype)
    scores = {"loss": float(losses.mean())}
    if task.kind == "generation":
        scores["perplexity"] = float(((losses * counts).sum() / counts.sum()).exp())
        return scores | text_scores
    return scores | label_metrics(task.metrics, logits, [e.label for e in examples])


def evaluated_rows(
    tokenizer: Any,
    task: Task,
    split: str = "validation",
    *,
    max_length: int | None = None,
    max_examples: int | None = None,
    seed: int = 0,
) -> tuple[Sequence[Example], Sequence[Row]]:
    """Return the examples that :func:`evaluate` reads with these arguments, and their rows.

    Raises ValueError for an empty split, and as ``data.encode`` does.
    """
    examples = evaluated_examples(task, split, max_examples=max_examples, seed=seed)
    return examples, encode(examples, tokenizer, kind=task.kind, max_length=max_length)


def evaluated_examples(
    task: Task, split: str = "validation", *, max_examples: int | None = None, seed: int = 0
) -> Sequence[Example]:
    """Return the examples that :func:`evaluate` reads with these arguments.

    Raises ValueError for an empty split.
    """
    examples = task.split(split)
    if not examples:
        raise ValueError(
            f"{task.name} must have examples in its {split} split, got none: choose "
            "another split, or keep more examples"
        )
    if max_examples is not None:
        count = _validate.integer("max_examples", max_examples)
        examples = subset(examples, count, f"{seed}/{split}")
    return examples


def _added(
    batches: Iterable[tuple[list[int], dict[str, Tensor]]],
    rows: Sequence[Row],
    add_inputs: Callable[[Sequence[Row], Batch], Batch],
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield the batches with the entries that ``add_inputs`` adds."""
    for indices, batch in batches:
        yield indices, dict(add_inputs([rows[i] for i in indices], batch))


def _forward(
    model: Any,
    task: Task,
    examples: Sequence[Example],
    batches: Iterable[tuple[list[int], dict[str, Tensor]]],
    autocast_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss (N,) and number of targets (N,) of each example, and logits (N, C).

    C is 0 for a generation task.
    """
    losses, counts = torch.zeros(2, len(examples), dtype=torch.float64)
    kept = torch.zeros(len(examples), task.num_labels)
    head = separate_head(model) if task.kind == "generation" else None
    for indices, batch in batches:
        ids = [examples[i].id for i in indices]
        mixed = autocast(batch["input_ids"].device, autocast_dtype)
        if head is not None:
            with mixed:
                output = run_at_targets(model, head, batch)
            loss, count = _losses_at_targets(output, ids)
        else:
            labels = batch.pop("labels")
            with mixed:
                logits = _finite_logits(model, task, batch, labels, ids)
            loss, count = LOSSES[LOSS_OF_KIND[task.kind]](logits, labels)
            if task.num_labels:
                kept[indices] = logits.cpu()
        losses[indices], counts[indices] = loss.double().cpu(), count.double().cpu()
    return losses, counts, kept


def _losses_at_targets(output: TargetOutput, ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Compute loss (B,) and number of targets (B,), from the logits at the targets alone."""
    rows = (output.targets != IGNORE).nonzero()[:, 0]
    _require_finite(output.logits, [ids[row] for row in rows.tolist()])
    return losses_at_targets(output.logits.float(), output.targets)


def _finite_logits(
    model: Any, task: Task, batch: Batch, labels: Tensor, ids: Sequence[str]
) -> Tensor:
    """Compute the logits of a batch, in float32: (B, C), or (B, T, V) for a generation task."""
    logits = model(**batch).logits.float()
    expected = (len(ids), task.num_labels) if task.num_labels else (*labels.shape, logits.shape[-1])
    if logits.shape != expected:
        raise ValueError(
            f"model must have the head of {task.name}, with logits of shape "
            f"{expected}, got {tuple(logits.shape)}: load it with task=task"
        )
    _require_finite(logits, ids)
    return logits


def _require_finite(logits: Tensor, ids: Sequence[str]) -> None:
    """Raise ``ValueError`` for logits (n, ...) that are not finite; ``ids`` (n,) names examples."""
    # a sum is finite only if every term is finite; testing every logit takes 20 times as long
    if not bool(logits.sum().isfinite()):
        bad = logits.flatten(1).isfinite().all(1).logical_not()
        if bool(bad.any()):
            fail_not_finite(ids[int(bad.nonzero()[0])])


def _groups(examples: Iterable[Example]) -> list[list[Example]]:
    """Group the examples that share a source, in the order of the sources' first appearance."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        if not example.group:
            raise ValueError(f"{example.id} must have a group, which its references share")
        groups.setdefault(record_group("", example.text), []).append(example)
    return list(groups.values())
