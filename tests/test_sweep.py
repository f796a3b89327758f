"""A sweep's outcomes: in order, each configuration once, failures apart."""

from dataclasses import fields, replace

import pytest

import lowrank_dp.sweep as sweep_module
from lowrank_dp.sweep import run_folder, sweep
from lowrank_dp.train import TrainConfig, train

BASE = TrainConfig(model="tiny", task="generated", noise_multiplier=1.0, batch_size=16, steps=1,
                   max_examples=60, eval_examples=20, seed=0)


def test_outcomes_in_order_equal_ones_once_and_failures_apart(tmp_path, monkeypatch):
    calls = []

    def counting(config, *arguments, **options):
        calls.append(config.seed)
        return train(config, *arguments, **options)

    monkeypatch.setattr(sweep_module, "train", counting)
    configs = [replace(BASE, seed=1), replace(BASE, batch_size=4000), BASE, replace(BASE, seed=1)]
    outcomes = sweep(configs, tmp_path, engine="sequential")
    assert [outcome.config for outcome in outcomes] == configs
    assert len(calls) == 3
    assert outcomes[0] == outcomes[3] and outcomes[0].result.config.seed == 1
    assert outcomes[1].result is None and outcomes[1].error.startswith("batch_size must be")
    assert outcomes[2].result.config.seed == 0 and outcomes[2].error == ""
    assert {p.name for p in run_folder(BASE, tmp_path).iterdir()} == {"training.json", ".lock"}

    # what is finished is read, not trained again
    monkeypatch.setattr("lowrank_dp.train.prepare", None)
    assert sweep([BASE, configs[0]], tmp_path, engine="sequential") == [outcomes[2], outcomes[0]]


@pytest.mark.slow
def test_in_parallel_it_is_the_same(tmp_path):
    configs = [replace(BASE, seed=seed) for seed in (2, 3)]
    parallel = sweep(configs, tmp_path / "a", num_workers=2)
    one_by_one = sweep(configs, tmp_path / "b", engine="sequential")
    for a, b in zip(parallel, one_by_one, strict=True):
        assert a.result.curve[-1]["loss"] == pytest.approx(b.result.curve[-1]["loss"], rel=1e-5)


def test_every_field_has_a_folder_of_its_own(tmp_path):
    others = {"model": "tiny-llama", "task": "sst2", "method": "lora", "delta": 0.1,
              "unit": "group",
              "steps": 2, "optimizer": "sgd", "learning_rate": 1.0, "rank": 3, "seed": 5,
              "scheme": "hard", "below": "zero", "momentum_beta": 0.5, "max_length": 9,
              "device": "cuda", "train_layers": 1, "target_modules": ("query",), "data_seed": 4}
    assert others.keys() <= {field.name for field in fields(TrainConfig)}
    folders = {run_folder(replace(BASE, **{name: value}), tmp_path)
               for name, value in others.items()} | {run_folder(BASE, tmp_path)}
    assert len(folders) == len(others) + 1
    assert run_folder(BASE, tmp_path) == run_folder(replace(BASE), tmp_path)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"^seed must be given for a sweep"):
        sweep([replace(BASE, seed=None)], tmp_path)
    with pytest.raises(ValueError, match=r"did you mean 'loky'"):
        sweep([BASE], tmp_path, engine="lokky")
    with pytest.raises(ValueError, match=r"^num_workers must be"):
        sweep([BASE], tmp_path, num_workers=0)
