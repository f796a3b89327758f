"""Cost of a sweep of training runs in hours, extrapolated from one measured step."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lowrank_dp.engines import threads_of, workers_of
from lowrank_dp.sweep import PREFIX_FOLDER
from lowrank_dp.train import Setup, TrainConfig
from lowrank_dp.train.loop import train

_MANY = 1000  # assumed number of runs of a sweep, large enough that filling the cache pays


@dataclass(frozen=True)
class Cost:
    """Measured seconds of a training run: once per run, per step, and per evaluation.

    ``generation`` is the time of the texts after the last step, in a run that generates texts.
    """

    once: float
    step: float
    evaluation: float
    generation: float = 0.0

    def hours(self, runs: int, steps: int, generating: int = 0) -> float:
        """Return the hours of ``runs`` successive runs, with an evaluation after each step.

        ``generating`` of these runs generate texts after their last step.
        """
        seconds = runs * (self.once + steps * (self.step + self.evaluation))
        return (seconds + generating * self.generation) / 3600


def measure_cost(config: TrainConfig, folder: Path, num_workers: int | None) -> Cost:
    """Measure the cost of a run by two runs of one step, with the threads of a sweep's worker.

    The first run loads the libraries, and fills the cache of the frozen blocks' outputs in
    ``folder``, which a sweep in ``folder`` uses. The second run is measured, and alone generates
    texts if ``config`` does. Neither run is kept. The time outside of the step and of the texts is
    divided among the evaluations by their numbers of examples. Concurrent runs share the machine's
    memory bandwidth, and may be slower than measured.
    """
    cache = config.prefix_cache or str(folder.absolute() / PREFIX_FOLDER)
    one = replace(config, steps=1, seed=0, holdout=0, prefix_cache=cache)
    threads = threads_of(workers_of(num_workers, config.device))
    with tempfile.TemporaryDirectory() as aside, _threads(threads):
        for name, generate in (("first", False), ("measured", config.generate)):
            began, seen = time.perf_counter(), list[int | float]()
            result = train(
                replace(one, generate=generate),
                Path(aside) / name,
                keep_model=False,
                show_progress=False,
                on_start=partial(_note, seen),
                on_evaluation=partial(_note_time, seen),
                prefix_shared_by=_MANY,
            )
            ended = time.perf_counter()
    started, validation, members, before, after = seen
    # the evaluation after the step takes longer than the one before it by the texts
    texts = (after - before) - result.seconds - (before - started)
    generation = max(texts, 0.0) if config.generate else 0.0
    validation, members = (min(n, config.eval_examples) for n in (validation, members))
    share = validation / (2 * validation + members)  # two validations, and one pass over members
    evaluation = share * (ended - started - result.seconds - generation)
    once = ended - began - result.seconds - evaluation - generation
    return Cost(once, result.seconds, evaluation, generation)


def _note(seen: list[int | float], setup: Setup, _: int) -> None:
    """Append the time at which a run begins, and the sizes of its splits, to ``seen``."""
    seen.extend([time.perf_counter(), len(setup.task.validation), len(setup.rows)])


def _note_time(seen: list[int | float], *_: object) -> None:
    """Append the time at which an evaluation ends to ``seen``."""
    seen.append(time.perf_counter())


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
