"""The gradient experiments on the embedded default, their artifacts and figures."""

import dataclasses
import re

import numpy as np
import pytest
import torch
import transformers

from lowrank_dp import artifacts, figures
from lowrank_dp.data import collate
from lowrank_dp.experiments import (
    ablation,
    alignment,
    gradients,
    momentum,
    scheme_scores,
    spectra,
    tasks,
)
from lowrank_dp.figures import restoration
from lowrank_dp.grads.clipping import clipped_sum
from lowrank_dp.models import matrix_parameters
from lowrank_dp.restore import restore
from tests.refusals import refused

pytestmark = pytest.mark.slow
GRADIENTS = gradients.GradientConfig(
    model="tiny", task="generated", warm_loss=0.66, max_warm_steps=300, warm_learning_rate=1e-3
)


@pytest.fixture(scope="module")
def source():
    return gradients.prepare(GRADIENTS)


def test_the_warm_up_reaches_its_loss_and_leaves_eval_mode(source):
    assert source.loss <= 0.66 and 1 < source.warm_steps < 300
    assert not source.model.training
    cold = gradients.prepare(dataclasses.replace(GRADIENTS, warm_loss=None))
    assert cold.warm_steps == 0 and 0.6 < cold.loss < 1.2  # near log 2: nothing is learned


def test_a_warm_up_says_what_it_will_do_and_where_it_ended():
    for loss, steps, last in (
        (1e-3, 2, "the loss is .* after 2 steps, above 0.001$"),
        (9.0, 5, ""),
    ):
        found = gradients.load_source(
            dataclasses.replace(GRADIENTS, warm_loss=loss, max_warm_steps=steps)
        )
        said = []
        _, done = gradients.warm_up(found, said.append)
        assert said[0].startswith(f"warm-up without privacy: up to {steps} steps of 32 examples")
        assert "the first step took" in said[1] and len(said) == 2 + bool(last)
        assert done == (2 if last else 1) and re.search(last, said[-1])


@pytest.mark.parametrize(
    ("model", "task", "examples"),
    [("tiny", "generated", 512), ("tiny-llama", "generated-table", 64)],
)
def test_the_loss_before_training_is_over_fewer_examples_of_many_targets(
    model, task, examples, monkeypatch
):
    monkeypatch.setattr(gradients.time, "monotonic", lambda: 0.0)  # so that no line states a time
    found = gradients.load_source(
        gradients.GradientConfig(model=model, task=task, warm_loss=None, max_length=64)
    )
    said = []
    loss, steps = gradients.warm_up(found, said.append)
    assert len(found.rows) > 512 and steps == 0
    assert said == [f"loss before any training: the mean over {examples} examples"]
    drawn = found.sample(examples, torch.Generator().manual_seed(0))
    assert loss == pytest.approx(gradients.mean_loss(found, drawn), rel=1e-6)


def test_a_long_mean_loss_states_its_time_after_the_first_batch(monkeypatch):
    """A batch takes 90 s by the clock of the test; 3 batches take 4.5 minutes."""
    found = gradients.load_source(dataclasses.replace(GRADIENTS, micro_batch_size=16))
    now, losses = [0.0], gradients.row_losses
    monkeypatch.setattr(gradients.time, "monotonic", lambda: now[0])
    for seconds, lines in (
        (90, ["loss: the first of 3 batches shows that all take 4.5 minutes"]),
        (9, []),
    ):

        def later(*args, seconds=seconds):
            now[0] += seconds
            return losses(*args)

        monkeypatch.setattr(gradients, "row_losses", later)
        said = []
        gradients.mean_loss(found, range(40), said.append)
        assert said == lines


def test_the_mean_loss_does_not_depend_on_the_micro_batches():
    config = gradients.GradientConfig(
        model="tiny-llama", task="generated-table", warm_loss=None, micro_batch_size=7
    )
    found = gradients.load_source(config)
    one = dataclasses.replace(found, config=dataclasses.replace(config, micro_batch_size=1))
    assert gradients.mean_loss(found, range(20)) == pytest.approx(
        gradients.mean_loss(one, range(20)), rel=1e-6
    )


def test_clean_sum_does_not_depend_on_the_micro_batches(source):
    indices = list(range(40))
    total = source.clean_sum(indices)
    batch = collate([source.rows[i] for i in indices], source.pad_token_id)
    whole, norms = clipped_sum(source.model, batch, 1.0, backend="loop")
    assert len(norms) == 40 and set(total) == set(source.matrices)
    for name, matrix in total.items():
        torch.testing.assert_close(matrix, whole[name], rtol=1e-4, atol=1e-5)


def test_prepare_refuses_a_batch_larger_than_the_data_before_any_work():
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1 and <= 4000"):
        gradients.prepare(GRADIENTS, 4001)


def test_noise_has_the_stated_deviation_and_seed(source):
    clean = source.clean_sum(range(8))
    once, again = (gradients.add_noise(clean, 0.5, 3) for _ in range(2))
    other = gradients.add_noise(clean, 0.5, 4)
    noise = torch.cat([(once[n] - clean[n]).flatten() for n in clean]).double()
    # about 70,000 entries: 2% is more than six standard errors of 0.3%
    assert noise.std().item() == pytest.approx(0.5, rel=0.02)
    assert all(torch.equal(once[n], again[n]) for n in clean)
    assert not any(torch.equal(once[n], other[n]) for n in clean)


def test_measured_layers_are_never_of_a_head():
    shape = dict(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=20,  # a classifier that is as large as a layer
    )
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**shape))
    roberta = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**shape))
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    for model, head in (
        (bert, {"classifier.weight"}),
        (roberta, {"classifier.dense.weight", "classifier.out_proj.weight"}),
        (llama, {"lm_head.weight"}),
    ):
        matrices = {name: model.get_parameter(name) for name in matrix_parameters(model)}
        assert head <= matrices.keys()
        found = gradients.spread_layers(model, matrices, 99)
        assert all(".layer" in name or "pooler" in name for name in found), found
        inner = {matrices[name].shape for name in matrices.keys() - head}
        assert {matrices[name].shape for name in found} == inner and len(found) == len(inner)
        heads = {name: matrices[name] for name in head}
        refused("beside its head", gradients.spread_layers, model, heads, 1)


def test_spectra(source, tmp_path):
    config = spectra.Config(GRADIENTS, batch_size=256, noise_multiplier=0.5)
    result = spectra.run(config, source)
    assert result.privacy.startswith("NON-PRIVATE")
    m, n = result.shapes[0]
    assert result.edges[0] == pytest.approx(0.5 * (np.sqrt(m) + np.sqrt(n)))
    top = result.noisy[:, 0] > result.clean[:, 0] - 0.5 * 3  # less by at most 3 noise levels
    assert top.all()
    assert (result.effective_rank_noisy[:-1] > result.effective_rank_clean[:-1]).all()
    kept = np.array([action == "kept" for action in result.actions])
    np.testing.assert_allclose(result.alignment_restored[kept], result.alignment_noisy[kept])
    assert result.alignment_restored.mean() > 1.2 * result.alignment_noisy.mean()
    clean = source.nested_sums([256])[256]
    noisy = gradients.add_noise(clean, 0.5, GRADIENTS.seed)
    for i, name in enumerate(result.layers):
        made, size = restore(noisy[name], 0.5, method="exact"), min(clean[name].shape)
        cosine = torch.nn.functional.cosine_similarity(made.flatten(), clean[name].flatten(), dim=0)
        assert result.alignment_restored[i] == pytest.approx(float(cosine), abs=1e-5), name
        values = torch.linalg.svdvals(made).numpy()
        np.testing.assert_allclose(result.restored[i, :size], values, atol=1e-4 * values[0])
    artifacts.save_result(result, tmp_path, "spectra")
    again = artifacts.load_result(tmp_path, "spectra", spectra.Result)
    assert again.config == config and again.layers == result.layers
    np.testing.assert_array_equal(again.noisy, result.noisy)


def test_one_decomposition_measures_what_restoring_makes(source):
    """The values of one decomposition equal those of restored matrices, for every scheme."""
    batch = source.nested_sums([128])[128]
    schemes = {**alignment.SCHEMES, **ablation.VARIANTS}
    for noise_std in (0.3, 2.0):  # most layers above the edge, none above it
        noisy = gradients.add_noise(batch, noise_std, 3)
        for name, clean in batch.items():
            truth, x = clean.double().numpy(), noisy[name]
            u, _, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
            values = {
                "profile": torch.linalg.svdvals(clean.double()),
                "weights": torch.from_numpy(((u.T @ truth) * vh).sum(1)),
            }
            products, acted = scheme_scores.measure_schemes(
                x, clean, noise_std, schemes.values(), values["profile"].float()
            )
            for (scheme, options), product, did in zip(
                schemes.values(), products, acted, strict=True
            ):
                if scheme == "oracle":
                    options = {"values": values[options["values"]]}
                made = restore(x.double(), noise_std, scheme, method="exact", **options).numpy()
                expected = (
                    (made * truth).sum() / np.linalg.norm(made) / np.linalg.norm(truth)
                    if made.any()
                    else 0.0
                )
                assert scheme_scores.cosine(product) == pytest.approx(expected, abs=1e-4)
                assert scheme_scores.distance(product) == pytest.approx(
                    np.linalg.norm(made - truth) / np.linalg.norm(truth), rel=1e-4, abs=1e-4
                )
                assert did == (made.any() and not np.allclose(made, x.double().numpy()))


def test_clean_sums_are_taken_once_and_nest(source, monkeypatch):
    fresh = dataclasses.replace(source, sums={})
    chosen = source.sample(1100, torch.Generator().manual_seed(GRADIENTS.seed + 1))
    taken, said, real = [], [], gradients.GradientSource._clean_sum

    def counted(self, batches, *check_rows):
        batches = list(batches)
        taken.append(sum(len(batch["input_ids"]) for batch in batches))
        return real(self, batches, *check_rows)

    with monkeypatch.context() as patch:
        patch.setattr(gradients.GradientSource, "_clean_sum", counted)
        first = fresh.nested_sums([1100, 512], said.append)
        again = fresh.nested_sums([1024, 1100])
    assert taken == [512, 512, 76, 512] and list(again) == [1024, 1100]
    (line,) = said  # before the sums are there
    count = 2 * -(-512 // GRADIENTS.micro_batch_size) + -(-76 // GRADIENTS.micro_batch_size)
    assert line.startswith(f"gradients: the first of {count} micro-batches took "), line
    for size, sums in {**first, **again}.items():
        for name, matrix in source.clean_sum(chosen[:size]).items():
            torch.testing.assert_close(sums[name], matrix, rtol=1e-4, atol=1e-4)

    def broken(self, batches, *check_rows):
        raise KeyboardInterrupt

    fresh = dataclasses.replace(source, sums={512: first[512]})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gradients.GradientSource, "_clean_sum", broken)
        fresh.nested_sums([1100])
    assert list(fresh.sums) == [512]  # no sum of a part


def test_alignment_orders_the_schemes(source):
    config = alignment.Config(
        GRADIENTS, batch_sizes=(128, 512), noise_multipliers=(0.5, 1.5), noise_seeds=2
    )
    result = alignment.run(config, source)
    assert result.alignment.shape == (3, len(alignment.SCHEMES), 2, len(source.matrices))
    by = dict(zip(result.schemes, result.alignment.mean((2, 3)).T, strict=True))
    assert (by["oracle weights"] >= by["optimal"] - 1e-6).all()  # no scheme is above the ceiling
    assert (by["optimal"] > by["noisy"]).all()
    np.testing.assert_array_less(by["noisy"][[0, 2]], by["noisy"][1])  # more data, less noise
    np.testing.assert_array_less(
        result.error[:, result.schemes.index("optimal")],
        result.error[:, result.schemes.index("noisy")],
    )
    columns, rows = alignment.table(result)
    size, sigma, scheme, aligned, error = rows[-1]
    assert (size, sigma, scheme) == ("512", "1.5", "oracle weights") and len(columns) == 5
    for text, two in ((aligned, result.alignment[2, -1].mean(-1)), (error, result.error[2, -1])):
        middle, half = map(float, text.split(" ± "))
        assert middle == pytest.approx(two.mean(), abs=5.1e-4)
        # t with one degree of freedom: tan(0.475 pi) times half the distance of two draws
        assert half == pytest.approx(12.7062 * abs(two[0] - two[1]) / 2, abs=5.1e-4)
    with pytest.raises(ValueError, match="noise_seeds must be an integer >= 2"):
        alignment.run(dataclasses.replace(config, noise_seeds=1), source)


def by_svd(noisy, std, kappa=1.0, threshold=None, correct=False, keep=False):
    """Restore by denoise, optimal or (with ``threshold``) hard, by the formulas as written."""
    u, s, vt = np.linalg.svd(noisy, full_matrices=False)
    m, n = sorted(noisy.shape)
    b, y = m / n, s / (std * np.sqrt(n))
    if s[0] <= kappa * std * (np.sqrt(m) + np.sqrt(n)):
        return noisy if keep else np.zeros_like(noisy)
    inner = np.maximum((y**2 - b - 1) ** 2 - 4 * b, 0.0)
    new = np.where(y > 1 + np.sqrt(b), np.sqrt(inner) / y * std * np.sqrt(n), 0.0)
    if threshold:
        new = np.where(s > threshold * (std * (np.sqrt(m) + np.sqrt(n))), s, 0.0)
    made = (u * new) @ vt
    return made * np.linalg.norm(noisy) / np.linalg.norm(made) if correct else made


def test_ablation_agrees_with_the_formulas(source, tmp_path):
    config = ablation.Config(
        GRADIENTS,
        batch_sizes=(512, 96),
        noise_multiplier=0.5,
        kappas=(1.0, 1.5, 1e6),
        noise_seeds=2,
    )
    result = ablation.run(config, source)
    assert result.privacy.startswith("NON-PRIVATE")
    assert result.alignment.shape == (2, len(ablation.VARIANTS) + 6, 2)
    wanted = {
        "noisy": lambda x: x,
        "optimal, zeroed": lambda x: by_svd(x, 0.5),
        "optimal": lambda x: by_svd(x, 0.5, keep=True),
        "hard(edge), zeroed": lambda x: by_svd(x, 0.5, threshold=1.0),
        "denoise, zeroed": lambda x: by_svd(x, 0.5, correct=True),
        "denoise, kappa 1.5, norm correction on": lambda x: by_svd(
            x, 0.5, kappa=1.5, correct=True, keep=True
        ),
        "denoise, kappa 1.5, norm correction off": lambda x: by_svd(x, 0.5, kappa=1.5, keep=True),
    }
    for i, size in enumerate((96, 512)):
        clean = source.clean_sum(source.sample(512, torch.Generator().manual_seed(1))[:size])
        noisy = gradients.add_noise(clean, 0.5, 1)  # the second draw
        for variant, make in wanted.items():
            made = [make(noisy[name].double().numpy()) for name in clean]
            truth = [matrix.double().numpy() for matrix in clean.values()]
            cosines = [
                (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)) if a.any() else 0.0
                for a, b in zip(made, truth, strict=True)
            ]
            a, b = (np.concatenate([matrix.ravel() for matrix in x]) for x in (made, truth))
            overall = a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if a.any() else 0.0
            error = np.linalg.norm(a - b) / np.linalg.norm(b)
            j = result.variants.index(variant)
            got = [values[i, j, 1] for values in (result.alignment, result.overall, result.error)]
            np.testing.assert_allclose(got, [np.mean(cosines), overall, error], rtol=0.01)
    by_kappa = result.by_kappa(result.error)
    np.testing.assert_allclose(
        by_kappa[:, 1, 0], result.error[:, result.variants.index("optimal")]
    )  # without the correction it is `optimal`
    np.testing.assert_allclose(
        by_kappa[:, :, 2], np.repeat(result.error[:, [0]], 2, axis=1)
    )  # acts on no layer
    edges = [0.5 * sum(np.sqrt(matrix.shape)) for matrix in noisy.values()]
    tops = [np.linalg.svd(matrix.numpy(), compute_uv=False)[0] for matrix in noisy.values()]
    assert result.by_kappa(result.restored)[1, 0, :, 1].tolist() == [
        int((np.array(tops) > kappa * np.array(edges)).sum()) for kappa in config.kappas
    ]
    artifacts.save_result(result, tmp_path, "ablation")
    again, figure = figures.show("ablation", artifact_folder=tmp_path)
    columns, rows = ablation.table(again)
    assert len(figure.axes) == 4 and len(rows) == len(result.variants)
    assert all(len(row) == len(columns) for row in rows)


def test_ablation_refuses_what_it_cannot_measure():
    for change, message in (
        ({"noise_seeds": 1}, "noise_seeds must be an integer >= 2"),
        ({"kappas": (0.5,)}, "kappas must be a finite number >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ablation.run(dataclasses.replace(ablation.SMALL, **change))


def test_momentum_starts_where_it_must_and_lifts_the_signal():
    config = momentum.Config(
        dataclasses.replace(GRADIENTS, warm_loss=None),
        steps=4,
        batch_size=256,
        seeds=2,
        betas=(0.0, 0.9),
    )
    source = gradients.prepare(config.gradients)
    before = {name: p.clone() for name, p in source.model.named_parameters()}
    result = momentum.run(config, source)
    # after one step every running mean is that step's gradient
    np.testing.assert_allclose(result.noisy[0, 0, 0], result.noisy[0, 0, 1], rtol=1e-5)
    assert (result.restored[:, -1, 1] > result.noisy[:, -1, 1]).all()
    columns, rows = momentum.table(result)
    assert columns[1:] == ["noisy, step 4", "restored, step 4"] and rows[1][0] == "0.9"
    for text, two in zip(
        rows[1][1:], (result.noisy[:, -1, 1], result.restored[:, -1, 1]), strict=True
    ):
        middle, half = map(float, text.split(" ± "))
        assert middle == pytest.approx(two.mean(), abs=5.1e-4)
        # t with one degree of freedom: tan(0.475 pi) times half the distance of two seeds
        assert half == pytest.approx(12.7062 * abs(two[0] - two[1]) / 2, abs=5.1e-4)
    assert "add or remove one example" in result.statement
    for name, p in source.model.named_parameters():
        assert torch.equal(p, before[name])
    with pytest.raises(ValueError, match="seeds must be an integer >= 2"):
        momentum.run(dataclasses.replace(config, seeds=1), source)


def test_tasks_measure_each_case_as_the_exact_path_would(tmp_path):
    config = tasks.Config(
        cases=(
            ("tiny", "generated", "train", 256, 0.0),
            ("tiny-llama", "generated-table", "validation", 30, 0.0),
        ),
        noise_multiplier=0.5,
        num_draws=2,
    )
    result = tasks.run(config)
    source = gradients.prepare(dataclasses.replace(GRADIENTS, warm_loss=None, max_length=128))
    clean = source.clean_sum(source.sample(256, torch.Generator().manual_seed(1)))
    assert result.num_layers[0] == len(clean)
    for draw in range(2):
        noisy = gradients.add_noise(clean, 0.5, draw)
        tops = {
            name: np.linalg.svd(m.double().numpy(), compute_uv=False)[0]
            for name, m in noisy.items()
        }
        assert result.above[0, draw] == sum(
            top > 0.5 * (np.sqrt(m.shape[0]) + np.sqrt(m.shape[1]))
            for top, m in zip(tops.values(), noisy.values(), strict=True)
        )
        cosines = [
            float((m * clean[n]).sum() / m.norm() / clean[n].norm()) for n, m in noisy.items()
        ]
        assert result.noisy[0, draw] == pytest.approx(np.mean(cosines), abs=1e-4)
    assert (result.restored.mean(axis=1) >= result.noisy.mean(axis=1) - 0.01).all()
    assert (result.effective_rank[:, 0] < result.effective_rank[:, 1]).all()
    artifacts.save_result(result, tmp_path, "tasks")
    again = artifacts.load_result(tmp_path, "tasks", tasks.Result)
    assert tasks.table(again) == tasks.table(result) and "B=30" in again.label(1)
    assert figures.find("tasks").plot(again).axes


def test_figures_are_redrawn_without_computing(tmp_path, monkeypatch):
    config = spectra.Config(GRADIENTS, batch_size=64)
    sources = {}
    artifacts.save_result(figures.compute("spectra", config, sources), tmp_path, "spectra")
    assert list(sources) == [GRADIENTS]
    spec = dataclasses.replace(figures.find("spectra"), run=None)
    monkeypatch.setitem(restoration.FIGURES, "spectra", spec)
    result, figure = figures.show("spectra", artifact_folder=tmp_path)
    assert result.config == config
    for path in artifacts.save_figure(figure, tmp_path, "spectra"):
        assert path.stat().st_size > 1000, path
    with pytest.raises(FileNotFoundError, match="no result momentum"):
        figures.show("momentum", artifact_folder=tmp_path)


# the small scale with fewer and shorter runs
TRIALS = {
    "tasks": {},
    "momentum": {"steps": 3, "batch_size": 128},
    "plan_check": {"batch_size": 64, "noise_seeds": 1},
}
# test_experiments_implicit_noise, test_experiments_lora, test_experiments_membership,
# test_experiments_noise_cost, test_experiments_steps, test_experiments_tasks_large and test_plan
# run these on generated text
ELSEWHERE = {
    "dynamics",
    "implicit_noise",
    "membership",
    "membership_e2e",
    "membership_gemma",
    "noise_cost",
    "noisy_projection",
    "plan_gap",
    "plan_gap_large_batch",
    "vector_privacy",
    "gap",
    "gap_large_batch",
    "gap_all_layers",
    "steps_sst2",
    "steps_sst2_gap",
    "steps_sst2_arms",
    "steps_sst2_arms_eps8",
    "steps_sst2_eps8",
    "steps_sst2_all",
    "steps_sst2_mpnet",
    "steps_cola_mpnet",
    "steps_mnli",
    "steps_e2e",
    "steps_e2e_arms",
    "steps_smollm2",
    "steps_dart",
    "steps_gemma",
    "tasks_mpnet",
    "tasks_gemma",
    "tasks_qwen",
}


def test_every_lengthy_figure_has_a_trial():
    lengthy = {name for name in figures.NAMES if figures.find(name).lengthy}
    assert lengthy == TRIALS.keys() | ELSEWHERE


@pytest.mark.parametrize("name", TRIALS)
def test_what_is_lengthy_can_be_tried_small(name, monkeypatch):
    monkeypatch.delenv("LOWRANK_DP_DATA", raising=False)
    spec = figures.find(name)
    short = figures.configure(spec.small, **TRIALS[name])
    monkeypatch.setitem(restoration.FIGURES, name, dataclasses.replace(spec, small=short))
    result, figure = figures.show(name, recompute=True)
    assert re.search(r"; generated(-table)? from ", result.description)
    for values in (
        getattr(result, key) for key in ("restored", "predicted") if hasattr(result, key)
    ):
        assert np.isfinite(values).all() and np.ptp(values) > 1e-3
    figure.canvas.draw()
    assert spec.headline(result)
