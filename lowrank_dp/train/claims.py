"""Privacy statement of a run in words: the claim, and every fact that weakens the claim."""

from __future__ import annotations

import torch

from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.restore.names import NON_PRIVATE_SCHEMES
from lowrank_dp.train.config import TrainConfig


def statement_of(
    config: TrainConfig,
    mechanism: GaussianMechanism,
    delta: float,
    releases: int,
    num_units: int,
    *,
    task_name: str,
    preconditioner: str = "",
) -> str:
    """State the privacy of a run that clips and adds noise.

    Args:
        config: configuration of the run.
        mechanism: mechanism of the run.
        delta: delta at which epsilon is stated, in (0, 1).
        releases: number of noisy sums that the run releases, >= 0.
        num_units: number of units of privacy that the run trains on, >= 1.
        task_name: name of the private task.
        preconditioner: source of the preconditioner's moments, in words; "" without one.
    """
    if config.diagnostic:
        return f"NON-PRIVATE: {_diagnosis(config, task_name)}, for diagnosis only"
    claim = mechanism.statement(releases, delta)
    if preconditioner:
        claim += f"; preconditioner from {preconditioner}"
    claim += f"; the number of {config.unit}s ({num_units:,}) is public"
    if config.membership == "half":
        claim += (
            f"; membership 'half': neighbours are sets of members, for one more {config.unit} in "
            "the data may change the whole half"
        )
    if config.holdout:
        claim += f"; {config.unit}s set aside by holdout are evaluated on, not protected"
    if delta * num_units >= 1:
        claim += (
            f"; delta is not below 1/N = {1 / num_units:.3g}: it allows publishing a whole record"
        )
    return f"{claim}; {source_of_noise(config)}"


def source_of_noise(config: TrainConfig) -> str:
    """State the source of the noise and of the samples, in words."""
    secure = "the cryptographic generator AES-128-CTR, keyed by the operating system"
    if config.seed is not None:
        return (
            f"noise drawn from seed {config.seed}, as the samples are: reproducible, and not secret"
        )
    if torch.device(config.device).type == "cpu" or config.secure_rng:
        return f"noise and samples from {secure}"
    return (
        f"samples from {secure}; noise from torch's Philox generator on the GPU, seeded with 63 "
        "random bits of the operating system: not cryptographic"
    )


def _diagnosis(config: TrainConfig, task_name: str) -> str:
    if config.scheme in NON_PRIVATE_SCHEMES:
        return f"scheme {config.scheme!r} reads clean gradients"
    return f"the preconditioner reads clean gradients of {task_name}, the private task"
