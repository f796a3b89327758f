"""Slope, curvature and line search of a loss surface, against finite differences and a scan."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

from lowrank_dp.experiments import gradients, loss_surface
from tests.oracles import clip_one_by_one
from tests.tasks import seeded

# the task, and how many of the two blocks train (1: the first block's output is cached)
CASES = (
    ("tiny", "generated", 1),
    ("tiny", "generated", None),
    ("tiny-llama", "generated-table", 1),
)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[1]}-{case[2]}")
def surface(request):
    model, task, train_layers = request.param
    config = gradients.GradientConfig(
        model=model, task=task, train_layers=train_layers, micro_batch_size=5
    )
    source = gradients.load_source(config)
    source.model.double()
    batches = [batch for _, batch in source.batches(range(12), 5)]
    return loss_surface.make_surface(source.model, source.matrices, batches)


def some_direction(surface, seed, names=None):
    generator = seeded(seed)
    return loss_surface.unit(
        {
            name: torch.randn(w.shape, generator=generator).double()
            for name, w in surface.weights.items()
            if names is None or name in names
        }
    )[0]


@pytest.mark.slow
def test_the_loss_is_the_mean_over_rows_of_the_models_own_loss(surface):
    """The oracle takes the model's own loss row by row, with no block replaced."""
    total, rows = 0.0, 0
    with torch.no_grad():
        for batch in surface.batches:
            for i in range(len(batch["labels"])):
                total += float(surface.model(**{k: v[i : i + 1] for k, v in batch.items()}).loss)
                rows += 1
    assert rows == surface.num_rows == 12
    assert surface.loss() == pytest.approx(total / rows, rel=1e-5)
    assert len(surface.outputs) == (3 if surface.frozen else 0)


@pytest.mark.slow
def test_frozen_blocks_do_not_run_again(surface):
    if not surface.frozen:
        assert all(p.requires_grad for p in surface.weights.values())
        return
    assert not any(p.requires_grad for m in surface.frozen for p in m.parameters())
    ran = []
    handle = next(surface.frozen[0].children()).register_forward_hook(lambda *_: ran.append(1))
    surface.loss()
    assert not ran
    surface.model(**surface.batches[0])  # afterwards the model has its own blocks again
    assert ran
    handle.remove()


@pytest.mark.slow
def test_slope_and_curvature_are_those_of_finite_differences(surface):
    start = {name: w.detach().clone() for name, w in surface.weights.items()}
    loss, gradient = surface.loss_and_gradient()
    one = next(iter(surface.weights))
    with surface.curvature() as curvature:
        for direction in (some_direction(surface, 1), some_direction(surface, 2, {one})):
            h = 1e-2
            ahead, behind = (surface.loss_at(direction, step) for step in (h, -h))
            slope = loss_surface.product(direction, gradient)
            assert slope == pytest.approx((behind - ahead) / (2 * h), rel=1e-2, abs=1e-6)
            bend = (ahead + behind - 2 * loss) / h**2
            assert curvature(direction) == pytest.approx(bend, rel=2e-2, abs=1e-4)
    assert all(torch.equal(w, start[name]) for name, w in surface.weights.items())


@pytest.mark.slow
def test_clip_factors_as_row_weights_give_the_mean_of_the_clipped_gradients(surface):
    whole = collate_again(surface.batches)
    sums, norms = clip_one_by_one(surface.model, whole, None)  # clips at the median norm
    weighted = dataclasses.replace(surface, row_weights=(norms.median() / norms).clamp(max=1))
    _, gradient = weighted.loss_and_gradient()
    for name, part in gradient.items():
        torch.testing.assert_close(part, sums[name] / 12, rtol=1e-4, atol=1e-6)
    assert weighted.loss() < surface.loss()


def collate_again(batches):
    """Join batches of different lengths to one batch, with the rows in the same order."""
    length = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"labels": -100}
    return {
        key: torch.cat(
            [
                functional.pad(b[key], (0, length - b[key].shape[1]), value=fill.get(key, 0))
                if b[key].ndim == 2
                else b[key]
                for b in batches
            ]
        )
        for key in batches[0]
    }


def test_the_line_search_finds_what_a_scan_finds():
    scan = np.geomspace(1e-4, 1e4, 200_001)
    for name, change in {
        "parabola": lambda x: x * x - 2 * 0.7 * x,
        "quartic": lambda x: x**4 - 3 * x,
        "flat, then steep": lambda x: -np.log1p(x) + np.expm1(x / 30),
    }.items():
        best = scan[np.argmin(change(scan))]
        for first in (best, best / 700, best * 300):
            seen = []

            def counted(x, change=change, seen=seen):
                seen.append(x)
                return change(x)

            step, gain = loss_surface.line_search(counted, first)
            assert gain == pytest.approx(-change(best), rel=0.03), (name, first)
            assert step == pytest.approx(best, rel=0.25), (name, first)
            assert len(set(seen)) == len(seen) < 20, (name, first)
    assert loss_surface.line_search(lambda x: x, 1.0) == (0.0, 0.0)
    step, gain = loss_surface.line_search(lambda x: -x, 1.0)  # without a minimum it ends
    assert gain == step == 2.0**12
