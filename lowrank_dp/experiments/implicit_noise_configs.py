"""Arms and configurations of the experiment on LoRA's implicit noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowrank_dp.train import TrainConfig

DROPOUT = ", dropout"
FAMILIES = ("LoRA", "frozen A", "Gaussian noise", "fresh A")  # families of arms that have a rank


@dataclass(frozen=True)
class Config:
    """Arms, runs and attacks of the experiment. All runs are made in this process, one by one.

    Attributes:
        base: configuration that all arms share, with the optimizer SGD. The method, the rank, the
            number of steps, the learning rate and the seed are replaced.
        ranks: ranks of the frozen A and of both kinds of noise.
        lora_ranks: ranks of LoRA.
        main_rank: rank of LoRA with dropout, and of the arms that are attacked with shadows.
        steps: numbers of steps after which a run is attacked, in increasing order; multiples of
            ``base.eval_every``.
        num_seeds: number of seeds, counted from 0, each with its own membership bits; 2 or more.
        tuning_seed: seed of the choice of learning rates; none of the reported seeds.
        tuning_steps: number of steps after which learning rates are compared.
        tuning_holdout: expected number of training examples set aside for this comparison.
        start: middle of every arm's first grid of learning rates; grids grow until the best rate
            is inside.
        train_levels, held_out_levels: losses in nats at which arms can be compared. The tables show
            the level that the most runs reach.
        num_shadows: number of shadow models per attacked arm; 0 omits the attack with shadow
            models.
    """

    base: TrainConfig
    ranks: tuple[int, ...] = (4, 8, 64)
    lora_ranks: tuple[int, ...] = (8, 64)
    main_rank: int = 8
    steps: tuple[int, ...] = (20, 40, 60, 80, 100, 120)
    num_seeds: int = 3
    tuning_seed: int = 100
    tuning_steps: int = 80
    tuning_holdout: int = 300
    start: float = 0.02
    train_levels: tuple[float, ...] = (0.5, 0.3, 0.1)
    held_out_levels: tuple[float, ...] = (0.6, 0.55)
    num_shadows: int = 16


SST2 = Config(
    base=TrainConfig(
        model="minilm",
        task="sst2",
        non_private=True,
        optimizer="sgd",
        beta1=0.9,  # torch's momentum, with which all ranks learn within these steps
        delta=1e-3,
        batch_size=32,
        max_examples=1000,
        membership="bernoulli",
        max_length=64,
        # the matrices of the last two of six blocks, without biases and norms, as in LoRA
        train_layers=r"layer\.[45]\..*\.(query|key|value|dense)\.weight$",
        lora_init="gaussian",
        micro_batch_size=8,  # less padding; the result does not depend on this number
        eval_every=20,
        snapshot_every=20,
    )
)

# trial of one minute on generated text, with a model that needs no download
SMALL = Config(
    base=replace(
        SST2.base,
        model="tiny",
        task="generated",
        max_examples=200,
        max_length=None,
        train_layers=r"\.(query|key|value|dense)\.weight$",
        eval_every=10,
        eval_examples=100,
    ),
    ranks=(8,),
    lora_ranks=(8,),
    steps=(10, 30),
    num_seeds=2,
    tuning_steps=20,
    tuning_holdout=40,
    num_shadows=0,
)


def arms(config: Config) -> dict[str, dict[str, Any]]:
    """Return the fields of each arm that differ from the base configuration, by name."""
    fields: dict[str, dict[str, Any]] = {"full": {}}
    lora, frozen, gaussian, fresh = FAMILIES
    for family, ranks, changes in (
        (lora, config.lora_ranks, {"method": "lora"}),
        (frozen, config.ranks, {"method": "lora-frozen-a"}),
        (gaussian, config.ranks, {"implicit_noise": "gaussian"}),
        (fresh, config.ranks, {"implicit_noise": "fresh-a"}),
    ):
        fields |= {f"{family} r={rank}": {**changes, "rank": rank} for rank in ranks}
    for arm in ("full", f"{lora} r={config.main_rank}"):
        if arm in fields:
            fields[arm + DROPOUT] = {**fields[arm], "dropout": True}
    return fields


def arm_config(
    config: Config, changes: Mapping[str, Any], rate: float, seed: int, steps: int
) -> TrainConfig:
    """Return the configuration of one reported run."""
    return replace(config.base, learning_rate=rate, seed=seed, steps=steps, **changes)
