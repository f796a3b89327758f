"""Claim: a plan predicts from public text the alignment of the private task's noisy gradients.

The plan of :mod:`lowrank_dp.plan` reads only the singular values of public gradients and the noise
level. This experiment compares the predicted alignment with the measured alignment of a task's own
noisy gradients, at the same weights except for the head. Predictions from the task's own singular
values separate the error of random-matrix theory from the error of the public text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import GradientConfig, add_noise, prepare
from lowrank_dp.experiments.scheme_scores import cosine, measure_schemes
from lowrank_dp.mechanism import NON_PRIVATE
from lowrank_dp.plan import predict_alignment, predict_spectrum
from lowrank_dp.plan.making import SCHEMES

VALUES = ("one vector", "mean")
CAPTION = (
    "Alignment with the clean gradient of each scheme, measured on the task's own noisy gradients "
    "against predicted from singular values alone: those of public text, as python -m "
    "lowrank_dp.plan has them, and the task's own, which leaves the error of random-matrix theory. "
    "Above: all matrices as one vector; below: mean over matrices. Models are cold, or trained for "
    "a few steps on the text that is measured. NON-PRIVATE: a diagnosis."
)


@dataclass(frozen=True)
class Config:
    """Texts, points and noise levels of the comparison.

    Attributes:
        gradients: model, task and clipping. The loss and the steps of the warm-up are replaced.
        public: names of tasks whose text is public.
        warm_steps: numbers of warm-up steps on the measured text; 0 means no warm-up.
        batch_size: number of examples in a gradient sum.
        noise_multipliers: values of sigma, relative to the clipping norm.
        noise_seeds: number of noise draws over which the measured alignment is averaged.
    """

    gradients: GradientConfig = field(default_factory=GradientConfig)
    public: tuple[str, ...] = ("generated", "cola")
    warm_steps: tuple[int, ...] = (0, 40)
    batch_size: int = 1024
    noise_multipliers: tuple[float, ...] = (0.3, 0.6, 1.2)
    noise_seeds: int = 2


# trial of one minute on generated text, with a model that needs no download
SMALL = Config(
    GradientConfig(model="tiny", task="generated"),
    public=("generated",),
    warm_steps=(0, 20),
    batch_size=256,
)


@dataclass(frozen=True)
class Result:
    """Predicted and measured alignment, in [-1, 1]; the last axis is ``VALUES``.

    ``predicted`` is (texts, points, noise levels, schemes, 2); the last text is the task itself.
    ``measured`` is (points, noise levels, noise seeds, schemes, 2).
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    losses: np.ndarray  # (texts, points)
    texts: tuple[str, ...]
    schemes: tuple[str, ...]
    predicted: np.ndarray
    measured: np.ndarray


def run(config: Config) -> Result:
    """Predict on every text, and measure on the task.

    Raises ValueError if ``noise_seeds`` is below 1, and in the cases of
    :func:`lowrank_dp.experiments.gradients.prepare`.
    """
    seeds = _validate.integer("noise_seeds", config.noise_seeds)
    texts = (*config.public, config.gradients.task)
    points, levels = len(config.warm_steps), len(config.noise_multipliers)
    predicted = np.zeros((len(texts), points, levels, len(SCHEMES), len(VALUES)))
    measured = np.zeros((points, levels, seeds, len(SCHEMES), len(VALUES)))
    losses = np.zeros((len(texts), points))
    description = ""
    for i, text in enumerate(texts):
        own = i == len(texts) - 1
        for j, steps in enumerate(config.warm_steps):
            source = prepare(_at(config.gradients, text, steps, own=own), config.batch_size)
            losses[i, j] = source.loss
            clean = source.nested_sums([config.batch_size])[config.batch_size]
            predicted[i, j] = _predicted(config, clean)
            if own:
                measured[j] = _measured(config, clean)
                description = source.description
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        description=description,
        losses=losses,
        texts=texts,
        schemes=tuple(SCHEMES),
        predicted=predicted,
        measured=measured,
    )


def _at(gradients: GradientConfig, text: str, steps: int, *, own: bool) -> GradientConfig:
    """Return the configuration of one text after ``steps`` steps of the warm-up.

    All texts share the seed of the head. Public text that has the task's name is its validation
    split.
    """
    split = "validation" if text == gradients.task and not own else gradients.split
    return replace(
        gradients,
        task=text,
        split=split,
        warm_loss=1e-6 if steps else None,
        max_warm_steps=max(steps, 1),
    )


def _predicted(config: Config, clean: Mapping[str, Tensor]) -> np.ndarray:
    """Predict the alignment of every scheme from singular values: (noise levels, schemes, 2)."""
    values = {name: torch.linalg.svdvals(matrix) for name, matrix in clean.items()}
    found = []
    for sigma in config.noise_multipliers:
        spectra = [
            predict_spectrum(
                values[name],
                (matrix.shape[0], matrix.shape[1]),
                sigma * config.gradients.max_grad_norm,
            )
            for name, matrix in clean.items()
        ]
        found.append([(a.one_vector, a.mean) for a in predict_alignment(spectra, SCHEMES)])
    return np.array(found)


def _measured(config: Config, clean: Mapping[str, Tensor]) -> np.ndarray:
    """Measure the alignment of every scheme: (noise levels, noise seeds, schemes, 2)."""
    names = [name for name, matrix in clean.items() if bool(matrix.any())]
    found = np.zeros((len(config.noise_multipliers), config.noise_seeds, len(SCHEMES), 2))
    for i, seed in progress([*np.ndindex(found.shape[:2])], "schemes"):
        noise_std = config.noise_multipliers[i] * config.gradients.max_grad_norm
        noisy = add_noise(dict(clean), noise_std, config.gradients.seed + seed)
        products = np.stack(
            [
                measure_schemes(noisy[name], clean[name], noise_std, SCHEMES.values())[0]
                for name in names
            ]
        )
        found[i, seed, :, 0] = cosine(products.sum(0))
        found[i, seed, :, 1] = cosine(products).mean(0)
    return found


def errors(result: Result) -> np.ndarray:
    """Return predicted minus mean measured alignment: (texts, points, levels, schemes, 2)."""
    return result.predicted - result.measured.mean(axis=2)


def headline(result: Result) -> dict[str, str]:
    """Summarise: mean and largest error of the prediction from every text."""
    return {
        f"error of predicted alignment, {value}, {_named(result, i)}": (
            f"mean {found[..., k].mean():.3f}, largest {found[..., k].max():.3f}"
        )
        for i, found in enumerate(np.abs(errors(result)))
        for k, value in enumerate(VALUES)
    }


def _named(result: Result, i: int) -> str:
    own = i == len(result.texts) - 1
    return f"{result.texts[i]} itself (NON-PRIVATE)" if own else f"public {result.texts[i]}"


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate measured and predicted alignment, one row per point, noise level and scheme."""
    columns = ["warm-up steps", "noise multiplier", "scheme"]
    for value in VALUES:
        columns.append(f"{value}: measured")
        columns += [f"{value}: by {_named(result, i)}" for i in range(len(result.texts))]
    return columns, [*_rows(result)]


def _rows(result: Result) -> Iterator[list[str]]:
    for j, steps in enumerate(result.config.warm_steps):
        for level, sigma in enumerate(result.config.noise_multipliers):
            for k, scheme in enumerate(result.schemes):
                cells = [str(steps), f"{sigma:g}", scheme]
                for v in range(len(VALUES)):
                    cells.append(f"{result.measured[j, level, :, k, v].mean():.3f}")
                    cells += [f"{p:.3f}" for p in result.predicted[:, j, level, k, v]]
                yield cells
