"""LoRA's implicit noise: G A^T A in place of the gradient G (arXiv 2409.17538).

One SGD step of a LoRA layer with B = 0 and A frozen moves the effective weight by
-learning_rate * scaling^2 * G A^T A. With A of shape (rank, n) and independent N(0, 1/rank)
entries, E[A^T A] = I, so the step is the full gradient's plus the noise U = G (A^T A - I):

    Var U_ij = (|g_i|^2 + g_ij^2) / rank,      g_i the rows of G.

The noise is that of one A: shared by the rows of G, and by the steps if A stays. Its exact law is
in `lowrank_dp.theory`; here it is drawn and measured.
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.lora.noise import (
        ENTRY_KURTOSIS,
        NoiseMoments,
        draw_a,
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
    "matched_noise",
    "measure_noise",
    "project",
    "sample_noise",
]
