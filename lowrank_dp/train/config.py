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
from lowrank_dp.models.names import METHODS, PADDINGS
from lowrank_dp.restore.names import SCHEME_NAMES
from lowrank_dp.train.config_checks import (
    IMPLICIT_NOISES,
    INCIDENTAL,
    OPTIMIZERS,
    PRECISIONS,
    PREFIX_DTYPES,
    SCHEDULES,
    check_config,
)

if TYPE_CHECKING:
    from lowrank_dp.restore import LowPassFilter


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of one run of fine-tuning, private or not.

    Exactly one of ``epsilon``, ``noise_multiplier``, ``non_private`` and ``noise_free`` must be
    given. Every field is an option of ``python -m lowrank_dp.train``; the help text of the option
    documents the field. ``noise_multiplier`` is relative to ``max_grad_norm``. Raises ValueError
    for a value out of its range and for values that exclude each other.
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
    method: str = option(
        "full",
        "Trained parameters: the model's own (full), LoRA's A and B, or B alone (lora-frozen-a).",
        choices=METHODS,
    )
    epsilon: float | None = option(
        None, "Privacy budget epsilon, above 0. The noise is calibrated to this budget."
    )
    delta: float | None = option(None, "Delta, in (0, 1). Default: N^-1.1 for N units of privacy.")
    noise_multiplier: float | None = option(
        None,
        "Standard deviation of the noise on the gradient sum, relative to --max-grad-norm, above "
        "0; in place of --epsilon.",
    )
    non_private: bool = option(False, "Train without clipping, noise and privacy guarantee.")
    noise_free: bool = option(
        False,
        "Sample and clip as a private run does, and add no noise. The score of such a run is the "
        "upper limit of every method that removes noise. The run is marked NON-PRIVATE.",
    )
    max_grad_norm: float = option(
        1.0,
        "Clipping norm C, absolute, in [1e-20, 1e20]: the largest norm that one unit of privacy "
        "contributes to the gradient sum of a step.",
    )
    unit: str = option(
        "example",
        "Unit of privacy: example (one row) or group. A group is all rows with the same value of "
        "--group-column or, for generation, all rows of one source record. A sampled group takes "
        "part in a step with one of its rows, drawn at random.",
    )
    text_column: str | None = own_column("text")
    pair_column: str | None = own_column("pair")
    label_column: str | None = own_column("label")
    prompt_column: str | None = own_column("prompt")
    target_column: str | None = own_column("target")
    group_column: str | None = own_column("group")
    steps: int = option(50, "Number of optimizer steps.")
    batch_size: int = option(512, "Expected number of units per step (Poisson sample), at least 1.")
    optimizer: str = option(
        "adam",
        "Optimizer. sgd, adam and adamw are those of torch.optim. adam-bc is Adam with the noise "
        "variance subtracted from the second moment (DP-AdamBC, arXiv 2312.14334). muon is "
        "orthogonalised momentum for matrices and AdamW for all other parameters (DP-Muon, arXiv "
        "2605.12994). muon-bc is muon with a correction for the noise.",
        choices=OPTIMIZERS,
    )
    noise_floor: float = option(
        0.3,
        "Lower limit of adam-bc's second moment after the subtraction of the noise variance, "
        "relative to the noise variance, above 0.",
    )
    skip_zeros: bool = option(
        False,
        "Skip a parameter, and keep its optimizer state, in every step in which its whole gradient "
        "is zero, as --below zero gives for some matrices. Without this option, Adam's second "
        "moment counts these steps; the first nonzero gradient, at step t, then moves weights by "
        "up to sqrt(t) times the learning rate.",
    )
    learning_rate: float = option(1e-4, "Learning rate of the optimizer, above 0.")
    beta1: float | None = option(
        None,
        "Coefficient beta1 of Adam, or momentum of SGD or Muon. Default: 0.9 for Adam and Muon; 0 "
        "for SGD, and with --momentum-beta or --filter-b.",
    )
    weight_decay: float = option(0.0, "Weight decay of the optimizer, in [0, 1e20].")
    schedule: str = option(
        "constant",
        "Schedule of the learning rate, by transformers.get_scheduler.",
        choices=SCHEDULES,
    )
    warmup_steps: int = option(
        0, "Number of steps at the start in which the learning rate rises to its full value."
    )
    scheme: str = option(
        "none",
        "Restoration scheme of the noisy gradients (lowrank_dp.restore.restore); none leaves the "
        "gradients unchanged.",
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
        "Treatment of a matrix without a singular value above the bulk of the noise: keep (leave "
        "the matrix unchanged) or zero (set the matrix to 0).",
    )
    restore_method: str = option(
        "fast",
        "Algorithm of the restoration: fast (leading singular triplets) or exact (full SVD).",
    )
    momentum_beta: float | None = option(
        None,
        "Decay, in [0, 1), of a running mean of the noisy gradients, such as 0.9. The running mean "
        "is restored in place of each gradient.",
    )
    filter_b: tuple[float, ...] = option(
        (),
        "Coefficient on noisy gradients of a low-pass filter (DOPPLER, arXiv 2408.13460), the "
        "newest first; may be repeated. The filter takes the place of --momentum-beta.",
    )
    filter_a: tuple[float, ...] = option(
        (),
        "Coefficient on past outputs of the low-pass filter, the newest first; may be repeated.",
    )
    precondition: str = option(
        "none",
        "Source of the second moments of a rank-one preconditioner, which scales gradients before "
        "clipping and noise: none (no preconditioner); generated (text of this package); noisy "
        "(the run's own noisy sums); or a public task, by name or path.",
    )
    precondition_power: float = option(
        0.125,
        "Power p of the preconditioner, in [0, 0.5]: the scale of a row or column is its second "
        "moment to the power -p.",
    )
    precondition_rows: int = option(
        1500,
        "Expected number of rows of public text from which the preconditioner's second moments are "
        "computed.",
    )
    precondition_steps: int = option(
        10,
        "Number of noise-free steps on public text over which the preconditioner's second moments "
        "are averaged.",
    )
    precondition_rate: float = option(
        1e-3, "Learning rate of Adam in the preconditioner's noise-free steps on public text."
    )
    precondition_freeze_vectors: bool = option(
        False, "Freeze biases and norms, for which the preconditioner has no scales."
    )
    precondition_every: int = option(
        5, "Number of steps between updates of a preconditioner from noisy sums."
    )
    disk_kappa: float | None = option(
        None,
        "Gain kappa of DiSK's Kalman filter (arXiv 2410.03883), in (0, 1]; the authors use 0.7. "
        "Gradients are computed and clipped at x + (1 - kappa) / kappa * d, where x are the "
        "weights and d is their last change. The noisy gradients are averaged by "
        "g <- (1 - kappa) g + kappa * gradient. Default: no DiSK.",
    )
    diagnostic: bool = option(
        False,
        "Allow the scheme oracle, which reads clean gradients, or a preconditioner from the "
        "private task itself. The run is marked NON-PRIVATE.",
    )
    rank: int = option(8, "Rank of LoRA's update of each weight.")
    lora_alpha: float | None = option(
        None, "Alpha of LoRA: the update is scaled by alpha / rank. Default: the rank."
    )
    lora_init: str = option("peft", "Distribution that LoRA's A is drawn from: peft or gaussian.")
    target_modules: tuple[str, ...] = option(
        (), "Layer that LoRA adapts; may be repeated. Default: all linear layers."
    )
    implicit_noise: str = option(
        "none",
        "Implicit noise of LoRA, added in each step to the mean gradient G of every matrix that "
        "LoRA of the same --rank would adapt. fresh-a is the exact noise G A^T A - G with a new "
        "Gaussian A; gaussian is independent Gaussian noise of the same variance. Needs --method "
        "full and --non-private, since noise that depends on the gradient gives no privacy "
        "guarantee.",
        choices=IMPLICIT_NOISES,
    )
    train_embeddings: bool = option(False, "Train the embeddings too; excludes LoRA.")
    train_layers: int | str | None = option(
        None,
        "Trained part of the model: a number k for the last k blocks, or a regular expression for "
        "the parameters whose names match. Default: all blocks.",
        parse=number_or_text,
    )
    dropout: bool = option(
        False, "Train with the model's dropout. Without this option, dropout is off."
    )
    max_examples: int | None = option(
        None,
        "Expected number of examples of a random subset of each split. A hash of each record's "
        "content decides; all rows of a group are kept or left out together.",
    )
    data_seed: int = option(
        0,
        "Seed of the subset of --max-examples and of the text of a generated task. The seed of the "
        "data is separate from --seed, so that runs with different seeds share their records.",
    )
    max_length: int | None = option(
        None,
        "Number of tokens that a text is cut to. Default for labelled tasks: 128, or the length of "
        "the model's context if the context is shorter. Default for generation: no text is cut, "
        "and a text longer than the model's context is an error.",
    )
    padding: str = option(
        "longest",
        "Length that rows are padded to: the longest row in the micro-batch, or --max-length. "
        "Models whose output depends on padding need max-length. For generation, max-length "
        "requires the option --max-length.",
        choices=PADDINGS,
    )
    holdout: int = option(
        0,
        "Expected number of units that are removed from the train split and replace the validation "
        "split, for tuning. The units are the same for every seed.",
    )
    membership: str = option(
        "all",
        "Units of privacy that are trained on: all; bernoulli (a fair coin per unit); or half (a "
        "random half).",
        choices=MEMBERSHIPS,
    )
    micro_batch_size: int = option(
        64,
        "Number of rows in memory at a time, which changes results by rounding only. A run may be "
        "resumed with another number; steps since the last snapshot then count twice in epsilon.",
    )
    precision: str = option(
        "float32",
        "Precision of the forward and backward passes of steps, and of the losses and scores of "
        "evaluations; clipped sums, noise, restoration and text generation stay in float32.",
        choices=PRECISIONS,
    )
    eval_every: int = option(10, "Number of steps between evaluations on the validation split.")
    eval_examples: int = option(1000, "Largest number of validation examples per evaluation.")
    generate: bool = option(
        True, "Generate texts in the last evaluation of a generation task, for BLEU and ROUGE-L."
    )
    num_beams: int = option(1, "Number of beams of the text generation; 1 is greedy search.")
    max_new_tokens: int = option(64, "Largest number of tokens generated per prompt.")
    snapshot_every: int = option(
        10, "Number of steps between snapshots, from which a killed run resumes."
    )
    seed: int | None = option(
        None,
        "Seed of all random numbers, the noise included: anyone who knows the seed can reproduce "
        "the noise. Default: a secret seed from the operating system.",
    )
    secure_rng: bool = option(
        False,
        "Draw the noise from a cryptographic generator on CUDA too, which is slower. On the CPU, "
        "the cryptographic generator is the default.",
    )
    compile: bool = option(
        False,
        "Compile the step with torch.compile. Compiling delays the first step and may make later "
        "steps faster. Excludes --dropout and --shard. If the run is killed and resumed, the steps "
        "since the last snapshot may count twice in epsilon.",
    )
    shard: bool = option(
        False,
        "Under torchrun: split weights, optimizer state and sums over the processes (FSDP2).",
    )
    device: str = option("cpu", "Device of the trained parameters: cpu, cuda or cuda:N.")
    prefix_cache: str = option(
        "",
        "Folder of a cache of the frozen blocks' outputs for each row, up to the first trained "
        "block. With the cache, steps and evaluations run the trained blocks only. Several runs "
        "may share the folder. The cache is as sensitive as the records, and only its owner can "
        "read the files. Not with compile, dropout, shard or train_embeddings. Default: no cache. "
        "A sweep uses a folder beside its runs, unless the value is off.",
    )
    prefix_dtype: str = option(
        "float32",
        "Number type of the prefix cache. bf16 halves the size of the cache, and rounds the inputs "
        "of the trained blocks.",
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
        """Filter in its initial state, whose output replaces each noisy gradient; None without."""
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
        """Whether noise is added to the sums; a run without noise has no privacy guarantee."""
        return not (self.non_private or self.noise_free)

    @property
    def restoration(self) -> dict[str, Any]:
        """Keyword arguments of ``restore.restore``."""
        return {"method": self.restore_method, "below": self.below, **self.scheme_options}

    @property
    def averaging(self) -> float:
        """Coefficient beta1 of Adam, or momentum of SGD or Muon, with the default filled in."""
        if self.beta1 is not None:
            return self.beta1
        averaged = self.low_pass is not None and self.disk_kappa is None
        return 0.0 if averaged or self.optimizer == "sgd" else 0.9

    @property
    def look_ahead(self) -> float | None:
        """Length of DiSK's look-ahead, in units of the weights' last change; None without DiSK."""
        return None if self.disk_kappa is None else (1 - self.disk_kappa) / self.disk_kappa

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as JSON types."""
        return to_jsonable(self)

    def recipe(self) -> dict[str, Any]:
        """Return :meth:`as_json` without the fields in ``INCIDENTAL``: the identity of a run."""
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
