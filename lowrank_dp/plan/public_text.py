"""Public text of a plan, and the planned run's model with a head for this text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowrank_dp.data import Columns, Task, encode, load_task, micro_batches
from lowrank_dp.data.copies import is_copy
from lowrank_dp.data.tasks import known_name
from lowrank_dp.grads import Batch
from lowrank_dp.grads.clipping import clipped_sum_over
from lowrank_dp.models import describe, load_model, matrix_parameters
from lowrank_dp.models.prefix import STATES, FrozenPrefix
from lowrank_dp.models.targets import row_losses
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.config_checks import is_same_task
from lowrank_dp.train.records import token_limit

MAX_ROWS = 4096  # largest number of encoded rows, which are drawn at random
MAX_STATES = 2 << 30  # bytes of the outputs of frozen blocks that are kept
AGREEMENT = 1e-3  # largest difference of the loss, in nats, with and without kept outputs
GENERATED = {"generation": "generated-table"}  # kind -> generated task; other kinds: "generated"
GENERATED_TASKS = ("generated", "generated-table")  # tasks with different text for each seed


@dataclass(eq=False)
class PublicText:
    """Model, and rows of public text on which the model is measured.

    The object is mutable: measurements train the model. The outputs of the frozen blocks below the
    first trained block are computed once per row and kept in ``states``.

    Attributes:
        model: the model, in eval mode, with a head for the text.
        kind: kind of the text's task.
        rows: encoded rows, in random order.
        pad_token_id: id of the token that pads short rows.
        matrices: names of the trained matrices.
        micro_batch_size: number of rows in memory at a time.
        device: device of the model.
        description: the model and the text, in words.
        pad_to: number of tokens that every row is padded to; None pads to the longest row.
        prefix: frozen blocks whose outputs are kept; None if every pass runs the whole model.
        states: position of a row -> output of the frozen blocks, (tokens, d).
    """

    model: Any
    kind: str
    rows: Sequence[dict[str, Any]]
    pad_token_id: int
    matrices: Sequence[str]
    micro_batch_size: int
    device: str
    description: str
    pad_to: int | None = None
    prefix: FrozenPrefix | None = None
    states: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def batches(self, chosen: Sequence[int]) -> Iterator[Batch]:
        """Yield micro-batches of the rows at the positions ``chosen``."""
        rows = [self.rows[i] for i in chosen]
        for places, batch in micro_batches(
            rows,
            self.micro_batch_size,
            self.pad_token_id,
            length=self.pad_to,
            device=self.device,
        ):
            if self.prefix is not None:
                batch[STATES] = self._states(self.prefix, [chosen[i] for i in places], batch)
            yield batch

    def clipped_sum(self, chosen: Sequence[int], max_grad_norm: float) -> dict[str, Tensor]:
        """Sum the clipped gradients of the rows ``chosen``, by parameter name."""
        sums, _ = clipped_sum_over(
            self.model,
            self.batches(chosen),
            max_grad_norm,
            padding="longest" if self.pad_to is None else "max-length",
            check_rows=False,
        )
        return sums

    @torch.no_grad()
    def loss(self, chosen: Sequence[int]) -> float:
        """Return the mean loss of the rows ``chosen``, in nats."""
        total = 0.0
        for batch in self.batches(chosen):
            total += float(row_losses(self.model, batch, self.kind).sum())
        return total / len(chosen)

    def keep_states(self) -> None:
        """Keep the outputs of the frozen blocks from now on, if the model has such blocks."""
        tokens = sum(self.pad_to or len(row["input_ids"]) for row in self.rows)
        width = getattr(self.model.config, "hidden_size", 0)
        if not width or tokens * width * 4 > MAX_STATES:
            return
        first = range(min(8, len(self.rows)))
        with torch.no_grad():
            whole = [float(self.model(**batch).loss) for batch in self.batches(first)]
            try:
                prefix = FrozenPrefix(self.model)
                prefix.run(next(self.batches(first)))
            except ValueError:  # no block is frozen, or the model can't be split into blocks
                return
            prefix.install()
            self.prefix = prefix
            with contextlib.suppress(ValueError, RuntimeError, TypeError):
                kept = [float(self.model(**batch).loss) for batch in self.batches(first)]
                if max(abs(a - b) for a, b in zip(whole, kept, strict=True)) <= AGREEMENT:
                    return
        prefix.remove()
        self.prefix = None
        self.states.clear()

    def _states(self, prefix: FrozenPrefix, chosen: Sequence[int], batch: Batch) -> Tensor:
        """Return the outputs of the frozen blocks for the rows of a batch, padded with zeros."""
        if any(i not in self.states for i in chosen):
            for i, output in zip(chosen, prefix.run(batch), strict=True):
                self.states[i] = output[: self.pad_to or len(self.rows[i]["input_ids"])].clone()
        length = batch["input_ids"].shape[1]
        return torch.stack(
            [
                functional.pad(self.states[i], (0, 0, 0, length - len(self.states[i])))
                for i in chosen
            ]
        )


def is_compared(public: str) -> bool:
    """Return whether public text of this name or path is compared with the task's training texts.

    Generated text is not compared. The name "" stands for generated text.
    """
    return bool(public) and known_name(public) not in GENERATED_TASKS


def load_public_text(
    config: TrainConfig, task: Task, public: str, own_records: bool, seed: int
) -> PublicText:
    """Load public text and the model of a run, with a new head if the text is of another task.

    Args:
        config: configuration of the run.
        task: the task of the run.
        public: task name or path of the public text; "" selects generated text.
        own_records: whether to measure the task's own records in place of public text. If so, the
            measurements are NON-PRIVATE.
        seed: random seed of the head and of the order of the rows.

    Raises:
        ValueError: if the public text can't be read, or if it is the text of the task and
            ``own_records`` is False.
    """
    name = public or GENERATED.get(task.kind, "generated")
    if own_records:
        text = task
    else:
        if is_same_task(name, config.task) and is_compared(name):
            raise ValueError(
                f"public must be other text than the task's own, got {name!r}: give a public task, "
                "or own_records for a NON-PRIVATE plan"
            )
        columns = None if known_name(name) else Columns.of(config)
        text = load_task(name, columns=columns, seed=config.data_seed + 1, warn=False)
        if is_compared(name) and is_copy(
            [example for split in text.splits.values() for example in split], task.train
        ):
            raise ValueError(
                f"public must be other text than the task's own, got {name!r}, which holds the "
                f"training texts of {task.name}: give a public task, or own_records for a "
                "NON-PRIVATE plan"
            )
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
    max_length = token_limit(config, text, tokenizer)
    rows = encode(examples, tokenizer, kind=text.kind, max_length=max_length)
    matrices = matrix_parameters(model)
    if not matrices:
        raise ValueError(f"model {config.model!r} must have a trained matrix, got none")
    found = PublicText(
        model,
        text.kind,
        rows,
        tokenizer.pad_token_id,
        matrices,
        config.micro_batch_size,
        config.device,
        f"{describe(model)}; gradients of {text.name} from {text.source}",
        max_length if config.padding == "max-length" else None,
    )
    found.keep_states()
    return found
