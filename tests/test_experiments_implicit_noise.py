"""Experiment on LoRA's implicit noise: readings at a loss, one run for all steps, a small trial."""

from dataclasses import replace

import numpy as np
import pytest

from lowrank_dp import artifacts
from lowrank_dp.artifacts.runs import InUse
from lowrank_dp.experiments import implicit_noise
from lowrank_dp.experiments import implicit_noise_runs as runs
from lowrank_dp.experiments.implicit_noise_configs import arm_config, arms
from lowrank_dp.experiments.matched import at_level, common_level
from lowrank_dp.experiments.tuning import Tuned
from lowrank_dp.mia.attack import Options, attack, open_target
from lowrank_dp.plots import style
from lowrank_dp.plots.implicit_noise import plot_implicit_noise
from lowrank_dp.train.loop import train
from tests.refusals import refused

SMALL = replace(
    implicit_noise.SMALL,
    base=replace(implicit_noise.SMALL.base, max_examples=120, eval_examples=20, eval_every=2),
    steps=(2, 4),
    tuning_steps=2,
    tuning_holdout=20,
)


def naive_at_level(loss, values, level):
    if loss[0] <= level:
        return np.nan
    for i in range(len(loss) - 1):
        if loss[i] > level >= loss[i + 1]:
            share = (loss[i] - level) / (loss[i] - loss[i + 1])
            return values[i] + share * (values[i + 1] - values[i])
    return np.nan


def test_values_are_read_where_a_loss_first_falls_to_a_level():
    rng = np.random.default_rng(0)
    loss, values = rng.uniform(0.2, 0.7, (40, 6)), rng.uniform(size=(40, 6))
    loss[3, 2:] = np.nan
    for level in (0.25, 0.45, 0.65, 0.9):
        want = [naive_at_level(*pair, level) for pair in zip(loss, values, strict=True)]
        np.testing.assert_allclose(at_level(loss, values, level), want)
    rises_again = np.array([0.7, 0.6, 0.5, 0.6, 0.8])  # the earlier of the two stages
    assert at_level(rises_again, np.array([0, 1, 2, 3, 4.0]), 0.55) == pytest.approx(1.5)
    assert np.isnan(at_level(rises_again, rises_again, 0.4))  # never extrapolated
    assert np.isnan(at_level(rises_again[1:], rises_again[1:], 0.65))
    for first in (0.5, 0.4):  # the level was passed before the first point
        falls_twice = np.array([first, 0.7, 0.3])
        assert np.isnan(at_level(falls_twice, falls_twice, 0.5)), first
    assert common_level(np.array([[0.7, 0.2], [0.7, 0.4]]), (0.5, 0.3)) == 0.5
    assert common_level(np.array([[0.7, 0.2], [0.7, 0.2]]), (0.5, 0.3)) == 0.3


def test_the_plan_counts_runs():
    text = implicit_noise.plan(implicit_noise.SST2)
    assert "12 arms are tuned by about 72 runs" in text
    assert "14 arms x 3 seeds: 42 runs of 120 steps" in text
    assert "3 arms x (3 targets + 16 shadows): 57 runs" in text


def test_dropout_changes_an_arm_in_nothing_else():
    table = arms(implicit_noise.SST2)
    assert table["LoRA r=8, dropout"] == {**table["LoRA r=8"], "dropout": True}
    assert table["full, dropout"] == {"dropout": True}


def test_refusals():
    for words, config in (
        ("num_seeds must be", replace(SMALL, num_seeds=1)),
        ("tuning_seed must not be one of the 2", replace(SMALL, tuning_seed=1)),
        ("base must train by SGD", replace(SMALL, base=replace(SMALL.base, optimizer="adam"))),
        ("steps must be multiples of eval_every 2, got 3", replace(SMALL, steps=(2, 3))),
    ):
        refused(words, implicit_noise.run, config, "unused")


@pytest.mark.slow
def test_a_run_attacked_on_its_way_is_a_shorter_run_attacked_at_its_end(tmp_path):
    changes = arms(SMALL)["Gaussian noise r=8"]
    one = arm_config(SMALL, changes, 0.02, 0, 4)
    runs.train_observed(one, SMALL.steps, tmp_path)
    measured = runs.observed(one, SMALL.steps, tmp_path)
    found = runs.curves(measured)
    short = arm_config(SMALL, changes, 0.02, 0, 2)
    result = train(short, tmp_path / "short", show_progress=False)
    options = Options(primary="base")
    report = attack(open_target(tmp_path / "short", options), options, tmp_path / "cache")
    want = next(one.auc.value for one in report.attacks if one.name == "base")
    assert found.auc[0] == 0.5 and found.auc[1] == pytest.approx(want, abs=1e-9)
    assert (
        found.train_loss[1] == pytest.approx(report.train_loss, abs=1e-6)
        or len(measured[0].loss) > SMALL.base.eval_examples
    )
    assert found.held_out_loss[1] == result.curve[-1]["loss"]
    with pytest.raises(ValueError, match=r"no result step-000003.*: delete .*, and repeat"):
        runs.observed(one, (3,), tmp_path)


def test_losses_that_are_missing_are_no_divergence(monkeypatch, tmp_path):
    """The instruction to delete a run must not end as one more run that stopped."""
    rates = {arm: Tuned(arm, (0.01, 0.02, 0.03), ((0.0,),) * 3, 0.02) for arm in arms(SMALL)}
    monkeypatch.setattr(implicit_noise, "_tune", lambda *_: (rates, []))
    monkeypatch.setattr(runs, "train_observed", lambda *_: None)
    with pytest.raises(ValueError, match=r"delete .*, and repeat the command"):
        implicit_noise.run(SMALL, tmp_path)

    def in_use(*_):
        raise InUse("in use by another run")

    monkeypatch.setattr(runs, "train_observed", in_use)
    with pytest.raises(InUse):
        implicit_noise.run(SMALL, tmp_path)


@pytest.mark.slow
def test_targets_that_differ_in_their_seed_share_their_shadows(tmp_path):
    one, two = (arm_config(SMALL, {}, 0.02, seed, 2) for seed in (0, 1))
    found = runs.attack_with_shadows(one, 12, tmp_path)
    assert 0 < found.lira < 1 and 0 < found.base < 1 and found.train_loss > 0
    trained = len([*(tmp_path / "cache" / "shadows").glob("*/training.json")])
    assert trained == 12
    assert runs.attack_with_shadows(two, 12, tmp_path).lira != found.lira
    assert len([*(tmp_path / "cache" / "shadows").glob("*/training.json")]) == trained
    assert len([*(tmp_path / "targets").glob("*/training.json")]) == 2


@pytest.mark.slow
def test_a_small_trial(tmp_path, monkeypatch, in_this_process):
    asked = []

    def attacked(config, num_shadows, folder):
        asked.append((config.method, config.implicit_noise, config.seed, config.steps))
        return runs.ShadowAttack(0.5 + len(asked) / 100, 0.5, 0.7, "")

    monkeypatch.setattr(runs, "attack_with_shadows", attacked)
    config = replace(SMALL, num_shadows=16, train_levels=(0.69,), held_out_levels=(0.69,))
    result = implicit_noise.run(config, tmp_path / "runs")
    assert result.arms[0] == "full" and len(result.arms) == 7
    assert result.auc.shape == (7, 2, 3) and np.all(result.auc[..., 0] == 0.5)
    assert np.isfinite(result.train_loss).all() and np.ptp(result.auc[..., 1:]) > 0
    assert len({tuple(row) for row in result.train_loss[:5, :, -1]}) == 5  # five ways of training
    assert result.shadow_arms == ("full", "Gaussian noise r=8", "frozen A r=8")
    np.testing.assert_allclose(result.lira, [[0.51, 0.52], [0.53, 0.54], [0.55, 0.56]])
    assert [one[:3] for one in asked[::2]] == [
        ("full", "none", 0),
        ("full", "gaussian", 0),
        ("lora-frozen-a", "none", 0),
    ]
    gaps = np.abs(result.train_loss[0, :, 1:].mean(axis=0) - 0.69)
    assert asked[0][3] == asked[1][3] == SMALL.steps[gaps.argmin()]
    assert "NON-PRIVATE" in result.privacy and all(
        one.is_inside or one.failure for one in result.tuned
    )
    path = artifacts.save_result(result, tmp_path, "implicit_noise")
    again = artifacts.load_result(tmp_path, path.stem, implicit_noise.Result)
    assert implicit_noise.headline(again) == implicit_noise.headline(result)
    columns, rows = implicit_noise.table(again)
    assert len(rows) == 7 and all(len(row) == len(columns) for row in rows)
    figure = plot_implicit_noise(again)
    figure.draw_without_rendering()
    assert style.panels(figure) == list("abcd")
    line = figure.get_suptitle()
    assert "NON-PRIVATE" in line and "95% t-intervals, 2 seeds" in line
    never = replace(again, train_loss=again.train_loss + 9)
    figure = plot_implicit_noise(never)
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.axes[1].texts] == ["reached by no arm"]
    repeated = implicit_noise.run(config, tmp_path / "runs")  # nothing is trained again
    np.testing.assert_array_equal(repeated.auc, result.auc)
