"""The measurement of larger models on embedded ones, against slow definitions."""

import dataclasses

import numpy as np
import pytest
import torch

from lowrank_dp import artifacts, figures
from lowrank_dp.experiments import gradients, tasks_large, tasks_large_verdicts
from lowrank_dp.experiments import tasks_large_configs as configs
from tests import readme_map

pytestmark = pytest.mark.slow
CONFIG = dataclasses.replace(
    configs.SMALL,
    cases=(configs.Case("tiny", "generated", 96, warm_steps=6, warm_batch_size=16),),
    precision="float32",
    noise_multiplier=0.3,
    max_rows=300,
)


def by_definition(config, start, stage):
    """Compute both averages of the three schemes' cosines, (draws, 3, 2), from full SVDs."""
    case = config.cases[0]
    asked = config.gradients(case, start)
    source = gradients.load_source(asked, case.batch_size)
    assert len(source.rows) == config.max_rows
    if stage == "warm":
        gradients.warm_up(source)
    rows = source.sample(case.batch_size, torch.Generator().manual_seed(asked.seed + 1))
    clean = {n: g.double().numpy() for n, g in source.clean_sum(rows).items()}
    std, found = config.noise_multiplier, []
    for draw in range(config.num_draws):
        sums = {n: torch.from_numpy(g).float() for n, g in clean.items()}
        noisy = gradients.add_noise(sums, std, 1000 * asked.seed + draw)
        made = {scheme: [] for scheme in tasks_large.SCHEMES}
        for name in clean:
            x = noisy[name].double().numpy()
            u, s, vt = np.linalg.svd(x, full_matrices=False)
            small, large = sorted(x.shape)
            b, y = small / large, s / (std * np.sqrt(large))
            inner = np.maximum((y**2 - b - 1) ** 2 - 4 * b, 0.0)
            new = np.where(y > 1 + np.sqrt(b), np.sqrt(inner) / y * std * np.sqrt(large), 0.0)
            acts = s[0] > std * (np.sqrt(small) + np.sqrt(large))
            made["noisy"].append(x)
            made["optimal"].append((u * new) @ vt if acts else x)
            made["optimal, zeroed"].append((u * new) @ vt if acts else np.zeros_like(x))

        def angle(a, g):
            size = np.linalg.norm(a) * np.linalg.norm(g)
            return float((a * g).sum() / size) if size else 0.0

        whole = np.concatenate([g.ravel() for g in clean.values()])
        found.append(
            [
                (
                    np.mean([angle(a, g) for a, g in zip(those, clean.values(), strict=True)]),
                    angle(np.concatenate([a.ravel() for a in those]), whole),
                )
                for those in made.values()
            ]
        )
    return np.array(found)


def test_both_averages_are_those_of_whole_decompositions(tmp_path):
    result = tasks_large.run(CONFIG, tmp_path)
    assert result.cosine.shape == (1, 2, 2, 2, 3, 2)  # case, stage, start, draw, scheme, average
    for start in range(2):
        for stage, name in enumerate(tasks_large.STAGES):
            np.testing.assert_allclose(
                result.cosine[0, stage, start], by_definition(CONFIG, start, name), atol=2e-3
            )
    # the two averages differ, and so do the starts and the stages
    assert (np.abs(np.diff(result.cosine, axis=-1)) > 1e-3).any()
    assert np.ptp(result.loss[0], axis=-1).min() > 0
    assert (result.loss[0, 1] < result.loss[0, 0]).all()
    assert result.description.count("generated from") == 1

    # a stage that was kept is not measured again; only the lost stage is
    stages = sorted(tmp_path.glob("*.json"))
    assert len(stages) == 4
    times = {path: path.stat().st_mtime_ns for path in stages}
    stages[0].unlink()
    again = tasks_large.run(CONFIG, tmp_path)
    np.testing.assert_allclose(again.cosine, result.cosine, atol=1e-5)
    changed = [path for path in stages if path.stat().st_mtime_ns != times[path]]
    assert changed == stages[:1]

    artifacts.save_result(result, tmp_path / "saved", "tasks_mpnet")
    loaded = artifacts.load_result(tmp_path / "saved", "tasks_mpnet", tasks_large.Result)
    columns, rows = tasks_large.table(loaded)
    assert len(rows) == 2 and len(rows[0]) == len(columns)
    mean = result.cosine[0, 1, :, :, 1, 1].mean()
    assert rows[1][columns.index("cosine, optimal, one vector")].startswith(f"{mean:.3f} ± ")
    assert len(tasks_large.headline(loaded)) == 2
    figures.find("tasks_mpnet").plot(loaded).canvas.draw()


def test_bf16_changes_a_gradient_by_rounding_only():
    case = CONFIG.cases[0]
    sums = []
    for precision in ("float32", "bf16"):
        config = dataclasses.replace(CONFIG, precision=precision).gradients(case, 0)
        source = gradients.load_source(config, case.batch_size)
        sums.append(source.clean_sum(range(case.batch_size)))
    for name, matrix in sums[0].items():
        cosine = torch.nn.functional.cosine_similarity(
            matrix.flatten(), sums[1][name].flatten(), dim=0
        )
        assert 0.99 < cosine < 1 - 1e-7, name


def made(cosine, rank):
    """Make a result of one case from cosines (stages, W, schemes, averages) and clean ranks."""
    cosine = np.array(cosine)[None, :, :, None]
    stages, starts = cosine.shape[1:3]
    return tasks_large.Result(
        config=dataclasses.replace(CONFIG, num_starts=starts),
        privacy="NON-PRIVATE",
        descriptions=("a model",),
        loss=np.ones((1, stages, starts)),
        num_layers=np.full((1, stages, starts), 4),
        above=np.ones((1, stages, starts, 1), dtype=int),
        cosine=cosine,
        effective_rank=np.broadcast_to(
            np.array([[r, 0.8] for r in rank])[None, :, None], (1, stages, starts, 2)
        ),
    )


def test_verdicts_follow_the_numbers():
    noisy, better, mixed = [0.1, 0.1], [0.5, 0.5], [0.1 + 1e-3, 0.3]
    spread = [[0.1, 0.1 + 0.01 * k] for k in (-1, 0, 2)]  # the t-interval holds 0
    ups = [[noisy, better, [0.4, 0.6]], [noisy, mixed, [0.4, 0.6]], [noisy, better, [0.4, 0.6]]]
    downs = [[noisy, one, [0.0, 0.0]] for one in spread]
    for stages, rank, low, nearer in (
        ((ups, ups), (0.1, 0.3), "reproduced", "reproduced within limits: in 2 of 4 comparisons"),
        (
            (ups, downs),
            (0.1, 0.6),
            "reproduced within limits: in 1 of 2 comparisons",
            "1 of 4 comparisons",
        ),
        ((downs, downs), (0.9, 0.6), "not reproduced", "not reproduced"),
    ):
        first, second = tasks_large_verdicts.verdicts(made(stages, rank))
        assert first.verdict == low
        assert second.verdict.endswith(nearer)
    ups = [[noisy, [0.5 + d, 0.4], [0.4, 0.6]] for d in (0.0, 0.01, 0.02)]
    first, second = tasks_large_verdicts.verdicts(made((ups, ups), (0.123, 0.3)))
    assert second.verdict == "reproduced"
    assert "12 to 30% of the largest possible, with noise 80%" in first.reason
    assert "generated, B = 96, cold: 0.100 → 0.510 (0.400 zeroed); 0.100 → 0.400" in second.reason


def test_the_claim_index_reads_the_saved_results(tmp_path):
    pending = readme_map.larger_models(tmp_path)
    assert pending.count("not run yet") == len(readme_map.LARGER) == 3
    ups = [[[0.1, 0.1], [0.5, 0.4], [0.4, 0.6]]] * 3
    artifacts.save_result(made((ups, ups), (0.1, 0.3)), tmp_path, "tasks_qwen")
    rows = readme_map.larger_models(tmp_path).splitlines()
    assert len(rows) == 2 + 2 + 2 and all(row.count("|") == 6 for row in rows)
    assert sum("`tasks_qwen` | reproduced |" in row for row in rows) == 2


def test_bad_input():
    for changes, message in (
        ({"num_starts": 1}, "num_starts must be an integer >= 2"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be"),
        ({"precision": "bf17"}, "precision .*did you mean 'bf16'"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks_large.run(dataclasses.replace(CONFIG, **changes), "unused")
    assert "2 starts x 2 stages" in tasks_large.plan(CONFIG)
