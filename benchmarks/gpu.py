"""Time and accuracy of restoration on a GPU, and its share of a DP training step.

    python benchmarks/gpu.py [--quick] [--json FILE]

NOT YET RUN on a GPU. The matrices have the shapes of RoBERTa-base and of a 4B model, with eight
spikes in unit noise. Each row compares the fast path over all layers of one shape, as one batch,
with one SVD and rebuild per layer; the fast path in float32 with TF32 products, and the distance of
their results; and the alignment of both with the exact path. Then follows a step of DP training of
the packaged MiniLM: its clipped sum in float32, in bf16 and in bf16 on a compiled graph, and the
share of the step that restoration takes. Times are medians over rounds in which the methods take
turns, between synchronisations. ``--device cpu`` runs the same code on small shapes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_dp.grads.clipping import clipped_sum
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.models import load_model
from lowrank_dp.restore import restore, restore_gradients
from lowrank_dp.spectrum import alignment

# (m, n) -> layers of that shape
SHAPES = {(768, 768): 48, (768, 3072): 24, (2560, 4096): 36, (2560, 9728): 12}
SMALL = {(256, 384): 4}
SPIKES = (6.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.2)  # in units of the transition


def layers(shape: tuple[int, int], count: int, device: str) -> Tensor:
    """Matrices (count, m, n) of rank-8 signal in unit noise."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    u, v = (torch.linalg.qr(draw(count, side, len(SPIKES)))[0] for side in shape)
    s = torch.tensor(SPIKES, device=device) * math.prod(shape) ** 0.25
    return (u * s) @ v.mT + draw(count, *shape)


def seconds(function: Callable[[Tensor], Any], noisy: Tensor, device: str) -> float:
    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    function(noisy)
    wait()
    return time.perf_counter() - start


def precision(tf32: bool) -> None:
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def fast(noisy: Tensor, tf32: bool = False) -> Tensor:
    precision(tf32)
    try:
        return restore(noisy, 1.0)
    finally:
        precision(False)


def fast_tf32(noisy: Tensor) -> Tensor:
    return fast(noisy, tf32=True)


def exact(noisy: Tensor) -> Tensor:
    return torch.stack([restore(matrix, 1.0, method="exact") for matrix in noisy])


def step(device: str, rounds: int) -> dict[str, float]:
    """Seconds of a clipped sum by each method, and seconds of restoring the sum."""
    rows, length = (16, 16) if device == "cpu" else (256, 64)
    model, _ = load_model("tiny" if device == "cpu" else "minilm", num_labels=2, device=device)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(5, 500, (rows, length), generator=generator),
        "labels": torch.randint(0, 2, (rows,), generator=generator),
    }
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    ways = {
        "float32": {},
        "bf16": {"autocast_dtype": torch.bfloat16},
        "bf16, compiled": {"autocast_dtype": torch.bfloat16, "backend": "compiled"},
    }

    def clip(way: str) -> dict[str, Tensor]:
        return clipped_sum(model.eval(), batch, 1.0, **ways[way])[0]  # type: ignore[arg-type]

    sums = {way: clip(way) for way in ways}["float32"]
    mechanism = GaussianMechanism(0.6, 1.0, 0.01)
    noisy = mechanism.add_noise(sums, torch.Generator(device).manual_seed(0))
    works: dict[str, Callable[[Any], Any]] = {
        **{way: lambda _, way=way: clip(way) for way in ways},
        "restore": lambda _: restore_gradients(noisy, mechanism.noise_std),
    }
    times = [
        {name: seconds(work, torch.empty(0), device) for name, work in works.items()}
        for _ in range(rounds)
    ]
    return {name: statistics.median(turn[name] for turn in times) for name in works}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    device = arguments.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("not run: benchmarks/gpu.py needs CUDA")
        return 0
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    print(f"torch {torch.__version__}, {name}")
    rows = []
    for shape, count in (SMALL if device == "cpu" else SHAPES).items():
        noisy = layers(shape, count, device)
        ways = exact, fast, fast_tf32
        truth, found, rough = (way(noisy) for way in ways)
        times = [
            [seconds(way, noisy, device) for way in ways]
            for _ in range(3 if arguments.quick else 9)
        ]
        slow, quick, quicker = (statistics.median(column) for column in zip(*times, strict=True))
        aligned = [
            min(alignment(a, b) for a, b in zip(one, truth, strict=True)) for one in (found, rough)
        ]
        rows.append(
            {
                "shape": list(shape),
                "layers": count,
                "svd_seconds": slow,
                "fast_seconds": quick,
                "tf32_seconds": quicker,
                "svd_over_fast": slow / quick,
                "fast_over_tf32": quick / quicker,
                "tf32_relative_error": float((rough - found).norm() / found.norm()),
                "least_alignment": aligned[0],
                "least_alignment_tf32": aligned[1],
            }
        )
        print(
            f"{count} layers of {shape[0]} x {shape[1]}: SVD {slow:.4f} s, fast {quick:.4f} s "
            f"({slow / quick:.1f}x), TF32 {quicker:.4f} s ({quick / quicker:.2f}x, relative "
            f"error {rows[-1]['tf32_relative_error']:.1e}); least alignment with exact "
            f"{aligned[0]:.4f}, TF32 {aligned[1]:.4f}"
        )
    taken = step(device, 3 if arguments.quick else 9)
    for way in ("float32", "bf16", "bf16, compiled"):
        share = taken["restore"] / (taken["restore"] + taken[way])
        print(
            f"clipped sum, {way}: {taken[way]:.4f} s ({taken['float32'] / taken[way]:.2f}x); "
            f"restoring {taken['restore']:.4f} s, {share:.1%} of the two"
        )
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {"torch": torch.__version__, "device": name, "rows": rows, "step": taken}, indent=1
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
