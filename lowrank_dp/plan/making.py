"""Plan of a private run, computed from the configuration, public text and the noise level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_dp._terminal import progress
from lowrank_dp.data import Task
from lowrank_dp.mechanism import NO_RECORDS, NON_PRIVATE, GaussianMechanism
from lowrank_dp.plan.alignment import (
    NoisySpectrum,
    SchemeAlignment,
    predict_alignment,
    predict_spectrum,
)
from lowrank_dp.plan.curvature import StepGain, step_gain
from lowrank_dp.plan.public_text import PublicText, is_compared, load_public_text
from lowrank_dp.plan.request import Measurement
from lowrank_dp.plan.trials import Gap, measure_gap
from lowrank_dp.restore.names import NON_PRIVATE_SCHEMES
from lowrank_dp.spectrum.random_matrix import bulk_edge
from lowrank_dp.train.claims import statement_of
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.records import select_units
from lowrank_dp.train.setup import make_mechanism

# label -> scheme and options
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "noisy": ("none", {}),
    "truncate(8)": ("truncate", {"k": 8}),
    "power(3)": ("power", {}),
    "hard": ("hard", {}),
    "soft": ("soft", {}),
    "partial(0.5)": ("partial", {}),
    "denoise": ("denoise", {}),
    "optimal": ("optimal", {}),
    "optimal, zeroed": ("optimal", {"below": "zero"}),
}
CURVATURE_ROWS = 128  # number of public rows on which the curvature is measured
_PART = 128  # rows per update of the progress bar


@dataclass(frozen=True)
class Layer:
    """Predicted spectrum of one matrix of a noisy gradient sum; singular values are absolute.

    Attributes:
        name: name of the trained matrix.
        shape: (m, n) of the matrix.
        edge: bulk edge of the noise.
        top_clean: largest singular value without noise.
        visible_rank: number of clean singular values that stand above the edge after noise is
            added.
        alignment_noisy: predicted cosine between the noisy and the clean gradient.
        alignment_optimal: predicted cosine between the gradient restored by the scheme
            ``optimal`` and the clean gradient.
    """

    name: str
    shape: tuple[int, int]
    edge: float
    top_clean: float
    visible_rank: int
    alignment_noisy: float
    alignment_optimal: float


@dataclass(frozen=True)
class Point:
    """Predictions at one point of a training run.

    Attributes:
        when: the point, in words, such as "first step".
        loss: mean loss of the measured rows, in nats.
        layers: prediction for each trained matrix, in the model's order.
        schemes: predicted alignment of each scheme.
        gain: loss decrease of a step along the clean gradient, with and without noise.
    """

    when: str
    loss: float
    layers: tuple[Layer, ...]
    schemes: tuple[SchemeAlignment, ...]
    gain: StepGain


@dataclass(frozen=True)
class Plan:
    """Plan of a private run: its noise, and the effect of the noise on gradients of public text.

    Attributes:
        privacy: sentence that says which data the measurements are computed from.
        statement: privacy statement of the planned run after its last step.
        description: the model and the measured text, in words; for a plan from public text, also
            which of its steps read the task's records.
        num_units: number of units of privacy that the run trains on.
        delta: delta of the guarantee.
        sample_rate: probability, in (0, 1], that a unit takes part in a step.
        noise_multiplier: sigma, relative to the clipping norm C.
        noise_std: standard deviation of the noise on an entry of the gradient sum, absolute.
        noise_std_of_mean: standard deviation of the noise on an entry of the mean gradient,
            absolute: ``noise_std / batch_size``.
        points: predictions at the first step, and after the short trainings if there are any.
        gap: predicted gap in steps between training with and without noise; None without short
            trainings.
    """

    privacy: str
    statement: str
    description: str
    num_units: int
    delta: float
    sample_rate: float
    noise_multiplier: float
    noise_std: float
    noise_std_of_mean: float
    points: tuple[Point, ...]
    gap: Gap | None


def make_plan(config: TrainConfig, measurement: Measurement | None = None) -> Plan:
    """Plan the run of ``config`` without spending privacy.

    The numbers of a plan from public text depend on the task's records through the number of units
    alone, which ``train`` treats as public too. The records are read all the same: their contents
    and labels choose the units as in ``train`` (``max_examples``, ``holdout``, ``membership``), and
    public text that is not generated is compared with the training texts, to refuse a copy. With
    ``own_records``, the plan reads gradients of the records and is NON-PRIVATE.

    Args:
        config: configuration of the run.
        measurement: measurements of the plan; default: ``Measurement()``.

    Raises:
        ValueError: if the run can't be made or has no noise, if the run's method is not predicted,
            or if the public text is missing or is the task's own text.
    """
    measurement = measurement or Measurement()
    if not config.adds_noise:
        raise ValueError(
            "non_private and noise_free must be False for a plan: a plan predicts effects of noise"
        )
    if config.precondition != "none":
        raise ValueError(
            f"precondition must be 'none' for a plan, got {config.precondition!r}: gradients of a "
            "preconditioned model are not predicted"
        )
    if config.dropout:
        raise ValueError("dropout must be False for a plan: effects of dropout are not predicted")
    if config.low_pass is not None:
        raise ValueError(
            "momentum_beta, filter_b and disk_kappa must be left out for a plan: the alignment of "
            "a running mean is not predicted"
        )
    if measurement.trial_steps and config.optimizer not in ("sgd", "adam", "adamw"):
        raise ValueError(
            "optimizer must be sgd, adam or adamw for a plan with short trainings, got "
            f"{config.optimizer!r}: the steps of another optimizer are not predicted; set "
            "trial_steps to 0"
        )
    seed = config.seed or 0
    task, _, members = select_units(config, seed)
    mechanism, delta = make_mechanism(config, sum(members))
    text = load_public_text(config, task, measurement.public, measurement.own_records, seed)
    size = config.batch_size
    schemes = SCHEMES | _own_scheme(config)
    points = [_point("first step", text, size, mechanism, measurement, schemes)]
    gap = None
    if measurement.trial_steps:
        gap = measure_gap(
            text,
            config.optimizer,
            mechanism.noise_std / size,
            config.max_grad_norm,
            steps=measurement.trial_steps,
            rows=measurement.trial_rows,
            seed=seed,
        )
        when = f"after {measurement.trial_steps} steps"
        points.append(_point(when, text, size, mechanism, measurement, schemes))
    return Plan(
        privacy=NON_PRIVATE if measurement.own_records else NO_RECORDS,
        statement=statement_of(
            config, mechanism, delta, config.steps, sum(members), task_name=task.name
        ),
        description=text.description + _records_read(task, measurement),
        num_units=sum(members),
        delta=delta,
        sample_rate=mechanism.sample_rate,
        noise_multiplier=mechanism.noise_multiplier,
        noise_std=mechanism.noise_std,
        noise_std_of_mean=mechanism.noise_std / size,
        points=tuple(points),
        gap=gap,
    )


def _records_read(task: Task, measurement: Measurement) -> str:
    """Return what the plan reads the task's records for, in words; empty for own records."""
    if measurement.own_records:
        return ""
    compared = is_compared(measurement.public)
    copies = ", and to refuse public text that is a copy of them" if compared else ""
    return (
        f"; the records of {task.name} are read to choose and count the units{copies}; the plan's "
        "numbers depend on them through this count alone"
    )


def _own_scheme(config: TrainConfig) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return label -> scheme and options of the run; empty if ``SCHEMES`` has the scheme."""
    if config.scheme == "none" or config.scheme in NON_PRIVATE_SCHEMES:
        return {}
    options = {"below": config.below, **config.scheme_options}
    if any(
        config.scheme == scheme and {"below": "keep"} | listed == options
        for scheme, listed in SCHEMES.values()
    ):
        return {}
    words = ", ".join(f"{name}={value}" for name, value in options.items())
    return {f"{config.scheme} ({words})": (config.scheme, options)}


def _point(
    when: str,
    text: PublicText,
    batch_size: int,
    mechanism: GaussianMechanism,
    measurement: Measurement,
    schemes: Mapping[str, tuple[str, dict[str, Any]]],
) -> Point:
    """Measure the gradients of the text at the present weights, and predict the noise's effect."""
    count = min(batch_size, measurement.public_rows, len(text.rows))
    mean = _mean_gradient(text, count, mechanism.max_grad_norm, when)
    spectra = {}
    for name in progress(text.matrices, f"spectra, {when}"):
        matrix = mean[name] * batch_size
        spectra[name] = predict_spectrum(
            torch.linalg.svdvals(matrix), (matrix.shape[0], matrix.shape[1]), mechanism.noise_std
        )
    rows = range(min(CURVATURE_ROWS, len(text.rows)))
    gain = step_gain(
        text.model,
        [*text.batches(rows)],
        text.kind,
        mean,
        mechanism.noise_std / batch_size,
    )
    return Point(
        when,
        text.loss(rows),
        tuple(_layer(name, spectrum) for name, spectrum in spectra.items()),
        tuple(predict_alignment(spectra.values(), schemes)),
        gain,
    )


def _mean_gradient(
    text: PublicText, count: int, max_grad_norm: float, when: str
) -> dict[str, Tensor]:
    """Return the mean of the clipped gradients of the first ``count`` rows, by parameter name."""
    total: dict[str, Tensor] = {}
    for start in progress(range(0, count, _PART), f"gradients, {when}"):
        part = text.clipped_sum(range(start, min(start + _PART, count)), max_grad_norm)
        total = {name: total[name] + part[name] if total else part[name] for name in part}
    return {name: value / count for name, value in total.items()}


def _layer(name: str, spectrum: NoisySpectrum) -> Layer:
    """Summarise the spectrum of one matrix; the alignment of a zero gradient is 0."""
    noisy = optimal = 0.0
    if spectrum.clean_norm > 0:
        found = predict_alignment([spectrum], {"noisy": ("none", {}), "optimal": ("optimal", {})})
        noisy, optimal = (scheme.one_vector for scheme in found)
    return Layer(
        name,
        spectrum.shape,
        bulk_edge(spectrum.shape, spectrum.noise_std),
        spectrum.top_clean,
        spectrum.visible_rank,
        noisy,
        optimal,
    )
