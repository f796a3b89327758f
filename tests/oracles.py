"""Slow definitions that several test files compare the package with.

An oracle here follows the definition in the paper or in the textbook, one row or one pair at a
time, and imports nothing from ``lowrank_dp``.
"""

import math
import subprocess

import numpy as np
import torch


def clip_one_by_one(model, batch, max_grad_norm, own_length=False):
    """Compute the clipped sum by its definition: a backward pass per row, clip, add up.

    With ``own_length`` a row is fed without its padding. Returns the float64 sums by parameter
    name and the norm of each row's gradient before clipping.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in trained.items()}
    norms = []
    for row in range(len(batch["labels"])):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        if own_length:
            length = int(one["attention_mask"].sum())
            one = {k: v[:, :length] if v.ndim == 2 else v for k, v in one.items()}
        loss = model(**one).loss
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        norm = sum(g.double().square().sum() for g in gradients if g is not None).sqrt()
        norms.append(norm)
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.double() * min(
                    1.0, max_grad_norm / max(float(norm), 1e-300)
                )
    return total, torch.stack(norms)


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
