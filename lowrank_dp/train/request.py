"""Options of a run beside its configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunRequest:
    """Options of a run that are not part of its configuration.

    Attributes:
        shared_by: number of runs that share the cache. The cache is filled only if these runs
            together read at least as many rows as filling does; None always fills the cache.
        training: whether training steps read the cache. A resumed run must continue as the run
            began, since sums with and without the cache differ in rounding. None decides by
            ``shared_by``.
        show_progress: whether to show progress on stderr: a bar, or lines in a log.
        data_dir: folder of a named task, in place of ``LOWRANK_DP_DATA``.
    """

    shared_by: int | None = None
    training: bool | None = None
    show_progress: bool = True
    data_dir: str | None = None


DEFAULT_REQUEST = RunRequest()
