"""Time and memory of membership inference.

    python benchmarks/mia.py [--quick]

Scoring is compared with the forward passes that it needs, of the model and of its reference. LiRA
and RMIA with 256 shadows and 50,000 records are compared with their formulas in numpy, one record
at a time on a sample of records, and the memory that they add is measured. Most of RMIA's loop is
the part of the population, which is the same for each record. Times are CPU seconds of this
process, in rounds in which the methods take turns.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lowrank_dp.data import encode, load_task, micro_batches
from lowrank_dp.mia import scores, signals
from lowrank_dp.models import load_model

SHADOWS, RECORDS, POPULATION, LOOPED = 256, 50_000, 1000, 100


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def scoring(model_name: str, task_name: str, count: int, rounds: int) -> tuple[float, float]:
    """Median seconds of the forward passes, and median ratio of scoring to these passes."""
    task = load_task(task_name)
    length = None if task.kind == "generation" else 64
    task = replace(task, splits={"train": task.train[:count]})
    model, tokenizer = load_model(model_name, task=task)
    reference, _ = load_model(model_name, task=task)
    model.eval(), reference.eval()

    def plain() -> None:
        rows = encode(task.train, tokenizer, kind=task.kind, max_length=length)
        with torch.no_grad():
            for _, batch in micro_batches(rows, 64, tokenizer.pad_token_id):
                batch.pop("labels")
                model(**batch)
                reference(**batch)

    def score() -> None:
        records = (tokenizer, task, task.train)
        before = signals.measure_reference(reference, *records, max_length=length)
        signals.measure(model, *records, max_length=length, reference=before)

    plain(), score()
    times = [(cpu_seconds(plain), cpu_seconds(score)) for _ in range(rounds)]
    return (statistics.median(a for a, _ in times), statistics.median(b / a for a, b in times))


def looped_lira(phi: Any, shadow_phi: Any, inside: Any, count: int) -> None:
    """Online LiRA with a variance per record, one record at a time."""
    from scipy import stats

    for i in range(count):
        a, b = shadow_phi[inside[:, i], i], shadow_phi[~inside[:, i], i]
        stats.norm.logpdf(phi[i], a.mean(), a.std()) - stats.norm.logpdf(phi[i], b.mean(), b.std())


def looped_rmia(
    loss: Any, shadow: Any, inside: Any, z_loss: Any, z_shadow: Any, count: int
) -> None:
    """Offline RMIA, one record at a time."""
    a = 0.3
    for i in range(count):
        ratio_z = np.exp(-z_loss) / (((1 + a) * np.exp(-z_shadow).mean(0) + 1 - a) / 2)
        p = ((1 + a) * np.exp(-shadow[~inside[:, i], i]).mean() + 1 - a) / 2
        np.mean(np.exp(-loss[i]) / p / ratio_z >= 1)


def scores_at_scale(rounds: int) -> list[tuple[str, float, str, float]]:
    """Rows of (label, measured, relation, limit) for LiRA and RMIA with many shadows."""
    rows: list[tuple[str, float, str, float]] = []
    rng = np.random.default_rng(0)
    inside = rng.random((SHADOWS, RECORDS)) < 0.5
    shadow = rng.exponential(1.0, (SHADOWS, RECORDS))
    loss, z_loss = rng.exponential(1.0, RECORDS), rng.exponential(1.0, POPULATION)
    z_shadow = rng.exponential(1.0, (SHADOWS, POPULATION))
    phi = scores.logit_confidence(loss)
    shadow_phi = scores.logit_confidence(shadow.ravel()).reshape(shadow.shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    share = RECORDS / LOOPED
    for name, fast, slow in (
        (
            "LiRA",
            lambda: scores.lira_online(phi, shadow_phi, inside, fixed_variance=False),
            lambda: looped_lira(phi, shadow_phi, inside, LOOPED),
        ),
        (
            "RMIA",
            lambda: scores.rmia_offline(loss, shadow, inside, z_loss, z_shadow),
            lambda: looped_rmia(loss, shadow, inside, z_loss, z_shadow, LOOPED),
        ),
    ):
        times = [(cpu_seconds(fast), cpu_seconds(slow) * share) for _ in range(rounds)]
        rows.append(
            (
                f"{name}, {SHADOWS} shadows x {RECORDS:,} records, seconds",
                statistics.median(a for a, _ in times),
                "<=",
                3.0,
            )
        )
        rows.append(
            (f"{name}, loop / ours", statistics.median(b / a for a, b in times), ">=", 10.0)
        )
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    rows.append(("memory added by both, GiB", added, "<=", 1.0))
    return rows


def main() -> int:
    rounds = 3 if "--quick" in sys.argv[1:] else 9
    rows: list[tuple[str, float, str, float]] = []
    for model, task, count in (
        ("minilm", "sst2", 256),
        ("tiny-llama", "e2e", 256),
        ("smollm2", "e2e", 8),
    ):
        try:
            seconds, ratio = scoring(model, task, count, rounds)
        except ValueError as error:
            print(f"scoring {model} on {task}: not run ({error})")
            continue
        print(
            f"scoring {model} on {task}, {count} records: two plain passes {seconds:.2f} s, "
            f"scoring {ratio:.2f} of that"
        )
        if model != "tiny-llama":  # whose vocabulary is most of its work: no bar
            rows.append((f"scoring / passes, {model}", ratio, "<=", 1.2))

    rows += scores_at_scale(rounds)
    print(f"\n{rounds} rounds, {torch.get_num_threads()} threads, torch {torch.__version__}")
    missed = 0
    for label, value, sign, asked in rows:
        met = value <= asked if sign == "<=" else value >= asked
        missed += not met
        print(f"{label:52}{value:9.2f}{sign:>4} {asked:g}  {'met' if met else 'MISSED'}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
