"""Claim: LoRA's noise is close to a Gaussian in total variation (arXiv 2409.17538).

The distance of one coordinate falls as 1/rank, and does not fall as the width n grows. All
coordinates together are close only for rank >> n. Every value is computed; nothing is simulated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowrank_dp import theory
from lowrank_dp._terminal import progress
from lowrank_dp.mechanism import NO_RECORDS

CAPTION = (
    "Distance between LoRA's noise and a Gaussian; everything is computed, nothing simulated. "
    "(a) Total variation of one coordinate against rank at a flat q: exact, proved upper and lower "
    "bounds, and the Berry-Esseen bound, which bounds the weaker Kolmogorov distance (exact value "
    "dotted). (b) Against the width n at fixed ranks (solid exact, dashed bound, dotted exact "
    "against the paper's Gaussian of variance |q|^2/r): the claim that it vanishes with n "
    "(2409.17538) does not hold, it settles at a level set by the rank. (c) All n coordinates "
    "together: exact, and the limit (2/pi) arctan(sqrt(n/r)/2)."
)


@dataclass(frozen=True)
class Config:
    """Grids of the three panels.

    Attributes:
        width: length n of q in panel (a).
        ranks: ranks of panel (a).
        fixed_ranks: ranks of panel (b).
        widths: lengths n of q in panel (b).
        joint_ranks: ranks of panel (c).
        joint_ratios: n / rank of panel (c); computed where n is an integer of at least 2.
    """

    width: int = 768
    ranks: tuple[int, ...] = (
        1,
        2,
        3,
        4,
        6,
        8,
        12,
        16,
        24,
        32,
        48,
        64,
        96,
        128,
        192,
        256,
        512,
        1024,
    )
    fixed_ranks: tuple[int, ...] = (1, 4, 16, 64)
    widths: tuple[int, ...] = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 768, 2048, 4096)
    joint_ranks: tuple[int, ...] = (1, 4, 16, 256)
    joint_ratios: tuple[float, ...] = (
        0.0078125,
        0.015625,
        0.03125,
        0.0625,
        0.125,
        0.25,
        0.5,
        1.0,
        2.0,
        4.0,
        8.0,
        16.0,
        32.0,
        64.0,
        128.0,
        256.0,
        512.0,
        1024.0,
        4096.0,
    )


SMALL = Config(
    ranks=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    widths=(2, 4, 8, 16, 64, 256, 768, 4096),
    joint_ratios=(0.03125, 0.125, 0.5, 2.0, 8.0, 32.0, 128.0, 1024.0),
)


@dataclass(frozen=True)
class Result:
    """Distances in [0, 1]; ``joint`` and ``joint_paper`` are NaN where n is below 2."""

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    exact: np.ndarray  # (ranks,) at config.width, against the matched Gaussian
    exact_paper: np.ndarray
    upper: np.ndarray
    lower: np.ndarray
    berry_esseen: np.ndarray
    kolmogorov: np.ndarray
    by_width_exact: np.ndarray  # (fixed_ranks, widths)
    by_width_paper: np.ndarray
    by_width_upper: np.ndarray
    joint: np.ndarray  # (joint_ranks, joint_ratios)
    joint_paper: np.ndarray
    joint_limit: np.ndarray  # (joint_ratios,)


def run(config: Config) -> Result:
    """Compute the distances on the grids."""
    ranks, n = np.array(config.ranks), config.width
    fixed, widths = np.array(config.fixed_ranks)[:, None], np.array(config.widths)
    ratios = np.array(config.joint_ratios)
    joint = np.full((2, len(config.joint_ranks), len(ratios)), np.nan)
    for i, rank in progress(list(enumerate(config.joint_ranks)), "joint total variation"):
        sizes = np.rint(ratios * rank)
        whole = (sizes >= 2) & (sizes == ratios * rank)
        for k, reference in enumerate(("matched", "paper")):
            joint[k, i, whole] = theory.joint_tv(rank, sizes[whole], reference=reference)

    def exact(rank: np.ndarray, width: Any, reference: str = "matched") -> np.ndarray:
        return np.asarray(theory.tv_exact(rank, width, reference=reference))

    return Result(
        config=config,
        privacy=NO_RECORDS,
        exact=exact(ranks, n),
        exact_paper=exact(ranks, n, "paper"),
        upper=np.asarray(theory.tv_bound(ranks, n)),
        lower=np.asarray(theory.tv_lower_bound(ranks, n)),
        berry_esseen=np.asarray(theory.berry_esseen_bound(ranks, n)),
        kolmogorov=np.asarray(theory.kolmogorov_exact(ranks, n)),
        by_width_exact=exact(fixed, widths),
        by_width_paper=exact(fixed, widths, "paper"),
        by_width_upper=np.asarray(theory.tv_bound(fixed, widths)),
        joint=joint[0],
        joint_paper=joint[1],
        joint_limit=np.asarray(theory.joint_tv_limit(ratios)),
    )


def headline(result: Result) -> dict[str, str]:
    """Summarise the result in a few numbers."""
    tightness = result.upper / result.exact
    last = result.by_width_exact[:, -1]
    gap = np.nanmax(np.abs(result.joint - result.joint_limit), axis=1)[-1]
    return {
        f"bound / exact at n = {result.config.width}": (
            f"{tightness.min():.2f} to {tightness.max():.2f}"
        ),
        f"exact TV at n = {result.config.widths[-1]}": ", ".join(
            f"rank {rank}: {tv:.4f}"
            for rank, tv in zip(result.config.fixed_ranks, last, strict=True)
        ),
        "largest |joint TV - limit|": f"{gap:.3f} at rank {result.config.joint_ranks[-1]}",
    }
