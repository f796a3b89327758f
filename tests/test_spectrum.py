"""Spectrum and alignment against numpy in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from lowrank_dp.spectrum import Spectrum, alignment, decompose, decomposition
from tests.refusals import refused


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_one_matrix():
    shapes = [(6, 9), (9, 6), (5, 5), (1, 7), (7, 1), (1, 1)]
    for case in itertools.product(shapes, (torch.float32, torch.float64)):
        shape, dtype = case
        matrix = random(*shape, dtype=dtype)
        spectrum = decompose(matrix, 0.25)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        np.testing.assert_allclose(spectrum.s, s, rtol=tolerance, err_msg=str(case))
        torch.testing.assert_close((spectrum.u * spectrum.s) @ spectrum.vh, matrix)
        assert spectrum.s.dtype == dtype and spectrum.shape == shape, case
        assert spectrum.noise_std == 0.25, case
        edge = 0.25 * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
        assert spectrum.edge == pytest.approx(edge), case
        assert spectrum.num_above_edge == int((s > edge).sum()), case
        assert type(spectrum.num_above_edge) is int, case
        want = entropy(s / s.sum())
        assert spectrum.entropy == pytest.approx(want, abs=10 * tolerance), case
        assert spectrum.effective_rank == pytest.approx(math.exp(want), rel=1e-5), case
        assert spectrum.stable_rank == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-5), case
        assert type(spectrum.stable_rank) is float, case


def test_batch_equals_one_by_one():
    batch = random(2, 3, 8, 5)
    whole = decompose(batch, 0.5)
    assert whole.num_above_edge.shape == whole.stable_rank.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = decompose(batch[i, j], 0.5)
            for name in ("s", "num_above_edge", "entropy", "effective_rank", "stable_rank"):
                np.testing.assert_allclose(getattr(whole, name)[i, j], getattr(one, name))
    assert whole.edge == one.edge


def test_ranks_of_flat_spectra():
    for s, rank in [([2.0, 2, 2, 2], 4), ([5.0, 0, 0, 0], 1), ([3.0, 3, 0, 0], 2)]:
        spectrum = decompose(torch.diag(torch.tensor(s)), 0)
        assert spectrum.effective_rank == pytest.approx(rank), s
        assert spectrum.stable_rank == pytest.approx(rank), s
        assert spectrum.entropy == pytest.approx(math.log(rank), abs=1e-6), s
        assert spectrum.edge == 0 and spectrum.num_above_edge == rank, s


def test_overlap():
    clean = random(6, 8)
    own = decompose(clean, 0)
    for squared in own.overlap(own):
        torch.testing.assert_close(squared, torch.ones(6, dtype=torch.float64))
    noisy = decompose(clean + 0.5 * random(6, 8, seed=1), 0.5)
    left, right = noisy.overlap(own)
    u, _, vh = np.linalg.svd(clean.numpy())
    a, _, bh = np.linalg.svd(noisy.u.numpy() * noisy.s.numpy() @ noisy.vh.numpy())
    np.testing.assert_allclose(left, [(a[:, i] @ u[:, i]) ** 2 for i in range(6)], atol=1e-10)
    np.testing.assert_allclose(right, [(bh[i] @ vh[i]) ** 2 for i in range(6)], atol=1e-10)
    assert not np.allclose(left, right)
    with pytest.raises(ValueError, match=r"clean\.shape must be"):
        noisy.overlap(decompose(random(8, 6), 0))
    two, three = decompose(random(2, 4, 5), 0), decompose(random(3, 4, 5), 0)
    refused(r"^clean\.shape must be \(2, 4, 5\), got \(3, 4, 5\)", two.overlap, three)


def test_leaves_its_input_alone():
    matrix = random(5, 4).requires_grad_()
    copy, state = matrix.detach().clone(), torch.get_rng_state()
    spectrum = decompose(matrix, 1)
    assert torch.equal(matrix.detach(), copy) and torch.equal(state, torch.get_rng_state())
    assert not spectrum.s.requires_grad and matrix.requires_grad
    with pytest.raises(AttributeError):
        spectrum.noise_std = 3.0
    assert isinstance(spectrum, Spectrum)


def test_alignment():
    a, b = random(4, 6), random(4, 6, seed=1)
    want = (a * b).sum() / a.norm() / b.norm()
    assert alignment(a, b) == pytest.approx(float(want), rel=1e-12)
    assert alignment(a, -2 * a) == pytest.approx(-1)
    assert alignment(1e-30 * a.float(), 1e30 * a.float()) == pytest.approx(1)
    for seed in range(50):  # the quotient of some of them is rounded to more than 1
        c = random(3, 3, seed=seed)
        assert -1 <= alignment(c, -3 * c) < alignment(c, 3 * c) <= 1


def test_bad_input():
    for matrix, words in (
        (torch.ones(3), "matrix must be a tensor with at least 2 axes"),
        (torch.ones(0, 3), "matrix must be a non-empty"),
        (torch.ones(2, 3, dtype=torch.int64), "matrix must be a float32 or float64"),
        (torch.ones(2, 3, dtype=torch.float16), "matrix must be a float32 or float64"),
        (torch.ones(2, 3, dtype=torch.complex64), "matrix must be a float32 or float64"),
        (torch.full((2, 3), math.nan), "matrix must have finite"),
        (torch.full((2, 3), math.inf), "matrix must have finite"),
        (torch.zeros(2, 3), "matrix must have a nonzero entry"),
        (torch.stack([torch.ones(2, 3), torch.zeros(2, 3)]), "matrix must have a nonzero entry"),
        (np.ones((2, 3)), "matrix must be a torch tensor"),
        ([[1.0]], "matrix must be a torch tensor"),
    ):
        refused(words, decompose, matrix, 1.0)
    for noise_std in (-1, math.nan, math.inf, "1", None, True):
        words = r"^noise_std must be a finite number >= 0"
        refused(words, decompose, torch.ones(2, 2), noise_std)
        spectrum = Spectrum(torch.eye(2), torch.ones(2), torch.eye(2), noise_std)
        refused(words, lambda spectrum=spectrum: spectrum.edge)
        refused(words, lambda spectrum=spectrum: spectrum.num_above_edge)


def test_alignment_of_parts_is_that_of_the_whole(monkeypatch):
    a, b = torch.randn(2, 13, 17, generator=torch.Generator().manual_seed(0))
    a[3, 4] = 1e20  # the parts have one scale
    x, y = a.double().numpy(), b.double().numpy()
    want = np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)
    for size in (1, 7, 220, 221, 1000):
        monkeypatch.setattr(decomposition, "_CHUNK", size)
        assert alignment(a, b) == pytest.approx(float(want), rel=1e-12), size


def test_alignment_bad_input():
    for a, b, words in (
        (torch.zeros(2), torch.ones(2), "^a must have a nonzero"),
        (torch.ones(2), torch.zeros(2), "^b must have a nonzero"),
        (torch.ones(2), torch.ones(3), "^b.shape must be"),
        (np.ones(2), torch.ones(2), "^a must be a torch tensor"),
        (torch.ones(2), torch.tensor([1, math.nan]), "^b must have finite"),
    ):
        refused(words, alignment, a, b)
