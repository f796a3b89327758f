"""Arms of the sample-efficiency experiments: plain DP training, noise-free ceilings, other methods.

Every arm trains with the same data, sampling rate, clipping norm and number of steps. All arms with
noise have the same noise level, and so the same (epsilon, delta). A ceiling is an arm without
noise; the name of a ceiling says NON-PRIVATE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowrank_dp import _validate
from lowrank_dp.data import TASKS, Columns, Task, load_task
from lowrank_dp.data.tasks import known_name
from lowrank_dp.evaluation.models import evaluated_examples
from lowrank_dp.experiments.tuning import Tuned
from lowrank_dp.models import load_model
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.records import check_room, token_limit

FOLDER = Path("runs") / "steps"  # folder of all sweeps; `gap` and `steps_*` share plain runs


@dataclass(frozen=True)
class Arm:
    """Arm of an experiment: a training method.

    Attributes:
        fields: configuration fields that differ from the base configuration (DP-Adam).
        start: middle of the first grid of learning rates, > 0.
    """

    fields: Mapping[str, Any]
    start: float


# SGD along the bias-corrected running mean of the gradients, which Adam also uses; with torch's
# momentum, the first ten steps would be smaller
_SGD = {"optimizer": "sgd", "momentum_beta": 0.9}
_NOISE_FREE = {"epsilon": None, "noise_multiplier": None, "noise_free": True}
_MEAN = {"momentum_beta": 0.9}
_OPTIMAL = {"scheme": "optimal"}
# without skip_zeros, Adam takes a large step at the first non-zero gradient of a matrix
_ZEROED = {"below": "zero", "skip_zeros": True}
# biases and norms are frozen, because a vector has no rank-one scale
_FROZEN = {"precondition_freeze_vectors": True}


def _partial(alpha: float, **options: str) -> Arm:
    """Return an arm of the scheme ``partial`` (arXiv 2510.01137, version 3)."""
    return Arm({"scheme": "partial", "scheme_options": {"alpha": alpha, **options}}, 1e-2)


ARMS: dict[str, Arm] = {
    "DP-Adam": Arm({}, 1e-2),
    "DP-SGD": Arm(_SGD, 3.0),
    "noise-free Adam (NON-PRIVATE)": Arm(_NOISE_FREE, 1e-3),
    "noise-free SGD (NON-PRIVATE)": Arm({**_SGD, **_NOISE_FREE}, 3.0),
    "DP-SGD, torch's momentum": Arm({"optimizer": "sgd", "beta1": 0.9}, 0.3),
    # restoration of each step's noisy sum
    "denoise": Arm({"scheme": "denoise"}, 1e-2),  # arXiv 2510.01137, version 1
    "partial, 0.5": _partial(0.5),
    "partial, 0.9": _partial(0.9),
    "partial, power law, 0.5": _partial(0.5, target="power-law"),
    "partial, power law, 0.9": _partial(0.9, target="power-law"),
    "optimal": Arm(_OPTIMAL, 1e-2),
    "optimal, zeroed": Arm({**_OPTIMAL, **_ZEROED}, 1e-2),
    # running means over steps. DOPPLER's coefficients are those of its first author's public code,
    # since the table of coefficients in the paper was not found
    "DOPPLER": Arm({"filter_b": (0.15, -0.05), "filter_a": (-0.9,)}, 1e-2),
    "DiSK": Arm({"disk_kappa": 0.7}, 1e-2),
    "mean, denoise": Arm({"scheme": "denoise", **_MEAN}, 1e-2),
    "mean, optimal": Arm({**_OPTIMAL, **_MEAN}, 1e-3),
    "mean, optimal, zeroed": Arm({**_OPTIMAL, **_ZEROED, **_MEAN}, 1e-3),
    # optimizers
    "DP-AdamBC": Arm({"optimizer": "adam-bc"}, 1e-2),
    "DP-Muon": Arm({"optimizer": "muon"}, 1e-2),
    # the correction is derived in optim/muon.py for smaller noise than these runs have: this arm
    # judges that derivation and not the paper (arXiv 2605.12994)
    "DP-MuonBC": Arm({"optimizer": "muon-bc"}, 1e-2),
    # Muon on restored values: the optimizer is SGD, since the scheme sets the size of each step
    "mean, polar, zeroed": Arm({"scheme": "polar", **_ZEROED, **_MEAN, "optimizer": "sgd"}, 1.0),
    # adapters
    "DP-LoRA": Arm({"method": "lora"}, 3e-2),
    "DP-LoRA, frozen A": Arm({"method": "lora-frozen-a"}, 3e-2),  # FFA-LoRA
    "DP-LoRA, mean, optimal, zeroed": Arm({"method": "lora", **_OPTIMAL, **_ZEROED, **_MEAN}, 1e-2),
    # rank-one preconditioners inside the mechanism; at power 0 all scales are 1, so that the arm
    # shows the effect of freezing the vectors alone
    "DP-SGD, vectors frozen": Arm(
        {**_SGD, **_FROZEN, "precondition": "generated", "precondition_power": 0.0}, 3.0
    ),
    "preconditioned, generated text": Arm({**_SGD, **_FROZEN, "precondition": "generated"}, 10.0),
    "preconditioned, CoLA": Arm({**_SGD, **_FROZEN, "precondition": "cola"}, 10.0),
    "preconditioned, vectors trained": Arm({**_SGD, "precondition": "generated"}, 10.0),
    "preconditioned, noisy sums": Arm(
        {"optimizer": "sgd", "beta1": 0.9, **_FROZEN, "precondition": "noisy"}, 1.0
    ),
}
# baseline -> its ceiling; every arm is compared with both baselines
CEILING_OF = {
    "DP-Adam": "noise-free Adam (NON-PRIVATE)",
    "DP-SGD": "noise-free SGD (NON-PRIVATE)",
}
BASELINES = tuple(CEILING_OF)
CEILINGS = tuple(CEILING_OF.values())
PLAIN = BASELINES + CEILINGS


def base_config(**fields: Any) -> TrainConfig:
    """Return the configuration that the arms of an experiment share: DP-Adam, scored every step.

    ``eval_examples`` should be at least the size of the validation split, and not much larger: at
    the end of a run, the loss is also computed on this number of training examples. A smaller
    number scores a part of the split, which is the same for every seed.
    """
    return TrainConfig(**{"delta": 1e-5, "eval_every": 1, "generate": False, **fields})


def arm_config(
    base: TrainConfig, arm: str, learning_rate: float, seed: int, holdout: int = 0
) -> TrainConfig:
    """Return the configuration of one run of an arm; ``holdout`` > 0 is for tuning.

    A tuning run generates no texts, since learning rates are not chosen by them.
    """
    fields = {**ARMS[arm].fields, "learning_rate": learning_rate}
    generate = base.generate and not holdout
    return replace(base, **fields, seed=seed, holdout=holdout, generate=generate)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Protocol of an experiment: seeds, tuning and score.

    Attributes:
        num_seeds: number of reported seeds, counted from 0; 2 or more.
        tuning_seeds: seeds of the tuning runs; two or more, none of them reported.
        tuning_holdout: expected number of held-out training units, on which learning rates are
            chosen.
        score: metric of the curves, one of :func:`metrics_of_every_step`.
        num_workers: number of concurrent runs; None means one per CPU core, and 4 on a GPU.
    """

    num_seeds: int = 5
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    tuning_holdout: int = 1000
    score: str = "accuracy"
    num_workers: int | None = None


def metrics_of_every_step(base: TrainConfig) -> tuple[str, ...]:
    """Return the metrics that a run on the task of ``base`` has after every step.

    BLEU and ROUGE-L are left out, since they exist after the last step only. The data of a named
    benchmark are not loaded. Raises ValueError as ``data.load_task`` does.
    """
    task = TASKS.get(known_name(base.task) or "") or _task(base)
    return ("loss", "perplexity") if task.kind == "generation" else ("loss", *task.metrics)


def scored_on(base: TrainConfig) -> str:
    """Describe the examples that every reported run is scored on; they are the same in all runs.

    Raises ValueError as ``data.load_task`` does.
    """
    task = _task(base)
    scored = evaluated_examples(task, max_examples=base.eval_examples)
    part = f"{len(scored):,} of" if len(scored) < len(task.validation) else "all"
    words = f"scored on {part} {len(task.validation):,} evaluation examples"
    if task.kind != "generation":
        return words
    return f"{words} from {len({example.text for example in scored}):,} sources"


def check_texts(base: TrainConfig) -> None:
    """Raise ValueError if a reported run can't generate texts, which no tuning run would notice.

    The model is loaded, since the model alone states its context, if ``base`` generates texts.
    """
    task = _task(base) if base.generate else None
    if task is not None and task.kind == "generation":
        _, tokenizer = load_model(base.model, task=task)
        check_room(base, task, tokenizer, token_limit(base, task, tokenizer))


def _task(base: TrainConfig) -> Task:
    """Load the task of the reported runs."""
    return load_task(
        base.task,
        max_examples=base.max_examples,
        seed=base.data_seed,
        columns=Columns.of(base),
        warn=False,
    )


def check_runs(base: TrainConfig, protocol: Protocol) -> None:
    """Raise ValueError for runs that the protocol does not allow."""
    num_seeds, tuning_seeds = protocol.num_seeds, protocol.tuning_seeds
    _validate.integer("num_seeds", num_seeds, low=2)
    _validate.integer("tuning_holdout", protocol.tuning_holdout)
    if len({*tuning_seeds}) < 2 or len({*tuning_seeds}) < len(tuning_seeds):
        raise ValueError(f"tuning_seeds must be two or more different seeds, got {tuning_seeds}")
    if min(tuning_seeds) < num_seeds:
        raise ValueError(
            f"tuning_seeds must not be among the {num_seeds} reported seeds, got {tuning_seeds}"
        )
    if base.eval_every != 1:
        raise ValueError(f"eval_every must be 1: every step is scored, got {base.eval_every}")
    _validate.integer("steps", base.steps, low=2)
    metrics = metrics_of_every_step(base)
    if protocol.score not in metrics:
        raise ValueError(
            f"score must be a metric of {base.task} at every step ({', '.join(metrics)}), got "
            f"{protocol.score!r}{_validate.did_you_mean(protocol.score, metrics)}"
        )


def wanted_runs(
    tuned: Mapping[str, Tuned],
    num_seeds: int,
    config_of: Callable[[str, float, int], TrainConfig],
) -> dict[tuple[str, int], TrainConfig]:
    """Return the configurations of the reported runs, by arm and seed, at the chosen rates."""
    return {
        (arm, seed): config_of(arm, found.chosen, seed)
        for arm, found in tuned.items()
        if found.chosen is not None
        for seed in range(num_seeds)
    }
