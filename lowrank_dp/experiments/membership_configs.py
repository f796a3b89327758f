"""Configurations of the experiment on membership inference: its arms, tasks and trials."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lowrank_dp.train import TrainConfig

DP = {"non_private": False, "epsilon": 8.0}
RESTORED = {"scheme": "optimal", "below": "zero", "momentum_beta": 0.9}


def arms(
    ranks: tuple[int, ...], frozen_ranks: tuple[int, ...], with_dp: bool = True
) -> dict[str, dict[str, Any]]:
    """Return the fields of each arm that differ from the base configuration, by name."""
    lora = {f"LoRA r={rank}": {"method": "lora", "rank": rank} for rank in ranks}
    frozen = {
        f"frozen A r={rank}": {"method": "lora-frozen-a", "rank": rank} for rank in frozen_ranks
    }
    private: dict[str, dict[str, Any]] = {
        "full, DP": DP,
        "full, DP restored": {**DP, **RESTORED},
    }
    return {"full": {}, **lora, **frozen, **(private if with_dp else {})}


@dataclass(frozen=True)
class Config:
    """Runs and attack of the experiment.

    The learning rates were chosen with another seed, so that the methods' ranges of training loss
    overlap.

    Attributes:
        base: configuration that all arms share; its method, rank, steps, learning rate and seed
            are replaced.
        ranks: ranks of LoRA.
        frozen_ranks: ranks of LoRA with a frozen A.
        steps: numbers of steps, in rising order, each a separate run.
        full_learning_rate: learning rate of full fine-tuning.
        lora_learning_rate: learning rate of LoRA.
        frozen_learning_rate: learning rate of LoRA with a frozen A.
        num_seeds: number of seeds, counted from 0, each with its own membership bits; 2 or more.
        attack: name of the primary attack.
        num_workers: number of concurrent runs; None means one per CPU core, and 4 on a GPU.
        with_dp: whether full fine-tuning with DP, plain and restored, is among the arms.
    """

    base: TrainConfig
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    frozen_ranks: tuple[int, ...] = (1, 8, 64)
    steps: tuple[int, ...] = (20, 40, 120)
    full_learning_rate: float = 1e-4
    lora_learning_rate: float = 2e-3
    frozen_learning_rate: float = 5e-3
    num_seeds: int = 3
    attack: str = "base"
    num_workers: int | None = None
    with_dp: bool = True


SST2 = Config(
    base=TrainConfig(
        model="minilm",
        task="sst2",
        non_private=True,
        delta=1e-3,
        batch_size=32,
        max_examples=1000,
        membership="bernoulli",
        max_length=64,
        eval_every=1000,
        snapshot_every=1000,
    )
)

E2E = Config(
    base=TrainConfig(
        model="tiny-llama",
        task="e2e",
        non_private=True,
        delta=1e-3,
        unit="group",
        batch_size=64,
        max_examples=2000,
        membership="bernoulli",
        eval_every=1000,
        snapshot_every=1000,
        generate=False,
    ),
    steps=(10, 40, 120),
    full_learning_rate=1e-3,
    lora_learning_rate=1e-2,
    frozen_learning_rate=5e-2,
)

# the last two blocks of a language model of 270 M parameters; micro-batches of 8, since each target
# has 262,144 logits; bfloat16, to shorten the matrix products
GEMMA = Config(
    base=replace(
        E2E.base,
        model="gemma3-270m",
        train_layers=2,
        batch_size=32,
        precision="bf16",
        prefix_dtype="bf16",
        micro_batch_size=8,
        eval_examples=200,
    ),
    ranks=(8,),
    frozen_ranks=(),
    steps=(20, 60),
    full_learning_rate=1e-4,
    lora_learning_rate=3e-3,
    with_dp=False,
)

# trials of one minute on generated text, with models that need no download
SMALL = Config(
    base=replace(SST2.base, model="tiny", task="generated", max_examples=400, max_length=None),
    ranks=(1, 8),
    frozen_ranks=(),
    steps=(15, 45),
    full_learning_rate=1e-3,
    lora_learning_rate=1e-2,
    num_seeds=2,
)
SMALL_TABLES = replace(
    SMALL,
    base=replace(E2E.base, task="generated-table", max_examples=400, batch_size=32),
    ranks=(8,),
    steps=(10, 30),
)
