"""Alignment and error of many schemes on one noisy gradient, from one decomposition.

Every scheme replaces the singular values s by s' and keeps the noisy singular vectors: its result
is ``M = U diag(s') V^T``. With ``w_i = u_i^T G v_i`` for the clean gradient G,
``<M, G> = sum_i s'_i w_i`` and ``|M|^2 = sum_i s'_i^2``. NON-PRIVATE throughout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_dp.restore import SCHEMES, restored_values

Array = NDArray[np.float64]
Scheme = tuple[str, dict[str, Any]]  # a name in restore.SCHEMES, and options of restore


def measure_schemes(
    noisy: Tensor,
    clean: Tensor,
    noise_std: float,
    schemes: Iterable[Scheme],
    profile: Tensor | None = None,
) -> tuple[Array, NDArray[np.bool_]]:
    """Measure the result M of each scheme on ``noisy`` against ``clean``.

    Args:
        noisy: noisy gradient (m, n).
        clean: clean gradient (m, n).
        noise_std: standard deviation of the noise in each entry, absolute.
        schemes: names with options. The option ``values`` of the oracle is "weights" (the w_i) or
            "profile" (the clean singular values).
        profile: clean singular values (k,), for the oracle.

    Returns:
        The products ``|M|^2, <M, G>, |G|^2`` (schemes, 3), and whether each scheme acted
        (schemes,), that is, neither kept the matrix nor zeroed it.
    """
    u, s, vh = torch.linalg.svd(noisy, full_matrices=False)
    weights = ((u.mT @ clean) * vh).sum(-1)
    oracles = {"weights": weights, "profile": profile}
    norm2 = float(clean.double().square().sum())
    products, acted = [], []
    for scheme, options in schemes:
        if not SCHEMES[scheme].private:
            options = options | {"values": oracles[options["values"]]}
        new = restored_values(s, (noisy.shape[0], noisy.shape[1]), noise_std, scheme, **options)
        products.append(
            (float(new.double().square().sum()), float(new.double() @ weights.double()), norm2)
        )
        acted.append(bool(new.any()) and not torch.equal(new, s))
    return np.array(products), np.array(acted)


def cosine(products: Array) -> Array:
    """Return the cosine (...) of M and G, in [-1, 1], from products (..., 3); 0 for M = 0."""
    made2, dot, clean2 = np.moveaxis(products, -1, 0)
    return dot / np.sqrt(np.where(made2 > 0, made2 * clean2, 1.0))


def distance(products: Array) -> Array:
    """Return the relative distance ``|M - G| / |G|`` (...) from products (..., 3)."""
    made2, dot, clean2 = np.moveaxis(products, -1, 0)
    return np.sqrt(np.maximum(made2 - 2 * dot + clean2, 0.0) / clean2)
