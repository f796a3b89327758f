"""Singular values of noisy gradients, compared with the bulk of the noise."""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.spectrum.decomposition import Spectrum, alignment, decompose
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["Spectrum", "alignment", "decompose"]
