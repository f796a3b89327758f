"""Configuration of a training run, checked before anything is loaded; importable without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lowrank_dp import _validate
from lowrank_dp._options import name_value_pairs, number_or_text, option
from lowrank_dp.artifacts.jsonable import from_jsonable, to_jsonable
from lowrank_dp.data.own import own_column
from lowrank_dp.membership.units import MEMBERSHIPS
from lowrank_dp.models.names import METHODS
from lowrank_dp.restore.names import NON_PRIVATE_SCHEMES, SCHEME_NAMES

if TYPE_CHECKING:
    from lowrank_dp.restore import LowPassFilter

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
PRECISIONS = ("float32", "bf16")
PADDINGS = ("longest", "max-length")
_MOST = 2**63 - 1  # the largest integer that torch takes
_MOST_RANK = 2**16
_MOST_REAL = 1e20  # its product with _MOST_NOISE fits a float32, with room for a sum
_MOST_NOISE = 1e9  # the limit of GaussianMechanism.calibrate


@dataclass(frozen=True)
class TrainConfig:
    """One run of (differentially private) fine-tuning.

    Exactly one of ``epsilon``, ``noise_multiplier`` and ``non_private`` states the privacy. Every
    field is an option of ``python -m lowrank_dp.train``; its help text documents both.
    ``noise_multiplier`` is relative to ``max_grad_norm``. Raises ValueError for a value out of its
    range and for values that exclude each other.
    """

    model: str = option(
        "minilm", "Model: hub id, folder, or one of minilm, smollm2, tiny and tiny-llama."
    )
    task: str = option(
        "sst2",
        "Task name, or own data: a file (CSV, TSV, JSON Lines, JSON, Parquet), a folder "
        "with a train and a validation file, or a folder saved by datasets.",
    )
    method: str = option("full", "Trained parameters: the model's own, or LoRA's.", choices=METHODS)
    epsilon: float | None = option(None, "Privacy budget; the noise is calibrated to it.")
    delta: float | None = option(None, "Delta of the guarantee. Default: N^-1.1 for N units.")
    noise_multiplier: float | None = option(
        None,
        "Standard deviation of the noise relative to --max-grad-norm, above 0; in place of "
        "--epsilon.",
    )
    non_private: bool = option(False, "Train without clipping, noise and privacy guarantee.")
    max_grad_norm: float = option(
        1.0, "Clipping norm: the largest contribution of one unit of privacy to a step."
    )
    unit: str = option(
        "example",
        "Unit of privacy: example (one row), or group: all rows that share a "
        "--group-column's value, or, for generation, all rows of one source record. A "
        "sampled group takes part in a step with one of its rows, drawn at random.",
    )
    text_column: str | None = own_column("text")
    pair_column: str | None = own_column("pair")
    label_column: str | None = own_column("label")
    prompt_column: str | None = own_column("prompt")
    target_column: str | None = own_column("target")
    group_column: str | None = own_column("group")
    steps: int = option(50, "Optimizer steps.")
    batch_size: int = option(512, "Expected number of units per step (Poisson sampling).")
    optimizer: str = option("adam", "Optimizer of torch.optim.", choices=OPTIMIZERS)
    learning_rate: float = option(1e-4, "Learning rate of the optimizer.")
    beta1: float | None = option(
        None, "Adam's beta1 or SGD's momentum. Default: 0.9 (Adam); 0 with SGD or a running mean."
    )
    weight_decay: float = option(0.0, "Weight decay of the optimizer.")
    schedule: str = option(
        "constant",
        "Schedule of the learning rate, by transformers.get_scheduler.",
        choices=SCHEDULES,
    )
    warmup_steps: int = option(0, "Number of first steps in which the learning rate rises.")
    scheme: str = option(
        "none",
        "Restoration scheme of the noisy gradients (lowrank_dp.restore.restore); none is "
        "plain DP-SGD.",
        choices=SCHEME_NAMES,
    )
    scheme_options: Mapping[str, Any] = option(
        {},
        "Option of the scheme as NAME=VALUE, such as k=8; may be repeated.",
        name="option",
        parse=name_value_pairs,
    )
    below: str = option(
        "keep",
        "Treatment of a matrix without a singular value above the bulk of the noise: keep or zero.",
    )
    restore_method: str = option(
        "fast",
        "Algorithm of the restoration: fast (leading singular triplets) or exact (full SVD).",
    )
    momentum_beta: float | None = option(
        None,
        "Decay of a running mean of the noisy gradients, such as 0.9; the mean is restored in "
        "place of each gradient.",
    )
    filter_b: tuple[float, ...] = option(
        (),
        "Coefficient on gradients of a low-pass filter (DOPPLER, arXiv 2408.13460) in place of "
        "--momentum-beta; may be repeated.",
    )
    filter_a: tuple[float, ...] = option(
        (), "Coefficient on past outputs of the low-pass filter; may be repeated."
    )
    diagnostic: bool = option(
        False, "Allow the oracle scheme, which reads clean gradients; marks the run NON-PRIVATE."
    )
    rank: int = option(8, "Rank of LoRA's update.")
    lora_alpha: float | None = option(
        None, "Alpha of LoRA: the update is scaled by alpha / rank. Default: the rank."
    )
    lora_init: str = option("peft", "Distribution that LoRA's A is drawn from: peft or gaussian.")
    target_modules: tuple[str, ...] = option(
        (), "Layer that LoRA adapts; may be repeated. Default: all linear layers."
    )
    train_embeddings: bool = option(False, "Train the embeddings too; excludes LoRA.")
    train_layers: int | str | None = option(
        None,
        "Train the last k blocks, or the parameters that match this regular expression.",
        parse=number_or_text,
    )
    dropout: bool = option(
        False, "Train with dropout, which is off by default as is usual with DP."
    )
    max_examples: int | None = option(
        None,
        "Expected size of a random subset of each split; whole groups are chosen, by a hash of "
        "each record's content.",
    )
    data_seed: int = option(
        0,
        "Seed of --max-examples' subset and of a generated task; separate from --seed, so that "
        "runs with different seeds share their records.",
    )
    max_length: int | None = option(
        None,
        "Number of tokens that a text is cut to. Default: 128 with labels, or the model's context "
        "if the context is shorter; uncut for generation, where a text beyond the model's context "
        "is refused.",
    )
    padding: str = option(
        "longest",
        "Length that rows are padded to: that of the longest row in the micro-batch, or "
        "--max-length, for models whose output depends on padding (for generation, --max-length "
        "must be given).",
        choices=PADDINGS,
    )
    holdout: int = option(
        0,
        "Expected number of units that are taken out of the train split and evaluated on "
        "in place of the validation split, for tuning; the same units for every seed.",
    )
    membership: str = option(
        "all",
        "Units trained on: all; bernoulli, by a fair coin per unit; or half, a random half.",
        choices=MEMBERSHIPS,
    )
    micro_batch_size: int = option(
        64, "Rows in memory at a time; the result does not depend on the number."
    )
    precision: str = option(
        "float32",
        "Precision of forward and backward; clipped sums, noise and restoration stay in float32.",
        choices=PRECISIONS,
    )
    eval_every: int = option(10, "Steps between evaluations on the validation split.")
    eval_examples: int = option(1000, "Largest number of validation examples per evaluation.")
    generate: bool = option(
        True, "Generate text in a generation task's last evaluation (BLEU, ROUGE-L)."
    )
    num_beams: int = option(1, "Number of beams of the text generation; 1 is greedy.")
    max_new_tokens: int = option(64, "Largest number of tokens generated per prompt.")
    snapshot_every: int = option(10, "Steps between snapshots, from which a killed run resumes.")
    seed: int | None = option(
        None,
        "Seed of all random numbers, the noise included: anyone who knows the seed can reproduce "
        "the noise. Default: a secret seed from the operating system.",
    )
    secure_rng: bool = option(
        False,
        "Draw the noise from a cryptographic generator on CUDA too, which is slower. On the CPU "
        "the cryptographic generator is the default.",
    )
    compile: bool = option(
        False,
        "Compile the step with torch.compile, which delays the first step and may make the others "
        "faster; excludes --dropout and --shard. If the run is killed, the steps since the last "
        "snapshot may count again in epsilon.",
    )
    shard: bool = option(
        False,
        "Under torchrun: split weights, optimizer state and sums over the processes (FSDP2).",
    )
    device: str = option("cpu", "Device of the trained parameters: cpu, cuda or cuda:N.")

    def __post_init__(self) -> None:
        for name, options in (
            ("method", METHODS),
            ("unit", ("example", "group")),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("scheme", SCHEME_NAMES),
            ("below", ("keep", "zero")),
            ("restore_method", ("fast", "exact")),
            ("membership", MEMBERSHIPS),
            ("precision", PRECISIONS),
            ("padding", PADDINGS),
        ):
            _validate.choice(name, getattr(self, name), options)
        for name in (
            "steps",
            "batch_size",
            "rank",
            "micro_batch_size",
            "eval_every",
            "eval_examples",
            "num_beams",
            "max_new_tokens",
            "snapshot_every",
        ):
            _validate.integer(
                name,
                getattr(self, name),
                high={"rank": _MOST_RANK, "num_beams": 1000}.get(name, _MOST),
            )
        for name, low in (("max_examples", 2), ("max_length", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                _validate.integer(name, getattr(self, name), low=low, high=_MOST)
        _validate.integer("data_seed", self.data_seed, low=0, high=_MOST)
        _validate.integer("holdout", self.holdout, low=0, high=_MOST)
        _validate.integer("warmup_steps", self.warmup_steps, low=0, high=self.steps)
        if self.warmup_steps and self.schedule == "constant":
            raise ValueError(
                "warmup_steps must be 0 with schedule 'constant'; use "
                "'constant_with_warmup', 'linear' or 'cosine'"
            )
        if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", self.device):
            _validate.fail("device", "cpu, cuda or cuda:N", self.device)
        _validate.positive("learning_rate", self.learning_rate)
        _validate.real("weight_decay", self.weight_decay, low=0, high=_MOST_REAL)
        if self.beta1 is not None:
            _validate.real("beta1", self.beta1, low=0, high=1, high_open=True)
        for name in ("dropout", "shard"):
            if self.compile and getattr(self, name):
                raise ValueError(f"compile must go without {name}")
        self._check_privacy()
        self._check_restoration()

    def _check_privacy(self) -> None:
        given = [
            name
            for name, value in (
                ("epsilon", self.epsilon),
                ("noise_multiplier", self.noise_multiplier),
                ("non_private", self.non_private or None),
            )
            if value is not None
        ]
        if len(given) != 1:
            raise ValueError(
                "exactly one of epsilon, noise_multiplier and non_private must be "
                f"given, got {' and '.join(given) or 'none of them'}"
            )
        if self.epsilon is not None:
            _validate.positive("epsilon", self.epsilon)
        if self.noise_multiplier is not None:
            _validate.real(
                "noise_multiplier", self.noise_multiplier, low=0, low_open=True, high=_MOST_NOISE
            )
        if self.delta is not None:
            _validate.real("delta", self.delta, low=0, high=1, low_open=True, high_open=True)
        _validate.real("max_grad_norm", self.max_grad_norm, low=1 / _MOST_REAL, high=_MOST_REAL)
        if self.secure_rng and (self.seed is not None or self.non_private):
            raise ValueError(
                "secure_rng must go without a seed, which would make the noise "
                "reproducible, and without non_private, which draws none"
            )

    def _check_restoration(self) -> None:
        if self.scheme in NON_PRIVATE_SCHEMES and not self.diagnostic:
            raise ValueError(
                f"scheme {self.scheme!r} reads clean gradients, so the run would not "
                "be private: choose another, or mark the run with diagnostic"
            )
        if self.diagnostic and self.scheme not in NON_PRIVATE_SCHEMES:
            raise ValueError(
                "diagnostic must go with a scheme that reads clean gradients "
                f"({', '.join(NON_PRIVATE_SCHEMES)}), got {self.scheme!r}"
            )
        if self.non_private and self.scheme != "none":
            raise ValueError(
                f"scheme must be 'none' without noise, got {self.scheme!r}: there is "
                "nothing to restore"
            )
        if self.scheme in ("none", *NON_PRIVATE_SCHEMES) and self.scheme_options:
            raise ValueError(
                f"scheme {self.scheme!r} takes no options, got {', '.join(self.scheme_options)}"
            )
        for name in ("noisy", "noise_std", "scheme", "method", "below"):
            if name in self.scheme_options:
                raise ValueError(f"scheme_options must hold the scheme's own options, got {name!r}")
        if self.scheme not in ("none", *NON_PRIVATE_SCHEMES):
            from lowrank_dp.restore import check_arguments  # imports torch

            check_arguments(self.scheme, **self.restoration)
        if self.momentum_beta is not None and self.filter_b:
            raise ValueError("momentum_beta and filter_b must not both be given")
        if self.filter_a and not self.filter_b:
            raise ValueError("filter_a must come with filter_b")
        averaged = self.low_pass is not None  # the filter checks its coefficients
        for coefficient in (*self.filter_b, *self.filter_a):
            if coefficient:
                _validate.real(
                    "the size of a filter's coefficient",
                    abs(coefficient),
                    low=1 / _MOST_REAL,
                    high=_MOST_REAL,
                )
        if averaged and self.beta1:
            raise ValueError(
                f"beta1 must be 0 or left out beside a running mean of gradients, "
                f"got {self.beta1:g}"
            )

    @property
    def low_pass(self) -> LowPassFilter | None:
        """Filter that takes the place of each noisy gradient, before its first input, or None."""
        if self.momentum_beta is None and not self.filter_b:
            return None
        from lowrank_dp.restore import LowPassFilter, exponential_average  # these import torch

        if self.momentum_beta is not None:
            return exponential_average(self.momentum_beta)
        return LowPassFilter(b=self.filter_b, a=self.filter_a)

    @property
    def restoration(self) -> dict[str, Any]:
        """Keyword arguments of ``restore.restore``."""
        return {"method": self.restore_method, "below": self.below, **self.scheme_options}

    @property
    def averaging(self) -> float:
        """Adam's beta1, or SGD's momentum."""
        if self.beta1 is not None:
            return self.beta1
        return 0.0 if self.low_pass is not None or self.optimizer == "sgd" else 0.9

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as JSON types."""
        return to_jsonable(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TrainConfig:
        """Read a result of :meth:`as_json`; raise ``ValueError`` for unknown fields or types."""
        if not isinstance(document, Mapping):
            _validate.fail("configuration", "a JSON object", type(document).__name__)
        for name in document:
            _validate.choice("field of the configuration", name, [f.name for f in fields(cls)])
        return from_jsonable("configuration", dict(document), cls)

    def differences(self, other: TrainConfig) -> list[str]:
        """List ``field: here / there`` for each field that differs from ``other``."""
        mine, theirs = self.as_json(), other.as_json()
        return [
            f"{name}: {mine[name]!r} / {theirs[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        ]
