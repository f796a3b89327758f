"""Restoration and preconditioning for Opacus and torch loops; optimizers that know the noise."""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.optim.adam_bc import AdamBC
    from lowrank_dp.optim.callback import RestorationCallback
    from lowrank_dp.optim.hook import Restoration, attach_restoration, restoration_of
    from lowrank_dp.optim.muon import Muon
    from lowrank_dp.optim.preconditioner import Preconditioner, attach_preconditioner
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "AdamBC", "Muon", "Preconditioner", "Restoration", "RestorationCallback",
    "attach_preconditioner", "attach_restoration", "restoration_of",
]  # fmt: skip
