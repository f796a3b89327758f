"""Cost of a sweep of training runs, extrapolated from a measured step."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from lowrank_dp.train import TrainConfig
from lowrank_dp.train.loop import train


@dataclass(frozen=True)
class Cost:
    """Measured seconds of a run: once per run, per step, and per evaluation."""

    once: float
    step: float
    evaluation: float

    def hours(self, runs: int, steps: int) -> float:
        """Return the hours of ``runs`` runs in turn, with an evaluation after each step."""
        return runs * (self.once + steps * (self.step + self.evaluation)) / 3600


def measure_cost(config: TrainConfig, num_workers: int | None) -> Cost:
    """Train two steps in a temporary folder, with the threads that a worker of a sweep has.

    The second step is taken, since the first one also loads libraries. The time that is not spent
    in steps is split by the number of examples that are evaluated. Concurrent runs share the
    machine's memory bandwidth, and may be slower.
    """
    began, seen = time.perf_counter(), []
    two = replace(config, steps=2, eval_every=1, seed=0, holdout=0, generate=False)
    with tempfile.TemporaryDirectory() as folder, _threads(threads_of(num_workers)):
        result = train(
            two,
            folder,
            keep_model=False,
            show_progress=False,
            on_start=lambda setup, _: seen.extend(
                [time.perf_counter(), len(setup.task.validation), len(setup.rows)]
            ),
        )
    ended = time.perf_counter()
    started, validation, members = seen
    validation, members = (min(n, config.eval_examples) for n in (validation, members))
    share = validation / (3 * validation + members)  # after each step, before both, and at the end
    evaluation = share * (ended - started - result.seconds)
    step = result.curve[2]["seconds"] - result.curve[1]["seconds"]
    once = ended - began - result.seconds - 2 * evaluation
    return Cost(once, step, evaluation)


def workers_of(num_workers: int | None) -> int:
    """Return the number of concurrent runs of a sweep on this machine."""
    return num_workers or os.cpu_count() or 1


def threads_of(num_workers: int | None) -> int:
    """Return the number of threads of each run of a sweep on this machine."""
    return max(1, (os.cpu_count() or 1) // workers_of(num_workers))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
