"""Claim: fine-tuning gradients are low-rank on any task, so restoration helps (arXiv 2510.01137).

The experiment repeats one measurement on several models, tasks, batch sizes and stages of training:
how many layers have a singular value above the bulk edge, and how well restoration recovers the
gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lowrank_dp import _validate
from lowrank_dp._terminal import progress
from lowrank_dp.experiments.gradients import GradientConfig, GradientSource, add_noise, prepare
from lowrank_dp.experiments.intervals import mean_and_interval
from lowrank_dp.mechanism import NON_PRIVATE
from lowrank_dp.restore import restore_with_report
from lowrank_dp.spectrum import alignment, decompose

CAPTION = (
    "One clipped gradient sum for each model, task, batch size and training loss, with DP-SGD's "
    "noise. (a) Share of the layers with a singular value above the bulk edge. (b) Cosine with the "
    "clean sum, mean over layers, noisy and restored by the optimal shrinker; bars are 95% "
    "t-intervals over noise draws on one batch. (c) Median over layers of the effective rank, as a "
    "share of the largest possible, clean and noisy. MiniLM was trained on MNLI's text, by its "
    "model card. NON-PRIVATE: compared with clean gradients."
)
Case = tuple[str, str, str, int, float]  # model, task, split, batch size, warm-up loss (0: cold)


@dataclass(frozen=True)
class Config:
    """Cases and noise of the measurement.

    Attributes:
        cases: model, task, split, batch size and warm-up loss of each row of the figure.
        noise_multiplier: sigma, relative to the clipping norm C = 1.
        num_draws: noise draws per case, 2 or more.
        max_length: tokens to which a text is cut.
        device: "cpu" or "cuda".
        seed: random seed of head, warm-up, sampling and noise.
    """

    cases: tuple[Case, ...] = (
        ("minilm", "sst2", "train", 2048, 0.0),
        ("minilm", "sst2", "train", 2048, 0.5),
        ("minilm", "sst2", "train", 2048, 0.2),
        ("minilm", "cola", "train", 2048, 0.0),
        ("minilm", "cola", "train", 2048, 0.5),
        ("minilm", "mrpc", "train", 2048, 0.0),
        ("minilm", "mrpc", "train", 2048, 0.5),
        ("minilm", "mnli", "train", 2048, 0.0),
        ("minilm", "mnli", "train", 2048, 0.9),
        ("smollm2", "e2e", "train", 128, 0.0),
        ("smollm2", "dart", "validation", 128, 0.0),
    )
    noise_multiplier: float = 0.6
    num_draws: int = 3
    max_length: int = 128
    device: str = "cpu"
    seed: int = 0


# a trial of one minute on generated text, with models that need no download
SMALL = Config(
    cases=(
        ("tiny", "generated", "train", 1024, 0.0),
        ("tiny", "generated", "train", 1024, 0.6),
        ("tiny-llama", "generated-table", "train", 256, 0.0),
    )
)


@dataclass(frozen=True)
class Result:
    """Measurements of K cases.

    ``above`` (K, draws) counts the layers with a value above the edge, of ``num_layers`` (K,).
    ``noisy`` and ``restored`` (K, draws) are cosines with the clean sum, means over layers.
    ``effective_rank`` (K, 2) is the median over layers of the effective rank divided by min(m, n),
    clean and noisy. ``loss`` (K,) is the training loss of the measured model.
    """

    config: Config
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True)
    privacy: str
    descriptions: tuple[str, ...]
    loss: np.ndarray
    num_layers: np.ndarray
    above: np.ndarray  # (K, draws)
    noisy: np.ndarray
    restored: np.ndarray
    effective_rank: np.ndarray

    @property
    def description(self) -> str:
        """Descriptions of all models and tasks, each listed once."""
        return "; ".join(dict.fromkeys(self.descriptions))

    def band(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean over draws of each case, and the half-width of its 95% t-interval."""
        return mean_and_interval(values, axis=1)

    def label(self, case: int) -> str:
        """Label a case by model, task, batch size and training loss."""
        model, task, _, batch_size, _ = self.config.cases[case]
        return f"{model}, {task}, B={batch_size}, loss {self.loss[case]:.2f}"


def run(config: Config) -> Result:
    """Measure every case; ValueError if ``num_draws`` is below 2."""
    _validate.integer("num_draws", config.num_draws, low=2)
    rows = [_measure(config, case) for case in progress(config.cases, "models and tasks")]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    descriptions = tuple(columns.pop("descriptions"))
    arrays: dict[str, Any] = {name: np.array(values) for name, values in columns.items()}
    return Result(
        config=config,
        privacy=NON_PRIVATE,
        descriptions=descriptions,
        **arrays,
    )


def _measure(config: Config, case: Case) -> dict[str, Any]:
    model, task, split, batch_size, warm_loss = case
    source: GradientSource = prepare(
        GradientConfig(
            model=model,
            task=task,
            split=split,
            warm_loss=warm_loss or None,
            micro_batch_size=16,
            max_length=config.max_length,
            seed=config.seed,
            device=config.device,
        ),
        batch_size,
    )
    generator = torch.Generator().manual_seed(config.seed + 1)
    clean = source.clean_sum(source.sample(batch_size, generator))
    std = config.noise_multiplier * source.config.max_grad_norm
    noisy = [add_noise(clean, std, config.seed + draw) for draw in range(config.num_draws)]
    restored = [
        {name: restore_with_report(matrix, std) for name, matrix in matrices.items()}
        for matrices in noisy
    ]

    def cosine(matrices: Mapping[str, torch.Tensor]) -> float:
        return float(np.mean([alignment(matrix, clean[name]) for name, matrix in matrices.items()]))

    share = [[effective_share(matrix) for matrix in one.values()] for one in (clean, noisy[0])]
    return {
        "descriptions": source.description,
        "loss": source.loss,
        "num_layers": len(clean),
        "above": [
            sum(report.action == "restored" for _, (report,) in one.values()) for one in restored
        ],
        "noisy": [cosine(matrices) for matrices in noisy],
        "restored": [
            cosine({name: matrix for name, (matrix, _) in one.items()}) for one in restored
        ],
        "effective_rank": np.median(share, axis=1),
    }


def effective_share(matrix: torch.Tensor) -> float:
    """Return the effective rank of a matrix (m, n), divided by min(m, n)."""
    return float(decompose(matrix, 0.0).effective_rank) / min(matrix.shape)


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Tabulate each case: layers above the edge, cosines, and relative effective ranks."""
    (noisy, noisy_half), (restored, restored_half) = map(
        result.band, (result.noisy, result.restored)
    )
    columns = [
        "model",
        "task",
        "batch size",
        "training loss",
        "layers above the edge",
        "cosine, noisy",
        "cosine, optimal",
        "effective rank / largest, clean",
        "noisy",
    ]
    rows = []
    for i, (model, task, _, batch_size, _) in enumerate(result.config.cases):
        rows.append(
            [
                model,
                task,
                f"{batch_size}",
                f"{result.loss[i]:.2f}",
                f"{result.above[i].mean():.1f} of {result.num_layers[i]}",
                f"{noisy[i]:.3f} ± {noisy_half[i]:.3f}",
                f"{restored[i]:.3f} ± {restored_half[i]:.3f}",
                *(f"{share:.2f}" for share in result.effective_rank[i]),
            ]
        )
    return columns, rows


def headline(result: Result) -> Mapping[str, str]:
    """Summarise each case: cosines before and after, and layers above the edge."""
    return {
        result.label(i): f"cosine {result.noisy[i].mean():.3f} noisy, "
        f"{result.restored[i].mean():.3f} restored; {result.above[i].mean():.1f} of "
        f"{result.num_layers[i]} layers above the edge"
        for i in range(len(result.config.cases))
    }
