"""Fixtures that several test files use."""

import signal
import subprocess
import sys
from collections import Counter
from functools import partial

import pytest
import torch

from lowrank_dp import engines
from tests.forks import Forks
from tests.tasks import ENVIRONMENT, save_bert, write_reviews

# A shell without job control starts background jobs with SIGINT ignored. Child processes inherit
# this setting, and the tests send SIGINT to their child processes.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Run the files with the most slow tests first, so that no worker is idle near the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # the sort is stable: the order in a file stays


@pytest.fixture(scope="session")
def torchrun():
    """``torchrun(count, script, *arguments)``: run ``count`` processes; fail unless all succeed."""

    def run(count, *arguments):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(count),
                *arguments,
            ],
            capture_output=True,
            text=True,
            timeout=400,
            env=ENVIRONMENT,
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def start():
    """``start(count, script, *arguments)``: start connected processes, without torchrun's agent."""
    with Forks() as forks:
        yield forks.start


@pytest.fixture
def without_cpp(monkeypatch):
    """What is compiled is traced, and run as traced: inductor takes 20 s for its C++."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def in_this_process():
    """Run sweeps in this process: starting new workers would take longer than the runs.

    Runs keep to one thread. With the threads that a sweep gives its workers, a run takes ten times
    as long if a second process of pytest is running.
    """

    def run(job, jobs, engine, workers):
        return engines_run(job, jobs, "sequential", workers)

    engines_run, threads = engines.run, torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "run", run)
        patch.setattr(torch, "set_num_threads", lambda _: None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread():
    """Use one torch thread: several threads slow small sums down on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_waiting(monkeypatch):
    """Let ``time.sleep`` fail, because the hub's libraries wait between their attempts."""

    def sleep(seconds):
        raise AssertionError(f"a wait of {seconds} s")

    monkeypatch.setattr("time.sleep", sleep)


@pytest.fixture(scope="session")
def small_bert(tmp_path_factory):
    """Return the folder of a BERT of two layers. Tests must not change the folder."""
    folder = tmp_path_factory.mktemp("small_bert")
    save_bert(folder, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return the configuration of a quick run: a BERT of one layer, forty sentences, two steps."""
    from lowrank_dp.train import TrainConfig

    folder = tmp_path_factory.mktemp("places")
    save_bert(folder / "model", hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    write_reviews(folder / "data")
    return TrainConfig(
        model=str(folder / "model"),
        task=str(folder / "data"),
        steps=2,
        batch_size=10,
        noise_multiplier=0.8,
        learning_rate=1e-3,
        seed=0,
    )
