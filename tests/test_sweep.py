"""Sweeps: results in order, each configuration trained once, and failures kept apart."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import threading
from dataclasses import fields, replace

import pytest

import lowrank_dp.sweep as sweep_module
from lowrank_dp import engines
from lowrank_dp.artifacts import runs
from lowrank_dp.sweep import run_folder, sweep
from lowrank_dp.train import TrainConfig, load_result
from lowrank_dp.train.config import INCIDENTAL
from lowrank_dp.train.guards import Diverged
from lowrank_dp.train.loop import train
from lowrank_dp.train.setup import prepare

pytestmark = pytest.mark.usefixtures("one_thread")


def counting(monkeypatch):
    """Collect the configurations that are trained, without the folder of the sweep's cache."""
    trained = []

    def count(config, *args, **kwargs):
        trained.append(replace(config, prefix_cache=""))
        return train(config, *args, **kwargs)

    monkeypatch.setattr(sweep_module, "train", count)
    return trained


@pytest.mark.slow
def test_outcomes_in_order_and_equal_runs_once(base, tmp_path, monkeypatch):
    trained = counting(monkeypatch)
    configs = [
        replace(base, learning_rate=rate, seed=seed)
        for rate, seed in ((1e-3, 1), (1e-4, 0), (1e-3, 0), (1e-3, 1))
    ]
    outcomes = sweep(configs, tmp_path / "runs", engine="sequential")
    assert [outcome.config for outcome in outcomes] == configs
    recipes = [config.recipe() for config in configs]
    assert [outcome.result.config.recipe() for outcome in outcomes] == recipes
    assert not any(outcome.error for outcome in outcomes)
    assert len(trained) == 3 and outcomes[0] == outcomes[3]
    assert len([path for path in (tmp_path / "runs").iterdir() if path.is_dir()]) == 3
    for outcome in outcomes:  # the result of train alone
        folder = run_folder(outcome.config, tmp_path / "runs")
        assert load_result(folder) == outcome.result
        assert {path.name for path in folder.iterdir()} - {".lock"} == {"training.json"}
    alone = train(configs[1], tmp_path / "alone")
    assert [{**entry, "seconds": 0, "restore_seconds": 0} for entry in alone.curve] == [
        {**entry, "seconds": 0, "restore_seconds": 0} for entry in outcomes[1].result.curve
    ]


def test_what_is_finished_is_read(base, tmp_path, monkeypatch):
    first = sweep([base], tmp_path, engine="sequential")
    prepared = []

    def counted(config, seed, request):
        prepared.append(config.recipe())
        return prepare(config, seed, request)

    monkeypatch.setattr("lowrank_dp.train.loop.prepare", counted)
    grown = [replace(base, seed=1), base]
    again = sweep(grown, tmp_path, engine="sequential")
    assert again[1] == first[0] and prepared == [grown[0].recipe()]
    assert sweep(grown, tmp_path, engine="sequential") == again and prepared == [grown[0].recipe()]


def write_rows(file, count, word="film"):
    rows = ({"text": f"{word} {i} was", "label": i % 2} for i in range(count))
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_runs_on_other_records_are_not_returned(base, tmp_path):
    data, folder = tmp_path / "reviews.jsonl", tmp_path / "runs"
    write_rows(data, 80)
    config = replace(base, task=str(data), holdout=10)
    (first,) = sweep([config], folder, engine="sequential")
    assert first.error == ""
    (digest,) = folder.glob("records-*.json")
    assert digest.name == f"records-{run_folder(config, folder).name}.json"
    assert digest.stat().st_mode & 0o777 == 0o600
    (again,) = sweep([config], folder, engine="sequential")
    assert again.result == first.result
    write_rows(data, 200)
    more = [config, replace(config, learning_rate=2 * config.learning_rate)]
    with pytest.raises(ValueError, match=r"runs holds 1 of these runs on other records of .*jsonl"):
        sweep(more, folder, engine="sequential")
    other = sweep(more, tmp_path / "others", engine="sequential")
    assert [outcome.error for outcome in other] == ["", ""]
    assert other[0].result.sample_rate < first.result.sample_rate
    shutil.rmtree(run_folder(config, folder))  # the fix that the error names
    repeated = sweep(more, folder, engine="sequential")
    assert [outcome.error for outcome in repeated] == ["", ""]
    assert repeated[0].result.sample_rate == other[0].result.sample_rate


def test_runs_on_records_that_cannot_be_read_are_not_returned(base, tmp_path):
    data, folder = tmp_path / "reviews.jsonl", tmp_path / "runs"
    config = replace(base, task=str(data), holdout=10)
    (missing,) = sweep([config], folder, engine="sequential")
    assert missing.result is None and "reviews.jsonl" in missing.error
    write_rows(data, 80)
    (first,) = sweep([config], folder, engine="sequential")
    assert first.error == ""
    data.write_text('{"text": "", "label": 0}\n')
    with pytest.raises(ValueError, match="whose records can't be compared with those of the runs"):
        sweep([config], folder, engine="sequential")


def test_a_run_that_never_began_binds_no_records(base, tmp_path):
    data, folder = tmp_path / "reviews.jsonl", tmp_path / "runs"
    write_rows(data, 80)
    config = replace(base, task=str(data), holdout=10)
    wrong = replace(config, model="no-such-model")
    (failed,) = sweep([wrong], folder, engine="sequential")
    assert failed.result is None
    (run_folder(config, folder) / "snapshots").mkdir(parents=True)  # killed before the first one
    write_rows(data, 90)
    good, failed = sweep([config, wrong], folder, engine="sequential")
    assert good.error == "" and "no-such-model" in failed.error


def test_only_the_records_that_a_run_reads_are_compared(base, tmp_path):
    data, public, folder = tmp_path / "data", tmp_path / "public.jsonl", tmp_path / "runs"
    for name in ("train", "validation"):
        write_rows(data / f"{name}.jsonl", 80, name)
    write_rows(public, 60, "book")
    whole = replace(base, task=str(data))
    held_out = replace(whole, holdout=10)
    conditioned = replace(held_out, precondition=str(public), precondition_steps=1)
    configs = [whole, held_out, conditioned]
    first = sweep(configs, folder, engine="sequential")
    assert [outcome.error for outcome in first] == ["", "", ""]
    write_rows(data / "test.jsonl", 20, "test")  # a split that no run reads
    assert sweep(configs, folder, engine="sequential") == first
    write_rows(data / "validation.jsonl", 70, "validation")
    assert sweep(configs[1:], folder, engine="sequential") == first[1:]
    with pytest.raises(ValueError, match="holds 1 of these runs on other records"):
        sweep(configs, folder, engine="sequential")
    write_rows(public, 60, "play")
    assert sweep([held_out], folder, engine="sequential") == first[1:2]
    with pytest.raises(ValueError, match="holds 1 of these runs on other records"):
        sweep(configs[1:], folder, engine="sequential")


def test_a_run_that_was_broken_off_goes_on(base, tmp_path, monkeypatch):
    class Stop(BaseException):
        pass

    def stop(*args):
        raise Stop

    config = replace(base, steps=3, snapshot_every=1)
    with monkeypatch.context() as patch:
        patch.setattr("lowrank_dp.train.loop.result_of", stop)
        with pytest.raises(Stop):
            sweep([config], tmp_path, engine="sequential")
    monkeypatch.setattr("lowrank_dp.train.loop.take_step", stop)  # all its steps are done
    (outcome,) = sweep([config], tmp_path, engine="sequential")
    assert outcome.result.releases == 3


@pytest.mark.slow
def test_a_failure_does_not_stop_the_others(base, tmp_path, monkeypatch):
    configs = [
        replace(base, task="sst3"),
        base,
        replace(base, learning_rate=1e12, optimizer="sgd"),
        replace(base, batch_size=1000),
        replace(base, seed=1),
    ]
    outcomes = sweep(configs, tmp_path, engine="sequential")
    assert [outcome.result is None for outcome in outcomes] == [True, False, True, True, False]
    assert "did you mean 'sst2'" in outcomes[0].error and not outcomes[1].error
    assert "learning rate" in outcomes[2].error and "at most the 40" in outcomes[3].error
    assert all("\n" not in outcome.error for outcome in outcomes)
    # a run that cannot be resumed begins again once its folder is deleted
    assert outcomes[3].error.endswith(f"(folder of the run: {run_folder(configs[3], tmp_path)})")
    assert [outcome.diverged for outcome in outcomes] == [False, False, True, False, False]
    kept = run_folder(configs[2], tmp_path) / "diverged.json"
    with monkeypatch.context() as patch:  # a run that diverged is not made again
        calls = counting(patch)
        assert sweep(configs[2:3], tmp_path, engine="sequential") == outcomes[2:3]
        assert not calls
        kept.unlink()
        assert sweep(configs[2:3], tmp_path, engine="sequential") == outcomes[2:3]
        assert len(calls) == 1 and kept.exists()
    trained = counting(monkeypatch)  # a failed run is tried again
    assert sweep(configs[:2], tmp_path, engine="sequential") == outcomes[:2]
    assert trained == configs[:2]


def test_models_are_kept_on_demand(base, tmp_path):
    (outcome,) = sweep([base], tmp_path, engine="sequential", keep_model=True)
    names = {path.name for path in run_folder(base, tmp_path).iterdir()}
    assert {"model.safetensors", "membership.json", "training.json"} <= names
    assert outcome.result is not None
    assert sweep([base], tmp_path, engine="sequential") == [outcome]


def test_a_run_that_finished_without_its_checkpoint_is_named(base, tmp_path):
    """The run is not trained again by itself, and does not pass for one with a checkpoint."""
    (first,) = sweep([base], tmp_path, engine="sequential")
    folder, other = run_folder(base, tmp_path), replace(base, seed=1)
    outcomes = sweep([base, other], tmp_path, engine="sequential", keep_model=True)
    assert outcomes[0].result is None and not outcomes[0].diverged
    assert outcomes[0].error.startswith(f"{folder} holds a finished run without its checkpoint")
    assert "delete this folder" in outcomes[0].error and "\n" not in outcomes[0].error
    assert outcomes[1].result is not None and not outcomes[1].error
    assert sweep([base], tmp_path, engine="sequential") == [first]
    shutil.rmtree(folder)
    (again,) = sweep([base], tmp_path, engine="sequential", keep_model=True)
    assert again.result is not None and (folder / "model.safetensors").exists()


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff"])
def test_a_damaged_reason_of_divergence_counts_as_absent(content, base, tmp_path):
    """The sweep deletes the damaged file, and trains the run."""
    file = run_folder(base, tmp_path) / "diverged.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    (outcome,) = sweep([base], tmp_path, engine="sequential")
    assert outcome.result is not None and not outcome.error and not file.exists()


def test_a_reason_of_divergence_that_cannot_be_read_or_saved_stops_no_sweep(
    base, tmp_path, monkeypatch
):
    def diverge(*arguments, **options):
        raise Diverged("the loss is NaN")

    def full(path, *arguments, write=sweep_module.write_json, **options):
        if path.name == sweep_module.DIVERGED:
            raise OSError("No space left on device")
        write(path, *arguments, **options)

    (run_folder(base, tmp_path) / "diverged.json").mkdir(parents=True)
    (outcome,) = sweep([base], tmp_path, engine="sequential")
    assert outcome.result is None and "directory" in outcome.error and not outcome.diverged
    monkeypatch.setattr(sweep_module, "train", diverge)
    monkeypatch.setattr(sweep_module, "write_json", full)
    (outcome,) = sweep([replace(base, seed=1)], tmp_path, engine="sequential")
    assert outcome.diverged and outcome.error == "the loss is NaN"


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


def test_every_field_of_the_recipe_is_part_of_a_folders_name(base):
    """Another value of any training field is another run; the same values are the same run."""
    base = replace(base, noise_multiplier=None, epsilon=2.0)
    changes = {
        "model": "other",
        "task": "other",
        "method": "lora",
        "delta": 1e-5,
        "max_grad_norm": 2.0,
        "unit": "group",
        "steps": 3,
        "batch_size": 11,
        "optimizer": "sgd",
        "learning_rate": 2e-3,
        "beta1": 0.5,
        "weight_decay": 0.1,
        "schedule": "linear",
        "scheme": "optimal",
        "momentum_beta": 0.9,
        "filter_b": (0.5,),
        "lora_init": "gaussian",
        "train_embeddings": True,
        "train_layers": 1,
        "dropout": True,
        "max_examples": 30,
        "data_seed": 1,
        "max_length": 20,
        "padding": "max-length",
        "holdout": 5,
        "membership": "half",
        "micro_batch_size": 32,
        "precision": "bf16",
        "prefix_dtype": "bf16",
        "eval_every": 5,
        "eval_examples": 50,
        "generate": False,
        "num_beams": 2,
        "max_new_tokens": 8,
        "snapshot_every": 5,
        "seed": 7,
        "device": "cuda",
        "epsilon": 3.0,
        "compile": True,
        "shard": True,
        "text_column": "a",
        "pair_column": "b",
        "label_column": "c",
        "prompt_column": "d",
        "target_column": "e",
        "group_column": "f",
        "skip_zeros": True,
        "disk_kappa": 0.7,
        "precondition": "generated",
    }
    others = {
        "warmup_steps": {"warmup_steps": 1, "schedule": "linear"},
        "filter_a": {"filter_b": (0.5,), "filter_a": (0.1,)},
        "scheme_options": {"scheme": "truncate", "scheme_options": {"k": 2}},
        "below": {"scheme": "optimal", "below": "zero"},
        "restore_method": {"scheme": "optimal", "restore_method": "exact"},
        "noise_floor": {"optimizer": "adam-bc", "noise_floor": 0.5},
        "rank": {"method": "lora", "rank": 4},
        "lora_alpha": {"method": "lora", "lora_alpha": 3.0},
        "precondition_power": {"precondition": "generated", "precondition_power": 0.25},
        "precondition_rows": {"precondition": "generated", "precondition_rows": 100},
        "precondition_steps": {"precondition": "generated", "precondition_steps": 5},
        "precondition_rate": {"precondition": "generated", "precondition_rate": 1e-2},
        "precondition_every": {"precondition": "noisy", "precondition_every": 3},
        "precondition_freeze_vectors": {
            "precondition": "generated",
            "precondition_freeze_vectors": True,
        },
        "diagnostic": {"scheme": "oracle", "diagnostic": True},
        "noise_multiplier": {"epsilon": None, "noise_multiplier": 0.9},
        "non_private": {"epsilon": None, "non_private": True},
        "noise_free": {"epsilon": None, "noise_free": True},
        "implicit_noise": {"epsilon": None, "non_private": True, "implicit_noise": "fresh-a"},
        "target_modules": {"method": "lora", "target_modules": ("query",)},
    }
    unseeded = {"secure_rng"}  # goes without a seed, so never in a sweep
    left_out = unseeded | {*INCIDENTAL}
    assert {*changes, *others} == {field.name for field in fields(TrainConfig)} - left_out
    configs = [
        base,
        *(replace(base, **{name: value}) for name, value in changes.items()),
        *(replace(base, **several) for several in others.values()),
        replace(base, scheme="truncate", scheme_options={"k": 3}),
    ]
    assert len({run_folder(config, "runs") for config in configs}) == len(configs)
    for config in configs:
        again = TrainConfig.from_json(json.loads(json.dumps(config.as_json())))
        assert run_folder(again, "runs") == run_folder(config, "runs")


def test_an_engine_that_is_not_installed_is_named(base, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for engine in ("ray", "dask"):
        with pytest.raises(
            ValueError,
            match=rf"^engine '{engine}' is not installed: "
            r"pip install '\.\[distributed\]' in a clone of this package$",
        ):
            sweep([base], tmp_path / "runs", engine=engine)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_that_another_process_holds_is_waited_for(base, tmp_path, monkeypatch):
    holding = runs.open_run(run_folder(base, tmp_path))
    holding.__enter__()
    release = threading.Timer(0.5, holding.__exit__, (None, None, None))
    release.start()
    (outcome,) = sweep([base], tmp_path, engine="sequential")
    release.join()
    assert outcome.result.releases == 2
    monkeypatch.setattr(sweep_module, "PATIENCE", -1)
    with runs.open_run(run_folder(base, tmp_path), resume=True):
        (outcome,) = sweep([base], tmp_path, engine="sequential")
    assert outcome.result is None and "in use by another run" in outcome.error
    assert not outcome.diverged


def test_a_worker_that_dies_each_time_is_an_outcome(base, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "run", lambda job, jobs, engine, workers: [(0, None)])
    (outcome,) = sweep([base], tmp_path, num_workers=2)
    assert outcome.result is None and "its worker died 3 times" in outcome.error
    assert not outcome.diverged
    monkeypatch.undo()  # the worker no longer dies
    (outcome,) = sweep([base], tmp_path, engine="sequential")
    assert outcome.result.releases == 2


def test_concurrent_runs_share_the_cores(base, tmp_path, monkeypatch):
    given = []

    def run(job, jobs, engine, workers):
        given.append((workers, job.keywords["threads"]))
        yield 0, None

    monkeypatch.setattr(engines.os, "cpu_count", lambda: 17)
    monkeypatch.setattr(engines, "run", run)
    for workers in (1, 3, 17, 20, None):
        sweep([base], tmp_path, num_workers=workers)
    sweep([replace(base, device="cuda")], tmp_path)
    sweep([base], tmp_path, num_workers=3, engine="sequential")
    sweep([replace(base, device="cuda")], tmp_path, engine="dask")  # GPUs of other machines
    # 3 runs of 5 threads leave two of 17 cores idle; runs on one GPU share its memory
    assert given == [(1, 17), (3, 5), (17, 1), (20, 1), (17, 1), (4, 4), (3, None), (17, None)]


def test_the_last_attempt_at_a_job_has_no_other_beside_it(monkeypatch):
    """A job that kills the pool in every attempt fails alone; the job beside it succeeds."""

    class Died(Exception):
        pass

    @contextlib.contextmanager
    def connected(engine, num_workers):
        yield lambda: None, (Died,)

    tried = []

    def pool(function, jobs, waiting, begun, backend, num_workers):
        while waiting:
            side_by_side, waiting[:] = waiting[:num_workers], waiting[num_workers:]
            begun.update(side_by_side)
            tried.append(side_by_side)
            if "kills" in [jobs[i] for i in side_by_side]:
                raise Died
            yield from ((i, function(jobs[i])) for i in side_by_side)

    monkeypatch.setattr(engines, "_connected", connected)
    monkeypatch.setattr(engines, "_pool", pool)
    found = dict(engines.run(str.upper, ["kills", "a", "b"], "loky", 2))
    assert found == {0: None, 1: "A", 2: "B"}
    assert sum(0 in jobs for jobs in tried) == 3 and [0] in tried and [1] in tried


# Engines whose workers die, as by kill -9


@pytest.fixture
def cluster(request):
    """Yield the name of an engine; for Ray and Dask, a cluster of two workers runs meanwhile."""
    name = request.param
    if name == "loky":
        yield name
    elif name == "ray":
        cluster_utils = pytest.importorskip("ray.cluster_utils")
        small = {"num_cpus": 2, "object_store_memory": 80 << 20}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            started = cluster_utils.Cluster(initialize_head=True, head_node_args=small)
            patch.setenv("RAY_ADDRESS", started.address)
            yield name
            started.shutdown()
    else:
        dask = pytest.importorskip("dask")
        distributed = pytest.importorskip("distributed")
        with (
            dask.config.set({"distributed.scheduler.allowed-failures": 0}),  # a quicker test
            distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, dashboard_address=None
            ) as started,
            dask.config.set({"scheduler-address": started.scheduler_address}),
        ):
            yield name


def killed_once(folder):
    """``sweep._run``, which is killed in its second step in the first attempt."""
    run = sweep_module._run

    def run_or_die(job, **options):
        if not (folder / "died").exists():
            (folder / "died").touch()

            def begin_release(self, stream, step, *digests, begin=runs.RunFolder.begin_release):
                begin(self, stream, step, *digests)
                if step == 1:
                    os.kill(os.getpid(), signal.SIGKILL)

            runs.RunFolder.begin_release = begin_release
        return run(job, **options)

    return run_or_die  # it cannot be imported, so it is pickled with its variables


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["loky", "ray", "dask"], indirect=True)
def test_an_engine_gives_what_this_process_gives_though_workers_die(
    cluster, base, tmp_path, monkeypatch
):
    """The worker of one job is killed once, and that of another job in every attempt, which fails.

    Then a run is killed in its second step, and another worker resumes the run from its last
    snapshot (not on Ray, where a job's worker is killed in the same way above).
    """
    here, folder = os.getpid(), tmp_path

    def job(number):
        before = len(list(folder.glob(f"{number} *")))
        if before < {2: 1, 3: 1000}.get(number, 0):
            (folder / f"{number} {before}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.getpid() != here
        return 10 * number

    batches = [[0, 1, 2, 3, 4]]
    if cluster == "ray":  # Ray's workers take seconds to start, so it gets fewer attempts
        monkeypatch.setattr(engines, "ATTEMPTS", 2)
        batches = [[2], [3, 4]]  # otherwise job 3 could use up an attempt of job 2
    for jobs in batches:
        found = {jobs[i]: result for i, result in engines.run(job, jobs, cluster, 2)}
        assert found == {number: None if number == 3 else 10 * number for number in jobs}
    deaths = {number: len(list(folder.glob(f"{number} *"))) for number in (2, 3)}
    # Workers share a pool in all attempts but the last. So the one death of job 2 may use up one
    # attempt of job 3 before job 3 begins, and on loky the death of either job ends the pool.
    assert deaths[2] == 1 and deaths[3] >= {"loky": 1, "ray": 1, "dask": 2}[cluster]
    if cluster == "loky":  # the only worker may die too
        assert dict(engines.run(job, [3, 4], cluster, 1)) == {0: None, 1: 40}

    configs = [replace(base, steps=3, snapshot_every=1), replace(base, task="sst3")]
    configs = configs if cluster == "loky" else configs[:1]
    alone = sweep(configs, tmp_path / "alone", engine="sequential")
    if cluster != "ray":
        monkeypatch.setattr(sweep_module, "_run", killed_once(tmp_path))
    there = sweep(configs, tmp_path / "runs", num_workers=2, engine=cluster)
    assert (tmp_path / "died").exists() == (cluster != "ray")
    assert [outcome.config for outcome in there] == configs
    for one, two in zip(there, alone, strict=True):
        assert one.error == two.error.replace(str(tmp_path / "alone"), str(tmp_path / "runs"))
    mine, other = there[0].result, alone[0].result
    assert mine.releases == other.releases == 3 and mine.epsilon == other.epsilon
    for one, two in zip(mine.curve, other.curve, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_torchrun_is_not_for_sweeps_and_attacks(base, tmp_path, monkeypatch):
    """Each process would do all of the work, and write to the same folders."""
    from lowrank_dp.mia.attack import Options

    monkeypatch.setenv("WORLD_SIZE", "2")
    for begin in (lambda: sweep([base], tmp_path, engine="sequential"), Options):
        with pytest.raises(ValueError, match=r"as one process, not by torchrun .*use --engine"):
            begin()


def test_a_folder_does_not_depend_on_fields_at_their_defaults(base, tmp_path):
    """A later version, which has more fields, therefore finds the runs of this version."""
    folder = run_folder(base, tmp_path)
    chosen = base.chosen()
    assert replace(TrainConfig(non_private=True), **{"non_private": False, **chosen}) == base
    assert "beta1" not in chosen and "scheme_options" not in chosen and "model" in chosen
    assert run_folder(replace(base, prefix_cache="elsewhere"), tmp_path) == folder
    others = [
        {"beta1": 0.0},
        {"scheme": "partial", "scheme_options": {"alpha": 0.9}},
        {"steps": 99},
    ]
    assert len({folder, *(run_folder(replace(base, **o), tmp_path) for o in others)}) == 4
