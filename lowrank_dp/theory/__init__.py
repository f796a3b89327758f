"""Exact laws and bounds for LoRA's implicit noise (arXiv 2409.17538), on numpy and scipy alone.

What low rank does to a vector q when q A^T A takes its place, A being rank x n with independent
N(0, 1/rank) entries: `coordinate` has the law of one coordinate of the noise, `joint` of all of
them together, `privacy` what one release gives away, `matrix` what several rows give away.

>>> from lowrank_dp.theory import tv_bound, tv_exact
>>> tv_exact(8, 768) <= tv_bound(8, 768)
True
"""

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
from lowrank_dp.theory.privacy import gaussian_privacy_profile, privacy_floor, privacy_profile

__all__ = [
    "berry_esseen_bound", "gaussian_privacy_profile", "joint_tv", "joint_tv_limit",
    "joint_tv_lower_bound", "joint_tv_upper_bound", "kolmogorov_exact", "noise_kurtosis",
    "noise_logpdf", "noise_variance", "privacy_floor", "privacy_profile", "projection_logpdf",
    "symmetry_score", "tv_bound", "tv_exact", "tv_lower_bound",
]  # fmt: skip
