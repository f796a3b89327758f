"""Per-example gradient norms and the clipped gradient sum, in one backward pass.

Book-keeping (Bu et al. 2022, arXiv 2210.00038): hooks keep each trained layer's input and output
gradient, from which the norm of every example's gradient follows (Li et al. 2021, arXiv
2110.05679) and then, in one matrix product a layer, the sum of the clipped gradients. The trained
weights do not require gradients inside their own layers meanwhile, so autograd never computes the
unclipped sum that would be thrown away.

    work    one micro-batch, and how its norms become clip factors
    factors  per-example gradients that are not formed: their norms and their weighted sum
    axes  where the rows are in what a layer sees
    layers  the rule of each layer, and the hooks that record it
    losses  each row's loss alone, from the model's own
    backends  book-keeping, the same on a compiled graph (``compiled``), Opacus, a loop
    independence  whether a model and a backend keep rows apart, against an ordinary loop

The model is left as it was found: mode, ``.grad``, ``requires_grad``, buffers and hooks.
"""

from lowrank_dp.grads.clipping import (
    PaddingBatch,
    Reduce,
    Sums,
    clipped_sum,
    clipped_sum_over,
    row_gradients,
)
from lowrank_dp.grads.microbatch import Batch

__all__ = [
    "Batch",
    "PaddingBatch",
    "Reduce",
    "Sums",
    "clipped_sum",
    "clipped_sum_over",
    "row_gradients",
]
