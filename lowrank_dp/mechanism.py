"""What is private: the Gaussian mechanism on a clipped gradient sum, and its privacy accounting.

Each step samples every record independently with probability ``sample_rate`` (Poisson sampling),
clips each record's gradient to Euclidean norm ``max_grad_norm``, sums, and adds
N(0, (noise_multiplier * max_grad_norm)^2) to every entry. Guarantees hold for neighbours that
differ by adding or removing one unit of privacy. Restoration reads only what this releases.

Epsilon comes from dp-accounting's privacy-loss distribution (PLD), discretised pessimistically, so
it is an upper bound; Renyi DP (RDP) is a looser cross-check. No central-limit ("GDP")
approximation is offered: it under-reports epsilon.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import dp_accounting
import numpy as np
import torch
from dp_accounting import pld, rdp
from scipy.special import ndtri
from torch import Tensor

from lowrank_dp import _validate

NEIGHBOURS = "add or remove one"
_PLD_INTERVAL = 1e-3
_PLD_CELLS = 200_000  # up to epsilon; past 200 the interval grows, or memory would
_ACCOUNTANTS = ("pld", "rdp")
_TWISTER_WORDS = 624  # of the Mersenne Twister's state, which is torch's CPU generator
SUMMANDS = 4  # Gaussians in one entry of a secure draw


class SecureRandom:
    """Draws from the operating system's cryptographic generator; there is no seed and no state.

    An entry is the sum of four Gaussians over 2, each by inversion of a uniform number of 52 bits:
    so the low bits of a release, which betray a single floating-point Gaussian (Mironov 2012), no
    longer tell which draw it was (Holohan & Braghin 2021). The sum stays in float64 until it is
    rounded with the gradient; no claim is made beyond that.
    """

    def uniform(self, size: int) -> Tensor:
        """(size,) float64 on the CPU, in (0, 1): odd multiples of 2^-53, all of them exact."""
        bits = np.frombuffer(os.urandom(8 * size), dtype=np.uint64) >> np.uint64(12)
        return torch.from_numpy((bits + 0.5) * 2.0**-52)

    def normal(self, size: int) -> Tensor:
        """(size,) standard normal, float64, on the CPU."""
        total = np.zeros(size)
        for _ in range(SUMMANDS):
            total += ndtri(self.uniform(size).numpy())
        return torch.from_numpy(total / math.sqrt(SUMMANDS))


Generator = torch.Generator | SecureRandom


def uniform(size: int, generator: Generator) -> Tensor:
    """(size,) uniform numbers in float64, whose grid is fine enough to leave a rate as stated."""
    if isinstance(generator, SecureRandom):
        return generator.uniform(size)
    return torch.rand(size, generator=generator, dtype=torch.float64)


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

    def add_noise(self, clipped_sums: Mapping[str, Tensor],
                  generator: Generator | None = None) -> dict[str, Tensor]:
        """Noisy copies of clipped sums: each entry plus N(0, noise_std^2), in float32 or better.

        Args:
            clipped_sums: parameter name -> sum of clipped gradients; not mutated.
            generator: source of the noise; a torch generator must be on the sums' device, and is
                not cryptographically secure; None takes a :class:`SecureRandom`, which is.
        """
        generator = SecureRandom() if generator is None else generator
        noisy = {}
        for name, total in clipped_sums.items():
            if not isinstance(total, Tensor) or not total.is_floating_point():
                kind = getattr(total, "dtype", type(total).__name__)
                _validate.fail(f"clipped_sums[{name!r}]", "a floating-point tensor", str(kind))
            total = total if total.dtype == torch.float64 else total.float()
            if isinstance(generator, SecureRandom):
                drawn = generator.normal(total.numel()).reshape(total.shape).to(total.device)
                noisy[name] = drawn.mul_(self.noise_std).add_(total).to(total.dtype)
                continue
            noise = torch.randn(total.shape, generator=generator, dtype=total.dtype,
                                device=total.device)
            noisy[name] = noise.mul_(self.noise_std).add_(total)
        return noisy

    def epsilon(self, steps: int, delta: float, *, accountant: str = "pld") -> float:
        """Epsilon after ``steps`` adaptive steps at ``delta``; infinite without noise.

        Args:
            steps: number of releases, >= 0 (a step with an empty sample counts).
            delta: in (0, 1).
            accountant: "pld" (default) or "rdp" (looser).
        """
        steps = _validate.integer("steps", steps, low=0)
        delta = _validate.real("delta", delta, low=0, high=1, low_open=True, high_open=True)
        _validate.choice("accountant", accountant, _ACCOUNTANTS)
        return _epsilon(float(self.noise_multiplier), float(self.sample_rate), steps, delta,
                        accountant)

    @classmethod
    def calibrate(cls, epsilon: float, delta: float, steps: int, sample_rate: float,
                  max_grad_norm: float = 1.0, *, unit: str = "example",
                  tolerance: float = 1e-4) -> GaussianMechanism:
        """Mechanism with the smallest noise multiplier that meets ``(epsilon, delta)``, by PLD.

        Args:
            epsilon: target, > 0.
            delta: target, in (0, 1).
            steps: number of releases, >= 1.
            sample_rate: in (0, 1].
            max_grad_norm: > 0.
            unit: "example" or "group".
            tolerance: largest excess of the noise multiplier over the smallest that would do.

        Raises:
            ValueError: if a value is out of range, or no noise multiplier below 1e5 suffices.
        """
        epsilon = _validate.positive("epsilon", epsilon)
        delta = _validate.real("delta", delta, low=0, high=1, low_open=True, high_open=True)
        steps = _validate.integer("steps", steps)
        tolerance = _validate.positive("tolerance", tolerance)
        probe = cls(1.0, max_grad_norm, sample_rate, unit)  # checks the rest

        def spent(noise_multiplier: float) -> float:
            return _epsilon(noise_multiplier, float(probe.sample_rate), steps, delta, "pld")

        high = 1.0
        while spent(high) > epsilon:
            high *= 2
            if high > 1e5:
                raise ValueError(f"epsilon = {epsilon:g} at delta = {delta:g} cannot be met in "
                                 f"{steps} steps by any noise multiplier below 1e5")
        low = high / 2
        while low > 0.02 and spent(low) <= epsilon:
            high, low = low, low / 2
        while high - low > tolerance:
            middle = (low + high) / 2
            low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
        return cls(high, max_grad_norm, sample_rate, unit)

    def statement(self, steps: int, delta: float) -> str:
        """The whole privacy claim in words; print it with every epsilon."""
        if self.noise_multiplier == 0:
            return "NOT private: noise_multiplier = 0"
        by_pld, by_rdp = (self.epsilon(steps, delta, accountant=name) for name in ("pld", "rdp"))
        return (f"({by_pld:.4g}, {delta:g})-DP after {steps} steps; neighbours: {NEIGHBOURS} "
                f"{self.unit}; Poisson sampling at rate {self.sample_rate:.4g}; Gaussian noise, "
                f"noise_multiplier {self.noise_multiplier:.4g} relative to max_grad_norm "
                f"{self.max_grad_norm:g}; accountant: PLD, interval "
                f"{max(_PLD_INTERVAL, by_rdp / _PLD_CELLS):.3g} "
                f"(RDP cross-check: epsilon {by_rdp:.4g})")


@lru_cache(maxsize=256)
def _epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float,
             accountant: str) -> float:
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    step: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sample_rate < 1:
        step = dp_accounting.PoissonSampledDpEvent(sample_rate, step)
    # composed once with a count: step by step costs a convolution each
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # RDP warns of each order that it leaves out, which is sound
    try:
        by_rdp = float(rdp.RdpAccountant().compose(step, steps).get_epsilon(delta))
        if accountant == "rdp" or not math.isfinite(by_rdp):
            return by_rdp
        # an upper bound at any interval
        chosen = pld.PLDAccountant(
            value_discretization_interval=max(_PLD_INTERVAL, by_rdp / _PLD_CELLS))
        return float(chosen.compose(step, steps).get_epsilon(delta))
    except ArithmeticError:  # noise so small that dp-accounting's exponentials overflow
        return math.inf
    finally:
        log.setLevel(level)


def os_seeded_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator that starts from the operating system's random bits.

    Of a CPU generator they are its whole state: ``manual_seed`` keeps 32 bits of a seed there, so
    few that all noises could be tried. A GPU's keeps the 63 that it is given.
    """
    generator = torch.Generator(device)
    if generator.device.type != "cpu":
        return generator.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
    state = generator.manual_seed(0).get_state()
    words = state[24:24 + 8 * _TWISTER_WORDS].view(torch.int64)  # of 32 bits, after the counters
    drawn = np.frombuffer(os.urandom(4 * _TWISTER_WORDS), dtype=np.uint32)
    words.copy_(torch.from_numpy(drawn.astype(np.int64)))
    return generator.set_state(state)
