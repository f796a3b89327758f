"""Execution engines of a sweep (joblib, Ray, Dask), which replace a worker that dies.

A worker may die at any time (kill -9, out of memory, a machine that is switched off). The job of a
dead worker is repeated; the last attempt runs with no other job beside it. If the worker dies in
every attempt, that job fails and the other jobs go on.

This module makes its own retries. Ray and Dask retry a task beside other tasks, so that a job too
large for the memory of a shared machine would fail where it can finish alone; Ray repeats a task
that ran out of memory without a limit; and Dask counts a worker's death against every task that is
assigned to the worker.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from lowrank_dp import _validate

ENGINES = ("loky", "ray", "dask", "sequential")
RUNS_PER_GPU = 4  # jobs at a time on one GPU, where they take turns and each has its own model
ATTEMPTS = 3  # attempts at a job whose worker dies, the last with no other job beside it
# Environment variables that decide which data and models a worker finds, and whether it may use the
# network.
SETTINGS = (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_ENDPOINT",
    "LOWRANK_DP_DATA",
    "LOWRANK_DP_MODELS",
)
J = TypeVar("J")
R = TypeVar("R")


def workers_of(num_workers: int | None, device: str) -> int:
    """Return the number of concurrent jobs on a device of this machine.

    The default, None, is one job per CPU core on a CPU, and at most ``RUNS_PER_GPU`` on a GPU.
    """
    cores = os.cpu_count() or 1
    return num_workers or (min(cores, RUNS_PER_GPU) if device.startswith("cuda") else cores)


def threads_of(workers: int) -> int:
    """Return the number of threads of each of ``workers`` concurrent jobs on this machine."""
    return max(1, (os.cpu_count() or 1) // workers)


def check_engine(engine: str) -> None:
    """Raise ``ValueError`` for an unknown or uninstalled engine, and under torchrun."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "sweeps and attacks must be started as one process, not by torchrun "
            "(WORLD_SIZE is set): use --engine to share them out"
        )
    _validate.choice("engine", engine, ENGINES)
    module = {"ray": "ray", "dask": "distributed"}.get(engine)
    if module and importlib.util.find_spec(module) is None:
        raise ValueError(
            f"engine {engine!r} is not installed: pip install '.[distributed]' in a clone of this "
            "package"
        )


def run(
    function: Callable[[J], R], jobs: Sequence[J], engine: str, num_workers: int
) -> Iterator[tuple[int, R | None]]:
    """Yield ``(i, function(jobs[i]))`` as jobs finish.

    An exception that ``function`` raises in a worker is raised in the caller.

    Args:
        function: pickled by reference, so that workers must have the same package installed.
        jobs: arguments of ``function``, each pickled alone.
        engine: "loky" (processes of this machine); "ray" (the cluster that RAY_ADDRESS names, or
            the one that runs on this machine, or a new one that ends with the jobs); "dask" (the
            same with DASK_SCHEDULER_ADDRESS; each worker must have one thread); "sequential" (this
            process).
        num_workers: number of concurrent jobs.

    Yields:
        The index of a job, and its result; None in place of the result if the worker died in every
        attempt.

    Raises:
        ValueError: if the workers of a Dask cluster have more than one thread each.
    """
    if engine == "sequential":
        yield from ((i, function(job)) for i, job in enumerate(jobs))
        return
    with _connected(engine, num_workers) as (backend, died):
        left = list(range(len(jobs)))
        for attempt in range(ATTEMPTS):
            alone = attempt == ATTEMPTS - 1
            groups, left = [[i] for i in left] if alone else [left], []
            while groups:
                waiting, begun = groups.pop(), set[int]()
                try:
                    for i, result in _pool(function, jobs, waiting, begun, backend(), num_workers):
                        begun.remove(i)
                        yield i, result
                except died:  # the pool is lost; a new one gets the jobs that were not begun
                    left += begun
                    if waiting:
                        groups.append(waiting)
        yield from ((i, None) for i in left)


def _pool(
    function: Callable[[J], R],
    jobs: Sequence[J],
    waiting: list[int],
    begun: set[int],
    backend: Any,
    num_workers: int,
) -> Iterator[tuple[int, R]]:
    """Yield results as jobs finish; a job moves from ``waiting`` to ``begun`` when it starts."""
    from joblib import Parallel, delayed

    def hand_out() -> Iterator[Any]:
        while waiting:
            begun.add(i := waiting.pop(0))
            yield delayed(_numbered)(i, function, jobs[i])

    # with n_jobs = 1 joblib would run jobs in this process, which could not survive a death
    yield from Parallel(
        n_jobs=max(2, num_workers),
        pre_dispatch=num_workers,
        batch_size=1,
        backend=backend,
        return_as="generator_unordered",
    )(hand_out())


def _numbered(i: int, function: Callable[[J], R], job: J) -> tuple[int, R]:
    """Return a job's number with its result."""
    return i, function(job)


@contextlib.contextmanager
def _connected(
    engine: str, num_workers: int
) -> Iterator[tuple[Callable[[], Any], tuple[type[Exception], ...]]]:
    """Yield a maker of joblib's backend, and the exceptions that a worker's death raises.

    A cluster that existed before the block stays after it.
    """
    with contextlib.ExitStack() as stack:
        yield {"loky": _loky, "ray": _ray, "dask": _dask}[engine](stack, num_workers)


def _loky(stack: contextlib.ExitStack, num_workers: int) -> Any:
    """Use processes of this machine."""
    from concurrent.futures.process import BrokenProcessPool

    # loky warns when it replaces a worker, between two jobs, since the worker's memory has grown
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", "A worker stopped while some jobs")
    return lambda: "loky", (BrokenProcessPool,)


def _ray(stack: contextlib.ExitStack, num_workers: int) -> Any:
    """Use the Ray cluster of RAY_ADDRESS or of this machine, or start one until ``stack`` ends."""
    import ray
    from ray.util.joblib.ray_backend import RayBackend

    class Backend(RayBackend):
        supports_return_generator = True  # False in the base class, but Ray calls back

    if not ray.is_initialized():
        settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
        stack.callback(ray.shutdown)
        ray.init(
            runtime_env={"env_vars": settings}, log_to_driver=False, logging_level=logging.ERROR
        )
    return Backend, (
        ray.exceptions.RayActorError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.OutOfMemoryError,
    )


def _dask(stack: contextlib.ExitStack, num_workers: int) -> Any:
    """Use the open Dask client or the configured cluster, or start one until ``stack`` ends."""
    import dask
    import distributed
    from joblib._dask import DaskDistributedBackend

    class Backend(DaskDistributedBackend):
        def effective_n_jobs(self, n_jobs: int) -> int:
            """Return at least 2: with one worker, joblib would run the jobs in this process."""
            return max(2, super().effective_n_jobs(n_jobs))

        def submit(self, func: Any, callback: Any = None) -> Any:
            """Submit a job; call back even if its worker died, which joblib's method does not."""
            ((call, arguments, _),) = func.items  # each batch holds one job
            future = self.client.submit(call, *arguments, pure=False)
            future.add_done_callback(lambda done: callback(done.exception() or [done.result()]))
            return future

    try:
        client = distributed.get_client()
    except ValueError:  # no client is open yet
        here = (
            {}
            if dask.config.get("scheduler-address", None)
            else {"n_workers": num_workers, "threads_per_worker": 1, "dashboard_address": None}
        )
        client = stack.enter_context(distributed.Client(**here))
    if any(threads > 1 for threads in client.nthreads().values()):
        raise ValueError(
            "workers of a Dask cluster must have one thread each, since a run has its "
            "process's random numbers to itself: start them with --nthreads 1"
        )
    return lambda: Backend(client=client), (distributed.KilledWorker,)
