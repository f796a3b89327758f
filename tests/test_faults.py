"""Faults injected into every command that writes: files stay intact and stated claims hold.

Runs broken off at chosen lines, damaged snapshots and ledgers are in test_train_resume.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lowrank_dp.sweep import run_folder, sweep
from lowrank_dp.train import load_result
from lowrank_dp.train.loop import train
from tests.oracles import assert_refused
from tests.tasks import run_main, train_words, write_reviews

pytestmark = pytest.mark.usefixtures("one_thread")

# A process that imports once and then forks, for each job, a child that is killed or limited.
JOBS = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
import torch
from lowrank_dp import figures  # imported once, with all that the jobs need
from lowrank_dp.__main__ import main
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.mia import attack
from lowrank_dp.models import load_model
from lowrank_dp.sweep import sweep
from lowrank_dp.train import TrainConfig, train
torch.set_num_threads(1)
what, folder, arguments = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
configs = [TrainConfig.from_json(document) for document in arguments["configs"]]
load_model(configs[0].model)

def work():
    # every noisy sum that was drawn, noted by another hand than the ledger's
    draw = GaussianMechanism.add_noise
    def add_noise(self, *sums):
        noisy = draw(self, *sums)
        with open(f"{folder}.draws", "a") as file:
            file.write(f"{float(next(iter(noisy.values())).double().sum())!r}\\n")
        return noisy
    GaussianMechanism.add_noise = add_noise
    if what == "train":
        train(configs[0], folder, resume=True, show_progress=False)
    elif what == "sweep":
        assert all(outcome.result for outcome in sweep(configs, folder, engine="sequential"))
    else:
        main(arguments["words"])

def start(limit=None):
    if (child := os.fork()) == 0:
        code = 99
        try:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            sys.stderr = open(f"{folder}.err", "w")
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
            sys.stderr.write("" if what != "train" or not code else f"{stop}\\n")
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""

KILLED = (
    JOBS
    + """
rng, killed = random.Random(f"{what} {arguments['seed']}"), 0
while killed < arguments["kills"]:
    child = start()
    time.sleep(rng.uniform(0, arguments["seconds"]))
    os.kill(child, signal.SIGKILL)
    code = end(child)
    assert code in (0, -signal.SIGKILL), code
    if code == 0:     # it was faster
        break
    killed += 1
code = end(start())
print(json.dumps([killed, code]))
"""
)

LIMITED = (
    JOBS
    + """
print(json.dumps([end(start(limit)) for limit in (*arguments["limits"], None)]))
"""
)

SIGNALLED = (
    JOBS
    + """
ledger, codes, said = folder / "snapshots" / "releases.jsonl", [], []
for number, after in arguments["signals"]:
    child = start()
    while not ledger.exists() or ledger.read_text().count("\\n") < after:
        time.sleep(0.001)
    os.kill(child, number)
    codes.append(end(child))
    said.append(Path(f"{folder}.err").read_text())
print(json.dumps([codes, said, end(start())]))
"""
)


def run(script, what, folder, configs, **arguments):
    arguments["configs"] = [config.as_json() for config in configs]
    done = subprocess.run(
        [sys.executable, "-c", script, what, str(folder), json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def curve(result):
    return [
        {name: value for name, value in entry.items() if "seconds" not in name}
        for entry in result.curve
    ]


def assert_whole(folder):
    """Check that every file with its final name can be read, and that no temporary file is left."""
    for path in folder.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                assert all(len(file[name].tobytes()) >= 0 for name in file.files)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".pdf":
            assert path.read_bytes().rstrip().endswith(b"%%EOF")
        assert path.is_dir() or not path.name.startswith(".") or path.name == ".lock", path


def spent_at_most(folder, result):
    """Whether no more distinct noisy sums were drawn than releases were counted."""
    drawn = set(folder.with_name(f"{folder.name}.draws").read_text().split())
    return len(drawn) <= result.releases


@pytest.fixture(scope="module")
def target(base, tmp_path_factory):
    """Return a checkpoint to attack, whose members fair coins chose among eighty sentences."""
    folder = tmp_path_factory.mktemp("target")
    write_reviews(folder / "data", train=80)
    config = replace(base, task=str(folder / "data"), membership="half", delta=1e-3)
    train(config, folder / "model")
    return config, folder


def words(what, target, folder):
    if what == "figures":
        return [
            "figures",
            "--only",
            "total_variation",
            "--output",
            str(folder / "figures"),
            "--artifacts",
            str(folder / "artifacts"),
        ]
    config, place = target
    return [
        "mia",
        "--model",
        str(place / "model"),
        "--data-dir",
        config.task,
        "--base",
        config.model,
        "--shadows",
        "2",
        "--engine",
        "sequential",
        "--output",
        str(folder),
    ]


# the longest time before a kill, about that of the whole command
SECONDS = {"train": 1.5, "sweep": 2.5, "attack": 3.0, "figures": 1.5}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(25, marks=pytest.mark.long)])
@pytest.mark.parametrize("what", SECONDS)
def test_kill_9_leaves_nothing_half_done(what, kills, base, target, tmp_path):
    """After the kills, the same command ends with the result of an uninterrupted run."""
    folder = tmp_path / what
    configs = [replace(base, steps=30, snapshot_every=4, seed=seed) for seed in (1, 2)]
    done, attempt = 0, 0
    while done < kills:  # if a command ends before it is killed, another folder is used
        place = folder / str(attempt) if what != "train" else tmp_path / f"train {attempt}"
        place.parent.mkdir(exist_ok=True)
        killed, code = run(
            KILLED,
            what,
            place,
            configs,
            kills=kills - done,
            seed=attempt,
            seconds=SECONDS[what] if kills > 1 else SECONDS[what] / 2,  # fewer new folders
            words=words(what, target, place),
        )
        assert code == 0, place.with_name(f"{place.name}.err").read_text()
        done, attempt = done + killed, attempt + 1
        assert_whole(place)
    if what == "train":
        result = load_result(place)
        assert result.releases == 30 and spent_at_most(place, result)
        assert curve(result) == curve(train(configs[0], tmp_path / "alone"))
        assert not (place / "snapshots").exists()
    elif what == "sweep":
        runs = {path.name for path in place.iterdir() if path.is_dir()}
        assert runs == {run_folder(config, place).name for config in configs}
        files = {path.name for path in place.iterdir() if path.is_file()}
        assert files == {f"records-{run}.json" for run in runs}
        alone = sweep(configs, tmp_path / "alone", engine="sequential")
        for config, other in zip(configs, alone, strict=True):
            result = load_result(run_folder(config, place))
            assert result.releases == 30 and curve(result) == curve(other.result)
    elif what == "attack":
        shadows = [path for path in (place / "cache" / "shadows").iterdir() if path.is_dir()]
        assert len(shadows) == 2 and all(load_result(path).releases == 2 for path in shadows)
    else:
        names = {path.name for path in (place / "figures").iterdir()}
        assert names == {"total_variation.png", "total_variation.pdf"}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["attack", "figures"])
def test_a_full_disk_is_one_line_and_costs_nothing(what, target, base, tmp_path):
    """A size limit on files fails the command twice; without a limit, the command then succeeds."""
    place = tmp_path / what
    codes = run(LIMITED, what, place, [base], limits=[600, 6000], words=words(what, target, place))
    assert codes == [2, 2, 0]
    assert_whole(place)


@pytest.mark.parametrize("what", ["attack", "figures"])
def test_a_place_that_cannot_be_written_is_one_line(what, target, tmp_path, capsys):
    """The folder lies below a file, because root may write to folders that are read-only."""
    (tmp_path / "file").write_text("")
    code, _, said = run_main(capsys, *words(what, target, tmp_path / "file" / "below"))
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said


@pytest.mark.slow
def test_a_report_is_replaced_only_by_the_same_attack(target, tmp_path, capsys):
    """Without --output nothing is written, neither beside the checkpoint nor anywhere else."""
    config, place = target
    beside = sorted(path.name for path in (place / "model").iterdir())

    def attack(*words):
        fixed = "--model", place / "model", "--data-dir", config.task
        return run_main(capsys, "mia", *fixed, *words)

    code, out, _ = attack("--base", config.model)
    assert code in (0, 3) and "none written" in out
    assert sorted(path.name for path in (place / "model").iterdir()) == beside
    output = ["--output", str(tmp_path / "report")]
    words = ["--base", config.model, *output]
    code, out, _ = attack(*words, "--attacks", "loss")
    assert code in (0, 3) and f"files: {tmp_path / 'report'}" in out
    before = (tmp_path / "report" / "report.json").read_bytes()
    code, *_ = attack(*words, "--attacks", "loss", "--batch-size", "32")  # not what it finds
    assert code in (0, 3)
    for other in (["--attacks", "base"], ["--attacks", "loss", "--seed", "3"]):
        assert_refused(attack(*words, *other), "holds a report of other", "--force")
    assert json.loads(before) == json.loads((tmp_path / "report" / "report.json").read_bytes()) | {
        "provenance": json.loads(before)["provenance"]
    }
    (tmp_path / "report" / "report.json").write_text("{}")  # of an earlier version
    assert_refused(attack(*words, "--attacks", "loss"), "--force")
    code, *_ = attack(*words, "--attacks", "base", "--force")
    assert code in (0, 3)
    found = json.loads((tmp_path / "report" / "report.json").read_bytes())
    assert found["primary"] == "base"
    (tmp_path / "full" / "scores.csv").mkdir(parents=True)  # a file that can't be written
    code, out, err = attack("--base", config.model, "--output", tmp_path / "full")
    assert code == 2 and "scores.csv could not be written" in err and "verdict" in out


@pytest.mark.slow
def test_signals_wait_for_the_end_of_the_step(base, tmp_path):
    """SIGINT and SIGTERM each save a snapshot of the step; the resumed run ends undisturbed."""
    config = replace(base, steps=40, snapshot_every=1000, seed=3)
    asked = [(int(signal.SIGINT), 3), (int(signal.SIGTERM), 9)]
    codes, said, last = run(SIGNALLED, "train", tmp_path / "run", [config], signals=asked)
    assert codes == [130, 143] and last == 0
    for line, (number, after) in zip(said, asked, strict=True):
        assert line.startswith(f"stopped by {signal.Signals(number).name}: step "), line
        assert line.count("\n") == 1 and "--resume" in line
        assert int(line.split("step ")[1].split()[0]) >= after
    result = load_result(tmp_path / "run")
    drawn = (tmp_path / "run.draws").read_text().split()
    assert len(drawn) == len(set(drawn)) == result.releases == 40  # no step was drawn twice
    assert curve(result) == curve(train(config, tmp_path / "alone"))


def test_the_command_says_how_to_go_on(base, tmp_path, capsys, monkeypatch):
    from lowrank_dp.train.step import take_step

    def step(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*args)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr("lowrank_dp.train.loop.take_step", step)
        code, _, said = run_main(capsys, *train_words(base, tmp_path / "run"))
    assert code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert said == (
        "stopped by SIGTERM: step 1 of 2 is saved; to resume the run, repeat "
        "the command (train: with --resume)\n"
    )
    assert train(base, tmp_path / "run", resume=True).releases == 2


def test_a_clock_that_jumps_back_changes_nothing(base, tmp_path, monkeypatch):
    now = [time.time()]

    def backwards():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    monkeypatch.setattr(time, "time_ns", lambda: int(backwards() * 1e9))
    result = train(base, tmp_path / "run")
    assert result.releases == 2 and result.seconds >= result.restore_seconds >= 0
    assert all(math.isfinite(entry["seconds"]) and entry["seconds"] >= 0 for entry in result.curve)
