"""Public text, and the model that is planned for with a head for that text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_dp._terminal import progress
from lowrank_dp.data import TASKS, Columns, Task, encode, load_task, micro_batches
from lowrank_dp.grads import Batch
from lowrank_dp.grads.clipping import clipped_sum_over
from lowrank_dp.models import describe, load_model, matrix_parameters
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.records import token_limit

MAX_ROWS = 4096  # rows that are encoded, drawn at random
GENERATED = {"generation": "generated-table"}  # generated task of a kind; any other: "generated"


@dataclass(frozen=True, eq=False)
class PublicText:
    """A model, and rows of text that it may be measured on; the weights are mutable.

    Attributes:
        model: the model, in eval mode, with a head for the text.
        kind: kind of the text's task.
        rows: encoded rows, in random order.
        pad_token_id: token that fills short rows.
        matrices: names of the trained matrices.
        micro_batch_size: rows in memory at a time.
        device: device of the model.
        description: model and text in words.
    """

    model: Any
    kind: str
    rows: Sequence[dict[str, Any]]
    pad_token_id: int
    matrices: Sequence[str]
    micro_batch_size: int
    device: str
    description: str

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def batches(self, chosen: Sequence[int]) -> Iterator[Batch]:
        """Yield micro-batches of the rows at the positions ``chosen``."""
        rows = [self.rows[i] for i in chosen]
        for _, batch in micro_batches(
            rows, self.micro_batch_size, self.pad_token_id, device=self.device
        ):
            yield batch

    def clipped_sum(self, chosen: Sequence[int], max_grad_norm: float) -> dict[str, Tensor]:
        """Sum the clipped gradients of the rows ``chosen``, by parameter name."""
        sums, _ = clipped_sum_over(
            self.model, self.batches(chosen), max_grad_norm, check_rows=False
        )
        return sums

    @torch.no_grad()
    def loss(self, chosen: Sequence[int]) -> float:
        """Return the mean over the rows ``chosen`` of the model's mean loss per batch, in nats."""
        total = 0.0
        for batch in self.batches(chosen):
            total += float(self.model(**batch).loss) * len(batch["input_ids"])
        return total / len(chosen)


def load_public_text(
    config: TrainConfig, task: Task, public: str, own_records: bool, seed: int
) -> PublicText:
    """Load public text and the model of a run, with a new head if the text has another task.

    Args:
        config: configuration of the run.
        task: the run's task.
        public: task name or path of the public text; "" takes generated text.
        own_records: whether to take the task's own records. NON-PRIVATE.
        seed: random seed of the head and of the order of the rows.

    Raises:
        ValueError: if the text is the task's own without ``own_records``, or can't be read.
    """
    name = public or GENERATED.get(task.kind, "generated")
    if own_records:
        text = task
    else:
        if name == config.task and name not in ("generated", "generated-table"):
            raise ValueError(
                f"public must be other text than the task's own, got {name!r}: give a public task, "
                "or own_records for a NON-PRIVATE plan"
            )
        columns = None if name in TASKS else Columns.of(config)
        text = load_task(name, columns=columns, seed=config.data_seed + 1, warn=False)
        if (text.kind == "generation") != (task.kind == "generation"):
            raise ValueError(
                f"public must be text for {task.kind}, as the task is, got {text.name}: {text.kind}"
            )
    model, tokenizer = load_model(
        config.model,
        task=text,
        method=config.method,
        rank=config.rank,
        lora_alpha=config.lora_alpha,
        lora_init=config.lora_init,
        target_modules=list(config.target_modules) or None,
        train_embeddings=config.train_embeddings,
        train_layers=config.train_layers,
        device=config.device,
        seed=seed,
    )
    order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(seed))
    examples = [text.train[i] for i in order[:MAX_ROWS].tolist()]
    rows = encode(
        examples, tokenizer, kind=text.kind, max_length=token_limit(config, text, tokenizer)
    )
    matrices = matrix_parameters(model)
    if not matrices:
        raise ValueError(f"model {config.model!r} must have a trained matrix, got none")
    return PublicText(
        model,
        text.kind,
        rows,
        tokenizer.pad_token_id,
        matrices,
        config.micro_batch_size,
        config.device,
        f"{describe(model)}; gradients of {text.name} from {text.source}",
    )
