"""Configurations of the experiment on the cost of noise in one step."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_dp.experiments.gradients import GradientConfig


@dataclass(frozen=True)
class Case:
    """A model and a task, with the sizes of the measurement.

    Attributes:
        gradients: model, task, clipping and warm-up; ``warm_loss``, ``max_warm_steps`` and
            ``seed`` are replaced.
        steps: numbers of warm-up steps of the stages "half-way" and "warm".
        batch_size: number of examples of the clean sum.
        slope_rows: number of held-out training examples on which the slope ``g'd`` is measured.
        rows: number of these examples, from the first, on which curvature and line search are
            measured. As a control variate, the line search uses the slope on all ``slope_rows``
            examples in place of the slope on these rows, because the slope varies most from row to
            row.
        num_layers: number of matrices that are measured separately, one of each shape, without the
            head.
    """

    gradients: GradientConfig
    steps: tuple[int, int]
    batch_size: int
    slope_rows: int
    rows: int
    num_layers: int = 3

    @property
    def label(self) -> str:
        """Model and task."""
        return f"{self.gradients.model}, {self.gradients.task}"


def _minilm(task: str) -> Case:
    return Case(
        GradientConfig(model="minilm", task=task, train_layers=1, warm_learning_rate=5e-4),
        steps=(20, 80),
        batch_size=1024,
        slope_rows=512,
        rows=32,
    )


SST2, COLA = _minilm("sst2"), _minilm("cola")
SMOLLM2 = Case(
    GradientConfig(
        model="smollm2",
        task="e2e",
        train_layers=1,
        warm_learning_rate=5e-4,
        warm_batch_size=8,
        micro_batch_size=8,
    ),
    steps=(4, 16),
    batch_size=64,
    slope_rows=32,
    rows=4,
)


@dataclass(frozen=True)
class Config:
    """Cases and noise of the measurement.

    Attributes:
        cases: models and tasks.
        noise_multiplier: sigma, relative to the clipping norm.
        loud_multiplier: a larger sigma, relative to the clipping norm, at which the noisy sum and
            its flattened version are measured, too.
        num_draws: number of noise draws per warm-up and stage.
        num_warm_ups: number of warm-ups per case, 2 or more. Each warm-up has its own head, warm-up
            batches, clean sum and held-out rows.
        layer_draws: number of noise draws for which single matrices are measured; at most
            ``num_draws``.
        device: "cpu" or "cuda".
        seed: seed of the first warm-up.
    """

    cases: tuple[Case, ...] = (SST2, COLA, SMOLLM2)
    noise_multiplier: float = 0.455
    loud_multiplier: float = 2.74
    num_draws: int = 5
    num_warm_ups: int = 3
    layer_draws: int = 1
    device: str = "cpu"
    seed: int = 0


# trial of one minute on generated text, with models that need no download
SMALL = Config(
    cases=(
        Case(
            GradientConfig(model="tiny", task="generated", train_layers=1, warm_learning_rate=1e-3),
            steps=(20, 60),
            batch_size=256,
            slope_rows=128,
            rows=64,
        ),
        Case(
            GradientConfig(
                model="tiny-llama",
                task="generated-table",
                train_layers=1,
                warm_learning_rate=1e-3,
                warm_batch_size=8,
            ),
            steps=(5, 20),
            batch_size=64,
            slope_rows=32,
            rows=8,
            num_layers=1,
        ),
    ),
    num_draws=2,
    num_warm_ups=2,
    layer_draws=1,
)
