"""Rounding of a clipped sum: how far the sum of the other rows moves when one row is added.

    python benchmarks/rounding.py [--rows 256] [--added 2] [--json FILE]

The distance, in units of C, is that of S' - S from the clipped gradient of the added row alone, in
which S and S' are the clipped sums without and with the row. In exact arithmetic the distance is 0;
the sensitivity that epsilon rests on is C. The model is MiniLM before fine-tuning with all layers
trained, and the task SST-2. ``benchmarks/rounding.json`` is a saved run. NON-PRIVATE: clean sums.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from lowrank_dp import artifacts
from lowrank_dp.experiments.gradients import GradientConfig, load_source
from lowrank_dp.grads import clipped_sum_over
from lowrank_dp.mechanism import NON_PRIVATE

PRECISIONS = {"float32": None, "bf16 autocast": torch.bfloat16}


def distances(source, rows, added, dtype):
    """Distances of S' - S from the clipped gradient of each row of ``added`` alone, C = 1."""

    def total(indices):
        batches = (batch for _, batch in source.batches(indices, 64))
        return clipped_sum_over(source.model, batches, 1.0, autocast_dtype=dtype)[0]

    before = total(rows)
    for row in added:
        after, alone = total([*rows, row]), total([row])
        moved = (after[name].double() - before[name] - alone[name] for name in before)
        yield math.sqrt(sum(part.square().sum().item() for part in moved))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="rows of the sum (default 256)")
    parser.add_argument("--added", type=int, default=2, help="rows that are added (default 2)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    source = load_source(GradientConfig(task="sst2"), arguments.rows + arguments.added)
    chosen = source.sample(arguments.rows + arguments.added, torch.Generator().manual_seed(0))
    rows, added = chosen[: arguments.rows], chosen[arguments.rows :]
    found = {}
    for name, dtype in PRECISIONS.items():
        found[name] = list(distances(source, rows, added, dtype))
        print(
            f"{name:14} distance in units of C: " + ", ".join(f"{d:.2g}" for d in found[name]),
            flush=True,
        )
    if arguments.json:
        result = {
            "privacy": NON_PRIVATE,
            "description": source.description,
            "rows": arguments.rows,
            "distances": found,
            "provenance": artifacts.provenance(seed=0, device="cpu"),
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
