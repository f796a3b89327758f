"""Time and alignment of the fast restoration, compared with a full SVD and rebuild.

    python benchmarks/restore.py [--threads 2] [--quick] [--json FILE]

The matrices are float32, of rank-k signal and unit noise, k from 0 to 40. Spikes are in units of
the phase transition (mn)^(1/4), below which a clean singular value cannot be detected; "edge" means
spikes just above it. "exact" is `torch.linalg.svd` and the product of the shrunk factors. A ratio
is the median over rounds in which fast and exact take turns, in wall time. Alignment is the cosine
with the clean signal, of the fast path relative to the exact path. ``benchmarks/restore.json`` is a
saved run.
"""

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from lowrank_dp import artifacts
from lowrank_dp.restore import krylov, restore
from lowrank_dp.spectrum import alignment, decompose
from lowrank_dp.spectrum.random_matrix import aspect_and_scale, shrink_frobenius

SHAPES = {(1024, 4096): 25.0, (768, 3072): 15.0}
ALIGNMENT = 0.99
SPIKES = {
    "0": [],
    "1": [3.0],
    "1 edge": [1.1],
    "8": list(np.linspace(6, 1.1, 8)),
    "20": list(np.linspace(8, 1.05, 20)),
    "40": list(np.geomspace(20, 1.1, 40)),
    "40 edge": list(np.linspace(1.6, 1.05, 40)),
}


def spiked(shape, factors, seed=0):
    """A noisy matrix with unit noise, and its clean signal."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    if not factors:
        # a draw of pure noise may exceed the asymptotic edge: draw until none does
        while decompose(noise, 1.0).num_above_edge:
            noise = torch.randn(shape, generator=generator)
        return noise, torch.zeros(shape)
    u, v = (
        torch.linalg.qr(torch.randn(side, len(factors), generator=generator))[0] for side in shape
    )
    clean = (u * (torch.tensor(factors, dtype=torch.float32) * math.prod(shape) ** 0.25)) @ v.T
    return clean + noise, clean


def exact(noisy):
    """Optimal shrinkage by a full SVD, which the fast path replaces."""
    u, s, vh = torch.linalg.svd(noisy, full_matrices=False)
    aspect, scale = aspect_and_scale(noisy.shape, 1.0)
    return (u * (scale * shrink_frobenius(s / scale, aspect))) @ vh


def detect(noisy):
    """The search of the fast path for singular values above the edge, alone."""
    aspect, scale = aspect_and_scale(noisy.shape, 1.0)
    edge = sum(map(math.sqrt, noisy.shape))
    return krylov.leading_triplets(
        noisy.unsqueeze(0), lambda s: shrink_frobenius(s / scale, aspect) ** 2, level=edge
    )


def seconds(function, argument, repeats=1):
    start = time.perf_counter()
    for _ in range(repeats):
        function(argument)
    return (time.perf_counter() - start) / repeats


def paired(first, second, argument, rounds, repeats=1):
    """Median seconds of both functions, and median and range of the paired ratios."""
    first(argument), second(argument)
    times = []
    for turn in range(rounds):
        if turn % 2:
            b, a = seconds(second, argument, repeats), seconds(first, argument)
        else:
            a, b = seconds(first, argument), seconds(second, argument, repeats)
        times.append((a, b))
    ratios = [a / b for a, b in times]
    medians = [statistics.median(side) for side in zip(*times, strict=True)]
    return *medians, (statistics.median(ratios), min(ratios), max(ratios))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 7")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds = 3 if arguments.quick else 7
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"float32, median of {rounds} paired rounds\n"
    )

    rows = []
    for shape, asked in SHAPES.items():
        size = "{} x {}".format(*shape)
        for label, factors in SPIKES.items():
            noisy, clean = spiked(shape, factors)
            slow, fast, speed = paired(exact, restore_fast, noisy, rounds, repeats=3)
            print(f"{size:12}{label:>8} spikes   exact {slow:7.3f} s   fast {fast:7.4f} s")
            rows.append((f"{size}, {label} spikes, exact / fast", *speed, ">=", asked))
            if not factors:
                _, search, cost = paired(restore_fast, detect, noisy, 4 * rounds)
                print(f"{size:12}{'':8} of it, to find that nothing stands out: {search:7.4f} s")
                rows.append((f"{size}, pure noise, fast / search alone", *cost, "<=", 1.25))
                continue
            share = alignment(restore_fast(noisy), clean) / alignment(exact(noisy), clean)
            rows.append(
                (f"{size}, {label} spikes, alignment", share, share, share, ">=", ALIGNMENT)
            )

    print(f"\n{'':46}{'measured':>9}{'range':>16}{'asked':>10}")
    for label, value, low, high, sign, asked in rows:
        met = value <= asked if sign == "<=" else value >= asked
        digits = 3 if "alignment" in label else 2
        print(
            f"{label:46}{value:9.{digits}f}{f'{low:.2f}-{high:.2f}':>16}{sign:>5} {asked:.2f}"
            f"  {'met' if met else 'MISSED'}"
        )
    if arguments.json:
        keys = ("figure", "measured", "low", "high", "relation", "asked")
        result = {
            "rows": [dict(zip(keys, row, strict=True)) for row in rows],
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "provenance": artifacts.provenance(seed=0, device="cpu"),
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def restore_fast(noisy):
    return restore(noisy, 1.0)


if __name__ == "__main__":
    main()
