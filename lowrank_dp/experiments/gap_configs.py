"""Configurations of the experiment on the gap in steps, and trials."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lowrank_dp.experiments.arms import Protocol, base_config
from lowrank_dp.train import TrainConfig

PARTS: dict[str, dict[str, Any]] = {
    "last block": {"train_layers": 1},
    "all": {"train_layers": None},
}


@dataclass(frozen=True)
class Config(Protocol):
    """Settings of the experiment, in addition to the fields of :class:`Protocol`.

    Attributes:
        base: configuration of all runs. Epsilon, batch size, trained layers, seed, learning rate
            and holdout are replaced.
        epsilons: privacy budgets of the runs with noise. Noise-free runs do not depend on them.
        batch_sizes: expected batch sizes.
        parts: trained parts, names in ``PARTS``.
    """

    base: TrainConfig
    epsilons: tuple[float, ...] = (0.5, 1.0, 3.0, 8.0)
    batch_sizes: tuple[int, ...] = (256, 1024)
    parts: tuple[str, ...] = tuple(PARTS)


_SST2 = base_config(model="minilm", task="sst2", epsilon=8.0, max_length=64, steps=30)

# the settings in three parts, split by their computing time
SST2 = Config(_SST2, batch_sizes=(256,), parts=("last block",))
SST2_LARGE_BATCH = Config(_SST2, batch_sizes=(1024,), parts=("last block",))
# all 38 matrices, a minute per run on a CPU; bfloat16 and small micro-batches, to shorten a step
SST2_ALL_LAYERS = Config(
    replace(_SST2, steps=24, micro_batch_size=64, precision="bf16"),
    epsilons=(1.0, 8.0),
    batch_sizes=(256,),
    parts=("all",),
)
# the settings of SST2_LARGE_BATCH in which other experiments train, too
SST2_LARGE_BATCH_EPS8 = replace(SST2_LARGE_BATCH, epsilons=(8.0,))
# 1,000 of the 4,672 validation examples, so that an evaluation takes no longer than a step
E2E = Config(
    base_config(
        model="tiny-llama", task="e2e", epsilon=8.0, batch_size=512, steps=24, eval_examples=1000
    ),
    epsilons=(8.0,),
    batch_sizes=(512,),
    parts=("all",),
    score="loss",
    tuning_holdout=300,
)
# trial of a few minutes on generated text, with a model that needs no download
SMALL = Config(
    base_config(model="tiny", task="generated", epsilon=8.0, steps=12),
    epsilons=(1.0, 8.0),
    batch_sizes=(64,),
    parts=("last block",),
    num_seeds=2,
    tuning_holdout=200,
)
