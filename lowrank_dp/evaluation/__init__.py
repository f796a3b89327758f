"""Evaluation of a model on a task: loss, metrics, and generated texts."""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.evaluation.generation import generate_texts
    from lowrank_dp.evaluation.metrics import HIGHER_IS_BETTER, label_metrics, text_metrics
    from lowrank_dp.evaluation.models import evaluate
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["HIGHER_IS_BETTER", "evaluate", "generate_texts", "label_metrics", "text_metrics"]
