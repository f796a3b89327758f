"""Choices and checks of a training configuration; importable without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lowrank_dp import _validate
from lowrank_dp.lora.names import NOISE_KINDS
from lowrank_dp.membership.units import MEMBERSHIPS
from lowrank_dp.models.names import METHODS, PADDINGS
from lowrank_dp.restore.names import NON_PRIVATE_SCHEMES, SCHEME_NAMES

if TYPE_CHECKING:
    from lowrank_dp.train.config import TrainConfig

OPTIMIZERS = ("sgd", "adam", "adamw", "adam-bc", "muon", "muon-bc")
_READ_NOISE = ("adam-bc", "muon-bc")  # optimizers that need the noise level of their gradients
_NEED_WHOLE = ("muon", "muon-bc")  # optimizers that need whole matrices, not shards
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
PRECISIONS = ("float32", "bf16")
PRECONDITIONERS = ("none", "generated", "noisy")  # or the name or path of a public task
IMPLICIT_NOISES = ("none", *NOISE_KINDS)
PREFIX_DTYPES = ("float32", "bf16")
# fields of which a configuration sets exactly one
PRIVACY = ("epsilon", "noise_multiplier", "non_private", "noise_free")
# fields that do not change the result: runs that differ in these fields only are the same run
INCIDENTAL = ("prefix_cache", "prefix_gigabytes")
# fields that a resumed run may change; another micro_batch_size changes the rounding of sums, so
# that the run continues with new noise
RESUMABLE = (*INCIDENTAL, "micro_batch_size")
MOST = 2**63 - 1  # the largest integer that torch takes
MOST_RANK = 2**16
MOST_REAL = 1e20  # largest real option; MOST_REAL * MOST_NOISE, also in sums, fits a float32
_LEAST_GAIN = 1e-6  # smallest gain of DiSK, whose look-ahead is about 1 / gain movements long
MOST_NOISE = 1e9  # largest noise multiplier, as in GaussianMechanism.calibrate


def check_config(config: TrainConfig) -> None:
    """Raise ValueError for a value out of its range, and for values that exclude each other."""
    _check_choices_and_ranges(config)
    _check_privacy(config)
    _check_restoration(config)
    _check_preconditioner(config)
    _check_optimizer(config)
    _check_implicit_noise(config)
    _check_that_fields_are_read(config)


def _check_choices_and_ranges(config: TrainConfig) -> None:
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
        ("prefix_dtype", PREFIX_DTYPES),
        ("implicit_noise", IMPLICIT_NOISES),
    ):
        _validate.choice(name, getattr(config, name), options)
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
        "precondition_rows",
        "precondition_steps",
        "precondition_every",
    ):
        _validate.integer(
            name,
            getattr(config, name),
            high={"rank": MOST_RANK, "num_beams": 1000}.get(name, MOST),
        )
    for name, low in (("max_examples", 2), ("max_length", 1), ("seed", 0)):
        if getattr(config, name) is not None:
            _validate.integer(name, getattr(config, name), low=low, high=MOST)
    _validate.integer("data_seed", config.data_seed, low=0, high=MOST)
    _validate.integer("holdout", config.holdout, low=0, high=MOST)
    _validate.integer("warmup_steps", config.warmup_steps, low=0, high=config.steps)
    if config.warmup_steps and config.schedule == "constant":
        raise ValueError(
            "warmup_steps must be 0 with schedule 'constant'; use "
            "'constant_with_warmup', 'linear' or 'cosine'"
        )
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", config.device):
        _validate.fail("device", "cpu, cuda or cuda:N", config.device)
    _validate.positive("learning_rate", config.learning_rate)
    _validate.positive("prefix_gigabytes", config.prefix_gigabytes)
    _validate.real("weight_decay", config.weight_decay, low=0, high=MOST_REAL)
    if config.beta1 is not None:
        _validate.real("beta1", config.beta1, low=0, high=1, high_open=True)
    for name in ("dropout", "shard"):
        if config.compile and getattr(config, name):
            raise ValueError(f"compile must go without {name}")


def given_privacy(fields: Mapping[str, Any]) -> list[str]:
    """Return the names in ``PRIVACY`` that ``fields`` sets: to a number, even 0, or to True."""
    return [name for name in PRIVACY if not (fields.get(name) is None or fields[name] is False)]


def _check_privacy(config: TrainConfig) -> None:
    given = given_privacy(vars(config))
    if len(given) != 1:
        raise ValueError(
            "exactly one of epsilon, noise_multiplier, non_private and noise_free must be "
            f"given, got {' and '.join(given) or 'none of them'}"
        )
    if config.epsilon is not None:
        _validate.positive("epsilon", config.epsilon)
    if config.noise_multiplier is not None:
        _validate.real(
            "noise_multiplier", config.noise_multiplier, low=0, low_open=True, high=MOST_NOISE
        )
    if config.delta is not None:
        _validate.real("delta", config.delta, low=0, high=1, low_open=True, high_open=True)
    _validate.real("max_grad_norm", config.max_grad_norm, low=1 / MOST_REAL, high=MOST_REAL)
    if config.secure_rng and (config.seed is not None or not config.adds_noise):
        raise ValueError(
            "secure_rng must go without a seed, which would make the noise "
            "reproducible, and without non_private and noise_free, which draw no noise"
        )


def _check_restoration(config: TrainConfig) -> None:
    if config.scheme in NON_PRIVATE_SCHEMES and not config.diagnostic:
        raise ValueError(
            f"scheme {config.scheme!r} reads clean gradients, so the run would not "
            "be private: choose another, or mark the run with diagnostic"
        )
    if (
        config.diagnostic
        and config.scheme not in NON_PRIVATE_SCHEMES
        and not _preconditioned_by_own_task(config)
    ):
        raise ValueError(
            "diagnostic must go with a scheme that reads clean gradients "
            f"({', '.join(NON_PRIVATE_SCHEMES)}) or a preconditioner from the private task, got "
            f"{config.scheme!r}"
        )
    if not config.adds_noise and config.scheme != "none":
        raise ValueError(
            f"scheme must be 'none' without noise, got {config.scheme!r}: there is "
            "nothing to restore"
        )
    if config.scheme in ("none", *NON_PRIVATE_SCHEMES) and config.scheme_options:
        raise ValueError(
            f"scheme {config.scheme!r} takes no options, got {', '.join(config.scheme_options)}"
        )
    for name in ("noisy", "noise_std", "scheme", "method", "below"):
        if name in config.scheme_options:
            raise ValueError(f"scheme_options must hold the scheme's own options, got {name!r}")
    if config.scheme not in ("none", *NON_PRIVATE_SCHEMES):
        from lowrank_dp.restore import check_arguments  # imports torch

        check_arguments(config.scheme, **config.restoration)
    filters = {
        "momentum_beta": config.momentum_beta is not None,
        "filter_b": bool(config.filter_b),
        "disk_kappa": config.disk_kappa is not None,
    }
    given = [name for name, present in filters.items() if present]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} must not both be given")
    if config.filter_a and not config.filter_b:
        raise ValueError("filter_a must come with filter_b")
    if config.disk_kappa is not None:
        _validate.real("disk_kappa", config.disk_kappa, low=_LEAST_GAIN, high=1)
    averaged = config.low_pass is not None  # the filter checks its coefficients
    for coefficient in (*config.filter_b, *config.filter_a):
        if coefficient:
            _validate.real(
                "the size of a filter's coefficient",
                abs(coefficient),
                low=1 / MOST_REAL,
                high=MOST_REAL,
            )
    if averaged and config.disk_kappa is None and config.beta1:
        raise ValueError(
            f"beta1 must be 0 or left out with a running mean of gradients, got {config.beta1:g}"
        )


def _check_preconditioner(config: TrainConfig) -> None:
    _validate.real("precondition_power", config.precondition_power, low=0, high=0.5)
    _validate.positive("precondition_rate", config.precondition_rate)
    if config.precondition == "noisy":
        if config.shard or config.low_pass is not None:
            raise ValueError(
                "precondition 'noisy' must go without shard and without a running mean of "
                "gradients: after an update of the scales, the noise of a running mean would "
                "differ from entry to entry"
            )
        if config.optimizer not in ("sgd", "adam", "adamw"):
            raise ValueError(
                "precondition 'noisy' must go with optimizer sgd, adam or adamw, whose momentum "
                f"can be rescaled to new scales, got {config.optimizer!r}"
            )
    elif config.precondition not in PRECONDITIONERS:
        from lowrank_dp.data.tasks import TASKS, known_name

        if not config.precondition:
            raise ValueError("precondition must be a name or a path, got an empty text")
        path = _validate.expanded("precondition", config.precondition)
        if not known_name(config.precondition) and not path.exists():
            _validate.choice(
                "precondition",
                config.precondition,
                dict.fromkeys((*PRECONDITIONERS, *TASKS, "an existing path")),
            )
        if _preconditioned_by_own_task(config) and not config.diagnostic:
            raise ValueError(
                f"precondition must name a public task, got the private one ({config.task}): "
                "choose another, or mark the run with diagnostic"
            )


def _preconditioned_by_own_task(config: TrainConfig) -> bool:
    """Return whether the preconditioner's moments come from the private task."""
    if config.precondition in PRECONDITIONERS:
        return False
    return is_same_task(config.precondition, config.task)


def is_same_task(one: str, other: str) -> bool:
    """Return whether two names or paths denote the same task."""
    from lowrank_dp.data.tasks import known_name

    known = known_name(one)
    if known or known_name(other):
        return known == known_name(other)
    first, second = (_validate.expanded("task or public task", name) for name in (one, other))
    return first.resolve() == second.resolve()


def _check_optimizer(config: TrainConfig) -> None:
    _validate.positive("noise_floor", config.noise_floor)
    if config.optimizer in _READ_NOISE and config.scheme != "none":
        raise ValueError(
            f"optimizer {config.optimizer!r} must go with scheme 'none', got {config.scheme!r}: "
            "the noise that is left in a restored matrix is not known"
        )
    if config.optimizer == "muon-bc" and config.low_pass is not None and config.averaging > 0:
        raise ValueError(
            "optimizer 'muon-bc' on a running mean of gradients must go with beta1 0, got "
            f"{config.averaging:g}: the noise of a second average of correlated noise is not known"
        )
    if not config.shard:
        return
    averaged = config.low_pass is not None
    for name, refused in (
        (f"optimizer {config.optimizer!r}, which needs whole matrices", _NEED_WHOLE),
        (f"optimizer {config.optimizer!r} on a running mean", _READ_NOISE if averaged else ()),
    ):
        if config.optimizer in refused:
            raise ValueError(f"shard must go without {name}")
    for field in ("disk_kappa", "skip_zeros"):
        if getattr(config, field):
            raise ValueError(f"shard must go without {field}")


def _check_implicit_noise(config: TrainConfig) -> None:
    if config.implicit_noise == "none":
        return
    asked = f"implicit_noise {config.implicit_noise!r}"
    if config.method != "full":
        raise ValueError(
            f"{asked} must go with method 'full', got {config.method!r}: LoRA's own gradient "
            "already has this noise"
        )
    if not config.non_private:
        raise ValueError(
            f"{asked} must go with non_private: the noise depends on the gradient, and is no "
            "privacy mechanism"
        )
    if config.shard:
        raise ValueError(f"shard must go without {asked}, which needs whole matrices")
    if config.precondition != "none":
        raise ValueError(f"{asked} must go without a preconditioner, which scales the matrices")


def _check_that_fields_are_read(config: TrainConfig) -> None:
    """Raise ValueError for a field that differs from its default and that the run does not read.

    Shadow models and timed steps turn ``generate`` off in the configuration of another run, and
    full fine-tuning and LoRA share a base configuration with ``lora_init``, so that these fields
    and the options of the text generation are not checked.
    """
    lora, implicit = config.method != "full", config.implicit_noise != "none"
    noisy, public = config.precondition == "noisy", config.precondition not in ("none", "noisy")
    defaults = {field.name: field.default for field in fields(config)}
    for names, is_read, reader in (
        (("below", "restore_method"), config.scheme != "none", "a scheme"),
        (("noise_floor",), config.optimizer == "adam-bc", "optimizer 'adam-bc'"),
        (("rank",), lora or implicit, "method 'lora' or 'lora-frozen-a', or with implicit_noise"),
        (
            ("target_modules",),
            lora or implicit,
            "method 'lora' or 'lora-frozen-a', or with implicit_noise: method 'full' adapts no "
            "layer (train_layers chooses the trained layers)",
        ),
        (("lora_alpha",), lora, "method 'lora' or 'lora-frozen-a'"),
        (
            ("precondition_power", "precondition_freeze_vectors"),
            noisy or public,
            "a preconditioner: give precondition too",
        ),
        (
            ("precondition_rows", "precondition_steps", "precondition_rate"),
            public,
            "a preconditioner from public text",
        ),
        (("precondition_every",), noisy, "precondition 'noisy'"),
    ):
        for name in names:
            if not is_read and getattr(config, name) != defaults[name]:
                raise ValueError(f"{name} must go with {reader}")
