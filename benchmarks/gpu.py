"""Time and accuracy of restoration on a GPU, and its share of a DP training step.

    python benchmarks/gpu.py [--quick] [--json FILE]

The matrices have the shapes of RoBERTa-base and of a 4B model, with eight spikes in unit noise.
Each row compares the fast path over all layers of one shape, as one batch, with one SVD and rebuild
per layer (timed on some of the layers); the fast path in float32 with TF32 products, and the
distance of their results; and the alignment of both with the exact path. Then follows a step of DP
training of the packaged MiniLM and of RoBERTa-base (with random weights): the clipped sum in
float32, in bf16 and, for MiniLM, in bf16 on a compiled graph; peak memory; and the share of the
step that restoration takes. Last, the same sum of RoBERTa-base sharded by FSDP2 over one process
with NCCL. Times are medians over rounds in which the methods take turns, between synchronisations.
``--device cpu`` runs the same code on small shapes.
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
from torch import distributed as dist
from transformers import RobertaConfig, RobertaForSequenceClassification

from lowrank_dp.artifacts import provenance
from lowrank_dp.grads.clipping import clipped_sum, clipped_sum_over
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.models import load_model
from lowrank_dp.models.trainable import choose_trainable
from lowrank_dp.restore import restore, restore_gradients
from lowrank_dp.spectrum import alignment
from lowrank_dp.train.layout import Sharded, shard

# (m, n) -> layers of that shape, and layers of which an SVD is timed
SHAPES = {
    (768, 768): (48, 4),
    (768, 3072): (24, 4),
    (2560, 4096): (36, 1),
    (2560, 9728): (12, 1),
}
SMALL = {(256, 384): (4, 2)}
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


def loaded(name: str, device: str) -> Any:
    """The packaged model of that name, or RoBERTa-base's architecture with random weights."""
    if name != "RoBERTa-base":
        return load_model(name, num_labels=2, device=device)[0]
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig()).to(device).eval()
    choose_trainable(model, False, None)
    return model


def text(device: str) -> dict[str, Tensor]:
    """A batch of random tokens with labels: 256 rows of 64 tokens, on a CPU 16 of 16."""
    rows, length = (16, 16) if device == "cpu" else (256, 64)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(5, 500, (rows, length), generator=generator),
        "labels": torch.randint(0, 2, (rows,), generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def step(name: str, device: str, rounds: int) -> dict[str, float | None]:
    """Seconds of a clipped sum by each method, of restoring the sum, and GB of peak memory."""
    model, batch = loaded(name, device), text(device)
    ways: dict[str, dict[str, Any]] = {"float32": {}, "bf16": {"autocast_dtype": torch.bfloat16}}
    if name != "RoBERTa-base":  # compiling its twelve blocks would take minutes
        ways["bf16, compiled"] = {**ways["bf16"], "backend": "compiled"}

    def clip(way: str) -> dict[str, Tensor]:
        return clipped_sum(model, batch, 1.0, **ways[way])[0]

    memory = {f"{way}, GB": peak(lambda way=way: clip(way), device) for way in ways}
    mechanism = GaussianMechanism(0.6, 1.0, 0.01)
    noisy = mechanism.add_noise(clip("float32"), torch.Generator(device).manual_seed(0))
    works: dict[str, Callable[[Any], Any]] = {
        **{way: lambda _, way=way: clip(way) for way in ways},
        "restore": lambda _: restore_gradients(noisy, mechanism.noise_std),
    }
    times = [
        {way: seconds(work, torch.empty(0), device) for way, work in works.items()}
        for _ in range(rounds)
    ]
    return {way: statistics.median(turn[way] for turn in times) for way in works} | memory


def peak(function: Callable[[], Any], device: str) -> float | None:
    """GB that ``function`` takes at its peak on the GPU, weights included; None on a CPU."""
    function()  # what the first call keeps, such as a compiled graph, counts as weights
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / 1e9


def gigabytes(value: float | None) -> str:
    """A number of GB in words."""
    return "memory not measured" if value is None else f"{value:.2f} GB"


def sharded(name: str, device: str, rounds: int) -> dict[str, float | None]:
    """Seconds and GB of the clipped sum of a model that FSDP2 shards over this one process."""
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, batch = loaded(name, "cpu"), text(device)
        shard(model, device)
        layout = Sharded({n: p for n, p in model.named_parameters() if p.requires_grad})

        def clip() -> Any:
            return clipped_sum_over(model, [batch], 1.0, check_rows=False, reduce=layout.reduce)[0]

        memory = peak(clip, device)
        times = [seconds(lambda _: clip(), torch.empty(0), device) for _ in range(rounds)]
        return {"float32": statistics.median(times), "float32, GB": memory}
    finally:
        dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="3 rounds instead of 9, and no MiniLM, whose graph takes a minute to compile",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    device = arguments.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("not run: benchmarks/gpu.py needs CUDA")
        return 0
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))  # whose name, memory and clock are read
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    print(f"torch {torch.__version__}, {name}")
    rows = []
    rounds = 3 if arguments.quick else 9
    for shape, (count, few) in (SMALL if device == "cpu" else SHAPES).items():
        noisy = layers(shape, count, device)
        ways = {exact: noisy[:few], fast: noisy, fast_tf32: noisy}
        truth, found, rough = (way(matrices) for way, matrices in ways.items())
        times = [
            [seconds(way, matrices, device) for way, matrices in ways.items()]
            for _ in range(rounds)
        ]
        slow, quick, quicker = (statistics.median(column) for column in zip(*times, strict=True))
        slow *= count / few
        aligned = [
            min(alignment(a, b) for a, b in zip(one[:few], truth, strict=True))
            for one in (found, rough)
        ]
        rows.append(
            {
                "shape": list(shape),
                "layers": count,
                "svd_timed_layers": few,
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
    models = ("tiny",) if device == "cpu" else ("minilm", "RoBERTa-base")[arguments.quick :]
    taken = {model: step(model, device, rounds) for model in models}
    for model, times in taken.items():
        for way in (w for w in ("float32", "bf16", "bf16, compiled") if w in times):
            memory = gigabytes(times[f"{way}, GB"])
            share = times["restore"] / (times["restore"] + times[way])
            print(
                f"{model}, clipped sum, {way}: {times[way]:.4f} s "
                f"({times['float32'] / times[way]:.2f}x), {memory}; restoring "
                f"{times['restore']:.4f} s, {share:.1%} of the two"
            )
    taken["sharded"] = sharded(models[-1], device, rounds)
    print(
        f"{models[-1]}, sharded by FSDP2 over one process: {taken['sharded']['float32']:.4f} s, "
        f"{gigabytes(taken['sharded']['float32, GB'])}"
    )
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {"rows": rows, "step": taken, "provenance": provenance(seed=0, device=device)},
                indent=1,
            )
            + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
