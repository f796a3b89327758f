"""Random-matrix theory of i.i.d. noise plus a low-rank signal: edge, bulk, spikes, shrinkers.

The model, in this module, :mod:`lowrank_dp.spectrum` and :mod:`lowrank_dp.restore`, is
``N = G + noise_std * Z`` of shape (m, n), Z i.i.d. N(0, 1). With ``aspect = min(m, n) /
max(m, n)`` (called beta in the literature) and ``scale = noise_std * sqrt(max(m, n))``, singular
values are measured as ``y = s / scale`` (noisy) and ``theta`` (clean). Sources:

* Benaych-Georges & Nadakuditi, J. Multivariate Anal. 111 (2012): the visible spikes and overlaps.
* Gavish & Donoho, IEEE Trans. Inf. Theory 60 (2014) and 63 (2017): thresholds and shrinkers.
* Johnstone, Ann. Statist. 29 (2001); Chiani, J. Multivariate Anal. 129 (2014): the fluctuation of
  the edge, and a gamma approximation of the Tracy-Widom law.

The functions of y or theta take tensors of any shape, in units of ``scale``, and an ``aspect`` in
(0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import cumulative_simpson
from scipy.stats import chi, gamma
from torch import Tensor

from lowrank_dp import _validate

# gamma approximation of the Tracy-Widom law for beta = 1, of the same first three moments
# (Chiani 2014, Table 1)
_TW_SHAPE, _TW_SCALE, _TW_SHIFT = 46.446, 0.186054, 9.84801


@dataclass(frozen=True)
class NoiseModel:
    """I.i.d. noise of one level on a matrix, and the scales of its singular values.

    The arguments are trusted: :func:`bulk_edge` and :func:`aspect_and_scale` check theirs.

    Attributes:
        shape: (..., m, n) of the matrix.
        noise_std: standard deviation of the noise on one entry, absolute, >= 0.
    """

    shape: tuple[int, ...]
    noise_std: float

    @property
    def aspect(self) -> float:
        """min(m, n) / max(m, n)."""
        return min(self.shape[-2:]) / max(self.shape[-2:])

    @property
    def scale(self) -> float:
        """Unit of singular values: ``noise_std * sqrt(max(m, n))``."""
        return self.noise_std * math.sqrt(max(self.shape[-2:]))

    @property
    def edge(self) -> float:
        """Asymptotic bulk edge: ``noise_std * (sqrt(m) + sqrt(n))``."""
        m, n = self.shape[-2:]
        return self.noise_std * (math.sqrt(m) + math.sqrt(n))

    def false_spike_level(self, rate: float) -> float:
        """Level that the top singular value of pure noise exceeds with probability ``rate``.

        Exact if a side is 1, and else as accurate as :func:`bulk_edge` states.
        """
        if min(self.shape[-2:]) == 1:  # the one singular value is the norm of the vector
            return self.noise_std * float(chi.isf(rate, max(self.shape[-2:])))
        a, b = (math.sqrt(side - 0.5) for side in self.shape[-2:])
        quantile = gamma.isf(rate, _TW_SHAPE, scale=_TW_SCALE) - _TW_SHIFT
        top_eigenvalue = (a + b) ** 2 + (a + b) * (1 / a + 1 / b) ** (1 / 3) * quantile
        return self.noise_std * math.sqrt(max(top_eigenvalue, 0.0))


def aspect_and_scale(shape: tuple[int, ...], noise_std: float) -> tuple[float, float]:
    """Return ``(aspect, scale)`` of a matrix of ``shape`` (..., m, n), defined as above."""
    noise = NoiseModel(check_sides(shape), _validate.positive("noise_std", noise_std))
    return noise.aspect, noise.scale


def bulk_edge(
    shape: tuple[int, ...], noise_std: float, *, false_spike_rate: float | None = None
) -> float:
    """Level, absolute, above which a singular value is more than noise.

    Args:
        shape: (..., m, n).
        noise_std: standard deviation of the noise on one entry, absolute, >= 0.
        false_spike_rate: None gives the asymptotic edge ``noise_std * (sqrt(m) + sqrt(n))``,
            which the top value of pure noise exceeds in about one draw in seven if both sides are
            large, and in fewer draws if not (one in fifteen for 2 x 2). A rate in
            (0, 1) gives the level that pure noise exceeds with that probability
            (Tracy-Widom fluctuation, of relative order ``min(m, n) ** (-2/3)``).
            The level is exact if a side is 1. Else the true probability, over the rate, was 0.85
            to 1.34 in simulations at rates of 0.05 or more, for sides from 2 to 768. At 0.001 it
            was 0.4 (2 x 768) to 2.3 (2 x 2) if a side is below 16, and 0.8 to 1.4 from 16 x 16 on.

    Raises:
        ValueError: on a bad argument.

    >>> bulk_edge((100, 400), 0.5)
    15.0
    """
    noise = NoiseModel(check_sides(shape), _validate.real("noise_std", noise_std, low=0))
    if false_spike_rate is None:
        return noise.edge
    return noise.false_spike_level(check_rate(false_spike_rate))


def check_rate(false_spike_rate: float) -> float:
    """Convert ``false_spike_rate`` to a float in (0, 1), or raise ``ValueError``."""
    return _validate.real(
        "false_spike_rate", false_spike_rate, low=0, high=1, low_open=True, high_open=True
    )


def check_sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """(m, n) of a shape (..., m, n), as integers >= 1."""
    if not isinstance(shape, tuple | list) or len(shape) < 2:
        _validate.fail("shape", "(..., m, n)", shape)
    return _validate.integer("shape", shape[-2]), _validate.integer("shape", shape[-1])


def marchenko_pastur_pdf(s: np.ndarray, shape: tuple[int, ...], noise_std: float) -> np.ndarray:
    """Compute the density of the ``min(m, n)`` singular values of pure noise, at ``s``.

    Args:
        s: singular values, absolute, of any shape.
        shape: (..., m, n).
        noise_std: standard deviation of the noise on one entry, absolute, > 0.

    Returns:
        The density with respect to ``s``, which integrates to one and is zero outside the bulk;
        NaN where ``s`` is NaN.

    Raises:
        ValueError: on a bad shape or noise level.
    """
    aspect, scale = aspect_and_scale(shape, noise_std)
    x = np.asarray(s, dtype=np.float64) / scale
    low, high = 1 - math.sqrt(aspect), 1 + math.sqrt(aspect)
    root = np.sqrt(np.clip((high**2 - x**2) * (x**2 - low**2), 0, None))
    # the bulk of a square matrix begins at 0, where the density has this limit
    at_zero = np.where((x == 0) & (low == 0), high / (math.pi * scale), 0.0)
    return np.divide(root, math.pi * aspect * x * scale, out=at_zero, where=~(x <= 0))


def marchenko_pastur_quantiles(count: int, shape: tuple[int, ...], noise_std: float) -> np.ndarray:
    """Compute ``count`` mid-point quantiles of the bulk law: singular values, descending.

    ``shape``, ``noise_std`` and errors are as for :func:`marchenko_pastur_pdf`; ``count`` >= 1.
    The result has shape (count,) and is absolute.
    """
    count = _validate.integer("count", count)
    aspect, scale = aspect_and_scale(shape, noise_std)
    # the substitution of an angle removes the square-root singularities at the ends of the bulk
    angle = np.linspace(0, math.pi, 4097)
    x = 1 - math.sqrt(aspect) * np.cos(angle)
    weight = marchenko_pastur_pdf(x * scale, shape, noise_std) * np.sin(angle)
    cdf = cumulative_simpson(weight, x=angle, initial=0)
    levels = 1 - (np.arange(count) + 0.5) / count
    return scale * np.interp(levels, cdf / cdf[-1], x)


def visible_value(theta: Tensor, aspect: float) -> Tensor:
    """Noisy singular value y of a clean value theta >= 0; the bulk edge if theta is invisible.

    ``y^2 = (theta + 1/theta)(theta + aspect/theta)`` for ``theta > aspect ** 0.25``.
    """
    critical = aspect**0.25
    t = theta.clamp(min=critical)
    return torch.sqrt((t + 1 / t) * (t + aspect / t))


def clean_value(y: Tensor, aspect: float) -> Tensor:
    """Clean value theta of a noisy value y, the inverse of `visible_value`; 0 up to the edge."""
    to_high, to_low = _edge_distances(y, aspect)
    return torch.where(to_high > 0, (to_high + to_low) / 2, 0.0)


def _edge_distances(y: Tensor, aspect: float) -> tuple[Tensor, Tensor]:
    """Compute ``sqrt(y^2 - high^2)`` and ``sqrt(y^2 - low^2)`` for the bulk's ends; 0 inside.

    Their product is ``sqrt((y^2 - aspect - 1)^2 - 4 aspect)``. The two factors neither overflow at
    a large y nor cancel next to the edge.
    """
    high, low = 1 + math.sqrt(aspect), 1 - math.sqrt(aspect)
    to_high, to_low = ((y - end).clamp(min=0).sqrt() * (y + end).sqrt() for end in (high, low))
    return to_high, to_low


def overlaps(theta: Tensor, aspect: float) -> tuple[Tensor, Tensor]:
    """Squared cosines between noisy and clean singular vectors: ``(short side, long side)``.

    The vectors on the short side, with min(m, n) entries, are estimated better. Both cosines are
    zero for an invisible theta.
    """
    inverse = theta.clamp(min=aspect**0.25) ** -2  # does not overflow at a large theta
    signal = torch.where(theta > aspect**0.25, (1 - aspect * inverse**2).clamp(min=0), 0.0)
    return signal / (1 + aspect * inverse), signal / (1 + inverse)


def shrink_frobenius(y: Tensor, aspect: float) -> Tensor:
    """Optimal shrinker for squared error: theta times both cosines; 0 up to the edge."""
    to_high, to_low = _edge_distances(y, aspect)
    return to_high * (to_low / y.clamp(min=1))


def shrink_operator(y: Tensor, aspect: float) -> Tensor:
    """Shrinker for the operator norm: the clean value, optimal for a square matrix."""
    return clean_value(y, aspect)


def shrink_nuclear(y: Tensor, aspect: float) -> Tensor:
    """Optimal shrinker for the nuclear norm (Gavish & Donoho 2017, third case of eq. 7)."""
    theta = clean_value(y, aspect)
    t, y = theta.clamp(min=aspect**0.25), y.clamp(min=1)
    # (t^4 - aspect - sqrt(aspect) t y) / (t^2 y), without the fourth power
    value = t * (t / y) - aspect / t / t / y - math.sqrt(aspect) / t
    return torch.where(theta > 0, value.clamp(min=0), 0.0)


def hard_threshold(aspect: float) -> float:
    """Optimal hard threshold for a known noise level, in units of ``scale`` (Gavish & Donoho 2014).

    >>> round(hard_threshold(1.0), 6) == round(4 / 3**0.5, 6)
    True
    """
    root = math.sqrt(aspect**2 + 14 * aspect + 1)
    return math.sqrt(2 * (aspect + 1) + 8 * aspect / (aspect + 1 + root))
