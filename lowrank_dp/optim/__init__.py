"""Restored gradients inside an optimizer: one line added to an Opacus or torch training script."""

from lowrank_dp.optim.hook import Restoration, attach_restoration

__all__ = ["Restoration", "attach_restoration"]
