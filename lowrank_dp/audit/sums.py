"""Design ``sums``: tests of the released noisy sum of every step against its exact law.

The accountant claims three facts: a released sum is the clipped sum plus N(0, (sigma C)^2) in every
entry; a unit takes part with probability q; a unit moves the sum by at most C. The auditor knows
the clean sums. Two lower bounds on epsilon follow from the likelihood ratio of a sum with and
without a canary. The laws of noise, sample and contribution are also tested one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from lowrank_dp import accounting
from lowrank_dp._rounding import rounded_up
from lowrank_dp._terminal import progress
from lowrank_dp.audit import laws
from lowrank_dp.audit.bounds import LowerBound, law_bound, rate_bound, run_epsilon, threshold_bound
from lowrank_dp.audit.canaries import DEVIATION, Audited, take_steps
from lowrank_dp.audit.laws import Line
from lowrank_dp.audit.request import Design
from lowrank_dp.audit.stepping import Record, SumsObserver
from lowrank_dp.train.checks import StepChecks
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.setup import Setup
from lowrank_dp.train.state import State

TAILS = {"law": 0.4, "test": 0.4, "rate": 0.2}  # share of 1 - confidence of each limit
SCALE_DEVIATION = 1e-3  # largest relative difference of scales that counts as rounding
_PLAIN = 1e-3  # smallest p-value in the first steps for which a tensor's noise counts as claimed


@dataclass(frozen=True)
class Outcome:
    """Result of a design.

    Attributes:
        bounds: lower bounds on epsilon.
        lines: comparisons of measurements with their expected values or laws.
        objection: message of the first check of ``train`` that failed; "" if no check failed;
            None if the design does not run these checks.
    """

    bounds: tuple[LowerBound, ...]
    lines: tuple[Line, ...]
    objection: str | None = None


def audit_sums(audited: Audited, design: Design) -> Outcome:
    """Audit the released sums of ``design.num_runs`` runs. NON-PRIVATE."""
    record = Record()

    def observer_of(setup: Setup, state: State) -> SumsObserver:
        guards = None
        try:
            guards = StepChecks(setup, state.sampler, state.noise)
        except ValueError as error:
            record.objection = record.objection or str(error)
        return SumsObserver(audited, record, guards)

    for run in progress(range(design.num_runs), "audited runs"):
        take_steps(audited, observer_of, run)
    return Outcome(
        bounds=_bounds(audited, record, design),
        lines=(*_laws(audited, record, design.level), *_facts(audited, record)),
        objection=record.objection,
    )


@dataclass(frozen=True)
class Limits:
    """Confidence limits from which the lower bounds on epsilon follow.

    Attributes:
        rate: lower limit of the sampling rate.
        by_law: lower limit of mu from the measured noise of each tensor.
        by_test: lower limit of mu from likelihood-ratio tests.
        trials: number of likelihood-ratio tests.
    """

    rate: float
    by_law: float
    by_test: float
    trials: int


def limits_of(audited: Audited, record: Record, design: Design) -> Limits:
    """Return the limits. They hold together with probability at least ``design.confidence``."""
    tail = 1 - design.confidence
    taken = sum(len(np.unique(sample)) for sample in record.samples)
    moved = np.array(record.moved)
    squares = np.array(record.squares)
    counts = step_trials(
        np.array(record.gram),
        np.array(record.products),
        squares,
        record.entries,
        audited.noise_multiplier,
        len(squares) // design.num_runs,
        audited.generator,
    )
    return Limits(
        rate=rate_bound(
            taken, len(audited.setup.unit_rows) * len(record.samples), TAILS["rate"] * tail
        ),
        by_law=law_bound(
            squares.sum(0),
            record.entries * len(squares),
            largest_contribution(moved, rounding_of_clipping(audited.setup.config)),
            audited.noise_multiplier,
            TAILS["law"] * tail,
        ),
        by_test=threshold_bound(*counts, TAILS["test"] * tail),
        trials=counts[1] + counts[3],
    )


def largest_contribution(moved: np.ndarray, slack: float) -> np.ndarray:
    """Return the norm, in each tensor (L,), of the largest contribution, relative to C.

    ``moved`` (T, L) holds squared norms. An excess over C of up to ``slack`` C counts as rounding
    and is removed.
    """
    largest = np.sqrt(moved[moved.sum(1).argmax()])
    norm = float(np.linalg.norm(largest))
    return largest / min(max(norm, 1.0), 1.0 + slack)


def _bounds(audited: Audited, record: Record, design: Design) -> tuple[LowerBound, ...]:
    found, steps = limits_of(audited, record, design), audited.setup.config.steps
    return tuple(
        LowerBound(method, run_epsilon(mu, found.rate, steps, audited.delta))
        for method, mu in (
            ("likelihood ratio of the noise seen by tensor (chi-squared limits)", found.by_law),
            (
                f"likelihood-ratio test of {found.trials} sums with or without a canary "
                "(Clopper-Pearson)",
                found.by_test,
            ),
        )
    )


def step_trials(
    gram: np.ndarray,
    products: np.ndarray,
    squares: np.ndarray,
    entries: np.ndarray,
    noise_multiplier: float,
    first: int,
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Test whether released sums contain each canary, by the likelihood ratio.

    The first steps give the noise variance of each tensor. The claimed variance is used unless its
    chi-squared p-value in these steps is below ``_PLAIN``. Each later step gives one trial per
    canary. The canaries' gradients are orthonormalised, so that the noise along them is
    independent. A fair coin decides whether the canary's contribution is added. The test says
    "with the canary" if the likelihood ratio is above 1.

    Args:
        gram, products, squares, entries: as in :class:`lowrank_dp.audit.stepping.Record`.
        noise_multiplier: sigma that is claimed, relative to C.
        first: number of first steps, which give the variances and no trials.
        generator: random generator of the coins.

    Returns:
        ``(tp, num_in, fp, num_out)``: true positives, trials with the canary, false positives,
        trials without the canary.
    """
    total, count = squares[:first].sum(0), first * entries
    p = laws.two_sided(stats.chi2.cdf(total, count), stats.chi2.sf(total, count))
    scale = np.where(p < _PLAIN, np.maximum(total / count, 1e-12), 1.0)  # variances, relative
    tp = num_in = fp = num_out = 0
    for inner, noise in zip(gram[first:], products[first:], strict=True):
        values, shifts = along_directions(
            (inner / scale[:, None, None]).sum(0), (noise / scale[:, None]).sum(0)
        )
        shifts = shifts / noise_multiplier
        coins = generator.random(len(values)) < 0.5
        # the likelihood ratio of N(shift, 1) to N(0, 1) is above 1 past half of the shift
        called = values + coins * shifts > shifts / 2
        tp += int((called & coins).sum())
        fp += int((called & ~coins).sum())
        num_in += int(coins.sum())
        num_out += int((~coins).sum())
    return tp, num_in, fp, num_out


def along_directions(gram: np.ndarray, products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormalise vectors by their inner products (Gram-Schmidt), in the given order.

    Args:
        gram: (K, K) inner products of the vectors.
        products: (K,) inner products with another vector z.

    Returns:
        The components of z along the orthonormal directions, and the component of each vector
        along its own direction. Vectors that are linear combinations of earlier vectors are left
        out.
    """
    rows: list[np.ndarray] = []  # coefficients of each direction in the given vectors
    values, own = [], []
    for k in range(len(gram)):
        coefficient = np.zeros(len(gram))
        coefficient[k] = 1.0
        for row in rows:
            coefficient = coefficient - (row @ gram[:, k]) * row
        squared = float(coefficient @ gram @ coefficient)
        if squared <= 1e-6 * gram[k, k] or squared <= 0:
            continue
        rows.append(coefficient / np.sqrt(squared))
        values.append(float(rows[-1] @ products))
        own.append(float(rows[-1] @ gram[:, k]))
    return np.array(values), np.array(own)


def _laws(audited: Audited, record: Record, level: float) -> tuple[Line, ...]:
    names, entries = record.names, record.entries
    heads = np.array(record.heads)
    sizes = np.minimum(entries, heads.shape[2])
    inside = np.arange(heads.shape[2]) < sizes[:, None]
    along = [
        along_directions(inner.sum(0), noise.sum(0))[0]
        for inner, noise in zip(record.gram, record.products, strict=True)
    ]
    rate, units = audited.sample_rate, len(audited.setup.unit_rows)
    drawn = np.array([len(np.unique(sample)) for sample in record.samples])
    return (
        laws.noise_size(names, np.array(record.squares), entries, level),
        laws.noise_along("noise: along the canaries' gradients", np.concatenate(along), level),
        laws.noise_mean(names, np.array(record.sums), entries, level),
        laws.noise_shape(heads[:, inside][:, ::4].ravel()[:20_000], level),
        laws.noise_bits(record.on_grid, record.fine, level),
        laws.noise_steps(heads[:, inside], level),
        laws.noise_tensors(names, heads, sizes, level),
        laws.noise_within(
            record.within_names, np.array(record.within), np.array(record.freedom), level
        ),
        laws.sampling_rate(drawn, units, rate, level),
        laws.sampling_spread(drawn, units, rate, level),
        laws.sampling_overlap(record.samples, rate, level),
        laws.sampling_units(record.samples, units, rate, level),
    )


def _facts(audited: Audited, record: Record) -> tuple[Line, ...]:
    """Compare the quantities that do not depend on chance."""
    config = audited.setup.config
    cached = audited.setup.prefix.training is not None
    half = config.precision == "bf16" or (cached and config.prefix_dtype == "bf16")
    most = float(np.sqrt(np.array(record.moved).sum(1).max()))
    excess, deviation = max(record.excess), max(record.deviations)
    twice = sum(len(sample) - len(np.unique(sample)) for sample in record.samples)
    close, slack = (0.2 if half else 0.02), rounding_of_clipping(config)
    scales = max(record.scale_deviations)
    return (
        Line("sample: no unit twice", "0 repetitions", f"{twice}", None, twice == 0),
        Line(
            "clipping: one canary moves the sum by",
            "at most 1 C",
            f"{most:.4g} C",
            None,
            most <= 1 + slack,
        ),
        Line(
            "clipping: that is the canary's gradient by autograd, clipped",
            "difference 0 C",
            f"{excess:.2g} C",
            None,
            excess <= close,
        ),
        Line(
            "release: the optimizer's gradient comes from the noisy sum",
            "difference 0",
            f"{deviation:.2g}",
            None,
            deviation <= DEVIATION,
        ),
        *(
            [
                Line(
                    "preconditioner: scales from public text or noisy sums alone",
                    "difference 0",
                    f"{scales:.2g}",
                    None,
                    scales <= SCALE_DEVIATION,
                )
            ]
            if config.precondition != "none"
            else []
        ),
        *_accounting(audited),
    )


def rounding_of_clipping(config: TrainConfig) -> float:
    """Return the largest excess of a contribution over C, relative to C, that is rounding."""
    return 0.05 if config.precision == "bf16" else 1e-3


def _accounting(audited: Audited) -> tuple[Line, ...]:
    """Compare the mechanism and its epsilon with the values that the configuration states."""
    config, mechanism = audited.setup.config, audited.setup.mechanism
    stated = accounting.bound(
        audited.noise_multiplier, audited.sample_rate, config.steps, audited.delta
    ).epsilon
    asked = stated if config.epsilon is None else config.epsilon
    spent = mechanism.epsilon(config.steps, audited.delta)
    same = np.allclose(
        (mechanism.noise_multiplier, mechanism.max_grad_norm, mechanism.sample_rate),
        (audited.noise_multiplier, audited.max_grad_norm, audited.sample_rate),
        rtol=1e-9,
    )
    return (
        Line(
            "accounting: sigma, C and q of the mechanism",
            f"{audited.noise_multiplier:.4g}, {audited.max_grad_norm:.4g}, "
            f"{audited.sample_rate:.4g}",
            f"{mechanism.noise_multiplier:.4g}, {mechanism.max_grad_norm:.4g}, "
            f"{mechanism.sample_rate:.4g}",
            None,
            bool(same),
        ),
        Line(
            "accounting: epsilon",
            f"{'' if config.epsilon is None else 'at most '}{rounded_up(asked)}",
            rounded_up(spent),
            None,
            spent <= asked * (1 + 1e-6),
        ),
    )
