"""Plans of private runs: predictions against simulation, naive formulas and finite differences."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from lowrank_dp import artifacts
from lowrank_dp.commands import plan as command
from lowrank_dp.data import encode, load_task, micro_batches
from lowrank_dp.experiments import gap, gap_configs, plan_check, plan_gap
from lowrank_dp.mechanism import NO_RECORDS, NON_PRIVATE, GaussianMechanism
from lowrank_dp.models import load_model
from lowrank_dp.plan import make_plan, predict_alignment, predict_spectrum, step_gain
from lowrank_dp.plan.curvature import StepGain, slope_and_curvatures
from lowrank_dp.plan.making import SCHEMES
from lowrank_dp.plan.public_text import load_public_text
from lowrank_dp.plan.request import Measurement
from lowrank_dp.plan.trials import Gap, Trial, best_rate, measure_gap, steps_ratio
from lowrank_dp.plots.plan_gap import plot_plan_gap
from lowrank_dp.restore import restore
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.setup import prepare
from tests.oracles import assert_refused, refusal_of
from tests.tasks import case, run_main, seeded, write_reviews

RUN = {
    "model": "tiny",
    "task": "generated",
    "epsilon": 2.0,
    "batch_size": 128,
    "steps": 10,
    "train_layers": 1,
    "seed": 0,
}


def matrix_with(values, rows, columns, generator):
    """Return a random matrix (rows, columns) with the given singular values."""
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    k = len(values)
    return (u[:, :k] * values) @ v[:, :k].mT


def test_predicted_spectrum_and_alignment_agree_with_simulated_noise():
    # spikes, a decay, and a signal below the edge; both orientations; fixed seeds
    for rows, columns, kind, tolerance in (
        (120, 480, "spikes", 0.02),
        (480, 120, "spikes", 0.02),
        (200, 200, "decay", 0.02),
        (200, 200, "weak", 0.02),
    ):
        k, scale = min(rows, columns), 0.3 * math.sqrt(max(rows, columns))
        index = torch.arange(1, k + 1, dtype=torch.float64)
        theta = {
            "spikes": torch.tensor([5.0, 3.0, 1.8, 0.4] + [0.0] * (k - 4), dtype=torch.float64),
            "decay": 5 / index,
            "weak": 0.7 / index.sqrt(),
        }[kind] * scale
        spectrum = predict_spectrum(theta, (rows, columns), 0.3)
        predicted = {p.scheme: p.one_vector for p in predict_alignment([spectrum], SCHEMES)}
        generator = seeded(1)
        clean = matrix_with(theta, rows, columns, generator)
        measured = {name: [] for name in SCHEMES}
        values = []
        for _ in range(3):
            noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
            noisy = clean + 0.3 * noise
            values.append(torch.linalg.svdvals(noisy))
            for name, (scheme, options) in SCHEMES.items():
                made = restore(noisy, 0.3, scheme, method="exact", **options)
                size = float(made.norm() * clean.norm())
                measured[name].append(float((made * clean).sum()) / size if size else 0.0)
        rank = spectrum.visible_rank
        with case(rows, columns, kind):
            assert rank == {"spikes": 3, "decay": 4, "weak": 0}[kind]
            mean = torch.stack(values).mean(0)
            torch.testing.assert_close(mean[:rank], spectrum.values[:rank], rtol=0.03, atol=0)
            off = (mean - spectrum.values)[rank:].abs().max()
            assert off < 0.06 * 0.3 * (math.sqrt(rows) + math.sqrt(columns))
        for name in SCHEMES:
            if kind == "weak" and name not in ("noisy", "truncate(8)", "power(3)"):
                continue  # noise alone passes the edge in one draw of seven
            with case(rows, columns, kind, name):
                assert np.mean(measured[name]) == pytest.approx(predicted[name], abs=tolerance)


def test_alignment_of_several_layers_adds_their_products():
    """Closed forms, for matrices with one singular value each.

    A value below the edge is zeroed, and a matrix without a gradient is left out of the mean.
    """
    noise_std, side = 1.0, 400
    spectra = [
        predict_spectrum(
            torch.tensor([top] + [0.0] * (side - 1), dtype=torch.float64), (side, side), noise_std
        )
        for top in (60.0, 80.0, 5.0, 0.0)
    ]
    noisy, zeroed = predict_alignment(
        spectra, {"noisy": ("none", {}), "zeroed": ("optimal", {"below": "zero"})}
    )
    each = [top / math.sqrt(top**2 + side**2) for top in (60.0, 80.0, 5.0)]
    assert noisy.mean == pytest.approx(np.mean(each), rel=1e-6)
    energy = 60**2 + 80**2 + 5**2
    assert noisy.one_vector == pytest.approx(math.sqrt(energy / (energy + 3 * side**2)), rel=1e-6)
    # a square matrix: both cosines are 1 - 1 / theta^2, the shrunk value is the top value times it
    cosines = [1 - 1 / (top / math.sqrt(side)) ** 2 for top in (60.0, 80.0)]
    assert zeroed.mean == pytest.approx(sum(cosines) / 3, rel=1e-6)
    kept = sum((top * c) ** 2 for top, c in zip((60.0, 80.0), cosines, strict=True))
    assert zeroed.one_vector == pytest.approx(math.sqrt(kept / energy), rel=1e-6)


def test_predictions_refuse_bad_input():
    values = torch.ones(3, dtype=torch.float64)
    for arguments, expected in (
        ((values, (4, 4), 1.0), "clean must be a tensor of shape"),
        ((values.cumsum(0), (3, 4), 1.0), "descending"),
        ((values, (3, 4), 0.0), "noise_std"),
    ):
        with pytest.raises(ValueError, match=expected):
            predict_spectrum(*arguments)
    with pytest.raises(ValueError, match="nonzero clean gradient"):
        predict_alignment([predict_spectrum(0 * values, (3, 4), 1.0)], SCHEMES)


@pytest.fixture(scope="module")
def measured():
    """Return a tiny classifier in float64, batches of unequal size, and the kind of its task."""
    task = load_task("generated", max_examples=100)
    model, tokenizer = load_model("tiny", task=task, train_layers=1)
    rows = encode(task.train[:11], tokenizer, kind=task.kind, max_length=32)
    batches = [batch for _, batch in micro_batches(rows, 4, tokenizer.pad_token_id)]
    return model.double(), batches, task.kind


def test_slope_and_curvature_agree_with_finite_differences(measured):
    model, batches, kind = measured
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = seeded(2)
    directions = [
        {
            name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for name, p in trained.items()
        }
        for _ in range(2)
    ]
    slope, curvatures = slope_and_curvatures(model, batches, kind, directions)

    @torch.no_grad()
    def moved(direction, size):
        for name, p in trained.items():
            p.add_(direction[name], alpha=size)
        outputs = [(model(**batch).logits, batch["labels"]) for batch in batches]
        for name, p in trained.items():
            p.sub_(direction[name], alpha=size)
        return outputs

    step, rows = 1e-5, sum(len(batch["labels"]) for batch in batches)
    for i, direction in enumerate(directions):
        pairs = zip(
            moved(direction, step), moved(direction, -step), moved(direction, 0), strict=True
        )
        curvature = change = 0.0
        for (up, labels), (down, _), (logits, _) in pairs:
            j = (up - down) / (2 * step)
            p = logits.softmax(-1)
            curvature += float(((p * j**2).sum(-1) - (p * j).sum(-1) ** 2).sum()) / rows
            change += float(
                sum(
                    torch.nn.functional.cross_entropy(sign * out, labels, reduction="sum") * part
                    for sign, out, part in ((1, up, 1), (1, down, -1))
                )
            ) / (2 * step * rows)
        assert curvatures[i] == pytest.approx(curvature, rel=1e-6)
        if i == 0:
            assert slope == pytest.approx(change, rel=1e-6)


def test_step_gain_is_the_best_step_of_the_quadratic_model(measured):
    gain = StepGain(slope=0.3, curvature=0.5, trace=200.0, noise_std=0.02)
    for noise, best in ((0.0, gain.clean_gain), (0.02, gain.noisy_gain)):
        rates = np.linspace(0, 3, 30001)
        model = rates * 0.3 - rates**2 / 2 * (0.5 + noise**2 * 200.0)
        assert model.max() == pytest.approx(best, rel=1e-6)
    assert gain.noise_cost == pytest.approx(gain.clean_gain / gain.noisy_gain)
    uphill = replace(gain, slope=-0.3)  # a step against the direction gains nothing
    assert uphill.clean_gain == uphill.noisy_gain == 0 and uphill.noise_cost == gain.noise_cost
    model, batches, kind = measured
    # the trace of a head's bias alone: Hutchinson's estimate against sum over unit vectors
    bias = "classifier.bias"
    direction = {bias: torch.tensor([1.0, -0.5], dtype=torch.float64)}
    units = [{bias: row} for row in torch.eye(2, dtype=torch.float64)]
    exact = sum(slope_and_curvatures(model, batches, kind, units)[1])
    found = step_gain(model, batches, kind, direction, 0.1, probes=200)
    assert found.trace == pytest.approx(exact, rel=0.2)  # 3 standard errors: 0.21
    with pytest.raises(ValueError, match="noise_std"):
        step_gain(model, batches, kind, direction, -1.0)
    with pytest.raises(ValueError, match="must hold at least one row"):
        step_gain(model, [], kind, direction, 1.0)


def test_rates_are_tried_until_the_best_is_inside():
    def scores_of(best, calls):
        return lambda rate: calls.append(rate) or [1.0, abs(math.log(rate / best))]

    for best, tried in ((1.0, 3), (10.0, 5), (0.15, 5), (1e4, 5)):
        calls = []
        rate, curves = best_rate(scores_of(best, calls), (0.3, 1.0, 3.0))
        with case(best):
            assert len(calls) == len(curves) == tried and set(calls) == set(curves)
            assert rate == min(calls, key=lambda rate: abs(math.log(rate / best)))
    rate, _ = best_rate(lambda rate: [1.0, math.nan if rate > 1 else 1 / rate], (0.3, 1.0, 3.0))
    assert rate == 1.0  # a diverged run is never the best


def test_ratio_of_steps_is_that_of_curves_of_one_shape():
    fast = [math.exp(-step / 4) for step in range(31)]
    for slower in (1.0, 1.5, 2.0, 3.0):
        slow = [math.exp(-step / (4 * slower)) for step in range(31)]
        with case(slower):
            assert steps_ratio(slow, fast) == pytest.approx(slower, rel=0.1)
            assert steps_ratio(fast, slow) == pytest.approx(1 / slower, rel=0.1)
    # noise that prevents all learning must not be reported as noise that costs nothing
    drowned = [1.0 - 0.001 * (step % 2) for step in range(31)]
    for pair in ((drowned, fast), (fast, drowned), ([1.0] * 9, [1.0] * 9)):
        assert steps_ratio(*pair) is None
    for step, change in ((2, -0.6), (30, 0.3)):  # one step with an unusually good or bad score
        noisy = [value + change * (i == step) for i, value in enumerate(fast)]
        assert steps_ratio(noisy, fast) == pytest.approx(1.0, rel=0.05), step


class Bowl:
    """Text of 40 rows whose gradients all point from ``w`` to one point and are clipped."""

    kind, prefix, rows = "regression", None, range(40)

    def __init__(self):
        self.w = torch.nn.Parameter(torch.zeros(5))
        self.target, self.trained, self.asked = torch.linspace(1, 2, 5), {"w": self.w}, []

    def model(self, **batch):
        return SimpleNamespace(logits=self.w.expand(len(batch["input_ids"]), -1))

    def batches(self, chosen):
        labels = self.target.expand(len(chosen), -1)
        return [{"input_ids": list(chosen), "labels": labels}]

    def clipped_sum(self, chosen, max_grad_norm):
        self.asked.append(chosen)
        away = (self.w - self.target).detach()
        return {"w": len(chosen) * max_grad_norm * away / away.norm()}


def test_short_trainings_leave_the_held_out_rows_and_scale_with_the_clipping_norm():
    """SGD at rate / C on gradients and noise of C takes the steps of rate on those of 1."""
    for optimizer in ("sgd", "adam"):
        of_one, of_quarter = (
            measure_gap((text := Bowl()), optimizer, 0.05 * c, c, steps=4, rows=8).trials
            for c in (1.0, 0.25)
        )
        for row in text.asked:
            assert len({*row}) == 8 and 20 <= min(row) <= max(row) < 40  # 20 rows are held out
        assert len({i for row in text.asked for i in row}) > 8
        for one, quarter in zip(of_one, of_quarter, strict=True):
            unit = 0.25 if one.name.startswith("SGD") else 1.0
            with case(one.name, optimizer):
                assert [rate * unit for rate in quarter.rates] == pytest.approx(one.rates)
                np.testing.assert_allclose(quarter.scores, one.scores, rtol=1e-4)
                assert one.scores[0] > min(one.scores)


@pytest.fixture(scope="module")
def plan():
    """Return a plan of a short run of the tiny model, with its trials."""
    return make_plan(TrainConfig(**RUN), Measurement(public_rows=64, trial_steps=2))


def test_a_plan_states_the_noise_of_the_run(plan):
    from opacus.accountants.utils import get_noise_multiplier

    mechanism = GaussianMechanism.calibrate(2.0, plan.delta, 10, 128 / plan.num_units)
    assert plan.noise_multiplier == mechanism.noise_multiplier == plan.noise_std
    assert plan.noise_std_of_mean == pytest.approx(plan.noise_std / 128)
    assert "accountant: PLD" in plan.statement and plan.privacy == NO_RECORDS
    assert plan.statement.endswith(
        f"the number of examples ({plan.num_units:,}) is public; noise drawn from seed 0, as the "
        "samples are: reproducible, and not secret"
    )
    peer = get_noise_multiplier(
        target_epsilon=2.0,
        target_delta=plan.delta,
        sample_rate=plan.sample_rate,
        steps=10,
        accountant="prv",
    )
    assert plan.noise_multiplier == pytest.approx(peer, rel=0.02)
    assert plan.num_units == len(load_task("generated").train)


def test_a_plan_measures_public_text_as_a_naive_computation_does(plan):
    task = load_task("generated", seed=1)
    model, tokenizer = load_model("tiny", task=task, train_layers=1, seed=0)
    order = torch.randperm(len(task.train), generator=seeded(0))[:64].tolist()
    rows = encode([task.train[i] for i in order], tokenizer, kind=task.kind, max_length=128)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    loss = 0.0
    for _, batch in micro_batches(rows, 1, tokenizer.pad_token_id):
        model.zero_grad()
        value = model(**batch).loss
        value.backward()
        loss += float(value.detach()) / len(rows)
        norm = math.sqrt(sum(float(model.get_parameter(n).grad.square().sum()) for n in total))
        for name, into in total.items():
            into += model.get_parameter(name).grad * min(1.0, 1.0 / norm)
    first, last = plan.points
    assert first.loss == pytest.approx(loss, rel=0.1) and last.when == "after 2 steps"
    for layer in first.layers:
        clean = torch.linalg.svdvals(total[layer.name].detach()) * 128 / 64  # of the whole batch
        m, n = layer.shape
        with case(layer.name):
            assert layer.top_clean == pytest.approx(float(clean[0]), rel=1e-3)
            assert layer.edge == pytest.approx(plan.noise_std * (m**0.5 + n**0.5))
            threshold = plan.noise_std * (m * n) ** 0.25
            assert layer.visible_rank == int((clean > threshold).sum())
            energy = float(clean.square().sum())
            noisy = math.sqrt(energy / (energy + m * n * plan.noise_std**2))
            assert layer.alignment_noisy == pytest.approx(noisy, rel=0.02)
    assert first.gain.noise_std == plan.noise_std_of_mean and first.gain.noise_cost > 1
    assert first.loss != last.loss


def test_the_gap_is_that_of_the_arms(plan):
    gap = plan.gap
    names = [trial.name for trial in gap.trials]
    assert names == ["SGD without noise", "Adam with noise", "Adam without noise"]
    assert all(len(trial.scores) == 3 and trial.rate in trial.rates for trial in gap.trials)
    assert len({trial.scores[0] for trial in gap.trials}) == 1  # the same weights
    assert gap.ratio == steps_ratio(gap.trials[1].scores, gap.trials[2].scores)
    assert gap.adaptivity == steps_ratio(gap.trials[0].scores, gap.trials[2].scores)
    assert gap.saved == (gap.ratio and max(0.0, 1 - 1 / gap.ratio))
    for ratio, saved in ((2.0, 0.5), (0.8, 0.0), (None, None)):
        assert replace(gap, ratio=ratio).saved == saved
    for trial in gap.trials:  # two steps: medians of at most three scores
        first, second, _ = trial.scores
        medians = np.median([first, second]), np.median(trial.scores)
        assert trial.gain == pytest.approx(first - min(first, *medians))


def test_plan_command_prints_within_80_columns_and_refuses_bad_input(capsys, monkeypatch):
    call = partial(run_main, capsys)
    monkeypatch.setenv("COLUMNS", "80")
    words = ["plan", "--model", "tiny", "--task", "generated", "--batch-size", "64"]
    short = ["--epsilon", "3", "--train-layers", "1", "--public-rows", "16", "--trial-steps", "0"]
    code, out, err = call(*words, *short, "--scheme", "partial", "--option", "alpha=0.9")
    assert code == 0, err
    tables = [line for line in out.splitlines() if line.startswith((" ", "noisy", "partial", "-"))]
    assert len(tables) > 8 and max(map(len, tables)) <= 80
    assert any("alpha=0.9" in line for line in out.splitlines()) and NO_RECORDS in out
    code, out, _ = call(*words, *short, "--own-records", "--json")
    document = json.loads(out)
    assert code == 0 and document["privacy"] == NON_PRIVATE and document["gap"] is None
    assert document["steps"][0]["noise_cost"] >= 1
    for more, expected in (
        (["--optimizer", "adm"], ["optimizer", "did you mean 'adam'"]),
        (["--scheme", "optmal"], ["scheme", "did you mean 'optimal'"]),
        (["--scheme", "partial", "--option", "target=power-lw"], ["did you mean 'power-law'"]),
        (["--public", "colla"], ["did you mean 'cola'"]),
        (["--public", "generated-table"], ["public must be text for classification"]),
        (["--public", "generated", "--own-records"], ["public", "own_records"]),
        (["--trial-steps", "-1"], ["trial_steps"]),
        (["--batch-size", "0"], ["batch_size"]),
    ):
        assert_refused(call(*words, *short, *more), *expected)
    assert_refused(call(*words), "epsilon")
    assert_refused(call(*words, "--non-private"), "non_private")
    assert_refused(call(*words, *short, "--precondition", "generated"), "precondition")
    assert_refused(call(*words, *short, "--momentum-beta", "0.9"), "momentum_beta", "not predicted")
    assert_refused(call(*words, *short, "--disk-kappa", "0.7"), "disk_kappa")
    assert_refused(call(*words, *short, "--dropout"), "dropout", "not predicted")
    other = ["--optimizer", "muon", "--trial-steps", "2"]
    assert_refused(call(*words, *short, *other), "sgd, adam or adamw", "trial_steps")


def test_a_best_rate_at_the_end_of_its_grid_is_said(capsys, plan):
    """A better rate may lie beyond the end, so the ratio does not compare tuned trainings."""
    scores = (1.0, 0.5, 0.1)
    grids = (("noise", 0.03, (0.003, 0.01, 0.03)), ("low", 1.0, (1.0, 3.0)), ("in", 3.0, (1, 3, 9)))
    trials = tuple(Trial(name, rate, rates, scores) for name, rate, rates in grids)
    command._print_gap(Console(width=200), Gap(trials, 1.0, None), "public text")
    said = [line for line in capsys.readouterr().out.splitlines() if "end of its grid" in line]
    assert said == [
        f"{name}: best rate at the end of its grid {ends}: the ratio may be off"
        for name, ends in (("noise", "0.003 to 0.03"), ("low", "1 to 3"))
    ]
    document = json.loads(json.dumps(command._derived(plan)))
    assert document["rate_is_inside"] == {
        trial.name: sorted(trial.rates).index(trial.rate) not in (0, len(trial.rates) - 1)
        for trial in plan.gap.trials
    }
    assert command._derived(replace(plan, gap=None))["rate_is_inside"] is None


def test_a_plan_states_what_weakens_the_claim_of_the_run():
    """The statement of a plan is that of the run, with the same remarks."""
    config = TrainConfig(**RUN | {"membership": "half", "holdout": 20, "seed": None, "steps": 2})
    plan = make_plan(config, Measurement(public_rows=16, trial_steps=0))
    assert plan.statement == prepare(config, 0).statement(2)
    for words in ("neighbours are sets of members", "holdout are evaluated on", "AES-128-CTR"):
        assert words in plan.statement, words


def test_plan_command_says_when_there_is_no_ratio(capsys):
    words = ["plan", "--model", "tiny", "--task", "generated", "--batch-size", "8"]
    words += ["--noise-multiplier", "50", "--train-layers", "1", "--public-rows", "16"]
    code, out, err = run_main(capsys, *words, "--trial-steps", "1", "--trial-rows", "4")
    assert code == 0, err
    assert "no ratio: the score fell by" in out and "could save" not in out


def test_a_plan_reads_no_private_record_by_another_spelling(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    for split in ("train", "validation"):
        rows = [f"{split} {i},{i % 2}" for i in range(60)]
        (tmp_path / "mine" / f"{split}.csv").write_text("\n".join(["text,label", *rows]))
    monkeypatch.chdir(tmp_path)
    run = TrainConfig(**RUN | {"task": "mine", "batch_size": 8})
    for spelling in ("mine", "./mine", "mine/../mine", str(tmp_path / "mine")):
        with case(spelling), pytest.raises(ValueError, match="other text than the task's own"):
            make_plan(run, Measurement(public=spelling, trial_steps=0))


def other_texts(rows):
    return [row | {"sentence": f"they say: {row['sentence']}"} for row in rows]


def test_records_enter_a_plan_by_their_number_alone(tmp_path):
    """Other records of the same number give the same plan; fewer records give another one."""
    plans = []
    for name, change in (
        ("one", lambda rows: rows),
        ("other", lambda rows: [row | {"sentence": row["sentence"][::-1]} for row in rows]),
        ("fewer", lambda rows: rows[:-1]),
    ):
        task = write_reviews(tmp_path / name / "reviews", change)
        run = TrainConfig(**RUN | {"task": str(task), "batch_size": 8})
        plans.append(make_plan(run, Measurement(public="generated", public_rows=8, trial_steps=0)))
    one, other, fewer = (artifacts.to_jsonable(plan) for plan in plans)
    assert one == other and fewer["noise_std"] != one["noise_std"]
    words = "the records of reviews are read to choose and count the units"
    assert f"{words}; the plan's numbers" in one["description"]
    own = make_plan(run, Measurement(own_records=True, public_rows=8, trial_steps=0))
    assert words not in own.description
    public = str(write_reviews(tmp_path / "public", other_texts))
    compared = make_plan(run, Measurement(public=public, public_rows=8, trial_steps=0))
    assert f"{words}, and to refuse public text that is a copy" in compared.description


def test_a_copy_of_the_records_is_not_public_text(tmp_path):
    own, copied = (str(write_reviews(tmp_path / name)) for name in ("own", "copy"))
    config, task = TrainConfig(**RUN | {"task": own}), load_task(own)
    named = shutil.copy(f"{own}/train.jsonl", tmp_path / "generated.jsonl")
    for public in (own, copied, f"{own}/train.jsonl", f"{tmp_path}/./own", str(named)):
        message = refusal_of(load_public_text, config, task, public, False, 0)
        assert "own_records" in message and "\n" not in message, public


def test_rows_of_a_plan_are_padded_as_in_training():
    """Padding is a part of a row in a run with ``padding="max-length"``, kept outputs included."""
    config = TrainConfig(**RUN | {"padding": "max-length", "max_length": 24, "train_layers": 1})
    text = load_public_text(config, load_task(config.task), "", False, 0)
    assert text.prefix is not None
    rows = [i for i in range(8) if len(text.rows[i]["input_ids"]) < 24]
    assert rows and all(batch["input_ids"].shape[1] == 24 for batch in text.batches(rows))
    assert all(text.states[i].shape[0] == 24 for i in rows)
    longest = replace(config, padding="longest")
    other = load_public_text(longest, load_task(config.task), "", False, 0)
    assert all(batch["input_ids"].shape[1] < 24 for batch in other.batches(rows[:1]))


@pytest.mark.slow
def test_plans_of_own_spectra_agree_with_measured_alignment():
    """Random-matrix theory predicts from the task's own singular values; the noise is drawn."""
    config = replace(
        plan_check.SMALL, warm_steps=(0,), batch_size=128, noise_multipliers=(0.3, 0.9)
    )
    result = plan_check.run(config)
    own = np.abs(plan_check.errors(result)[-1])
    assert own.shape == (1, 2, len(SCHEMES), 2)
    assert own.mean() < 0.02 and own.max() < 0.1
    # public text of the task's own name is its validation split
    assert result.texts == ("generated", "generated") and result.losses[0] != result.losses[1]
    assert (result.predicted[0] != result.predicted[1]).any()
    assert "generated itself (NON-PRIVATE)" in " ".join(plan_check.headline(result))
    columns, rows = plan_check.table(result)
    assert len(rows) == 2 * len(SCHEMES) and {len(row) for row in rows} == {len(columns)}


def test_measured_gaps_come_with_the_configurations_of_their_runs(monkeypatch, tmp_path):
    steps = np.arange(13)

    def curve(speed):
        return 0.5 + 0.3 * (1 - np.exp(-steps / speed))

    config = replace(gap_configs.SMALL, epsilons=(1.0, 8.0), batch_sizes=(64, 128), num_seeds=2)
    private = np.zeros((1, 2, 2, 2, 2, 13))
    ceiling = np.zeros((1, 2, 2, 2, 13))
    private[...], ceiling[...] = curve(3.0), curve(3.0)
    adam = gap.BASELINES.index("DP-Adam")
    ceiling[:, :, adam] = curve(1.5)
    private[0, 1, 0] = np.nan  # a run that stopped is left out
    result = gap.Result(
        config=config,
        privacy="",
        description="",
        criterion="",
        failures=(),
        tuned=(),
        private=private,
        ceiling=ceiling,
        noise_multiplier=np.ones((2, 2)),
    )
    found = plan_gap.gap_settings(result)
    runs = [one.run for one in found]
    assert [(run.epsilon, run.batch_size, run.train_layers) for run in runs] == [
        (1.0, 64, 1),
        (8.0, 64, 1),
        (8.0, 128, 1),
    ]
    assert all(run.optimizer == "adam" for run in runs)
    assert found[0].name == "generated, last block, B = 64, epsilon 1"
    fresh = replace(config, base=replace(config.base, task="mrpc"), batch_sizes=(64,))
    fresh = replace(fresh, epsilons=(8.0,))
    second = replace(result, config=fresh, private=private[:, :1, 1:], ceiling=ceiling[:, :1] * 1.0)
    made = iter([2.0, None, 1.0, 1.6, 3.0, 2.1, 1.9, 1.0])
    asked = []

    def make_plan(run, measurement):
        asked.append((run.seed, measurement.public, measurement.own_records))
        return SimpleNamespace(gap=SimpleNamespace(ratio=next(made)))

    monkeypatch.setattr(plan_gap, "make_plan", make_plan)
    monkeypatch.setattr(gap, "run", lambda one: result if one == config else second)
    check = plan_gap.run(plan_gap.Config((config, fresh), seeds=(5,)))
    assert asked == [(5, "", False)] * 4 + [(5, "", True)] * 4
    assert check.settings[3] == "mrpc, last block, B = 64, epsilon 8"
    measured = float(gap.ratios(result)["noise, DP-Adam"].value[0, 0, 0])
    assert measured > 1.5 and check.measured == pytest.approx([measured] * 4)
    np.testing.assert_allclose(check.errors[1, :, 0], np.array([3.0, 2.1, 1.9, 1.0]) / measured - 1)
    lines = plan_gap.headline(check)
    within = [abs(one / measured - 1) <= 0.3 for one in (3.0, 2.1, 1.9, 1.0)]
    assert within == [False, True, True, False]  # too high, and too low
    assert lines[f"predictions within 30%, {plan_gap.OWN}"].startswith(f"{sum(within)} of 4;")
    assert "1 without a ratio" in lines["predictions within 30%, public generated text"]
    # a measured bound is no measurement, and has no error
    censored = replace(
        check,
        is_lower_bound=np.array([False, True, False, False]),
        is_upper_bound=np.array([False, False, False, True]),
    )
    assert np.isnan(censored.errors[:, [1, 3]]).all()
    np.testing.assert_array_equal(censored.errors[:, [0, 2]], check.errors[:, [0, 2]])
    lines = plan_gap.headline(censored)
    assert lines[f"predictions within 30%, {plan_gap.OWN}"].startswith("1 of 2;")
    assert "without a ratio" not in lines["predictions within 30%, public generated text"]
    left_out = lines["settings left out, since the measured ratio is only a bound"]
    assert left_out == f"{check.settings[1]}; {check.settings[3]}"
    every = replace(censored, is_lower_bound=np.full(4, True))
    assert "; mean relative error none" in "".join(plan_gap.headline(every).values())
    artifacts.save_result(check, tmp_path, "plan_gap")
    again = artifacts.load_result(tmp_path, "plan_gap", plan_gap.Result)
    assert plan_gap.table(again) == plan_gap.table(check) and plot_plan_gap(again).axes
    columns, rows = plan_gap.table(check)
    assert len(rows) == 4 and rows[1][2] == "none" and len(columns) == 4
    with pytest.raises(ValueError, match="trial_steps"):
        plan_gap.run(plan_gap.Config((config,), trial_steps=0))
