"""Rank-one preconditioner ``r c^T`` inside the mechanism: where r and c of each layer come from.

A layer that stores its weight divided by ``r c^T`` (``models.scaled``) has a stored gradient of
``r c^T`` times the gradient of its weight. Clipping and noise act on the stored gradient, so that
adaptivity comes before the noise, at the same sensitivity. The scales come from the row and column
means of squared gradients (Adafactor, Shazeer & Stern 2018, arXiv 1804.04235) of public text, or of
the run's own noisy sums. AdaDPS (Li et al. 2022, arXiv 2202.05963) is the precedent with a full
second moment.

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
