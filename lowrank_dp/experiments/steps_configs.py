"""Configurations of the experiment on steps to a target: the published settings, and trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lowrank_dp.experiments import gap_configs
from lowrank_dp.experiments.arms import ARMS, PLAIN, Protocol, base_config
from lowrank_dp.train import TrainConfig

# versions 3 and 1 of arXiv 2510.01137, the optimal shrinker, and the shrinker on a running mean
RESTORED = ("partial, 0.5", "denoise", "optimal, zeroed", "mean, optimal, zeroed")
PRECONDITIONED = (
    "DP-SGD, vectors frozen",
    "preconditioned, generated text",
    "preconditioned, CoLA",
    "preconditioned, vectors trained",
    "preconditioned, noisy sums",
)
OTHERS = (
    "partial, 0.5",
    "partial, 0.9",
    "denoise",
    "optimal, zeroed",
    "mean, optimal, zeroed",
    "DP-AdamBC",
    "DP-Muon",
)
# arms of the literature that SST2_GAP does not train
REMAINING = (
    "DP-SGD, torch's momentum",
    "partial, power law, 0.5",
    "partial, power law, 0.9",
    "optimal",
    "DOPPLER",
    "DiSK",
    "mean, denoise",
    "mean, optimal",
    "mean, polar, zeroed",
    "DP-MuonBC",
    "DP-LoRA",
    "DP-LoRA, frozen A",
    "DP-LoRA, mean, optimal, zeroed",
)


@dataclass(frozen=True)
class Config(Protocol):
    """Arms of the experiment, in addition to the fields of :class:`Protocol`.

    Attributes:
        base: configuration that all arms share. Seed, learning rate and holdout are replaced.
        arms: names in ``arms.ARMS``. The names must include both baselines and both ceilings.
        starts: good learning rates of another task by arm, > 0. Each begins a finer grid, which
            shortens the tuning, in place of the arm's own start.
    """

    base: TrainConfig
    arms: tuple[str, ...] = (*PLAIN, *RESTORED)
    starts: Mapping[str, float] = field(default_factory=dict)

    def start(self, arm: str) -> float:
        """Return the middle of an arm's first grid of learning rates."""
        return self.starts.get(arm, ARMS[arm].start)


_SST2 = gap_configs.SST2.base

# setting with a small gap: noise-free Adam needs four fifths of DP-Adam's steps
SST2 = Config(
    replace(_SST2, batch_size=1024, train_layers=1),
    arms=(*PLAIN, *RESTORED, "preconditioned, CoLA"),
)
# setting with a large gap: noise-free Adam needs less than half of DP-Adam's steps
SST2_GAP = Config(
    replace(_SST2, batch_size=256, epsilon=1.0, train_layers=1),
    arms=(*PLAIN, *PRECONDITIONED, *OTHERS),
)
# the remaining arms in the setting SST2_GAP; bfloat16, to shorten the matrix products
SST2_ARMS = Config(
    replace(SST2_GAP.base, precision="bf16", prefix_dtype="bf16"),
    arms=(*PLAIN, *REMAINING),
)
# the setting SST2_GAP with less noise
SST2_EPS8 = replace(
    SST2_GAP, base=replace(SST2_GAP.base, epsilon=8.0), arms=(*PLAIN, *PRECONDITIONED[:3])
)
# the setting SST2_ARMS with less noise, for every arm with a result in one setting only
SST2_ARMS_EPS8 = replace(
    SST2_ARMS,
    base=replace(SST2_ARMS.base, epsilon=8.0),
    arms=(*PLAIN, *REMAINING, "partial, 0.9", "DP-AdamBC", "DP-Muon", *PRECONDITIONED[3:]),
)
# all 38 matrices of MiniLM, as in gap_configs.SST2_ALL_LAYERS
SST2_ALL = Config(
    replace(gap_configs.SST2_ALL_LAYERS.base, batch_size=256),
    arms=(*PLAIN, "partial, 0.5", "denoise"),
)
# the last two blocks of a model of RoBERTa-base's sizes; bfloat16, to shorten the matrix products
SST2_MPNET = Config(
    replace(
        _SST2,
        model="mpnet-base",
        batch_size=512,
        steps=12,
        train_layers=2,
        precision="bf16",
        prefix_dtype="bf16",
    ),
    arms=(*PLAIN, "partial, 0.5", "denoise", "mean, optimal, zeroed"),
)
# the last two blocks of MPNet on CoLA. In trials without noise, clipping norms of 1 and 3 kept the
# model at the majority class, and 5 and 10 raised its loss after 20 steps, since clipping shortens
# the longer gradients of the rare class; with 30 it learned
COLA_MPNET = Config(
    base_config(
        model="mpnet-base",
        task="cola",
        epsilon=8.0,
        max_grad_norm=30.0,
        max_length=64,
        batch_size=256,
        steps=40,
        train_layers=2,
        eval_examples=400,
    ),
    arms=PLAIN,
    starts={
        "DP-Adam": 0.00178,
        "DP-SGD": 0.0949,
        "noise-free Adam (NON-PRIVATE)": 0.000316,
        "noise-free SGD (NON-PRIVATE)": 0.3,
    },
    score="loss",
    tuning_holdout=400,
)
MNLI = Config(
    base_config(
        model="minilm",
        task="mnli",
        epsilon=8.0,
        max_length=64,
        batch_size=1024,
        steps=21,
        train_layers=1,
        eval_examples=10_000,
    ),
    arms=(*PLAIN, "denoise", "mean, optimal, zeroed", "DP-LoRA"),
)
E2E = Config(
    gap_configs.E2E.base,
    arms=(
        *PLAIN,
        "partial, 0.5",
        "denoise",
        "mean, optimal, zeroed",
        "preconditioned, generated text",
    ),
    score=gap_configs.E2E.score,
    tuning_holdout=gap_configs.E2E.tuning_holdout,
)
# the optimal shrinker, and the control of preconditioning, in the setting E2E
E2E_ARMS = replace(E2E, arms=(*PLAIN, "optimal, zeroed", "DP-SGD, vectors frozen"))
# micro-batches of 8, and few validation examples, since each target has 49,152 logits; bfloat16,
# to shorten the matrix products, which take most of a step
SMOLLM2 = Config(
    base_config(
        model="smollm2",
        task="e2e",
        epsilon=8.0,
        batch_size=128,
        steps=12,
        train_layers=2,
        eval_examples=64,
        micro_batch_size=8,
        precision="bf16",
        prefix_dtype="bf16",
    ),
    arms=(*PLAIN, "partial, 0.5", "denoise", "mean, optimal, zeroed"),
    score="loss",
    tuning_holdout=64,
)
# DART's own validation split serves as the train split, and its test split is evaluated; smaller
# batches and fewer steps than SMOLLM2, in float32, for a CPU without bfloat16 instructions
SMOLLM2_DART = Config(
    replace(
        SMOLLM2.base,
        task="dart-validation",
        batch_size=48,
        steps=8,
        eval_examples=32,
        micro_batch_size=16,
        precision="float32",
        prefix_dtype="float32",
    ),
    arms=(*PLAIN, "partial, 0.5", "denoise", "mean, optimal, zeroed"),
    # the learning rates that SMOLLM2 chose on E2E; for two arms, that of DP-Adam on DART
    starts={
        "DP-Adam": 0.0031623,
        "partial, 0.5": 0.0031623,
        "denoise": 0.0056234,
        "mean, optimal, zeroed": 0.0056234,
        "DP-SGD": 0.16870,
        "noise-free Adam (NON-PRIVATE)": 0.001,
        "noise-free SGD (NON-PRIVATE)": 0.16870,
    },
    score="loss",
    tuning_holdout=32,
)
# the last two of 18 blocks of Gemma 3 270M, on a part of E2E; batches and steps as on DART, since
# each target has 262,144 logits, which take most of a run's time
GEMMA = Config(
    replace(SMOLLM2_DART.base, model="gemma3-270m", task="e2e", max_examples=4_000, generate=True),
    arms=(*PLAIN, "partial, 0.5"),
    # the learning rates that SMOLLM2_DART chose; lower for DP-Adam, whose loss rose at .003 in a
    # trial, and for partial restoration
    starts={
        "DP-Adam": 0.00178,
        "partial, 0.5": 0.00178,
        "DP-SGD": 0.0949,
        "noise-free Adam (NON-PRIVATE)": 0.001,
        "noise-free SGD (NON-PRIVATE)": 0.0949,
    },
    score="loss",
    tuning_holdout=32,
)

# trials of a few minutes on generated text, with models that need no download
SMALL = Config(
    base_config(model="tiny", task="generated", epsilon=2.0, batch_size=128, steps=12),
    arms=(*PLAIN, "mean, optimal, zeroed"),
    num_seeds=2,
    tuning_holdout=200,
)
SMALL_TABLES = Config(
    base_config(
        model="tiny-llama",
        task="generated-table",
        epsilon=8.0,
        batch_size=64,
        steps=8,
        eval_examples=60,
    ),
    arms=(*PLAIN, "denoise"),
    num_seeds=2,
    score="loss",
    tuning_holdout=60,
)
