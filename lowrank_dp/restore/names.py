"""Names of the schemes, importable without torch; :mod:`~lowrank_dp.restore.schemes` has them."""

EDGE_SCHEMES = ("hard", "soft", "optimal", "denoise", "partial")  # they read the noise level
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
