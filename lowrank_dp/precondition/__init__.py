"""Rank-one preconditioner ``r c^T`` inside the mechanism: where r and c of each layer come from.

A scaled layer (``models.scaled``) stores its weight divided by ``r c^T``, entry by entry. The
gradient of the stored weight is ``r c^T`` times the gradient of the full weight. Clipping and noise
act on the stored gradient, so that adaptivity comes before the noise, at the same sensitivity. The
scales r and c come from the row and column means of squared gradients (Adafactor, Shazeer & Stern
2018, arXiv 1804.04235) of public text, or of the run's own noisy sums. AdaDPS (Li et al. 2022,
arXiv 2202.05963) uses the full second moment of public gradients in the same way.

    moments  factored second moments     scaling  moments to scales
    public   public text and training    noisy    moments of noisy sums
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.precondition.moments import Moment, public_moments, second_moment
    from lowrank_dp.precondition.noisy import NoisyMoments, refresh_scales
    from lowrank_dp.precondition.public import PublicRows, model_moments, public_rows
    from lowrank_dp.precondition.scaling import joint_scales
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "Moment", "NoisyMoments", "PublicRows", "joint_scales", "model_moments", "public_moments",
    "public_rows", "refresh_scales", "second_moment",
]  # fmt: skip
