"""Names of the restoration schemes, importable without torch.

The schemes are in :mod:`lowrank_dp.restore.schemes`.
"""

EDGE_SCHEMES = (
    "hard",
    "soft",
    "optimal",
    "denoise",
    "partial",
    "polar",
)  # these read the noise level
NON_PRIVATE_SCHEMES = ("oracle",)
SCHEME_NAMES = (
    "none",
    "hard",
    "soft",
    "truncate",
    "optimal",
    "denoise",
    "partial",
    "power",
    "polar",
    "oracle",
)
