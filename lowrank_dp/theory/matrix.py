"""Attack on a matrix query G -> G A^T A with one shared A, for two or more rows.

If G has rank at least 2 and G' is not a multiple of G, the laws of G A^T A and G' A^T A are
mutually singular, at every LoRA rank. A^T A is symmetric, so Y G^T is symmetric for Y = G A^T A;
for another candidate, Y G'^T is almost surely not symmetric. See `symmetry_score`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lowrank_dp._validate import fail
from lowrank_dp.theory._arrays import Array, reals


def symmetry_score(released: ArrayLike, candidate: ArrayLike) -> float:
    """Asymmetry |Y G^T - G Y^T|_F / (|Y| |G|) >= 0; zero, up to rounding, if Y = G A^T A.

    The score needs no access to A. Of two candidates, the one with the smaller score is the better
    guess. For one row the score is identically 0; use the likelihood ratio of `projection_logpdf`.

    Args:
        released: Y (m, n), not zero.
        candidate: G (m, n), not zero.

    Raises:
        ValueError: on a matrix of zeros, a bad shape, or entries that are not finite.

    >>> rng = np.random.default_rng(0)
    >>> a = rng.standard_normal((4, 64)) / 2
    >>> g, other = rng.standard_normal((2, 8, 64))
    >>> symmetry_score(g @ a.T @ a, g) < 1e-14 < 0.01 < symmetry_score(g @ a.T @ a, other)
    True
    """
    y, g = _unit("released", released), _unit("candidate", candidate)
    if y.shape != g.shape:
        fail("candidate", f"an array of the shape of released, {y.shape}", g.shape)
    product = y @ g.T
    return float(np.linalg.norm(product - product.T))


def _unit(name: str, value: ArrayLike) -> Array:
    """Divide the matrix by its Frobenius norm, without overflow of intermediate values."""
    matrix = reals(name, value)
    if matrix.ndim != 2 or matrix.size == 0:
        fail(name, "a non-empty array of shape (m, n)", matrix.shape)
    largest = np.abs(matrix).max()
    if largest == 0:
        fail(name, "a matrix that is not zero", "zeros")
    matrix = matrix / largest
    return matrix / np.linalg.norm(matrix)
