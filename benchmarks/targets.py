"""Time of a language model's clipped sum with logits at the targets only, and at every token.

    python benchmarks/targets.py [--quick] [--json FILE]

The last two blocks of the packaged SmolLM2 are trained on E2E if LOWRANK_DP_DATA holds it, else on
the generated tables, in micro-batches of 8. The outputs of the frozen blocks are computed once, as
with ``--prefix-cache``, so that a clipped sum runs the trained blocks and the head only. Times are
process-CPU seconds of one thread. Ratios are medians over rounds in which the modes take turns.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from lowrank_dp.data import encode, load_task, micro_batches
from lowrank_dp.grads import clipped_sum_over
from lowrank_dp.models import load_model
from lowrank_dp.models.prefix import STATES, FrozenPrefix

ROWS, MICRO = 16, 8
ASKED = 1.5  # the targets of E2E are 45% of its tokens
PRECISIONS = {"float32": None, "bf16 autocast": torch.bfloat16}


def seconds(model, batches, dtype, everywhere):
    """Process-CPU seconds of one clipped sum; ``everywhere`` computes logits at every token."""
    started = time.process_time()
    if everywhere:
        with mock.patch("lowrank_dp.grads.losses.separate_head", return_value=None):
            clipped_sum_over(model, batches, 1.0, autocast_dtype=dtype, check_rows=False)
    else:
        clipped_sum_over(model, batches, 1.0, autocast_dtype=dtype, check_rows=False)
    return time.process_time() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = load_task("e2e" if os.environ.get("LOWRANK_DP_DATA") else "generated-table")
    model, tokenizer = load_model("smollm2", task=task, train_layers=2)
    model.eval()
    rows = encode(task.train[:ROWS], tokenizer, kind=task.kind)
    targets = sum(label != -100 for row in rows for label in row["labels"])
    print(f"torch {torch.__version__}, {task.name}: {ROWS} rows")
    print(f"{targets} of {sum(len(row['input_ids']) for row in rows)} tokens are targets")
    prefix, results = FrozenPrefix(model), []
    for name, dtype in PRECISIONS.items():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            batches = [
                {**batch, STATES: prefix.run(batch)}
                for _, batch in micro_batches(rows, MICRO, tokenizer.pad_token_id)
            ]
        prefix.install()
        ratios = []
        for turn in range(-1, 3 if arguments.quick else 9):
            order = (True, False) if turn % 2 else (False, True)
            times = {everywhere: seconds(model, batches, dtype, everywhere) for everywhere in order}
            if turn >= 0:  # the first round warms up
                ratios.append(times[True] / times[False])
        prefix.remove()
        value, low, high = statistics.median(ratios), min(ratios), max(ratios)
        label = f"{name}: every token / targets only"
        met = "met" if value >= ASKED else "MISSED"
        print(f"{label:44}{value:7.2f} {f'{low:.2f}-{high:.2f}':>12} >= {ASKED:.2f}  {met}")
        keys = ("figure", "measured", "low", "high", "relation", "asked")
        results.append(dict(zip(keys, (label, value, low, high, ">=", ASKED), strict=True)))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
