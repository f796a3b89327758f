"""Restoration of the singular values of a noisy gradient: post-processing, at no cost in privacy.

:func:`restore` applies a scheme to a matrix. :class:`LowPassFilter` keeps a running mean of noisy
gradients. :class:`GradientRestorer` restores all gradients of a model, or their running means.
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.restore.gradients import GradientRestorer, restore_gradients
    from lowrank_dp.restore.low_pass import LowPassFilter, exponential_average, kalman_filter
    from lowrank_dp.restore.noise_floor import require_noise
    from lowrank_dp.restore.oracle import oracle_values
    from lowrank_dp.restore.plan import check_arguments
    from lowrank_dp.restore.restoration import Report, restore, restore_with_report, restored_values
    from lowrank_dp.restore.schemes import EDGE_SCHEMES, NON_PRIVATE_SCHEMES, SCHEMES, Scheme
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "EDGE_SCHEMES",
    "NON_PRIVATE_SCHEMES",
    "SCHEMES",
    "GradientRestorer",
    "LowPassFilter",
    "Report",
    "Scheme",
    "check_arguments",
    "exponential_average",
    "kalman_filter",
    "oracle_values",
    "require_noise",
    "restore",
    "restore_gradients",
    "restore_with_report",
    "restored_values",
]
