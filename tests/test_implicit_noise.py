"""LoRA's implicit noise in `train`: against plain loops, its moments, LoRA itself, and resuming."""

import numpy as np
import pytest
import torch

from lowrank_dp.commands.train import app
from lowrank_dp.lora import implicit_noise
from lowrank_dp.rng import derive_seed
from lowrank_dp.train import TrainConfig, step
from lowrank_dp.train.implicit_noise import add_implicit_noise
from lowrank_dp.train.loop import train
from lowrank_dp.train.setup import prepare
from lowrank_dp.train.state import first_state, new_stream
from tests.refusals import refused
from tests.tasks import Stop, run_command, seeded

pytestmark = pytest.mark.usefixtures("one_thread")
MATRICES = r"layer\.1\..*\.(query|key|value|dense)\.weight$"


def small(**changes):
    base = {
        "model": "tiny",
        "task": "generated",
        "non_private": True,
        "optimizer": "sgd",
        "learning_rate": 0.3,
        "steps": 4,
        "batch_size": 20,
        "max_examples": 60,
        "eval_examples": 10,
        "eval_every": 2,
        "snapshot_every": 2,
        "lora_init": "gaussian",
        "train_layers": MATRICES,
        "seed": 3,
    }
    rank = {"rank": 3} if {"method", "implicit_noise"} & changes.keys() else {}
    return TrainConfig(**base | rank | changes)


def ready(config):
    setup = prepare(config, config.seed)
    return setup, first_state(config, new_stream(config, 0))


def naive_noise(gradient, kind, rank, generator):
    """Compute the noisy gradient (out, in) in float64, from the same standard normals."""
    g = gradient.double().numpy()
    if kind == "fresh-a":
        a = torch.randn(rank, g.shape[1], generator=generator).double().numpy() / np.sqrt(rank)
        return np.array([sum((row @ a[k]) * a[k] for k in range(rank)) for row in g])
    z = torch.randn(g.shape, generator=generator).double().numpy()
    return g + z * np.sqrt(((g**2).sum(axis=1, keepdims=True) + g**2) / rank)


@pytest.mark.parametrize("kind", ["gaussian", "fresh-a"])
def test_steps_are_those_of_a_loop_that_adds_the_noise_itself(kind):
    setup, state = ready(small(implicit_noise=kind))
    plain, other = ready(small())
    adapted = [name for name in plain.trained if "classifier" not in name]
    assert list(setup.noisy_matrices) == adapted and len(adapted) == 6
    for t in range(3):
        before = {n: p.detach().clone() for n, p in setup.trained.items()}
        with torch.no_grad():  # the weights at which the other run takes the clean gradient
            for n, p in plain.trained.items():
                p.copy_(before[n])
        step.take_step(plain, other)
        step.take_step(setup, state)
        generator = seeded(derive_seed(3, f"implicit noise {t}"))
        for n, p in plain.trained.items():
            want = p.grad
            if n in adapted:
                want = naive_noise(p.grad, kind, 3, generator)
                assert np.abs(want - p.grad.double().numpy()).max() > 1e-4
            moved = (before[n] - setup.trained[n].detach()).double().numpy() / 0.3
            np.testing.assert_allclose(moved, np.asarray(want), atol=2e-5, err_msg=n)


def test_mean_and_variance_over_steps():
    """Each entry's mean within 6 standard errors, and the mean square within 5%."""
    g = torch.randn(5, 12, generator=seeded(1))
    exact = (g.square().sum(1, keepdim=True) + g.square()) / 4
    given = {"w": g, "b": torch.ones(5)}
    for kind in ("gaussian", "fresh-a"):
        noise = torch.stack(
            [
                add_implicit_noise(given, {"w": False}, kind, 4, seed=0, step=t)["w"] - g
                for t in range(4000)
            ]
        )
        assert (noise.mean(0).abs() < 6 * (exact / 4000).sqrt()).all(), kind
        assert abs(float((noise.square().mean(0) / exact).mean()) - 1) < 0.05, kind
        assert abs(float((noise[1:] * noise[:-1]).mean())) < 0.05 * float(exact.mean()), kind
        got = add_implicit_noise(given, {"w": False}, kind, 4, seed=0, step=7)
        assert got["b"] is given["b"]
        torch.testing.assert_close(got["w"], noise[7] + g)
        again = add_implicit_noise(given, {"w": False}, kind, 4, seed=1, step=7)
        assert not torch.allclose(again["w"], got["w"])


def test_a_weight_that_is_stored_transposed_gets_the_noise_of_its_transpose():
    g = torch.randn(5, 12, generator=seeded(1))
    for kind in ("gaussian", "fresh-a"):
        plain = add_implicit_noise({"w": g}, {"w": False}, kind, 2, seed=0, step=0)["w"]
        turned = add_implicit_noise({"w": g.T}, {"w": True}, kind, 2, seed=0, step=0)["w"]
        torch.testing.assert_close(turned, plain.T)
    assert torch.linalg.matrix_rank(turned) == 2


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_lora_with_a_frozen_a_is_full_fine_tuning_with_one_projection(beta, monkeypatch):
    """W_0 + B A after each step of SGD equals full SGD with the gradient G A^T A."""
    lora, lora_state = ready(small(method="lora-frozen-a", beta1=beta))
    full, full_state = ready(small(implicit_noise="fresh-a", beta1=beta))
    layers = {
        f"{name.removeprefix('base_model.model.')}.weight": module
        for name, module in lora.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert layers.keys() == full.noisy_matrices.keys()  # exactly those that LoRA adapts

    def project(mean, matrices, kind, rank, **_):
        a = {name: layers[name].lora_A["default"].weight.detach() for name in matrices}
        return {n: g @ a[n].T @ a[n] if n in matrices else g for n, g in mean.items()}

    monkeypatch.setattr(step, "add_implicit_noise", project)
    start = {n: p.detach().clone() for n, p in full.trained.items()}
    for _ in range(4):
        step.take_step(lora, lora_state)
        step.take_step(full, full_state)
        for name, module in layers.items():
            got = module.base_layer.weight + module.get_delta_weight("default")
            want = full.trained[name]
            gap, moved = (got - want).norm(), (want - start[name]).norm()
            assert moved > 1e-3 and gap <= 1e-4 * moved, name
    for name, p in full.trained.items():  # the head, which both runs train
        if name not in layers:
            (twin,) = [
                q
                for n, q in lora.trained.items()
                if n.endswith(name.split(".")[-1]) and "lora" not in n
            ]
            torch.testing.assert_close(p, twin, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "fresh-a"])
def test_a_run_that_was_killed_resumes_with_the_same_noise(kind, tmp_path, monkeypatch):
    config = small(implicit_noise=kind)
    whole = train(config, tmp_path / "whole", show_progress=False)
    seen, original = [], step.add_implicit_noise

    def break_off(*arguments, **options):
        seen.append(options["step"])
        if len(seen) == 4:
            raise Stop
        return original(*arguments, **options)

    monkeypatch.setattr(step, "add_implicit_noise", break_off)
    with pytest.raises(Stop):
        train(config, tmp_path / "killed", show_progress=False)
    again = train(config, tmp_path / "killed", resume=True, show_progress=False)
    assert seen == [0, 1, 2, 3, 2, 3]
    assert [e["loss"] for e in again.curve] == [e["loss"] for e in whole.curve]
    assert again.train_loss == whole.train_loss
    assert again.privacy.startswith("NON-PRIVATE") and "no privacy mechanism" in again.privacy
    assert f"{kind}, rank 3) on the gradients of 6 matrices" in again.privacy


def test_the_callback_sees_each_evaluation(tmp_path):
    seen = []

    def note(setup, entry):
        seen.append((entry["step"], entry["loss"]))

    result = train(small(), tmp_path / "run", show_progress=False, on_evaluation=note)
    assert seen == [(e["step"], e["loss"]) for e in result.curve] and len(seen) == 3
    train(small(), tmp_path / "run", resume=True, show_progress=False, on_evaluation=note)
    assert len(seen) == 3  # a finished run is not evaluated again


def test_refusals(tmp_path, capsys):
    refused("did you mean 'fresh-a'", implicit_noise, torch.ones(2, 2), 1, "fresh")
    for words, changes in (
        ("did you mean 'gaussian'", {"implicit_noise": "gausian"}),
        ("must go with method 'full', got 'lora'", {"method": "lora"}),
        ("must go with non_private", {"non_private": False, "epsilon": 3.0}),
        ("must go with non_private", {"non_private": False, "noise_free": True}),
        ("without a preconditioner", {"precondition": "generated"}),
        ("shard must go without implicit_noise", {"shard": True}),
    ):
        refused(words, small, **{"implicit_noise": "gaussian", **changes})
    small(implicit_noise="gaussian", target_modules=("query",))
    status, _, error = run_command(
        capsys, app, "--model", "tiny", "--task", "generated", "--epsilon", 3,
        "--implicit-noise", "fresh-a", "--output", tmp_path / "run",
    )  # fmt: skip
    assert status == 2 and "implicit_noise 'fresh-a' must go with non_private" in error
    assert "Traceback" not in error and not (tmp_path / "run").exists()
