"""Restore the singular values of a noisy gradient: post-processing, at no privacy cost.

:func:`restore` applies a scheme of :mod:`lowrank_dp.restore.schemes` to a matrix;
:class:`LowPassFilter` keeps the running mean of noisy gradients, whose noise is smaller and known, to be
restored in its place.
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.restore.gradients import restore_gradients
    from lowrank_dp.restore.low_pass import LowPassFilter, momentum
    from lowrank_dp.restore.oracle import oracle_values, project
    from lowrank_dp.restore.restoration import Report, restore, restore_with_report, restored_values
    from lowrank_dp.restore.schemes import EDGE_SCHEMES, NON_PRIVATE_SCHEMES, SCHEMES
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "EDGE_SCHEMES",
    "NON_PRIVATE_SCHEMES",
    "SCHEMES",
    "LowPassFilter",
    "Report",
    "momentum",
    "oracle_values",
    "project",
    "restore",
    "restore_gradients",
    "restore_with_report",
    "restored_values",
]
