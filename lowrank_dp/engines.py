"""Where the jobs of a sweep run, through joblib: on this machine's cores, on Ray or on Dask.

A worker may die at any time (kill -9, out of memory, a machine that is switched off). What it was
at is tried again, and a job that kills its worker each time takes no other with it.
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
ATTEMPTS = 3  # of a job whose worker dies; the last one with no other job beside it
# what decides which data and models a worker finds, and that it stays off the network
SETTINGS = (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_ENDPOINT",
    "LOWRANK_DP_DATA",
)
J = TypeVar("J")
R = TypeVar("R")


def check_engine(engine: str) -> None:
    """Raise ``ValueError`` if there is no such engine, it is not installed, or torchrun is here."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "sweeps and attacks must be started as one process, not by torchrun "
            "(WORLD_SIZE is set): use --engine to share them out"
        )
    _validate.choice("engine", engine, ENGINES)
    module = {"ray": "ray", "dask": "distributed"}.get(engine)
    if module and importlib.util.find_spec(module) is None:
        raise ValueError(
            f"engine {engine!r} is not installed: pip install 'lowrank_dp[distributed]'"
        )


def run(
    function: Callable[[J], R], jobs: Sequence[J], engine: str, num_workers: int
) -> Iterator[tuple[int, R | None]]:
    """``(i, function(jobs[i]))`` as they finish; the result is None if each worker died of it.

    Args:
        function: pickled by reference, so the workers must have the same package installed.
        jobs: what it is called with, each pickled alone.
        engine: "loky" (processes here), "ray" (the cluster that RAY_ADDRESS names, else the one
            that runs here, else a new one for as long as this lasts), "dask" (likewise, by
            DASK_SCHEDULER_ADDRESS; workers of one thread each), or "sequential" in this process.
        num_workers: jobs at a time.

    An exception in ``function`` is raised here.
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
                except died:  # and the pool with it: a fresh one goes on with what was not begun
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
    """Results as they finish; jobs move from ``waiting`` to ``begun`` as they are handed out."""
    from joblib import Parallel, delayed

    def hand_out() -> Iterator[Any]:
        while waiting:
            begun.add(i := waiting.pop(0))
            yield delayed(_numbered)(i, function, jobs[i])

    # with n_jobs = 1 joblib would work in this process, where no death can be survived
    yield from Parallel(
        n_jobs=max(2, num_workers),
        pre_dispatch=num_workers,
        batch_size=1,
        backend=backend,
        return_as="generator_unordered",
    )(hand_out())


def _numbered(i: int, function: Callable[[J], R], job: J) -> tuple[int, R]:
    return i, function(job)


@contextlib.contextmanager
def _connected(
    engine: str, num_workers: int
) -> Iterator[tuple[Callable[[], Any], tuple[type[Exception], ...]]]:
    """What makes joblib's backend for ``engine``, and what is raised when a worker dies.

    A cluster that was there before stays when the block ends.
    """
    with contextlib.ExitStack() as stack:
        yield {"loky": _loky, "ray": _ray, "dask": _dask}[engine](stack, num_workers)


def _loky(stack: contextlib.ExitStack, num_workers: int) -> Any:
    from concurrent.futures.process import BrokenProcessPool

    # loky replaces a worker whose memory has grown, between two jobs, and warns of it
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", "A worker stopped while some jobs")
    return lambda: "loky", (BrokenProcessPool,)


def _ray(stack: contextlib.ExitStack, num_workers: int) -> Any:
    import ray
    from ray.util.joblib.ray_backend import RayBackend

    class Backend(RayBackend):
        supports_return_generator = True  # unlike those of the pool it derives from, results call

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
    import dask
    import distributed
    from joblib._dask import DaskDistributedBackend

    class Backend(DaskDistributedBackend):
        def effective_n_jobs(self, n_jobs: int) -> int:
            """Never 1, with one worker left: joblib would then work in this process."""
            return max(2, super().effective_n_jobs(n_jobs))

        def submit(self, func: Any, callback: Any = None) -> Any:
            """Joblib's own never calls back for a result that died with its worker."""
            ((call, arguments, _),) = func.items  # batches are of one
            future = self.client.submit(call, *arguments, pure=False)
            future.add_done_callback(lambda done: callback(done.exception() or [done.result()]))
            return future

    try:
        client = distributed.get_client()
    except ValueError:  # none is open yet
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
