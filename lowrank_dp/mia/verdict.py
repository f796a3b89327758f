"""Verdict of an audit: the conclusion that the numbers support, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from lowrank_dp.mia import shift
from lowrank_dp.mia.learning import Learning
from lowrank_dp.mia.metrics import chance_variance

if TYPE_CHECKING:
    from lowrank_dp.mia.report import Attack

POWER = 0.8  # probability with which the attack finds a true AUC of detectable_auc
TIED_SHARE = 0.9  # least share of equal scores at which an attack that finds nothing is no evidence
NEAR_SHARE = 0.2  # largest share of given non-members whose text may be nearly a member's


@dataclass(frozen=True)
class Evidence:
    """Inputs of a verdict.

    Attributes:
        attacks: the numbers of each attack.
        primary: name of the attack that was named beforehand.
        shift: the result of ``shift.shift_verdict``.
        learning: the members' losses beside chance.
        detectable_auc: the result of `detectable_auc`.
        sampling: the scheme by which members were drawn; None for given files.
        near_duplicates: number of non-members that are nearly a member's text.
        nonmembers: number of non-members.
        largest_tie: share of the units that have the most frequent score of the primary attack.
        caveat: unknown facts about the training, added to "no leak found"; or "".
    """

    attacks: Sequence[Attack]
    primary: str
    shift: str
    learning: Learning
    detectable_auc: float
    sampling: str | None
    near_duplicates: int
    nonmembers: int
    largest_tie: float
    caveat: str = ""


def verdict(evidence: Evidence) -> str:
    """State what the evidence supports; no verdict says that there is no leak."""
    primary = next(one for one in evidence.attacks if one.name == evidence.primary)
    low, high = primary.auc.ci
    if evidence.shift != shift.OK:
        return evidence.shift
    if low > 0.5:
        return "LEAKS"
    if other := _leak_by_another(evidence):
        return (
            f"LEAKS by {other.name}, AUC {other.auc.value:.3f}, at a level corrected for "
            f"{len(evidence.attacks)} attacks; the primary attack, {primary.name}, found nothing: "
            "check whether --base is the model before fine-tuning"
        )
    if high < 0.5:
        return (
            "BELOW CHANCE: members score lower than non-members; check whether --members and "
            "--nonmembers were swapped, or were drawn from different distributions; no score is "
            "negated" + ("" if evidence.learning.better else f". {_nothing_learned(evidence)}")
        )
    if not evidence.learning.better:
        return _nothing_learned(evidence)
    if evidence.largest_tie >= TIED_SHARE:
        return (
            f"NO EVIDENCE (equal scores): {primary.name} gave one score to all or nearly all "
            f"records, at least {TIED_SHARE:.0%}, so that it can hardly tell members from "
            "non-members; name another attack by --primary"
        )
    alike = (
        f"{evidence.near_duplicates:,} of {evidence.nonmembers:,} non-members are nearly a "
        "member's text"
    )
    if evidence.sampling is None and evidence.near_duplicates > NEAR_SHARE * evidence.nonmembers:
        return (
            f"INVALID (near-duplicates): {alike}, which hides a leak; give non-members that "
            "are no copies"
        )
    weak = " (weak attack: calibrate it or give --shadows)" if primary.name == "loss" else ""
    return (
        f"no leak found by {primary.name}{weak}. Power: with this number of records the attack "
        f"finds an AUC of {evidence.detectable_auc:.3f} in {POWER:.0%} of audits; an AUC above "
        f"{high:.3f} is excluded (97.5%), a smaller leak or a stronger attack is not"
        + (f"; {alike}" if evidence.near_duplicates else "")
        + evidence.caveat
    )


def _nothing_learned(evidence: Evidence) -> str:
    return (
        "NOTHING LEARNED: the model is no better than chance on its own members "
        f"({evidence.learning.description}). Either the model has learned nothing that could leak, "
        "or it was loaded or shown its records wrongly (tokenizer, order of labels, template, "
        f"maximal length). That {evidence.primary} found nothing is no evidence"
    )


def _leak_by_another(evidence: Evidence) -> Attack | None:
    """Return the other attack of highest AUC above 1/2 (97.5%, Bonferroni-corrected), or None."""
    reach = float(special.ndtri(1 - 0.025 / len(evidence.attacks)))
    found = [
        one
        for one in evidence.attacks
        if one.name != evidence.primary and one.auc.value - reach * one.auc.se > 0.5
    ]
    return max(found, key=lambda one: one.auc.value, default=None)


def detectable_auc(truth: np.ndarray) -> float:
    """Compute the AUC whose 95% interval is above 1/2 in ``POWER`` of audits of this size.

    The computation takes the normal approximation, with the standard error of the Mann-Whitney
    statistic at 1/2. ``truth`` (N,) says which records are members.
    """
    n1, n0 = int(truth.sum()), int((~truth).sum())
    se = math.sqrt(chance_variance(n1, n0))
    return min(1.0, 0.5 + float(special.ndtri(0.975) + special.ndtri(POWER)) * se)
