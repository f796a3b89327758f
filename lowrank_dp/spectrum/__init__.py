"""Singular values of a matrix against its noise level."""

from lowrank_dp.spectrum.decomposition import Spectrum, alignment, decompose

__all__ = ["Spectrum", "alignment", "decompose"]
