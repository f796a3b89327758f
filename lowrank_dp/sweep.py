"""A list of training configurations to their results: in parallel, resumable, each run once.

Every configuration has a folder named after the hash of its contents, so a sweep that is repeated
or grown computes only what is missing, and a run that was killed goes on from its last snapshot.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank_dp import _validate, engines
from lowrank_dp._terminal import progress
from lowrank_dp.artifacts import runs
from lowrank_dp.train import TrainConfig, TrainResult
from lowrank_dp.train.loop import train

PATIENCE = 600.0  # seconds to wait for a run that another process, perhaps a dying one, holds
DIED = (
    f"its worker died {engines.ATTEMPTS} times, the last time with no other run beside it: out "
    "of memory, or killed? What it had done is kept: sweep again"
)


@dataclass(frozen=True)
class Outcome:
    """A configuration with its result, or with the one line that says why there is none."""

    config: TrainConfig
    result: TrainResult | None
    error: str = ""


def run_folder(config: TrainConfig, folder: str | Path) -> Path:
    """Where a configuration's run lies: a folder named after the hash of all its fields.

    A configuration without a seed draws anew each time, and so is refused: it names no result.
    """
    if config.seed is None:
        raise ValueError("seed must be given for a sweep: without one a run can't be found again")
    text = json.dumps(config.as_json(), sort_keys=True)
    return Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]


def sweep(
    configs: Sequence[TrainConfig],
    folder: str | Path,
    *,
    num_workers: int | None = None,
    engine: str = "loky",
    keep_model: bool = False,
) -> list[Outcome]:
    """Train every configuration, equal ones once; outcomes in the order of ``configs``.

    Args:
        configs: each with a seed.
        folder: of the runs; finished ones found there are read, not repeated.
        num_workers: runs at a time; None takes one a core of this machine.
        engine: "loky" (processes here, each with its share of the cores), "ray" or "dask" (a
            cluster, see ``engines.run``: its machines share ``folder``, data and models under
            the same paths), or "sequential" in this process.
        keep_model: keep each run's checkpoint too.

    A run that fails (bad configuration, diverged, disk full) does not stop the others: its
    outcome says why. So does one whose worker died three times; a run whose worker was killed
    otherwise goes on from its last snapshot.
    """
    engines.check_engine(engine)
    cores = os.cpu_count() or 1
    workers = _validate.integer("num_workers", cores if num_workers is None else num_workers)
    folder = Path(folder).absolute()  # a worker may stand elsewhere
    jobs = list({str(run_folder(config, folder)): config for config in configs}.items())
    job = functools.partial(
        _run, keep_model=keep_model, threads=max(1, cores // workers) if engine == "loky" else None
    )
    results = engines.run(job, jobs, engine, workers)
    done = {}
    for i, outcome in progress(results, f"sweep of {len(jobs)} runs", total=len(jobs)):
        path, config = jobs[i]
        done[path] = outcome or Outcome(config, None, DIED)
    return [done[str(run_folder(config, folder))] for config in configs]


def _run(job: tuple[str, TrainConfig], *, keep_model: bool, threads: int | None) -> Outcome:
    path, config = job
    if threads is not None:
        torch.set_num_threads(threads)
    given_up = time.monotonic() + PATIENCE
    while True:
        try:
            return Outcome(
                config, train(config, path, resume=True, keep_model=keep_model, show_progress=False)
            )
        except (ValueError, OSError) as error:
            if not isinstance(error, runs.InUse) or time.monotonic() > given_up:
                return Outcome(config, None, " ".join(str(error).split()))
        time.sleep(1)  # then its result is read, or what a dead process left is gone on with
