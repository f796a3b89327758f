"""Checks of a model and of each micro-batch before the micro-batch runs through a backend."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowrank_dp.grads import independence
from lowrank_dp.grads.axes import Layouts
from lowrank_dp.grads.backends import BACKENDS, require_compilable, run_first_alone
from lowrank_dp.grads.frequencies import require_fixed_frequencies
from lowrank_dp.grads.losses import check_labels
from lowrank_dp.grads.microbatch import MicroBatch, num_positions_of
from lowrank_dp.grads.model_state import state_kept


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Collect the model's parameters that require gradients, by name.

    Raises:
        ValueError: if no parameter requires gradients; for a parameter with a gradient hook; and
            for batch normalisation in training mode, which mixes rows.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("model must have at least one parameter with requires_grad, got none")
    for name, p in trained.items():
        if not hasattr(p, "full_tensor") and (
            p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
        ):
            raise ValueError(
                f"model parameter {name} has a gradient hook, which would not act on "
                "the gradients of single rows: remove the hook, or freeze the "
                "parameter"
            )
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"model must keep examples apart, got {name!r}: batch normalisation "
                "in training mode (use .eval() on it, or another norm layer)"
            )
    return trained


@dataclass
class Precheck:
    """Checks of one clipped sum's micro-batches, with the findings of earlier micro-batches.

    Attributes:
        backend: name of the backend.
        padding: "longest" or "max-length".
        check_rows: whether a model that is new in its situation is examined on the given rows.
        sharded: whether the model is sharded over processes.
        in_step: whether other processes run the same checks, so that the decision to run a model
            must not depend on this process's rows.
        fingerprint: a number that identifies the model's layers, their classes and their modes.
    """

    backend: str
    padding: str
    check_rows: bool
    sharded: bool
    in_step: bool
    fingerprint: int
    _lengths: set[int] = field(default_factory=set)
    _layouts: Layouts | None = None
    _ambiguous: bool = False  # rows of one position leave the layouts open

    def __call__(self, micro_batch: MicroBatch) -> MicroBatch:
        """Check a micro-batch; add the layers' layouts and the loss of the first row alone.

        Raises:
            ValueError: for labels that are no classes of the model, another length than before with
                padding "max-length", a batch so long that its rows share their rotary frequencies,
                a batch that the compiled backend does not take, and as
                :func:`lowrank_dp.grads.independence.examine` does.
        """
        model, batch = micro_batch.model, micro_batch.batch
        check_labels(model, batch, micro_batch.first_row)
        length = num_positions_of(batch)
        if length not in self._lengths:
            require_fixed_frequencies(model, length, self.padding)
        self._require_one_length(length)
        if self.backend == "compiled":
            require_compilable(micro_batch)
        loss_alone = self._run_first_alone(micro_batch)
        layouts = {} if self._layouts is None else self._layouts
        micro_batch = replace(micro_batch, layouts=layouts)
        if self.sharded:
            return micro_batch
        repeatable = (
            independence.verified(
                micro_batch, self.backend, BACKENDS, self.padding, self.fingerprint
            )
            if self.check_rows
            else independence.known_repeatable(model, self.fingerprint)
        )
        return replace(micro_batch, loss_alone=loss_alone) if repeatable else micro_batch

    def _require_one_length(self, length: int) -> None:
        self._lengths.add(length)
        if self.padding == "max-length" and len(self._lengths) > 1:
            raise ValueError(
                "micro-batches must all have one length with padding 'max-length', "
                f"got {' and '.join(map(str, sorted(self._lengths)))} positions"
            )

    def _run_first_alone(self, micro_batch: MicroBatch) -> Tensor | None:
        """Run the first row by itself where its result is needed; return its loss, or None."""
        first = self._layouts is None
        if not (first if self.in_step else micro_batch.num_rows > 1 and (first or self._ambiguous)):
            return None
        with state_kept(micro_batch.model) as state:
            loss_alone, self._layouts = run_first_alone(micro_batch, self.backend)
            if self.check_rows:
                state.require_same()
        # a row of one position fits several layouts, so the next micro-batch is examined too
        self._ambiguous = num_positions_of(micro_batch.batch) == 1
        return loss_alone
