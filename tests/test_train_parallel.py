"""Runs over several processes: against one process, against dp-accounting, and with failures."""

import json
import math
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from lowrank_dp._rounding import rounded_up
from lowrank_dp.artifacts.runs import RunFolder
from lowrank_dp.data import load_task
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.train import TrainConfig, load_result, processes
from lowrank_dp.train import loop as train_module
from lowrank_dp.train.loop import train
from lowrank_dp.train.setup import prepare
from lowrank_dp.train.state import environment, first_state
from lowrank_dp.train.step import take_step
from tests.forks import MAIN
from tests.tasks import Stop, train_words

SIGMA, BOUND, STEPS, ABOUT = 0.3, 0.5, 5, 60
TRAIN = len(load_task("generated", max_examples=ABOUT).train)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def model(small_bert):
    return str(small_bert)


def make_config(model, **changes):
    base = {
        "model": model,
        "task": "generated",
        "max_examples": ABOUT,
        "noise_multiplier": SIGMA,
        "max_grad_norm": BOUND,
        "steps": STEPS,
        "batch_size": 13,
        "learning_rate": 1e-2,
        "optimizer": "sgd",
        "micro_batch_size": 4,
        "eval_every": 100,
        "snapshot_every": 2,
        "eval_examples": 20,
        "seed": 5,
    }
    return TrainConfig(**base | changes)


RUNS = {
    "restored": {"scheme": "optimal", "momentum_beta": 0.9, "restore_method": "exact"},
    "groups": {"unit": "group", "method": "lora", "optimizer": "adam"},
    "oracle": {"scheme": "oracle", "diagnostic": True},
    "non-private": {"noise_multiplier": None, "non_private": True},
    "one at most": {"batch_size": 1},  # most shares of a sample have no rows
    "dropout": {"dropout": True, "scheme": "soft"},
    "unseeded": {"seed": None},
    "secure": {"seed": None, "secure_rng": True},  # two processes cannot draw the same
}

# In each process: runs with all steps recorded, distributed and local restoration, failing runs
TOGETHER = """
import hashlib, json, os, sys
import torch
from safetensors.torch import save_file
from lowrank_dp.train import loop as module
from lowrank_dp.train import setup as setup_module
from lowrank_dp.train import step as step_module
from lowrank_dp.__main__ import main
from lowrank_dp.artifacts.runs import RunFolder
from lowrank_dp.restore import GradientRestorer, restore_gradients
from lowrank_dp.train import TrainConfig, processes, train
from lowrank_dp.train.checks import StepChecks
torch.set_num_threads(1)
folder, rank = sys.argv[2], int(os.environ["RANK"])
configs = {name: TrainConfig.from_json(document)
           for name, document in json.loads(sys.argv[1]).items()}
report = {"steps": {}, "failed": {}, "drawn": {}, "taken": {}}

def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors.values())
                          ).hexdigest()

original = module.take_step
def looking(setup, state):
    clean, noisy = original(setup, state)
    rows = report["drawn"].get(name, [])
    if rows:
        rows[-1] = [setup.rows[row]["input_ids"] for row in rows[-1]]
    gradients = {n: p.grad for n, p in setup.trained.items()}
    report["steps"].setdefault(name, []).append(
        [digest(noisy), digest(setup.trained), digest(gradients), state.stream])
    if rank == 0:
        for kind, tensors in (("clean", clean), ("noisy", noisy), ("weights", setup.trained)):
            save_file({n: t.detach() for n, t in tensors.items()},
                      f"{folder}/{name}-{kind}-{state.step}.safetensors")
    return clean, noisy

draw, batches = step_module._draw, setup_module.micro_batches
def drawing(*arguments):
    chosen = draw(*arguments)
    report["drawn"].setdefault(name, []).append(chosen)
    return chosen

def taking(rows, *others, **named):
    report["taken"].setdefault(name, []).append([row["input_ids"] for row in rows])
    return batches(rows, *others, **named)

module.take_step, step_module._draw, setup_module.micro_batches = looking, drawing, taking
StepChecks.rows_to_compare = lambda self, step: []  # which takes rows beside the sample
for name, config in configs.items():
    result = train(config, f"{folder}/{name}", show_progress=False)
    report[name] = [result.epsilon, result.releases, result.privacy]
module.take_step, step_module._draw, setup_module.micro_batches = original, draw, batches

generator = torch.Generator().manual_seed(0)
sums = {f"m{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(
    [(30, 40), (40, 30), (64, 64), (64, 8), (5,), (1, 40), (90, 20), (64, 64)])}
sums["m2"][0] += 100
done = []
def work(some):
    done.extend(some)
    return restore_gradients(some, 1.0, "optimal")[0]
with processes.processes("cpu"):
    spread = processes.map_over_ranks(work, sums)
report["spread"] = [done, digest(spread), digest(restore_gradients(sums, 1.0, "optimal")[0])]

def failing(owner, what, at, error, count):
    function, calls = getattr(owner, what), []
    def called(*args, **kwargs):
        calls.append(0)
        if rank == at and len(calls) == count:
            raise error
        return function(*args, **kwargs)
    setattr(owner, what, called)
    return lambda: setattr(owner, what, function)

config, last = configs["dropout"], f"{folder}/failing"
for case, arguments in {
        "disk": (RunFolder, "begin_release", 0, OSError("ledger could not be written"), 3),
        "gradient": (step_module, "clipped_sum_over", 1, ValueError("row 3 is not finite"), 2),
        "evaluation": (module, "_evaluate", 0, KeyError("a bug"), 1),
        "memory": (GradientRestorer, "restore", 1, torch.OutOfMemoryError("too large"), 1),
        "other": None}.items():
    restore = failing(*arguments) if arguments else lambda: None
    try:
        if case == "other" and rank == 1:
            config = TrainConfig.from_json({**config.as_json(), "learning_rate": 0.5})
        train(config, last, resume=case != "disk", show_progress=False)
    except BaseException as error:
        report["failed"][case] = [type(error).__name__, str(error), repr(error.__cause__)]
    restore()
train(configs["dropout"], last, resume=True, show_progress=False)
report["codes"] = []
for words in json.loads(sys.argv[3]):
    try:
        main(words)
    except SystemExit as stop:
        report["codes"].append(stop.code)
json.dump(report, open(f"{folder}/rank-{rank}.json", "w"))
"""


@pytest.fixture(scope="module")
def together(model, torchrun, tmp_path_factory):
    """What two processes did: the configurations, the folder, and a report from each process."""
    folder = tmp_path_factory.mktemp("together")
    configs = {name: make_config(model, **changes) for name, changes in RUNS.items()}
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text(
            "text,label,who\n"
            + "".join(
                f"the film {i} is {('dull', 'fresh')[i % 2]},{i % 2},{i % 30}\n" for i in range(60)
            )
        )
    configs["groups"] = replace(
        configs["groups"], task=str(folder), group_column="who", max_examples=None
    )
    (folder / "worker.py").write_text(TOGETHER)
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").write_text("x")
    good = train_words(make_config(model), folder / "full", "--resume")
    bad = [word.replace(f"multiplier={SIGMA}", "multiplier=-1") for word in good]
    done = torchrun(
        2,
        str(folder / "worker.py"),
        json.dumps({name: config.as_json() for name, config in configs.items()}),
        str(folder),
        json.dumps([bad, good]),
    )
    (folder / "said").write_text(done.stderr)
    return (
        configs,
        folder,
        [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)],
    )


@pytest.mark.parametrize("name", RUNS)
def test_weights_and_gradients_are_the_same_to_the_bit_on_every_process(name, together):
    _, _, reports = together
    first, second = (report["steps"][name] for report in reports)
    assert len(first) == STEPS and first == second
    assert len({weights for _, weights, *_ in first}) == STEPS  # the weights do change
    assert reports[0][name] == reports[1][name]


@pytest.mark.parametrize("name", RUNS)
def test_the_processes_share_out_one_sample(name, together):
    """Each row of rank 0's sample is clipped once, by one of the two processes."""
    _, _, reports = together
    assert name not in reports[1]["drawn"]
    drawn, *taken = reports[0]["drawn"][name], *(report["taken"][name] for report in reports)
    assert len(drawn) == STEPS and any(drawn)
    for whole, first, second in zip(drawn, *taken, strict=True):
        assert sorted(first + second) == sorted(whole)
        assert len(first) - len(second) in (0, 1)


@pytest.mark.parametrize("name", list(RUNS)[:-3])
def test_two_processes_train_as_one_does(name, together):
    """The same draws in this process give the same sums (before and after noise) and weights."""
    configs, folder, reports = together
    setup = prepare(configs[name], 5)
    start = {n: p.detach().clone() for n, p in setup.trained.items()}
    stream = reports[0]["steps"][name][0][-1]
    state = first_state(configs[name], stream)
    for step in range(1, STEPS + 1):
        clean, noisy = take_step(setup, state)
        for kind, want in (("clean", clean), ("noisy", noisy)):
            got = load_file(folder / f"{name}-{kind}-{step}.safetensors")
            largest = max(float(total.abs().max()) for total in want.values())
            assert got.keys() == want.keys()
            for n in want:  # the last bits of weights differ, and so do gradients
                assert float((got[n] - want[n]).abs().max()) <= 1e-5 * max(largest, 0.1), (step, n)
    got = load_file(folder / f"{name}-weights-{STEPS}.safetensors")
    for n, p in setup.trained.items():
        moved = max(float((p.detach() - start[n]).abs().max()), 1e-3)
        assert float((got[n] - p.detach()).abs().max()) <= 1e-4 * moved, n


def test_noise_is_added_once(together):
    """A chi-squared test of the variance over all entries and steps (false alarm rate 1e-6)."""
    _, folder, _ = together
    noise = np.concatenate(
        [
            (
                load_file(folder / f"restored-noisy-{step}.safetensors")[name].double()
                - total.double()
            )
            .flatten()
            .numpy()
            for step in range(1, STEPS + 1)
            for name, total in load_file(folder / f"restored-clean-{step}.safetensors").items()
        ]
    )
    total = float(np.sum((noise / (SIGMA * BOUND)) ** 2))
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], noise.size)
    assert noise.size > 50_000 and low < total < high
    half = noise.size // STEPS  # each step has noise of its own
    assert abs(np.corrcoef(noise[:half], noise[half : 2 * half])[0, 1]) < 5 / math.sqrt(half)


def test_epsilon_is_that_of_one_process(together):
    configs, _, reports = together
    for name in ("restored", "one at most", "unseeded", "secure"):
        mechanism = GaussianMechanism(SIGMA, BOUND, configs[name].batch_size / TRAIN)
        epsilon, releases, privacy = reports[1][name]
        assert releases == STEPS and epsilon == mechanism.epsilon(STEPS, TRAIN**-1.1)
        assert f"Poisson sampling at rate {rounded_up(mechanism.sample_rate)};" in privacy
    assert reports[0]["oracle"][0] is reports[0]["non-private"][0] is None


def test_spread_restoration_is_restoration(together):
    _, _, reports = together
    (done, result, want), (others, *same) = (report["spread"] for report in reports)
    assert result == want and same == [result, want]
    assert not set(done) & set(others)
    assert set(done) | set(others) == {"m0", "m1", "m2", "m3", "m5", "m6", "m7"}
    assert ("m2" in done) != ("m7" in done)  # the two most expensive matrices


def test_one_that_fails_stops_all_in_one_voice(together):
    """A process that fails raises its error, and the other stops quietly; the run then resumes."""
    _, folder, reports = together
    for case, rank, kind, text in (
        ("disk", 0, "OSError", "ledger could not be written"),
        ("gradient", 1, "Diverged", "row 3 is not finite"),
        ("evaluation", 0, "KeyError", "a bug"),
        ("memory", 1, "ValueError", "ran out of memory with micro_batch_size 4: lower it"),
        ("other", 1, "ValueError", "differ in learning_rate: 0.5 / 0.01"),
    ):
        mine, others = reports[rank]["failed"][case], reports[1 - rank]["failed"][case]
        assert mine[0] == kind and text in mine[1], (case, mine)
        assert others[0] == "SystemExit" and others[1] == "2", (case, others)
        assert "another process of this run has stopped" in others[2], (case, others)
    result = load_result(folder / "failing")
    assert result.releases == STEPS  # steps are replayed, dropout included, so each counts once
    assert (folder / "failing" / "model.safetensors").read_bytes() == (
        folder / "dropout" / "model.safetensors"
    ).read_bytes()


def test_bad_input_is_one_line(together):
    """Bad input that every process finds, and bad input that only rank 0 finds."""
    _, folder, reports = together
    lines = [line for line in (folder / "said").read_text().splitlines() if "error:" in line]
    assert len(lines) == 2 and [report["codes"] for report in reports] == [[2, 2], [2, 2]], lines
    assert lines[0].startswith("error: noise_multiplier must be") and "thesis.tex" in lines[1]


# Processes that are killed, and other numbers of them


def ledger(folder):
    path = folder / "snapshots" / "releases.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = map(json.loads, text.splitlines())
    return [(line["stream"], line["step"]) for line in lines]


KILLED = """
import os, signal, sys
from lowrank_dp.__main__ import main
from lowrank_dp.artifacts.runs import RunFolder
original, calls = RunFolder.begin_release, []
def dying(self, *release):
    original(self, *release)
    calls.append(release)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
RunFolder.begin_release = dying
main(sys.argv[1:])
"""


def test_killed_and_resumed_by_another_number_of_processes(model, start, tmp_path, monkeypatch):
    """One process starts the run, three resume it, and one finishes it.

    No agent stops the other two processes when rank 0 is killed.
    """
    config = make_config(model, steps=9, dropout=True)
    original = train_module.take_step

    def breaking(setup, state):
        if state.step == 3:
            raise Stop
        return original(setup, state)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "take_step", breaking)
        with pytest.raises(Stop):
            train(config, tmp_path)
    assert [step for _, step in ledger(tmp_path)] == [0, 1, 2, 3]

    three = start(3, KILLED, *train_words(config, tmp_path, "--resume"))
    said = [process.communicate(timeout=400) for process in three]  # the group's timeout: two hours
    assert [process.returncode for process in three] == [-signal.SIGKILL, 2, 2]
    for out, err in said[1:]:
        assert (
            err.count("\n") == 1
            and not out
            and err.startswith(
                "error: another process of this run has stopped or can't be reached ("
            )
        ), err
    assert said[0][0].startswith("trains: ") and ", by 3 processes\n" in said[0][0]
    assert said[0][1].startswith("warning: resuming with new noise from step 2 on")
    assert not (tmp_path / "training.json").exists()

    snapshot, _ = RunFolder(tmp_path).load_snapshot()
    assert snapshot["step"] == 6
    assert snapshot["identity"].items() >= {**environment("cpu"), "processes": "3"}.items()
    result = train(config, tmp_path, resume=True)
    # three noise streams: steps 0 to 3, steps 2 to 6, and steps 6 to 8, which this process draws
    assert result.releases == 4 + 5 + 3
    mechanism = GaussianMechanism(SIGMA, BOUND, 13 / TRAIN)
    assert result.epsilon == mechanism.epsilon(12, result.delta)


@pytest.mark.parametrize("layout", ["copies", "shards"])
def test_signals_stop_all_after_one_step(layout, model, start, tmp_path):
    """All processes get SIGTERM, as from torchrun: the step is saved, and rank 0 says so."""
    config = make_config(
        model, steps=100_000, snapshot_every=100_000, eval_every=100_000, shard=layout == "shards"
    )
    two = start(2, MAIN, *train_words(config, tmp_path, "--resume"))
    end = time.monotonic() + 120
    while len(ledger(tmp_path)) < 3 and time.monotonic() < end:
        time.sleep(0.1)
    for process in two:
        process.send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120) for process in two]
    assert [process.returncode for process in two] == [143, 143], said
    snapshot, _ = RunFolder(tmp_path).load_snapshot()
    step = len(ledger(tmp_path))
    assert snapshot["step"] == step >= 3
    assert said[0][1].startswith(f"stopped by SIGTERM: step {step} of 100000 is saved;"), said
    assert said[0][1].count("\n") == 1 and not said[1][0] and not said[1][1]


# Without any process


def test_owners():
    shapes = {
        "embedding": (768, 32),
        "bias": (32,),
        "stack": (3, 4, 4),
        **{f"layer {i}": (32, 32) for i in range(7)},
        "wide": (32, 96),
    }
    cost = {name: math.prod(shape) for name, shape in shapes.items()}
    for count in (1, 2, 3, 20):
        owner = processes.owners(shapes, count)
        assert owner.keys() == cost.keys() and set(owner.values()) <= set(range(count))
        loads = [sum(cost[n] for n in owner if owner[n] == rank) for rank in range(count)]
        best = max(sum(cost.values()) / count, max(cost.values()))  # no other split is better
        assert max(loads) <= 4 / 3 * best
    assert processes.owners(dict(reversed(shapes.items())), 3) == processes.owners(shapes, 3)


def test_alone_nothing_is_connected(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes.processes("cpu"):
        assert not torch.distributed.is_initialized()
        assert (processes.rank(), processes.world_size()) == (0, 1)
        assert processes.broadcast_from_rank0({"a": 1}, {"t": torch.ones(2)})[0] == {"a": 1}
    assert "processes" not in environment("cpu")


def test_a_process_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for local, device in (("1", "cuda"), ("0", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", local)
        with (
            pytest.raises(ValueError, match="device must be cpu, or cuda with a GPU for each"),
            processes.processes(device),
        ):
            pass
