"""Experiments on LoRA's noise: tiny configs run, reload and plot, and their numbers are right."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from matplotlib.figure import Figure

from lowrank_dp import artifacts, figures, theory
from lowrank_dp.experiments import (
    dynamics,
    gradients,
    lora_noise,
    matrix_attack,
    noisy_projection,
    noisy_sgd,
    projection_privacy,
    total_variation,
    vector_privacy,
)
from lowrank_dp.experiments.gradients import GradientConfig
from lowrank_dp.mechanism import NO_RECORDS, NON_PRIVATE
from lowrank_dp.models import tiny

TINY = GradientConfig(model="tiny", task="generated", warm_loss=None, max_length=32)
CONFIGS = {
    "lora_noise": (
        lora_noise,
        replace(
            lora_noise.SMALL,
            gradients=TINY,
            batch_size=8,
            ranks=(1, 8),
            num_draws=60,
            vector_size=32,
            vector_draws=400,
            more_models=("no-such-model",),
        ),
    ),
    "total_variation": (
        total_variation,
        replace(total_variation.SMALL, ranks=(1, 8), widths=(2, 4096), joint_ranks=(4, 256)),
    ),
    "projection_privacy": (
        projection_privacy,
        replace(
            projection_privacy.SMALL,
            gradients=TINY,
            epsilons=(0.0, 1.0),
            num_trials=150,
            rank_grid=(1, 16, 256),
            widths=(768,),
            batch_size=8,
        ),
    ),
    "vector_privacy": (
        vector_privacy,
        replace(
            vector_privacy.SMALL,
            gradients=TINY,
            ranks=(4, 16),
            angles=(0.003, 0.03, 0.3),
            composed_angles=(0.01,),
            steps=(1, 4),
            batch_sizes=(4, 8),
            num_examples=2,
            num_layers=2,
        ),
    ),
    "dynamics": (
        dynamics,
        replace(dynamics.SMALL, gradients=TINY, ranks=(2, 16), num_seeds=2, num_steps=6),
    ),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results():
    return {name: module.run(config) for name, (module, config) in CONFIGS.items()}


def test_results_reload_and_plot(results, tmp_path):
    for name, (module, _) in CONFIGS.items():
        artifacts.save_result(results[name], tmp_path, name)
        loaded = artifacts.load_result(tmp_path, name, module.Result)
        assert loaded.config == results[name].config, name
        for key, value in vars(results[name]).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(getattr(loaded, key), value, err_msg=name)
        assert isinstance(figures.find(name).plot(loaded), Figure), name
        assert module.headline(loaded) == module.headline(results[name]), name
        assert "2409.17538" in module.CAPTION, name
        expected = NO_RECORDS if name == "total_variation" else NON_PRIVATE
        assert loaded.privacy == expected, name


def test_measured_noise_agrees_with_the_formula(results):
    result = results["lora_noise"]
    # 95 % half-widths doubled: 4 sources x 2 ranks at 1e-4 each
    gap = np.abs(result.variance - result.variance_exact)
    assert (gap < 2 * result.variance_ci).all()
    gap = np.abs(result.one_hot_variance - result.one_hot_variance_exact)
    assert (gap < 2 * result.one_hot_variance_ci).all()
    np.testing.assert_allclose(result.one_hot_variance_exact, [[2, 2 / 8], [0.8, 0.8 / 8]])
    step = np.diff(result.density_x)[0]
    np.testing.assert_allclose(result.density[1:].sum(axis=1) * step, 1, atol=5e-3)


@pytest.fixture
def gpt2(tmp_path):
    """Folder of a small GPT-2, whose layers store their weights as (in, out)."""
    config = transformers.GPT2Config(
        vocab_size=1024, n_embd=32, n_layer=1, n_head=2, n_positions=64, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer = tiny.tokenizer("tiny-llama")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


def test_rows_of_gpt2_are_as_long_as_the_inputs_of_their_layer(gpt2):
    config = replace(
        CONFIGS["lora_noise"][1],
        gradients=replace(TINY, model=gpt2),
        ranks=(4,),
        num_layers=4,
        num_draws=2,
        vector_draws=2,
        more_models=(),
    )
    found = {
        source.split()[-2]: source.split()[-1] for source in lora_noise.run(config).sources[1:]
    }
    assert found == {  # (out, in) in the names of GPT-2
        "0.attn.c_attn": "96x32",
        "0.attn.c_proj": "32x32",
        "0.c_fc": "128x32",
        "0.c_proj": "32x128",
    }


def test_every_experiment_reads_rows_of_gpt2_along_the_inputs(gpt2, monkeypatch):
    source = gradients.prepare(replace(TINY, model=gpt2))
    name = "transformer.h.0.attn.c_attn.weight"  # 32 inputs, 96 outputs
    shapes = []
    for module in (projection_privacy, matrix_attack, noisy_projection, vector_privacy):
        monkeypatch.setattr(module, "spread_layers", lambda *_: [name])
    generator = torch.Generator().manual_seed(0)
    _, rest, own = projection_privacy._real_pair(
        source, replace(projection_privacy.SMALL, batch_size=4, rows=(2,)), generator
    )
    assert rest.shape == own.shape == (2, 32)
    _, shape, matrix, records = matrix_attack.real_rows(
        source, replace(matrix_attack.SMALL, batch_size=4, num_trials=1, rows=(2,)), generator
    )
    assert shape == (96, 32) and matrix.shape == (2, 32) and records.shape == (2, 2, 32)
    config = replace(noisy_projection.SMALL, batch_size=2, num_trials=1, ranks=(4,))
    _, total, records, _ = noisy_projection.clipped_layer(source, config, generator)
    assert total.shape == (96, 32) and records.shape == (2, 96, 32)
    monkeypatch.setattr(
        vector_privacy,
        "_row_changes",
        lambda a, b: (shapes.append((a.shape, b.shape)), np.ones((2, 3)))[1],
    )
    vector_privacy._measured(replace(vector_privacy.SMALL, num_examples=1), source, [2, 4])
    assert {*shapes} == {((96, 32), (96, 32))}


def test_the_noise_of_gpt2s_gradients_is_that_of_their_inputs(gpt2, monkeypatch):
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
    layers = ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj"]  # 32 and 128 inputs
    ids = torch.arange(12).view(2, 6)
    seen = []

    def noise(gradient, rank, arm, *, generator):
        seen.append(tuple(gradient.shape))
        return torch.zeros_like(gradient)

    monkeypatch.setattr(noisy_sgd.lora, "implicit_noise", noise)
    before = [model.get_submodule(name).weight.clone() for name in layers]
    arm = noisy_sgd.NOISE_KINDS[0]
    list(noisy_sgd.sgd(model, [{"input_ids": ids, "labels": ids}], 0.1, layers, arm))
    assert seen == [(96, 32), (32, 128)]
    for name, weight in zip(layers, before, strict=True):
        assert torch.equal(model.get_submodule(name).weight, weight), "the gradient is now 0"
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    norms = [float(model.get_submodule(name).weight.grad.square().sum()) for name in layers]
    expected = (33 * norms[0] + 129 * norms[1]) / sum(norms)
    assert noisy_sgd.noise_to_gradient(model, layers) == pytest.approx(expected)


def test_a_model_that_is_missing_is_left_out_and_named(results):
    assert len(results["lora_noise"].skipped) == 1
    assert "no-such-model" in results["lora_noise"].skipped[0]
    assert "no-such-model" in lora_noise.headline(results["lora_noise"])["models left out"]


def test_the_first_noise_level_of_the_projection_attack_is_zero():
    """The results without noise are read at the first level."""
    for levels in ((0.1, 1.0), ()):
        config = replace(projection_privacy.SMALL, noise_levels=levels)
        with pytest.raises(ValueError, match="noise_levels must be a sequence that begins with 0"):
            projection_privacy.run(config, SimpleNamespace())


def test_total_variation_lies_between_its_bounds_and_does_not_vanish_with_width(results):
    result = results["total_variation"]
    assert (result.lower <= result.exact).all() and (result.exact <= result.upper).all()
    np.testing.assert_allclose(
        result.by_width_exact[:, -1],
        theory.tv_exact(np.array(result.config.fixed_ranks), 10**6),
        rtol=0.2,
    )
    assert np.nanmax(np.abs(result.joint[1] - result.joint_limit)) < 0.01


def test_two_rows_give_the_candidate_away_and_one_does_not(results):
    result = results["projection_privacy"]
    assert result.auc[1, 0, 0] > 0.99 and result.auc[2, 0, 0] > 0.99
    assert result.real_auc[1, 0, 0] > 0.99
    assert result.auc[0, 0, 1] < 0.605 < result.auc[0, 0, 2]  # the exact test's AUC
    assert np.isnan(result.auc[0, 1:]).all()
    assert (result.profile >= result.profile_gaussian)[:3].all()  # rank << n
    assert result.by_rank[0, 1] < min(result.by_rank[0, [0, 2]])  # not monotone in the rank


def test_angles_of_one_example_against_a_plain_loop(results):
    result = results["vector_privacy"]
    source = gradients.prepare(TINY)
    chosen = source.sample(8, torch.Generator().manual_seed(TINY.seed + 1))
    alone = [source.clean_sum([i]) for i in chosen]
    for i, name in enumerate(result.layers):
        for j, size in enumerate((4, 8)):
            angles, ratios = [], []
            for left_out in range(2):
                kept = [k for k in range(size) if k != left_out]
                whole = sum(alone[k][name] for k in range(size)).double()
                other = sum(alone[k][name] for k in kept).double()
                for q, p in zip(whole, other, strict=True):
                    if q.norm() > 0 and p.norm() > 0:
                        angles.append(
                            float(torch.arccos((q @ p / q.norm() / p.norm()).clip(-1, 1)))
                        )
                        ratios.append(abs(float((p.norm() / q.norm()).log())))
            for found, values in ((result.angle, angles), (result.log_ratio, ratios)):
                want = [np.median(values), np.quantile(values, 0.95), max(values)]
                np.testing.assert_allclose(found[i, j], want, rtol=2e-2, atol=2e-3)
    # one example matters less in the larger batch
    assert (result.angle[:, 1, 0] < result.angle[:, 0, 0]).all()


def test_the_exact_law_is_stronger_than_the_theorem_and_weaker_than_the_reading(results):
    result = results["vector_privacy"]
    known = np.isfinite(result.hu_epsilon)
    assert known.any() and (result.exact_epsilon < result.hu_epsilon)[known].all()
    assert (result.exact_delta > result.gaussian_delta).all()
    assert (np.diff(result.exact_delta) > 0).all() and (np.diff(result.composed) > 0).all()
    assert vector_privacy.headline(result)["exact delta at the theorem's epsilon is smaller"] == (
        "always"
    )


def test_every_arm_starts_like_full_fine_tuning_and_ends_elsewhere(results):
    result = results["dynamics"]
    start = np.broadcast_to(result.reference_loss[:, 0], result.loss[..., 0].shape)
    np.testing.assert_allclose(result.loss[..., 0], start, rtol=1e-5)
    assert (result.distance[..., 0] == 0).all() and (result.distance[..., 1:] > 0).all()
    # a frozen and a trained A take the same first step: B = 0 leaves A's gradient at zero
    np.testing.assert_allclose(result.distance[0, ..., 1], result.distance[1, ..., 1], rtol=1e-4)
    assert not np.allclose(result.distance[0, ..., -1], result.distance[1, ..., -1], rtol=1e-6)
    first = np.sqrt((dynamics.relative_distance(result)[..., 0] ** 2).mean(axis=(0, 2)))
    np.testing.assert_allclose(first, result.one_step_distance, rtol=0.35)


def test_a_frozen_a_bounds_the_rank_of_the_update_and_fresh_noise_does_not(results):
    result = results["dynamics"]  # ranks 2 and 16, 6 steps, measured after steps 1, 2, 4 and 6
    assert dynamics.rank_steps(6) == [1, 2, 4, 6] and dynamics.rank_steps(1) == [1]
    trained, frozen, fresh, gaussian = result.update_rank[:, 0]  # each (seeds, steps)
    assert (frozen <= 2).all() and (trained <= 2).all()
    assert (result.update_rank[1] <= np.array([2, 16])[:, None, None]).all()
    np.testing.assert_array_equal(fresh, np.tile([2, 4, 8, 12], (2, 1)))  # two more per step
    assert (gaussian > 0.9 * min(result.shape)).all()


def test_the_paired_ratio_is_of_one_seed_and_its_expectation_of_the_full_gradients(results):
    result = results["dynamics"]
    _, frozen, fresh, _ = result.distance
    np.testing.assert_allclose(
        dynamics.paired_ratio(result)[1, 0, 3], frozen[1, 0, 4] / fresh[1, 0, 4]
    )
    expected = dynamics.expected_ratio(result)
    np.testing.assert_allclose(expected[:, 0], 1, rtol=1e-6)  # one step
    assert (expected <= np.sqrt(np.arange(1, 7)) * (1 + 1e-6)).all()
    rows = dynamics.headline(result)
    assert "1.00 (" not in rows["frozen A's distance over fresh A's, paired, all ranks"]
    assert rows[f"rank of a {result.shape[0]} x {result.shape[1]} update, rank 2"].startswith(
        "lora 2, lora-frozen-a 2, fresh-a 12"
    )


def test_dynamics_leave_the_global_generator_alone_and_repeat():
    config = replace(CONFIGS["dynamics"][1], ranks=(2,), num_steps=2)
    state = torch.random.get_rng_state()
    first, again = dynamics.run(config), dynamics.run(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(first.distance, again.distance)


def test_bad_dynamics_config_is_one_error():
    for changes, message in (
        ({"num_steps": 10**6}, "num_steps"),
        ({"num_seeds": 1}, "num_seeds"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"ranks": (0,)}, "rank"),
    ):
        with pytest.raises(ValueError, match=message):
            dynamics.run(replace(CONFIGS["dynamics"][1], **changes))
            pytest.fail(f"{changes} was accepted")
