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

# A shell without job control starts background jobs with SIGINT ignored, and children inherit that;
# the tests send SIGINT to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Begin with the files that have the most slow tests, so that no worker is left waiting."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # stable: within a file the order stays


@pytest.fixture(scope="session")
def torchrun():
    """``torchrun(count, script, *arguments)``: what ``count`` processes printed, exit code 0."""

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
    """``start(count, script, *arguments)``: connected processes, without the agent of torchrun."""
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
    """Sweeps run in this process: new workers would take longer to start than the runs take.

    Runs keep to one thread. The threads that a sweep gives its workers take ten times as long
    beside a second process of pytest.
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
    """One torch thread: threads slow small sums down on a busy machine."""
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
    """Folder of a BERT of two layers; to be read only."""
    folder = tmp_path_factory.mktemp("small_bert")
    save_bert(folder, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A configuration of a quick run: a BERT of one layer, forty sentences, two steps."""
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
