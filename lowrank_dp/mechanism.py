"""What is private: the Gaussian mechanism on a clipped gradient sum, and its privacy accounting.

Each step samples every record independently with probability ``sample_rate`` (Poisson sampling),
clips each record's gradient to Euclidean norm ``max_grad_norm``, sums, and adds
N(0, (noise_multiplier * max_grad_norm)^2) to every entry. Guarantees hold for neighbours that
differ by adding or removing one unit of privacy. Restoration reads only what this releases.

Epsilon is the smallest of several upper bounds (:mod:`lowrank_dp.accounting`). No central-limit
("GDP") approximation is offered: it under-reports epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy import optimize
from torch import Tensor

from lowrank_dp import _validate, accounting
from lowrank_dp.rng import Generator, SecureRandom, os_seeded_generator, uniform

__all__ = [
    "NEIGHBOURS",
    "GaussianMechanism",
    "Generator",
    "SecureRandom",
    "os_seeded_generator",
    "uniform",
]
NEIGHBOURS = "add or remove one"
_ACCOUNTANTS = ("pld", "rdp")
_CHUNK = 1 << 15  # entries that are drawn at once
_GRID = 2.0**-24  # of a release, in standard deviations of its noise
_MOST_NOISE = 1e9  # largest noise multiplier that is looked for


@dataclass(frozen=True)
class GaussianMechanism:
    """Gaussian mechanism on Poisson-sampled, clipped sums.

    Attributes:
        noise_multiplier: sigma, relative to ``max_grad_norm``; >= 0, and 0 means no privacy.
        max_grad_norm: C, the largest Euclidean norm one unit contributes to a sum; > 0.
        sample_rate: q, the probability with which a unit takes part in a step; in (0, 1].
        unit: what is sampled and clipped as one: "example", or "group" (for instance a meaning
            representation with all its references).

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

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each entry of the clipped *sum*, absolute."""
        return self.noise_multiplier * self.max_grad_norm

    def sample(self, num_units: int, generator: Generator) -> Tensor:
        """Indices of a Poisson sample: each of ``num_units`` with probability ``sample_rate``.

        May be empty.
        """
        return (uniform(num_units, generator) < self.sample_rate).nonzero().flatten()

    def add_noise(
        self, clipped_sums: Mapping[str, Tensor], generator: Generator | None = None
    ) -> dict[str, Tensor]:
        """Noisy copies of clipped sums: each entry plus N(0, noise_std^2), in float32 or better.

        From a :class:`SecureRandom`, an entry is drawn, scaled and added in float64; the sum is
        rounded to a multiple of a power of two between 2^-25 and 2^-24 of ``noise_std``, then once
        to its dtype. At least a thousand draws within 4 ``noise_std``, and millions where most
        fall, lead to each value that can be released, so that its low bits do not tell the draw
        or the sum (Mironov 2012). This holds for float32 and for float64 sums, and is a hardening:
        a proof would need noise that is discrete by its law. From a torch generator an entry is
        drawn in the sum's dtype, without any of this.

        Args:
            clipped_sums: parameter name -> sum of clipped gradients; not mutated.
            generator: source of the noise; a torch generator must be on the sums' device, and is
                not cryptographically secure; None takes a new :class:`SecureRandom`, which is.

        Raises:
            ValueError: if a sum is not a floating-point tensor.
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
        released = total.clone(memory_format=torch.contiguous_format)
        if self.noise_std == 0:
            return released
        flat = released.view(-1)
        # adding and taking away 1.5 * 2^52 times the grid rounds to it
        shift = 1.5 * 2.0**52 * 2.0 ** math.floor(math.log2(self.noise_std * _GRID))
        for part in flat.split(_CHUNK):
            noise = generator.normal(len(part), self.noise_std).to(part.device)
            part.copy_(noise.add_(part).add_(shift).sub_(shift))  # in float64
        return released

    def epsilon(self, steps: int, delta: float, *, accountant: str = "pld") -> float:
        """An upper bound on epsilon after ``steps`` adaptive steps; infinite without noise.

        Args:
            steps: number of releases, >= 0 (a step with an empty sample counts).
            delta: in (0, 1); it should be below 1 / N for N units of privacy, which this class
                does not know: ``train`` warns where it is not.
            accountant: "pld" (default), the smallest bound of :mod:`lowrank_dp.accounting`, at
                most some percent above the exact epsilon; "rdp", by Renyi DP alone, which is
                looser where there is sampling.

        Raises:
            ValueError: if an argument is out of range.
        """
        steps = _validate.integer("steps", steps, low=0)
        delta = _validate.real("delta", delta, low=0, high=1, low_open=True, high_open=True)
        _validate.choice("accountant", accountant, _ACCOUNTANTS)
        found = self._bound(steps, delta)
        return found.rdp if accountant == "rdp" else found.epsilon

    def _bound(self, steps: int, delta: float) -> accounting.Bound:
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
        """Mechanism with the smallest noise multiplier that meets ``(epsilon, delta)``.

        Args:
            epsilon: target, > 0; :meth:`epsilon` of the mechanism is at most this.
            delta: target, in (0, 1); see :meth:`epsilon`.
            steps: number of releases, >= 1.
            sample_rate: in (0, 1].
            max_grad_norm: > 0.
            unit: "example" or "group".
            tolerance: largest excess of the noise multiplier over the smallest that would do,
                relative to a hundredth of the noise multiplier where that is above 100.

        Raises:
            ValueError: if a value is out of range, or no noise multiplier below 1e9 suffices.
        """
        epsilon = _validate.positive("epsilon", epsilon)
        delta = _validate.real("delta", delta, low=0, high=1, low_open=True, high_open=True)
        steps = _validate.integer("steps", steps)
        tolerance = _validate.positive("tolerance", tolerance)
        probe = cls(1.0, max_grad_norm, sample_rate, unit)  # checks the rest

        setting = (float(probe.sample_rate), steps, delta)

        def excess(log_noise_multiplier: float) -> float:
            """Return log(spent / target), at least -5: it is nearly linear in the argument."""
            spent = accounting.bound(math.exp(log_noise_multiplier), *setting).epsilon
            return math.log(min(max(spent, epsilon * math.exp(-5)), 1e300) / epsilon)

        high = 1.0
        while accounting.quick_bound(high, *setting).epsilon > epsilon:  # cheap, never below
            high *= 2
            if high > _MOST_NOISE:
                raise ValueError(
                    f"epsilon = {epsilon:g} at delta = {delta:g} cannot be met in "
                    f"{steps} steps by any noise multiplier below {_MOST_NOISE:g}"
                )
        low = high / 2
        while low > 0.01 and excess(math.log(low)) <= 0:
            high, low = low, low / 2
        found, width = math.log(high), tolerance / min(high, 100.0)
        if low > 0.01:
            found = optimize.brentq(excess, math.log(low), found, xtol=width / 4) + width / 2
            while excess(found) > 0:
                found += width / 4
        return cls(min(math.exp(found), high), max_grad_norm, sample_rate, unit)

    def statement(self, steps: int, delta: float) -> str:
        """The whole privacy claim in words; print it with every epsilon.

        It does not say where the noise comes from, which only the caller knows.
        """
        if self.noise_multiplier == 0:
            return "NOT private: noise_multiplier = 0"
        found = self._bound(steps, delta)
        how = {
            "exact": "exact, of the Gaussian mechanism",
            "RDP": "RDP",
            "PLD": f"PLD, interval {found.interval or 0:.3g}",
        }[found.accountant]
        return (
            f"({found.epsilon:.4g}, {delta:g})-DP after {steps} steps; neighbours: "
            f"{NEIGHBOURS} {self.unit}; Poisson sampling at rate {self.sample_rate:.4g}; "
            f"Gaussian noise, noise_multiplier {self.noise_multiplier:.4g} relative to "
            f"max_grad_norm {self.max_grad_norm:g}; accountant: {how} "
            f"(RDP cross-check: epsilon {found.rdp:.4g})"
        )
