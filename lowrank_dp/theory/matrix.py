"""A matrix query G -> G A^T A with one shared A: why two rows already give it away.

If G has rank at least 2 and G' is not a multiple of it, the laws of G A^T A and G' A^T A are
mutually singular, at every LoRA rank: A^T A is symmetric, so Y = G A^T A makes Y G^T symmetric,
and for another candidate that almost surely fails. See `symmetry_score`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lowrank_dp._validate import fail
from lowrank_dp.theory._arrays import Array, reals


def symmetry_score(released: ArrayLike, candidate: ArrayLike) -> float:
    """|Y G^T - G Y^T|_F / (|Y| |G|) >= 0: zero, up to rounding, if Y = G A^T A.

    ``released`` is Y and ``candidate`` is G, both of shape (m, n) and non-zero, else
    ``ValueError``. The score needs no access to A; the smaller score wins. For one row it is
    identically 0: there the test is the likelihood ratio of `projection_logpdf`.

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
    """The matrix divided by its Frobenius norm, without overflow on the way."""
    matrix = reals(name, value)
    if matrix.ndim != 2 or matrix.size == 0:
        fail(name, "a non-empty array of shape (m, n)", matrix.shape)
    largest = np.abs(matrix).max()
    if largest == 0:
        fail(name, "a matrix that is not zero", "zeros")
    matrix = matrix / largest
    return matrix / np.linalg.norm(matrix)
