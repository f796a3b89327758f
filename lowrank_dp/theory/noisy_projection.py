r"""Privacy of a matrix to which noise is added before a projection by a random public A.

The mechanism releases A and R = (G + sigma C Z) A^T A, where A (rank, n) has independent
N(0, 1/rank) entries, is drawn for this release and independently of the data, and Z (m, n) has
independent N(0, 1) entries. A neighbour adds a matrix g with |g|_F <= C to G.

Given A, R is an invertible function of (G + sigma C Z) P, where P is the orthogonal projector on
the row space of A. So R given A is the Gaussian mechanism with mu = |g P|_F / (sigma C).

- Worst case over A: |g P| <= |g| <= C, with equality if the rows of g lie in the row space of A.
  Then epsilon is that of the Gaussian mechanism without projection, at every rank.
- Average over A: since A is independent of the data, delta(epsilon) of the pair (A, R) is
  E_A delta_Gauss(epsilon, |g P| / (sigma C)), for a neighbour that was fixed before A was drawn.
  For a g of rank one, |g P|^2 / |g|^2 has the distribution Beta(rank/2, (n - rank)/2), of mean
  rank / n: the *squared* sensitivity falls to rank / n on average. For any g,
  |g P|^2 / |g|^2 = sum_i w_i b_i, where each b_i has this Beta distribution and the weights w_i
  sum to 1. As a function of x = mu^2, delta_Gauss is convex up to
  x* = 2 (sqrt(1 + epsilon^2) - 1) and concave beyond. Let D be delta_Gauss up to x*, and the
  tangent of delta_Gauss at x* beyond. D is convex and D >= delta_Gauss. By Jensen's inequality,

      delta(epsilon) <= E D(b / sigma^2),    b ~ Beta(rank/2, (n - rank)/2),

  with equality for a g of rank one and norm C if 1 / sigma^2 <= x*. Where the noise is small, the
  right side can exceed delta of the worst case, which then replaces it.

The average does not cover several steps with one frozen A. The gradients of later steps depend on A
through the weights, so that g is not fixed before A is drawn. Only the worst case holds for them.

The statement and its proof are this project's own. Hu et al. (arXiv 2601.21719v1) also study noisy
projections. Only the abstract of the paper and a summary, which names a factor rank / n, were
available.
"""

from __future__ import annotations

import numpy as np
from scipy import optimize, special

from lowrank_dp._validate import fail, integer, real
from lowrank_dp.theory._arrays import MOST, Array
from lowrank_dp.theory._quadrature import panel_integrals
from lowrank_dp.theory._special import stirling_defect
from lowrank_dp.theory.privacy import gaussian_delta

_TAIL = 1e-18  # mass of the Beta distribution cut off at each end; the mass is added to delta
_PANELS = 100


def noise_projection_delta(epsilon: float, noise_multiplier: float, rank: int, n: int) -> float:
    """Bound delta, in [0, 1], of releasing A and (G + noise) A^T A once, for a random public A.

    The bound holds for every record that was fixed before A was drawn and whose gradient has norm
    at most C. For a gradient of rank one and norm C, the bound exceeds the exact delta by at most
    2e-18, apart from rounding, if ``noise_multiplier`` is at least
    1 / sqrt(2 (sqrt(1 + epsilon^2) - 1)).

    Args:
        epsilon: epsilon of the guarantee, in [1e-100, 1e100].
        noise_multiplier: sigma in [1e-100, 1e100], relative to the clipping norm C.
        rank: number of rows of A, in [1, 1e12]. With a rank of n or more, the projection is
            invertible, and delta is that of the Gaussian mechanism.
        n: number of columns of A, in [1, 1e12].

    Raises:
        ValueError: for an argument out of its range.

    Source: the module's docstring.

    >>> f"{noise_projection_delta(1.0, 1.1, 8, 384):.1e}"  # 0.096 without a projection
    '4.7e-09'
    """
    epsilon = real("epsilon", epsilon, low=1e-100, high=1e100)
    sigma = real("noise_multiplier", noise_multiplier, low=1e-100, high=1e100)
    rank, n = integer("rank", rank, high=MOST), integer("n", n, high=MOST)
    worst = max(0.0, float(gaussian_delta(np.array(epsilon), np.array(1 / sigma))))
    if rank >= n:
        return worst
    a, b = rank / 2, (n - rank) / 2
    low = np.arcsin(np.sqrt(special.betaincinv(a, b, _TAIL)))
    high = np.arcsin(np.sqrt(special.betainccinv(a, b, _TAIL)))
    bend = 2 * epsilon**2 / (np.sqrt(1 + epsilon**2) + 1)  # x* = 2 (sqrt(1 + epsilon^2) - 1)
    edges = np.linspace(low, high, _PANELS + 1)
    kink = np.arcsin(np.sqrt(min(1.0, bend * sigma**2)))
    if low < kink < high:
        edges = np.sort(np.append(edges, kink))

    def integrand(angle: Array) -> Array:  # b = sin^2 angle
        delta = _convex_delta(epsilon, (np.sin(angle) / sigma) ** 2, bend)
        return np.exp(_log_angle_density(angle, a, b)) * delta

    inside = float(panel_integrals(integrand, edges[:-1], edges[1:]).sum())
    # D, which can exceed 1, is largest at b = 1
    highest = float(_convex_delta(epsilon, np.array(sigma**-2.0), bend))
    return min(worst, inside + 2 * _TAIL * max(1.0, highest))


def noise_projection_multiplier(epsilon: float, delta: float, rank: int, n: int) -> float:
    """Find the least noise multiplier at which `noise_projection_delta` is at most ``delta``.

    Args:
        epsilon: epsilon of the guarantee, in [1e-100, 1e100].
        delta: delta of the guarantee, in [1e-15, 1).
        rank, n: number of rows and of columns of A, as for `noise_projection_delta`.

    Raises:
        ValueError: for an argument out of its range, or if no multiplier in [1e-3, 1e6] meets
            ``delta`` exactly; a large ``delta`` may need a multiplier below 1e-3.

    >>> round(noise_projection_multiplier(1.0, 1e-5, 8, 384), 3)  # 3.73 without a projection
    0.682
    """
    delta = real("delta", delta, low=1e-15, high=1, high_open=True)

    def excess(log_sigma: float) -> float:
        return noise_projection_delta(epsilon, float(np.exp(log_sigma)), rank, n) - delta

    ends = np.log(1e-3), np.log(1e6)
    if excess(ends[1]) > 0 or excess(ends[0]) < 0:
        fail("delta", "such that a noise multiplier in [1e-3, 1e6] meets delta exactly", delta)
    found = float(np.exp(optimize.brentq(excess, *ends, xtol=1e-10)))
    return found * (1 + 1e-9)


def _log_angle_density(angle: Array, a: float, b: float) -> Array:
    """Log-density of arcsin(sqrt(x)) for x ~ Beta(a, b).

    The terms of log(2 sin^(2a-1) cos^(2b-1) / B(a, b)) are of size a + b and nearly cancel around
    the mean of x. They are therefore expressed by their difference from the mean.
    """
    sine, cosine = np.sin(angle), np.cos(angle)
    mean, rest = a / (a + b), b / (a + b)
    # x - mean, from the smaller of x and 1 - x, which is the more exact
    off = sine**2 - mean if mean < rest else rest - cosine**2

    def log_ratio(square: Array, middle: float, off: Array) -> Array:
        near = np.abs(off) < middle / 2
        return np.where(near, np.log1p(np.where(near, off / middle, 0.0)), np.log(square / middle))

    return np.asarray(
        np.log(2)
        + stirling_defect(a)
        + stirling_defect(b)
        - stirling_defect(a + b)
        + a * log_ratio(sine**2, mean, off)
        + b * log_ratio(cosine**2, rest, -off)
        - np.log(sine)
        - np.log(cosine)
    )


def _convex_delta(epsilon: float, x: Array, bend: float) -> Array:
    """Return D at ``x``: delta_Gauss at mu = sqrt(x) up to ``bend``, and its tangent beyond."""
    mu = np.sqrt(np.minimum(x, bend))
    value = gaussian_delta(np.full_like(mu, epsilon), mu)
    root = np.sqrt(bend)
    slope = np.exp(-((epsilon / root - root / 2) ** 2) / 2) / np.sqrt(2 * np.pi) / (2 * root)
    return np.asarray(value + slope * np.maximum(x - bend, 0.0))
