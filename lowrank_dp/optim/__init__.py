"""Restored gradients inside an optimizer: one more line in an Opacus or torch training script."""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.optim.callback import RestorationCallback
    from lowrank_dp.optim.hook import Restoration, attach_restoration
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["Restoration", "RestorationCallback", "attach_restoration"]
