"""The distance and the rank of updates under LoRA's noise, against simulated linear training."""

from types import SimpleNamespace

import numpy as np
import torch

from lowrank_dp.experiments import dynamics
from lowrank_dp.experiments.noisy_sgd import numerical_rank


def test_expected_ratio_is_that_of_simulated_projections():
    """A frozen A is compared with fresh ones, in plain numpy, for gradients that partly agree."""
    rng = np.random.default_rng(0)
    steps, m, n, rank, trials = 5, 3, 10, 2, 4000
    gradients = 0.7 * rng.standard_normal((m, n)) + rng.standard_normal((steps, m, n))

    def noise(g):
        a = rng.standard_normal((trials, rank, n)) / np.sqrt(rank)
        return (g @ a.transpose(0, 2, 1)) @ a - g

    frozen = noise(gradients.sum(axis=0))
    fresh = sum(noise(g) for g in gradients)
    simulated = np.sqrt((frozen**2).mean() / (fresh**2).mean())
    moved = np.linalg.norm(np.cumsum(gradients, axis=0), axis=(1, 2))
    result = SimpleNamespace(
        reference_moved=np.array([[0, *moved]]),
        reference_step=np.linalg.norm(gradients, axis=(1, 2))[None],
    )
    expected = dynamics.expected_ratio(result)[0, -1]
    assert 1.2 < expected < np.sqrt(steps)
    # the relative standard error of the simulated ratio is near 1.5%: wrong for 1 seed in 1000
    assert abs(simulated / expected - 1) < 0.05


def test_numerical_rank_counts_values_above_the_tolerance():
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.standard_normal((size, 6)))[0] for size in (8, 9))
    matrix = torch.tensor((u * [5, 1, 0.1, 0.02, 0.004, 1e-7]) @ v.T)
    assert [numerical_rank(matrix, t) for t in (0.5, 1e-2, 1e-3, 1e-4)] == [1, 3, 4, 5]
    assert numerical_rank(torch.zeros(3, 3), 1e-3) == 0
