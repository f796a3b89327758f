"""What schemes make of one noisy gradient, compared with the clean one by a single decomposition.

Whatever a scheme does to the singular values, it keeps the noisy singular vectors. So with
``w_i = u_i^T G v_i`` for the clean gradient G, what it makes of them, ``M = U diag(s') V^T``, has
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


def compare(
    noisy: Tensor,
    clean: Tensor,
    noise_std: float,
    schemes: Iterable[Scheme],
    profile: Tensor | None = None,
) -> tuple[Array, NDArray[np.bool_]]:
    """Products (schemes, 3) ``|M|^2, <M, G>, |G|^2``, and whether a scheme acted (schemes,).

    A scheme acted if it neither kept the matrix nor zeroed it. The oracle's "values" may be
    "weights" (the w_i) or "profile" (the clean singular values, ``profile``).
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
    """Of M and G, from products (..., 3); 0 for M = 0, which has no direction."""
    made2, dot, clean2 = np.moveaxis(products, -1, 0)
    return dot / np.sqrt(np.where(made2 > 0, made2 * clean2, 1.0))


def distance(products: Array) -> Array:
    """``|M - G| / |G|`` from products (..., 3)."""
    made2, dot, clean2 = np.moveaxis(products, -1, 0)
    return np.sqrt(np.maximum(made2 - 2 * dot + clean2, 0.0) / clean2)
