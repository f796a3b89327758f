"""Configurations of the measurement of larger models (:mod:`.tasks_large`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowrank_dp.experiments.gradients import GradientConfig


@dataclass(frozen=True)
class Case:
    """A model on a task, and the sizes of its batches.

    Attributes:
        model: name for ``models.load_model``, such as a subfolder of ``LOWRANK_DP_MODELS``.
        task: name for ``data.load_task``.
        split: split of the task whose gradients are measured.
        batch_size: number of rows of the measured gradient sum.
        warm_steps: number of warm-up steps without noise before the second stage.
        warm_batch_size: number of rows of one warm-up step.
        micro_batch_size: number of rows in memory at a time.
        build: facts about the weights that the model folder does not state, such as their
            quantisation.
    """

    model: str
    task: str
    batch_size: int
    split: str = "train"
    warm_steps: int = 40
    warm_batch_size: int = 16
    micro_batch_size: int = 64
    build: str = ""


@dataclass(frozen=True)
class Config:
    """Cases and noise of the measurement.

    Attributes:
        cases: models and tasks, in the order of the figure.
        noise_multiplier: sigma, relative to the clipping norm C = 1.
        num_draws: number of noise draws per measurement.
        num_starts: number of starts per case, 2 or more. Each start has its own head, batch,
            warm-up order and noise.
        warm_learning_rate: learning rate of the warm-up's AdamW.
        max_length: number of tokens that a text is cut to.
        max_rows: largest number of rows of the split that are read; a random subset per start.
        precision: "float32", or "bf16" for forward and backward passes under bf16 autocast.
        device: "cpu" or "cuda".
        seed: random seed of the first start; the next start has the next seed.
    """

    cases: tuple[Case, ...]
    noise_multiplier: float = 0.6
    num_draws: int = 3
    num_starts: int = 3
    warm_learning_rate: float = 5e-5
    max_length: int = 128
    max_rows: int = 4096
    precision: str = "bf16"
    device: str = "cpu"
    seed: int = 0

    def gradients(self, case: Case, start: int) -> GradientConfig:
        """Return the configuration of a start's model, warm-up and gradients."""
        return GradientConfig(
            model=case.model,
            task=case.task,
            split=case.split,
            warm_loss=1e-9,  # never reached, so the warm-up takes all steps
            max_warm_steps=case.warm_steps,
            warm_learning_rate=self.warm_learning_rate,
            warm_batch_size=case.warm_batch_size,
            max_length=self.max_length,
            micro_batch_size=case.micro_batch_size,
            max_rows=self.max_rows,
            precision=self.precision,
            seed=self.seed + start,
            device=self.device,
        )


# batch sizes for which the three models together take about one hour of one core
MPNET = Config(
    cases=(
        Case("mpnet-base", "sst2", 512),
        Case("mpnet-base", "cola", 512),
        Case("mpnet-base", "mrpc", 256),
        Case("mpnet-base", "mnli", 256),
    )
)
_LLM: dict[str, Any] = {"warm_steps": 10, "warm_batch_size": 8, "micro_batch_size": 16}
_GEMMA = _LLM | {"build": "Q4_K_M quantised weights, dequantised to bf16"}
_QWEN = _LLM | {"build": "4-bit quantised weights (AWQ), dequantised to bf16"}
# DART's examples are those of the validation split: extracts of DART may lack the training split
_DART: dict[str, Any] = {"split": "validation"}
GEMMA = Config(
    cases=(
        Case("gemma3-270m", "e2e", 32, **_GEMMA),
        Case("gemma3-270m", "dart", 32, **_GEMMA, **_DART),
    )
)
QWEN = Config(
    cases=(
        Case("qwen2.5-coder-0.5b", "e2e", 16, **_QWEN),
        Case("qwen2.5-coder-0.5b", "dart", 16, **_QWEN, **_DART),
    )
)
# trials of one minute on generated text, with a model that needs no download
SMALL = Config(cases=(Case("tiny", "generated", 256, warm_steps=20),), num_draws=2, num_starts=2)
SMALL_TABLES = Config(
    cases=(Case("tiny-llama", "generated-table", 64, warm_steps=5, warm_batch_size=8),),
    num_draws=2,
    num_starts=2,
)
