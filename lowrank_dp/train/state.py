"""State of a run between two steps, and the packing of this state into a snapshot.

A snapshot holds the trained parameters, the optimizer's state, the running means, DiSK's last
movement, the scales and moments of a preconditioner, the states of all generators, and the curve so
far. A snapshot holds no gradient, no clean sum and no record. The generator states could undo the
noise, which is why snapshots are readable by their owner only and are removed once the run is
finished.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_dp._json import json_digest
from lowrank_dp.precondition import NoisyMoments
from lowrank_dp.restore import GradientRestorer
from lowrank_dp.rng import (
    Generator,
    SecureRandom,
    derive_seed,
    generator_at,
    os_seeded_generator,
    state_of,
)
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.identity import changed, not_repeatable, versions_and_machine
from lowrank_dp.train.look_ahead import LookAhead
from lowrank_dp.train.preconditioning import load_snapshot_tensors, snapshot_tensors
from lowrank_dp.train.processes import world_size
from lowrank_dp.train.setup import Setup

if TYPE_CHECKING:
    from lowrank_dp.train.checks import StepChecks


_RUNNING_MEANS = "low_pass."  # prefix of the restorer's tensors in a snapshot
_MOVEMENT = "movement."  # prefix of the look-ahead's tensors in a snapshot


@dataclass
class State:
    """Mutable part of a run.

    Attributes:
        step: number of steps taken.
        stream: name of the unbroken sequence of random draws that sampler and noise belong to.
        sampler: generator of the Poisson samples, on the CPU.
        noise: generator of the DP noise, on the model's device.
        mask_key: key of the dropout masks. A run without a seed keeps the key as secret as its
            noise: one record more shifts the masks of the other records, so that known masks would
            reveal the record.
        restorer: restorer of the noisy gradients, with their running means if the run has a filter.
        look_ahead: look-ahead of DiSK, with the last movement of the weights.
        curve: evaluations so far.
        seconds, restore_seconds: wall-clock time spent in steps, and the part spent restoring.
        restarted: why the stream differs from the snapshot's, in words; empty if the streams
            are the same.
        noisy_moments: second moments for a preconditioner from noisy sums; None for other runs.
        checks: privacy checks of this process's steps, or None; not in a snapshot.
    """

    step: int
    stream: str
    sampler: Generator
    noise: Generator
    mask_key: bytes
    restorer: GradientRestorer
    look_ahead: LookAhead
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    restore_seconds: float = 0.0
    restarted: str = ""
    noisy_moments: NoisyMoments | None = None
    checks: StepChecks | None = None


def first_state(config: TrainConfig, stream: str) -> State:
    """Return the state of a run before its first step, at the start of a stream of draws."""
    restorer = GradientRestorer(config.scheme, low_pass=config.low_pass, **config.restoration)
    look_ahead = LookAhead(config.look_ahead)
    moments = NoisyMoments() if config.precondition == "noisy" else None
    drawn = *fresh_generators(config, stream), _fresh_mask_key(config, stream)
    return State(0, stream, *drawn, restorer, look_ahead, noisy_moments=moments)


def environment(device: str) -> dict[str, str]:
    """Return the version and device that decide the draws from a generator's state.

    The result is a part of a stream's name.
    """
    several = {"processes": str(world_size())} if world_size() > 1 else {}
    return {"torch": torch.__version__, "device": torch.device(device).type, **several}


def identity(setup: Setup) -> dict[str, str]:
    """Return everything that a run's sums and the draws from a generator's state depend on."""
    device = setup.config.device
    size = str(setup.config.micro_batch_size)  # decides the order of additions
    return {
        **setup.digests,
        **versions_and_machine(device),
        **environment(device),
        "micro_batch_size": size,
    }


def digest_of_identity(setup: Setup) -> str:
    """Return a digest of :func:`identity`."""
    return json_digest(identity(setup))[:32]


def digest_of_draws(state: State) -> str:
    """Return a digest of the noise generator's state; the state itself stays secret."""
    return hashlib.sha256(state_of(state.noise).numpy().tobytes()).hexdigest()[:32]


def fresh_generators(config: TrainConfig, stream: str) -> tuple[Generator, Generator]:
    """Return the sampler and the noise generator of a new stream."""
    if config.seed is None:
        on_cpu = config.secure_rng or torch.device(config.device).type == "cpu"
        return SecureRandom(), SecureRandom() if on_cpu else os_seeded_generator(config.device)
    return (
        torch.Generator().manual_seed(derive_seed(config.seed, f"sampler {stream}")),
        torch.Generator(config.device).manual_seed(derive_seed(config.seed, f"noise {stream}")),
    )


def _fresh_mask_key(config: TrainConfig, stream: str) -> bytes:
    """Return the key of the dropout masks of a new stream."""
    return os.urandom(32) if config.seed is None else f"{config.seed} {stream}".encode()


def pack(setup: Setup, state: State) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON and the tensors of a snapshot; all ranks of a sharded model must call."""
    tensors = {f"parameter.{name}": p.detach() for name, p in setup.trained.items()}
    tensors |= snapshot_tensors(setup.model, state.noisy_moments)
    for index, entry in setup.optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{index}.{key}": value
            for key, value in entry.items()
            if isinstance(value, Tensor)
        }
    tensors |= {f"{_MOVEMENT}{name}": moved for name, moved in state.look_ahead.movement.items()}
    tensors = setup.layout.full_tensors(tensors) | setup.layout.gather(
        {f"{_RUNNING_MEANS}{name}": value for name, value in state.restorer.tensors().items()}
    )
    tensors["generator.mask_key"] = torch.frombuffer(bytearray(state.mask_key), dtype=torch.uint8)
    for name, generator in (("sampler", state.sampler), ("noise", state.noise)):
        tensors[f"generator.{name}"] = state_of(generator)
    return summary(setup, state), tensors


def summary(setup: Setup, state: State) -> dict[str, Any]:
    """Return the JSON of a snapshot."""
    return {
        "config": setup.config.as_json(),
        "seed": setup.seed,
        "data": setup.data_fingerprint,
        "identity": identity(setup),
        "stream": state.stream,
        "step": state.step,
        "curve": state.curve,
        "seconds": state.seconds,
        "restore_seconds": state.restore_seconds,
    }


def unpack(setup: Setup, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> State:
    """Put a snapshot's weights and optimizer state into ``setup``, and return its :class:`State`.

    Two sums that are released with the same noise reveal their difference, even if they differ only
    in rounding. If the identity of ``setup`` differs from the snapshot's, a new stream is therefore
    started, whose releases count in addition to the old releases.

    Args:
        setup: as loaded, before any step.
        document, tensors: JSON and tensors of the snapshot. A run that has not begun has no
            tensors, and leaves ``setup`` as it is.

    Raises:
        ValueError: if the training records differ from those that the run began with.
    """
    if document["data"] != setup.data_fingerprint:
        raise ValueError(
            f"training records of {setup.task.name} are not those that the run began "
            "with: give it the same data, or start afresh in another folder"
        )
    state = first_state(setup.config, document["stream"])
    state.step, state.curve = document["step"], list(document["curve"])
    state.seconds, state.restore_seconds = document["seconds"], document["restore_seconds"]
    state.restorer.load_tensors(
        {
            name.removeprefix(_RUNNING_MEANS): tensor
            for name, tensor in tensors.items()
            if name.startswith(_RUNNING_MEANS)
        },
        {name: p for name, p in setup.trained.items() if setup.layout.owns(name)},
    )
    if not tensors:
        return state
    state.look_ahead.movement = {
        name.removeprefix(_MOVEMENT): tensor.to(setup.config.device)
        for name, tensor in tensors.items()
        if name.startswith(_MOVEMENT)
    }
    _load_weights(setup, tensors)
    load_snapshot_tensors(setup.model, state.noisy_moments, tensors)
    here = identity(setup)
    differences, attempt = changed(document["identity"], here), ""
    if reason := not_repeatable(setup.config):  # two resumptions then need two names
        differences.append(reason)
        attempt = f"{derive_seed(None, 'attempt')}"
    if differences:
        state.restarted = "; ".join(differences)
        state.stream = new_stream(setup.config, state.step, f"{document} {here} {attempt}")
        state.sampler, state.noise = fresh_generators(setup.config, state.stream)
        state.mask_key = _fresh_mask_key(setup.config, state.stream)
        return state
    if "generator.noise" in tensors:  # on rank 0 only, which draws
        state.sampler = generator_at(state.sampler, tensors["generator.sampler"])
        state.noise = generator_at(state.noise, tensors["generator.noise"])
        state.mask_key = tensors["generator.mask_key"].numpy().tobytes()
    return state


def _load_weights(setup: Setup, tensors: Mapping[str, Tensor]) -> None:
    """Put a snapshot's parameters and optimizer state in place, in the run's layout."""
    with torch.no_grad():
        for name, p in setup.trained.items():
            p.copy_(setup.layout.distribute(tensors[f"parameter.{name}"], p))
    parameters = [p for group in setup.optimizer.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, entry = key.split(".", 2)
            entries.setdefault(int(index), {})[entry] = setup.layout.distribute(
                tensor, parameters[int(index)]
            )
    groups = setup.optimizer.state_dict()["param_groups"]
    setup.optimizer.load_state_dict({"state": entries, "param_groups": groups})


def new_stream(config: TrainConfig, step: int, resumed: str = "") -> str:
    """Return the name of the draws that begin at ``step``; different draws differ in name.

    Args:
        config: configuration of the run. Without a seed, the name is random.
        step: number of the step, from 0.
        resumed: text that distinguishes this resumption from others; the name of a seeded run
            contains a hash of the text.
    """
    if config.seed is None:
        return f"{derive_seed(None, 'stream'):016x}"
    name = f"seed {config.seed} from step {step} on {environment(config.device)}"
    if not resumed:
        return name
    return f"{name}, resumed {hashlib.sha256(resumed.encode()).hexdigest()[:16]}"
