"""Attacks on a checkpoint from end to end: what they find, write and refuse."""

import csv
import functools
import json
import math
import random
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from scipy import optimize, stats
from sklearn.metrics import roc_auc_score, roc_curve

from lowrank_dp import membership
from lowrank_dp._rounding import rounded_up
from lowrank_dp.commands.mia import app
from lowrank_dp.data import IGNORE, Example, encode, load_task
from lowrank_dp.membership.manifest import read_manifest
from lowrank_dp.mia import (
    caching,
    compare,
    metrics,
    projection,
    quantile,
    records,
    rendering,
    requirements,
    shift,
    signals,
    units,
)
from lowrank_dp.mia import plan as planning
from lowrank_dp.mia import report as reports
from lowrank_dp.mia import target as targets
from lowrank_dp.mia.attack import Options, attack, load, open_target
from lowrank_dp.mia.checkpoint import load_checkpoint
from lowrank_dp.mia.loading import load_reference
from lowrank_dp.mia.plan import plan
from lowrank_dp.mia.report import bound_confidence, claimed_epsilon
from lowrank_dp.mia.shadows import (
    find_shadows,
    measure_shadows,
    shadow_configs,
    shadow_recipe,
    train_shadows,
)
from lowrank_dp.models import load_model, load_tokenizer
from lowrank_dp.models.precision import AUTOCAST_DTYPES
from lowrank_dp.models.targets import logits_at_targets
from lowrank_dp.plots.roc import plot_roc
from lowrank_dp.sweep import sweep
from lowrank_dp.theory import symmetry_score
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.config_checks import PRECISIONS
from lowrank_dp.train.loop import train
from tests.refusals import refused
from tests.tasks import case, film_reviews, run_command, write_jsonl

# A small pool and many steps, so that the checkpoint remembers its members. With this seed members
# have both labels equally often; otherwise a private model's preference for one label would leak.
OVERFIT = TrainConfig(
    model="tiny",
    task="generated",
    non_private=True,
    batch_size=40,
    steps=60,
    learning_rate=3e-3,
    max_examples=160,
    membership="bernoulli",
    seed=9,
    delta=1e-3,
    eval_every=60,
    snapshot_every=60,
    eval_examples=100,
)
TABLES = TrainConfig(
    model="tiny-llama",
    task="generated-table",
    method="lora",
    rank=8,
    non_private=True,
    batch_size=30,
    steps=4,
    learning_rate=2e-2,
    max_examples=120,
    membership="half",
    seed=5,
    eval_every=4,
    snapshot_every=4,
    eval_examples=20,
    generate=False,
)


pytestmark = pytest.mark.usefixtures("one_thread")


SHORT = replace(OVERFIT, steps=2, eval_every=2, snapshot_every=2, eval_examples=20)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A classifier and a causal language model after a few steps. Tests must not change them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    train(SHORT, folder / "short")
    train(TABLES, folder / "tables")
    return folder


@pytest.fixture(scope="module")
def overfit(tmp_path_factory):
    """A classifier that has memorised its members. Tests must not change it."""
    folder = tmp_path_factory.mktemp("overfit") / "overfit"
    train(OVERFIT, folder)
    return folder


def run(capsys, *arguments):
    return run_command(capsys, app, *arguments)


def test_signals_against_one_record_at_a_time(checkpoints):
    """The oracle computes losses and phi of target and reference from logits in float64."""
    target = open_target(checkpoints / "short", Options())
    task, examples = target.records.task, target.records.examples[:7]
    model, tokenizer = load_model(str(target.folder), task=task)
    reference = load_reference(target.folder, target.base, task)
    records = (tokenizer, task, examples)
    before = signals.measure_reference(reference, *records, max_length=128, batch_size=4)
    found = signals.measure(model, *records, max_length=128, batch_size=3, reference=before)
    assert len(before.log_p) == len(before.num_tokens) == 0
    for i, example in enumerate(examples):
        batch = tokenizer([example.text], return_tensors="pt")
        with torch.no_grad():
            for net, loss in ((model, found.loss), (reference, found.reference_loss)):
                p = net(**batch).logits.double().softmax(-1)[0, example.label]
                assert loss[i] == pytest.approx(-float(p.log()), rel=1e-4)
            p = model(**batch).logits.double().softmax(-1)[0, example.label]
            assert found.phi[i] == pytest.approx(float((p / (1 - p)).log()), rel=1e-3, abs=1e-4)


def test_signals_in_half_precision_against_one_record_at_a_time(checkpoints):
    """Under bf16, logits are rounded and scores are not."""
    losses = {}
    for precision in ("float32", "bf16"):
        options = Options(precision=precision)
        target = open_target(checkpoints / "tables", options)
        task, examples = target.records.task, target.records.examples[:5]
        model, tokenizer = load_model(str(target.folder), task=task)
        found = signals.measure(model, tokenizer, task, examples, batch_size=1, precision=precision)
        losses[precision] = found.loss
    rows = encode(examples, tokenizer, kind=task.kind)
    for row, loss in zip(rows, losses["bf16"], strict=True):
        batch = {name: torch.tensor([ids]) for name, ids in row.items()}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits, targets = logits_at_targets(model, batch)
        assert logits.dtype == torch.bfloat16
        want = torch.nn.functional.cross_entropy(logits.double(), targets[targets != IGNORE])
        assert loss == pytest.approx(float(want), rel=1e-9)
    assert (abs(losses["bf16"] / losses["float32"] - 1) > 1e-6).all()


def test_tokens_are_scored_in_parts(checkpoints, monkeypatch):
    target = open_target(checkpoints / "tables", Options())
    task, examples = target.records.task, target.records.examples[:5]
    model, tokenizer = load_model(str(target.folder), task=task)

    def measure():
        before = signals.measure_reference(model, tokenizer, task, examples)
        return before, signals.measure(model, tokenizer, task, examples, reference=before)

    whole = measure()
    monkeypatch.setattr(signals, "LOGITS_IN_CACHE", 3 * model.config.vocab_size)
    for found, wanted in zip(measure(), whole, strict=True):
        for field in fields(wanted):
            values = getattr(found, field.name)
            np.testing.assert_allclose(values, getattr(wanted, field.name), rtol=1e-12)


def test_signals_of_one_precision_are_not_read_as_those_of_another(checkpoints, tmp_path):
    found = {}
    for precision in ("float32", "bf16", "bf16"):
        options = Options(precision=precision, attacks=("loss",))
        attack(open_target(checkpoints / "tables", options), options, tmp_path)
        found[precision] = len(list(tmp_path.glob("*.npz")))
    # one file of the checkpoint, and one of the model before fine-tuning
    assert found == {"float32": 2, "bf16": 4}
    with pytest.raises(ValueError, match=r"precision must be .*did you mean 'bf16'"):
        Options(precision="bf17")
    report = attack(open_target(checkpoints / "tables", options), options, tmp_path)
    assert report.description.endswith("; attacked in bf16")


def test_signals_of_texts_token_by_token(checkpoints):
    target = open_target(checkpoints / "tables", Options())
    task, examples = target.records.task, target.records.examples[:5]
    model, tokenizer = load_model(str(target.folder), task=task)
    with model.disable_adapter():
        before = signals.measure_reference(model, tokenizer, task, examples, batch_size=3)
    found = signals.measure(model, tokenizer, task, examples, batch_size=2, reference=before)
    for i, example in enumerate(examples):
        prompt = (
            tokenizer(example.text, add_special_tokens=False)["input_ids"]
            + tokenizer("\n", add_special_tokens=False)["input_ids"]
        )
        answer = [
            *tokenizer(example.target, add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        logs = []
        with torch.no_grad():
            for t in range(len(answer)):
                ids = torch.tensor([prompt + answer[:t]])
                logs.append(float(model(ids).logits[0, -1].double().log_softmax(-1)[answer[t]]))
        assert found.loss[i] == pytest.approx(-np.mean(logs), rel=1e-4)
        worst = sorted(logs)[: max(1, int(0.2 * len(logs)))]
        assert found.min_k[i] == pytest.approx(np.mean(worst), rel=1e-4)
    with model.disable_adapter():
        base = signals.measure(model, tokenizer, task, examples, batch_size=5)
    np.testing.assert_allclose(found.reference_loss, base.loss, rtol=1e-4)
    assert len(base.error_zone) == 0 and len(found.error_zone) == len(examples)
    # the log-probabilities of one record, and the error zone made of them, token by token
    lengths = [
        len(tokenizer(e.target, add_special_tokens=False)["input_ids"]) + 1 for e in examples
    ]
    assert before.num_tokens.tolist() == lengths and before.log_p.shape == (sum(lengths),)
    for i, row in enumerate(encode(examples, tokenizer, kind=task.kind)):
        batch = {name: torch.tensor([ids]) for name, ids in row.items()}
        with torch.no_grad():
            logits, targets = logits_at_targets(model, batch)
            with model.disable_adapter():
                old, _ = logits_at_targets(model, batch)
        ids = targets[targets != IGNORE].tolist()
        changes = [
            float((new_token.log_softmax(-1) - old_token.log_softmax(-1))[token])
            for new_token, old_token, token in zip(logits.double(), old.double(), ids, strict=True)
            if int(new_token.argmax()) != token
        ]
        rises = sum(max(change, 0.0) for change in changes)
        assert found.error_zone[i] == pytest.approx(rises / sum(map(abs, changes)), rel=1e-3)
    assert len({*found.error_zone}) > 1


def test_checkpoints_of_one_base_share_its_signals(checkpoints, tmp_path, monkeypatch):
    """The base is measured once for two adapters, and once more for other records."""
    first, second = checkpoints / "tables", tmp_path / "second"
    scaled_adapter(first, second, 2.0)
    passes = []
    measure = signals.measure_reference
    monkeypatch.setattr(
        signals, "measure_reference", lambda *a, **k: passes.append(1) or measure(*a, **k)
    )

    def aucs(folder, **fields):
        options = Options(attacks=("base",), **fields)
        found = attack(open_target(folder, options), options, tmp_path / "cache")
        assert not found.unavailable  # of attacks that were not named
        return found.base.value, found.attacks[0].auc.value

    before, auc = aucs(first)
    again, other = aucs(second)
    assert len(passes) == 1 and before == again and auc != other
    assert aucs(second) == (again, other) and len(passes) == 1  # all signals are kept
    aucs(first, max_records=60)
    assert len(passes) == 2
    scaled_adapter(first, second, 3.0)
    aucs(second, batch_size=7)  # the last bits depend on the batch, and show an unchanged model
    assert len(passes) == 3


def test_an_adapter_as_base_is_measured_for_each_checkpoint(checkpoints, tmp_path):
    """Two adapters on one model are two models before fine-tuning."""
    task = open_target(checkpoints / "tables", Options()).records.task
    model, tokenizer = load_model("tiny-llama", task=task)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    for name, examples in (("in", task.train[:30]), ("out", task.train[30:60])):
        rows = [{"prompt": e.text, "target": e.target} for e in examples]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    found = []
    for number, cache in ((0.0, "one"), (9.0, "one"), (9.0, "two")):
        scaled_adapter(checkpoints / "tables", tmp_path / f"base{number}", number)
        options = Options(
            attacks=("base",),
            members=tmp_path / "in.jsonl",
            nonmembers=tmp_path / "out.jsonl",
            base=str(tmp_path / f"base{number}"),
        )
        report = attack(open_target(tmp_path / "tuned", options), options, tmp_path / cache)
        found.append(report.scores["base"])
    np.testing.assert_array_equal(found[1], found[2])
    assert np.abs(found[0] - found[1]).max() > 1e-3


def scaled_adapter(source, folder, factor):
    """Copy an adapter's checkpoint, with all its weights times ``factor``."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    weights = load_file(folder / "adapter_model.safetensors")
    scaled = {name: factor * weight for name, weight in weights.items()}
    save_file(scaled, folder / "adapter_model.safetensors")


def test_the_key_of_a_base_is_that_of_its_weights_and_rows():
    task = load_task("generated-table", max_examples=40)
    plain, tokenizer = load_model("tiny-llama", task=task)
    rows = encode(task.train[:4], tokenizer, kind=task.kind)
    arguments = {"precision": "float32", "batch_size": 64}

    def key(model=plain, rows=rows, **others):
        return caching.reference_key(model, rows, {**arguments, **others})

    adapted, _ = load_model("tiny-llama", task=task, method="lora", rank=2)
    wanted = key()
    assert key(adapted) == wanted
    keys = [key(rows=rows[::-1]), key(precision="bf16"), key(batch_size=1), key(pad_to=9)]
    plain.config.rms_norm_eps *= 2
    keys.append(key())
    plain.config.rms_norm_eps /= 2
    layers = plain.model.layers
    layers[0], layers[1] = layers[1], layers[0]  # the same tensors in other places
    keys.append(key())
    layers[0], layers[1] = layers[1], layers[0]
    assert key() == wanted
    with torch.no_grad():
        plain.model.norm.weight[0] += 1
    keys.append(key())
    keys.append(key(plain.bfloat16()))
    assert len({wanted, *keys}) == len(keys) + 1


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_gradient_norms_against_autograd(checkpoints, precision):
    target = open_target(checkpoints / "short", Options())
    task, examples = target.records.task, target.records.examples[:4]
    model, tokenizer = load_model(str(target.folder), task=task)
    half = precision == "bf16"
    found = signals.gradient_norms(
        model, tokenizer, task, examples, batch_size=1 if half else 3, precision=precision
    )
    for i, example in enumerate(examples):
        model.zero_grad()
        batch = tokenizer([example.text], return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(**batch, labels=torch.tensor([example.label])).loss
        loss.backward()
        norm = (
            sum(
                float(p.grad.square().sum())
                for p in model.parameters()
                if p.requires_grad and p.grad is not None
            )
            ** 0.5
        )
        # autograd rounds a weight's gradient to bf16, and book-keeping does not
        assert found[i] == pytest.approx(norm, rel=2e-3 if half else 1e-4)
    if half:
        single = signals.gradient_norms(model, tokenizer, task, examples, batch_size=3)
        assert (abs(found / single - 1) > 1e-5).any()
    with pytest.raises(ValueError, match=r"precision must be .*did you mean 'bf16'"):
        signals.gradient_norms(model, tokenizer, task, examples, precision="bf17")
    assert tuple(AUTOCAST_DTYPES) == PRECISIONS  # the options' names are kept where torch is not


@pytest.mark.slow
def test_an_overfitted_checkpoint_leaks_and_a_private_one_does_not(overfit, tmp_path, capsys):
    code, out, err = run(
        capsys,
        "--model",
        overfit,
        "--output",
        tmp_path / "a",
        "--white-box",
        "--json",
    )
    document = json.loads(out)
    assert code == 0 and document["verdict"] == "LEAKS" and "NON-PRIVATE" in document["label"]
    assert document["sampling"] == "bernoulli" and document["base"]["ci"][0] < 0.5
    by_name = {one["name"]: one for one in document["attacks"]}
    assert document["primary"] == "base" and by_name["base"]["auc"]["ci"][0] > 0.55
    assert by_name["gradient"]["auc"]["value"] > 0.5 and "single run" in err
    assert by_name["base"]["tpr"]["0.001"] is None, "too few non-members for that rate"
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {
        "report.json",
        "scores.csv",
        "summary.md",
        "roc.png",
        "roc.pdf",
    }
    rows = list(csv.DictReader((tmp_path / "a" / "scores.csv").open()))
    assert [row["id"] for row in rows] == document["ids"]
    inside = np.array([float(r["base"]) for r in rows if r["is_member"] == "1"])
    outside = np.array([float(r["base"]) for r in rows if r["is_member"] == "0"])
    pairs = (inside[:, None] > outside).mean() + (inside[:, None] == outside).mean() / 2
    assert by_name["base"]["auc"]["value"] == pytest.approx(pairs)

    private = replace(OVERFIT, non_private=False, epsilon=0.5)
    train(private, tmp_path / "private")
    report = attack(open_target(tmp_path / "private", Options()), Options(), tmp_path / "cache")
    low, high = next(one.auc.ci for one in report.attacks if one.name == "base")
    assert low < 0.5 < high and not report.contradiction


@pytest.mark.slow
def test_shadows_follow_the_recipe_and_are_trained_once(tmp_path, monkeypatch):
    train(SHORT, tmp_path / "target")
    # with this seed each of the 40 records is left out by one of the 3 shadows
    options = Options(
        num_shadows=3, engine="sequential", primary="lira-offline", max_records=40, seed=361
    )
    target = open_target(tmp_path / "target", options)
    report = attack(target, options, tmp_path)
    assert report.num_shadows == 3 and "rmia-offline" in {one.name for one in report.attacks}
    seeds = [config.seed for config in shadow_configs(target.recipe, 10, options.seed)]
    assert len(set(seeds)) == 10 and target.recipe.seed not in seeds

    monkeypatch.setattr("lowrank_dp.train.loop.prepare", None)  # nothing is trained again
    found = replace(options, num_shadows=0, shadow_dir=tmp_path / "shadows")
    again = attack(target, found, tmp_path / "other")
    np.testing.assert_allclose(
        again.scores["lira-offline"], report.scores["lira-offline"], rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"differ in learning_rate: 0.5 / 0.003"):
        find_shadows(replace(target.recipe, learning_rate=0.5), 0, tmp_path / "shadows")
    shutil.copytree(tmp_path / "target", tmp_path / "shadows" / "target")
    with pytest.raises(ValueError, match=r"shadow target must .* of the target, so it is the same"):
        attack(target, found, tmp_path / "other")
    shutil.rmtree(tmp_path / "shadows" / "target")
    one = next(path.parent for path in (tmp_path / "shadows").glob("*/membership.json"))
    shutil.copytree(one, tmp_path / "shadows" / "zz")
    with pytest.raises(ValueError, match=rf"shadow zz must .* of shadow {one.name}, so it is the"):
        attack(target, found, tmp_path / "other")
    shutil.rmtree(tmp_path / "shadows" / "zz")
    with pytest.raises(ValueError, match=r"'lira-offline' can't be made.*train more shadows"):
        attack(target, replace(options, num_shadows=1), tmp_path)


@pytest.mark.slow
def test_shadows_train_on_the_data_and_the_base_that_the_attack_reads(tmp_path, capsys):
    """The path that training.json names is gone."""
    write_jsonl(tmp_path / "own.jsonl", film_reviews(160))
    config = replace(SHORT, task=str(tmp_path / "own.jsonl"), max_examples=None, holdout=20)
    train(config, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    data = (tmp_path / "own.jsonl").rename(tmp_path / "elsewhere" / "own.jsonl")
    words = "--model", tmp_path / "run", "--data-dir", data, "--shadows", "2", "--engine"
    words = *words, "sequential", "--attacks", "loss", "--output", tmp_path / "out"
    code, out, err = run(capsys, *words)
    assert code == 0 and "2 shadows" in out, err
    shadows = tmp_path / "out" / "cache" / "shadows"
    for path in shadows.glob("*/training.json"):
        assert json.loads(path.read_text())["config"]["task"] == str(data)
    # found shadows that name the data's new place, and a copy of one that names the old place
    words = "--model", tmp_path / "run", "--data-dir", data, "--shadow-dir", shadows
    assert run(capsys, *words, "--dry-run")[0] == 0
    for path in shadows.glob("*/*.json"):
        path.write_text(path.read_text().replace(str(data), str(tmp_path / "own.jsonl")))
    assert run(capsys, *words, "--dry-run")[0] == 0


def test_the_recipe_of_a_shadow_follows_no_path_of_the_checkpoint(
    checkpoints, tmp_path, capsys, monkeypatch
):
    """What is missing is refused before the first forward pass, and in a dry run."""
    monkeypatch.setattr("lowrank_dp.mia.attack.load", None)  # a forward pass would be a TypeError
    target = open_target(checkpoints / "short", Options())
    asked = Options(num_shadows=2, base="tiny", data_dir=tmp_path)
    gone = replace(target.recipe, task="/gone/own.csv", model="/gone/m", prefix_cache="/gone/c")
    moved_target = replace(target, result=replace(target.result, config=gone))
    found = shadow_recipe(moved_target, asked)
    assert (found.task, found.model, found.prefix_cache) == (str(tmp_path), "tiny", "")
    off = replace(target.recipe, prefix_cache="off")
    off_target = replace(target, result=replace(target.result, config=off))
    assert shadow_recipe(off_target, Options(num_shadows=2)).prefix_cache == "off"
    assert shadow_recipe(target, Options(num_shadows=2)) == target.recipe

    (public := tmp_path / "public.csv").write_text("no records\n")
    for changes, words in (
        ({"model": "/gone/model"}, "shadows can't be trained here: model must"),
        ({"device": "cuda:77"}, "shadows can't be trained here: device must"),
        ({"precondition": str(public)}, "can't be trained here: precondition '.*can't be read"),
    ):
        config = replace(target.recipe, **changes)
        other = replace(target, result=replace(target.result, config=config))
        options = Options(num_shadows=2)
        refused(words, plan, [other], options)
        refused(words, attack, other, options, tmp_path)
    write_jsonl(tmp_path / "out.jsonl", film_reviews(30))
    words = "--model", checkpoints / "short", "--nonmembers", tmp_path / "out.jsonl"
    code, _, err = run(capsys, *words, "--shadows", "2")
    assert code == 2 and "shadows need the records of membership.json" in err


def test_a_run_reads_a_named_task_from_the_folder_that_it_is_given(tmp_path, monkeypatch):
    """The folder precedes LOWRANK_DP_DATA, for the runs of a sweep too."""
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    for name, count in (("train", 80), ("validation", 20)):
        rows = [{"sentence": f"text {i} {name}", "label": i % 2, "idx": i} for i in range(count)]
        write_jsonl(tmp_path / "glue" / "sst2" / f"{name}.jsonl", rows)
    monkeypatch.delenv("LOWRANK_DP_DATA", raising=False)
    config = replace(SHORT, task="sst2", max_examples=None)
    (outcome,) = sweep([config], tmp_path / "runs", engine="sequential", data_dir=tmp_path)
    assert outcome.result is not None, outcome.error
    assert "of 80 examples" in outcome.result.description
    options = Options(num_shadows=2, data_dir=tmp_path)
    seen = []
    monkeypatch.setattr("lowrank_dp.mia.shadows.sweep", lambda *a, **k: seen.append(k) or [])
    train_shadows(config, 2, tmp_path, data_dir=options.data_dir)
    train_shadows(replace(config, task=str(tmp_path)), 2, tmp_path, data_dir=options.data_dir)
    assert [one["data_dir"] for one in seen] == [tmp_path, None]


@pytest.mark.slow
def test_comparing_checkpoints_on_the_same_records(checkpoints, tmp_path, capsys):
    train(replace(OVERFIT, steps=5), tmp_path / "shorter")
    train(replace(OVERFIT, method="lora", steps=5), tmp_path / "lora")
    code, out, _ = run(
        capsys,
        "--model",
        checkpoints / "short",
        "--compare",
        tmp_path / "shorter",
        "--compare",
        tmp_path / "lora",
        "--output",
        tmp_path / "out",
        "--json",
    )
    comparison = json.loads(out)["comparison"]
    assert code == 0 and [p["steps"] for p in comparison["points"]] == [2, 5, 5]
    aucs = [p["auc"]["value"] for p in comparison["points"]]
    for paired, value in zip(comparison["paired"], aucs[1:], strict=True):
        assert paired["difference"] == pytest.approx(value - aucs[0])
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        "compare.json",
        "compare.csv",
        "compare.md",
        "compare.tex",
        "report.json",
    }

    shutil.copytree(tmp_path / "shorter", tmp_path / "headless")
    (tmp_path / "headless" / "initial_head.safetensors").unlink()
    code, out, err = run(
        capsys,
        "--model",
        checkpoints / "short",
        "--compare",
        tmp_path / "headless",
        "--output",
        tmp_path / "no",
    )
    assert code == 2 and "name one with --primary" in err and err.count("\n") == 1
    # the attack may have taken hours, so its report is kept
    assert (tmp_path / "no" / "report.json").exists() and "verdict" in out
    assert not (tmp_path / "no" / "compare.json").exists()


def test_checkpoints_that_cannot_be_compared_are_refused_before_an_attack(
    checkpoints, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("lowrank_dp.mia.attack.attack", None)  # an attack would be a TypeError
    shutil.copytree(checkpoints / "short", tmp_path / "unknown")
    (tmp_path / "unknown" / "training.json").unlink()
    for other, more, words in (
        (checkpoints / "tables", [], "train both with one --seed"),
        (tmp_path / "unknown", [], "must hold training.json"),
        (checkpoints / "short", ["--attacks", "projection"], "it needs a recipe with"),
    ):
        with case(other, *more):
            code, _, err = run(
                capsys, "--model", checkpoints / "short", "--compare", other, "--dry-run", *more
            )
            assert code == 2 and words in err and err.count("\n") == 1, err


def test_compared_checkpoints_have_one_metric_of_utility():
    """A run with --no-generate has no BLEU; the losses of both runs are then compared."""
    truth, scores = np.arange(40) < 20, np.random.default_rng(0).normal(size=40)
    by_name = {
        "generated": {"loss": 2.0, "perplexity": 7.4, "bleu": 30.0},
        "plain": {"loss": 3.0, "perplexity": 20.0},
        "bare": {"loss": 4.0},
    }

    examples = [SimpleNamespace(id=str(i)) for i in range(40)]

    def target(name, is_member=truth, examples=examples):
        task = SimpleNamespace(metrics=("bleu", "perplexity"))
        records = SimpleNamespace(task=task, unit="example", is_member=is_member, examples=examples)
        trained = SimpleNamespace(curve=(by_name[name],), config=TABLES, train_loss=1.0)
        return SimpleNamespace(
            folder=SimpleNamespace(name=name),
            records=records,
            trained=trained,
        )

    report = SimpleNamespace(
        primary="loss",
        scores={"loss": scores},
        counted={"loss": (scores, truth)},
        attacks=[SimpleNamespace(name="loss", auc=metrics.auc(scores, truth))],
    )
    for names, metric, values in (
        (["generated", "generated"], "bleu", [30.0, 30.0]),
        (["generated", "plain"], "perplexity", [7.4, 20.0]),
        (["plain", "generated"], "perplexity", [20.0, 7.4]),
        (["generated", "plain", "bare"], "loss", [2.0, 3.0, 4.0]),
    ):
        with case(*names):
            found = compare.compare([*map(target, names)], [report] * len(names))
            assert found.utility_name == metric
            assert [point.utility for point in found.points] == values
            columns, rows = compare.table(found)
            higher = "higher" if metric == "bleu" else "lower"
            assert columns[4] == f"{metric} ({higher} is better)"
            assert [float(row[4]) for row in rows] == values
            assert rows[0][-1] == "one method" and "of two methods" in compare.notes(found)[-1]
    # the function itself refuses a pairing of other records or members
    for other in (target("plain", is_member=~truth), target("plain", examples=examples[::-1])):
        refused(
            "train both with one --seed", compare.compare, [target("plain"), other], [report] * 2
        )


@pytest.mark.slow
def test_rows_that_were_sampled_together_count_once(tmp_path):
    grouped = replace(TABLES, unit="group", method="full", steps=1, batch_size=10)
    train(grouped, tmp_path / "grouped")
    target = open_target(tmp_path / "grouped", Options())
    report = attack(target, Options(), tmp_path / "cache")
    groups = {
        (e.group, bool(m))
        for e, m in zip(target.records.examples, target.records.is_member, strict=True)
    }
    assert len(groups) < len(report.is_member)
    # the curve is that of the groups' mean scores, from which the AUC is computed
    drawn = plot_roc(report).axes[0].lines
    lines = {line.get_label().split()[0].rstrip("*"): line for line in drawn}
    for one in report.attacks:
        means, inside = units.unit_scores(
            report.scores[one.name], target.records.examples, report.is_member
        )
        fpr, _, _ = roc_curve(inside, means, drop_intermediate=False)
        assert one.auc.value == pytest.approx(roc_auc_score(inside, means))
        assert {*lines[one.name].get_xdata()} <= {*fpr}, one.name
    counts = report.attacks[0].epsilon
    assert counts.num_members + counts.num_nonmembers == sum(
        (n + 1) // 2 for n in np.bincount([m for _, m in groups])
    )


@pytest.mark.slow
def test_one_step_with_a_frozen_a_gives_every_record_away(tmp_path, capsys):
    """arXiv 2601.21719 from a checkpoint: B A is symmetric with the true gradient sum alone."""
    members = len(load_task("generated", max_examples=60).train) // 2
    recipe = replace(
        OVERFIT,
        method="lora-frozen-a",
        rank=2,
        optimizer="sgd",
        steps=1,
        membership="half",
        max_examples=60,
        batch_size=members,
        learning_rate=0.1,
    )
    train(recipe, tmp_path / "step")
    options = Options(attacks=("projection",), primary="projection")
    target = open_target(tmp_path / "step", options)
    report = attack(target, options, tmp_path / "cache")
    assert report.attacks[0].auc.value == 1.0

    task, examples = target.records.task, target.records.examples
    model = load_reference(target.folder, target.base, task)
    _, tokenizer = load_model("tiny", task=task)
    layer, released = projection._released_product(target.folder / "adapter_model.safetensors")
    weight = model.get_parameter(f"{layer}.weight")
    loss = sum(
        model(**tokenizer([e.text], return_tensors="pt"), labels=torch.tensor([e.label])).loss
        for e, member in zip(examples, target.records.is_member, strict=True)
        if member
    )
    truth = torch.autograd.grad(loss, weight)[0].double().numpy()
    product = released @ truth.T
    assert np.linalg.norm(product - product.T) < 1e-5 * np.linalg.norm(product)

    code, _, err = run(
        capsys,
        "--model",
        tmp_path / "step",
        "--attacks",
        "projection",
        "--max-records",
        "40",
        "--output",
        tmp_path / "out",
    )
    assert code == 2 and "every record" in err and err.count("\n") == 1


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A GPT-2 of one block with random weights, whose layers are Conv1D."""
    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), load_tokenizer("tiny-llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=len(tokenizer),
                n_embd=16,
                n_layer=1,
                n_head=2,
                n_positions=128,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
            )
        ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_gradients_of_a_conv1d_are_those_of_the_same_linear_layer(gpt2):
    task = load_task("generated-table", max_examples=40)
    examples, scores = task.train[:4], {}
    for layer in ("transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"):
        for kind in ("Conv1D", "Linear"):
            model, _ = load_model(str(gpt2), task=task)
            if kind == "Linear":
                old = model.get_submodule(layer)
                new = torch.nn.Linear(*old.weight.shape)
                with torch.no_grad():
                    new.weight.copy_(old.weight.T)
                    new.bias.copy_(old.bias)
                model.set_submodule(layer, new)
            records = task, examples, {"model": str(gpt2)}
            total = sum(projection._gradients(model, layer, *records, None, None))
            a = np.random.default_rng(0).normal(size=(2, total.shape[1]))
            other = np.random.default_rng(1).normal(size=total.shape)
            released = total @ a.T @ a
            scores[kind] = [symmetry_score(released, g) for g in (total, other)]
            assert total.shape == (16, 16 if "attn" in layer else 64), (layer, kind)
        assert scores["Conv1D"] == pytest.approx(scores["Linear"], rel=1e-4, abs=1e-12), layer
        assert scores["Conv1D"][0] < 1e-12 < 0.01 < scores["Conv1D"][1], layer


@pytest.mark.parametrize("layer", ["attn.c_proj", "mlp.c_proj"])
def test_one_step_with_a_frozen_a_on_gpt2_gives_every_record_away(gpt2, tmp_path, layer):
    """PEFT's B A is (out, in), and the weights of GPT-2's layers are (in, out)."""
    members = len(load_task("generated-table", max_examples=80).train) // 2
    recipe = replace(
        TABLES,
        model=str(gpt2),
        method="lora-frozen-a",
        rank=2,
        target_modules=(layer,),
        optimizer="sgd",
        steps=1,
        eval_every=1,
        max_examples=80,
        batch_size=members,
        learning_rate=0.1,
    )
    train(recipe, tmp_path / "step")
    target = open_target(tmp_path / "step", Options(base=str(gpt2)))
    found = projection.projection_scores(
        target.folder,
        target.base,
        target.records.task,
        target.records.examples,
        target.records.is_member,
        max_length=target.max_length,
    )
    assert roc_auc_score(target.records.is_member, found) == 1.0


def test_the_projection_attack_names_what_its_recipe_lacks(checkpoints):
    options = Options(attacks=("projection",))
    target = open_target(checkpoints / "short", options)
    with pytest.raises(
        ValueError,
        match=r"method 'lora-frozen-a', optimizer 'sgd', steps 1.*"
        r"batch_size the number of members",
    ):
        attack(target, options, checkpoints / "cache")


def test_the_predicted_quantile_is_that_of_a_known_law():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (4000, 1))
    phi = 2 * x[:, 0] + rng.standard_normal(4000)
    found = quantile.predicted_quantile(x[:2000], phi[:2000], x[2000:])
    assert np.mean(phi[2000:] < found) == pytest.approx(quantile.QUANTILE, abs=0.03)
    right = 2 * x[2000:, 0] + stats.norm.ppf(quantile.QUANTILE)
    assert np.abs(found - right).mean() < 0.3


@pytest.mark.slow
def test_the_quantile_attack_and_a_file_of_its_population(overfit, tmp_path, capsys):
    target = open_target(overfit, Options())
    report = attack(target, Options(), tmp_path / "cache")
    by_name = {one.name: one for one in report.attacks}
    assert by_name["quantile"].auc.value > 0.5, "members are more confident than predicted"

    members = target.records.examples
    lines = [json.dumps({"text": f"one more text, number {i}", "label": i % 2}) for i in range(120)]
    (tmp_path / "public.jsonl").write_text("\n".join(lines))
    given = open_target(overfit, Options(population=tmp_path / "public.jsonl"))
    assert len(given.population) == 120
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:99]))
    few = Options(population=tmp_path / "few.jsonl", attacks=("quantile",))
    with pytest.raises(ValueError, match="it needs 100 records in no model, got 99"):
        attack(open_target(overfit, few), few, tmp_path / "cache")
    (tmp_path / "both.jsonl").write_text(
        json.dumps({"text": members[3].text, "label": members[3].label}) + "\n" + lines[0]
    )
    code, _, err = run(capsys, "--model", overfit, "--population", tmp_path / "both.jsonl")
    assert code == 2 and "under attack, 1 are in" in err and err.count("\n") == 1


def test_permuted_membership_has_an_auc_of_one_half(checkpoints, tmp_path):
    report = attack(open_target(checkpoints / "short", Options()), Options(), tmp_path)
    # the scores are -loss and before - loss; a low loss before fine-tuning speaks for a member
    before = report.scores["base"] - report.scores["loss"]
    assert report.base.value == pytest.approx(roc_auc_score(report.is_member, -before))
    low, high = report.control.ci
    assert low < 0.5 < high
    permuted = np.random.default_rng(0).permutation(report.is_member)
    assert report.control.value == pytest.approx(roc_auc_score(permuted, report.scores["base"]))
    # the mean of 400 AUCs of standard deviation .046 is off .5 by .01 with probability 1e-5
    many = [
        roc_auc_score(
            np.random.default_rng(seed).permutation(report.is_member), report.scores["base"]
        )
        for seed in range(400)
    ]
    assert np.mean(many) == pytest.approx(0.5, abs=0.01)


def test_a_rate_needs_as_many_others_as_hold_one_false_positive():
    for rate, needed in (("0.01", "100"), ("0.03", "34"), ("0.3", "4"), ("0.0007", "1,429")):
        row = rendering._tpr(SimpleNamespace(tpr={rate: None}), rate)
        assert row == [f"n/a (needs {needed} out)", ""], rate
        count = int(needed.replace(",", ""))
        assert metrics.tpr_at_fpr(range(count + 1), [True] + [False] * count, float(rate)).fp == 1
        with pytest.raises(ValueError, match="non-members"):
            metrics.tpr_at_fpr(range(count), [True] + [False] * (count - 1), float(rate))


def test_the_population_holds_no_text_of_the_run():
    """The population has no text of the manifest, attacked or not, in any spelling."""
    validation = tuple(Example(f"v/{i}", text) for i, text in enumerate(["a b", "c", "d"]))
    some = SimpleNamespace(
        examples=(Example("t/0", "A  B"),), task=SimpleNamespace(splits={"validation": validation})
    )
    known = [Example("t/1", "C").content_hash]
    assert targets._population(some, Options(), known) == validation[2:]
    assert targets._population(some, Options(), ()) == validation[1:]
    for names, needed in ((("base", "zlib"), False), (("base", "rmia-offline"), True)):
        found = targets._population(some, Options(attacks=names), known)
        assert found == (validation[2:] if needed else ())
    # the primary attack is one of the named attacks
    wanted = Options(attacks=("loss",), primary="quantile")
    assert targets._population(some, wanted, known) == validation[2:]


def test_signals_are_cached_by_everything_that_they_depend_on():
    task = load_task("generated-table", max_examples=40)
    model, tokenizer = load_model("tiny-llama", task=task, method="lora", rank=2)
    plain, _ = load_model("tiny-llama", task=task)
    rows, encoding = encode(task.train[:4], tokenizer, kind=task.kind), {"max_length": 8}

    def key(**changes):
        arguments = {"model": model, "tokenizer": tokenizer, "rows": rows, "encoding": encoding}
        return caching.signals_key(**(arguments | changes))

    wanted = key()
    again, other = load_model("tiny-llama", task=task, method="lora", rank=2)
    assert key(model=again, tokenizer=other) == wanted
    keys = [wanted, key(rows=rows[::-1]), key(encoding={"max_length": 9})]
    keys += [key(model=plain), key(reference=model), key(reference=plain)]
    names = ["embed_tokens.weight", "q_proj.lora_B.default.weight", "q_proj.base_layer.weight"]
    for name in names:  # of the base and of the adapter
        weight = next(p for full, p in again.named_parameters() if full.endswith(name))
        with torch.no_grad():
            weight[0, 0] += 1
        keys.append(key(model=again))
    again.peft_config["default"].lora_alpha *= 2
    keys.append(key(model=again))
    with torch.no_grad():
        plain.model.norm.weight[0] += 1
    keys.append(key(reference=plain))
    other.add_tokens(["new"])
    keys.append(key(tokenizer=other))
    assert len(set(keys)) == len(keys)


def test_signals_of_a_shadow_on_another_base_are_not_read(checkpoints, tmp_path, monkeypatch):
    """An adapter's folder holds no weights of its base."""
    target = open_target(checkpoints / "tables", Options())
    arguments = {"encoding": {"precision": "float32"}, "batch_size": 8, "device": "cpu"}
    records = target.records.task, target.records.examples[:4], ()

    def losses():
        found = measure_shadows([target.folder], *records, cache=tmp_path, **arguments)
        return found.loss

    before = losses()
    np.testing.assert_array_equal(losses(), before)
    assert len(list(tmp_path.glob("*.npz"))) == 1  # read, and not measured again

    def other_base(*arguments, **options):
        model, tokenizer = load_checkpoint(*arguments, **options)
        with torch.no_grad():
            model.get_base_model().model.norm.weight.mul_(1.5)
        return model, tokenizer

    monkeypatch.setattr("lowrank_dp.mia.shadows.load_checkpoint", other_base)
    assert np.abs(losses() - before).max() > 1e-3


def test_the_hash_of_a_folder_has_every_file_of_weights_and_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "best.model").mkdir()
    hashes = [caching.weight_hash(tmp_path)]
    for name in ("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "model.gguf"):
        for text in ("{}", "{} "):
            (tmp_path / name).write_text(text)
            hashes.append(caching.weight_hash(tmp_path))
    (tmp_path / "training.json").write_text("{}")
    assert len(set(hashes)) == len(hashes) and caching.weight_hash(tmp_path) == hashes[-1]


def test_the_one_run_audit_needs_every_record_and_independent_members(checkpoints, tmp_path):
    options = Options(primary="loss", guesses=40)
    for folder, asked in (("tables", options), ("short", replace(options, max_records=60))):
        with case(folder), pytest.raises(ValueError, match="guesses of the one-run audit need"):
            load(open_target(checkpoints / folder, asked), asked)
    report = attack(open_target(checkpoints / "short", options), options, tmp_path)
    correct = metrics.one_run_correct(
        report.scores["loss"], report.is_member, 40, np.random.default_rng(0)
    )
    assert report.one_run_epsilon == metrics.one_run_epsilon(
        len(report.ids), 40, correct, delta=report.delta, confidence=report.bound_confidence
    )
    document = rendering.as_json(report)  # the keys are the names of the fields
    assert document["sampling"] == "bernoulli" and document["base"]["value"] == report.base.value
    assert document["format"]["origin"] == "membership.json"


def test_the_guesses_of_the_audit_are_at_most_the_units(checkpoints, capsys, monkeypatch):
    """Too many guesses are refused before a forward pass, and in a dry run."""
    monkeypatch.setattr(signals, "measure", None)  # a forward pass would be a TypeError
    options = Options(guesses=40)
    target = open_target(checkpoints / "short", options)
    count = len(target.records.examples)
    for more in ([], ["--dry-run"]):
        words = ["--model", checkpoints / "short", "--guesses", count + 1, *more]
        with case(*words):
            code, _, err = run(capsys, *words)
            assert code == 2 and f"guesses must be at most {count}, the number of" in err
    # rows that were sampled as one group are one unit
    examples = tuple(replace(e, group=str(i // 2)) for i, e in enumerate(target.records.examples))
    is_member = np.arange(count) % 4 < 2
    grouped = replace(target.records, examples=examples, is_member=is_member, unit="group")
    units = (count + 1) // 2
    for guesses, unwanted in ((units, False), (units + 1, True)):
        reason = requirements.one_run_unavailable(
            replace(target, records=grouped), replace(options, guesses=guesses)
        )
        assert bool(reason) == unwanted, (guesses, reason)


def test_a_named_attack_without_its_population_is_refused_before_a_forward_pass(checkpoints):
    target = open_target(checkpoints / "short", Options())
    for name, more in (("quantile", {}), ("rmia", {"num_shadows": 2})):
        options = Options(attacks=(name,), **more)
        with case(name), pytest.raises(ValueError, match=f"'{name}' can't be made.*--population"):
            load(replace(target, population=()), options)


def test_training_json_of_another_run_is_refused(checkpoints, tmp_path, capsys):
    shutil.copytree(checkpoints / "short", tmp_path / "mixed")
    document = json.loads((tmp_path / "mixed" / "training.json").read_text())
    document["config"]["learning_rate"] = 0.5
    (tmp_path / "mixed" / "training.json").write_text(json.dumps(document))
    code, _, err = run(capsys, "--model", tmp_path / "mixed")
    assert code == 2 and "of one run, they differ in learning_rate" in err


def test_a_checkpoint_from_before_a_field_was_there(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "short", tmp_path / "old")
    for name, config in (("training.json", "config"), ("membership.json", "recipe")):
        path = tmp_path / "old" / name
        document = json.loads(path.read_text())
        del document[config]["shard"], document[config]["compile"]
        path.write_text(json.dumps(document))
    assert open_target(tmp_path / "old", Options()).trained.config.shard is False


def claiming(source, folder, **claim):
    """Copy a checkpoint, whose training.json then makes another claim."""
    shutil.copytree(source, folder)
    document = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(document | claim))
    return folder


def test_a_bound_above_the_accountant_is_a_contradiction(checkpoints, tmp_path, capsys):
    # the epsilon is below every bound, since a bound is never negative
    lying = claiming(checkpoints / "short", tmp_path / "lying", epsilon=-1.0, privacy="a claim")
    code, out, _ = run(capsys, "--model", lying, "--output", tmp_path / "out")
    assert code == 3 and "CONTRADICTION: the lower bound" in out and "no proof" not in out
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "privacy  a claim\n" in summary and "privacy  a claim\n" in out

    options = Options(attacks=("loss",))
    report = attack(open_target(lying, options), options, tmp_path / "cache")
    assert report.contradiction and report.sampling == "bernoulli" and report.shift == shift.OK
    shifted = replace(report, shift=shift.INVALID)
    assert not shifted.contradiction and shifted.exceeds_claim
    *_, remark = rendering.footer(shifted)
    assert remark.startswith("no contradiction, although the lower bound"), remark
    assert "differ without the model" in remark
    assert "The bound is no proof: members and non-members differ" in rendering.footer(shifted)[0]
    assert not replace(report, accountant_epsilon=None).contradiction


def test_given_files_cannot_contradict_the_accountant(checkpoints, tmp_path, capsys):
    """Without coins, nobody knows that members and non-members are of one distribution."""
    lying = claiming(checkpoints / "short", tmp_path / "lying", epsilon=-1.0)
    found = open_target(lying, Options()).records
    for name, wanted in (("in", True), ("out", False)):
        rows = [
            {"text": e.text, "label": e.label}
            for e, member in zip(found.examples, found.is_member, strict=True)
            if member == wanted
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    given = ["--members", tmp_path / "in.jsonl", "--nonmembers", tmp_path / "out.jsonl"]
    code, out, _ = run(capsys, "--model", lying, *given)
    assert code == 0 and "CONTRADICTION" not in out
    assert "given in a file, not drawn at random" in " ".join(out.split())


def test_the_accountants_epsilon_is_that_of_the_asked_delta(checkpoints, tmp_path, capsys):
    """The oracle is the profile of the Gaussian mechanism without sampling (Balle & Wang 2018)."""
    mu = math.sqrt(10) / 4

    def exact(delta):
        def excess(e):
            second = math.exp(e) * stats.norm.cdf(-mu / 2 - e / mu)
            return stats.norm.cdf(mu / 2 - e / mu) - second - delta

        return optimize.brentq(excess, 0, 50)

    claim = {"noise_multiplier": 4.0, "sample_rate": 1.0, "releases": 10, "delta": 1e-5}
    folder = claiming(checkpoints / "short", tmp_path / "run", epsilon=exact(1e-5), **claim)
    result = open_target(folder, Options()).result
    assert claimed_epsilon(result, 1e-5) == result.epsilon
    for delta in (1e-3, 1e-8):
        assert claimed_epsilon(result, delta) == pytest.approx(exact(delta), rel=1e-6)
    assert claimed_epsilon(result, 0.0) == math.inf
    assert claimed_epsilon(replace(result, epsilon=None), 1e-3) is None
    assert claimed_epsilon(None, 1e-3) is None

    _, out, _ = run(capsys, "--model", folder, "--delta", "1e-3")
    assert f"accountant: epsilon <= {rounded_up(exact(1e-3))} at delta 0.001." in " ".join(
        out.split()
    )
    # the claim of the file is below every bound; at delta 0 the accountant claims nothing
    lying = claiming(folder, tmp_path / "lying", epsilon=-1.0)
    code, out, _ = run(capsys, "--model", lying, "--delta", "0", "--json")
    document = json.loads(out)
    assert code == 0 and document["accountant_epsilon"] == "infinite" and document["delta"] == 0
    assert run(capsys, "--model", lying)[0] == 3

    for field, value in (
        *(("noise_multiplier", -1.0), ("sample_rate", 0.0), ("releases", -1)),
        ("seconds", -1.0),
    ):
        wrong = claiming(folder, tmp_path / field, **{field: value})
        code, _, err = run(capsys, "--model", wrong)
        assert code == 2 and f"training.json: {field} must be" in err and err.count("\n") == 1


def test_two_bounds_on_epsilon_share_the_tail():
    """The two bounds hold together at 95%: each has a tail of 2.5% (Bonferroni)."""
    truth = np.arange(400) % 2 == 0
    scores = np.where(truth, 0.9, -0.9) + np.random.default_rng(0).standard_normal(400)
    for guesses, confidence in ((0, 0.95), (40, 0.975)):
        options = Options(guesses=guesses)
        assert bound_confidence(options) == pytest.approx(confidence, abs=1e-12)
        measured = reports._measure("loss", scores, truth, options, 0.0, bound_confidence(options))
        split = measured.epsilon
        tail = (1 - confidence) / 2
        low = stats.beta.ppf(tail, split.tp, split.num_members - split.tp + 1)
        high = stats.beta.isf(tail, split.fp + 1, split.num_nonmembers - split.fp)
        both = [math.log(low / high), math.log((1 - high) / (1 - low))]
        assert split.epsilon == pytest.approx(max(both)) and split.epsilon > 0.5
        one_run = reports._one_run(options, scores, truth, 0.0, bound_confidence(options))
        if not guesses:
            assert one_run is None
            continue
        order = np.argsort(scores)
        correct = int((~truth[order[:20]]).sum() + truth[order[-20:]].sum())
        least = stats.beta.ppf(0.025, correct, 40 - correct + 1)
        assert 20 < correct < 40 and one_run == pytest.approx(math.log(least / (1 - least)))


def test_a_report_of_two_bounds_says_their_confidence(checkpoints, tmp_path):
    options = Options(attacks=("loss",), primary="loss", guesses=40)
    report = attack(open_target(checkpoints / "short", options), options, tmp_path)
    primary = replace(report.attacks[0].epsilon, epsilon=1.2999)
    report = replace(
        report,
        one_run_epsilon=1.7999,
        accountant_epsilon=3.34140947,
        attacks=(replace(report.attacks[0], epsilon=primary),),
    )
    columns, rows = rendering.table(report)
    assert (columns[-1], rows[0][-1]) == ("epsilon >= [97.5%]", "1.29")
    assert rendering.footer(report)[0].startswith(
        "epsilon >= 1.79 (95%, the larger of two bounds at 97.5% each: loss, split threshold, and "
        "one-run audit 1.79, delta 0.001); accountant: epsilon <= 3.342 at delta 0.001. "
    )
    alone = replace(report, one_run_epsilon=None, bound_confidence=0.95)
    assert rendering.table(alone)[0][-1] == "epsilon >= [95%]"
    assert rendering.footer(alone)[0].startswith(
        "epsilon >= 1.29 (95%, loss, split threshold, delta 0.001)"
    )


def test_methods_are_configurations_without_what_leaves_the_weights_alone():
    first = TrainConfig(task="sst2", epsilon=3.0, membership="bernoulli")
    same = {"steps": 7, "seed": 3, "eval_every": 5, "device": "cuda", "micro_batch_size": 8}
    others = (
        {"optimizer": "sgd", "learning_rate": 0.5},
        {"precondition": "generated"},
        {"max_grad_norm": 0.01},
        {"train_layers": 1},
        {"model": "tiny"},
        {"batch_size": 16},
        {"epsilon": 3.0000001},
        {"epsilon": 8.0},
        {"method": "lora"},
    )
    for changes in others:
        with case(*changes):
            configs = [first, replace(first, **same), replace(first, **changes)]
            one, again, other = compare.method_names(configs)
            assert one == again != other
            differing = [name for name in changes if f"{name}={changes[name]!r}" in other]
            in_words = changes in ({"epsilon": 8.0}, {"method": "lora"})
            assert differing == ([] if in_words else [*changes]), other
    every = compare.method_names([replace(first, **changes) for changes in ({}, *others)])
    assert len({*every}) == 1 + len(others)
    assert compare.method_names([first]) == ["full, DP, epsilon 3"]
    sgd = compare.method_names([first, replace(first, optimizer="sgd")])
    assert sgd == ["full, DP, epsilon 3, optimizer='adam'", "full, DP, epsilon 3, optimizer='sgd'"]


def test_matched_reads_off_where_all_methods_have_been():
    def point(method, loss, auc):
        return compare.Point("", method, 1, loss, 1 - loss, metrics.Auc(auc, 0.0, (auc, auc)))

    points = [
        point("full", 0.6, 0.5),
        point("full", 0.2, 0.9),
        point("lora", 0.5, 0.55),
        point("lora", 0.3, 0.65),
    ]
    value, read = compare.matched(points, "train_loss")
    assert value == pytest.approx(0.4)
    assert read == {"full": pytest.approx(0.7), "lora": pytest.approx(0.6)}
    assert compare.matched([point("full", 0.2, 0.9), point("lora", 0.5, 0.6)], "train_loss") is None
    assert compare.matched(points[:2], "train_loss") is None


def test_bad_input_is_one_line(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signals, "measure", None)  # a forward pass would be a TypeError
    for arguments, words in [
        (["--attacks", "losss"], ["did you mean 'loss'"]),
        (["--attacks", "lira"], ["'lira'", "--shadows"]),
        (["--fpr", "a"], ["--fpr must be numbers"]),
        (["--fpr", "2"], ["fpr"]),
        (["--shadows", "4", "--shadow-dir", "."], ["must not both"]),
        (["--max-records", "3"], ["max_records"]),
        (["--members", "nowhere.jsonl"], ["nonmembers"]),
        (["--shadows", "2", "--num-workers", "0"], ["num_workers must be an integer >= 1"]),
    ]:
        with case(arguments, words):
            code, _, err = run(
                capsys, "--model", checkpoints / "short", "--output", tmp_path / "out", *arguments
            )
            assert code == 2 and err.count("\n") == 1, err
            assert all(word in err for word in words), err
            assert not (tmp_path / "out" / "report.json").exists()


def test_missing_and_pickled_checkpoints(tmp_path, capsys):
    code, _, err = run(capsys, "--model", tmp_path / "nowhere")
    assert code == 2 and "folder" in err and err.count("\n") == 1
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, "--model", tmp_path / "empty")
    assert code == 2 and "membership.json" in err and "--nonmembers" in err


def test_the_plan_counts_the_model_before_fine_tuning(checkpoints, monkeypatch):
    monkeypatch.setattr(planning, "_pass_seconds", lambda target, count: 20.0)
    target = open_target(checkpoints / "tables", Options())
    first = plan([target], Options())[0]
    assert first.endswith("through the model and the model before fine-tuning, about 40 s")
    first = plan([replace(target, base=None)], Options())[0]
    assert first.endswith("records through the model, about 20 s")


def test_the_plan_estimates_seconds_from_the_training():
    """240 s for 2 steps of 40 records are 3 s per record; a forward pass takes a third of that."""
    config = SimpleNamespace(steps=2, batch_size=40, train_layers=None)
    target = SimpleNamespace(result=SimpleNamespace(seconds=240.0, config=config), recipe=config)
    assert planning._pass_seconds(target, 100) == pytest.approx(100.0)
    assert planning._accuracy(target) == "about"
    config.train_layers = 2
    assert planning._accuracy(target) == "at least"
    target.result = None
    assert planning._pass_seconds(target, 100) == 0.0
    shown = [planning._duration(seconds) for seconds in (89, 300, 5399, 9000)]
    assert shown == ["89 s", "5 min", "90 min", "2.5 h"]


def test_dry_run_writes_nothing(checkpoints, tmp_path, capsys):
    code, out, _ = run(
        capsys,
        "--model",
        checkpoints / "short",
        "--shadows",
        "8",
        "--dry-run",
        "--output",
        tmp_path / "out",
    )
    assert code == 0 and "8 shadows of 2 steps each" in out and not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused_before_the_attacks(
    checkpoints, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("lowrank_dp.mia.attack.attack", None)  # an attack would be a TypeError
    (tmp_path / "notes.txt").write_text("kept")
    words = "--model", checkpoints / "short", "--output", tmp_path / "notes.txt"
    code, _, error = run(capsys, *words)
    assert code == 2 and "--output must be a folder, got" in error
    assert (tmp_path / "notes.txt").read_text() == "kept"
    for output in (tmp_path / "notes.txt" / "below", "/proc/lowrank_dp"):
        for more in ([], ["--dry-run"]):
            code, _, error = run(capsys, *words[:2], "--output", output, *more)
            with case(output, *more):
                assert code == 2 and f"--output {output} can't be written to" in error
                assert error.count("\n") == 1


# --- damaged files -----------------------------------------------------------------------------

ODD = (
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\u0000",
    [],
    [1],
    {},
    {"a": 1},
    [[]],
    "../x",
    "\ud800",
)


def mutated(text, rng):
    """Return a document with one place changed, or a file with some bytes changed."""
    if rng.random() < 0.3:
        data = bytearray(text.encode())
        start = rng.randrange(len(data))
        data[start : start + rng.choice((0, 1, 5, len(data)))] = rng.randbytes(rng.randrange(4))
        return bytes(data)
    place = document = json.loads(text)
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        name = rng.choice(keys)
        if isinstance(place[name], dict | list) and place[name] and rng.random() < 0.7:
            place = place[name]
        else:
            break
    if isinstance(place, dict) and rng.random() < 0.3:
        del place[name]
    elif isinstance(place, dict) and rng.random() < 0.1:
        place[name + "2"] = place.pop(name)
    else:
        place[name] = rng.choice(ODD)
    return json.dumps(document).encode()


@pytest.mark.slow
def test_mutated_documents_are_refused_in_one_line_or_harmless(checkpoints, tmp_path, monkeypatch):
    """Make 400 mutations of membership.json and training.json, and of those of a shadow model."""
    monkeypatch.setattr(records, "load_task", functools.cache(records.load_task))
    recipe = open_target(checkpoints / "short", Options()).recipe
    for name in ("short", "shadows/one"):
        shutil.copytree(checkpoints / "short", tmp_path / name)
    rng, refused = random.Random(0), 0
    for number in range(400):
        folder = tmp_path / ("short" if number % 4 else "shadows/one")
        path = folder / ("membership.json", "training.json")[number % 2]
        text = path.read_text()
        path.write_bytes(mutated(text, rng))
        try:
            if number % 4:
                options = Options(num_shadows=2)
                target = open_target(folder, options)
                plan([target], options)
                assert target.trained.curve[-1]["loss"] is not None
            else:
                find_shadows(replace(recipe, seed=3), 1, tmp_path / "shadows")
                read_manifest(folder / "membership.json")
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1500, (number, str(error))
            str(error).encode()
        finally:
            path.write_text(text)
    assert refused > 200


@pytest.mark.slow
def test_damaged_weights_and_configurations(checkpoints, tmp_path, capsys):
    """Each damage gives one line that names the file, and exit code 2."""
    for name in ("initial_head.safetensors", "config.json", "model.safetensors", "tokenizer.json"):
        data = (checkpoints / "short" / name).read_bytes()
        damages = [b"", b"{}", data[: len(data) // 2], b"\xff" * 100]
        if name == "config.json":
            damages += [
                json.dumps(json.loads(data) | change).encode()
                for change in (
                    {"architectures": [1]},
                    {"architectures": 3},
                    {"id2label": [1]},
                    {"id2label": {}},
                    {"id2label": {"a": "b"}},
                )
            ] + [b"[]", b"3"]
        for number, damage in enumerate(damages):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(checkpoints / "short", tmp_path / "run")
            (tmp_path / "run" / name).write_bytes(damage)
            code, _, err = run(capsys, "--model", tmp_path / "run", "--dry-run")
            what = (name, number, err)
            assert code == 2 and err.count("\n") == 1, what
            assert str(tmp_path / "run") in err, what
    (tmp_path / "run" / "tokenizer.json").write_bytes(data)
    (tmp_path / "run" / "initial_head.safetensors").unlink()
    code, _, err = run(capsys, "--model", tmp_path / "run", "--attacks", "base")
    assert code == 2 and "holds no initial_head.safetensors" in err
    code, out, _ = run(capsys, "--model", tmp_path / "run", "--output", tmp_path / "out")
    assert code == 0 and "not made: base" in out


def test_the_manifests_own_encoding_wins(checkpoints, tmp_path, capsys):
    for option, value in (
        ("--max-length", "7"),
        ("--template", "{source} {target}"),
        ("--text-column", "nonsense"),
    ):
        code, _, err = run(capsys, "--model", checkpoints / "tables", option, value)
        assert code == 2 and "must be left out: membership.json says" in err, option
    target = open_target(checkpoints / "short", Options(max_length=128))
    assert target.max_length == 128 and target.format.origin == "membership.json"
    path = shutil.copytree(checkpoints / "tables", tmp_path / "other") / "membership.json"
    path.write_text(path.read_text().replace('"separator": "\\n"', '"separator": " = "'))
    code, _, err = run(capsys, "--model", tmp_path / "other")
    assert code == 2 and "template must be {'separator'" in err


def test_a_run_without_its_manifest_keeps_its_length(checkpoints, tmp_path):
    """The manifest, which training wrote, says what the length of the published run was."""
    own = open_target(checkpoints / "short", Options())
    for name, bit in (("in", True), ("out", False)):
        pairs = zip(own.records.examples, own.records.is_member, strict=True)
        rows = [{"text": e.text, "label": e.label} for e, inside in pairs if inside == bit]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    folder = tmp_path / "published"
    shutil.copytree(checkpoints / "short", folder)
    (folder / "membership.json").unlink()
    given = Options(members=str(tmp_path / "in.jsonl"), nonmembers=str(tmp_path / "out.jsonl"))

    found = open_target(folder, given)
    assert found.max_length == own.max_length == 128 and found.pad_to is None
    assert open_target(folder, replace(given, max_length=7)).max_length == 7
    path = folder / "training.json"
    path.write_text(path.read_text().replace('"padding": "longest"', '"padding": "max-length"'))
    assert open_target(folder, given).pad_to == 128
    path = folder / "tokenizer_config.json"  # the context of the model that was saved
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 100}))
    assert open_target(folder, given).pad_to == 100


def test_given_files_that_the_manifest_contradicts(checkpoints, tmp_path, capsys):
    """Members are given as non-members, and records that were not trained on as members."""
    found = open_target(checkpoints / "short", Options()).records
    inside, outside = (
        [e for e, bit in zip(found.examples, found.is_member, strict=True) if bit == side]
        for side in (True, False)
    )
    new = [Example(f"new/{i}", f"a text {i} of no pool", label=i % 2) for i in range(60)]
    lost = [replace(e, text=f"review: {e.text}") for e in inside]  # as of another column
    for name, part in {
        "a": inside[:30],
        "b": inside[30:60],
        "outside": outside[:30],
        "new": new[:30],
        "mixed": [*inside[:25], *new[30:33], *lost[25:27]],
        "lost": lost[:30],
    }.items():
        rows = [{"text": e.text, "label": e.label} for e in part]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    model = "--model", checkpoints / "short"

    def given(members, nonmembers):
        files = (tmp_path / f"{name}.jsonl" for name in (members, nonmembers))
        return run(capsys, *model, "--members", next(files), "--nonmembers", next(files))

    code, _, err = given("a", "b")
    assert (
        code == 2
        and "30 of 30 given non-members are among the records trained on in membership.json" in err
    )
    for members, nonmembers, count in (
        ("outside", "new", "30 of 30"),
        ("new", "outside", "30 of 30"),
        ("lost", "new", "30 of 30"),
        ("mixed", "new", "5 of 30"),
    ):
        code, out, err = given(members, nonmembers)
        with case(members, nonmembers):
            assert code == 2 and err.count("\n") == 1 and "verdict" not in out
            assert f"{count} given members are not among the records trained on" in err
            assert "other columns or targets" in err
    options = Options(members=tmp_path / "a.jsonl", nonmembers=tmp_path / "new.jsonl")
    assert open_target(checkpoints / "short", options).records.is_member.sum() == 30
    code, _, err = run(
        capsys, "--model", checkpoints / "short", "--nonmembers", tmp_path / "b.jsonl"
    )
    assert code == 2 and "30 of 30 non-members have the text of a member" in err


def test_copies_in_a_manifests_pool_are_left_out_on_both_sides(tmp_path):
    """The membership bits of the records that remain are still independent."""
    lines = [{"text": f"text {i} of a pool", "label": i % 2} for i in range(80)]
    lines += [{"text": f"TEXT {i} of a  pool", "label": 1} for i in range(12)]
    write_jsonl(tmp_path / "pool.jsonl", lines)
    pool = load_task(str(tmp_path / "pool.jsonl")).train
    members = np.random.default_rng(0).integers(0, 2, 92).astype(bool).tolist()
    units = membership.group_units(pool, "example")
    config = TrainConfig(
        model="tiny", task="pool", non_private=True, membership="bernoulli", steps=1, seed=3
    )
    document = membership.Manifest.of(
        units,
        members,
        membership="bernoulli",
        sampling_seed=3,
        task="pool",
        split="train",
        source="local",
        kind="classification",
        unit="example",
        template=None,
        max_length=128,
        base={"model": "tiny", "seed": 3},
        recipe=config.as_json(),
        seed=3,
        privacy="none",
        train_loss=0.25,
        eval_loss=1,
    ).as_json()
    (tmp_path / "membership.json").write_text(json.dumps(document))
    found = records.load_records(tmp_path, data_dir=tmp_path / "pool.jsonl")
    assert [e.text for e in found.examples] == [row["text"] for row in lines[12:80]]
    assert found.is_member.tolist() == members[12:80]
    assert found.left_out == tuple(pool[i].id for i in (*range(12), *range(80, 92)))
