"""Sweeps: order, each configuration once, nothing repeated, failures kept apart."""

import json
from dataclasses import fields, replace

import pytest
import torch
import transformers

import lowrank_dp.sweep as sweep_module
from lowrank_dp.models import load_tokenizer
from lowrank_dp.sweep import run_folder, sweep
from lowrank_dp.train import TrainConfig, load_result, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A configuration that takes a moment: a BERT of one layer, forty sentences, two steps."""
    folder = tmp_path_factory.mktemp("places")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(transformers.BertConfig(
            vocab_size=768, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=64, pad_token_id=0, num_labels=2)
        ).save_pretrained(folder / "model")
    load_tokenizer("tiny").save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for split, count in (("train", 40), ("validation", 12)):
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(
            {"sentence": f"film {i} is {('dull', 'fresh')[i % 2]}", "label": i % 2}) + "\n"
            for i in range(count)))
    return TrainConfig(model=str(folder / "model"), task=str(folder / "data"), steps=2,
                       batch_size=10, noise_multiplier=0.8, learning_rate=1e-3, seed=0)


def counting(monkeypatch):
    """The configurations that are really trained."""
    trained = []

    def count(config, *args, **kwargs):
        trained.append(config)
        return train(config, *args, **kwargs)

    monkeypatch.setattr(sweep_module, "train", count)
    return trained


def test_outcomes_in_order_and_equal_runs_once(base, tmp_path, monkeypatch):
    trained = counting(monkeypatch)
    configs = [replace(base, learning_rate=rate, seed=seed)
               for rate, seed in ((1e-3, 1), (1e-4, 0), (1e-3, 0), (1e-3, 1))]
    outcomes = sweep(configs, tmp_path / "runs", engine="sequential")
    assert [outcome.config for outcome in outcomes] == configs
    assert [outcome.result.config for outcome in outcomes] == configs
    assert not any(outcome.error for outcome in outcomes)
    assert len(trained) == 3 and outcomes[0] == outcomes[3]
    assert len(list((tmp_path / "runs").iterdir())) == 3
    for outcome in outcomes:  # what train alone gives
        folder = run_folder(outcome.config, tmp_path / "runs")
        assert load_result(folder) == outcome.result
        assert {path.name for path in folder.iterdir()} - {".lock"} == {"training.json"}
    alone = train(configs[1], tmp_path / "alone")
    assert [{**entry, "seconds": 0, "restore_seconds": 0} for entry in alone.curve] == [
        {**entry, "seconds": 0, "restore_seconds": 0} for entry in outcomes[1].result.curve]


def test_what_is_finished_is_read(base, tmp_path, monkeypatch):
    first = sweep([base], tmp_path, engine="sequential")
    from lowrank_dp.train import prepare

    prepared = []

    def counted(config, seed):
        prepared.append(config)
        return prepare(config, seed)

    monkeypatch.setattr("lowrank_dp.train.prepare", counted)
    grown = [replace(base, seed=1), base]
    again = sweep(grown, tmp_path, engine="sequential")
    assert again[1] == first[0] and prepared == grown[:1]
    assert sweep(grown, tmp_path, engine="sequential") == again and prepared == grown[:1]


def test_a_run_that_was_broken_off_goes_on(base, tmp_path, monkeypatch):
    class Stop(BaseException):
        pass

    def stop(*args):
        raise Stop

    config = replace(base, steps=3, snapshot_every=1)
    with monkeypatch.context() as patch:
        patch.setattr("lowrank_dp.train._result", stop)
        with pytest.raises(Stop):
            sweep([config], tmp_path, engine="sequential")
    monkeypatch.setattr("lowrank_dp.train.take_step", stop)  # all its steps are done
    outcome, = sweep([config], tmp_path, engine="sequential")
    assert outcome.result.releases == 3


def test_a_failure_does_not_stop_the_others(base, tmp_path, monkeypatch):
    configs = [replace(base, task="sst3"), base, replace(base, learning_rate=1e12, optimizer="sgd"),
               replace(base, batch_size=1000), replace(base, seed=1)]
    outcomes = sweep(configs, tmp_path, engine="sequential")
    assert [outcome.result is None for outcome in outcomes] == [True, False, True, True, False]
    assert "did you mean 'sst2'" in outcomes[0].error and not outcomes[1].error
    assert "learning rate" in outcomes[2].error and "at most the 40" in outcomes[3].error
    assert all("\n" not in outcome.error for outcome in outcomes)
    trained = counting(monkeypatch)  # what failed is tried again
    assert sweep(configs[:2], tmp_path, engine="sequential") == outcomes[:2]
    assert trained == configs[:2]


def test_models_are_kept_on_demand(base, tmp_path):
    outcome, = sweep([base], tmp_path, engine="sequential", keep_model=True)
    names = {path.name for path in run_folder(base, tmp_path).iterdir()}
    assert {"model.safetensors", "membership.json", "training.json"} <= names
    assert outcome.result is not None


def test_bad_input(base, tmp_path):
    def unused(*args, **kwargs):
        raise AssertionError("trained")

    with pytest.raises(ValueError, match=r"^seed must be given for a sweep"):
        sweep([base, replace(base, seed=None)], tmp_path / "runs")
    with pytest.raises(ValueError, match="did you mean 'loky'"):
        sweep([base], tmp_path / "runs", engine="lokky")
    with pytest.raises(ValueError, match="num_workers must be an integer >= 1"):
        sweep([base], tmp_path / "runs", num_workers=0)
    assert not (tmp_path / "runs").exists()
    assert sweep([], tmp_path / "runs", engine="sequential") == []


def test_every_field_is_part_of_a_folders_name(base):
    """Another value of any field is another run; the same values are the same one."""
    base = replace(base, noise_multiplier=None, epsilon=2.0)
    changes = {
        "model": "other", "task": "other", "method": "lora", "delta": 1e-5, "max_grad_norm": 2.0,
        "unit": "group", "steps": 3, "batch_size": 11, "optimizer": "sgd", "learning_rate": 2e-3,
        "beta1": 0.5, "weight_decay": 0.1, "schedule": "linear", "scheme": "optimal",
        "below": "zero", "restore_method": "exact", "momentum_beta": 0.9, "filter_b": (0.5,),
        "rank": 4, "lora_alpha": 3.0, "lora_init": "gaussian", "target_modules": ("query",),
        "train_embeddings": True, "train_layers": 1, "dropout": True, "max_examples": 30,
        "data_seed": 1, "max_length": 20, "holdout": 5, "membership": "half",
        "micro_batch_size": 32, "precision": "bf16", "eval_every": 5, "eval_examples": 50,
        "generate": False, "num_beams": 2, "max_new_tokens": 8, "snapshot_every": 5, "seed": 7,
        "device": "cuda", "epsilon": 3.0}
    others = {
        "warmup_steps": {"warmup_steps": 1, "schedule": "linear"},
        "filter_a": {"filter_b": (0.5,), "filter_a": (0.1,)},
        "scheme_options": {"scheme": "truncate", "scheme_options": {"k": 2}},
        "diagnostic": {"scheme": "oracle", "diagnostic": True},
        "noise_multiplier": {"epsilon": None, "noise_multiplier": 0.9},
        "non_private": {"epsilon": None, "non_private": True}}
    assert {*changes, *others} == {field.name for field in fields(TrainConfig)}
    configs = [base, *(replace(base, **{name: value}) for name, value in changes.items()),
               *(replace(base, **several) for several in others.values()),
               replace(base, scheme="truncate", scheme_options={"k": 3})]
    assert len({run_folder(config, "runs") for config in configs}) == len(configs)
    for config in configs:
        again = TrainConfig.from_json(json.loads(json.dumps(config.as_json())))
        assert run_folder(again, "runs") == run_folder(config, "runs")


@pytest.mark.slow
def test_in_parallel_as_in_this_process(base, tmp_path):
    """Two workers; a failing run among them; curves to rounding of sums in another order."""
    configs = [replace(base, seed=2), replace(base, task="sst3"), replace(base, seed=1),
               replace(base, seed=2)]
    parallel = sweep(configs, tmp_path / "parallel", num_workers=2)
    alone = sweep(configs, tmp_path / "alone", engine="sequential")
    assert [outcome.config for outcome in parallel] == configs
    assert parallel[1].error == alone[1].error and parallel[1].result is None
    for one, other in ((0, 0), (2, 2), (3, 0)):
        for here, there in zip(parallel[one].result.curve, alone[other].result.curve, strict=True):
            assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
    assert sweep(configs, tmp_path / "parallel", engine="sequential") == parallel
