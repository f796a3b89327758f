"""Time and memory of a DP training step with and without restoration, compared with Opacus.

    python benchmarks/train.py [--quick] [--json FILE]
    python benchmarks/train.py --only cache --model mpnet-base --train-layers 2 --batch-size 256

The model is the packaged MiniLM with full fine-tuning (linear and norm layers), on SST-2 if
LOWRANK_DP_DATA holds it, else on the generated task; the expected batch is 512 in micro-batches of
64, with sigma 0.6, Adam and 2 threads. A step goes from the Poisson sample to the updated weights.
The share of restoration is its time over the rest of the same steps. Opacus's fastest exact mode
(ghost clipping) takes a step on the same kind of sample in the same micro-batches, with noise and
Adam, without restoration; "plain" is a step of ordinary training. The last block with pooler and
head is trained, in one thread, with and without the cache of the frozen blocks' outputs
(``--prefix-cache``), with all checks and an evaluation on the validation split after each step; the
time of the first pass, which fills the cache, is printed by itself. ``--only cache`` measures this
part alone, and takes another model (a name, or a folder), number of trained blocks, batch size and
number of records. The target is a factor of 2.5 with one trained block, and of 3 with two of twelve
blocks; the passes alone save a factor of 16 / 6 = 2.7 (per block, a forward pass is one unit and a
backward pass two).
Times are process-CPU seconds of all threads, which other load on the machine changes little. Ratios
are medians over rounds in which the modes take turns. Peak memory is that of a process that runs
one mode only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch.nn import functional

from lowrank_dp.figures import default_task
from lowrank_dp.train import TrainConfig, loop
from lowrank_dp.train import step as step_module
from lowrank_dp.train.checks import StepChecks
from lowrank_dp.train.setup import prepare
from lowrank_dp.train.state import first_state
from lowrank_dp.train.step import take_step

MODES = {
    "none": {},
    "optimal": {"scheme": "optimal"},
    "momentum": {"scheme": "optimal", "momentum_beta": 0.9},
}
BATCH, MICRO, SIGMA = 512, 64, 0.6


def setup_for(mode):
    config = TrainConfig(
        task=default_task(),
        noise_multiplier=SIGMA,
        batch_size=BATCH,
        micro_batch_size=MICRO,
        seed=0,
        max_examples=20_000,
        **MODES.get(mode, {}),
    )
    setup = prepare(config, 0)
    return setup, first_state(config, "benchmark")


class Ours:
    """Steps of ``lowrank_dp.train``."""

    def __init__(self, mode):
        self.setup, self.state = setup_for(mode)

    def __call__(self):
        """Take one step; return its seconds, and the seconds of restoration among them."""
        seconds, restoring = self.state.seconds, self.state.restore_seconds
        take_step(self.setup, self.state)
        self.setup.optimizer.zero_grad()
        return self.state.seconds - seconds, self.state.restore_seconds - restoring


class Theirs:
    """Steps on the same kind of sample by Opacus's ghost clipping, or without privacy."""

    def __init__(self, mode):
        self.setup, self.state = setup_for(mode)
        model = self.setup.model.train()
        self.ghost = mode == "ghost"
        self.model = (
            GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=1.0)
            if self.ghost
            else model
        )

    def __call__(self):
        """Take one step; return its seconds, and 0."""
        started = time.process_time()
        trained = self.setup.trained.values()
        sums = [torch.zeros_like(p) for p in trained]
        rows = step_module._sample(
            self.setup.unit_rows, self.setup.mechanism, self.state.sampler, one_each=False
        )
        for batch in self.setup.batches(rows):
            labels = batch.pop("labels")
            if self.ghost:
                self.model.enable_hooks()
                losses = functional.cross_entropy(
                    self.model(**batch).logits, labels, reduction="none"
                )
                losses.sum().backward(retain_graph=True)
                for p in trained:
                    p.grad = None
                scale = self.model.get_clipping_coef()
                self.model.disable_hooks()
                (losses * scale).sum().backward()
            else:
                functional.cross_entropy(
                    self.model(**batch).logits, labels, reduction="sum"
                ).backward()
            for total, p in zip(sums, trained, strict=True):
                total.add_(p.grad)
                p.grad = None
        for total, p in zip(sums, trained, strict=True):
            if self.ghost:
                total.add_(torch.randn_like(total), alpha=SIGMA)
            p.grad = total.div_(BATCH)
        self.setup.optimizer.step()
        self.setup.optimizer.zero_grad()
        return time.process_time() - started, 0.0


class LastBlock:
    """Steps and evaluations of a run that trains the last blocks, with all checks."""

    def __init__(self, asked, batch_size, cache=""):
        config = TrainConfig(
            model=asked.model,
            task=default_task(),
            train_layers=asked.train_layers,
            noise_multiplier=SIGMA,
            batch_size=batch_size,
            micro_batch_size=MICRO,
            steps=1000,
            eval_every=1,
            eval_examples=min(1000, asked.max_examples),
            seed=0,
            max_examples=asked.max_examples,
            prefix_cache=cache,
        )
        self.setup = prepare(config, 0)
        self.state = first_state(config, "benchmark")
        self.state.checks = StepChecks(self.setup, self.state.sampler, self.state.noise)

    def __call__(self):
        """Take one step and evaluate once; return the seconds of both."""
        started = time.process_time()
        take_step(self.setup, self.state)
        self.setup.optimizer.zero_grad()
        stepped = time.process_time()
        loop._scores(self.setup)
        return stepped - started, time.process_time() - stepped


def cache_rows(rounds, asked):
    """Measure the cache of frozen blocks; return rows of the table of results."""
    wanted = 2.5 if asked.train_layers == 1 else 3.0
    label = "last block" if asked.train_layers == 1 else f"last {asked.train_layers} blocks"
    torch.set_num_threads(1)  # as a worker of a sweep has
    found, evaluating = [], []
    with tempfile.TemporaryDirectory() as cache:
        started = time.process_time()
        plain = LastBlock(asked, asked.batch_size[0]).setup
        loaded = time.process_time()
        LastBlock(asked, asked.batch_size[0], cache)
        spent = (time.process_time() - loaded) - (loaded - started)
        rows = len(plain.rows) + len(plain.evaluated[1])
        print(plain.description)
        print(
            f"first pass over {rows:,} rows: {spent:.1f} s, {1e3 * spent / rows:.2f} ms a row",
            flush=True,
        )
        for batch_size in asked.batch_size:
            modes = LastBlock(asked, batch_size), LastBlock(asked, batch_size, cache)
            for mode in modes:
                mode()  # warm up
            pairs = []
            for turn in range(rounds):
                order = modes if turn % 2 else modes[::-1]
                times = {id(mode): mode() for mode in order}
                pairs.append([times[id(mode)] for mode in modes])
            for part, name in enumerate(("step", "evaluation")):
                plain, cached = (statistics.median(pair[i][part] for pair in pairs) for i in (0, 1))
                print(
                    f"{label}, {batch_size}: {name} {plain:.2f} s, cached {cached:.2f} s",
                    flush=True,
                )
            ratios = [plain[0] / cached[0] for plain, cached in pairs]
            found.append((f"{label}, {batch_size}: step / with cache", ratios, ">=", wanted))
            evaluating += [plain[1] / cached[1] for plain, cached in pairs]
    return [*found, (f"{label}: evaluation / with cache", evaluating, ">=", wanted)]


def build(mode):
    return Ours(mode) if mode in MODES else Theirs(mode)


def peak_megabytes(mode):
    out = subprocess.run(
        [sys.executable, __file__, "--peak", mode], capture_output=True, text=True, check=True
    )
    return float(out.stdout.split()[-1])


def own_peak_megabytes():
    return float(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--only", choices=["cache"], help="measure one part only")
    parser.add_argument("--model", default="minilm", help="of the cache's part: name or folder")
    parser.add_argument("--train-layers", type=int, default=1, help="trained blocks, with a cache")
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[256, 1024], help="of the cache's part"
    )
    parser.add_argument("--max-examples", type=int, default=3_000, help="of the cache's part")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    step_module._seconds = lambda device: time.process_time()
    if arguments.peak:
        step = build(arguments.peak)
        for _ in range(2):
            step()
        print(own_peak_megabytes())
        return
    rounds = 3 if arguments.quick else 9
    rows = [] if arguments.only else restoration_rows(rounds)
    show(rows + cache_rows(rounds, arguments), arguments.json)


def restoration_rows(count):
    """Measure restoration, ghost clipping and memory; return rows of the table of results."""
    modes = [*MODES, "ghost"]
    steps = {mode: build(mode) for mode in modes}
    for step in steps.values():
        step()  # warm up
    times = {mode: [] for mode in modes}
    for turn in range(count):
        for mode in modes if turn % 2 else reversed(modes):
            times[mode].append(steps[mode]())

    def added(mode):
        return [restoring / (whole - restoring) for whole, restoring in times[mode]]

    def rounds(above, below):
        return [a[0] / b[0] for a, b in zip(times[above], times[below], strict=True)]

    print(f"torch {torch.__version__}, 2 threads, {steps['none'].setup.description}\n")
    for mode, values in times.items():
        print(f"{mode:10}{statistics.median(whole for whole, _ in values):7.2f} s a step")
    memory = peak_megabytes("momentum") / peak_megabytes("plain")
    return [
        ("optimal restoration / the rest of the step", added("optimal"), "<=", 0.05),
        ("restored running mean / the rest of the step", added("momentum"), "<=", 0.08),
        ("Opacus's ghost step / our restored step", rounds("ghost", "optimal"), ">=", 1.3),
        ("peak memory, restored running mean / plain", [memory], "<=", 1.5),
    ]


def show(rows, file):
    """Print the table of results, and write the results to ``file``, unless it is None."""
    print(f"\n{'':48}{'measured':>9}{'range':>14}{'asked':>10}")
    results = []
    for label, values, sign, asked in rows:
        value, low, high = statistics.median(values), min(values), max(values)
        met = value <= asked if sign == "<=" else value >= asked
        results.append((label, value, low, high, sign, asked))
        print(
            f"{label:48}{value:9.3f}{f'{low:.3f}-{high:.3f}':>14}{sign:>5} {asked:.2f}"
            f"  {'met' if met else 'MISSED'}"
        )
    if file:
        keys = ("figure", "measured", "low", "high", "relation", "asked")
        file.write_text(
            json.dumps([dict(zip(keys, row, strict=True)) for row in results], indent=1)
        )


if __name__ == "__main__":
    main()
