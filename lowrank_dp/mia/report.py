"""What an attack found and what it says: the numbers of each score, the guards, the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from lowrank_dp import artifacts
from lowrank_dp.mia import guards, metrics
from lowrank_dp.mia.learning import Learning
from lowrank_dp.mia.options import Options
from lowrank_dp.mia.signals import Array
from lowrank_dp.mia.target import Format, Target

POWER = 0.8  # with which the attack would have found an AUC of Report.detectable_auc
NEAR_SHARE = 0.2  # of given non-members that may be nearly members' texts


@dataclass(frozen=True)
class Attack:
    """One attack's numbers. ``tpr`` has None where the non-members are too few for that rate."""

    name: str
    auc: metrics.Auc
    tpr: Mapping[str, metrics.TprAtFpr | None]
    epsilon: metrics.SplitEpsilon


@dataclass(frozen=True)
class Report:
    """What an attack found; NON-PRIVATE, since it is computed from membership bits.

    ``scores`` has (N,) for each attack; ``control`` is the primary one's AUC against the same coins
    in a random order, 1/2 but for chance (99%); ``left_out`` has the ids of records whose text
    occurs more than once; ``learning`` compares the members' losses with chance;
    ``detectable_auc`` is the AUC that the primary attack finds in ``POWER`` of audits with this
    number of records;
    ``accountant_epsilon`` is None where none is claimed; ``one_run_epsilon`` is None where it was
    not asked for.
    """

    model: str
    description: str
    privacy: str
    format: Format
    ids: tuple[str, ...]
    is_member: np.ndarray
    scores: Mapping[str, Array]
    attacks: tuple[Attack, ...]
    primary: str
    unavailable: Mapping[str, str]
    num_shadows: int
    coins: str
    control: metrics.Auc
    blind: metrics.Auc
    untuned: metrics.Auc | None
    shift: str
    left_out: tuple[str, ...]
    near_duplicates: tuple[Any, ...]
    learning: Learning
    detectable_auc: float
    train_loss: float | None
    eval_loss: float | None
    accountant_epsilon: float | None
    delta: float
    one_run_epsilon: float | None
    verdict: str
    provenance: Mapping[str, Any]

    @property
    def contradiction(self) -> bool:
        """Whether some lower bound on epsilon exceeds what the accountant claims."""
        if self.accountant_epsilon is None:
            return False
        return self.lower_bound > self.accountant_epsilon

    @property
    def lower_bound(self) -> float:
        """The lower bound on epsilon: the larger of the primary attack's and the one-run audit's.

        Only attacks named beforehand count: the best of many would need a correction.
        """
        primary = next(attack for attack in self.attacks if attack.name == self.primary)
        return max(primary.epsilon.epsilon, self.one_run_epsilon or 0.0)


def judge(
    target: Target,
    options: Options,
    made: Mapping[str, Array],
    primary: str,
    unavailable: Mapping[str, str],
    untuned_loss: Array | None,
    learning: Learning,
    num_shadows: int,
) -> Report:
    """The report on scores ``made``, (N,) each; ``untuned_loss`` (N,) is of the model before."""
    records, result = target.records, target.result
    truth, examples = records.is_member, records.examples
    delta = options.delta if options.delta is not None else result.delta if result else 0.0
    # rows that share a coin count once: one by one they would make every interval too short
    counted = {
        name: guards.unit_scores(values, examples, truth)
        if records.unit == "group"
        else (values, truth)
        for name, values in made.items()
    }
    attacks = tuple(_measure(name, *one, options, delta) for name, one in counted.items())
    values, coins = counted[primary]
    control = metrics.auc(
        values, np.random.default_rng(options.seed).permutation(coins), confidence=guards.CONFIDENCE
    )
    blind = guards.blind_baseline(examples, truth, seed=options.seed)
    untuned = None if untuned_loss is None else guards.unit_auc(-untuned_loss, examples, truth)
    shift = guards.shift_verdict(blind, untuned)
    near = guards.near_duplicates(examples, truth)
    detectable = _detectable_auc(coins)
    return Report(
        model=str(target.folder),
        description=result.description if result else f"{records.task.name}, given records",
        privacy=result.privacy if result else "not known: no training.json",
        format=target.format,
        ids=tuple(example.id for example in examples),
        is_member=truth,
        scores=made,
        attacks=attacks,
        primary=primary,
        unavailable=unavailable,
        num_shadows=num_shadows,
        coins=records.coins or "given files",
        control=control,
        blind=blind,
        untuned=untuned,
        shift=shift,
        left_out=records.left_out,
        near_duplicates=near,
        learning=learning,
        detectable_auc=detectable,
        train_loss=result.train_loss if result else None,
        eval_loss=result.curve[-1]["loss"] if result else None,
        accountant_epsilon=result.epsilon if result else None,
        delta=delta,
        one_run_epsilon=_one_run(target, options, values, coins, delta),
        verdict=_verdict(
            attacks,
            primary,
            shift,
            learning,
            detectable,
            records.coins,
            len(near),
            int((~truth).sum()),
            _not_known(target, learning),
        ),
        provenance=artifacts.provenance(seed=options.seed, device=options.device),
    )


def _one_run(
    target: Target, options: Options, values: Array, coins: np.ndarray, delta: float
) -> float | None:
    if not options.guesses:
        return None
    if reason := why_no_one_run(target, options):
        raise ValueError(reason)
    correct = metrics.one_run_correct(
        values, coins, options.guesses, np.random.default_rng(options.seed)
    )
    return metrics.one_run_epsilon(len(coins), options.guesses, correct, delta=delta)


def why_no_one_run(target: Target, options: Options) -> str:
    """What stands in the way of the one-run audit; "" if nothing does."""
    if target.records.coins == "bernoulli" and options.max_records is None:
        return ""
    return (
        "guesses of the one-run audit need every record of a checkpoint trained with "
        "--membership bernoulli, independent fair coins"
    )


def _measure(name: str, values: Array, truth: np.ndarray, options: Options, delta: float) -> Attack:
    enough = {rate: math.floor(rate * int((~truth).sum()) + 1e-9) >= 1 for rate in options.fpr}
    return Attack(
        name,
        metrics.auc(values, truth),
        {
            f"{rate:g}": metrics.tpr_at_fpr(values, truth, rate) if enough[rate] else None
            for rate in options.fpr
        },
        metrics.split_epsilon(values, truth, np.random.default_rng(options.seed), delta=delta),
    )


def _detectable_auc(truth: np.ndarray) -> float:
    """The AUC whose 95% interval is above 1/2 in ``POWER`` of audits with this number of records.

    By the normal law, with the standard error of the Mann-Whitney statistic at 1/2.
    """
    n1, n0 = int(truth.sum()), int((~truth).sum())
    se = math.sqrt((n0 + n1 + 1) / (12 * n0 * n1))
    return min(1.0, 0.5 + float(special.ndtri(0.975) + special.ndtri(POWER)) * se)


def _not_known(target: Target, learning: Learning) -> str:
    """What a reader who sees that no leak was found must know of the checkpoint's past; or ""."""
    words = ""
    if target.records.kind == "generation" and learning.reference_loss is None:
        words = (
            "; whether fine-tuning taught the model anything of its members is not known: "
            "give --base"
        )
    if target.format.source == "assumed":
        options = (
            "--template and --max-length" if target.records.kind == "generation" else "--max-length"
        )
        words += (
            "; the format of the records was assumed, and another one than that of the "
            f"training hides a leak: give {options}"
        )
    return words


def _verdict(
    attacks: Sequence[Attack],
    primary: str,
    shift: str,
    learning: Learning,
    detectable: float,
    coins: str | None,
    near: int,
    nonmembers: int,
    not_known: str = "",
) -> str:
    best = next(one for one in attacks if one.name == primary)
    low, high = best.auc.ci
    nothing = (
        f"NOTHING LEARNED: on its own members the model is no better than chance "
        f"({learning.description}), so it has learned nothing that could leak, or it was "
        "loaded or shown its records wrongly (tokenizer, order of labels, template, "
        f"maximal length); that {primary} found nothing says nothing"
    )
    if shift != guards.OK:
        return shift
    if low > 0.5:
        return "LEAKS"
    if other := _leak_by_another(attacks, primary):
        return (
            f"LEAKS by {other.name}, AUC {other.auc.value:.3f}, at a level corrected for "
            f"{len(attacks)} attacks; the primary attack, {primary}, found nothing: see "
            "whether --base is the model before fine-tuning"
        )
    if high < 0.5:
        return (
            "BELOW CHANCE: members score lower than non-members; see whether --members and "
            "--nonmembers were swapped, or the two were drawn differently; no score is negated"
            + ("" if learning.better else f". {nothing}")
        )
    if not learning.better:
        return nothing
    alike = f"{near:,} of {nonmembers:,} non-members are nearly a member's text"
    if coins is None and near > NEAR_SHARE * nonmembers:
        return (
            f"INVALID (near-duplicates): {alike}, which hides a leak; give non-members that "
            "are no copies"
        )
    weak = " (weak attack: calibrate it or give --shadows)" if primary == "loss" else ""
    return (
        f"no leak found by {primary}{weak}. Power: with this number of records the attack "
        f"finds an AUC of {detectable:.3f} in {POWER:.0%} of audits; an AUC above {high:.3f} "
        "is excluded (97.5%), a smaller leak or a stronger attack is not"
        + (f"; {alike}" if near else "")
        + not_known
    )


def _leak_by_another(attacks: Sequence[Attack], primary: str) -> Attack | None:
    """The other attack of the highest AUC above 1/2 at 97.5%, Bonferroni's correction for all."""
    reach = float(special.ndtri(1 - 0.025 / len(attacks)))
    found = [
        one for one in attacks if one.name != primary and one.auc.value - reach * one.auc.se > 0.5
    ]
    return max(found, key=lambda one: one.auc.value, default=None)
