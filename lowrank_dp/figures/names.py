"""Names of the figures, importable without torch; :mod:`~lowrank_dp.figures.catalog` has them."""

FIGURE_NAMES = (
    "spectra",
    "alignment",
    "tasks",
    "ablation",
    "momentum",
    "lora_noise",
    "total_variation",
    "projection_privacy",
    "matrix_attack",
    "dynamics",
    "efficiency",
    "efficiency_mnli",
    "efficiency_e2e",
    "efficiency_smollm2",
    "membership",
    "membership_e2e",
)
