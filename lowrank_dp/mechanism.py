"""Gaussian mechanism: add noise to clipped gradient sums, and state the privacy guarantee.

Each step samples every unit of privacy independently with probability ``sample_rate`` (Poisson
sampling), clips the gradient of each unit to Euclidean norm ``max_grad_norm``, sums, and adds
N(0, (noise_multiplier * max_grad_norm)^2) to every entry. Guarantees hold for neighbours that
differ by adding or removing one unit. Restoration reads only the noisy sums, and so is
post-processing.

Epsilon is the smallest of several upper bounds (:mod:`lowrank_dp.accounting`). The central-limit
approximation ("GDP") is not offered, since it under-reports epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy import optimize
from torch import Tensor

from lowrank_dp import _validate, accounting
from lowrank_dp._rounding import rounded_down, rounded_up
from lowrank_dp.rng import Generator, SecureRandom, os_seeded_generator, uniform

__all__ = [
    "NEIGHBOURS",
    "NON_PRIVATE",
    "NO_RECORDS",
    "GaussianMechanism",
    "Generator",
    "SecureRandom",
    "os_seeded_generator",
    "uniform",
]
NEIGHBOURS = "add or remove one"
# privacy statements of results that no mechanism protects
NON_PRIVATE = "NON-PRIVATE: computed from clean gradients, which no mechanism protects"
NO_RECORDS = "no private records: computed from formulas, or from generated or public data only"
_ACCOUNTANTS = ("pld", "rdp")
_CHUNK = 1 << 15  # entries drawn at once
_GRID = 2.0**-24  # upper end of a release's rounding grid, in standard deviations of its noise
_LEAST_NOISE, _MOST_NOISE = 1e-5, 1e9  # noise multipliers that calibration considers
_MOST_STEPS = 2**63 - 1  # the largest integer that numpy and torch take
_LEAST_STD, _MOST_STD = 1e-30, 1e30  # standard deviations that float32 holds with a margin


@dataclass(frozen=True)
class GaussianMechanism:
    """Gaussian mechanism on Poisson-sampled, clipped sums.

    Attributes:
        noise_multiplier: sigma >= 0, relative to ``max_grad_norm``; 0 gives no privacy.
        max_grad_norm: C > 0, the largest Euclidean norm that one unit contributes to a sum.
        sample_rate: q in (0, 1], the probability that a unit takes part in a step.
        unit: unit of privacy, which is sampled and clipped as a whole: "example" or "group" (for
            instance a meaning representation with all its references).

    Raises:
        ValueError: if an attribute is out of range, or if ``noise_std`` is neither 0 nor in
            [1e-30, 1e30], the range in which float32 holds the noise.

    >>> mechanism = GaussianMechanism(noise_multiplier=2.0, max_grad_norm=1.0, sample_rate=0.1)
    >>> round(mechanism.epsilon(steps=1000, delta=1e-6), 2)
    9.18
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    unit: str = "example"

    def __post_init__(self) -> None:
        _validate.real("noise_multiplier", self.noise_multiplier, low=0)
        _validate.positive("max_grad_norm", self.max_grad_norm)
        _validate.real("sample_rate", self.sample_rate, low=0, low_open=True, high=1)
        _validate.choice("unit", self.unit, ["example", "group"])
        if self.noise_multiplier and not _LEAST_STD <= self.noise_std <= _MOST_STD:
            _validate.fail(
                "noise_multiplier * max_grad_norm",
                f"0 or in [{_LEAST_STD:g}, {_MOST_STD:g}]",
                self.noise_std,
            )

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each entry of the clipped *sum*, absolute."""
        return self.noise_multiplier * self.max_grad_norm

    def sample(self, num_units: int, generator: Generator) -> Tensor:
        """Indices of a Poisson sample of ``num_units`` units, int64, in ascending order.

        Each unit is in the sample with probability ``sample_rate``, independently of the others.
        The sample may be empty. ``generator`` is a :class:`SecureRandom` or a CPU torch generator.
        Raises ValueError unless ``num_units`` is an integer >= 0.
        """
        num_units = _validate.integer("num_units", num_units, low=0)
        return (uniform(num_units, generator) < self.sample_rate).nonzero().flatten()

    def add_noise(
        self, clipped_sums: Mapping[str, Tensor], generator: Generator | None = None
    ) -> dict[str, Tensor]:
        """Add independent N(0, noise_std^2) noise to every entry of the clipped sums.

        Args:
            clipped_sums: parameter name -> sum of clipped gradients; not mutated.
            generator: source of the noise. A torch generator must be on the sums' device and is
                not cryptographically secure. None takes a new :class:`SecureRandom`, which is
                secure.

        Returns:
            The noisy sums by name, in float32, or float64 for float64 sums.

        Raises:
            ValueError: if a sum is not a floating-point tensor.

        Formal guarantees:
            Mechanism: if one unit changes the sums, concatenated over all parameters, by at most
                ``max_grad_norm`` in Euclidean norm, and the units were drawn by :meth:`sample`,
                then T releases are (``epsilon(T, delta)``, delta)-DP together for every delta,
                also if each step depends on the results of earlier ones.
            Noise: ``noise_std = noise_multiplier * max_grad_norm``, absolute, on each entry of the
                sum (not of the mean).
            Unit: ``unit``, one example or one group.
            Neighbouring relation: add or remove one unit.
            Rounding: from a :class:`SecureRandom`, an entry is drawn, scaled and added in float64;
                the result is rounded to a multiple of a power of two between 2^-25 and 2^-24 of
                ``noise_std``, then once to its dtype. At least a thousand draws within 4
                ``noise_std``, and millions where most of them fall, lead to each value that can be
                released, so that the low bits reveal neither the draw nor the sum (Mironov 2012).
                The rounding is hardening; a proof would need noise with a discrete distribution.
                From a torch generator, an entry is drawn and added in the sum's dtype, without
                hardening.
            Checked: that the sums are floating-point tensors.
            Assumed: the sensitivity (``lowrank_dp.grads.clipped_sum`` bounds it), Poisson sampling,
                noise that the adversary cannot predict, and no two different sums with the same
                draws of the generator.
        """
        generator = SecureRandom() if generator is None else generator
        noisy = {}
        for name, total in clipped_sums.items():
            if not isinstance(total, Tensor) or not total.is_floating_point():
                kind = getattr(total, "dtype", type(total).__name__)
                _validate.fail(f"clipped_sums[{name!r}]", "a floating-point tensor", str(kind))
            total = total if total.dtype == torch.float64 else total.float()
            if isinstance(generator, SecureRandom):
                noisy[name] = self._secure_release(total, generator)
                continue
            noise = torch.randn(
                total.shape, generator=generator, dtype=total.dtype, device=total.device
            )
            noisy[name] = noise.mul_(self.noise_std).add_(total)
        return noisy

    def _secure_release(self, total: Tensor, generator: SecureRandom) -> Tensor:
        """Add noise to ``total`` and round to a fixed grid; see "Rounding" in :meth:`add_noise`."""
        released = total.clone(memory_format=torch.contiguous_format)
        if self.noise_std == 0:
            return released
        flat = released.view(-1)
        # adding and subtracting 1.5 * 2^52 times the grid rounds to the grid
        shift = 1.5 * 2.0**52 * 2.0 ** math.floor(math.log2(self.noise_std * _GRID))
        for part in flat.split(_CHUNK):
            noise = generator.normal(len(part), self.noise_std).to(part.device)
            part.copy_(noise.add_(part).add_(shift).sub_(shift))  # in float64
        return released

    def epsilon(self, steps: int, delta: float, *, accountant: str = "pld") -> float:
        """Upper bound on epsilon after ``steps`` adaptive steps; infinite without noise.

        Args:
            steps: number of releases, in [0, 2^63 - 1]; a step with an empty sample counts.
            delta: in [1e-200, 1). Delta should be below 1 / N for N units of privacy. This class
                does not know N; ``train`` warns if delta is larger.
            accountant: "pld" (default) is the smallest bound of :mod:`lowrank_dp.accounting`; the
                tests require it to be at most 5% above reference values. "rdp" is the bound of
                Renyi DP alone, which is looser for ``sample_rate`` < 1.

        Raises:
            ValueError: if an argument is out of range.
        """
        _validate.choice("accountant", accountant, _ACCOUNTANTS)
        found = self._bound(steps, delta)
        return found.rdp if accountant == "rdp" else found.epsilon

    def _bound(self, steps: int, delta: float) -> accounting.Bound:
        steps = _validate.integer("steps", steps, low=0, high=_MOST_STEPS)
        delta = _delta(delta)
        return accounting.bound(float(self.noise_multiplier), float(self.sample_rate), steps, delta)

    @classmethod
    def calibrate(
        cls,
        epsilon: float,
        delta: float,
        steps: int,
        sample_rate: float,
        max_grad_norm: float = 1.0,
        *,
        unit: str = "example",
        tolerance: float = 1e-4,
    ) -> GaussianMechanism:
        """Find the smallest noise multiplier that meets ``(epsilon, delta)``.

        Args:
            epsilon: target, > 0. :meth:`epsilon` of the result never exceeds the target.
            delta: target, in [1e-200, 1); see :meth:`epsilon`.
            steps: number of releases, in [1, 2^63 - 1].
            sample_rate: q in (0, 1].
            max_grad_norm: C > 0.
            unit: unit of privacy, "example" or "group".
            tolerance: in [1e-9, 1], largest excess of the noise multiplier over the smallest
                sufficient one; absolute for a noise multiplier up to 100, and relative to a
                hundredth of the noise multiplier above 100.

        Raises:
            ValueError: if a value is out of range, or no noise multiplier below 1e9 suffices.
        """
        epsilon = _validate.positive("epsilon", epsilon)
        delta = _delta(delta)
        steps = _validate.integer("steps", steps, high=_MOST_STEPS)
        tolerance = _validate.real("tolerance", tolerance, low=1e-9, high=1)
        probe = cls(1.0, max_grad_norm, sample_rate, unit)  # checks the other arguments
        setting = (float(probe.sample_rate), steps, delta)

        def excess(log_noise_multiplier: float) -> float:
            """log(spent / target), at least -5: nearly linear in the argument."""
            spent = accounting.bound(math.exp(log_noise_multiplier), *setting).epsilon
            return math.log(min(max(spent, epsilon * math.exp(-5)), 1e300) / epsilon)

        high = 1.0
        while accounting.quick_bound(high, *setting).epsilon > epsilon:  # fast upper bound
            high *= 2
            if high > _MOST_NOISE:
                raise ValueError(
                    f"epsilon = {epsilon:g} at delta = {delta:g} cannot be met in "
                    f"{steps} steps by any noise multiplier below {_MOST_NOISE:g}"
                )
        low = high / 2
        while low > _LEAST_NOISE and excess(math.log(low)) <= 0:
            high, low = low, low / 2
        found, width = math.log(high), tolerance / min(high, 100.0)
        if low > _LEAST_NOISE:
            found = optimize.brentq(excess, math.log(low), found, xtol=width / 4) + width / 2
            while excess(found) > 0:
                found += width / 4
        return cls(min(math.exp(found), high), max_grad_norm, sample_rate, unit)

    def statement(self, steps: int, delta: float) -> str:
        """State the complete privacy claim in words; print the statement with every epsilon.

        The statement does not name the source of the noise, which only the caller knows. Epsilon,
        delta and the sampling rate are rounded up, and the noise multiplier is rounded down. The
        printed claim is therefore true, and the printed mechanism is at most as private as this
        mechanism.

        Raises:
            ValueError: if an argument is out of range; see :meth:`epsilon`.
        """
        found = self._bound(steps, delta)
        if self.noise_multiplier == 0:
            return "NOT private: noise_multiplier = 0"
        how = {
            "exact": "exact, of the Gaussian mechanism",
            "RDP": "RDP",
            "PLD": f"PLD, interval {found.interval or 0:.3g}",
        }[found.accountant]
        return (
            f"({rounded_up(found.epsilon)}, {rounded_up(delta, 6)})-DP after {steps} steps; "
            f"neighbours: {NEIGHBOURS} {self.unit}; Poisson sampling at rate "
            f"{rounded_up(self.sample_rate)}; Gaussian noise, noise_multiplier "
            f"{rounded_down(self.noise_multiplier)} relative to max_grad_norm "
            f"{self.max_grad_norm:g}; accountant: {how} "
            f"(RDP cross-check: epsilon {rounded_up(found.rdp)})"
        )


def _delta(delta: float) -> float:
    return _validate.real("delta", delta, low=accounting.LEAST_DELTA, high=1, high_open=True)
