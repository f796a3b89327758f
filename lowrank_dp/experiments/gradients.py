"""Clean gradients of a real model on a real task, which the experiments measure against.

NON-PRIVATE throughout: the warm-up has no noise, and the sums are read before noise is added.
"""

from __future__ import annotations

import itertools
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dp import _validate
from lowrank_dp._terminal import progress
from lowrank_dp.data import encode, load_task, micro_batches, subset
from lowrank_dp.grads.clipping import clipped_sum_over
from lowrank_dp.models import default_model, describe, load_model, matrix_parameters
from lowrank_dp.models.heads import head_weights
from lowrank_dp.models.memory import warn_of_logits
from lowrank_dp.models.precision import AUTOCAST_DTYPES, autocast, autocast_dtype_of
from lowrank_dp.models.targets import row_losses
from lowrank_dp.models.trainable import as_out_in

MAX_SEED = 2**32 - 1  # seeds of draws are multiples of the seed, and must fit 63 bits
PART = 512  # examples per partial sum; fixed, so that a sum's rounding depends on its size alone
# examples of which the loss of an untrained model is the mean; fewer for a generation task, whose
# examples have many targets each
LOSS_EXAMPLES = {"generation": 64}
USUAL_LOSS_EXAMPLES = 512


@dataclass(frozen=True)
class GradientConfig:
    """Model, task and clipping of the measured gradients.

    Attributes:
        model: backbone for ``models.load_model``; "" means ``models.default_model()``.
        task: name for ``data.load_task``.
        split: split of the task whose gradients are measured.
        max_grad_norm: clipping norm C of one example's gradient, over all trained parameters.
        warm_loss: training loss, a running mean in nats, at which the warm-up ends; None measures
            the model as it was loaded (cold).
        max_warm_steps: largest number of warm-up steps; every result states the loss reached.
        warm_learning_rate: learning rate of the warm-up's AdamW.
        warm_batch_size: batch size of the warm-up.
        max_length: tokens to which a text is cut.
        micro_batch_size: examples in memory at a time.
        train_layers: number of trained blocks, counted from the last block; None trains all blocks.
        max_rows: largest number of rows of a random subset of the split, in whole groups, chosen
            by the seed; None reads all rows.
        precision: "float32", or "bf16" for forward and backward passes under bf16 autocast. Sums
            stay in float32.
        seed: random seed of the head, the warm-up and the sampling, from 0 to 2^32 - 1.
        device: "cpu" or "cuda".
    """

    model: str = ""
    task: str = "sst2"
    split: str = "train"
    max_grad_norm: float = 1.0
    warm_loss: float | None = 0.36
    max_warm_steps: int = 300
    warm_learning_rate: float = 1e-4
    warm_batch_size: int = 32
    max_length: int = 128
    micro_batch_size: int = 64
    train_layers: int | None = None
    max_rows: int | None = None
    precision: str = "float32"
    seed: int = 0
    device: str = "cpu"

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Type of mixed precision, or None."""
        return autocast_dtype_of(self.precision)


@dataclass(eq=False)
class GradientSource:
    """A model at a known training loss, and the training set on which gradients are taken.

    The object is mutable: :meth:`nested_sums` keeps the computed sums in ``sums``.

    Attributes:
        model: the model, in eval mode.
        rows: encoded examples of the split.
        pad_token_id: token that fills short texts.
        matrices: names of the trainable matrices.
        description: model and data in words.
        config: the config that the source was prepared from.
        kind: kind of the task.
        loss: training loss at the end of the warm-up, or of the cold model.
        warm_steps: number of warm-up steps.
        sums: clean sums by batch size, kept because several experiments measure the same sums.
    """

    model: nn.Module
    rows: list[dict[str, Any]]
    pad_token_id: int
    matrices: list[str]
    description: str
    config: GradientConfig
    kind: str
    loss: float = float("nan")
    warm_steps: int = 0
    sums: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def clean_sum(self, indices: Sequence[int], check_rows: bool = True) -> dict[str, Tensor]:
        """Sum the clipped gradients of the rows ``indices``, by trainable matrix. NON-PRIVATE.

        ``check_rows`` is as in :func:`lowrank_dp.grads.clipped_sum`. The examination of a new model
        takes as long as the gradients of some dozen rows.
        """
        count = math.ceil(len(indices) / self.config.micro_batch_size)
        batches = self._micro_batches(indices)
        if count > 1:
            batches = progress(batches, "clean gradients", total=count)
        return self._clean_sum(batches, check_rows)

    def nested_sums(
        self, batch_sizes: Iterable[int], say: Callable[[str], None] | None = None
    ) -> dict[int, dict[str, Tensor]]:
        """Compute ``clean_sum`` for several batch sizes, in rising order. NON-PRIVATE.

        Smaller batches are prefixes of the largest batch, which depends on the seed alone.
        ``say`` receives one line after the first micro-batch: an estimate of the time of all.
        """
        sizes = sorted(set(batch_sizes))
        chosen = self.sample(sizes[-1], torch.Generator().manual_seed(self.config.seed + 1))
        parts: list[tuple[int, int]] = []
        done = {0, *self.sums}
        for size in sizes:
            if size not in done:
                first = max(smaller for smaller in done if smaller < size)
                parts += itertools.pairwise([*range(first, size, PART), size])
                done.add(size)
        total: dict[str, Tensor] = {}
        stream = self._stream(parts, chosen, say)
        for (start, stop), group in itertools.groupby(stream, key=operator.itemgetter(0)):
            part = self._clean_sum(batch for _, batch in group)
            total = self.sums.get(start, total if start else {})
            total = {name: total[name] + part[name] if total else part[name] for name in part}
            if stop in sizes:
                self.sums[stop] = total
        return {size: self.sums[size] for size in sizes}

    def _stream(
        self,
        parts: Sequence[tuple[int, int]],
        chosen: Sequence[int],
        say: Callable[[str], None] | None,
    ) -> Iterator[tuple[tuple[int, int], dict[str, Tensor]]]:
        """Yield (part, micro-batch) over all parts of the rows ``chosen``, with one bar."""
        count = sum(math.ceil((b - a) / self.config.micro_batch_size) for a, b in parts)
        pairs = (
            ((start, stop), batch)
            for start, stop in parts
            for batch in self._micro_batches(chosen[start:stop])
        )
        began = time.monotonic()
        for done, pair in enumerate(progress(pairs, "clean gradients", total=count)):
            if done == 1 and say is not None:  # a part begins with its longest rows
                seconds = time.monotonic() - began
                say(
                    f"gradients: the first of {count} micro-batches took {seconds:.1f} s, so that "
                    f"all take about {count * seconds / 60:.1f} minutes"
                )
            yield pair

    def _micro_batches(self, indices: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        return (batch for _, batch in self.batches(indices, self.config.micro_batch_size))

    def _clean_sum(
        self, batches: Iterable[dict[str, Tensor]], check_rows: bool = True
    ) -> dict[str, Tensor]:
        sums, _ = clipped_sum_over(
            self.model,
            batches,
            self.config.max_grad_norm,
            autocast_dtype=self.config.autocast_dtype,
            check_rows=check_rows,
        )
        return {name: sums[name] for name in self.matrices}

    def sample(self, batch_size: int, generator: torch.Generator) -> list[int]:
        """Draw ``batch_size`` distinct positions in ``rows``, uniformly; ValueError if too many."""
        _validate.integer("batch_size", batch_size, high=len(self.rows))
        return torch.randperm(len(self.rows), generator=generator)[:batch_size].tolist()

    def batches(
        self, indices: Iterable[int], size: int
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yield the rows ``indices`` in batches, as :func:`lowrank_dp.data.micro_batches` does."""
        rows = [self.rows[i] for i in indices]
        return micro_batches(rows, size, self.pad_token_id, device=self.config.device)


def prepare(config: GradientConfig, batch_size: int = 1) -> GradientSource:
    """Load model and task, and train the model to ``config.warm_loss``.

    The model ends in eval mode, so that the measured gradients are free of dropout.

    Raises ValueError, before the warm-up, as :func:`load_source` does.
    """
    source = load_source(config, batch_size)
    source.loss, source.warm_steps = warm_up(source)
    return source


def load_source(config: GradientConfig, batch_size: int = 1) -> GradientSource:
    """Load model and task without the warm-up; the loss of the source is NaN.

    Raises ValueError if the split has fewer than ``batch_size`` examples or the model has no
    trainable matrix.
    """
    _validate.positive("max_grad_norm", config.max_grad_norm)
    _validate.choice("precision", config.precision, AUTOCAST_DTYPES)
    _validate.integer("seed", config.seed, low=0, high=MAX_SEED)
    task = load_task(config.task, seed=config.seed)
    examples = task.split(config.split)
    if config.max_rows is not None:
        examples = subset(examples, config.max_rows, f"{config.seed}/{config.split}")
    _validate.integer("batch_size", batch_size, high=len(examples))
    model, tokenizer = load_model(
        config.model or default_model(),
        task=task,
        train_layers=config.train_layers,
        device=config.device,
        seed=config.seed,
    )
    warn_of_logits(model, task.kind, config.micro_batch_size)
    matrices = matrix_parameters(model)
    if not matrices:
        raise ValueError(f"model {config.model!r} must have a trainable Linear layer, got none")
    rows = encode(examples, tokenizer, kind=task.kind, max_length=config.max_length)
    return GradientSource(
        model,
        rows,
        tokenizer.pad_token_id,
        matrices,
        f"{describe(model)}; {task.name} from {task.source}, {len(rows):,} examples",
        config,
        task.kind,
    )


def warm_up(source: GradientSource, say: Callable[[str], None] | None = None) -> tuple[float, int]:
    """Train without privacy from the source's weights to ``source.config.warm_loss``.

    Args:
        source: the model and its rows.
        say: function that receives lines of text: the plan before the warm-up (or before the loss
            is computed), the longest possible time after the first step (or the time of the loss
            after the first batch, if it exceeds a minute), and a line if ``warm_loss`` was not
            reached.

    Returns:
        The running mean of the training loss in nats, and the number of steps. If ``warm_loss`` is
        None, the model is not trained, and the loss is the mean over a sample of
        ``USUAL_LOSS_EXAMPLES`` rows, or fewer for a kind of task in ``LOSS_EXAMPLES``.
    """
    say = say or (lambda line: None)
    config, model = source.config, source.model
    generator = torch.Generator().manual_seed(config.seed)
    if config.warm_loss is None:
        size = LOSS_EXAMPLES.get(source.kind, USUAL_LOSS_EXAMPLES)
        indices = source.sample(min(len(source.rows), size), generator)
        say(f"loss before any training: the mean over {len(indices)} examples")
        return mean_loss(source, indices, say), 0
    _validate.positive("warm_loss", config.warm_loss)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.warm_learning_rate)
    loss, step, most = float("nan"), 0, config.max_warm_steps
    say(
        f"warm-up without privacy: up to {most} steps of {config.warm_batch_size} examples, until "
        f"the training loss is {config.warm_loss:g}"
    )
    model.train()
    cuda = [torch.cuda.current_device()] if config.device.startswith("cuda") else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(config.seed)  # seeds dropout
        began, batches = time.monotonic(), itertools.islice(_bucketed(source, generator), most)
        for step, batch in enumerate(progress(batches, "warm-up", total=most), 1):
            with autocast(config.device, config.autocast_dtype):
                value = model(**batch).loss
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = value.item() if step == 1 else 0.95 * loss + 0.05 * value.item()
            if step == 1:
                seconds = time.monotonic() - began
                say(
                    f"warm-up: the first step took {seconds:.1f} s, so that all would take "
                    f"{most * seconds / 60:.1f} minutes"
                )
            if loss <= config.warm_loss:
                break
        else:
            say(f"warm-up: the loss is {loss:.3g} after {step} steps, above {config.warm_loss:g}")
    model.eval()
    return loss, step


def _bucketed(source: GradientSource, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Yield random batches without end, 16 at a time, with texts of similar length in one batch."""
    size = source.config.warm_batch_size
    while True:
        chosen = source.sample(min(16 * size, len(source.rows)), generator)
        batches = list(source.batches(chosen, size))
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i][1]


@torch.no_grad()
def mean_loss(
    source: GradientSource, indices: Sequence[int], say: Callable[[str], None] | None = None
) -> float:
    """Return the mean of the losses of the rows ``indices``, in the model's present mode.

    The unit is that of :func:`lowrank_dp.models.targets.row_losses`. ``say`` is as in
    :func:`warm_up`.
    """
    total, size = 0.0, source.config.micro_batch_size
    count, began = math.ceil(len(indices) / size), time.monotonic()
    for i, (_, batch) in enumerate(progress(source.batches(indices, size), "loss", total=count)):
        with autocast(source.config.device, source.config.autocast_dtype):
            total += float(row_losses(source.model, batch, source.kind).sum())
        if say and i == 0 and (minutes := count * (time.monotonic() - began) / 60) > 1:
            say(f"loss: the first of {count} batches shows that all take {minutes:.1f} minutes")
    return total / len(indices)


def add_noise(clean: dict[str, Tensor], noise_std: float, seed: int) -> dict[str, Tensor]:
    """Add N(0, noise_std^2) to every entry of the sums; ``noise_std`` is absolute.

    The noise is not secret: anyone who knows ``seed`` can reproduce it.
    """
    return dict(noisy_matrices(clean, noise_std, seed))


def noisy_matrices(
    clean: dict[str, Tensor], noise_std: float, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the entries of :func:`add_noise` one by one, to save memory."""
    for offset, (name, matrix) in enumerate(clean.items()):
        generator = torch.Generator(matrix.device).manual_seed(1_000_003 * seed + offset)
        noise = torch.randn(
            matrix.shape, generator=generator, dtype=matrix.dtype, device=matrix.device
        )
        yield name, noise.mul_(noise_std).add_(matrix)


def rows_of(model: nn.Module, gradients: dict[str, Tensor], name: str) -> Tensor:
    """Return the gradient of a layer's weight as (out, in).

    Its rows have the width of the layer's inputs, which LoRA's A projects; GPT-2 stores (in, out).
    """
    return as_out_in(model.get_submodule(name.removesuffix(".weight")), gradients[name])


def spread_layers(model: nn.Module, gradients: dict[str, Tensor], count: int) -> list[str]:
    """Choose up to ``count`` layers from the middle of the model, one per shape; never a head.

    Neither a classifier's head nor the output layer of a language model is chosen. Raises
    ValueError if no other layer of at least 16 x 16 has a nonzero gradient.
    """
    head = head_weights(model)
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, matrix in gradients.items():
        if name not in head and min(matrix.shape) >= 16 and bool(matrix.any()):
            by_shape.setdefault(tuple(matrix.shape), []).append(name)
    if not by_shape:
        raise ValueError(
            "model must have a layer of 16 x 16 or more, beside its head, with a nonzero gradient"
        )
    return [names[len(names) // 2] for names in by_shape.values()][:count]


def largest_rows(matrix: Tensor, count: int) -> Tensor:
    """Return the ``count`` rows of largest norm, or all if there are fewer, in their own order."""
    norms = torch.linalg.vector_norm(matrix, dim=1)
    return matrix[norms.topk(min(count, len(norms))).indices.sort().values]
