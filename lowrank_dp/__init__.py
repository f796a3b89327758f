"""What low rank does for private fine-tuning, and what noise does to low rank.

Submodules load on first use, so that ``import lowrank_dp`` and ``lowrank_dp.theory`` cost nothing
of torch, transformers or opacus.
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_SUBMODULES = (
    "accounting",
    "artifacts",
    "data",
    "evaluation",
    "experiments",
    "figures",
    "grads",
    "lora",
    "mechanism",
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
)


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES])
