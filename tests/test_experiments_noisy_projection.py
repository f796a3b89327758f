"""Noisy projections: scores and training against slow definitions, and one tiny whole run."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import nn

from lowrank_dp import artifacts, figures, lora, theory
from lowrank_dp.experiments import noisy_pooler, noisy_projection, noisy_release, noisy_trained
from lowrank_dp.experiments.gradients import GradientConfig, prepare
from lowrank_dp.experiments.noisy_pooler import TrainedConfig
from lowrank_dp.experiments.noisy_release import MECHANISMS, NOISE_PROJECT, PROJECT_NOISE
from lowrank_dp.experiments.noisy_trained import ARMS, FULL, LORA, Adapter, Layer
from lowrank_dp.mechanism import NON_PRIVATE, GaussianMechanism
from tests.tasks import seeded

TINY = replace(
    noisy_projection.SMALL,
    gradients=GradientConfig(model="tiny", task="generated", warm_loss=None, max_length=32),
    ranks=(1, 8),
    num_trials=30,
    batch_size=8,
    trained=TrainedConfig(
        ranks=(8,), num_trials=30, num_records=16, num_held_out=32, num_draws=1, num_steps=3
    ),
)


def projection(rank, n, seed=0):
    return noisy_release.Projection.of(
        lora.draw_a(rank, n, generator=seeded(seed), dtype=torch.float64)
    )


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def test_noise_meets_the_sensitivity_that_the_worst_record_attains():
    """|g W| / s is 1 / sigma for rows along the first eigenvector, and never more."""
    for rank, n in ((1, 6), (3, 12), (20, 12)):
        p = projection(min(rank, n), n, seed=rank)
        w = p.a.T @ p.a
        std = noisy_release.noise_std(PROJECT_NOISE, p, (2.0, 0.5), 0.7)
        worst = 0.7 * torch.outer(drawn(4), torch.linalg.eigh(w)[1][:, -1])
        worst /= torch.linalg.vector_norm(worst) / 0.7
        assert float((worst @ w).norm()) / std == pytest.approx(1 / 2.0)
        for seed in range(20):
            g = drawn(4, n, seed=seed)
            assert float((g / g.norm() * 0.7 @ w).norm()) / std <= 1 / 2.0
        torch.testing.assert_close(p.apply(worst), worst @ w)
        assert noisy_release.noise_std(NOISE_PROJECT, p, (2.0, 0.5), 0.7) == 1.4
        assert noisy_release.noise_std(MECHANISMS[3], p, (2.0, 0.5), 0.7) == 0.35


def test_the_score_with_a_known_is_the_log_ratio_of_normal_densities():
    m, n, rank, std = 3, 5, 2, 0.7
    p = projection(rank, n)
    w = (p.a.T @ p.a).numpy()
    g0, g, noise = drawn(m, n, seed=1), drawn(m, n, seed=2), drawn(m, n, seed=3)
    for mechanism in MECHANISMS:
        seen = noisy_release.release(mechanism, g0 + g, noise, p, std).numpy()
        found = noisy_release.scores(mechanism, torch.tensor(seen), g0, g, p, std)[0]
        # each row of the release is normal, with this map of the gradient's row and covariance
        linear = np.eye(n) if mechanism == "plain" else w
        cov = std**2 * (w @ w if mechanism in MECHANISMS[2:] else np.eye(n))
        want = 0.0
        for row in range(m):
            for sign, centre in ((1, g0 + g), (-1, g0)):
                law = stats.multivariate_normal(
                    centre[row].numpy() @ linear, cov, allow_singular=True
                )
                want += sign * law.logpdf(seen[row])
        assert found == pytest.approx(want, rel=1e-6), mechanism


def test_the_second_order_ratio_is_that_of_simulated_projections():
    m, n, rank, std = 2, 4, 2, 8.0
    g, rng = np.array([[1.0, 0.5, 0, 0.2], [0.3, -1, 0.4, 0]]), np.random.default_rng(0)
    seen = g + 12.0 * rng.standard_normal((m, n))
    a = rng.standard_normal((400_000, rank, n)) / np.sqrt(rank)
    shifts = (g @ a.transpose(0, 2, 1)) @ a - g
    exponents = (shifts * (seen - g)).sum(axis=(1, 2)) / std**2
    exponents -= (shifts**2).sum(axis=(1, 2)) / (2 * std**2)
    values = np.exp(exponents)
    exact, error = np.log(values.mean()), values.std() / values.mean() / np.sqrt(len(values))
    found = noisy_release._curvature(torch.tensor(seen), torch.tensor(g), rank, std)
    e, quadratic, trace = seen - g, 0.0, 0.0
    for i, j, k, o in np.ndindex(m, n, m, n):  # the covariance of two entries of G W
        cov = ((g[i] @ g[k]) * (j == o) + g[i, o] * g[k, j]) / rank
        quadratic += e[i, j] * e[k, o] * cov
        trace += cov * ((i, j) == (k, o))
    assert found == pytest.approx(quadratic / (2 * std**4) - trace / (2 * std**2), rel=1e-9)
    assert abs(found) > 5e-3 and error < 1e-3
    assert found == pytest.approx(exact, abs=0.15 * abs(exact) + 4 * error)


def test_a_release_that_is_projected_last_tells_a_to_whoever_has_many_rows():
    m, n, rank, std = 1500, 12, 3, 2.0
    g0, g = drawn(m, n, seed=1) * 0.02, drawn(m, n, seed=2)
    g *= std / g.norm()
    known, learned = [], []
    for seed in range(40):
        p = projection(rank, n, seed=seed)
        noise = drawn(m, n, seed=100 + seed)
        seen = noisy_release.release(NOISE_PROJECT, g0 + (seed % 2) * g, noise, p, std)
        score = noisy_release.scores(NOISE_PROJECT, seen, g0, g, p, std)
        known.append(score[0])
        learned.append(score[1])
    assert np.corrcoef(known, learned)[0, 1] > 0.99
    np.testing.assert_allclose(learned, known, atol=0.15 * np.abs(known).max())


def naive(layer, arm, p, x, y, clip, rate, steps):
    """Noise-free training by autograd and a loop over records; returns the effective update."""
    rank, n = p.a.shape
    m = torch.zeros(len(layer.weight), rank if arm == LORA else n, dtype=torch.float64)
    w = p.a.T @ p.a
    for _ in range(steps):
        total = torch.zeros_like(m)
        for i in range(len(x)):
            own = m.clone().requires_grad_()
            update = own @ p.a if arm == LORA else own
            hidden = torch.tanh((layer.weight + update) @ x[i] + layer.bias)
            loss = torch.nn.functional.cross_entropy(layer.head @ hidden + layer.head_bias, y[i])
            (gradient,) = torch.autograd.grad(loss, own)
            gradient = gradient * min(1.0, clip / float(gradient.norm()))
            total += gradient if arm in (FULL, LORA) else gradient @ w
        m = m - rate / len(x) * total
    return m @ p.a if arm == LORA else m


def tiny_layer(m=5, n=6, classes=3):
    parts = drawn(m, n, seed=1), drawn(m, seed=2), drawn(classes, m, seed=3), drawn(classes, seed=4)
    return Layer(*parts), drawn(7, n, seed=5), torch.tensor([0, 1, 2, 0, 1, 2, 0])


def test_every_arm_trains_as_autograd_and_a_loop_over_records():
    layer, x, y = tiny_layer()
    p = projection(2, 6)
    torch.set_default_dtype(torch.float64)
    try:
        for arm in ARMS:
            adapter = Adapter.of(arm, p)
            weights = torch.tensor([[1.0] * 7, [1.0] * 6 + [0.0]])
            found = noisy_trained.train(
                layer,
                adapter,
                x,
                y,
                weights,
                torch.tensor([False, False]),
                noise_multiplier=1.0,
                clip=0.8,
                learning_rate=0.5,
                num_steps=4,
                generator=seeded(),
            )
            outputs = torch.eye(6) if adapter.outputs is None else adapter.outputs
            want = naive(layer, arm, p, x, y, 0.8, 0.5, 4)
            torch.testing.assert_close(found[0] @ outputs, want), arm
            # if a record is left out, the mean of the others is still over all 7
            short = naive(layer, arm, p, x[:6], y[:6], 0.8, 0.5 * 6 / 7, 4)
            torch.testing.assert_close(found[1] @ outputs, short)
            # the update keeps the row space of the frozen A
            if arm != FULL:
                inside = p.basis @ p.basis.T
                torch.testing.assert_close(want @ inside, want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_noise_of_the_steps_adds_up_and_the_score_points_to_the_member():
    layer, x, y = (part for part in tiny_layer())
    layer = Layer(*(value.float() for value in vars(layer).values()))
    p = noisy_release.Projection.of(lora.draw_a(2, 6, generator=seeded()))
    for arm in ARMS:
        adapter = Adapter.of(arm, p)
        given = {
            "clip": 0.8,
            "learning_rate": 0.5,
            "num_steps": 4,
            "generator": seeded(),
        }
        runs = 2000
        m = noisy_trained.train(
            layer,
            adapter,
            x.float(),
            y,
            torch.zeros(runs, 7),
            torch.ones(runs, dtype=torch.bool),
            noise_multiplier=3.0,
            **given,
        )
        std = 0.5 / 7 * 3.0 * 0.8 * adapter.sensitivity * 2  # the root of 4 steps
        # 20,000 entries or more: the standard error is at most 0.5%; wrong for 1 seed in 10^5
        assert float(m.std()) / std == pytest.approx(1, abs=0.023), arm
        assert adapter.sensitivity == (p.largest if arm == PROJECT_NOISE else 1.0)
        both = torch.tensor([[1.0] * 7, [1.0] * 6 + [0.0]])
        ends = noisy_trained.train(
            layer,
            adapter,
            x.float(),
            y,
            both,
            torch.zeros(2, dtype=torch.bool),
            noise_multiplier=3.0,
            **given,
        )
        with_, without = ends[:1], ends[1:]
        assert noisy_trained.attack_score(with_, without, with_) > 0, arm
        assert noisy_trained.attack_score(without, without, with_) < 0, arm


def test_utility_is_that_of_whole_vectors_and_its_noise_suffices_for_every_width():
    """Two layers, released by hand with the same draws; every layer's sigma_A meets delta."""
    clean = {"wide": drawn(3, 40, seed=1).float(), "narrow": 5 * drawn(2, 6, seed=2).float()}
    config = replace(TINY, ranks=(2,), epsilons=(1.0,), utility_batch=4)
    sigma = GaussianMechanism.calibrate(1.0, config.delta, 1, 1.0).noise_multiplier
    model = nn.ModuleDict({name: nn.Linear(*g.shape[::-1]) for name, g in clean.items()})
    source = SimpleNamespace(nested_sums=lambda sizes: {4: clean}, model=model)
    cosine, error = noisy_projection._utility(config, source, np.array([sigma]), seeded(3))
    sigma_a = theory.noise_projection_multiplier(1.0, config.delta, 2, 6)
    for g in clean.values():  # the projection of a record keeps more of it where rows are short
        delta = theory.noise_projection_delta(1.0, sigma_a, 2, g.shape[1])
        assert delta <= config.delta * (1 + 1e-6), g.shape
    generator, made = seeded(3), {mechanism: [] for mechanism in MECHANISMS}
    for g in clean.values():
        noise = torch.randn(g.shape, generator=generator)
        a = lora.draw_a(2, g.shape[1], generator=generator)
        w = a.T @ a
        largest = float(torch.linalg.eigvalsh(w)[-1])
        for mechanism, released in zip(
            MECHANISMS,
            (
                g + sigma * noise,
                g @ w + sigma * largest * noise,
                (g + sigma * noise) @ w,
                (g + sigma_a * noise) @ w,
            ),
            strict=True,
        ):
            made[mechanism].append(released.flatten().double().numpy())
    truth = [g.flatten().double().numpy() for g in clean.values()]
    for i, mechanism in enumerate(MECHANISMS):
        whole = [[*made[mechanism], np.concatenate(made[mechanism])], [*truth, np.hstack(truth)]]
        cosines = [
            m @ g / np.linalg.norm(m) / np.linalg.norm(g) for m, g in zip(*whole, strict=True)
        ]
        errors = [np.linalg.norm(m - g) / np.linalg.norm(g) for m, g in zip(*whole, strict=True)]
        for found, values in ((cosine, cosines), (error, errors)):
            want = np.mean(values[:2]), values[2]
            np.testing.assert_allclose(found[i, 0, 0], want, rtol=1e-3, err_msg=mechanism)


def test_every_arm_is_attacked_at_its_rate_of_least_held_out_loss(monkeypatch):
    rates, asked = (0.1, 1.0, 3.0), []
    config = TrainedConfig(ranks=(2, 4), learning_rates=rates, num_steps=5)
    best = {(arm, rank): (i + rank // 2) % 3 for i, arm in enumerate(ARMS) for rank in (2, 4)}

    def utility(arm, rank, *given):
        return [float(i != best[arm, rank]) for i in range(3)], [0.0, 0.5, 1.0]

    def attack(arm, rank, config, data, sigma, rate, generator):
        asked.append((arm, rank, sigma, rate))
        return rate, 0.0, 1.0

    layer = tiny_layer(m=5, n=6)[0]
    held_out = drawn(4, 6, seed=9), torch.tensor([0, 1, 2, 0])
    data = SimpleNamespace(layer=layer, clip=0.5, held_out=held_out)
    monkeypatch.setattr(noisy_pooler, "_read", lambda *given: data)
    monkeypatch.setattr(noisy_pooler, "_utility", utility)
    monkeypatch.setattr(noisy_pooler, "_attack", attack)
    found = noisy_pooler.measure(config, None, 1e-5, seeded())
    sigma = GaussianMechanism.calibrate(config.epsilon, 1e-5, 5, 1.0).noise_multiplier
    for i, arm in enumerate(ARMS):
        for k, rank in enumerate(config.ranks):
            want = rates[best[arm, 2 if arm == FULL else rank]]
            assert found["learning_rate"][i, k] == found["trained_auc"][i, k, 0] == want
            assert (arm, rank, sigma, want) in asked or (arm == FULL and rank == 4)
            assert ((arm, rank, 0.0, want) in asked) == (arm == LORA)
    assert len(asked) == 2 * len(ARMS) - 1 + 2  # full fine-tuning once, and two without noise


@pytest.fixture(scope="module")
def source():
    return prepare(TINY.gradients)


@pytest.fixture(scope="module")
def result(source):
    return noisy_projection.run(TINY, source)


@pytest.mark.slow
def test_a_tiny_run_reloads_plots_and_agrees_with_the_guarantee(result, source, tmp_path):
    artifacts.save_result(result, tmp_path, "noisy_projection")
    loaded = artifacts.load_result(tmp_path, "noisy_projection", noisy_projection.Result)
    assert loaded.config == TINY and loaded.privacy == NON_PRIVATE
    assert noisy_projection.headline(loaded) == noisy_projection.headline(result)
    spec = figures.find("noisy_projection")
    assert isinstance(spec.plot(loaded), Figure)
    columns, rows = spec.rows(loaded)
    assert {len(row) for row in rows} == {len(columns)}
    # no AUC of a calibrated mechanism exceeds the limit of its epsilon, up to chance
    assert (result.auc[:3, ..., 1] < result.ceiling[:, None]).all()
    assert result.noiseless_auc[0, 0] == 1
    factor = result.noise_factor
    assert (factor[[0, 2]] == 1).all() and (factor[1] > 4).all() and (factor[3] < 1).all()
    # the projection of plain DP's release is never nearer than the release itself, on average
    assert (result.cosine[2, ..., 1] < result.cosine[0, ..., 1]).all()
    again = noisy_projection.run(TINY, source)
    np.testing.assert_array_equal(again.auc, result.auc)


def test_bad_config_is_one_error(source):
    for changes, words in (
        ({"num_trials": 1}, "num_trials"),
        ({"ranks": ()}, "ranks must be at least one value"),
        ({"ranks": (1000,)}, "ranks must be an integer >= 1 and <="),
        ({"epsilons": (0.0,)}, "epsilons"),
        ({"trained": replace(TINY.trained, learning_rates=())}, "learning_rates"),
        ({"trained": replace(TINY.trained, num_steps=0)}, "num_steps"),
    ):
        with pytest.raises(ValueError, match=words):
            noisy_projection.run(
                replace(TINY, num_trials=2, **changes)
                if "num_trials" not in changes
                else replace(TINY, **changes),
                source,
            )
            pytest.fail(f"{changes} was accepted")
