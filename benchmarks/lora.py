"""Time per sample of LoRA's noise: drawn by its exact law, and by forming A.

    python benchmarks/lora.py [--quick]

Rank 256, n = 4096, float32, one CPU thread. Forming A means drawing its rank x n entries and taking
two matrix-vector products. The ratio is the median over rounds, in which the methods take turns, of
process-CPU seconds per sample.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from lowrank_dp import lora

RANK, WIDTH, ASKED = 256, 4096, 100.0
SAMPLES, FORMED = 512, 4


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> int:
    torch.set_num_threads(1)
    rounds = 7 if "--quick" in sys.argv[1:] else 31
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(WIDTH, generator=generator)

    def sample() -> None:
        lora.sample_noise(q, RANK, SAMPLES, generator=generator)

    def form() -> None:
        for _ in range(FORMED):
            a = torch.randn(RANK, WIDTH, generator=generator).mul_(RANK**-0.5)
            (a @ q) @ a - q

    sample()
    form()
    times = [(cpu_seconds(form) / FORMED, cpu_seconds(sample) / SAMPLES) for _ in range(rounds)]
    slow, fast = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    print(f"rank {RANK}, n = {WIDTH}, {rounds} rounds, one thread")
    print(f"forming A        {1e6 * slow:>10.1f} us a sample")
    print(f"exact law        {1e6 * fast:>10.1f} us a sample")
    print(
        f"faster by        {ratio:>10.1f} x      asked {ASKED:g} x"
        f"{'' if ratio >= ASKED else '  MISSED'}"
    )
    return int(ratio < ASKED)


if __name__ == "__main__":
    sys.exit(main())
