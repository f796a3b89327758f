"""What noise costs a step: directions, measurement, resuming, and verdicts from the arrays."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from lowrank_dp import artifacts, figures
from lowrank_dp.experiments import noise_cost, noise_cost_directions
from lowrank_dp.experiments import noise_cost_verdicts as verdicts
from lowrank_dp.experiments.gradients import GradientConfig
from lowrank_dp.figures import restoration
from tests.oracles import optimal_values, refusal_of
from tests.tasks import seeded

NAMES = noise_cost_directions.DIRECTIONS
TINY = noise_cost.Config(
    cases=(
        noise_cost.Case(
            GradientConfig(model="tiny", task="generated", train_layers=1, micro_batch_size=8),
            steps=(2, 5),
            batch_size=48,
            slope_rows=24,
            rows=8,
            num_layers=2,
        ),
        noise_cost.Case(
            GradientConfig(
                model="tiny-llama", task="generated-table", train_layers=1, warm_batch_size=4
            ),
            steps=(1, 2),
            batch_size=16,
            slope_rows=6,
            rows=3,
            num_layers=1,
        ),
    ),
    noise_multiplier=0.05,
    num_draws=2,
    num_warm_ups=2,
    layer_draws=1,
)


# --- directions -----------------------------------------------------------------------------------


def test_the_directions_of_a_draw_are_what_their_names_say():
    std, generator = 0.1, seeded(1)
    strong = 9 * torch.outer(torch.randn(12, generator=generator), torch.ones(20)) / 20
    clean = {"spiked": strong, "flat": 1e-3 * torch.randn(16, 9, generator=generator)}
    noisy, loud = (
        {name: c + s * torch.randn(c.shape, generator=seeded(2)) for name, c in clean.items()}
        for s in (std, 10 * std)
    )
    made, above = noise_cost_directions.per_draw(clean, noisy, std, loud)
    assert above == 1 and made.keys() == set(noise_cost_directions.PER_DRAW)
    for name, x in noisy.items():
        u, s, vt = np.linalg.svd(x.double().numpy(), full_matrices=False)
        new = optimal_values(s, x.shape, std)
        shrunk, acted = (u * new) @ vt, new.any()
        rank = len(s)
        wanted = {
            "noisy": x,
            "noise": x.double() - clean[name].double(),
            "optimal, zeroed": shrunk,
            "optimal": shrunk if acted else x,
            "denoise": shrunk * np.linalg.norm(s) / np.linalg.norm(new) if acted else x,
            "removed": x.double().numpy() - shrunk,
            "noisy, flattened": (u @ vt) * np.linalg.norm(s) / rank**0.5,
            "noisy, optimal's norms": x.double().numpy()
            * (np.linalg.norm(new) / np.linalg.norm(s) if acted else 1.0),
            "loud": loud[name],
        }
        for direction, matrix in wanted.items():
            np.testing.assert_allclose(
                made[direction][name].double(), matrix, atol=2e-4, err_msg=f"{direction}, {name}"
            )
        half, more = (made[f"partial({share})"][name].double() for share in (0.5, 0.9))
        torch.testing.assert_close(
            0.8 * x + more, 1.8 * half, atol=2e-4, rtol=1e-3, check_dtype=False
        )
    once = noise_cost_directions.once(clean, std)
    assert tuple(once) == noise_cost_directions.ONCE
    for name, c in clean.items():
        values = torch.linalg.svdvals(once["clean, flattened"][name])
        assert float(values.max() / values.min()) == pytest.approx(1.0, rel=1e-3), name
        assert float(values.norm() / c.norm()) == pytest.approx(1.0, rel=1e-3), name
        want = (float(c.norm()) ** 2 + std**2 * c.numel()) ** 0.5
        assert float(once["clean, noisy norms"][name].norm()) == pytest.approx(want, rel=1e-3)


# --- the experiment -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def result(folder):
    return noise_cost.run(TINY, folder)


@pytest.mark.slow
def test_the_arrays_agree_with_each_other(result):
    shape = (2, 3, 2, 2, len(NAMES))
    assert result.privacy.startswith("NON-PRIVATE")
    assert result.gain.shape == result.slope.shape == result.curvature.shape == shape
    assert result.layer_gain.shape == (2, 3, 2, 1, 2, 5)
    assert np.isnan(result.layer_gain[1, :, :, :, 1]).all()  # the second case measures one matrix
    assert np.isfinite(result.layer_gain[0]).all() and np.isfinite(result.gain).all()
    np.testing.assert_allclose(result.along("clean", result.cosine), 1, rtol=1e-5)
    for name in noise_cost_directions.ONCE:  # the same in every draw
        values = result.along(name)
        np.testing.assert_array_equal(values[..., 0], values[..., 1], err_msg=name)
    assert np.ptp(result.along("noisy", result.slope), axis=-1).min() > 0  # draws differ
    # |noisy|^2 is |clean|^2 + |noise|^2 but for their inner product
    clean, noisy, noise = (result.along(name, result.norm) for name in ("clean", "noisy", "noise"))
    np.testing.assert_allclose(noisy**2, clean**2 + noise**2, rtol=0.1)
    falls, risen = result.slope > 0, result.slope < 0
    assert (result.gain[risen] == 0).all() and (result.gain >= 0).all()
    assert ((result.step > 0) == (result.gain > 0)).all()
    usable = falls & np.isfinite(result.predicted)
    ratio = result.gain[usable] / result.predicted[usable]
    assert 0.8 < np.median(ratio) < 1.25
    assert (np.diff(result.loss[:, [0, 2]].mean(-1), axis=1) < 0).all()  # the warm-up trains


@pytest.mark.slow
def test_a_finished_stage_is_not_measured_again(result, folder, monkeypatch):
    files = sorted(folder.glob("*.json"))
    assert len(files) == 2 * 3 * 2
    measured, real = [], noise_cost._measure
    monkeypatch.setattr(noise_cost, "_measure", lambda *given: measured.append(1) or real(*given))
    files[3].unlink()  # as if the run had been killed before the stage was saved
    again = noise_cost.run(TINY, folder)
    assert len(measured) == 1
    for field in dataclasses.fields(noise_cost.Result):
        value = getattr(result, field.name)
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(
                getattr(again, field.name), value, rtol=1e-4, atol=1e-7, err_msg=field.name
            )
    longer = dataclasses.replace(TINY, num_warm_ups=3)
    names = {
        noise_cost._stage_name(config, config.cases[0], 1, "warm") for config in (TINY, longer)
    }
    assert len(names) == 1  # more warm-ups keep the stages of the others
    other = dataclasses.replace(TINY, noise_multiplier=0.06)
    assert noise_cost._stage_name(other, other.cases[0], 1, "warm") not in names


def test_bad_configurations_are_refused_before_any_work(tmp_path):
    case = TINY.cases[0]
    for change, message in (
        ({"num_warm_ups": 1}, "num_warm_ups must be an integer >= 2"),
        ({"num_draws": 0}, "num_draws must be an integer >= 1"),
        ({"layer_draws": 3}, "layer_draws must be an integer >= 1 and <= 2"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be a finite number > 0"),
        ({"loud_multiplier": -1.0}, "loud_multiplier must be a finite number > 0"),
        (
            {"cases": (dataclasses.replace(case, rows=25),)},
            "rows must be an integer >= 1 and <= 24",
        ),
    ):
        config = dataclasses.replace(TINY, **change)
        assert message in refusal_of(noise_cost.run, config, tmp_path), change
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_small_scale_is_drawn_and_tabulated(result, tmp_path, monkeypatch):
    spec = dataclasses.replace(figures.find("noise_cost"), small=TINY, run=lambda config: result)
    monkeypatch.setitem(restoration.FIGURES, "noise_cost", spec)
    shown, figure = figures.show("noise_cost", recompute=True)
    figure.canvas.draw()
    assert len(figure.axes) == 4 and "generated" in shown.description
    artifacts.save_result(shown, tmp_path, "noise_cost")
    again = artifacts.load_result(tmp_path, "noise_cost", noise_cost.Result)
    assert verdicts.table(again) == verdicts.table(result)
    columns, rows = verdicts.table(result)
    assert len(columns) == 8 and all(len(row) == len(columns) for row in rows)
    assert columns[3] == "tiny, generated, warm"
    assert len(verdicts.headline(result)) == len(verdicts.PREDICTIONS)
    assert "2 settings x 2 warm-ups x 3 stages" in noise_cost.plan(TINY)


# --- verdicts -------------------------------------------------------------------------------------


def planted(gains, curvature=1.0, noise_curvature=1e-5, spread=0.02):
    """Make a result with the given mean gains by direction (1 for others), equal everywhere."""
    generator = np.random.default_rng(0)
    shape = (2, 3, 3, 5, len(NAMES))
    gain = np.array([gains.get(name, 1.0) for name in NAMES]) * np.exp(
        spread * generator.standard_normal(shape)
    )
    bend = np.full(shape, curvature)
    bend[..., NAMES.index("noise")] = noise_curvature
    slope = np.sqrt(2 * bend * gain)
    layers = np.ones((2, 3, 3, 1, 1, 5))
    blank = np.ones(shape)
    return noise_cost.Result(
        config=TINY, privacy="", descriptions=(), stages=noise_cost.STAGES, directions=NAMES,
        layer_directions=noise_cost_directions.LAYER_DIRECTIONS, layers=(), loss=blank[..., 0, 0],
        above=blank[..., 0], norm=blank, cosine=blank, slope=slope, curvature=bend, step=blank,
        gain=gain, layer_slope=layers, layer_curvature=layers, layer_gain=layers,
    )  # fmt: skip


SUPPORTING = {
    "clean": 1.0,
    "noisy": 1.0,
    "optimal, zeroed": 0.8,
    "optimal": 0.7,
    "noisy, optimal's norms": 0.7,
    "clean, noisy norms": 1.5,
    "noisy, flattened": 1.3,
    "removed": 1.6,
}
CONTRADICTING = {
    "clean": 2.0,
    "noisy": 1.0,
    "optimal, zeroed": 1.5,
    "optimal": 3.0,
    "denoise": 1.5,
    "clean, noisy norms": 1.5,
    "noisy, flattened": 0.8,
    "loud, flattened": 1.4,
    "removed": 1.6,
}


def judged(result):
    return [verdicts.verdicts(result, prediction)[1].verdict for prediction in verdicts.PREDICTIONS]


def test_planted_effects_get_their_verdicts():
    assert set(judged(planted(SUPPORTING))) == {"supported"}
    against = planted(CONTRADICTING, noise_curvature=0.01)
    against = dataclasses.replace(against, slope=against.slope * 2)
    assert set(judged(against)) == {"contradicted"}
    assert "supported" not in judged(planted({}, spread=2.0))[:6]
    each, _ = verdicts.verdicts(planted(SUPPORTING), verdicts.PREDICTIONS[0])
    assert len(each) == 2 and len(each[0]) == 3


def test_errors_of_the_quadratic_model_do_not_cancel():
    """Half of the predicted falls are twice the measured ones; the other half are half as large."""
    result = planted(SUPPORTING, spread=0.0)
    factor = np.where(np.arange(len(NAMES)) % 2, 2.0, 0.5)
    found = dataclasses.replace(result, slope=result.slope * np.sqrt(factor))
    assert judged(found)[-1] == "contradicted"
    values = verdicts.PREDICTIONS[-1].quantity(found)
    np.testing.assert_allclose(np.exp(values), 2.0)
    # a predicted fall that is not measured is an error; a fall that is not predicted is none
    gain = np.zeros_like(result.gain)
    assert judged(dataclasses.replace(result, gain=gain))[-1] == "contradicted"
    assert judged(dataclasses.replace(result, curvature=-result.curvature))[-1] == "undecided"


def test_an_interval_is_students_over_warm_ups_of_means_over_draws():
    result = planted({"optimal, zeroed": 0.5}, spread=0.3)
    prediction = verdicts.PREDICTIONS[0]
    each, together = verdicts.verdicts(result, prediction)
    over, under = (result.gain[..., NAMES.index(n)] for n in ("optimal, zeroed", "noisy"))
    logs = np.log(over.mean(-1) / under.mean(-1))  # (cases, stages, warm-ups)
    for found, values in ((each[1][2], logs[1, 2]), (together, logs.mean(1).ravel())):
        low, high = stats.t.interval(
            0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values)
        )
        assert (found.low, found.high) == pytest.approx((np.exp(low), np.exp(high)))
        assert found.mean == pytest.approx(np.exp(values.mean()))


def test_a_stage_without_a_model_in_one_warm_up_is_left_out_of_every_warm_up():
    """The warm-ups of a case would otherwise be means over different stages."""
    result = planted({}, spread=0.3)
    name = "clean, noisy norms"
    curvature = result.curvature.copy()
    curvature[0, 1, 2, :, NAMES.index(name)] = -1.0  # one case, stage and warm-up
    result = dataclasses.replace(result, curvature=curvature)
    gain, noisy = (result.gain[..., NAMES.index(n)].mean(-1) for n in (name, "noisy"))
    logs = np.log(gain / noisy)
    values = [(logs[0, 0, w] + logs[0, 2, w]) / 2 for w in range(3)]
    values += [logs[1, :, w].mean() for w in range(3)]
    low, high = stats.t.interval(0.95, 5, loc=np.mean(values), scale=stats.sem(values))
    middle = np.exp(np.mean(values))
    row = next(r for r in verdicts.table(result)[1] if r[0] == f"gain / noisy sum's: {name}")
    assert row[-1] == f"{middle:.3g} ({np.exp(low):.3g} to {np.exp(high):.3g})"
    assert row[2] == "no quadratic model in some warm-up"
    at = NAMES.index(name)
    ratio = verdicts.Prediction("", lambda r: verdicts.gain_factors(r)[..., at], 0.0, 1.0)
    together = verdicts.verdicts(result, ratio)[1]
    assert (together.mean, together.low) == pytest.approx((middle, np.exp(low)))


def test_a_direction_of_zeros_counts_as_the_least_factor():
    result = planted({"optimal, zeroed": 0.0})
    logs = verdicts.gain_factors(result)[..., NAMES.index("optimal, zeroed")]
    np.testing.assert_allclose(np.exp(logs), 1 / verdicts.LIMIT)
    rows = {row[0]: row[1:] for row in verdicts.table(result)[1]}  # a limit is no measured value
    assert set(rows["gain / noisy sum's: optimal, zeroed"]) == {"≤ 0.01"}
    assert set(rows[verdicts.PREDICTIONS[0].text]) == {"≤ 0.01: supported"}
    row = next(r for r in verdicts.table(planted({"loud": 1e4}))[1] if "sum's: loud" in r[0])
    assert set(row[1:]) == {"≥ 100"}
    nothing = planted({"noisy": 0.0})  # without predicted falls there is nothing to compare
    assert judged(nothing)[0] == "undecided"


def test_matrices_count_in_a_factor_where_both_gains_are_usable():
    """Against a loop; some curvatures are negative, and one case has one matrix less."""
    generator = np.random.default_rng(1)
    shape = (2, 3, 3, 2, 4, 5)
    gain, bend = generator.uniform(0.5, 2, shape), generator.uniform(0.5, 2, shape)
    bend[generator.random(shape) < 0.2] = -1.0
    for values in (gain, bend):
        values[1, ..., 3, :] = np.nan
    slope = np.sqrt(2 * np.abs(bend) * gain)
    result = dataclasses.replace(
        planted({}), layer_gain=gain, layer_slope=slope, layer_curvature=bend
    )
    found = verdicts.layer_factors(result)
    assert found.shape == (2, 3, 3, 5)
    noisy = noise_cost_directions.LAYER_DIRECTIONS.index("noisy")
    for k, s, w, d in np.ndindex(found.shape):
        over = under = 0.0
        for n, i in np.ndindex(2, 4):
            at = k, s, w, n, i
            if bend[(*at, d)] > 0 and bend[(*at, noisy)] > 0:
                over, under = over + gain[(*at, d)], under + gain[(*at, noisy)]
        np.testing.assert_allclose(found[k, s, w, d], np.log(over / under), err_msg=f"{k, s, w, d}")
    np.testing.assert_allclose(found[..., noisy], 0.0, atol=1e-12)
    # a cell without a number says why
    bend[0, 0, 0] = -1.0
    rows = verdicts.table(dataclasses.replace(result, layer_curvature=bend))[1]
    cells = [cell for row in rows if row[0].startswith("one matrix") for cell in row[1:]]
    assert "no quadratic model in some warm-up" in cells and not any("nan" in c for c in cells)
