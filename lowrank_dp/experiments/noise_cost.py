"""Claim: noise costs a step little, because the loss is flat along the noise (ours).

The experiment takes one step along each of several directions: the clean sum, the noisy sum, the
noisy sum restored by each scheme, the part that each scheme removes, and the noise alone. A line
search on held-out training examples measures how far one step along a direction can lower the loss.
Hessian-vector products measure the curvature. NON-PRIVATE throughout.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowrank_dp import _validate
from lowrank_dp._json import json_digest
from lowrank_dp._terminal import progress
from lowrank_dp.artifacts import load_result, save_result
from lowrank_dp.artifacts.jsonable import to_jsonable
from lowrank_dp.experiments.gradients import (
    GradientSource,
    add_noise,
    load_source,
    spread_layers,
    warm_up,
)
from lowrank_dp.experiments.loss_surface import (
    Direction,
    LossSurface,
    line_search,
    make_surface,
    product,
    unit,
)
from lowrank_dp.experiments.noise_cost_configs import SMALL, Case, Config
from lowrank_dp.experiments.noise_cost_directions import (
    DIRECTIONS,
    LAYER_DIRECTIONS,
    ONCE,
    PER_DRAW,
    SCHEMES,
    once,
    per_draw,
)
from lowrank_dp.grads.clipping import clipped_sum_over
from lowrank_dp.mechanism import NON_PRIVATE

__all__ = ["CAPTION", "SMALL", "Case", "Config", "Result", "plan", "run"]
CAPTION = (
    "One step from the same weights along each direction, with all trained matrices as one vector; "
    "means over noise draws, with 95% t-intervals over warm-ups. The loss is that of held-out "
    "examples, each weighted by its clip factor. (a) Fall of the loss at the best step, relative "
    "to the fall along the noisy sum, on the warm model. (b) Curvature d'Hd along the direction, "
    "relative to the curvature along the clean sum. (c) Fall of the loss that the quadratic model "
    "predicts, (g'd)^2 / (2 d'Hd), against the fall that the line search finds; a point for each "
    "direction, stage, warm-up and draw. (d) As (a), with the direction restricted to one matrix, "
    "added up over the measured matrices. Factors below 0.01 count as 0.01; in the cells ≤ 0.01, "
    "every warm-up is below. The last column leaves out the settings and stages that have no "
    "quadratic model in some warm-up. NON-PRIVATE: computed from clean gradients and losses "
    "without noise."
)
MAX_DOUBLINGS = 3  # a line search covers 1/8 to 8 times the predicted step
STAGES = ("cold", "half-way", "warm")


@dataclass(frozen=True)
class Stage:
    """Measurement of one case, stage and warm-up; fields as in :class:`Result`."""

    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    layers: tuple[str, ...]
    loss: np.ndarray
    above: np.ndarray
    norm: np.ndarray
    cosine: np.ndarray
    slope: np.ndarray
    curvature: np.ndarray
    step: np.ndarray
    gain: np.ndarray
    layer_slope: np.ndarray
    layer_curvature: np.ndarray
    layer_gain: np.ndarray


@dataclass(frozen=True)
class Result:
    """Slope, curvature and best step along every direction, scaled to norm 1. NON-PRIVATE.

    The measured loss is the mean over held-out rows of ``a_i l_i``, with fixed clip factors
    ``a_i = min(1, C / |g_i|)``. The gradient of this loss is the mean of the clipped gradients, the
    direction of DP-SGD without noise. The loss without clip factors may rise along this direction.

    There are K cases, 3 stages, W warm-ups, N noise draws and D directions. Arrays are
    (K, 3, W, N, D) unless another shape is stated. Along a direction of zeros, all values are 0.

    - ``slope``: ``g'd`` in nats per unit.
    - ``curvature``: ``d'Hd`` in nats per unit squared.
    - ``step``: best step found, absolute; 0 if every step raises the loss.
    - ``gain``: decrease of the loss at the best step, in nats.
    - ``norm``: norm of the direction before scaling, absolute.
    - ``cosine``: cosine of the direction with the clean sum.
    - ``layer_*`` (K, 3, W, N', L, D'): the same for directions that are restricted to one of
      ``layers``; NaN if a case has fewer than L layers.
    - ``loss`` (K, 3, W): held-out loss in nats, without clip factors.
    - ``above`` (K, 3, W, N): number of trained matrices with a singular value above the bulk edge.
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    descriptions: tuple[str, ...]
    stages: tuple[str, ...]
    directions: tuple[str, ...]
    layer_directions: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    loss: np.ndarray
    above: np.ndarray
    norm: np.ndarray
    cosine: np.ndarray
    slope: np.ndarray
    curvature: np.ndarray
    step: np.ndarray
    gain: np.ndarray
    layer_slope: np.ndarray
    layer_curvature: np.ndarray
    layer_gain: np.ndarray

    @property
    def description(self) -> str:
        """Descriptions of all models and tasks."""
        return "; ".join(self.descriptions)

    @property
    def predicted(self) -> np.ndarray:
        """Predicted decrease of the loss in nats; NaN unless slope and curvature are above 0."""
        return predicted_gain(self.slope, self.curvature)

    def along(self, name: str, values: np.ndarray | None = None) -> np.ndarray:
        """Return ``values`` (default: ``gain``) of one direction: (K, 3, W, N)."""
        values = self.gain if values is None else values
        return values[..., self.directions.index(name)]


def predicted_gain(slope: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """Return ``slope^2 / (2 curvature)``, NaN unless both are above 0."""
    usable = (slope > 0) & (curvature > 0)
    return np.where(usable, slope**2 / (2 * np.where(usable, curvature, 1.0)), np.nan)


def plan(config: Config) -> str:
    """Describe the work of :func:`run`: measurements, and their cost in forward passes."""
    lines = len(ONCE) + config.num_draws * len(PER_DRAW)
    parts = []
    for case in config.cases:
        single = case.num_layers * (1 + config.layer_draws * (len(LAYER_DIRECTIONS) - 1))
        parts.append(f"{case.label}: {lines} directions and {single} of one matrix")
    return (
        f"{len(config.cases)} settings x {config.num_warm_ups} warm-ups x {len(STAGES)} stages; "
        f"per stage {'; '.join(parts)}; a direction takes about 10 forward passes of the trained "
        "blocks over the held-out rows; finished stages are not repeated"
    )


def run(config: Config, folder: str | Path = Path("runs") / "noise_cost") -> Result:
    """Measure every stage of every warm-up; a stage that is finished in ``folder`` is not repeated.

    Raises ValueError for fewer than 2 warm-ups, for a task with too few rows, or for
    an argument out of range.
    """
    _validate.integer("num_warm_ups", config.num_warm_ups, low=2)
    _validate.integer("num_draws", config.num_draws)
    _validate.integer("layer_draws", config.layer_draws, high=config.num_draws)
    _validate.positive("noise_multiplier", config.noise_multiplier)
    _validate.positive("loud_multiplier", config.loud_multiplier)
    for case in config.cases:
        _validate.integer("rows", case.rows, high=case.slope_rows)
    jobs = list(itertools.product(range(config.num_warm_ups), config.cases))
    found = [_warm_up_stages(config, case, w, folder) for w, case in progress(jobs, "warm-ups")]
    return _collect(config, found)


def _collect(config: Config, found: list[list[Stage]]) -> Result:
    """Stack the stages of every (warm-up, case) to the arrays of a result."""
    num_layers = max(stage.layer_gain.shape[1] for stages in found for stage in stages)

    def stack(name: str) -> np.ndarray:
        values = [[getattr(stage, name) for stage in stages] for stages in found]
        if name.startswith("layer_"):
            values = [[_padded(value, num_layers) for value in stages] for stages in values]
        array = np.array(values)
        shape = config.num_warm_ups, len(config.cases), *array.shape[1:]
        return np.moveaxis(array.reshape(shape), 0, 2)

    first = [stages[0] for stages in found[: len(config.cases)]]
    names = [f for f in Stage.__dataclass_fields__ if Stage.__annotations__[f] == "np.ndarray"]
    arrays: dict[str, Any] = {name: stack(name) for name in names}
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        descriptions=tuple(stage.description for stage in first),
        stages=STAGES,
        directions=DIRECTIONS,
        layer_directions=LAYER_DIRECTIONS,
        layers=tuple(stage.layers for stage in first),
        **arrays,
    )


def _padded(values: np.ndarray, num_layers: int) -> np.ndarray:
    """Pad axis 1 of ``values`` with NaN to the length ``num_layers``."""
    missing = num_layers - values.shape[1]
    return np.pad(values, [(0, 0), (0, missing), (0, 0)], constant_values=np.nan)


# --- one warm-up ----------------------------------------------------------------------------------


def _warm_up_stages(config: Config, case: Case, warm: int, folder: str | Path) -> list[Stage]:
    """Load or measure the stages of one warm-up; save each as soon as it is measured."""
    names = {stage: _stage_name(config, case, warm, stage) for stage in STAGES}
    found: dict[str, Stage] = {}
    source: GradientSource | None = None
    for stage, name in names.items():
        if (Path(folder) / f"{name}.json").exists():
            found[stage] = load_result(folder, name, Stage)
            continue
        if source is None:
            source, surfaces = _load(config, case, warm)
            start = {n: p.detach().clone() for n, p in source.model.named_parameters()}
        with torch.no_grad():
            for n, p in source.model.named_parameters():
                p.copy_(start[n])
        steps = (0, *case.steps)[STAGES.index(stage)]
        if steps:
            source.config = replace(source.config, warm_loss=1e-9, max_warm_steps=steps)
            warm_up(source)
        found[stage] = _measure(config, case, source, *surfaces)
        save_result(found[stage], folder, name, seed=source.config.seed, device=config.device)
    return [found[stage] for stage in STAGES]


def _stage_name(config: Config, case: Case, warm: int, stage: str) -> str:
    """Return the file name of a stage: a hash of the configuration and of the directions.

    The configuration names the model and the data, whose contents do not enter the hash.
    """
    same = replace(config, cases=(case,), num_warm_ups=2)
    directions = [SCHEMES, DIRECTIONS, LAYER_DIRECTIONS, MAX_DOUBLINGS]
    return json_digest([to_jsonable(same), *directions, warm, stage])[:16]


def _load(
    config: Config, case: Case, warm: int
) -> tuple[GradientSource, tuple[LossSurface, LossSurface]]:
    """Load a cold model, and build the surfaces of the slopes and of the line searches.

    The held-out rows are removed from the source.
    """
    gradients = replace(case.gradients, seed=config.seed + warm, device=config.device)
    source = load_source(gradients, case.batch_size + case.slope_rows)
    generator = torch.Generator().manual_seed(gradients.seed + 1)
    held_out = source.sample(case.slope_rows, generator)
    size = max(1, gradients.micro_batch_size // 8)  # small batches need little padding
    large, small = (
        make_surface(
            source.model, source.matrices, [batch for _, batch in source.batches(rows, size)]
        )
        for rows in (held_out, held_out[: case.rows])
    )
    source.rows = [row for i, row in enumerate(source.rows) if i not in set(held_out)]
    return source, (large, small)


# --- one stage ------------------------------------------------------------------------------------


def _measure(
    config: Config, case: Case, source: GradientSource, large: LossSurface, small: LossSurface
) -> Stage:
    """Measure all directions at the present weights of the source."""
    generator = torch.Generator().manual_seed(source.config.seed + 2)
    clean = source.clean_sum(source.sample(case.batch_size, generator))
    std = config.noise_multiplier * source.config.max_grad_norm
    loud_std = config.loud_multiplier * source.config.max_grad_norm
    layers = spread_layers(source.model, clean, case.num_layers)
    clip = source.config.max_grad_norm
    sums, _ = clipped_sum_over(source.model, large.batches, clip)
    gradient = {name: sums[name] / large.num_rows for name in source.matrices}
    _, norms = clipped_sum_over(source.model, small.batches, clip)
    small.row_weights = (clip / norms.double()).clamp(max=1)
    start, own_gradient = small.loss_and_gradient()
    whole = np.zeros((config.num_draws, len(DIRECTIONS), 6))
    single = np.zeros((config.layer_draws, len(layers), len(LAYER_DIRECTIONS), 6))
    above = np.zeros(config.num_draws, dtype=int)
    with small.curvature() as curvature:

        def along(direction: Direction) -> np.ndarray:
            """Return norm, cosine, slope, curvature, best step and gain of a direction."""
            d, norm = unit(direction)
            if norm == 0:
                return np.zeros(6)
            cosine = product(d, clean) / unit({name: clean[name] for name in d})[1]
            slope, bend = product(d, gradient), curvature(d)
            step, gain = 0.0, 0.0
            if slope > 0:
                excess = product(d, own_gradient) - slope  # see Case.rows
                step, gain = line_search(
                    lambda step: small.loss_at(d, step) - start + step * excess,
                    slope / max(abs(bend), 1e-12),
                    MAX_DOUBLINGS,
                )
            return np.array([norm, cosine, slope, bend, step, gain])

        for j, direction in enumerate(once(clean, std).values()):
            whole[:, j] = along(direction)
        for i, name in enumerate(layers):
            single[:, i, 0] = along({name: clean[name]})
        for draw in range(config.num_draws):
            seed = 1000 * source.config.seed + draw
            made, above[draw] = per_draw(
                clean, add_noise(clean, std, seed), std, add_noise(clean, loud_std, seed)
            )
            for direction_name, direction in made.items():
                whole[draw, DIRECTIONS.index(direction_name)] = along(direction)
            if draw < config.layer_draws:
                for i, j in itertools.product(range(len(layers)), range(1, len(LAYER_DIRECTIONS))):
                    matrix = made[LAYER_DIRECTIONS[j]][layers[i]]
                    single[draw, i, j] = along({layers[i]: matrix})
    keys = "norm", "cosine", "slope", "curvature", "step", "gain"
    arrays: dict[str, Any] = dict(zip(keys, np.moveaxis(whole, -1, 0), strict=True))
    of_layers = dict(zip(keys, np.moveaxis(single, -1, 0), strict=True))
    arrays |= {f"layer_{key}": of_layers[key] for key in ("slope", "curvature", "gain")}
    return Stage(
        privacy=NON_PRIVATE,
        description=source.description,
        layers=tuple(layers),
        loss=np.array(large.loss()),
        above=above,
        **arrays,
    )
