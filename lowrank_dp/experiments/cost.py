"""Cost of a sweep of training runs, extrapolated from a measured step."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lowrank_dp.train import Setup, TrainConfig
from lowrank_dp.train.loop import train

_MANY = 1000  # runs of a sweep, which are worth a cache


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
    """Train one step twice in a temporary folder, with the threads that a worker of a sweep has.

    The second run is measured: the first one loads the libraries, and fills the cache of the frozen
    blocks' outputs, which all runs of a sweep share. The time that is not spent in the step is
    split by the number of examples that are evaluated. Concurrent runs share the machine's memory
    bandwidth, and may be slower.
    """
    one = replace(config, steps=1, seed=0, holdout=0, generate=False)
    with tempfile.TemporaryDirectory() as folder, _threads(threads_of(num_workers)):
        one = replace(one, prefix_cache=config.prefix_cache or str(Path(folder) / "cache"))
        for name in ("first", "measured"):
            began, seen = time.perf_counter(), list[int | float]()
            result = train(
                one,
                Path(folder) / name,
                keep_model=False,
                show_progress=False,
                on_start=partial(_note, seen),
                prefix_shared_by=_MANY,
            )
            ended = time.perf_counter()
    started, validation, members = seen
    validation, members = (min(n, config.eval_examples) for n in (validation, members))
    share = validation / (2 * validation + members)  # before and after the step, and at the end
    evaluation = share * (ended - started - result.seconds)
    return Cost(ended - began - result.seconds - evaluation, result.seconds, evaluation)


def _note(seen: list[int | float], setup: Setup, _: int) -> None:
    """Note the time at which a run begins, and the sizes of its splits."""
    seen.extend([time.perf_counter(), len(setup.task.validation), len(setup.rows)])


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
