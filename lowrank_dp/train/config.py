"""What a training run is asked to do, checked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lowrank_dp import _validate, artifacts
from lowrank_dp.membership.units import MEMBERSHIPS
from lowrank_dp.models import METHODS
from lowrank_dp.restore import (
    NON_PRIVATE_SCHEMES,
    SCHEMES,
    LowPassFilter,
    check_arguments,
    exponential_average,
)

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
PRECISIONS = ("float32", "bf16")
PADDINGS = ("longest", "max-length")
_MOST = 2**63 - 1  # the largest integer that torch takes
_MOST_RANK = 2**16
_MOST_REAL = 1e20  # times _MOST_NOISE it fits a float32, with room for a sum
_MOST_NOISE = 1e9  # as GaussianMechanism.calibrate has it


@dataclass(frozen=True)
class TrainConfig:
    """One run of (differentially private) fine-tuning.

    Exactly one of ``epsilon``, ``noise_multiplier`` and ``non_private`` says what the privacy is.

    Attributes:
        model, task, method, rank, lora_alpha, lora_init, target_modules, train_embeddings,
            train_layers: as in ``models.load_model`` and ``data.load_task``.
        epsilon: target; the noise multiplier is calibrated to it.
        delta: None takes N^-1.1 for N units.
        noise_multiplier: sigma relative to ``max_grad_norm``; > 0.
        non_private: no clipping, no noise, no guarantee.
        max_grad_norm: C, the bound on one unit's contribution to a step.
        unit: the unit of privacy. "example": one row. "group": all rows with one value in
            ``group_column``, or, for generation, one source record with all its rows (an E2E
            meaning representation and its references); a sampled group takes part with one of its
            rows, drawn at random.
        text_column, pair_column, label_column, prompt_column, target_column, group_column: the
            columns of the user's own data, as in ``data.Columns``.
        steps, batch_size: optimizer steps, and the *expected* number of units in one (Poisson).
        optimizer, learning_rate, beta1, weight_decay: torch's. ``beta1`` is Adam's, or SGD's
            momentum; None takes 0.9 for Adam and 0 for SGD, and 0 wherever a running mean of
            gradients (``momentum_beta`` or a filter) stands in for it.
        schedule, warmup_steps: of the learning rate, by ``transformers.get_scheduler``.
        scheme, scheme_options, below, restore_method: as ``lowrank_dp.restore.restore`` takes
            them; "none" is plain DP-SGD.
        momentum_beta: restore the running mean of the noisy gradients in place of each one.
        filter_b, filter_a: the same with a low-pass filter of higher order (DOPPLER, arXiv
            2408.13460): coefficients as in ``restore.LowPassFilter``.
        diagnostic: allow schemes that read clean gradients; the whole run is then NON-PRIVATE.
        dropout: train with the model's dropout; off by default, as is usual with DP.
        max_examples: expected number of examples of each split that are kept, each chosen alone
            by a hash keyed with ``data_seed``, in whole groups.
        data_seed: the seed of that subset and of a generated task. It is not ``seed``, so that
            runs with different seeds share their records.
        max_length: the number of tokens that a text is cut to. None takes 128 for labels, or the
            model's context if that is shorter. For generation, None cuts nothing, and a text
            beyond the model's context is refused.
        padding: "longest" pads a micro-batch to its longest row, for models to which padding is
            nothing. "max-length" pads every row on the right to ``max_length``, which is public,
            for models that mind padding: no row then depends on the rows beside it. It needs a
            ``max_length`` for generation.
        holdout: the expected number of units of the train split that are set aside and evaluated
            on in place of the validation split, for tuning; 0 for none. The held-out units are the
            same for every seed, and a held-out group takes all its rows along.
        membership: who is trained on: "all", "bernoulli" (a fair coin per unit, which no other
            unit changes) or "half" (a half of fixed size: the guarantee is then for neighbouring
            sets of members).
        micro_batch_size: rows in memory at a time; the result does not depend on it.
        precision: "bf16" runs forward and backward under autocast; clipped sums, noise and
            restoration stay in float32.
        eval_every, eval_examples: how often, and on how many validation examples at most.
        generate, num_beams, max_new_tokens: whether the last evaluation of a generation task
            writes text (BLEU, ROUGE-L), and how.
        snapshot_every: steps between snapshots, from which a killed run resumes.
        seed: the seed of all random numbers, the noise included. Anyone who knows the seed can
            reproduce the noise. None draws a seed from the operating system.
        secure_rng: samples and noise from ``rng.SecureRandom``, a cryptographic generator. On the
            CPU they come from it anyway, unless there is a seed; on CUDA the noise is then drawn on
            the CPU and copied, which is slower than torch's generator there.
        compile: forward and backward as one graph of ``torch.compile``: a minute or more before the
            first step, and each step faster. Without dropout or shard. Another process's graph may
            round otherwise, so that steps lost with a killed run are drawn, and counted, again.
        shard: split weights, optimizer state and sums over the processes (FSDP2), for a model that
            one device can't hold; under torchrun only.
        device: "cpu" or "cuda".
    """

    model: str = "minilm"
    task: str = "sst2"
    method: str = "full"
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    non_private: bool = False
    max_grad_norm: float = 1.0
    unit: str = "example"
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    prompt_column: str | None = None
    target_column: str | None = None
    group_column: str | None = None
    steps: int = 50
    batch_size: int = 512
    optimizer: str = "adam"
    learning_rate: float = 1e-4
    beta1: float | None = None
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    scheme: str = "none"
    scheme_options: Mapping[str, Any] = field(default_factory=dict)
    below: str = "keep"
    restore_method: str = "fast"
    momentum_beta: float | None = None
    filter_b: tuple[float, ...] = ()
    filter_a: tuple[float, ...] = ()
    diagnostic: bool = False
    rank: int = 8
    lora_alpha: float | None = None
    lora_init: str = "peft"
    target_modules: tuple[str, ...] = ()
    train_embeddings: bool = False
    train_layers: int | str | None = None
    dropout: bool = False
    max_examples: int | None = None
    data_seed: int = 0
    max_length: int | None = None
    padding: str = "longest"
    holdout: int = 0
    membership: str = "all"
    micro_batch_size: int = 64
    precision: str = "float32"
    eval_every: int = 10
    eval_examples: int = 1000
    generate: bool = True
    num_beams: int = 1
    max_new_tokens: int = 64
    snapshot_every: int = 10
    seed: int | None = None
    secure_rng: bool = False
    compile: bool = False
    shard: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, options in (
            ("method", METHODS),
            ("unit", ("example", "group")),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("scheme", SCHEMES),
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
            check_arguments(self.scheme, **self.restoration)
        if self.momentum_beta is not None and self.filter_b:
            raise ValueError("momentum_beta and filter_b must not both be given")
        if self.filter_a and not self.filter_b:
            raise ValueError("filter_a must come with filter_b")
        averaged = self.low_pass is not None  # which checks its coefficients
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
        """The running mean that takes the place of each noisy gradient, before its first input."""
        if self.momentum_beta is not None:
            return exponential_average(self.momentum_beta)
        return LowPassFilter(b=self.filter_b, a=self.filter_a) if self.filter_b else None

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
        """The configuration in JSON's own types."""
        return artifacts.plain(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TrainConfig:
        """What :meth:`as_json` gave; ``ValueError`` on unknown fields and on other types."""
        if not isinstance(document, Mapping):
            _validate.fail("configuration", "a JSON object", type(document).__name__)
        for name in document:
            _validate.choice("field of the configuration", name, [f.name for f in fields(cls)])
        return artifacts.typed("configuration", dict(document), cls)

    def differences(self, other: TrainConfig) -> list[str]:
        """``field: here / there`` for each field that differs."""
        mine, theirs = self.as_json(), other.as_json()
        return [
            f"{name}: {mine[name]!r} / {theirs[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        ]
