"""Prediction of each scheme's alignment with the clean gradient, from clean singular values alone.

The noisy matrix is ``N = G + noise_std * Z``, and a scheme replaces its singular values s by
``f(s)``: ``M = sum_i f(s_i) u_i v_i^T``. With ``w_i = u_i^T G v_i``, ``<M, G> = sum_i f(s_i) w_i``
and ``|M|^2 = sum_i f(s_i)^2``. Random-matrix theory (:mod:`lowrank_dp.spectrum.random_matrix`)
gives s and w in the limit of a large matrix:

* A clean value theta above the threshold ``aspect ** 0.25`` is visible. It becomes
  ``visible_value(theta)``, with ``w = theta * sqrt(short overlap * long overlap)``.
* The other singular values of N are those of pure noise. The sum of ``s_i w_i`` over all values is
  ``<N, G>``, which is ``|G|^2`` on average. The part of ``|G|^2`` that the visible values leave is
  divided among the other values so that each w is proportional to its s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.restore import restored_values
from lowrank_dp.spectrum.random_matrix import (
    aspect_and_scale,
    bulk_edge,
    marchenko_pastur_quantiles,
    overlaps,
    visible_value,
)


@dataclass(frozen=True)
class NoisySpectrum:
    """Expected singular values of one noisy matrix, and clean gradient along its singular vectors.

    Attributes:
        shape: (m, n) of the matrix.
        noise_std: standard deviation of the noise on an entry, absolute.
        values: (min(m, n),) float64, singular values of the noisy matrix, absolute, descending.
        weights: (min(m, n),) float64, ``u_i^T G v_i``, absolute.
        clean_norm: Frobenius norm of the clean matrix, absolute.
        top_clean: largest singular value of the clean matrix, absolute.
        visible_rank: number of clean singular values that stand above the edge of the noise.
    """

    shape: tuple[int, int]
    noise_std: float
    values: Tensor
    weights: Tensor
    clean_norm: float
    top_clean: float
    visible_rank: int


def predict_spectrum(clean: Tensor, shape: tuple[int, int], noise_std: float) -> NoisySpectrum:
    """Predict the spectrum of a matrix with singular values ``clean`` after noise is added.

    Args:
        clean: (min(m, n),) singular values of the clean matrix, absolute, descending, >= 0.
        shape: (m, n) of the matrix.
        noise_std: standard deviation of the noise on an entry, absolute, > 0.

    Raises:
        ValueError: on a bad shape or noise level, or if ``clean`` is not a spectrum of the shape.

    Source: Benaych-Georges & Nadakuditi, J. Multivariate Anal. 111 (2012), for the visible values.
    """
    aspect, scale = aspect_and_scale(shape, noise_std)
    clean = _validate.floating("clean", clean).double().cpu()
    if clean.shape != (min(shape),):
        _validate.fail("clean", f"a tensor of shape ({min(shape)},)", tuple(clean.shape))
    if not bool((clean >= 0).all() and (clean.diff() <= 0).all()):
        raise ValueError("clean must be nonnegative and descending")
    theta = clean / scale
    seen = theta > aspect**0.25
    rank = int(seen.sum())
    short, long = overlaps(theta[seen], aspect)
    spikes = visible_value(theta[seen], aspect) * scale
    spike_weights = clean[seen] * (short * long).sqrt()
    energy = float(clean.square().sum())
    bulk = torch.from_numpy(marchenko_pastur_quantiles(len(clean), shape, noise_std))[rank:]
    total = energy + noise_std**2 * math.prod(shape)
    left = max(total - float(spikes.square().sum()), 0.0)
    bulk = bulk * math.sqrt(left / max(float(bulk.square().sum()), 1e-300))
    bulk = bulk.clamp(max=bulk_edge(shape, noise_std))
    rest = max(energy - float(spikes @ spike_weights), 0.0)
    bulk_weights = bulk * (rest / max(float(bulk.square().sum()), 1e-300))
    return NoisySpectrum(
        shape,
        noise_std,
        torch.cat([spikes, bulk]),
        torch.cat([spike_weights, bulk_weights]),
        math.sqrt(energy),
        float(clean[0]),
        rank,
    )


def scheme_products(
    spectrum: NoisySpectrum, scheme: str, **options: Any
) -> tuple[float, float, float]:
    """Predict ``(|M|^2, <M, G>, |G|^2)`` of the restored matrix M and the clean matrix G.

    ``scheme`` and ``options`` are arguments of :func:`lowrank_dp.restore.restored_values`, which
    also raises the errors. The products are absolute. The products of several layers can be added.
    """
    new = restored_values(spectrum.values, spectrum.shape, spectrum.noise_std, scheme, **options)
    return float(new.square().sum()), float(new @ spectrum.weights), spectrum.clean_norm**2


@dataclass(frozen=True)
class SchemeAlignment:
    """Predicted cosines, in [-1, 1], between a scheme's result and the clean gradient.

    Attributes:
        scheme: the scheme in words.
        one_vector: cosine between the two gradients with all matrices concatenated to one vector.
        mean: mean over the matrices of each matrix's cosine. A matrix that the scheme sets to zero
            has cosine 0.
    """

    scheme: str
    one_vector: float
    mean: float


def predict_alignment(
    spectra: Iterable[NoisySpectrum], schemes: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> list[SchemeAlignment]:
    """Predict the alignment of each scheme over the matrices of a model.

    Args:
        spectra: one predicted spectrum per matrix. A matrix whose clean gradient is zero does not
            count.
        schemes: label -> (name in ``restore.SCHEMES``, options of the scheme).

    Raises:
        ValueError: as :func:`lowrank_dp.restore.restored_values`, and if no matrix has a gradient.
    """
    found = [spectrum for spectrum in spectra if spectrum.clean_norm > 0]
    if not found:
        raise ValueError("spectra must include a matrix with a nonzero clean gradient, got none")
    result = []
    for label, (scheme, options) in schemes.items():
        products = torch.tensor(
            [scheme_products(spectrum, scheme, **options) for spectrum in found],
            dtype=torch.float64,
        )
        result.append(
            SchemeAlignment(label, float(cosine(products.sum(0))), float(cosine(products).mean()))
        )
    return result


def cosine(products: Tensor) -> Tensor:
    """Return the cosines (...) from products (..., 3) of :func:`scheme_products`; 0 for M = 0."""
    made2, dot, clean2 = products.unbind(-1)
    return torch.where(made2 > 0, dot / (made2 * clean2).clamp(min=1e-300).sqrt(), 0.0)
