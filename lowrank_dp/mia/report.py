"""Report of an audit: the numbers of each attack, the checks, the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_dp import artifacts
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.mia import duplicates, metrics, shift, units
from lowrank_dp.mia._arrays import Array
from lowrank_dp.mia.learning import Learning
from lowrank_dp.mia.options import CONFIDENCE, CONFIDENCE_OF_TWO, Options
from lowrank_dp.mia.record_format import ASSUMED, Format
from lowrank_dp.mia.target import Target
from lowrank_dp.mia.verdict import Evidence, detectable_auc, verdict
from lowrank_dp.train import TrainResult

GIVEN_FILES = "given files"  # in place of a sampling scheme


@dataclass(frozen=True)
class Attack:
    """Numbers of one attack.

    Attributes:
        name: a key of ``options.ATTACKS``.
        auc: AUC with a 95% interval.
        tpr: true-positive rates by false-positive rate; None if the non-members are too few.
        epsilon: the lower bound on epsilon, at the confidence ``Report.bound_confidence``.
    """

    name: str
    auc: metrics.Auc
    tpr: Mapping[str, metrics.TprAtFpr | None]
    epsilon: metrics.SplitEpsilon


@dataclass(frozen=True)
class Measured:
    """Measurements from which the report is made.

    Attributes:
        scores: scores (N,) of each attack that was made.
        primary: the attack that the verdict rests on.
        unavailable: the other attacks, with the reason for each; empty if attacks were named.
        reference_loss: losses (N,) of the model before fine-tuning, or None.
        learning: the members' losses beside chance.
        num_shadows: number of shadow models.
    """

    scores: Mapping[str, Array]
    primary: str
    unavailable: Mapping[str, str]
    reference_loss: Array | None
    learning: Learning
    num_shadows: int


@dataclass(frozen=True)
class Report:
    """Results of an audit; NON-PRIVATE, because they are computed from membership bits.

    Attributes:
        model, description, privacy: folder, description and privacy statement of the checkpoint.
        format: conversion of a record to tokens.
        ids, is_member: ids and true membership of the attacked records, (N,) each.
        scores: scores (N,) of each attack.
        counted: scores and true membership (U,) of independent units, by `independent_scores`, for
            each attack. Its numbers and its ROC curve are computed from them.
        attacks: the numbers of each attack.
        primary: the attack that the verdict rests on.
        unavailable: attacks that were not made, with the reason for each; empty if attacks were
            named.
        num_shadows: number of shadow models.
        sampling: the scheme by which members were drawn, or ``GIVEN_FILES``.
        control: AUC of the primary attack against randomly permuted membership, with a 99%
            interval; its expectation is 1/2.
        blind: AUC of a classifier of membership by the texts alone, with a 99% interval.
        base: AUC of minus the loss before fine-tuning, with a 99% interval; None if not known.
        shift: the result of ``shift.shift_verdict``.
        left_out: ids of records whose text occurs more than once.
        near_duplicates: pairs of a member and a non-member of nearly the same text.
        learning: the members' losses beside chance.
        detectable_auc: AUC that the primary attack finds in ``verdict.POWER`` of audits of this
            size.
        train_loss, eval_loss: losses in training.json, or None.
        accountant_epsilon: upper bound on epsilon at ``delta``, by `claimed_epsilon`; None for no
            claim.
        delta: delta of the lower bounds on epsilon, and of ``accountant_epsilon``.
        bound_confidence: confidence of each lower bound on epsilon. Without a one-run audit it is
            ``CONFIDENCE``; with one, it is such that both bounds hold together at ``CONFIDENCE``.
        one_run_epsilon: bound of the one-run audit; None if not asked for.
        verdict: conclusion that the numbers support, in words.
        provenance: versions, machine, commit and command of the computation.
    """

    model: str
    description: str
    privacy: str
    format: Format
    ids: tuple[str, ...]
    is_member: np.ndarray
    scores: Mapping[str, Array]
    counted: Mapping[str, tuple[Array, np.ndarray]]
    attacks: tuple[Attack, ...]
    primary: str
    unavailable: Mapping[str, str]
    num_shadows: int
    sampling: str
    control: metrics.Auc
    blind: metrics.Auc
    base: metrics.Auc | None
    shift: str
    left_out: tuple[str, ...]
    near_duplicates: tuple[duplicates.Pair, ...]
    learning: Learning
    detectable_auc: float
    train_loss: float | None
    eval_loss: float | None
    accountant_epsilon: float | None
    delta: float
    bound_confidence: float
    one_run_epsilon: float | None
    verdict: str
    provenance: Mapping[str, Any]

    @property
    def contradiction(self) -> bool:
        """Whether the lower bound shows that the accountant's epsilon is false."""
        return self.exceeds_claim and not self.objection

    @property
    def exceeds_claim(self) -> bool:
        """Whether the lower bound on epsilon exceeds the epsilon that the accountant claims."""
        return self.accountant_epsilon is not None and self.lower_bound > self.accountant_epsilon

    @property
    def objection(self) -> str:
        """Reason why the lower bound on epsilon is no proof; "" if it is valid."""
        if self.sampling == GIVEN_FILES:
            return "members or non-members were given in a file, not drawn at random"
        if self.shift != shift.OK:
            return "members and non-members differ without the model"
        return ""

    @property
    def lower_bound(self) -> float:
        """The larger of the primary attack's and the one-run audit's lower bound on epsilon.

        The confidence is ``CONFIDENCE``. Other attacks do not count: the best of many attacks would
        need a correction.
        """
        primary = next(attack for attack in self.attacks if attack.name == self.primary)
        return max(primary.epsilon.epsilon, self.one_run_epsilon or 0.0)


def make_report(target: Target, options: Options, measured: Measured) -> Report:
    """Compute metrics, checks and verdict from the scores."""
    records, result = target.records, target.result
    truth, examples = records.is_member, records.examples
    delta = options.delta if options.delta is not None else result.delta if result else 0.0
    counted = {name: independent_scores(target, values) for name, values in measured.scores.items()}
    confidence = bound_confidence(options)
    attacks = tuple(
        _measure(name, *one, options, delta, confidence) for name, one in counted.items()
    )
    blind = shift.blind_baseline(examples, truth, seed=options.seed)
    base = (
        None
        if measured.reference_loss is None
        else units.unit_auc(-measured.reference_loss, examples, truth, confidence=shift.CONFIDENCE)
    )
    evidence = Evidence(
        attacks=attacks,
        primary=measured.primary,
        shift=shift.shift_verdict(blind, base),
        learning=measured.learning,
        detectable_auc=detectable_auc(counted[measured.primary][1]),
        sampling=records.sampling,
        near_duplicates=len(near := duplicates.near_duplicates(examples, truth)),
        nonmembers=int((~truth).sum()),
        largest_tie=metrics.largest_tie(counted[measured.primary][0]),
        caveat=_caveat(target, measured.learning),
    )
    return Report(
        model=str(target.folder),
        description=(result.description if result else f"{records.task.name}, given records")
        + ("" if options.precision == "float32" else f"; attacked in {options.precision}"),
        privacy=result.privacy if result else "not known: no training.json",
        format=target.format,
        ids=tuple(example.id for example in examples),
        is_member=truth,
        scores=measured.scores,
        counted=counted,
        attacks=attacks,
        primary=measured.primary,
        unavailable=measured.unavailable,
        num_shadows=measured.num_shadows,
        sampling=records.sampling or GIVEN_FILES,
        control=_control(*counted[measured.primary], options.seed),
        blind=blind,
        base=base,
        shift=evidence.shift,
        left_out=records.left_out,
        near_duplicates=near,
        learning=measured.learning,
        detectable_auc=evidence.detectable_auc,
        train_loss=result.train_loss if result else None,
        eval_loss=result.curve[-1]["loss"] if result else None,
        accountant_epsilon=claimed_epsilon(result, delta),
        delta=delta,
        bound_confidence=confidence,
        one_run_epsilon=_one_run(options, *counted[measured.primary], delta, confidence),
        verdict=verdict(evidence),
        provenance=artifacts.provenance(seed=options.seed, device=options.device),
    )


def claimed_epsilon(result: TrainResult | None, delta: float) -> float | None:
    """Return the accountant's upper bound on epsilon at ``delta``; None if there is no claim.

    At the delta of training.json, the bound is the epsilon of that file. At any other delta, the
    accountant computes the bound from the file's noise multiplier, sampling rate and number of
    releases. At delta 0 the bound is infinite, as for every Gaussian mechanism.
    """
    if result is None or result.epsilon is None:
        return None
    if delta == result.delta:
        return result.epsilon
    if delta == 0:
        return math.inf
    mechanism = GaussianMechanism(result.noise_multiplier, 1.0, result.sample_rate)
    return mechanism.epsilon(result.releases, delta)


def bound_confidence(options: Options) -> float:
    """Return the confidence of each lower bound on epsilon: two with a one-run audit, else one."""
    return CONFIDENCE_OF_TWO if options.guesses else CONFIDENCE


def independent_scores(target: Target, scores: Array) -> tuple[Array, np.ndarray]:
    """Return scores and membership (U,) of independent units.

    Rows that were sampled as a group are one unit, with their mean score. If each row counted by
    itself, every interval would be too short.
    """
    records = target.records
    if records.unit != "group":
        return scores, records.is_member
    return units.unit_scores(scores, records.examples, records.is_member)


def _measure(
    name: str,
    values: Array,
    truth: np.ndarray,
    options: Options,
    delta: float,
    confidence: float,
) -> Attack:
    others = int((~truth).sum())
    enough = {rate: metrics.allowed_false_positives(rate, others) >= 1 for rate in options.fpr}
    return Attack(
        name,
        metrics.auc(values, truth),
        {
            f"{rate:g}": metrics.tpr_at_fpr(values, truth, rate) if enough[rate] else None
            for rate in options.fpr
        },
        metrics.split_epsilon(
            values, truth, np.random.default_rng(options.seed), delta=delta, confidence=confidence
        ),
    )


def _control(values: Array, truth: np.ndarray, seed: int) -> metrics.Auc:
    """Compute the AUC against the same membership bits in a random order."""
    permuted = np.random.default_rng(seed).permutation(truth)
    return metrics.auc(values, permuted, confidence=shift.CONFIDENCE)


def _one_run(
    options: Options, values: Array, truth: np.ndarray, delta: float, confidence: float
) -> float | None:
    """Compute the bound of the one-run audit, whose requirements ``check_named`` has checked."""
    if not options.guesses:
        return None
    correct = metrics.one_run_correct(
        values, truth, options.guesses, np.random.default_rng(options.seed)
    )
    return metrics.one_run_epsilon(
        len(truth), options.guesses, correct, delta=delta, confidence=confidence
    )


def _caveat(target: Target, learning: Learning) -> str:
    """State what is unknown about the training and weakens "no leak found", or return ""."""
    words = ""
    if target.records.kind == "generation" and learning.reference_loss is None:
        words = (
            "; whether fine-tuning taught the model anything about its members is not known: "
            "give --base"
        )
    if target.format.origin == ASSUMED:
        options = (
            "--template and --max-length" if target.records.kind == "generation" else "--max-length"
        )
        words += (
            "; the format of the records was assumed, and a format other than that of the "
            f"training hides a leak: give {options}"
        )
    return words
