"""Restored gradients inside an optimizer, and optimizers that know the noise (Opacus, torch)."""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.optim.adam_bc import AdamBC
    from lowrank_dp.optim.callback import RestorationCallback
    from lowrank_dp.optim.hook import Restoration, attach_restoration
    from lowrank_dp.optim.muon import Muon
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["AdamBC", "Muon", "Restoration", "RestorationCallback", "attach_restoration"]
