"""LoRA's implicit noise: G A^T A in place of the gradient G (arXiv 2409.17538).

One SGD step of a LoRA layer with B = 0 and A frozen moves the effective weight by
-learning_rate * scaling^2 * G A^T A. If A (rank, n) has independent N(0, 1/rank) entries, then
E[A^T A] = I, so the step is that of the full gradient plus the noise U = G (A^T A - I), with
Var U_ij = (|g_i|^2 + g_ij^2) / rank for the rows g_i of G. All rows of G share one A, and so do all
steps if A stays frozen. `lowrank_dp.theory` has the exact law of the noise.
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.lora.noise import (
        ENTRY_KURTOSIS,
        NoiseMoments,
        draw_a,
        implicit_noise,
        matched_noise,
        measure_noise,
        project,
        sample_noise,
    )
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "ENTRY_KURTOSIS",
    "NoiseMoments",
    "draw_a",
    "implicit_noise",
    "matched_noise",
    "measure_noise",
    "project",
    "sample_noise",
]
