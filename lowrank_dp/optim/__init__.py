"""Restored gradients inside an optimizer: one more line in an Opacus or torch training script."""

from typing import TYPE_CHECKING, Any

from lowrank_dp.optim.hook import Restoration, attach_restoration

if TYPE_CHECKING:
    from lowrank_dp.optim.callback import RestorationCallback

__all__ = ["Restoration", "RestorationCallback", "attach_restoration"]


def __getattr__(name: str) -> Any:
    if name != "RestorationCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lowrank_dp.optim.callback import RestorationCallback  # imports transformers: seconds

    return RestorationCallback
