"""Time of a DP training step over several processes: measured for 1 and 2, then extrapolated.

    python benchmarks/scale.py [--quick] [--redraw] [--json FILE] [--figure FILE]

The model is the packaged MiniLM with full fine-tuning, on SST-2 if LOWRANK_DP_DATA holds it, else
on the generated task, with micro-batches of 64, sigma 0.6, scheme optimal and one thread per
process. Clipping and restoration are in process-CPU seconds, which other load changes little. An
exchange (the sums to rank 0 and the noisy sum back) is the smallest wall time of several, over
loopback. The time of a step with N processes is modelled as follows. The model is fitted to one
process and to exchanges of other sizes, and checked against two processes:

    clip      c + a * rows / N          exchange   latency + 2 bytes / bandwidth
    restore   k * the longest share of the cost of the matrices, as ``processes.owners`` splits them
    hand out  N latencies + bytes / bandwidth, which splitting the restoration costs

The cost of one matrix is m n or m n min(m, n), whichever fits restorations of single matrices.
Tables of more devices are extrapolations: the first from these measurements, with a core as a
device; the second from ASSUMED numbers of a GPU, which are printed with it. ``scale.json`` and
``figures/scaling`` (PNG and PDF) are the results of one run.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch

from lowrank_dp import artifacts
from lowrank_dp.figures import default_task
from lowrank_dp.plots.style import BLACK, BLUE, FULL, GREY, RED, letter, new_figure, styled
from lowrank_dp.restore import GradientRestorer, restore
from lowrank_dp.train import TrainConfig, processes
from lowrank_dp.train import step as step_module
from lowrank_dp.train.setup import prepare
from lowrank_dp.train.state import first_state
from lowrank_dp.train.step import take_step

BATCHES, SIGMA = (32, 64, 128), 0.6
SHAPES = [(384, 384), (1536, 384), (768, 768), (3072, 768), (1024, 2560), (2560, 2560)]
COSTS = {"m n": lambda m, n: m * n, "m n min(m, n)": lambda m, n: m * n * min(m, n)}
DEVICES = (1, 2, 8, 32, 128, 512)
PARTS = ("clip", "exchange", "restore", "hand out")
# a 4B-parameter decoder: 36 blocks, width 2560, 32 query and 8 key heads of 128, 9728 inside
BLOCK = [
    (4096, 2560),
    (1024, 2560),
    (1024, 2560),
    (2560, 4096),
    (9728, 2560),
    (9728, 2560),
    (2560, 9728),
]
LARGE = {f"{block}.{i}": shape for block in range(36) for i, shape in enumerate(BLOCK)}
TOKENS, LARGE_BATCH = 512, 4096
# ASSUMED: FLOP/s reached in training and in products of a restoration, link in bytes/s, latency
GPU = {"train": 3e14, "restore": 3e13, "bandwidth": 5e10, "latency": 1e-4}


def timed(owner, name, spent):
    """Add the CPU time of a function that a step calls to ``spent[name]``."""
    function = getattr(owner, name)

    def call(*args, **kwargs):
        started = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.process_time() - started

    setattr(owner, name, call)


def measure(folder, rounds):
    """Measure, in each process, the seconds of a step's parts by batch and of exchanges by size."""
    found = {"steps": {}, "exchanges": {}}
    spent = {}
    timed(step_module, "clipped_sum_over", spent)
    timed(GradientRestorer, "restore", spent)
    with processes.processes("cpu"):
        for batch in BATCHES:
            config = TrainConfig(
                task=default_task(),
                noise_multiplier=SIGMA,
                batch_size=batch,
                scheme="optimal",
                seed=0,
                max_examples=5000,
            )
            setup = prepare(config, 0)
            state = first_state(config, "benchmark")
            values = []
            for _ in range(rounds + 1):
                spent.clear()
                # the size of the sample is random: times are scaled to the expected size
                drawn = setup.mechanism.sample(
                    len(setup.unit_rows), state.sampler.clone_state()
                ).numel()
                take_step(setup, state)
                values.append([spent["clipped_sum_over"] * batch / drawn, spent["restore"]])
            found["steps"][batch] = np.median(values[1:], axis=0).tolist()
        found["shapes"] = {name: list(p.shape) for name, p in setup.trained.items()}
        found["tokens"] = statistics.mean(len(row["input_ids"]) for row in setup.rows)
        for size in (10**3, 10**5, 10**6, 4 * 10**6, 10**7):
            found["exchanges"][size] = exchange(torch.ones(size))
        sums = {name: p.detach().clone() for name, p in setup.trained.items()}
        found["exchanges"]["model"] = exchange(torch.cat([t.flatten() for t in sums.values()]))
        found["hand out"] = least(lambda: processes.map_over_ranks(lambda some: some, sums))
        rank = processes.rank()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def exchange(tensor):
    return least(lambda: processes.broadcast(processes.reduce_to_rank0({"sum": tensor})))


def least(call):
    """Smallest wall time of several calls, in seconds."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def launch(processes, rounds):
    """Measurements of each of ``processes`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(processes),
                __file__,
                "--worker",
                folder,
                str(rounds),
            ],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]


def single_matrices(rounds):
    """CPU seconds of the restoration of one matrix with eight spikes, by shape."""
    generator, seconds = torch.Generator().manual_seed(0), []
    for m, n in SHAPES:
        spikes = torch.randn(m, 8, generator=generator) @ torch.randn(8, n, generator=generator)
        noisy = spikes + torch.randn(m, n, generator=generator)
        times = []
        for _ in range(rounds + 1):
            started = time.process_time()
            restore(noisy, 1.0)
            times.append(time.process_time() - started)
        seconds.append(statistics.median(times[1:]))
    return np.array(seconds)


def longest_share(shapes, count, cost):
    """Cost of the matrices of the busiest of ``count`` processes."""
    owner = processes.owners(shapes, count)
    loads = [0.0] * count
    for name, rank in owner.items():
        loads[rank] += cost(*shapes[name])
    return max(loads)


def extrapolate(clip, latency, transfer, restoring, shapes, cost):
    """Seconds of a step's parts, and of an unsplit restoration, for each number of devices.

    ``clip`` holds the seconds that do not shrink with the number of devices, and the seconds that
    do; ``restoring`` is the seconds per unit of cost; ``transfer`` is the seconds of sending all
    sums one way.
    """
    lines = []
    for count in DEVICES:
        several = count > 1
        lines.append(
            {
                "devices": count,
                "clip": clip[0] + clip[1] / count,
                "exchange": several * (latency + 2 * transfer),
                "restore": restoring * longest_share(shapes, count, cost),
                "hand out": several * (count * latency + transfer),
                "unsplit restore": restoring * longest_share(shapes, 1, cost),
            }
        )
    return lines


def show(title, lines):
    """Print a table; "split buys" is the time of a step with unsplit over split restoration."""
    print(
        f"\n{title}\n{'devices':>9}"
        + "".join(f"{part:>11}" for part in PARTS)
        + f"{'step':>11}{'unsplit restore':>17}{'split buys':>12}   longest part, and unsplit"
    )
    for line in lines:
        parts = {part: line[part] for part in PARTS}
        unsplit = {**parts, "restore": line["unsplit restore"], "hand out": 0.0}
        step = sum(parts.values())
        print(
            f"{line['devices']:9}"
            + "".join(f"{v:11.3g}" for v in (*parts.values(), step))
            + f"{line['unsplit restore']:17.3g}{sum(unsplit.values()) / step:11.2f}x   "
            + f"{max(parts, key=parts.get)}, {max(unsplit, key=unsplit.get)}"
        )


@dataclass(frozen=True)
class Fit:
    """The model of a step.

    Attributes:
        law: the cost of a matrix, a key of ``COSTS``.
        single: seconds per unit of cost of restoring single matrices.
        restoring: seconds per unit of cost of restoring in a step.
        fixed: seconds of clipping that do not depend on the number of rows.
        per_row: seconds of clipping per row.
        latency: seconds of a small exchange.
        transfer: seconds of sending all sums one way.
        shapes: shapes of the matrices by name.
        parameters: number of all trained parameters.
        tokens: mean number of tokens per row.
    """

    law: str
    single: float
    restoring: float
    fixed: float
    per_row: float
    latency: float
    transfer: float
    shapes: dict[str, tuple[int, int]]
    parameters: int
    tokens: float

    @property
    def cost(self):
        """Cost of a matrix (m, n) by the fitted law."""
        return COSTS[self.law]


def fit_model(one, two, rounds):
    """Fit the model to one process, to exchanges of two, and to single matrices."""
    singles, fits = single_matrices(rounds), {}
    for name, cost in COSTS.items():
        costs = np.array([cost(*shape) for shape in SHAPES], dtype=float)
        factor = float(np.exp(np.mean(np.log(singles / costs))))
        fits[name] = float(np.exp(np.abs(np.log(singles / costs / factor)).max())), factor
    law = min(fits, key=fits.get)
    print(
        "restoring single matrices: "
        + "; ".join(f"{name} fits to a factor of {worst:.2f}" for name, (worst, _) in fits.items())
    )
    shapes = {name: tuple(shape) for name, shape in one["shapes"].items() if len(shape) == 2}
    parameters = sum(math.prod(shape) for shape in one["shapes"].values())
    per_row, fixed = np.polyfit(
        [int(b) for b in one["steps"]], [seconds[0] for seconds in one["steps"].values()], 1
    ).tolist()
    restored = float(np.median([seconds[1] for seconds in one["steps"].values()]))
    exchanges = two[0]["exchanges"]
    sizes = {int(size): exchanges[size] for size in exchanges if size != "model"}
    per_byte = (sizes[10**7] - sizes[10**6]) / (4 * 9 * 10**6) / 2  # one way
    return Fit(
        law=law,
        single=fits[law][1],
        restoring=restored / longest_share(shapes, 1, COSTS[law]),
        fixed=fixed,
        per_row=per_row,
        latency=sizes[10**3],
        transfer=4 * parameters * per_byte,
        shapes=shapes,
        parameters=parameters,
        tokens=one["tokens"],
    )


def compare_model(fit, one, two):
    """Rows of (label, seconds by the model, measured seconds) for one process and for two."""
    rows, batch = BATCHES[-1], str(BATCHES[-1])
    return [
        ("clip, 1 process", fit.fixed + fit.per_row * rows, one["steps"][batch][0]),
        (
            "clip, 2 processes",
            fit.fixed + fit.per_row * rows / 2,
            max(r["steps"][batch][0] for r in two),
        ),
        (
            "restore, 1 process",
            fit.restoring * longest_share(fit.shapes, 1, fit.cost),
            one["steps"][batch][1],
        ),
        (
            "restore, 2 processes",
            fit.restoring * longest_share(fit.shapes, 2, fit.cost),
            max(statistics.median(s[1] for s in r["steps"].values()) for r in two),
        ),
        (
            f"exchange of {fit.parameters:,} floats",
            fit.latency + 2 * fit.transfer,
            two[0]["exchanges"]["model"],
        ),
        ("hand out", 2 * fit.latency + fit.transfer, two[0]["hand out"]),
    ]


def extrapolate_here(fit):
    """Print and return the steps of MiniLM on more devices, with a core as a device."""
    clip = fit.fixed, fit.per_row * BATCHES[-1]
    lines = extrapolate(clip, fit.latency, fit.transfer, fit.restoring, fit.shapes, fit.cost)
    show(f"MiniLM, batch {BATCHES[-1]}: EXTRAPOLATED from the above", lines)
    return lines


def extrapolate_to_gpus(fit):
    """Print and return the steps of a 4B model on ASSUMED GPUs, after its number of parameters."""
    parameters = sum(m * n for m, n in LARGE.values())
    flops = 6 * parameters * TOKENS * LARGE_BATCH
    # FLOP per unit of cost: its time here, at the FLOP/s that training reaches here
    weights = sum(math.prod(shape) for shape in fit.shapes.values())
    work = fit.single / (fit.per_row / (6 * weights * fit.tokens))
    lines = extrapolate(
        (0.0, flops / GPU["train"]),
        GPU["latency"],
        4 * parameters / GPU["bandwidth"],
        work / GPU["restore"],
        LARGE,
        fit.cost,
    )
    show(
        f"{parameters / 1e9:.1f}B parameters, batch {LARGE_BATCH} of {TOKENS} tokens: ASSUMED "
        f"GPU {GPU}",
        lines,
    )
    uneven = 512 * longest_share(LARGE, 512, fit.cost) / longest_share(LARGE, 1, fit.cost)
    print(
        f"\n{len(LARGE)} matrices over 512 devices: the longest share is {uneven:.1f} times an "
        "even one, since a matrix is not divided"
    )
    return parameters, lines


@styled
def draw(document):
    """Draw the parts of a step against devices, as measured here and for the assumed GPU."""
    figure, axes = new_figure(1, 2, width=FULL, height=2.8)
    for axis, key, mark in ((axes[0, 0], "here", "a"), (axes[0, 1], "assumed", "b")):
        lines = document[key]["lines"]
        devices = [line["devices"] for line in lines]
        for part, colour, style in (
            ("clip", BLACK, "-"),
            ("exchange", GREY, "-"),
            ("restore", RED, "-"),
            ("unsplit restore", RED, "--"),
            ("hand out", BLUE, "-"),
        ):
            shown = [(d, line[part]) for d, line in zip(devices, lines, strict=True) if line[part]]
            axis.plot(*zip(*shown, strict=True), style, color=colour, label=part)
        axis.set(xscale="log", yscale="log", xlabel="devices")
        axis.set_xticks(devices, [str(count) for count in devices])
        axis.minorticks_off()
        letter(axis, f"{mark}  {document[key]['title']}")
    axes[0, 0].set_ylabel("seconds of a step")
    measured = {row["figure"]: row["measured"] for row in document["rows"]}
    for count, name, colour in (
        (1, "clip, 1 process", BLACK),
        (2, "clip, 2 processes", BLACK),
        (2, "restore, 2 processes", RED),
        (2, "hand out", BLUE),
    ):
        axes[0, 0].plot(count, measured[name], "o", color=colour)
    axes[0, 0].plot([], [], "o", color=BLACK, label="measured")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def save(document, path):
    """Save the figure as PNG and PDF, whatever the suffix of ``path``."""
    artifacts.save_figure(draw(document), path.parent, path.stem)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 rounds instead of 7")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--figure", type=Path, help="also draw them, as PNG and PDF of this name")
    parser.add_argument("--redraw", action="store_true", help="draw --json, measure nothing")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if arguments.worker:
        measure(arguments.worker[0], int(arguments.worker[1]))
        return
    if arguments.redraw:
        save(json.loads(arguments.json.read_text()), arguments.figure)
        return
    rounds = 2 if arguments.quick else 7
    (one,) = launch(1, rounds)
    two = launch(2, rounds)
    fit = fit_model(one, two, rounds)
    rows = compare_model(fit, one, two)
    print(f"\nseconds a step, batch {BATCHES[-1]}{'':17}{'model':>10}{'measured':>10}{'ratio':>8}")
    for label, model, measured in rows:
        print(f"{label:40}{model:10.3f}{measured:10.3f}{measured / model:8.2f}")
    here, (parameters, assumed) = extrapolate_here(fit), extrapolate_to_gpus(fit)
    document = {
        "rows": [dict(zip(("figure", "model", "measured"), row, strict=True)) for row in rows],
        "here": {"title": f"MiniLM, batch {BATCHES[-1]}, CPU cores", "lines": here},
        "assumed": {
            "title": f"{parameters / 1e9:.1f}B parameters, ASSUMED GPUs",
            "gpu": GPU,
            "batch": LARGE_BATCH,
            "tokens": TOKENS,
            "lines": assumed,
        },
        "rounds": rounds,
        "law": fit.law,
        "provenance": artifacts.provenance(seed=0, device="cpu"),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.figure:
        save(document, arguments.figure)


if __name__ == "__main__":
    main()
