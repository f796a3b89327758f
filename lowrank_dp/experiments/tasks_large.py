"""Claim: restoration helps at the sizes of the papers' models, too (arXiv 2510.01137).

The experiment repeats the measurement of :mod:`lowrank_dp.experiments.tasks` on larger models: an
encoder of the size of RoBERTa-base, and two causal language models of 0.27 and 0.5 billion
parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp._json import json_digest
from lowrank_dp._terminal import progress
from lowrank_dp.artifacts import load_result, save_result
from lowrank_dp.artifacts.jsonable import to_jsonable
from lowrank_dp.experiments.gradients import (
    GradientSource,
    load_source,
    mean_loss,
    noisy_matrices,
    warm_up,
)
from lowrank_dp.experiments.intervals import mean_and_interval, with_interval
from lowrank_dp.experiments.scheme_scores import cosine
from lowrank_dp.experiments.tasks import effective_share
from lowrank_dp.experiments.tasks_large_configs import Case, Config
from lowrank_dp.mechanism import NON_PRIVATE
from lowrank_dp.restore import restore_with_report

CAPTION = (
    "One clipped gradient sum for each model, task and stage, with DP-SGD's noise (sigma = 0.6 C): "
    "the model as it was loaded, and after some steps without noise; forward and backward passes "
    "under bf16 autocast. (a) Share of the matrices with a singular value above the bulk edge; "
    "dotted, that of pure noise, about one in seven. "
    "(b) Cosine with the clean sum, mean over matrices: noisy, restored by the optimal shrinker, "
    "and with the matrices without a value above the edge set to zero (their cosine is 0). "
    "(c) The same with all matrices as one vector. (d) Effective rank as a share of the largest "
    "possible, median over every fifth matrix, clean and noisy. Bars are 95% "
    "t-intervals over starts: head, batch, order of the warm-up and noise, with the mean over "
    "noise draws taken first. NON-PRIVATE: compared with clean gradients."
)
STAGES = ("cold", "warm")
SCHEMES = ("noisy", "optimal", "optimal, zeroed")
AVERAGES = ("mean over matrices", "one vector")
# Distance of the matrices whose full spectrum is computed. A block has 6 or 7 matrices, so that all
# types of matrices occur.
STRIDE = 5
FOLDER = Path("runs") / "tasks_large"


@dataclass(frozen=True)
class Stage:
    """Measurement of one case, start and stage; fields as in :class:`Result`."""

    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    description: str
    loss: np.ndarray
    num_layers: np.ndarray
    above: np.ndarray
    cosine: np.ndarray
    effective_rank: np.ndarray


@dataclass(frozen=True)
class Result:
    """Measurements of K cases, 2 stages (``STAGES``), W starts and N noise draws. NON-PRIVATE.

    - ``cosine`` (K, 2, W, N, 3, 2): cosine with the clean sum, in [-1, 1], of each of the three
      ``SCHEMES`` by each of the two ``AVERAGES``.
    - ``above`` (K, 2, W, N): number of matrices with a singular value above the bulk edge.
    - ``num_layers`` (K, 2, W): number of all trained matrices.
    - ``effective_rank`` (K, 2, W, 2): median over matrices of the effective rank divided by
      min(m, n), clean and noisy.
    - ``loss`` (K, 2, W): mean loss over the rows of the gradient sum, in nats.
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    descriptions: tuple[str, ...]
    loss: np.ndarray
    num_layers: np.ndarray
    above: np.ndarray
    cosine: np.ndarray
    effective_rank: np.ndarray

    @property
    def description(self) -> str:
        """Descriptions of all models and tasks, each listed once."""
        return "; ".join(dict.fromkeys(self.descriptions))

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Case and stage of each row of figure and table."""
        return list(itertools.product(range(len(self.config.cases)), range(len(STAGES))))

    def starts(self, scheme: int, average: int) -> np.ndarray:
        """Return the cosine (K, 2, W) of a scheme by an average, mean over noise draws.

        ``scheme`` and ``average`` are indices in ``SCHEMES`` and ``AVERAGES``.
        """
        return self.cosine[..., scheme, average].mean(axis=-1)

    def label(self, case: int, stage: int) -> str:
        """Label a row by model, task, batch size and training loss."""
        one = self.config.cases[case]
        loss = self.loss[case, stage].mean()
        return f"{one.model}, {one.task}, B={one.batch_size}, loss {loss:.2f}"


def plan(config: Config) -> str:
    """Describe the work of :func:`run`: measurements, rows and warm-up steps."""
    cases = "; ".join(
        f"{case.model} on {case.task}: {case.batch_size} rows per gradient, "
        f"{case.warm_steps} warm-up steps of {case.warm_batch_size}"
        for case in config.cases
    )
    return (
        f"{len(config.cases)} cases x {config.num_starts} starts x {len(STAGES)} stages, "
        f"{config.num_draws} noise draws each; {cases}; a finished stage is not repeated"
    )


def run(config: Config, folder: str | Path = FOLDER) -> Result:
    """Measure every stage of every start; a stage that is finished in ``folder`` is not repeated.

    Raises ValueError for fewer than 2 starts, for an unknown model or task, and for a task
    with fewer rows than a batch.
    """
    _validate.integer("num_starts", config.num_starts, low=2)
    _validate.integer("num_draws", config.num_draws)
    _validate.positive("noise_multiplier", config.noise_multiplier)
    jobs = list(itertools.product(config.cases, range(config.num_starts)))
    found = [_stages(config, case, w, folder) for case, w in progress(jobs, "starts")]

    def stack(name: str) -> np.ndarray:
        array = np.array([[getattr(stage, name) for stage in stages] for stages in found])
        shape = len(config.cases), config.num_starts, *array.shape[1:]
        return np.moveaxis(array.reshape(shape), 1, 2)

    names = [f for f in Stage.__dataclass_fields__ if Stage.__annotations__[f] == "np.ndarray"]
    arrays: dict[str, Any] = {name: stack(name) for name in names}
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        descriptions=tuple(stages[0].description for stages in found[:: config.num_starts]),
        **arrays,
    )


# --- one start ------------------------------------------------------------------------------------


def _stages(config: Config, case: Case, start: int, folder: str | Path) -> list[Stage]:
    """Load or measure the stages of one start; save each stage as soon as it is measured."""
    found: list[Stage] = []
    source: GradientSource | None = None
    for stage in STAGES:
        name = _stage_name(config, case, start, stage)
        if (Path(folder) / f"{name}.json").exists():
            found.append(load_result(folder, name, Stage))
            continue
        source = source or load_source(config.gradients(case, start), case.batch_size)
        if stage == "warm":
            warm_up(source)
        measured = _measure(config, case, source, start)
        save_result(measured, folder, name, seed=source.config.seed, device=config.device)
        found.append(measured)
    return found


def _stage_name(config: Config, case: Case, start: int, stage: str) -> str:
    """Return the file name of a stage: a hash of the configuration.

    The configuration names the model and the data, whose contents do not enter the hash.
    """
    same = replace(config, cases=(case,), num_starts=2)
    return json_digest([to_jsonable(same), SCHEMES, AVERAGES, STRIDE, start, stage])[:16]


def _measure(config: Config, case: Case, source: GradientSource, start: int) -> Stage:
    """Measure one gradient sum at the present weights of the source."""
    generator = torch.Generator().manual_seed(source.config.seed + 1)
    rows = source.sample(case.batch_size, generator)
    # only the first start of a model examines rows, which takes as long as 30 gradients
    clean = source.clean_sum(rows, check_rows=start == 0)
    std = config.noise_multiplier * source.config.max_grad_norm
    draws = [
        _draw(clean, std, 1000 * source.config.seed + draw) for draw in range(config.num_draws)
    ]
    some = {name: clean[name] for name in list(clean)[::STRIDE]}
    noisy = dict(noisy_matrices(some, std, 1000 * source.config.seed))
    share = [[effective_share(matrix) for matrix in one.values()] for one in (some, noisy)]
    return Stage(
        privacy=NON_PRIVATE,
        description="; ".join(filter(None, [source.description, case.build])),
        loss=np.array(mean_loss(source, rows)),
        num_layers=np.array(len(clean)),
        above=np.array([above for above, _ in draws]),
        cosine=np.array([cosines for _, cosines in draws]),
        effective_rank=np.median(share, axis=1),
    )


def _draw(clean: Mapping[str, Tensor], std: float, seed: int) -> tuple[int, np.ndarray]:
    """Measure one noise draw: matrices above the edge, and cosines (schemes, averages)."""
    products, above = [], 0
    for name, noisy in noisy_matrices(dict(clean), std, seed):
        restored, (report,) = restore_with_report(noisy, std)
        raw = _products(noisy, clean[name])
        acted = report.action == "restored"
        new = _products(restored, clean[name]) if acted else raw
        products.append((raw, new, new if acted else (0.0, 0.0, raw[2])))
        above += acted
    every = np.array(products)  # (matrices, schemes, 3)
    return above, np.stack([cosine(every).mean(axis=0), cosine(every.sum(axis=0))], axis=-1)


def _products(made: Tensor, clean: Tensor) -> tuple[float, float, float]:
    """Return ``|M|^2, <M, G>, |G|^2`` of a matrix M and the clean matrix G, in float64."""
    m, g = made.double().flatten(), clean.double().flatten()
    return float(m @ m), float(m @ g), float(g @ g)


# --- table and summary ----------------------------------------------------------------------------


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate each case and stage: matrices above the edge, cosines by both averages, ranks."""
    columns = ["model", "task", "batch size", "stage", "training loss", "matrices above the edge"]
    columns += [f"cosine, {scheme}, {name}" for name in AVERAGES for scheme in SCHEMES]
    columns += ["effective rank / largest, clean", "noisy"]
    rows = []
    for case, stage in result.rows:
        one = result.config.cases[case]
        above = result.above[case, stage].mean()
        rows.append(
            [
                one.model,
                one.task,
                f"{one.batch_size}",
                STAGES[stage],
                f"{result.loss[case, stage].mean():.2f}",
                f"{above:.1f} of {result.num_layers[case, stage, 0]}",
                *(
                    with_interval(result.starts(scheme, average)[case, stage])
                    for average in range(len(AVERAGES))
                    for scheme in range(len(SCHEMES))
                ),
                *(f"{share:.2f}" for share in result.effective_rank[case, stage].mean(axis=0)),
            ]
        )
    return columns, rows


def headline(result: Result) -> Mapping[str, str]:
    """Summarise each case and stage: the cosines by both averages, and matrices above the edge."""

    def means(average: int, case: int, stage: int) -> str:
        return ", ".join(
            f"{result.starts(scheme, average)[case, stage].mean():.3f} {name}"
            for scheme, name in enumerate(SCHEMES)
        )

    return {
        f"{result.label(case, stage)}, {STAGES[stage]}": (
            f"mean over matrices: {means(0, case, stage)}; one vector: {means(1, case, stage)}; "
            f"{result.above[case, stage].mean():.1f} of {result.num_layers[case, stage, 0]} "
            "matrices above the edge"
        )
        for case, stage in result.rows
    }


def bands(values: np.ndarray, rows: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and half-width of the t-interval over starts of values (K, 2, W), by row."""
    return mean_and_interval(np.array([values[row] for row in rows]), axis=1)
