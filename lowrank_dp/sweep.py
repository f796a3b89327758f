"""A list of training configurations to their results: in parallel, resumable, each run once.

Every configuration has a folder named after the hash of its contents, so a sweep that is repeated
or grown computes only what is missing, and a run that was killed goes on from its last snapshot.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank_dp import _validate
from lowrank_dp._cli import progress
from lowrank_dp.train import TrainConfig, TrainResult, train

ENGINES = ("loky", "sequential")
Job = tuple[str, TrainConfig, bool]  # folder, what to run, whether to keep the model


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


def sweep(configs: Sequence[TrainConfig], folder: str | Path, *, num_workers: int | None = None,
          engine: str = "loky", keep_model: bool = False) -> list[Outcome]:
    """Train every configuration, equal ones once; outcomes in the order of ``configs``.

    Args:
        configs: each with a seed.
        folder: of the runs; finished ones found there are read, not repeated.
        num_workers: processes, each with its share of the cores; None takes one a core.
        engine: "loky" (joblib's processes; a killed worker's runs are on disk up to their last
            snapshot, so sweep again), or "sequential" in this process.
        keep_model: keep each run's checkpoint too.

    A run that fails (bad configuration, diverged, disk full) does not stop the others: its
    outcome says why.
    """
    _validate.choice("engine", engine, ENGINES)
    cores = os.cpu_count() or 1
    workers = _validate.integer("num_workers", cores if num_workers is None else num_workers)
    folders = {str(run_folder(config, folder)): config for config in configs}
    threads = max(1, cores // workers)
    jobs: list[Job] = [(path, config, keep_model) for path, config in folders.items()]
    description = f"sweep of {len(jobs)} runs"
    if engine == "sequential":
        done = dict(progress(map(_run, jobs), description, total=len(jobs)))
    else:
        from joblib import Parallel, delayed

        parallel = Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)
        tasks = (delayed(_run)(job, threads) for job in jobs)
        done = dict(progress(parallel(tasks), description, total=len(jobs)))
    return [done[str(run_folder(config, folder))] for config in configs]


def _run(job: Job, threads: int | None = None) -> tuple[str, Outcome]:
    path, config, keep_model = job
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return path, Outcome(config, train(config, path, resume=True, keep_model=keep_model,
                                          show_progress=False))
    except (ValueError, OSError) as error:
        return path, Outcome(config, None, " ".join(str(error).split()))
