"""The sample-efficiency table against hand-made curves, and one real small sweep."""

from dataclasses import replace

import numpy as np
import pytest

from lowrank_dp import artifacts
from lowrank_dp.experiments import efficiency
from lowrank_dp.experiments.intervals import mean_and_interval
from lowrank_dp.plots.training import plot_efficiency
from lowrank_dp.train import TrainConfig, load_result

BASE = TrainConfig(
    model="tiny",
    task="generated",
    noise_multiplier=0.5,
    batch_size=64,
    steps=4,
    eval_every=2,
    eval_examples=100,
    max_examples=300,
)
ARMS = ("DP-Adam", "low-pass filter")  # of one scheme
CONFIG = efficiency.Config(
    BASE, ARMS, learning_rates=(1e-3, 1e-2), num_seeds=2, tuning_holdout=50, num_workers=1
)


def made(score, metric="accuracy"):
    """Make a result with the given scores (arms, seeds, evaluations), one every 10 steps."""
    score = np.asarray(score, dtype=float)
    steps = 10 * np.arange(score.shape[-1])
    seconds = np.broadcast_to(2.0 * steps, score.shape)
    return efficiency.Result(
        config=efficiency.Config(BASE, ARMS, score=metric),
        provenance={},
        privacy="",
        epsilon=8.0,
        delta=1e-5,
        description="",
        arms=ARMS,
        failures=(),
        final={},
        steps=steps,
        score=score,
        loss=score,
        seconds=seconds,
        restore_share=np.full(score.shape[:2], 0.02),
        learning_rate=np.array([1e-3, 1e-3]),
        tuning=np.zeros((2, 3, score.shape[-1])),
    )


def test_steps_to_a_share_of_the_baselines_best_gain():
    result = made(
        [
            [[0.5, 0.6, 0.9], [0.5, 0.7, 0.9]],  # best 0.9, gain 0.4
            [[0.5, 0.87, 0.8], [0.5, 0.6, 0.7]],
        ]
    )
    assert result.start == 0.5 and result.best == pytest.approx(0.9)
    # 90% of the gain is 0.5 + 0.9 * 0.4 = 0.86
    np.testing.assert_array_equal(efficiency.steps_to(result, 0.9), [[20, 20], [10, np.inf]])
    np.testing.assert_array_equal(efficiency.seconds_to(result, 0.9), [[40, 40], [20, np.inf]])
    np.testing.assert_array_equal(efficiency.steps_to(result, 0.95), [[20, 20], [np.inf, np.inf]])


def test_steps_of_the_tuning_runs_at_each_learning_rate():
    tuning = np.array(
        [
            [[0.5, 0.5, 0.9], [0.5, 0.88, 0.8], [0.5, 0.5, 0.5]],
            [[0.5, 0.9, 0.9], [0.5, 0.6, 0.87], [0.5, np.nan, np.nan]],
        ]
    )
    result = replace(made(np.full((2, 2, 3), 0.7)), tuning=tuning)
    np.testing.assert_array_equal(
        efficiency.tuning_steps_to(result, 0.9), [[20, 10, np.inf], [10, 20, np.inf]]
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory, in_this_process):
    """Return the folder and the result of a small sweep that really trains."""
    folder = tmp_path_factory.mktemp("sweep") / "runs"
    return folder, efficiency.run(CONFIG, folder)


@pytest.mark.slow
def test_a_run_that_stopped_is_named_by_its_arm(monkeypatch, swept):
    """The message tells two arms of one scheme apart, such as DP-Adam and the low-pass filter."""
    real = efficiency.sweep

    def broken(configs, folder, **options):
        return [
            replace(outcome, result=None, error="loss is 20")
            if outcome.config.filter_b and outcome.config.learning_rate == 0.01
            else outcome
            for outcome in real(configs, folder, **options)
        ]

    monkeypatch.setattr(efficiency, "sweep", broken)
    result = efficiency.run(CONFIG, swept[0])
    assert result.failures == ("low-pass filter, learning rate 0.01, seed 1000: loss is 20",)
    assert np.isnan(result.tuning[1, 1]).all() and result.learning_rate[1] == 1e-3


def test_a_loss_counts_downwards():
    result = made([[[8.0, 4.0, 2.0], [8.0, 3.0, 2.0]], [[8.0, 2.1, 3.0], [8.0, 7.0, 6.0]]], "loss")
    assert result.best == 2.0  # target 8 - 0.9 * 6 = 2.6
    np.testing.assert_array_equal(efficiency.steps_to(result, 0.9), [[20, 20], [10, np.inf]])


def test_a_run_that_stopped_reaches_nothing_and_is_said():
    result = made([[[0.5, 0.6, 0.9]] * 2, [[0.5, 0.9, 0.9], [np.nan] * 3]])
    assert efficiency.steps_to(result, 0.9)[1].tolist() == [10, np.inf]
    columns, rows = efficiency.table(result)
    assert rows[1][columns.index("final accuracy")] == "1 of 2 runs stopped"


def test_interval_against_scipy():
    from scipy import stats

    values = np.array([0.7, 0.8, 0.75])
    mean, half = mean_and_interval(values)
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_bad_configurations(tmp_path):
    for changes, words in (
        ({"arms": ("DP-Adam", "optmal")}, "arm must be one of"),
        ({"arms": ("denoise",)}, "baseline"),
        ({"score": "acuracy"}, "did you mean 'accuracy'"),
        ({"num_seeds": 1}, "num_seeds"),
        ({"tuning_seed": 0}, "tuning_seed must not be one of the 3 reported seeds"),
    ):
        with pytest.raises(ValueError, match=words):
            efficiency.run(efficiency.Config(BASE, **changes), tmp_path)
            pytest.fail(f"{changes} was accepted")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_small_sweep_tunes_on_other_data_and_other_seeds(swept, tmp_path):
    folder, result = swept
    assert result.score.shape == (2, 2, 3) and result.steps.tolist() == [0, 2, 4]
    runs = [load_result(path) for path in folder.iterdir()]
    tuning = [run for run in runs if run.config.holdout]
    chosen = {(arm, result.learning_rate[arm], seed) for arm in range(2) for seed in range(2)}
    kept = {
        (int(bool(run.config.filter_b)), run.config.learning_rate, run.config.seed)
        for run in runs
        if not run.config.holdout
    }
    assert chosen <= kept  # the runs of the test above may be there too
    assert {run.config.seed for run in tuning} == {1000} and len(tuning) == 4
    for i, arm in enumerate(ARMS):
        of_arm = [r for r in tuning if bool(r.config.filter_b) == (i == 1)]
        mean = {r.config.learning_rate: np.mean([e["accuracy"] for e in r.curve]) for r in of_arm}
        assert mean[result.learning_rate[i]] == max(mean.values()), arm
    path = artifacts.save_result(result, tmp_path, "efficiency")
    again = artifacts.load_result(tmp_path, path.stem, efficiency.Result)
    np.testing.assert_array_equal(again.score, result.score)
    assert again.config == result.config
    assert efficiency.headline(again) == efficiency.headline(result)
    assert plot_efficiency(again).axes
