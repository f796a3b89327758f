"""Singular values of noisy gradients, compared with the bulk of the noise."""

from lowrank_dp.spectrum.decomposition import Spectrum, alignment, decompose

__all__ = ["Spectrum", "alignment", "decompose"]
