"""Restoration of matrices other than signal plus noise: the fast path against a full SVD.

Oracle: ``numpy.linalg.svd`` in float64 and the optimal shrinker of Gavish and Donoho (2017, eq. 7).
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_dp.restore import (
    EDGE_SCHEMES,
    SCHEMES,
    krylov,
    oracle_values,
    restoration,
    restore,
    restore_with_report,
)
from lowrank_dp.restore.plan import make_plan
from lowrank_dp.spectrum import alignment, decompose
from tests.oracles import optimal_values

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"truncate": {"k": 3}}


def by_numpy(noisy, noise_std):
    """Optimal shrinkage for squared error, from a float64 SVD."""
    u, s, vh = np.linalg.svd(noisy.double().numpy(), full_matrices=False)
    new = optimal_values(s, noisy.shape, noise_std)
    return torch.from_numpy((u * new) @ vh) if new.any() else noisy.double()


def distance(got, want):
    return float(torch.linalg.norm(got.double() - want.double()) / torch.linalg.norm(want.double()))


def low_rank(shape, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(side, len(values), generator=generator, dtype=torch.float64))[0]
        for side in shape
    )
    return ((u * torch.tensor(values, dtype=torch.float64)) @ v.T).float()


def one_entry():
    noisy = torch.zeros(300, 200)
    noisy[5, 7] = 1e3
    return noisy


def one_row(m, n, row=3):
    noisy = torch.zeros(m, n)
    noisy[row] = 30 * torch.randn(n, generator=torch.Generator().manual_seed(1))
    return noisy


def blocks():
    return torch.block_diag(*(100 * low_rank((100, 100), [2.0, 1.0], seed) for seed in range(4)))


def structured():
    yield "one entry", one_entry()
    yield "one row", one_row(300, 200)
    yield "one row of a wide matrix", one_row(256, 1024)
    yield "one column", one_row(300, 200).T
    yield "equal columns", one_row(300, 200)[3, :, None].expand(200, 300).clone()
    yield "ones", torch.full((256, 160), 3.0)
    yield "four blocks", blocks()
    yield "a multiple of the identity", 40 * torch.eye(160)
    for rank in (1, 2, 8, 12, 15, 16, 17, 20):
        yield f"rank {rank}", low_rank((300, 200), np.linspace(800, 100, rank).tolist(), rank)
        yield f"rank {rank}, equal values", low_rank((320, 256), [300.0] * rank, rank)
    yield "forty equal values", low_rank((512, 400), [300.0] * 40)
    yield "one value far above", low_rank((300, 200), [1e9, 300.0, 100.0, 50.0])
    yield "every value far above", 1e9 * low_rank((300, 200), [3.0, 2.0, 1.0])


def test_the_example_has_the_norm_of_the_exact_path():
    assert float(restore(one_entry(), 1.0).norm()) == pytest.approx(999.5, abs=0.01)
    assert float(restore(one_entry(), 1.0, method="exact").norm()) == pytest.approx(999.5, abs=0.01)


def test_structured_matrices_of_exactly_low_rank():
    for name, noisy in structured():
        for turned in (noisy, noisy.T.contiguous()):
            want = by_numpy(turned, 1.0)
            assert distance(restore(turned, 1.0), want) < 1e-3, name
            assert float(restore(turned, 1.0).norm()) == pytest.approx(float(want.norm()), rel=1e-3)


@pytest.mark.slow
def test_every_scheme_on_every_structure():
    for name, noisy in structured():
        if noisy.numel() > 2e5:
            continue
        for scheme in SCHEMES:
            options = dict(OPTIONS.get(scheme, {}))
            if scheme == "oracle":
                options["values"] = torch.linalg.svdvals(noisy) / 2
            if scheme == "truncate" and any(w in name for w in ("equal", "block", "multiple")):
                continue  # which three of equal values are kept is not determined
            if scheme == "polar" and name.endswith("value far above"):
                continue  # rounding in float32 is above the edge, and counts like a signal
            rates = [{"false_spike_rate": 0.01}] if scheme in EDGE_SCHEMES else []
            for extra in ({}, {"below": "zero"}, *rates):
                fast, exact = (
                    restore(noisy, 1.0, scheme, method=method, **options, **extra)
                    for method in ("fast", "exact")
                )
                assert distance(fast, exact) < 1e-3, (name, scheme, extra)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(128, 128), (130, 300), (257, 140)]),
    rank=st.integers(1, 24),
    equal=st.booleans(),
    top=st.floats(60, 1e6),
    noise=st.sampled_from([0.0, 1e-3, 1.0]),
    rows=st.sampled_from([None, 1, 5]),
    seed=st.integers(0, 99),
)
def test_fast_equals_exact(shape, rank, equal, top, noise, rows, seed):
    """Without noise, results agree to 1e-3; with noise, alignment and norm agree to 1%."""
    values = [top] * rank if equal else np.geomspace(top, 60, rank).tolist()
    clean = low_rank(shape, values, seed)
    if rows is not None:
        clean[rows:] = 0
    noisy = clean + noise * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    fast, exact = (restore(noisy, 1.0, method=method) for method in ("fast", "exact"))
    if noise < 1:
        assert distance(fast, exact) < (1e-3 if noise == 0 else 0.02)
    else:
        assert alignment(fast, exact) > 0.99
        assert float(fast.norm()) == pytest.approx(float(exact.norm()), rel=0.01)


def test_a_batch_with_such_matrices_among_ordinary_ones():
    """Matrices give the same result singly and in one batch, which a GPU would use."""
    ordinary = low_rank((300, 200), [200.0, 90.0]) + torch.randn(
        300, 200, generator=torch.Generator().manual_seed(0)
    )
    thirty = low_rank((300, 200), [300.0] * 30)
    batch = torch.stack([ordinary, one_entry(), one_row(300, 200), thirty, ordinary.flip(0)])
    want = torch.stack([by_numpy(noisy, 1.0) for noisy in batch])
    norms = torch.linalg.matrix_norm(batch)
    plan = make_plan(batch.shape, 1.0)
    for got in (restore(batch, 1.0), restoration._apply(plan, batch, norms)[0]):
        for index, limit in enumerate((0.05, 1e-3, 1e-3, 1e-3, 0.05)):
            assert distance(got[index], want[index]) < limit, index


def test_a_batch_costs_what_its_matrices_cost_singly(monkeypatch):
    """A matrix leaves the batch once it has settled: a slow one does not delay the others."""
    noise = torch.randn(12, 256, 320, generator=torch.Generator().manual_seed(0))
    noise[:3] += torch.stack([low_rank((256, 320), [70.0, 45.0, 36.0], seed) for seed in range(3)])
    decomposed, original = [], krylov._eigenvalues

    def counted(gram):
        decomposed.extend(gram.shape[-1] for _ in gram)
        return original(gram)

    monkeypatch.setattr(krylov, "_eigenvalues", counted)
    for scheme, options in (
        ("optimal", {}),
        ("optimal", {"false_spike_rate": 1e-2}),
        ("denoise", {}),
        ("partial", {"alpha": 0.5}),
    ):
        plan = make_plan(noise.shape, 1.0, scheme, **options)
        batch, values = restoration._apply(plan, noise, torch.linalg.matrix_norm(noise))
        together = sorted(decomposed)
        decomposed.clear()
        singly = restore(noise, 1.0, scheme, **options)  # on the CPU, one matrix at a time
        assert together == sorted(decomposed) and len(set(together)) > 2, scheme
        decomposed.clear()
        assert max(distance(a, b) for a, b in zip(batch, singly, strict=True)) < 1e-5, scheme
        above = (torch.linalg.svdvals(noise)[:, 0] > plan.edge).tolist()
        assert (values[:, 0] > plan.edge).tolist() == above and 3 <= sum(above) < 12, scheme


def test_any_unit_gives_the_same_result():
    """The unit of a matrix cancels, for denormals and at the ends of float32 and float64 too."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(160, 200, generator=generator, dtype=torch.float64)
    plain[:, :3] *= 30
    for dtype, units in (
        (torch.float32, (1e-42, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e35)),
        (torch.float64, (1e-318, 1e-300, 1e-160, 1e160, 1e300)),
    ):
        for unit in units:
            noisy = (plain * unit).to(dtype)
            for scheme in SCHEMES:
                ours, theirs = (dict(OPTIONS.get(scheme, {})) for _ in range(2))
                if scheme == "oracle":
                    ours["values"] = oracle_values(noisy, noisy)
                    theirs["values"] = oracle_values(plain, plain)
                for method in ("fast", "exact"):
                    got, reports = restore_with_report(
                        noisy, 1.5 * unit, scheme, method=method, **ours
                    )
                    want = restore(plain, 1.5, scheme, method=method, **theirs)
                    assert distance(got.double() / unit, want) < 0.01, (dtype, unit, scheme, method)
                    assert reports[0].norm_after == pytest.approx(
                        float(want.norm()) * unit, rel=0.01
                    )
            found, known = decompose(noisy, unit), decompose(plain, 1.0)
            assert found.effective_rank == pytest.approx(known.effective_rank, rel=0.01)
            assert found.stable_rank == pytest.approx(known.stable_rank, rel=0.01)
            assert found.num_above_edge == pytest.approx(known.num_above_edge, abs=1)
            assert alignment(noisy, noisy) == pytest.approx(1.0)


def test_noise_far_below_or_above_the_matrix():
    noisy = low_rank((160, 200), [3.0, 2.0, 1.0])
    for unit in (1e-30, 1.0, 1e30):
        for loss in ("frobenius", "operator", "nuclear"):
            for method in ("fast", "exact"):
                same = restore(noisy * unit, unit * 1e-25, loss=loss, method=method)
                assert distance(same.double() / unit, noisy) < 1e-3
                gone = restore(noisy * unit, unit * 1e25, loss=loss, method=method, below="zero")
                assert not gone.any()


def test_a_batch_of_unlike_units():
    plain = low_rank((160, 200), [300.0, 200.0, 100.0])
    batch = torch.stack([plain, 1e-30 * plain, 1e30 * plain])
    got = restore(batch, 1e-3)
    assert distance(got[0], plain) < 1e-3
    assert torch.equal(got[1], batch[1])  # nothing above the edge
    assert distance(got[2].double() / 1e30, plain) < 1e-3
    with pytest.raises(ValueError, match="must have a nonzero entry, got all zeros"):
        restore(torch.stack([plain, torch.zeros_like(plain)]), 1e-3)


def test_singular_values_that_the_type_cannot_hold_are_refused():
    for function in (decompose, restore):
        with pytest.raises(ValueError, match=r"that torch\.float32 can hold, got infinity"):
            function(torch.full((200, 300), 3e38), 1.0)
