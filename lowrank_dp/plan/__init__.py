"""Plan of a run before it spends privacy: noise, visible rank, and what denoising could save.

A plan is computed from public text, the model's weights and the noise level of the mechanism.
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.plan.alignment import (
        NoisySpectrum,
        SchemeAlignment,
        predict_alignment,
        predict_spectrum,
    )
    from lowrank_dp.plan.curvature import StepGain, step_gain
    from lowrank_dp.plan.making import Plan, make_plan
    from lowrank_dp.plan.trials import Gap, measure_gap
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "Gap", "NoisySpectrum", "Plan", "SchemeAlignment", "StepGain", "make_plan", "measure_gap",
    "predict_alignment", "predict_spectrum", "step_gain",
]  # fmt: skip
