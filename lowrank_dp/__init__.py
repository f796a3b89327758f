"""Differentially private (DP) fine-tuning with low rank: spectra, restoration, LoRA, attacks.

Submodules load on first use, so that ``import lowrank_dp`` and ``lowrank_dp.theory`` do not import
torch, transformers or opacus.
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

__version__ = "0.2.0"
__all__ = [
    "accounting",
    "artifacts",
    "data",
    "evaluation",
    "experiments",
    "figures",
    "grads",
    "lora",
    "losses",
    "mechanism",
    "membership",
    "mia",
    "models",
    "optim",
    "plots",
    "restore",
    "rng",
    "spectrum",
    "sweep",
    "theory",
    "train",
]  # fmt: skip

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, __all__)
