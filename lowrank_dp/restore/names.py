"""Names of the schemes in :mod:`~lowrank_dp.restore.schemes`, importable without torch."""

EDGE_SCHEMES = ("hard", "soft", "optimal", "denoise", "partial")  # these read the noise level
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
    "oracle",
)
