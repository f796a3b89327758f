"""Steps to a target by arm, and the map of the gap: made-up sweeps, and real small ones."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from lowrank_dp import artifacts, figures
from lowrank_dp.data import load_task
from lowrank_dp.evaluation import evaluate
from lowrank_dp.evaluation.models import evaluated_rows
from lowrank_dp.experiments import (
    arms,
    cost,
    gap,
    gap_configs,
    plan_gap,
    steps,
    steps_configs,
    tuning,
)
from lowrank_dp.experiments.arms import ARMS, PLAIN
from lowrank_dp.models import load_model, load_tokenizer
from lowrank_dp.plots.gap import plot_gap
from lowrank_dp.plots.steps import plot_steps
from lowrank_dp.precondition import Moment, joint_scales
from lowrank_dp.sweep import PREFIX_FOLDER, Outcome
from lowrank_dp.train import TrainConfig
from tests.tasks import case, needs_data

PAPER = Path(__file__).parent.parent / "paper_artifacts"
STEPS = 10
BASE = arms.base_config(
    model="tiny", task="generated", epsilon=8.0, batch_size=64, steps=STEPS, max_examples=300
)
CONFIG = steps_configs.Config(
    BASE, (*PLAIN, "mean, optimal, zeroed", "DP-LoRA"), num_seeds=3, tuning_holdout=50
)


def best_rate(config):
    """Learning rate at which a made-up run is fastest."""
    return {"sgd": 9.49, "adam": 0.01}[config.optimizer] * (0.1 if config.noise_free else 1)


def delay(config):
    """Step at which a made-up run at its best rate begins to rise."""
    if config.method == "lora":
        return 8
    if config.scheme == "optimal":
        return 3
    slow = 0 if config.noise_free else 2 + (config.epsilon < 1)
    return 1 + slow + (config.optimizer == "sgd")


def made(config):
    """Curve of a made-up run: a jump to 0.9, which is later for odd seeds and for worse rates."""
    distance = abs(math.log10(config.learning_rate / best_rate(config)))
    jump = delay(config) + config.seed % 2 + 3 * max(0, distance - 0.05)
    return [
        {
            "step": step,
            "loss": 1.0,
            "accuracy": 0.5 + 0.4 * (step >= jump),
            "seconds": 2.0 * step,
            "restore_seconds": 0.2 * step,
        }
        for step in range(config.steps + 1)
    ]


@pytest.fixture
def swept(monkeypatch):
    """Replace training by made-up curves; yield the list of configurations that are asked for."""
    asked = []

    def made_up(configs, folder, **options):
        asked.extend(configs)
        return [
            Outcome(
                config,
                SimpleNamespace(
                    curve=made(config),
                    privacy="(8, 1e-05)-DP",
                    epsilon=None if config.noise_free else config.epsilon,
                    delta=1.234561e-5,
                    description="made up",
                    noise_multiplier=0.0 if config.noise_free else 1 / config.epsilon,
                ),
            )
            for config in configs
        ]

    monkeypatch.setattr(tuning, "sweep", made_up)
    return asked


def test_a_run_that_could_not_be_made_is_no_run_that_diverged(monkeypatch):
    """A full disk says nothing about a learning rate: the experiment stops, and keeps its runs."""

    def full(configs, folder, **options):
        return [
            Outcome(one, None, "No space left on device", diverged=one.learning_rate <= 2)
            for one in configs
        ]

    monkeypatch.setattr(tuning, "sweep", full)
    for experiment, config in ((steps, CONFIG), (gap, GAP)):
        with pytest.raises(ValueError, match=r"could not be made: No space .* repeat the comm"):
            experiment.run(config)
    config = arms.arm_config(BASE, "DP-SGD", 3.0, 0)
    with pytest.raises(ValueError, match="could not be made"):
        tuning.train_all({("DP-SGD", 0): config}, "runs", 1)


def test_an_arm_whose_claim_needs_more_has_its_own_statement():
    """What must be public weakens the claim of a preconditioned arm, and of no other arm."""
    same, weaker = "(1, 1e-05)-DP", "(1, 1e-05)-DP; preconditioner from text that must be public"
    said = dict.fromkeys((*PLAIN, "denoise"), same) | {"preconditioned, CoLA": weaker}
    clean, own, others = steps.privacy_of_arms(said).split(": (1")
    assert clean.startswith("NON-PRIVATE: ") and clean.endswith("; preconditioned, CoLA")
    assert ": (1" + own == f"{weaker}; every other arm".replace("(1", ": (1", 1)
    assert "(1" + others == same


def test_every_arm_is_a_configuration():
    for name, arm in ARMS.items():
        config = arms.arm_config(BASE, name, arm.start, 7, 20)
        assert isinstance(config, TrainConfig) and (config.seed, config.holdout) == (7, 20)
        assert config.noise_free == ("NON-PRIVATE" in name) and not config.non_private, name
        assert config.noise_free or config.epsilon == 8.0, name
        texts = replace(BASE, generate=True)
        assert not config.generate and not arms.arm_config(texts, name, 1.0, 7, 20).generate
        assert arms.arm_config(texts, name, 1.0, 7).generate, "a reported run"
    assert [ARMS[name].fields.get("optimizer", "adam") for name in PLAIN] == ["adam", "sgd"] * 2
    plain = arms.arm_config(BASE, "DP-SGD", 1.0, 0)
    assert plain.momentum_beta == 0.9 and plain.averaging == 0.0 and plain.scheme == "none"


def test_steps_of_a_made_up_sweep(swept, tmp_path):
    result = steps.run(CONFIG)
    # each arm at its best rate, which lies inside its own grid
    for found in result.tuned:
        config = arms.arm_config(BASE, found.arm, 1.0, 0)
        assert found.is_inside and found.chosen == pytest.approx(best_rate(config), rel=0.06), (
            found.arm
        )
    # tuned on held-out examples by seeds that are not reported
    tuned_by = [config for config in swept if config.holdout]
    assert {config.seed for config in tuned_by} == {1000, 1001}
    assert {config.holdout for config in tuned_by} == {50}
    reported = [config for config in swept if not config.holdout]
    assert [config.seed for config in reported] == [0, 1, 2] * len(CONFIG.arms)
    assert {config.eval_every for config in swept} == {1}

    # the jump: a running median of 3 has it at the same step
    want = {
        arm: [delay(arms.arm_config(BASE, arm, 1.0, seed)) + seed % 2 for seed in range(3)]
        for arm in CONFIG.arms
    }
    assert result.target() == pytest.approx(0.5 + 0.9 * 0.4)
    found = steps.steps_to(result, 0.9)
    assert {arm: found[i].tolist() for i, arm in enumerate(result.arms)} == want
    np.testing.assert_array_equal(steps.seconds_to(result, 0.9), 2 * found)
    last = {"loss": [1.0] * 3, "accuracy": [0.9] * 3}  # after the jump of every run
    assert result.final == dict.fromkeys(CONFIG.arms, last)

    # DP-Adam 3, 4, 3; DP-SGD 4, 5, 4; noise-free Adam 1, 2, 1; the arms 3, 4, 3 and 8, 9, 8
    for arm, baseline, saved, share in (
        ("mean, optimal, zeroed", "DP-SGD", 1, 0.5 - 1 / 6),
        ("mean, optimal, zeroed", "DP-Adam", 0, 0),
        ("noise-free Adam (NON-PRIVATE)", "DP-Adam", 2, 1),
        ("DP-LoRA", "DP-Adam", -5, -2.5),
    ):
        with case(arm, baseline):
            mean, half = steps.steps_saved(result, arm, baseline, 0.9)
            assert (mean, half) == (saved, 0)
            found, half = steps.gap_share(result, arm, baseline, 0.9)
            assert (found, half) == pytest.approx((share, 0))  # all seeds agree

    artifacts.save_result(result, tmp_path, "steps")
    again = artifacts.load_result(tmp_path, "steps", steps.Result)
    assert steps.table(again) == steps.table(result) and again.tuned == result.tuned
    assert plot_steps(again).axes and result.privacy.startswith("NON-PRIVATE")
    columns, rows = steps.table(result)
    assert {len(row) for row in rows} == {len(columns)}
    row = rows[CONFIG.arms.index("mean, optimal, zeroed")]
    assert row[columns.index("steps to 90% fewer than DP-SGD")] == "+1.0 ± 0.0"
    assert row[columns.index("steps to 90%, by seed")] == "3, 4, 3"
    above = np.mean(result.of(row[0])[:, 1:] - result.of("DP-SGD")[:, 1:], axis=1)
    mean, half = steps.mean_above(result, row[0], "DP-SGD")
    assert mean == pytest.approx(above.mean()) and mean > 0
    assert half == pytest.approx(stats.t.ppf(0.975, 2) * above.std(ddof=1) / math.sqrt(3))
    assert row[columns.index("mean accuracy above DP-SGD")] == f"{mean:+.3f} ± {half:.3f}"
    assert row[columns.index("restoring, share of step time")] == "10.0%"
    assert steps.headline(result)["steps of DP-Adam over those without noise (NON-PRIVATE)"] == (
        "2.50"
    )


def test_differences_are_paired_by_seed(swept):
    result = steps.run(CONFIG)
    score = result.score.copy()
    i = CONFIG.arms.index("DP-LoRA")
    score[i] = result.of("DP-Adam")
    score[i, 0, 2:] = score[i, 1, 8:] = 0.9  # steps 2, never in time, as DP-Adam's
    score[i, 1, :9] = 0.5
    result = replace(result, score=score)
    first = np.array([3.0, 4, 3]) - np.array([2.0, 9, 3])
    interval = stats.t.interval(0.95, 2, first.mean(), stats.sem(first))
    mean, half = steps.steps_saved(result, "DP-LoRA", "DP-Adam", 0.9)
    assert (mean - half, mean + half) == pytest.approx(interval)
    # a run that never reaches the target counts as one step more than it has
    score[i, 1] = 0.5
    assert steps.steps_saved(result, "DP-LoRA", "DP-Adam", 0.9)[0] == pytest.approx((1 - 7) / 3)
    columns, rows = steps.table(result)
    assert "2, not reached, 3" in rows[i]
    # a run that stopped says nothing about a gap
    stopped = score.copy()
    stopped[i, 0] = np.nan
    cells = steps.table(replace(result, score=stopped))[1][i]
    assert cells[columns.index("share of the gap closed of DP-Adam")] == "a run stopped"
    share = result.restore_share.copy()
    share[i] = np.nan
    assert steps.table(replace(result, restore_share=share))[1][i][-1] == "no run"
    # a difference with a run that misses the target is a bound; who misses it sets the direction
    saved = columns.index("steps to 90% fewer than DP-Adam")
    assert rows[i][saved].startswith("≤ -2.0 ±")
    adam = CONFIG.arms.index("DP-Adam")
    late = score.copy()
    late[adam, 2] = 0.5
    assert steps.table(replace(result, score=late))[1][i][saved].startswith("? ")
    late[i] = score[CONFIG.arms.index("mean, optimal, zeroed")]
    late = replace(result, score=late)
    assert steps.table(late)[1][i][saved].startswith("≥ ")
    lines = steps.headline(late)
    assert lines["DP-LoRA: steps fewer than DP-Adam and than DP-SGD"].startswith("≥ ")
    assert lines["steps of DP-Adam over those without noise (NON-PRIVATE)"].startswith("≥ ")


def test_arms_are_faster_beyond_chance_against_both_baselines(swept):
    result = steps.run(CONFIG)
    arm, compared = "mean, optimal, zeroed", len(CONFIG.arms) - len(PLAIN)
    rows = {name: CONFIG.arms.index(name) for name in ("DP-Adam", "DP-SGD", arm)}

    def made_up(**steps_by_arm):
        score = result.score.copy()
        for name, values in steps_by_arm.items():
            score[rows[name.replace("_", "-") if name != "arm" else arm]] = 0.5
            for seed, first in enumerate(values):
                score[rows[name.replace("_", "-") if name != "arm" else arm], seed, first:] = 0.9
        return replace(result, score=score)

    # differences 1, 2, 2: significant alone and not over all arms together
    close = made_up(DP_Adam=(3, 4, 4), DP_SGD=(3, 4, 4), arm=(2, 2, 2))
    difference = np.array([1.0, 2, 2])
    assert stats.ttest_1samp(difference, 0).pvalue > 0.05 / compared
    assert stats.ttest_1samp(difference, 0).pvalue < 0.05 and steps.faster_arms(close) == []
    # the same number of steps less for each of three seeds has a probability of 1/8 by chance
    same = made_up(DP_Adam=(4, 4, 5), DP_SGD=(4, 4, 5), arm=(2, 2, 3))
    assert 1 / 8 > 0.025 / compared and steps.faster_arms(same) == []
    clear = made_up(DP_Adam=(7, 7, 8), DP_SGD=(7, 7, 8), arm=(2, 2, 2))  # differences 5, 5, 6
    assert stats.ttest_1samp([5, 5, 6], 0).pvalue < 0.05 / compared
    assert steps.faster_arms(clear) == [arm]
    assert (
        arm
        in steps.headline(clear)[
            "arms faster than both, at 95% over all arms together (Bonferroni)"
        ]
    )
    one_only = made_up(DP_Adam=(4, 4, 5), DP_SGD=(2, 2, 3), arm=(2, 2, 3))
    slower = made_up(DP_Adam=(2, 2, 3), DP_SGD=(2, 2, 3), arm=(4, 4, 5))
    assert steps.faster_arms(one_only) == steps.faster_arms(slower) == []


def test_baselines_that_learn_nothing_leave_no_target(swept):
    """Without the rule, all arms would be censored, and a difference of 0 would look like a tie."""
    result = steps.run(CONFIG)
    score = result.score.copy()
    score[CONFIG.arms.index("DP-SGD")] = 0.5
    flat = replace(result, score=score)
    columns, rows = steps.table(flat)
    row = rows[CONFIG.arms.index("DP-LoRA")]
    assert row[columns.index("steps to 90% fewer than DP-Adam")] == "no target"
    assert row[columns.index("share of the gap closed of DP-Adam")] == "no target"
    for column in ("steps to 95%, by seed", "seconds to 90%, by seed"):
        assert row[columns.index(column)] == "no target"
    assert "no target" in steps.headline(flat)["DP-LoRA: steps fewer than DP-Adam and than DP-SGD"]


def test_an_arm_without_a_rate_is_named_and_left_out(swept, monkeypatch):
    def stuck(config):
        """A run in which a smaller learning rate of this arm is always better."""
        curve = plain(config)
        if config.scheme == "optimal":
            return [{**e, "accuracy": 0.5 - config.learning_rate * (e["step"] > 0)} for e in curve]
        return curve

    plain = made
    monkeypatch.setitem(globals(), "made", stuck)
    result = steps.run(CONFIG)
    i = CONFIG.arms.index("mean, optimal, zeroed")
    assert any("still at an end of the grid" in line for line in result.failures)
    assert result.tuned[i].chosen is None and np.isnan(result.score[i]).all()
    columns, rows = steps.table(result)
    assert rows[i][1].startswith("none inside") and {len(row) for row in rows} == {len(columns)}
    assert plot_steps(result).axes and steps.headline(result)


def test_a_grid_starts_where_the_experiment_says(swept):
    steps.run(CONFIG)
    first = {c.learning_rate for c in swept[: 6 * len(CONFIG.arms)] if arm_of(c) == "DP-Adam"}
    assert first == {0.00316, 0.01, 0.0316}
    swept.clear()
    steps.run(replace(CONFIG, starts={"DP-Adam": 0.1}))
    moved = {c.learning_rate for c in swept[: 6 * len(CONFIG.arms)] if arm_of(c) == "DP-Adam"}
    assert moved == {0.0562, 0.1, 0.178}
    with pytest.raises(ValueError, match="starts must name arms of the experiment, got 'DP-Adan'"):
        steps.run(replace(CONFIG, starts={"DP-Adan": 0.1}))


def arm_of(config):
    """Name of the plain arm or of the arm with the same fields in CONFIG."""
    for name in CONFIG.arms:
        if arms.arm_config(BASE, name, config.learning_rate, config.seed, config.holdout) == config:
            return name
    raise AssertionError(config)


def test_metrics_of_generated_texts_are_shown_where_they_exist(swept, monkeypatch):
    """BLEU exists after the last step only; a run that stopped is counted, and not left out."""
    assert not any("bleu" in name for name in steps.table(steps.run(CONFIG))[0])

    def with_texts(config):
        *others, last = plain(config)
        return [*others, {**last, "bleu": 20.0 + config.seed} if not config.holdout else last]

    plain = made
    monkeypatch.setitem(globals(), "made", with_texts)
    result = steps.run(CONFIG)
    columns, rows = steps.table(result)
    where = columns.index("final bleu")
    assert columns[where - 1] == "final accuracy" and "final rouge_l" not in columns
    mean, half = 21.0, stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert {row[where] for row in rows} == {f"{mean:.3f} ± {half:.3f}"}
    assert steps.headline(result)["DP-SGD: bleu after the last step"] == f"{mean:.3f} ± {half:.3f}"
    stopped = replace(result, final={**result.final, "DP-LoRA": {"bleu": [20.0, 22.0]}})
    row = steps.table(stopped)[1][CONFIG.arms.index("DP-LoRA")]
    assert row[where] == "1 of 3 runs stopped"


def test_a_classifier_that_is_judged_by_its_loss_shows_its_other_metrics(swept):
    result = steps.run(CONFIG)
    assert "final loss" not in steps.table(result)[0]
    by_loss = replace(result, config=replace(CONFIG, score="loss"))
    columns, rows = steps.table(by_loss)
    assert columns[2:4] == ["final loss", "final accuracy"]
    assert {row[3] for row in rows} == {"0.900 ± 0.000"}  # as in `made`, in every seed


def test_an_arm_whose_runs_all_stop_is_not_said_to_have_a_best_rate():
    found = tuning.tune({"arm": 1.0}, lambda asked: [(math.nan, math.nan) for _ in asked])["arm"]
    assert found.chosen is None and "every run stopped" in found.failure
    assert "best" not in found.failure


def test_every_arm_has_a_result_with_five_seeds():
    """An arm without a result would be an option of which no page can say anything."""
    ran = set()
    for path in PAPER.glob("steps_*.json"):
        result = artifacts.load_result(PAPER, path.stem, steps.Result)
        assert result.config.num_seeds >= 5, path.stem
        ran |= {found.arm for found in result.tuned if found.chosen is not None}
    assert ran == {*ARMS}


def test_a_share_without_an_interval_says_so():
    """MPNet's gap is one step on average, and less than one step without the third seed."""
    result = artifacts.load_result(PAPER, "steps_sst2_mpnet", steps.Result)
    columns, rows = steps.table(result)
    cells = [row[columns.index("share of the gap closed of DP-Adam")] for row in rows]
    assert cells[PLAIN.index("noise-free Adam (NON-PRIVATE)")] == "1.00 (no interval)"
    assert not any("inf" in cell for cell in cells)


def test_saved_results_say_what_must_be_public():
    for path in PAPER.glob("steps_*.json"):
        result = artifacts.load_result(PAPER, path.stem, steps.Result)
        sources = {ARMS[arm].fields.get("precondition", "none") for arm in result.arms}
        public = bool(sources - {"none", "noisy"})
        assert ("text that must be public" in result.privacy) == public, path.stem


def test_frozen_vectors_are_the_only_difference_of_their_control():
    """At power 0 all scales of a preconditioner are 1."""
    moments = {"w": Moment(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 3.0, 9.0]))}
    (scale,) = joint_scales(moments, 0.0).values()
    assert scale.row.tolist() == [1, 1] and scale.col.tolist() == [1, 1, 1]
    control, plain = (
        arms.arm_config(BASE, name, 1.0, 0).chosen()
        for name in ("DP-SGD, vectors frozen", "DP-SGD")
    )
    assert control == plain | {
        "precondition": "generated",
        "precondition_power": 0.0,
        "precondition_freeze_vectors": True,
    }


GAP = gap_configs.Config(
    BASE, epsilons=(0.5, 8.0), batch_sizes=(32, 64), num_seeds=2, tuning_holdout=50
)


def test_the_gap_of_a_made_up_sweep(swept, tmp_path):
    result = gap.run(GAP)
    assert "(epsilon, 1.23457e-05)-DP" in result.privacy  # never below the delta of the runs
    assert result.private.shape == (2, 2, 2, 2, 2, STEPS + 1)
    assert result.ceiling.shape == (2, 2, 2, 2, STEPS + 1)
    assert all(found.is_inside for found in result.tuned) and len(result.tuned) == 24
    # runs without noise are made once for all epsilons
    reported = [config for config in swept if not config.holdout]
    assert sum(config.noise_free for config in reported) == 2 * 2 * 2 * 2
    assert sum(not config.noise_free for config in reported) == 2 * 2 * 2 * 2 * 2
    assert len({json.dumps(config.as_json()) for config in reported}) == len(reported)
    assert {(c.train_layers, c.batch_size) for c in reported} == {
        (layers, size) for layers in (1, None) for size in (32, 64)
    }
    # by seed: DP-SGD 4, 5 and DP-Adam 3, 4, each one more at epsilon 0.5; without noise 2, 3; 1, 2
    private, ceiling = gap.steps_to(result)
    assert private[0, 1, 1].tolist() == [[3, 4], [4, 5]]
    assert private[1, 0, 0].tolist() == [[4, 5], [5, 6]]
    assert ceiling[1, 0, 0].tolist() == [[1, 2], [2, 3]]
    want = {
        "noise, DP-Adam": (4.5 / 1.5, 3.5 / 1.5),
        "noise, DP-SGD": (5.5 / 2.5, 4.5 / 2.5),
        "lost adaptivity": (2.5 / 1.5, 2.5 / 1.5),
        "gap": (4.5 / 1.5, 3.5 / 1.5),
    }
    assert {*result.ratios} == {*want}
    for name, by_epsilon in want.items():
        found = result.ratios[name]
        np.testing.assert_allclose(
            found.value, np.broadcast_to(by_epsilon, (2, 2, 2)), err_msg=name
        )
    np.testing.assert_allclose(result.noise_multiplier, [[2, 1 / 8], [2, 1 / 8]])

    artifacts.save_result(result, tmp_path, "gap")
    again = artifacts.load_result(tmp_path, "gap", gap.Result)
    assert gap.table(again) == gap.table(result) and gap.headline(again) == gap.headline(result)
    columns, rows = gap.table(result)
    assert len(rows) == 8 and {len(row) for row in rows} == {len(columns)}
    row = dict(zip(columns, rows[0], strict=True))
    assert row["setting"] == "last block, B = 32, epsilon 0.5"
    assert row["steps to 90%, DP-SGD"] == "5, 6" and row["steps, ratio: gap"] == "3.00"
    figure = plot_gap(again)
    maps = [axis for axis in figure.axes if axis.images]
    assert len(maps) == 8
    # the first map: rows are epsilons, columns are batch sizes
    np.testing.assert_allclose(
        maps[0].images[0].get_array(), np.log2([[3, 3], [3.5 / 1.5, 3.5 / 1.5]])
    )
    assert "NON-PRIVATE" in figure.get_suptitle()


def test_a_share_of_the_gap_is_marked_as_a_bound(swept):
    result = steps.run(CONFIG)
    column = "share of the gap closed of DP-Adam"

    def cell(*flat):
        score = result.score.copy()
        for name in flat:
            score[CONFIG.arms.index(name), 0] = 0.5  # one seed misses the target
        made_up = replace(result, score=score)
        columns, rows = steps.table(made_up)
        return rows[CONFIG.arms.index("DP-LoRA")][columns.index(column)]

    assert cell().startswith("-2.50 ±")
    assert cell("DP-LoRA").startswith("≤ -")
    assert cell("DP-Adam").startswith("? ")
    assert cell("noise-free SGD (NON-PRIVATE)") == cell()  # the slower ceiling does not matter
    assert cell(*arms.CEILINGS)[:2] in ("? ", "no")


def test_a_setting_without_runs_has_no_ratio(swept):
    """An optimizer without a learning rate does not count as one that misses the target."""
    result = gap.run(GAP)
    ceiling = result.ceiling.copy()
    adam = arms.BASELINES.index("DP-Adam")
    ceiling[0, 0, adam] = np.nan
    private = result.private.copy()
    private[1, 1, 0, adam, 1] = np.nan  # one run that stopped
    missing = replace(result, ceiling=ceiling, private=private)
    noise = missing.ratios["noise, DP-Adam"]
    assert noise.text((0, 0, 0)) == noise.text((1, 1, 0)) == "?"
    assert noise.text((0, 1, 0)) == result.ratios["noise, DP-Adam"].text((0, 1, 0)) != "?"
    assert missing.ratios["gap"].text((0, 0, 0)) == "?"
    columns, rows = gap.table(missing)
    assert rows[0][columns.index(f"steps to 90%, {arms.CEILINGS[0]}")] == "no run, no run"
    assert "last block, B = 32, epsilon 0.5" in gap.headline(missing)["gap not known"]


def test_a_ratio_with_a_run_out_of_reach_is_a_bound():
    inf = math.inf
    found = gap.ratio(
        np.array([[4, 6], [4, inf], [4, 6], [inf, 4]]),
        np.array([[2, 3], [2, 3], [inf, 2], [inf, 2]]),
        9,
    )
    np.testing.assert_allclose(found.value, [2, 14 / 5, 10 / 12, np.nan])
    assert [found.text((i,)) for i in range(4)] == ["2.00", "≥ 2.80", "≤ 0.83", "?"]


def test_a_bound_does_not_settle_whether_a_gap_is_worth_closing(swept):
    result = gap.run(GAP)
    assert gap.headline(result)["gap not known"] == "none"
    private, ceiling = result.private.copy(), result.ceiling.copy()
    place = "last block, B = 32, epsilon 0.5"
    # each noise-free optimizer has a run that misses the target: the ratio is at most 0.75
    ceiling[0, 0, :, 0] = 0.5
    lines = gap.headline(replace(result, ceiling=ceiling))
    assert place not in lines["gap of 1.5 or more (NON-PRIVATE)"]
    assert place not in lines["gap not known"]
    # a DP run that misses the target makes the ratio a lower bound: 1.5 or more stays so
    private[0, 0, 0, :, 0] = 0.5
    assert (
        place in gap.headline(replace(result, private=private))["gap of 1.5 or more (NON-PRIVATE)"]
    )
    # both
    lines = gap.headline(replace(result, private=private, ceiling=ceiling))
    assert place in lines["gap not known"]
    # a seed without a run does not count as a run that missed the target
    private[0, 0, 0, 0, 0] = np.nan
    columns, rows = gap.table(replace(result, private=private))
    assert rows[0][columns.index(f"steps to 90%, {gap.BASELINES[0]}")].startswith("no run, ")
    assert rows[0][columns.index(f"final accuracy, {gap.BASELINES[0]}")] == "1 of 2 runs stopped"
    private[0, 0, 0, 1] = 0.5  # a baseline without a gain leaves no target
    columns, rows = gap.table(replace(result, private=private))
    assert rows[0][2:6] == ["no target"] * 4


def test_bad_configurations_of_both(tmp_path, monkeypatch):
    # a configuration that is accepted fails at once, and not after a sweep
    monkeypatch.setattr(tuning, "tune_by_sweep", lambda *given: pytest.fail("was accepted"))
    for change, words in (
        ({"tuning_seeds": (1000,)}, "two or more different seeds"),
        ({"tuning_seeds": (1000, 1000)}, "two or more different seeds"),
        ({"tuning_seeds": (2, 1000)}, "must not be among the 3 reported seeds"),
        ({"num_seeds": 1}, "num_seeds"),
        ({"tuning_holdout": 0}, "tuning_holdout"),
        ({"score": "acuracy"}, "did you mean 'accuracy'"),
        ({"score": "perplexity"}, r"of generated at every step \(loss, accuracy\), got 'perp"),
        ({"base": replace(BASE, eval_every=2)}, "eval_every must be 1"),
    ):
        for module, config in ((steps, CONFIG), (gap, replace(GAP, num_seeds=3))):
            bad = replace(config, **change)
            with case(change, module.__name__):
                with pytest.raises(ValueError, match=words):
                    module.run(bad, tmp_path)
                with pytest.raises(ValueError, match=words):  # before it measures a step
                    module.plan(bad)
    for change, words in (
        ({"arms": (*PLAIN, "denois")}, "did you mean 'denoise'"),
        ({"arms": PLAIN[:3]}, "got no 'noise-free SGD"),
    ):
        with pytest.raises(ValueError, match=words):
            steps.run(replace(CONFIG, **change), tmp_path)
    with pytest.raises(ValueError, match="did you mean 'last block'"):
        gap.run(replace(GAP, parts=("last blok",)), tmp_path)
    # the first gap is not measured if the second can't be
    for run in (plan_gap.run, plan_gap.plan):
        with pytest.raises(ValueError, match="score must be a metric"):
            run(plan_gap.Config((GAP, replace(GAP, score="matthews"))))
    assert not list(tmp_path.iterdir())


def test_the_score_is_a_metric_that_the_task_has_at_every_step(tmp_path):
    """The wanted metrics are those of ``evaluate`` on the task, or of GLUE's table."""
    own = tmp_path / "own.csv"
    own.write_text("text,label\nfine,0.5\nbad,1.5\n")
    for task, metrics in (
        ("cola", ("loss", "matthews")),  # a named task is not loaded
        ("STS-B", ("loss", "pearson", "spearman")),
        ("mrpc", ("loss", "accuracy", "f1")),
        ("dart-validation", ("loss", "perplexity")),
        (str(own), ("loss", "pearson", "spearman")),
    ):
        base = replace(BASE, task=task, max_examples=None)
        with case(task):
            assert arms.metrics_of_every_step(base) == metrics
            for score in ("accuracy", "bleu", "rouge_l"):
                if score not in metrics:
                    with pytest.raises(ValueError, match=f"every step .*, got '{score}'"):
                        arms.check_runs(base, replace(CONFIG, score=score))
            arms.check_runs(base, replace(CONFIG, score=metrics[-1]))
    for task, model in (("generated", "tiny"), ("generated-table", "tiny-llama")):
        loaded = load_task(task, max_examples=40)
        scores = evaluate(*load_model(model, task=loaded), loaded, max_examples=2)
        assert (*scores,) == arms.metrics_of_every_step(replace(BASE, task=task)), task


def test_a_result_says_how_many_examples_are_scored(swept):
    """The runs score the examples of ``evaluated_rows``, which the count must agree with."""
    assert steps.run(CONFIG).description.startswith("made up; scored on all ")
    assert gap.run(GAP).description == steps.run(CONFIG).description
    tokenizer = load_tokenizer("tiny-llama")
    for most in (7, 10_000):
        base = replace(
            BASE, task="generated-table", eval_examples=most, max_examples=200, data_seed=3
        )
        task = load_task("generated-table", max_examples=200, seed=3)
        scored, _ = evaluated_rows(tokenizer, task, max_examples=most)
        count, everything = len(scored), len(task.validation)
        assert (count < everything) == (most == 7)
        part = "all" if count == everything else f"{count} of"
        sources = len({example.group for example in scored})
        want = f"scored on {part} {everything} evaluation examples from {sources} sources"
        assert arms.scored_on(base) == want and 1 < sources < count


def test_texts_that_have_no_room_are_refused_before_the_tuning(tmp_path, monkeypatch):
    """Tuning runs generate no texts: without the check, the reported runs alone would fail."""
    monkeypatch.setattr(tuning, "tune_by_sweep", lambda *given, **_: pytest.fail("was accepted"))
    for module in (steps, gap):
        monkeypatch.setattr(module, "measure_cost", lambda *given: pytest.fail("was accepted"))
    texts = replace(
        BASE, model="tiny-llama", task="generated-table", generate=True, max_new_tokens=10_000
    )
    for module, config in ((steps, CONFIG), (gap, GAP)):
        bad = replace(config, base=texts, score="loss")
        for call in (module.plan, module.run):
            with case(call), pytest.raises(ValueError, match="max_new_tokens must be <= "):
                call(bad)
    arms.check_texts(replace(texts, max_new_tokens=4))
    arms.check_texts(replace(texts, generate=False))
    arms.check_texts(replace(BASE, generate=True, max_new_tokens=10_000))  # no texts to generate


def test_the_plan_counts_runs_and_hours(monkeypatch):
    seen = []

    def measured(config, folder, workers):
        seen.append((config.batch_size, config.train_layers))
        return cost.Cost(once=0, step=3.0, evaluation=0.6)

    for module in (steps, gap):
        monkeypatch.setattr(module, "measure_cost", measured)
    # 6 arms x (6 rates x 2 seeds + 3) runs x 10 steps x 3.6 s, two at a time
    assert "about 0.5 hours" in steps.plan(replace(CONFIG, num_workers=2))
    assert "about 0.9 hours" in steps.plan(replace(CONFIG, num_workers=1))
    # an arm whose start is known: 4 rates, not 6
    assert len(CONFIG.arms) == 6 and "about 72 tuning runs" in steps.plan(CONFIG)
    known = replace(CONFIG, starts={"DP-Adam": 0.1, "DP-LoRA": 0.1})
    assert "about 64 tuning runs and 18 reported runs" in steps.plan(known)
    seen.clear()
    said = gap.plan(replace(GAP, num_workers=1))
    # 24 settings of 6 x 2 + 2 runs x 10 steps x 3.6 s
    assert "24 settings of about 14 runs" in said and "about 3.4 hours" in said
    assert seen == [(32, 1), (64, 1), (32, None), (64, None)]


def test_the_plan_counts_the_texts_of_the_reported_runs_alone(monkeypatch):
    for module in (steps, gap):
        monkeypatch.setattr(
            module, "measure_cost", lambda *_: cost.Cost(0, step=0, evaluation=0, generation=600)
        )
    said = steps.plan(replace(CONFIG, num_workers=1))
    assert "the texts of a reported run 600 s: about 3.0 hours" in said  # 18 reported runs
    # 24 settings of 2 reported runs
    assert "about 8.0 hours" in gap.plan(replace(GAP, num_workers=1))


def test_the_full_scale_obeys_the_protocol():
    for name in figures.NAMES:
        config = figures.find(name).full
        if isinstance(config, steps_configs.Config | gap_configs.Config):
            arms.check_runs(config.base, config)
            assert config.num_seeds >= 5 and len(config.tuning_seeds) >= 2, name
    maps = [figures.find(name).full for name in figures.NAMES if name.startswith("gap")]
    assert {
        (part, size, one.epsilons) for one in maps for part in one.parts for size in one.batch_sizes
    } == {
        ("last block", 256, (0.5, 1.0, 3.0, 8.0)),
        ("last block", 1024, (0.5, 1.0, 3.0, 8.0)),
        ("all", 256, (1.0, 8.0)),
    }


# settings in which evaluating the whole validation split would take longer than a step
FEWER = (
    "steps_cola_mpnet",
    "steps_e2e",
    "steps_e2e_arms",
    "steps_smollm2",
    "steps_dart",
    "steps_gemma",
)


@needs_data
def test_every_validation_example_counts():
    for name in figures.NAMES:
        config = figures.find(name).full
        if isinstance(config, steps_configs.Config | gap_configs.Config) and name not in FEWER:
            assert config.base.eval_examples >= len(load_task(config.base.task).validation), name


def test_the_gap_and_the_arms_share_their_plain_runs():
    of_sst2 = gap_configs.SST2
    for found, part, size, epsilon, config in (
        (of_sst2, "last block", 1024, 8.0, steps_configs.SST2),
        (of_sst2, "last block", 256, 1.0, steps_configs.SST2_GAP),
        (gap_configs.SST2_ALL_LAYERS, "all", 256, 8.0, steps_configs.SST2_ALL),
        (gap_configs.E2E, "all", 512, 8.0, steps_configs.E2E),
    ):
        assert (config.tuning_seeds, config.tuning_holdout, config.score) == (
            *(found.tuning_seeds, found.tuning_holdout),
            found.score,
        )
        for arm in PLAIN:
            of_gap = gap.Setting(part, size, arm, None if "NON-PRIVATE" in arm else epsilon)
            for run in ((0.1, 0, 0), (0.1, 1000, found.tuning_holdout)):
                wanted = arms.arm_config(config.base, arm, *run)
                assert gap.setting_config(found, of_gap, *run) == wanted, (part, arm)


def chosen_rates_at_an_end(document):
    """Grids of a saved result whose chosen rate is at an end, or far from its neighbours."""
    for found in document["tuned"]:
        grid = tuning.Tuned(
            found["arm"], tuple(found["rates"]), (), found["chosen"], found["failure"]
        )
        if not grid.is_inside and not (
            grid.chosen is None and grid.failure in document["failures"]
        ):
            yield found["arm"]


def test_no_artifact_has_a_rate_at_the_end_of_its_grid():
    for path in sorted(PAPER.glob("*.json")):
        document = json.loads(path.read_text())
        if "tuned" in document:
            assert not [*chosen_rates_at_an_end(document)], path.name


def test_the_check_of_artifacts_sees_an_end():
    good = {"arm": "a", "rates": [1.0, 1.78, 3.16], "chosen": 1.78, "failure": ""}
    for change, bad in (
        ({}, False),
        ({"chosen": 1.0}, True),
        ({"chosen": 3.16}, True),
        ({"rates": [0.1, 1.78, 3.16]}, True),
        ({"chosen": None, "failure": "at an end"}, False),
        ({"chosen": None, "failure": "not said"}, True),
    ):
        with case(change):
            document = {"tuned": [{**good, **change}], "failures": ["at an end"]}
            assert bool([*chosen_rates_at_an_end(document)]) == bad


TINY = {"num_workers": 1, "tuning_holdout": 40, "num_seeds": 2}
SHORT = replace(BASE, steps=2, eval_examples=30, max_examples=150)


@pytest.mark.slow
def test_real_small_sweeps(tmp_path, monkeypatch, in_this_process):
    """Train the gap, and then the arms, which reuse the plain runs of the gap.

    Each grid has one rate. Tests with made-up sweeps show how grids grow.
    """
    monkeypatch.setattr(tuning, "COARSE", 0)
    monkeypatch.setattr(tuning, "next_places", lambda *_: [])
    found = gap.run(
        gap_configs.Config(SHORT, epsilons=(8.0,), batch_sizes=(64,), parts=("all",), **TINY),
        tmp_path,
    )
    runs = {path.name for path in tmp_path.iterdir()}
    assert np.isfinite(found.private).all() and np.isfinite(found.ceiling).all()
    assert (found.private[..., 0] == found.ceiling[:, :, None, :, :, 0]).all()  # untrained
    assert (found.private != found.ceiling[:, :, None]).any()
    result = steps.run(steps_configs.Config(SHORT, (*PLAIN, "denoise"), **TINY), tmp_path)
    assert runs <= {path.name for path in tmp_path.iterdir()}
    np.testing.assert_array_equal(result.score[:2, :, :], found.private[0, 0, 0])
    np.testing.assert_array_equal(result.score[2:4], found.ceiling[0, 0])
    assert plot_gap(found).axes and plot_steps(result).axes
    assert result.privacy.count("NON-PRIVATE") == 3 and "-DP after 2 steps" in result.privacy


@pytest.mark.parametrize("texts", [False, True])
def test_the_cost_is_that_of_the_second_run(monkeypatch, tmp_path, texts):
    """The test moves the clock: 5 s of loading, 2 s per evaluation, 3 s per step, 8 s for members.

    The first run takes ten times as long, and is not counted. Texts take 40 s, and are generated
    by the second run, if at all.
    """
    clock, caches = [0.0], []

    def train(config, folder, *, on_start, on_evaluation, **options):
        slow = 1 if caches else 10
        caches.append((config.prefix_cache, options["prefix_shared_by"] > 1))
        clock[0] += 5 * slow
        rows = SimpleNamespace(task=SimpleNamespace(validation=range(20)), rows=range(900))
        on_start(rows, 1)
        assert (config.steps, config.seed, config.eval_every) == (1, 0, 1)
        assert config.generate == (texts and slow == 1)
        clock[0] += 2 * slow
        on_evaluation(rows, {})
        clock[0] += (3 + 2 + 40 * config.generate) * slow
        on_evaluation(rows, {})
        clock[0] += 8 * slow
        return SimpleNamespace(seconds=3.0 * slow)

    monkeypatch.setattr(cost, "train", train)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    config = replace(BASE, eval_examples=80, generate=texts)
    found = cost.measure_cost(config, tmp_path, 1)
    # once per run: loading, the evaluation before the first step, and the members
    assert (found.once, found.step, found.evaluation) == pytest.approx((5 + 2 + 8, 3, 2))
    assert found.generation == pytest.approx(40 * texts)
    assert caches == [(str(tmp_path / PREFIX_FOLDER), True)] * 2


@pytest.mark.slow
def test_a_measured_step_costs_something(tmp_path):
    found = cost.measure_cost(SHORT, tmp_path, 1)
    assert found.once > 0 and found.step > 0 and found.evaluation > 0
    assert found.hours(2, 10) == pytest.approx(
        2 * (found.once + 10 * (found.step + found.evaluation)) / 3600
    )
