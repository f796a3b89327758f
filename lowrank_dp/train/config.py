"""Configuration of a training run, checked before anything is loaded; importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

from lowrank_dp import _validate
from lowrank_dp._options import name_value_pairs, number_or_text, option
from lowrank_dp.artifacts.jsonable import from_jsonable, to_jsonable
from lowrank_dp.data.own import own_column
from lowrank_dp.membership.units import MEMBERSHIPS
from lowrank_dp.models.names import METHODS
from lowrank_dp.restore.names import SCHEME_NAMES
from lowrank_dp.train.config_checks import (
    IMPLICIT_NOISES,
    OPTIMIZERS,
    PADDINGS,
    PRECISIONS,
    PREFIX_DTYPES,
    SCHEDULES,
    check_config,
)

if TYPE_CHECKING:
    from lowrank_dp.restore import LowPassFilter

# fields that name a place or a bound of this machine; runs that differ only here are equal
INCIDENTAL = ("prefix_cache", "prefix_gigabytes")


@dataclass(frozen=True)
class TrainConfig:
    """One run of (differentially private) fine-tuning.

    Exactly one of ``epsilon``, ``noise_multiplier``, ``non_private`` and ``noise_free`` states the
    privacy. Every field is an option of ``python -m lowrank_dp.train``; its help text documents
    both. ``noise_multiplier`` is relative to ``max_grad_norm``. Raises ValueError for a value out
    of its range and for values that exclude each other.
    """

    model: str = option(
        "minilm",
        "Model: hub id, folder, GGUF file, or one of minilm, smollm2, gemma3-270m, tiny and "
        "tiny-llama.",
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
    noise_free: bool = option(
        False,
        "Sample and clip as a private run does, and add no noise: the ceiling of every method that "
        "removes noise. There is no privacy guarantee, and the run is marked NON-PRIVATE.",
    )
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
    optimizer: str = option(
        "adam",
        "Optimizer: SGD, Adam or AdamW of torch.optim; adam-bc, Adam without the noise in its "
        "second moment (DP-AdamBC, arXiv 2312.14334); muon, orthogonalised momentum for matrices "
        "and AdamW for the rest (DP-Muon, arXiv 2605.12994); muon-bc, Muon corrected for noise.",
        choices=OPTIMIZERS,
    )
    noise_floor: float = option(
        0.3,
        "Smallest second moment of adam-bc after the correction, relative to the noise's variance.",
    )
    skip_zeros: bool = option(
        False,
        "Leave a parameter and its optimizer state as they are in a step in which its gradient is "
        "all zero, such as a matrix under --below zero. Otherwise Adam's second moment counts such "
        "steps, and the first gradient, at step t, moves weights by up to sqrt(t) times the rate.",
    )
    learning_rate: float = option(1e-4, "Learning rate of the optimizer.")
    beta1: float | None = option(
        None,
        "Adam's beta1, or the momentum of SGD or Muon. Default: 0.9 (Adam, Muon); 0 with SGD or a "
        "running mean.",
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
    precondition: str = option(
        "none",
        "Source of a rank-one preconditioner inside the mechanism: none; generated (text of this "
        "package); noisy (the run's own noisy sums); or a public task, by name or path.",
    )
    precondition_power: float = option(
        0.125,
        "Power p of a preconditioner: the scale of a row or column is its second moment to -p.",
    )
    precondition_rows: int = option(
        1500, "Expected number of rows of public text that give a preconditioner its moments."
    )
    precondition_steps: int = option(
        10, "Noise-free steps on public text along which a preconditioner's moments are taken."
    )
    precondition_rate: float = option(
        1e-3, "Learning rate of Adam in the noise-free steps on public text."
    )
    precondition_freeze_vectors: bool = option(
        False, "Freeze biases and norms, for which a preconditioner has no scales."
    )
    precondition_every: int = option(
        5, "Steps between refreshments of a preconditioner from noisy sums."
    )
    disk_kappa: float | None = option(
        None,
        "Gain of DiSK's Kalman filter (arXiv 2410.03883), in (0, 1], such as the authors' 0.7. "
        "Gradients are taken and clipped at x + (1 - kappa) / kappa * d, for the weights x and "
        "their last movement d, and averaged: g <- (1 - kappa) g + kappa * gradient.",
    )
    diagnostic: bool = option(
        False,
        "Allow the oracle scheme, which reads clean gradients, and a preconditioner from the "
        "private task itself; marks the run NON-PRIVATE.",
    )
    rank: int = option(8, "Rank of LoRA's update.")
    lora_alpha: float | None = option(
        None, "Alpha of LoRA: the update is scaled by alpha / rank. Default: the rank."
    )
    lora_init: str = option("peft", "Distribution that LoRA's A is drawn from: peft or gaussian.")
    target_modules: tuple[str, ...] = option(
        (), "Layer that LoRA adapts; may be repeated. Default: all linear layers."
    )
    implicit_noise: str = option(
        "none",
        "Noise of LoRA's projection, added to the mean gradient of the matrices that LoRA of the "
        "same --rank would adapt, anew in each step: fresh-a, the exact noise G A^T A - G of a new "
        "Gaussian A; or gaussian, independent Gaussian noise of the same variance. For method full "
        "with --non-private: the noise depends on the gradient and gives no privacy guarantee.",
        choices=IMPLICIT_NOISES,
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
    prefix_cache: str = option(
        "",
        "Folder of a cache of what the frozen blocks below the first trained block make of each "
        "row, so that steps and evaluations run the trained blocks only; runs may share the "
        "folder. The cache is as sensitive as the records, and only its owner can read it. "
        "Default: no cache; a sweep uses a folder beside its runs, unless the value is off.",
    )
    prefix_dtype: str = option(
        "float32",
        "Type of the numbers in the cache; bf16 halves its size and rounds the trained blocks' "
        "inputs.",
        choices=PREFIX_DTYPES,
    )
    prefix_gigabytes: float = option(
        20.0,
        "Largest size of the prefix cache in gigabytes. A run whose rows do not fit trains without "
        "the cache.",
    )

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def low_pass(self) -> LowPassFilter | None:
        """Filter that takes the place of each noisy gradient, before its first input, or None."""
        if self.momentum_beta is None and self.disk_kappa is None and not self.filter_b:
            return None
        # imported here, since it imports torch
        from lowrank_dp.restore import LowPassFilter, exponential_average, kalman_filter

        if self.disk_kappa is not None:
            return kalman_filter(self.disk_kappa)
        if self.momentum_beta is not None:
            return exponential_average(self.momentum_beta)
        return LowPassFilter(b=self.filter_b, a=self.filter_a)

    @property
    def adds_noise(self) -> bool:
        """Whether noise is added to the sums; without noise there is no privacy guarantee."""
        return not (self.non_private or self.noise_free)

    @property
    def restoration(self) -> dict[str, Any]:
        """Keyword arguments of ``restore.restore``."""
        return {"method": self.restore_method, "below": self.below, **self.scheme_options}

    @property
    def averaging(self) -> float:
        """Adam's beta1, or the momentum of SGD or Muon."""
        if self.beta1 is not None:
            return self.beta1
        averaged = self.low_pass is not None and self.disk_kappa is None
        return 0.0 if averaged or self.optimizer == "sgd" else 0.9

    @property
    def look_ahead(self) -> float | None:
        """DiSK's look-ahead, in units of the last movement of the weights; None without DiSK."""
        return None if self.disk_kappa is None else (1 - self.disk_kappa) / self.disk_kappa

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as JSON types."""
        return to_jsonable(self)

    def recipe(self) -> dict[str, Any]:
        """Return :meth:`as_json` without the fields of ``INCIDENTAL``, as a run's identity."""
        return {name: v for name, v in self.as_json().items() if name not in INCIDENTAL}

    def chosen(self) -> dict[str, Any]:
        """Return the fields of :meth:`recipe` that differ from their defaults."""
        recipe = self.recipe()
        return {
            field.name: recipe[field.name]
            for field in fields(self)
            if field.name in recipe
            and getattr(self, field.name)
            != (field.default if field.default_factory is MISSING else field.default_factory())
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TrainConfig:
        """Read a result of :meth:`as_json`; raise ``ValueError`` for unknown fields or types."""
        if not isinstance(document, Mapping):
            _validate.fail("configuration", "a JSON object", type(document).__name__)
        for name in document:
            _validate.choice("field of the configuration", name, [f.name for f in fields(cls)])
        return from_jsonable("configuration", dict(document), cls)

    def differences(self, other: TrainConfig) -> list[str]:
        """List ``field: here / there`` for each field of the recipe that differs."""
        mine, theirs = self.recipe(), other.recipe()
        return [
            f"{name}: {mine[name]!r} / {theirs[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        ]
