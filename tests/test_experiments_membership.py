"""Membership inference over ranks: a small sweep, and AUC interpolated at matched loss."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from lowrank_dp import artifacts
from lowrank_dp.experiments import membership, membership_configs
from lowrank_dp.plots.membership import plot_membership
from lowrank_dp.theory import noise_variance
from lowrank_dp.train import TrainConfig

BASE = TrainConfig(
    model="tiny-llama",
    task="generated-table",
    non_private=True,
    delta=1e-3,
    batch_size=20,
    max_examples=100,
    membership="bernoulli",
    eval_every=100,
    snapshot_every=100,
    eval_examples=30,
)
CONFIG = membership_configs.Config(
    base=BASE, ranks=(2,), frozen_ranks=(1,), steps=(2,), num_seeds=2, num_workers=2
)


def test_the_plan_counts_runs_and_steps():
    text = membership.plan(replace(CONFIG, steps=(2, 5), num_seeds=3))
    assert "5 methods x 3 seeds" in text and "30 runs" in text and "105 training steps" in text


def test_epsilon_is_that_of_the_largest_number_of_steps(monkeypatch):
    def swept(configs, folder, **options):
        return [
            SimpleNamespace(
                error="",
                result=SimpleNamespace(epsilon=None if c.non_private else c.steps + c.seed / 4),
            )
            for c in configs
        ]

    def attacked(config, folder, options):
        return membership._AttackedRun(0.5, 0.0, 1.0, 1.0, 0.5, "accuracy", "", "")

    monkeypatch.setattr(membership, "sweep", swept)
    monkeypatch.setattr(membership, "_attack_run", attacked)
    monkeypatch.setattr(membership, "_width", lambda config: 64)
    result = membership.run(replace(CONFIG, steps=(2, 5), num_workers=1))
    assert result.epsilon.tolist() == [np.inf, np.inf, np.inf, 5, 5]


def test_an_attack_whose_process_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(membership.engines, "run", lambda job, jobs, engine, workers: [(0, None)])
    with pytest.raises(ValueError, match="an attack's process died"):
        membership._attack_runs([BASE], "folder", None, 2)


@pytest.mark.slow
def test_a_small_sweep(tmp_path, in_this_process):
    result = membership.run(CONFIG, tmp_path / "runs")
    assert result.arms == (
        "full",
        "LoRA r=2",
        "frozen A r=1",
        "full, DP",
        "full, DP restored",
    )
    assert result.auc.shape == (5, 2, 1) and np.all((result.auc >= 0) & (result.auc <= 1))
    assert np.isinf(result.epsilon[:3]).all() and (result.epsilon[3:] <= 8).all()
    assert result.noise_variance.tolist() == [noise_variance(2, 64)]
    assert "NON-PRIVATE" in result.privacy
    path = artifacts.save_result(result, tmp_path, "membership")
    again = artifacts.load_result(tmp_path, path.stem, membership.Result)
    assert membership.headline(again) == membership.headline(result)
    columns, rows = membership.table(again)
    assert len(rows) == 5 and rows[0][columns.index("epsilon")] == "none"
    assert np.isnan(again.tpr).all()  # of fewer than 100 non-members there is no TPR at 1% FPR
    figure = plot_membership(again)
    figure.canvas.draw()
    assert "too few non-members" in [text.get_text() for text in figure.axes[1].texts]
    (point,) = figure.axes[-1].lines  # variance of the projection noise, at one rank
    assert point.get_marker() == "o" and point.get_xdata().tolist() == [2]
    left, right = figure.axes[0].get_xlim()
    assert left < 2 < right
    without = [arm for arm in again.arms if "DP" not in arm]
    assert without == list(membership_configs.arms((2,), (1,), with_dp=False))
    arrays = ("epsilon", "auc", "tpr", "train_loss", "utility", "untuned")
    fewer = {name: getattr(again, name)[: len(without)] for name in arrays}
    plot_membership(replace(again, arms=tuple(without), **fewer)).canvas.draw()


def test_matched_loss_is_read_within_seeds_and_never_beyond():
    shape = (3, 2, 2)
    loss = np.array([[[0.7, 0.3]] * 2, [[0.6, 0.4]] * 2, [[0.7, 0.65]] * 2])
    auc = np.array([[[0.5, 0.9]] * 2, [[0.5, 0.7]] * 2, [[0.5, 0.5]] * 2])
    empty = np.zeros(shape)
    result = membership.Result(
        config=CONFIG,
        provenance={},
        privacy="",
        description="",
        arms=("full", "LoRA r=1", "full, DP"),
        utility_name="accuracy",
        shift=(),
        epsilon=np.full(3, np.inf),
        auc=auc,
        tpr=empty,
        train_loss=loss,
        utility=empty,
        untuned=empty,
        noise_variance=np.ones(2),
    )
    read = result.at("train_loss")  # both ordinary arms have passed 0.4 to 0.6: read at 0.5
    np.testing.assert_allclose(read[:2], [[0.7, 0.7], [0.6, 0.6]])
    assert np.isnan(read[2]).all()  # the private arm never reached the value
    apart = replace(result, train_loss=loss + np.array([0.0, 1.0, 0.0])[:, None, None])
    read = apart.at("train_loss")  # two values with one arm each: the lower, again 0.5
    np.testing.assert_allclose(read[0], 0.7)
    assert np.isnan(read[1:]).all()
