"""Exact laws and bounds for LoRA's implicit noise (arXiv 2409.17538), on numpy and scipy alone.

A vector q is replaced by q A^T A, where A is rank x n with independent N(0, 1/rank) entries.

>>> tv_exact(8, 768) <= tv_bound(8, 768)
True
"""

from lowrank_dp.theory.composition import hu_guarantee, projection_epsilon
from lowrank_dp.theory.coordinate import (
    berry_esseen_bound,
    kolmogorov_exact,
    noise_kurtosis,
    noise_logpdf,
    noise_variance,
    tv_bound,
    tv_exact,
    tv_lower_bound,
)
from lowrank_dp.theory.joint import (
    joint_tv,
    joint_tv_limit,
    joint_tv_lower_bound,
    joint_tv_upper_bound,
    projection_logpdf,
)
from lowrank_dp.theory.matrix import symmetry_score
from lowrank_dp.theory.noisy_projection import noise_projection_delta, noise_projection_multiplier
from lowrank_dp.theory.privacy import gaussian_privacy_profile, privacy_floor, privacy_profile

# fmt: off
__all__ = [
    "berry_esseen_bound", "gaussian_privacy_profile", "hu_guarantee", "joint_tv", "joint_tv_limit",
    "joint_tv_lower_bound", "joint_tv_upper_bound", "kolmogorov_exact", "noise_kurtosis",
    "noise_logpdf", "noise_projection_delta", "noise_projection_multiplier", "noise_variance",
    "privacy_floor", "privacy_profile", "projection_epsilon", "projection_logpdf",
    "symmetry_score", "tv_bound", "tv_exact", "tv_lower_bound",
]
