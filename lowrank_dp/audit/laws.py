"""Statistical tests of the accountant's assumptions on noise and sampling.

Each function returns a :class:`Line`. The p-value is exact, or the Bonferroni bound over the tests
that the function makes. The docstring of each function states the law under the null hypothesis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

PARTS = 12  # number of lines with a p-value, which share the level of an audit


@dataclass(frozen=True)
class Line:
    """One comparison of a measurement with the claim.

    Attributes:
        what: name of the compared quantity.
        expected: value or law under the claim, in words.
        seen: measured value, in words.
        p_value: probability, under the claim, of a measurement at least as extreme; None for a
            quantity that does not depend on chance.
        passed: whether the measurement agrees with the claim, at the level of the audit.
    """

    what: str
    expected: str
    seen: str
    p_value: float | None
    passed: bool


def tested(what: str, expected: str, seen: str, p_value: float, level: float) -> Line:
    """Return the line of a test. The test passes if its p-value is at least ``level / PARTS``.

    A p-value that is NaN, because the noise is not finite, counts as 0.
    """
    p_value = 0.0 if np.isnan(p_value) else float(min(1.0, p_value))
    return Line(what, expected, seen, p_value, bool(p_value >= level / PARTS))


def two_sided(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return two-sided p-values from the two one-sided p-values, ``low`` and ``high``.

    The p-value of a value that is NaN is 0.
    """
    return np.nan_to_num(np.minimum(1.0, 2 * np.minimum(low, high)), nan=0.0)


def _worst(p_values: np.ndarray) -> tuple[int, float]:
    """Return the index of the smallest p-value, and the Bonferroni p-value of all tests."""
    index = int(np.argmin(p_values))  # of the first NaN, if there is one
    return index, float(p_values.flat[index] * p_values.size)


def noise_size(
    names: Sequence[str], squares: np.ndarray, entries: np.ndarray, level: float
) -> Line:
    """Test the noise variance: the sum of squares over all steps of a tensor is chi-squared.

    ``squares`` (T, L) holds the sum of squares per step and tensor, in units of (sigma C)^2.
    ``entries`` (L,) is the size of each tensor. All tensors together count as one more tensor.
    """
    total = np.append(squares.sum(0), squares.sum())
    count = len(squares) * np.append(entries, entries.sum())
    p = two_sided(stats.chi2.cdf(total, count), stats.chi2.sf(total, count))
    # the largest deviation is named, among tensors whose p-values are equal (all may be 0)
    ratio = np.sqrt(total / count)
    order = np.lexsort((-np.abs(np.log(np.maximum(ratio, 1e-300))), p))
    worst = int(order[0])
    where = names[worst] if worst < len(names) else "all tensors"
    return tested(
        "noise: standard deviation by tensor",
        "1 sigma C",
        f"{ratio[-1]:.4g} in all, {ratio[worst]:.4g} in {where}",
        p[worst] * len(p),
        level,
    )


def noise_mean(names: Sequence[str], sums: np.ndarray, entries: np.ndarray, level: float) -> Line:
    """Test the noise mean: the sum over all steps of a tensor's noise is normal with mean 0.

    ``sums`` (T, L) holds the sum per step and tensor, in units of sigma C; ``entries`` (L,) is the
    size of each tensor.
    """
    z = sums.sum(0) / np.sqrt(len(sums) * entries)
    worst, p = _worst(2 * stats.norm.sf(np.abs(z)))
    return tested(
        "noise: mean by tensor",
        "0 standard errors",
        f"{z[worst]:.2f} standard errors in {names[worst]}",
        p,
        level,
    )


def noise_along(what: str, values: np.ndarray, level: float) -> Line:
    """Test the noise along orthonormal directions that do not depend on it: N(0, 1) each.

    ``values`` holds the components of the noise, in units of sigma C.
    """
    total, count = float((values**2).sum()), values.size
    p = two_sided(stats.chi2.cdf(total, count), stats.chi2.sf(total, count))
    return tested(
        what, "1 sigma C", f"{np.sqrt(total / max(count, 1)):.4g} over {count}", float(p), level
    )


def noise_steps(heads: np.ndarray, level: float) -> Line:
    """Test independence of the noise of two steps: the normalised inner product is N(0, 1).

    ``heads`` (T, K) holds K entries of the noise of every step of all runs. The inner product of
    two steps is divided by the norm of one of them.
    """
    norms = np.linalg.norm(heads, axis=1)
    products = heads @ heads.T / np.where(norms > 0, norms, 1.0)[:, None]
    first, second = np.triu_indices(len(heads), 1)
    z = products[first, second]
    if not len(z):
        return tested("noise: same in two steps", "independent", "one step only", 1.0, level)
    worst, p = _worst(2 * stats.norm.sf(np.abs(z)))
    correlation = z[worst] / max(norms[second[worst]], 1e-300)
    return tested(
        "noise: same in two steps or runs",
        "correlation 0",
        f"{correlation:.3f} of steps {first[worst] + 1} and {second[worst] + 1}",
        p,
        level,
    )


def noise_tensors(names: Sequence[str], heads: np.ndarray, sizes: np.ndarray, level: float) -> Line:
    """Test independence of the noise of two tensors: the normalised inner product is N(0, 1).

    ``heads`` (T, L, H) holds the first entries of each tensor, and zeros after ``sizes`` (L,)
    entries. The inner product of two tensors is divided by the norm of one of them.
    """
    products = np.einsum("tah,tbh->ab", heads, heads)
    inside = (np.arange(heads.shape[2]) < sizes[:, None]).astype(float)
    norms = np.sqrt(np.einsum("tah,bh->ab", heads**2, inside))
    first, second = np.triu_indices(len(names), 1)
    if not len(first):
        return tested("noise: same in two tensors", "independent", "one tensor only", 1.0, level)
    scale = norms[first, second]
    z = np.where(scale > 0, products[first, second] / np.where(scale > 0, scale, 1.0), 0.0)
    worst, p = _worst(2 * stats.norm.sf(np.abs(z)))
    other = norms[second[worst], first[worst]]
    return tested(
        "noise: same in two tensors",
        "correlation 0",
        f"{z[worst] / max(other, 1e-300):.3f} of {names[first[worst]]} and {names[second[worst]]}",
        p,
        level,
    )


def noise_within(
    names: Sequence[str], projected: np.ndarray, freedom: np.ndarray, level: float
) -> Line:
    """Test independence within a matrix: the squared norm of noise times a vector is chi-squared.

    The matrix of noise is multiplied by a fixed unit vector, from the left or from the right.
    ``projected`` (T, M) holds the squared norms of the products, in units of (sigma C)^2, and
    ``freedom`` (M,) their degrees of freedom.
    """
    if not projected.size:
        return tested("noise: correlated in a matrix", "independent", "no matrix", 1.0, level)
    p = two_sided(stats.chi2.cdf(projected, freedom), stats.chi2.sf(projected, freedom))
    worst, value = _worst(p)
    step, which = np.unravel_index(worst, p.shape)
    seen = projected[step, which] / freedom[which]
    return tested(
        "noise: correlated in a matrix",
        "variance 1 along rows and columns",
        f"{seen:.3g} in {names[int(which)]}",
        value,
        level,
    )


def noise_shape(entries: np.ndarray, level: float) -> Line:
    """Test the noise distribution: Kolmogorov-Smirnov test of ``entries`` against N(0, 1)."""
    distance, p = stats.kstest(entries, "norm")
    return tested(
        "noise: normal distribution",
        "Kolmogorov-Smirnov distance 0",
        f"{distance:.4f} over {len(entries):,}",
        float(p),
        level,
    )


def noise_bits(on_grid: np.ndarray, entries: int, level: float) -> Line:
    """Test the low bits of the noise: at most 15% of its entries are near half-precision numbers.

    ``on_grid`` (S,) holds, for S units of measurement, the number of entries near a half-precision
    number, out of ``entries`` entries. About 10% are expected by chance.
    """
    p = float(stats.binom.sf(on_grid - 1, entries, 0.15).min()) * len(on_grid) if entries else 1.0
    return tested(
        "noise: low bits",
        "at most 15% near a half-precision number",
        f"{on_grid.max() / max(entries, 1):.1%}",
        p,
        level,
    )


def sampling_rate(sizes: np.ndarray, units: int, rate: float, level: float) -> Line:
    """Test the sampling rate: the sum of the sample sizes, ``sizes`` (T,), is binomial."""
    total, trials = int(sizes.sum()), units * len(sizes)
    p = two_sided(stats.binom.cdf(total, trials, rate), stats.binom.sf(total - 1, trials, rate))
    return tested("sample: rate", f"{rate:.4g}", f"{total / trials:.4g}", float(p), level)


def sampling_spread(sizes: np.ndarray, units: int, rate: float, level: float) -> Line:
    """Test for fixed sample sizes: the number of successive samples of equal size is binomial.

    Let P be the distribution of a sample's size. Two independent samples have equal sizes with
    probability sum_k P(k)^2. The pairs of samples do not overlap.
    """
    pairs = len(sizes) // 2
    mass = stats.binom.pmf(np.arange(units + 1), units, rate)
    equal = int((sizes[: 2 * pairs : 2] == sizes[1 : 2 * pairs : 2]).sum())
    chance = float(min(1.0, (mass**2).sum()))
    return tested(
        "sample: size varies",
        f"{chance:.1%} of pairs equal",
        f"{equal} of {pairs} pairs equal",
        float(stats.binom.sf(equal - 1, pairs, chance)) if pairs else 1.0,
        level,
    )


def sampling_overlap(samples: Sequence[np.ndarray], rate: float, level: float) -> Line:
    """Test independence of samples: the number of units in two successive samples is binomial.

    The pairs of samples do not overlap, so that the number of trials is independent of the number
    of common units.
    """
    pairs = list(zip(samples[::2], samples[1::2], strict=False))
    common = sum(len(np.intersect1d(a, b)) for a, b in pairs)
    trials = sum(len(np.unique(a)) for a, _ in pairs)
    p = two_sided(stats.binom.cdf(common, trials, rate), stats.binom.sf(common - 1, trials, rate))
    return tested(
        "sample: independent of the one before",
        f"{rate:.4g} in common",
        f"{common / max(trials, 1):.4g}",
        float(p),
        level,
    )


def sampling_units(samples: Sequence[np.ndarray], units: int, rate: float, level: float) -> Line:
    """Test for unequal sampling rates: the number of samples that contain a unit is binomial."""
    drawn = np.bincount(
        np.concatenate([np.unique(s) for s in samples]).astype(int), minlength=units
    )
    steps = len(samples)
    p = two_sided(stats.binom.cdf(drawn, steps, rate), stats.binom.sf(drawn - 1, steps, rate))
    worst, value = _worst(p)
    return tested(
        "sample: same rate for every unit",
        f"{rate * steps:.3g} of {steps} samples",
        f"{drawn[worst]} of {steps} for the most unusual unit",
        value,
        level,
    )
