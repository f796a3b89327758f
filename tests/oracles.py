"""Slow reference implementations that several test files compare the package with.

An oracle here follows the definition in the paper or in the textbook, one row or one pair at a
time, and imports nothing from ``lowrank_dp``.
"""

import functools
import math
import subprocess
from collections import Counter

import numpy as np
import torch


def clip_one_by_one(model, batch, max_grad_norm, own_length=False):
    """Compute the clipped sum by its definition: a backward pass per row, clip, add up.

    With ``max_grad_norm=None`` the sum is clipped at the median norm, so that some rows are clipped
    and others are not. With ``own_length`` a row is fed without its padding. Returns the float64
    sums by parameter name and the norm of each row's gradient before clipping.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = []
    for row in range(len(batch["labels"])):
        one = {name: value[row : row + 1].clone() for name, value in batch.items()}
        if own_length:
            length = int(one["attention_mask"].sum())
            one = {k: v[:, :length] if v.ndim == 2 else v for k, v in one.items()}
        loss = model(**one).loss
        gradients.append(torch.autograd.grad(loss, list(trained.values()), allow_unused=True))
    norms = torch.stack(
        [
            torch.stack([g.double().norm() for g in gradient if g is not None]).norm()
            for gradient in gradients
        ]
    )
    clip = float(norms.median()) if max_grad_norm is None else max_grad_norm
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in trained.items()}
    for gradient, norm in zip(gradients, norms.tolist(), strict=True):
        for name, g in zip(trained, gradient, strict=True):
            if g is not None:
                total[name] += g.double() * min(1.0, clip / max(norm, 1e-300))
    return total, norms


@torch.no_grad()
def greedy(model, tokenizer, ids, max_new_tokens):
    """Generate the greedy text after one prompt's ids, token by token, without padding or cache."""
    written = []
    for _ in range(max_new_tokens):
        logits = model(input_ids=torch.tensor([ids + written]), use_cache=False).logits
        written.append(int(logits[0, -1].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(written, skip_special_tokens=True), written


def refusal_of(call, *arguments, **options):
    """Return the message of the ValueError that a call raises; "" if the call returns."""
    try:
        call(*arguments, **options)
    except ValueError as error:
        return str(error)
    return ""


def optimal_values(values, shape, noise_std):
    """Shrink singular values by Gavish & Donoho 2017, Frobenius loss (0 at or below the edge)."""
    short, long = sorted(shape)
    aspect, scale = short / long, noise_std * math.sqrt(long)
    shrunk = []
    for value in values:
        y = float(value) / scale
        inside = (y * y - aspect - 1) ** 2 - 4 * aspect
        shrunk.append(math.sqrt(inside) / y * scale if y > 1 + math.sqrt(aspect) else 0.0)
    return np.array(shrunk)


def naive_auc(scores, truth):
    """Compute the AUC as the share of (member, non-member) pairs in the right order."""
    members, others = np.asarray(scores)[truth][:, None], np.asarray(scores)[~truth]
    return float(np.mean((members > others) + (members == others) / 2))


def naive_bleu(hypotheses, references):
    """Compute BLEU in percent on words; the n-th order without a hit counts as 2**-n hits."""
    precisions, zeros = [], 0
    for n in range(1, 5):
        hits = total = 0
        for text, several in zip(hypotheses, references, strict=True):
            grams = [
                Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
                for words in map(str.split, [text, *several])
            ]
            total += sum(grams[0].values())
            hits += sum(
                min(count, max(other[gram] for other in grams[1:]))
                for gram, count in grams[0].items()
            )
        if total == 0 or (n == 1 and hits == 0):
            return 0.0
        zeros += hits == 0
        precisions.append(hits / total or 2.0**-zeros / total)
    length = sum(len(text.split()) for text in hypotheses)
    nearest = sum(
        min((abs(len(r.split()) - len(text.split())), len(r.split())) for r in several)[1]
        for text, several in zip(hypotheses, references, strict=True)
    )
    brevity = min(1.0, math.exp(1 - nearest / length))
    return 100 * brevity * math.prod(precisions) ** (1 / 4)


def naive_rouge(text, reference):
    """Compute ROUGE-L in percent by the longest common subsequence of words, recursively."""
    x, y = text.split(), reference.split()

    @functools.cache
    def common(i, j):
        if i == len(x) or j == len(y):
            return 0
        return 1 + common(i + 1, j + 1) if x[i] == y[j] else max(common(i + 1, j), common(i, j + 1))

    return 200 * common(0, 0) / (len(x) + len(y)) if x or y else 0.0


def assert_refused(done, *words):
    """Check a finished command: code 2 and one line on stderr that names each of ``words``.

    ``done`` is (exit code, stdout, stderr), or what ``subprocess.run`` returned.
    """
    if isinstance(done, subprocess.CompletedProcess):
        done = done.returncode, done.stdout, done.stderr
    code, out, err = done
    assert code == 2 and not out, done
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), (words, err)
