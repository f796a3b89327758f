"""Sweeps: many training configurations, trained in parallel, resumable, each only once.

Every configuration has a folder that is named after a hash of the configuration. A sweep that is
repeated or extended therefore trains only the configurations whose run neither finished nor
diverged. A killed run resumes from its last snapshot.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lowrank_dp import __version__, _validate, engines
from lowrank_dp._json import json_digest
from lowrank_dp._terminal import progress
from lowrank_dp.artifacts import runs
from lowrank_dp.artifacts.files import read_json, write_json
from lowrank_dp.data import Columns
from lowrank_dp.membership.units import fingerprint
from lowrank_dp.precondition import public_rows
from lowrank_dp.train import TrainConfig, TrainResult
from lowrank_dp.train.guards import Diverged
from lowrank_dp.train.loop import train
from lowrank_dp.train.records import load_records

PREFIX_FOLDER = "prefix_cache"  # folder of the frozen blocks' outputs, shared by all runs
DIVERGED = "diverged.json"  # file in the folder of a run that diverged
PATIENCE = 600.0  # seconds to wait for a run that another process holds, which may be dying
DIED = (
    f"its worker died {engines.ATTEMPTS} times, the last time with no other run beside it (out "
    "of memory, or killed?); the run's snapshots are kept: repeat the sweep"
)
NO_CHECKPOINT = (
    "holds a finished run without its checkpoint: delete this folder, and repeat the sweep, which "
    "trains the run again and keeps the checkpoint"
)


@dataclass(frozen=True)
class Outcome:
    """Configuration with its result, or with the reason why there is none.

    Attributes:
        config: configuration of the run.
        result: result of the run; None if the run failed.
        error: the reason in one line; empty if the run did not fail.
        diverged: whether the run failed by :class:`lowrank_dp.train.guards.Diverged`. Any other
            reason (a bad configuration, a full disk, a worker that died) says nothing about the
            learning rate.
    """

    config: TrainConfig
    result: TrainResult | None
    error: str = ""
    diverged: bool = False


def run_folder(config: TrainConfig, folder: str | Path) -> Path:
    """Return the folder of a run, named after a hash of the fields that differ from their defaults.

    A field with its default value does not enter the hash. A later version of this package, which
    has more fields, therefore finds the finished runs.

    Raises:
        ValueError: if ``config.seed`` is None: an unseeded run cannot be identified later.
    """
    if config.seed is None:
        raise ValueError("seed must be given for a sweep: without one a run can't be found again")
    return Path(folder) / json_digest(config.chosen())[:16]


def sweep(
    configs: Sequence[TrainConfig],
    folder: str | Path,
    *,
    num_workers: int | None = None,
    engine: str = "loky",
    keep_model: bool = False,
    data_dir: str | Path | None = None,
) -> list[Outcome]:
    """Train every configuration; equal configurations are trained once.

    A run that fails (bad configuration, divergence, full disk) does not stop the others. A run
    whose worker was killed resumes from its last snapshot; after three deaths the run counts as
    failed. Runs whose lower blocks are frozen share a cache of these blocks' outputs in
    ``folder / "prefix_cache"``, unless a configuration names another folder or "off". The cache is
    as sensitive as the records, and may be deleted once the sweep is finished.

    Args:
        configs: configurations, each with a seed.
        folder: folder of the runs. Runs that finished or diverged there are read, and not repeated;
            delete the folder of a run to repeat it.
        num_workers: number of concurrent runs; default: that of :func:`engines.workers_of`, and on
            a cluster one per CPU core of this machine.
        engine: "loky" (processes of this machine, which share its cores evenly), "ray" or "dask"
            (a cluster, see :func:`lowrank_dp.engines.run`, whose machines share ``folder``, data
            and models under the same paths), or "sequential" (this process).
        keep_model: whether to keep each run's checkpoint. A run that finished in ``folder`` without
            its checkpoint is then not repeated: its outcome has an error that names its folder.
        data_dir: as in :func:`lowrank_dp.train.loop.train`; a cluster's machines share the folder.

    Returns:
        An outcome per configuration, in the order of ``configs``.

    Raises:
        ValueError: if a configuration has no seed, an argument is bad, or ``folder`` holds one of
            these runs on other records (an edited file, another ``data_dir``, other public text of
            a preconditioner), or on records that can't be read now. The weights of a model are not
            compared.
    """
    engines.check_engine(engine)
    if num_workers is None:  # a cluster has other GPUs than this machine
        devices = {config.device for config in configs} if engine == "loky" else {"cpu"}
        num_workers = min((engines.workers_of(None, device) for device in devices), default=1)
    workers = _validate.integer("num_workers", num_workers)
    folder = Path(folder).absolute()  # a worker may have another working folder
    if data_dir is not None:
        data_dir = str(_validate.expanded("data_dir", data_dir).absolute())
    jobs = list({str(run_folder(config, folder)): config for config in configs}.items())
    _require_same_records(jobs, folder, data_dir)
    job = functools.partial(
        _run,
        keep_model=keep_model,
        data_dir=data_dir,
        threads=engines.threads_of(workers) if engine == "loky" else None,
        prefix_cache=str(folder / PREFIX_FOLDER),
        shared_by=len(jobs),
    )
    results = engines.run(job, jobs, engine, workers)
    done = {}
    for i, outcome in progress(results, f"sweep of {len(jobs)} runs", total=len(jobs)):
        path, config = jobs[i]
        done[path] = outcome or Outcome(config, None, DIED)
    return [done[str(run_folder(config, folder))] for config in configs]


def _require_same_records(
    jobs: Sequence[tuple[str, TrainConfig]], folder: Path, data_dir: str | None
) -> None:
    """Raise ValueError if a run in ``folder`` is on other records; keep the digests of new runs.

    A run is found by its configuration, which names a task and not the records of the task. A
    digest of the records that each run reads is therefore kept in a file of the sweep's folder.
    The digest identifies private records, so only the owner can read it. A run that began under an
    earlier version has no digest, and gets one.
    """
    digests: dict[tuple[object, ...], str | Exception] = {}
    others: list[TrainConfig] = []
    for path, config in jobs:
        selection = _selection(config)
        if selection not in digests:
            digests[selection] = _digest_of_records(config, data_dir)
        digest = digests[selection]
        file = folder / f"records-{Path(path).name}.json"
        known = file.exists() and _has_begun(Path(path))
        if isinstance(digest, str):
            if not known:
                write_json(file, {"task": config.task, "sha256": digest}, mode=0o600)
            elif read_json(file).get("sha256") != digest:
                others.append(config)
        elif known:  # without a run to compare with, the outcome states the error
            raise ValueError(
                f"{folder} holds runs on {config.task}, whose records can't be compared with those "
                f"of the runs: {' '.join(str(digest).split())}"
            ) from digest
    if others:
        raise ValueError(
            f"{folder} holds {len(others)} of these runs on other records of {others[0].task} than "
            "those given now: choose another folder, or delete the folders of these runs, such as "
            f"{run_folder(others[0], folder).name}"
        )


def _selection(config: TrainConfig) -> tuple[object, ...]:
    """Return the options that choose the records that a run reads."""
    task = (config.task, Columns.of(config), config.max_examples, config.data_seed)
    return (*task, bool(config.holdout), config.precondition, config.precondition_rows)


def _digest_of_records(config: TrainConfig, data_dir: str | None) -> str | Exception:
    """Return a digest of the records that a run reads, or the error of reading them."""
    try:
        task = load_records(config, data_dir)
        read = [task.train]
        if not config.holdout:  # held-out units replace the validation split
            read.append(task.splits.get("validation", ()))
        if config.precondition not in ("none", "noisy"):
            read.append(public_rows(config.precondition, task, config.precondition_rows).examples)
    except (ValueError, OSError) as error:
        return error
    return json_digest([fingerprint(examples) for examples in read])


def _has_begun(path: Path) -> bool:
    """Return whether a folder holds a run's result, snapshot or reason of divergence."""
    return runs.RunFolder(path).configuration() is not None or (path / DIVERGED).is_file()


def _run(
    job: tuple[str, TrainConfig],
    *,
    keep_model: bool,
    data_dir: str | None,
    threads: int | None,
    prefix_cache: str,
    shared_by: int,
) -> Outcome:
    """Train one configuration in its folder; wait for another process that holds the folder."""
    path, config = job
    if threads is not None:
        torch.set_num_threads(threads)
    given_up = time.monotonic() + PATIENCE
    while True:
        try:
            if known := _known_divergence(Path(path) / DIVERGED):
                return Outcome(config, None, known, diverged=True)
            result = train(
                replace(config, prefix_cache=config.prefix_cache or prefix_cache),
                path,
                resume=True,
                keep_model=keep_model,
                show_progress=False,
                prefix_shared_by=shared_by,
                data_dir=data_dir,
            )
            if keep_model and not (Path(path) / runs.MEMBERSHIP).is_file():
                return Outcome(config, None, f"{path} {NO_CHECKPOINT}")
            return Outcome(config, result)
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            if isinstance(error, Diverged):
                with contextlib.suppress(OSError):  # without the file, the run is made again
                    write_json(Path(path) / DIVERGED, {"error": reason, "version": __version__})
                return Outcome(config, None, reason, diverged=True)
            if not isinstance(error, runs.InUse) or time.monotonic() > given_up:
                return Outcome(config, None, f"{reason} (folder of the run: {path})")
        time.sleep(1)  # afterwards, read the other process's result or resume its snapshot


def _known_divergence(file: Path) -> str:
    """Return the reason in ``diverged.json``; "" if there is no such file, or if it is damaged.

    A damaged file is removed, because a run cannot begin in a folder that holds this file alone.
    """
    try:
        return str(read_json(file)["error"])
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError):
        file.unlink(missing_ok=True)
        return ""
