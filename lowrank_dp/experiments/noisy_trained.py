"""Several private SGD steps of one real layer, and the attack on the released weights.

The layer is a classifier's pooler, tanh(W x + b) under a fixed head, on features x (n,) of the
frozen encoder. A record's gradient is delta x^T, of rank one. All records are in every step, so
that T steps are T Gaussian mechanisms. The released update is M K, with a trained M and a fixed K.
The last column of the table is the sum that a step subtracts from M:

    full fine-tuning       M (m, n), K = I        sum of clip(delta x^T) + sigma C Z
    project, then noise    M (m, n), K = I        sum of clip(delta x^T) W + sigma C w Z
    noise, then project    M (m, r), K = V^T W    sum of clip(delta x^T) V + sigma C Z
    LoRA, A frozen         M = B (m, r), K = A    sum of clip(delta x^T A^T) + sigma C Z

A (r, n) is drawn once, stays frozen and is published. W = A^T A = V diag(.) V^T, and w is the
largest eigenvalue of W. Given A and the earlier steps, each step of each arm is a Gaussian
mechanism of noise multiplier sigma. All arms therefore have the same epsilon against an adversary
who knows A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_dp.experiments.noisy_release import Projection

FULL, PROJECT_NOISE, NOISE_PROJECT, LORA = ARMS = (
    "full fine-tuning",
    "project, then noise",
    "noise, then project",
    "LoRA, A frozen",
)


@dataclass(frozen=True)
class Layer:
    """Layer before training: weight (m, n), bias (m,), head (c, m), head bias (c,)."""

    weight: Tensor
    bias: Tensor
    head: Tensor
    head_bias: Tensor

    def loss_and_delta(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss (...,), gradient by tanh's input (..., m), and whether the class is right."""
        active = torch.tanh(hidden)
        log_p = torch.log_softmax(active @ self.head.T + self.head_bias, dim=-1)
        hot = torch.nn.functional.one_hot(labels, len(self.head)).to(log_p)
        delta = (1 - active**2) * ((log_p.exp() - hot) @ self.head)
        return -(log_p * hot).sum(dim=-1), delta, log_p.argmax(dim=-1) == labels


@dataclass(frozen=True)
class Adapter:
    """Linear maps and sensitivity of an arm.

    ``inputs`` (k, n) maps x to z, where delta z^T is the gradient of M. ``outputs`` maps x to K x.
    ``sensitivity`` is the sensitivity of one step's sum, in units of C. If ``clips_inputs``,
    records are clipped by the norm of delta z^T, and otherwise by the norm of delta x^T.
    """

    inputs: Tensor | None  # (k, n); None is the identity
    outputs: Tensor | None
    sensitivity: float
    clips_inputs: bool

    @staticmethod
    def of(arm: str, projection: Projection | None) -> Adapter:
        """Return the maps of an arm; full fine-tuning reads no projection."""
        if arm == FULL or projection is None:
            return Adapter(None, None, 1.0, False)
        basis, values = projection.basis, projection.eigenvalues
        if arm == PROJECT_NOISE:
            return Adapter((basis * values) @ basis.T, None, projection.largest, False)
        if arm == NOISE_PROJECT:
            return Adapter(basis.T, values[:, None] * basis.T, 1.0, False)
        return Adapter(projection.a, projection.a, 1.0, True)


def mapped(matrix: Tensor | None, x: Tensor) -> Tensor:
    """Return the rows of ``x`` (..., n) mapped by ``matrix`` (k, n); None is the identity."""
    return x if matrix is None else x @ matrix.T


def train(
    layer: Layer,
    adapter: Adapter,
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    noisy: Tensor,
    *,
    noise_multiplier: float,
    clip: float,
    learning_rate: float,
    num_steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Train one M per row of ``weights``, and return M (runs, m, k).

    Args:
        layer, adapter: the layer, and the maps of the arm.
        features: (N, n) features x of all records.
        labels: (N,) classes of all records.
        weights: (runs, N), 1 for a record that the run trains on, and 0 for any other record.
        noisy: (runs,) bool, whether the run has noise.
        noise_multiplier: sigma, relative to C times the arm's sensitivity.
        clip: clipping norm C, absolute.
        learning_rate: step size along the mean of ``N`` clipped gradients.
        num_steps: number of steps T.
        generator: random generator of the noise. Noisy runs have independent noise.
    """
    z, x = mapped(adapter.inputs, features), mapped(adapter.outputs, features)
    clipped_by = (z if adapter.clips_inputs else features).norm(dim=1)
    base = features @ layer.weight.T + layer.bias
    m = torch.zeros(len(weights), len(layer.weight), z.shape[1])
    std = noise_multiplier * clip * adapter.sensitivity
    for _ in range(num_steps):
        _, delta, _ = layer.loss_and_delta(base + x @ m.mT, labels)
        norms = delta.norm(dim=-1) * clipped_by
        delta = delta * (weights * (clip / norms.clamp(min=1e-12)).clamp(max=1))[..., None]
        step = delta.mT @ z
        step[noisy] += std * torch.randn(step[noisy].shape, generator=generator)
        m -= learning_rate / len(features) * step
    return m


def attack_score(m: Tensor, without: Tensor, with_: Tensor) -> Tensor:
    """Score runs by the linear likelihood ratio between two noise-free results.

    If noise in one step did not change the gradients of later steps, the trained M would be normal
    with the noise-free M as mean and covariance v I. The score is then v times the log-likelihood
    ratio, the most powerful test. At large learning rates, noise changes later gradients, and the
    AUC of the score is only a lower bound on the best AUC.

    Args:
        m: (runs, m, k) trained M of each run.
        without, with_: (runs, m, k) noise-free M, trained without and with the attacked record.

    Returns:
        The scores (runs,); a run with the record has higher scores.
    """
    return ((m - (without + with_) / 2) * (with_ - without)).sum(dim=(1, 2))
