"""Restoration inside a Hugging Face ``Trainer``."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback

from lowrank_dp import _validate
from lowrank_dp.optim.hook import Restoration, attach_restoration


class RestorationCallback(TrainerCallback):
    """Attach a restoration to the optimizer for the duration of ``Trainer.train()``.

    The trainer must add noise to ``p.grad`` before its optimizer steps (in ``training_step``, for
    example), or use an optimizer of Opacus. Set ``max_grad_norm=0`` in ``TrainingArguments``, since
    the trainer's own clipping would rescale the noise.

    The running means are saved with the optimizer in each checkpoint (``optimizer.pt``), and
    ``Trainer.train(resume_from_checkpoint=...)`` continues from them. A run that is resumed from a
    checkpoint without running means starts them anew, with a warning.

    Args:
        scheme: a name in ``lowrank_dp.restore.SCHEMES``.
        arguments: other keyword arguments of :func:`attach_restoration`.

    Attributes:
        handle: the handle of the last attachment, None before the first.

    Raises:
        ValueError: when training begins, in the cases of :func:`attach_restoration`; also if
            ``max_grad_norm`` of ``TrainingArguments`` is not 0, or if the checkpoint holds the
            running means of another filter.
    """

    def __init__(self, scheme: str = "optimal", **arguments: Any) -> None:
        self.scheme, self.arguments = scheme, arguments
        self.handle: Restoration | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Attach the restoration."""
        self.on_train_end(args, state, control)  # a run that failed did not detach
        if args.max_grad_norm:
            _validate.fail(
                "max_grad_norm of TrainingArguments",
                "0 (the trainer's clipping rescales the noise)",
                args.max_grad_norm,
            )
        self.handle = attach_restoration(optimizer, self.scheme, **self.arguments)
        if state.global_step and self.handle.lacks_running_means:
            warnings.warn(
                "the checkpoint that the run is resumed from holds no running means of a "
                "restoration: the running means start anew",
                stacklevel=2,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach the restoration; the handle stays readable."""
        if self.handle is not None:
            self.handle.remove()
