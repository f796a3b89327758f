"""Symmetry score: zero for the true gradient, positive for other candidates of two or more rows."""

import numpy as np
import pytest

from lowrank_dp.theory import symmetry_score
from tests.refusals import refused


def release(g, rank, rng):
    a = rng.standard_normal((rank, g.shape[1])) / np.sqrt(rank)
    return g @ a.T @ a


def test_separates_the_truth():
    for case in [(2, 16, 1), (2, 64, 4), (8, 64, 4), (8, 64, 100), (3, 2, 5)]:
        m, n, rank = case
        rng = np.random.default_rng(case)
        truth = rng.standard_normal((m, n))
        y = release(truth, rank, rng)
        assert symmetry_score(y, truth) < 1e-14, case
        for size in (1.0, 1e-3):
            other = truth + size * np.outer(rng.standard_normal(m), rng.standard_normal(n))
            assert symmetry_score(y, other) > 1e-6 * size, (case, size)
        # a multiple of the truth has the same score
        assert symmetry_score(y, -3.0 * truth) < 1e-14, case


def test_perfect_attack_in_single_precision():
    """m = 2, a rank-one change of relative size 0.1, float32: AUC 1 in 200 against 200."""
    rng = np.random.default_rng(1)
    truth, change = (
        rng.standard_normal((2, 64)),
        np.outer(rng.standard_normal(2), rng.standard_normal(64)),
    )
    other = truth + 0.1 * change * np.linalg.norm(truth) / np.linalg.norm(change)
    own = [symmetry_score(release(truth, 4, rng).astype(np.float32), truth) for _ in range(200)]
    foreign = [symmetry_score(release(other, 4, rng).astype(np.float32), truth) for _ in range(200)]
    assert max(own) < min(foreign)


def test_value_by_its_definition():
    rng = np.random.default_rng(2)
    y, g = rng.standard_normal((2, 5, 9))
    want = np.linalg.norm(y @ g.T - g @ y.T) / np.linalg.norm(y) / np.linalg.norm(g)
    assert symmetry_score(y, g) == pytest.approx(want, rel=1e-13)
    assert symmetry_score(1e200 * y, 1e-200 * g) == pytest.approx(want, rel=1e-13)
    assert symmetry_score(y.tolist(), g.tolist()) == pytest.approx(want, rel=1e-13)
    assert type(symmetry_score(y, g)) is float


def test_one_row_says_nothing():
    rng = np.random.default_rng(3)
    assert symmetry_score(rng.standard_normal((1, 9)), rng.standard_normal((1, 9))) == 0


def test_bad_input():
    for y, g, words in (
        (np.ones((2, 3)), np.ones((3, 3)), "candidate must .* got \\(3, 3\\)"),
        (np.ones(3), np.ones(3), "released must .* got \\(3,\\)"),
        (np.zeros((2, 3)), np.ones((2, 3)), "released must be a matrix that is not zero"),
        (np.ones((2, 3)), np.full((2, 3), np.nan), "candidate must .* got nan"),
        (np.ones((0, 3)), np.ones((0, 3)), "released must be a non-empty"),
    ):
        refused(words, symmetry_score, y, g)
