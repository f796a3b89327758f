"""Estimate of an audit's duration, from the time that the canaries' gradients take."""

from __future__ import annotations

import time

from lowrank_dp.audit.canaries import Audited
from lowrank_dp.audit.request import Design
from lowrank_dp.grads.clipping import clipped_sum_over


def estimated_seconds(audited: Audited, design: Design) -> float:
    """Estimate the duration of an audit in seconds, by timing one micro-batch of canaries.

    No record is read. The estimate leaves out the time for noise, optimizer, statistics and
    compilation.
    """
    setup, config = audited.setup, audited.setup.config
    rows = list(audited.canaries)[: config.micro_batch_size]
    seconds = []
    for _ in range(2):  # the first call includes a check of the model's per-example gradients
        started = time.perf_counter()
        clipped_sum_over(
            setup.model, setup.batches(rows), audited.max_grad_norm, padding=config.padding
        )
        seconds.append(time.perf_counter() - started)
    batches = max(1.0, config.batch_size / config.micro_batch_size)
    one_step = {
        "sums": 3 * batches + design.num_canaries + 2,
        "weights": batches + 2 * max(1.0, design.num_canaries / config.micro_batch_size),
        "runs": batches + 1,
    }[design.design]
    return seconds[-1] * one_step * config.steps * design.num_runs
