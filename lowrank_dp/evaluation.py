"""How well a model does on a task: its loss, and the metrics that papers report.

:func:`evaluate` takes a model, its tokenizer and a task. The parts serve alone as well:
:func:`label_metrics` on predictions, :func:`generate_texts`, and :func:`text_metrics` on texts.
The metrics are those of scikit-learn, scipy, sacrebleu and rouge-score; losses are one an example,
as ``lowrank_dp.grads`` defines them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowrank_dp import _validate
from lowrank_dp.data import Example, Task, encode, micro_batches, subset
from lowrank_dp.data.examples import record_group
from lowrank_dp.grads import LOSSES

__all__ = ["HIGHER_IS_BETTER", "evaluate", "generate_texts", "label_metrics", "text_metrics"]

HIGHER_IS_BETTER: dict[str, bool] = {
    "loss": False,
    "perplexity": False,
    "accuracy": True,
    "f1": True,
    "matthews": True,
    "pearson": True,
    "spearman": True,
    "bleu": True,
    "rouge_l": True,
}

# the name in grads.LOSSES of each kind of task's loss
LOSS_OF_KIND = {
    "classification": "single_label_classification",
    "regression": "regression",
    "generation": "next_token",
}
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
Array = NDArray[np.float64]


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


def label_metrics(names: Iterable[str], outputs: Any, labels: Any) -> dict[str, float]:
    """Metrics of predicted classes or scores, by name.

    ``accuracy``, and ``f1`` of class 1 against class 0, are fractions in [0, 1]; ``matthews``,
    ``pearson`` and ``spearman`` are correlations in [-1, 1]. What is undefined counts as 0.0, as
    in GLUE's tables: a correlation where predictions or labels are all the same, and F1 where
    class 1 is neither predicted nor there.

    Args:
        names: which metrics.
        outputs: logits (N, C) of C > 1 classes, of which the largest counts; or predicted classes
            or scores, (N,) or (N, 1). Tensors, arrays or lists.
        labels: (N,), classes or scores.

    Raises:
        ValueError: an unknown name, shapes that don't fit, no or non-finite entries, and F1 of
            other classes than 0 and 1.

    >>> label_metrics(["accuracy", "f1", "matthews"], [1, 1, 0, 1], [1, 0, 0, 1])
    {'accuracy': 0.75, 'f1': 0.8, 'matthews': 0.5773502691896258}
    >>> label_metrics(["pearson"], [2.0, 2.0, 2.0], [0.0, 1.0, 5.0])
    {'pearson': 0.0}
    """
    names = [_validate.choice("metric", name, _LABEL_METRICS) for name in names]
    predictions, truth = _float64("outputs", outputs), _float64("labels", labels)
    if predictions.ndim == 2 and predictions.shape[1] > 1:
        if scores := {"pearson", "spearman"}.intersection(names):
            _validate.fail("outputs", f"(N,) or (N, 1) for {min(scores)}", predictions.shape)
        predictions = predictions.argmax(1).astype(np.float64)
    elif predictions.ndim == 2:
        predictions = predictions[:, 0]
    if truth.ndim != 1 or predictions.shape != truth.shape:
        _validate.fail(
            "outputs and labels",
            "of shapes (N,) or (N, C) and (N,)",
            (predictions.shape, truth.shape),
        )
    return {name: float(_LABEL_METRICS[name](predictions, truth)) for name in names}


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


def text_metrics(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """``bleu`` and ``rouge_l`` of texts, each with one or more references; both from 0 to 100.

    BLEU (Papineni et al., ACL 2002) is sacrebleu's over the corpus, with its defaults: 13a
    tokens, case kept, exponential smoothing. ROUGE-L (Lin, 2004) is rouge-score's F-measure
    without stemming, the best over a text's references, averaged over texts; it folds case and
    reads only ASCII letters and digits.

    Blank references are left out, since the closest reference of a text cut short would be a blank
    one; a text whose references are all blank is left out of both scores.

    Raises ``ValueError`` in one line: no texts, another number of reference lists, a text without
    any reference, or nothing but blank ones.

    >>> text_metrics(["the cat sat on the mat"], [["a cat sat", "the cat sat on the mat"]])
    {'bleu': 100.0, 'rouge_l': 100.0}
    """
    if isinstance(hypotheses, str) or not hypotheses or len(hypotheses) != len(references):
        _validate.fail(
            "hypotheses and references",
            "non-empty lists of one length",
            (len(hypotheses), len(references)),
        )
    for i, several in enumerate(references):
        if isinstance(several, str) or not several:
            _validate.fail(f"references[{i}]", "a non-empty list of strings", several)
    pairs = [
        (text, kept)
        for text, several in zip(hypotheses, references, strict=True)
        if (kept := [reference for reference in several if reference.strip()])
    ]
    if not pairs:
        raise ValueError("references must hold a text that is not blank, got none")
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import BLEU

    # sacrebleu takes the first, second, ... references of all texts, None where there is none;
    # force: no advice to detokenise texts, which are scored as they are
    streams = [*map(list, zip_longest(*(kept for _, kept in pairs)))]
    bleu = BLEU(force=True).corpus_score([text for text, _ in pairs], streams).score
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score_multi(kept, text)["rougeL"].fmeasure for text, kept in pairs]
    return {"bleu": min(bleu, 100.0), "rouge_l": 100 * float(np.mean(rouge))}


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


def _float64(name: str, values: Any) -> Array:
    array = torch.as_tensor(values).detach().double().cpu().numpy()
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite and at least one, got shape {array.shape}")
    return array


def _accuracy(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(labels, predictions)


def _f1(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import f1_score

    if not np.isin([predictions, labels], (0, 1)).all():
        raise ValueError("outputs and labels must be classes 0 and 1 for f1, got others")
    return f1_score(labels, predictions, zero_division=0.0)


def _matthews(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, predictions)


def _pearson(predictions: Array, labels: Array) -> float:
    from scipy.stats import pearsonr

    return pearsonr(predictions, labels).statistic


def _spearman(predictions: Array, labels: Array) -> float:
    from scipy.stats import spearmanr

    return spearmanr(predictions, labels).statistic


def _zero_if_constant(
    correlation: Callable[[Array, Array], float],
) -> Callable[[Array, Array], float]:
    """The correlation, without a warning where there is none."""
    return lambda predictions, labels: (
        0.0 if np.ptp(predictions) == 0 or np.ptp(labels) == 0 else correlation(predictions, labels)
    )


_LABEL_METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _zero_if_constant(_matthews),
    "pearson": _zero_if_constant(_pearson),
    "spearman": _zero_if_constant(_spearman),
}
