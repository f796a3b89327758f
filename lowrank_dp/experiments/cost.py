"""Cost of a sweep of training runs, extrapolated from one measured step."""

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

_EVALUATIONS = 3  # of a run of one step: before the step, after the step, and on the members


@dataclass(frozen=True)
class Cost:
    """Measured seconds of a run: until its first evaluation, per step, and per evaluation."""

    start: float
    step: float
    evaluation: float

    def hours(self, runs: int, steps: int) -> float:
        """Return the hours of ``runs`` runs in turn, with an evaluation after each step."""
        return runs * (self.start + steps * (self.step + self.evaluation)) / 3600


def measure_cost(config: TrainConfig, num_workers: int | None) -> Cost:
    """Train one step in a temporary folder, with the threads that a worker of a sweep has.

    The step is that of an otherwise idle machine; concurrent runs share its memory bandwidth, and
    may be slower.
    """
    began, started = time.perf_counter(), []
    one = replace(config, steps=1, seed=0, holdout=0, generate=False)
    with tempfile.TemporaryDirectory() as folder, _threads(threads_of(num_workers)):
        result = train(
            one,
            folder,
            keep_model=False,
            show_progress=False,
            on_start=lambda *_: started.append(time.perf_counter()),
        )
    elapsed = time.perf_counter() - started[0]
    return Cost(
        start=started[0] - began,
        step=result.seconds,
        evaluation=max(0.0, elapsed - result.seconds) / _EVALUATIONS,
    )


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
