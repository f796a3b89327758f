"""Arms and configurations of the sample-efficiency experiment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lowrank_dp.train import TrainConfig

_MEAN = {"momentum_beta": 0.9}
_ZEROED = {"below": "zero"}
_OPTIMAL = {"scheme": "optimal"}

# arm -> fields that differ from the base configuration, whose optimizer is Adam
ARMS: dict[str, dict[str, Any]] = {
    "DP-Adam": {},
    "denoise": {"scheme": "denoise"},
    "optimal, zeroed": {**_OPTIMAL, **_ZEROED},
    # filter as in DOPPLER: one pole at 0.9, a zero at the highest frequency, no restoration
    "low-pass filter": {"filter_b": (0.05, 0.05), "filter_a": (-0.9,)},
    "momentum + optimal": {**_OPTIMAL, **_MEAN},
    "momentum + optimal, zeroed": {**_OPTIMAL, **_ZEROED, **_MEAN},
    "DP-LoRA": {"method": "lora"},
    "DP-LoRA, frozen A": {"method": "lora-frozen-a"},
    "DP-LoRA, momentum + optimal, zeroed": {"method": "lora", **_OPTIMAL, **_ZEROED, **_MEAN},
}
BASELINE = "DP-Adam"
SHARES = (0.9, 0.95)


@dataclass(frozen=True)
class Config:
    """Runs of the experiment.

    Attributes:
        base: configuration that all arms share; its seed and learning rate are replaced.
        arms: names in ``ARMS``.
        learning_rates: grid of learning rates, the same for every arm.
        num_seeds: number of reported seeds, counted from 0; 2 or more.
        tuning_seed: seed of the tuning runs; not one of the reported seeds.
        tuning_holdout: training units held out, on which the learning rate is chosen.
        score: metric of the curves, a name in ``evaluation.HIGHER_IS_BETTER``.
        num_workers: number of concurrent runs; None means one per CPU core.
    """

    base: TrainConfig
    arms: tuple[str, ...] = tuple(ARMS)
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    num_seeds: int = 3
    tuning_seed: int = 1000
    tuning_holdout: int = 1000
    score: str = "accuracy"
    num_workers: int | None = None


SST2 = Config(
    base=TrainConfig(
        model="minilm",
        task="sst2",
        epsilon=8.0,
        delta=1e-5,
        batch_size=1024,
        steps=30,
        train_layers=1,
        max_length=64,
        eval_every=3,
    ),
    arms=(
        "DP-Adam",
        "denoise",
        "optimal, zeroed",
        "low-pass filter",
        "momentum + optimal, zeroed",
        "DP-LoRA",
        "DP-LoRA, frozen A",
    ),
    learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),
)

MNLI = Config(
    base=TrainConfig(
        model="minilm",
        task="mnli",
        epsilon=8.0,
        delta=1e-5,
        batch_size=1024,
        steps=21,
        train_layers=1,
        max_length=64,
        eval_every=3,
    ),
    arms=("DP-Adam", "denoise", "momentum + optimal, zeroed", "DP-LoRA"),
    learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
)

E2E = Config(
    base=TrainConfig(
        model="tiny-llama",
        task="e2e",
        epsilon=8.0,
        delta=1e-5,
        batch_size=512,
        steps=24,
        eval_every=3,
        eval_examples=300,
    ),
    arms=(
        "DP-Adam",
        "denoise",
        "low-pass filter",
        "momentum + optimal, zeroed",
        "DP-LoRA",
        "DP-LoRA, frozen A",
    ),
    learning_rates=(3e-3, 1e-2, 3e-2),
    score="loss",
    tuning_holdout=300,
)

# micro-batches of 8: each token has logits for 49,152 words
SMOLLM2 = Config(
    base=TrainConfig(
        model="smollm2",
        task="e2e",
        epsilon=8.0,
        delta=1e-5,
        batch_size=128,
        steps=8,
        train_layers=2,
        eval_every=2,
        eval_examples=64,
        generate=False,
        micro_batch_size=8,
    ),
    arms=(
        "DP-Adam",
        "denoise",
        "momentum + optimal, zeroed",
        "DP-LoRA",
        "DP-LoRA, momentum + optimal, zeroed",
    ),
    learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),
    score="loss",
    tuning_holdout=64,
)

# trials of one minute on generated text, with models that need no download
SMALL = Config(
    base=TrainConfig(
        model="tiny",
        task="generated",
        epsilon=8.0,
        delta=1e-5,
        batch_size=512,
        steps=24,
        eval_every=3,
    ),
    arms=("DP-Adam", "momentum + optimal, zeroed", "DP-LoRA"),
    learning_rates=(3e-3, 1e-2),
    num_seeds=2,
    tuning_holdout=300,
)
SMALL_TABLES = replace(
    SMALL,
    base=TrainConfig(
        model="tiny-llama",
        task="generated-table",
        epsilon=8.0,
        delta=1e-5,
        batch_size=128,
        steps=12,
        eval_every=3,
        eval_examples=60,
    ),
    score="loss",
    tuning_holdout=100,
)
