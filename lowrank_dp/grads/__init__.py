"""Clipped sums and norms of per-example gradients, in one backward pass.

Book-keeping (Bu et al. 2022, arXiv 2210.00038): hooks record each trained layer's input and output
gradient. The records give the norm of every example's gradient (Li et al. 2021, arXiv 2110.05679)
and then the sum of the clipped gradients in one matrix product per layer. Meanwhile the trained
weights require no gradients inside their own layers, so autograd never computes the unclipped sum.

    clipping        the public functions
    precheck        checks before a micro-batch runs (``frequencies``, ``independence``)
    backends        book-keeping, the same on a compiled graph (``compiled``), Opacus, a loop
    microbatch      a micro-batch, and its clip factors
    model_state     what a forward changes on a model, and its restoration
    recording       hooks that record a layer's input and output gradient
    layers          the rule of each kind of layer
    factors         norms and weighted sums of gradients that are not formed
    axes            layouts of a layer's input
    losses          the loss of each row alone
    independence    test that rows are kept apart (``alone``, ``own_length``, ``tolerances``)
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
