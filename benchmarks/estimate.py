"""Estimated time and memory of the runs in paper_artifacts/configs, by arithmetic.

    python benchmarks/estimate.py

NOT MEASURED: there was no GPU. A training step takes 6 operations per parameter and token with full
fine-tuning and 4 with LoRA (no gradients of the frozen weights), times the cost of book-keeping
relative to a plain step (benchmarks/engine.py, on a CPU), at an assumed share of a GPU's bf16 peak.
Memory holds the float32 weights; for each trained parameter the clipped sum, the part of a
micro-batch, the noisy sum, the running mean and Adam's second moment; the activations kept for the
backward pass; and the logits of a micro-batch. Evaluation and generation are not included.
"""

from __future__ import annotations

import json
from pathlib import Path

from lowrank_dp.train import TrainConfig

FOLDER = Path(__file__).parent.parent / "paper_artifacts" / "configs"
PEAK, SHARE = 989e12, 0.25  # H100, dense bf16; assumed share
OVERHEAD = {"full": 1.25, "lora": 1.05, "lora-frozen-a": 1.05}  # benchmarks/engine.py, on a CPU
TOKENS = {"sst2": 13, "mnli": 40, "e2e": 59, "dart": 79}  # mean per row, by MiniLM or SmolLM2
# blocks, width, inner width, width of keys and values, of queries, matrices in the MLP, vocabulary
SHAPES = {
    "FacebookAI/roberta-base": (12, 768, 3072, 768, 768, 2, 50265),
    "FacebookAI/roberta-large": (24, 1024, 4096, 1024, 1024, 2, 50265),
    "Qwen/Qwen3-0.6B": (28, 1024, 3072, 1024, 2048, 3, 151936),
    "Qwen/Qwen3-4B": (36, 2560, 9728, 1024, 4096, 3, 151936),
    "meta-llama/Llama-3.2-1B": (16, 2048, 8192, 512, 2048, 3, 128256),
    "meta-llama/Llama-3.2-3B": (28, 3072, 8192, 1024, 3072, 3, 128256),
}


def estimate(config: TrainConfig) -> tuple[float, float, float, float]:
    """All and trained parameters in billions, minutes, and GiB of memory."""
    blocks, width, inner, kv, q, mlp, vocabulary = SHAPES[config.model]
    matrices = [(q, width), (kv, width), (kv, width), (width, q), *[(inner, width)] * mlp]
    body = blocks * sum(m * n for m, n in matrices)
    total = body + vocabulary * width
    trained = (
        body
        if config.method == "full"
        else blocks
        * config.rank
        * sum((m + n if config.method == "lora" else m) for m, n in matrices)
    )
    tokens = TOKENS[config.task] * config.batch_size * config.steps
    generates = config.task in ("e2e", "dart")
    operations = (6 if config.method == "full" else 4) * (body + generates * vocabulary * width)
    minutes = operations * tokens * OVERHEAD[config.method] / (PEAK * SHARE) / 60
    rows = config.micro_batch_size * TOKENS[config.task] * 1.5  # padding
    kept = rows * blocks * (2 * (4 * width + 2 * q + 2 * kv + mlp * inner))
    logits = rows * vocabulary * 4 * 2 if generates else 0
    return (total / 1e9, trained / 1e9, minutes, (4 * total + 20 * trained + kept + logits) / 2**30)


def main() -> None:
    print("| configuration | parameters, trained | H100 minutes (estimate) | GiB (estimate) |")
    print("|---|---|---|---|")
    for path in sorted(FOLDER.glob("*.json")):
        total, trained, minutes, memory = estimate(
            TrainConfig.from_json(json.loads(path.read_text()))
        )
        print(f"| `{path.name}` | {total:.2f} B, {trained:.3f} B | {minutes:.1f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
