"""Restoration for training loops that add their own noise: Opacus, or any torch optimizer.

:func:`attach_restoration` puts one hook before the step of the optimizer that moves the weights.
There ``p.grad`` has been clipped, summed, noised, scaled and (under DDP) reduced, so all that is
read has been released: post-processing, and epsilon does not change. It uses PyTorch's public
``register_step_pre_hook``, never Opacus's ``attach_step_hook``: that has one slot, the accountant
holds it, and under DDP it runs before the reduction, where all ranks but one hold no noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from scipy.special import gammaincinv
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.restore import (
    NON_PRIVATE_SCHEMES,
    SCHEMES,
    LowPassFilter,
    Report,
    momentum,
    restore_gradients,
)

__all__ = ["Restoration", "attach_restoration"]  # and RestorationCallback, at the end

_OPACUS = ("original_optimizer", "noise_multiplier", "max_grad_norm", "expected_batch_size")
_attached: WeakSet[torch.optim.Optimizer] = WeakSet()


def attach_restoration(
    optimizer: Any,
    scheme: str = "optimal",
    *,
    mean_noise_std: float | None = None,
    momentum_beta: float | None = None,
    **options: Any,
) -> Restoration:
    """Restore every noisy gradient matrix of ``optimizer`` just before each of its steps.

    Runs once per logical step: not on the micro-batches that Opacus skips. Gradients that are
    matrices with both sides above 1 are restored in float32 or float64 and handed on in their own
    type; others (biases, convolutions) pass unchanged, and parameters without a gradient are left
    out.

    Args:
        optimizer: an Opacus ``DPOptimizer`` of any mode, as ``make_private`` returns it, whose
            noise is read at every step; or any torch optimizer, whose noise is
            ``mean_noise_std``. A wrapper by Accelerate is seen through.
        scheme: a name in ``lowrank_dp.restore.SCHEMES``, but not "oracle": it is not private.
        mean_noise_std: standard deviation of the noise on each entry of ``p.grad`` as the
            optimizer sees it, in ``p.grad``'s own units; > 0. For a mean over a batch this is
            ``noise_multiplier * max_grad_norm / batch_size``. Not given with a ``DPOptimizer``.
        momentum_beta: in [0, 1): put the bias-corrected running mean of the noisy gradients, whose
            noise is smaller and known, in place of every gradient, and restore that. It stands in
            for the optimizer's own momentum: set Adam's beta1, or SGD's momentum, to 0.
        options: of :func:`lowrank_dp.restore.restore`: ``method``, ``below``,
            ``false_spike_rate``, and the scheme's own.

    Returns:
        A handle, with ``remove()``, ``state_dict()`` and ``load_state_dict()``. While the
        restoration is attached, the optimizer refuses to be copied or pickled. A new optimizer
        that loads this one's ``state_dict()`` needs an attachment of its own.

    Raises:
        ValueError: here, on a bad argument, no noise, sharded parameters, or a second attachment;
            at a step, if a gradient is too small to hold the noise that it is said to hold.

    >>> weight = torch.nn.Parameter(torch.zeros(4, 4))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> handle = attach_restoration(optimizer, mean_noise_std=1.0)
    >>> weight.grad = torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0]))
    >>> optimizer.step()
    >>> [abs(round(w, 4)) for w in weight.diagonal().tolist()]
    [8.0623, 0.0, 0.0, 0.0]
    """
    return Restoration(optimizer, scheme, mean_noise_std, momentum_beta, options)


class Restoration:
    """Handle of one attachment; see :func:`attach_restoration`, which makes it.

    Attributes:
        mean_noise_std: as given, None with Opacus; assign to it if the noise changes.
        reports: a :class:`lowrank_dp.restore.Report` for each matrix restored in the last step,
            by its parameter's index, counted over all parameter groups as torch does.
    """

    def __init__(
        self,
        optimizer: Any,
        scheme: str,
        mean_noise_std: float | None,
        momentum_beta: float | None,
        options: dict[str, Any],
    ) -> None:
        optimizer = _unwrap(optimizer)
        self._opacus = optimizer if all(hasattr(optimizer, name) for name in _OPACUS) else None
        self._inner = _unwrap(optimizer.original_optimizer) if self._opacus else optimizer
        if not isinstance(self._inner, torch.optim.Optimizer):
            _validate.fail(
                "optimizer", "an Opacus DPOptimizer or a torch optimizer", type(optimizer).__name__
            )
        if self._inner in _attached:
            raise ValueError("optimizer must not have a restoration attached yet: remove() it")
        if _validate.choice("scheme", scheme, SCHEMES) in NON_PRIVATE_SCHEMES:
            raise ValueError(
                f"scheme must be a private one, got {scheme!r}, which reads clean "
                "gradients: for diagnosis only, never for training"
            )
        if self._opacus and mean_noise_std is not None:
            raise ValueError(
                "mean_noise_std must not be given with a DPOptimizer: it is read "
                "from the optimizer at each step"
            )
        self.mean_noise_std = mean_noise_std
        self.reports: dict[str, Report] = {}
        self._scheme, self._options = scheme, options
        self._momentum = None if momentum_beta is None else momentum(momentum_beta)
        self._states: dict[str, LowPassFilter] = {}
        if self._opacus:
            self._clip_bound = float(self._opacus.max_grad_norm)
            _effective_multiplier(self._opacus)
        else:
            self._read_noise_std()
        shapes = {}
        for index, parameter in self._parameters().items():
            _require_whole(index, parameter)
            if _is_matrix(parameter):
                shapes[parameter.shape] = index, parameter.device
        trial = {
            index: torch.ones(shape, device=device) for shape, (index, device) in shapes.items()
        }
        restore_gradients(trial, 1.0, scheme, **options)  # refuses bad options before training
        self._hook = self._inner.register_step_pre_hook(self._before_step)
        vars(self._inner)["__getstate__"] = _refuse_copy  # copy, deepcopy and pickle call it
        _attached.add(self._inner)

    def remove(self) -> None:
        """Detach: later steps get their gradients as they are. The state stays readable."""
        self._hook.remove()
        vars(self._inner).pop("__getstate__", None)
        _attached.discard(self._inner)

    def state_dict(self) -> dict[str, Tensor]:
        """The running means, as tensors under flat names; empty without ``momentum_beta``.

        Computed from noisy gradients, so it may be published with the weights. Fit for
        ``torch.save`` and for safetensors.
        """
        if self._momentum is None:
            return {}
        state = {"momentum_beta": torch.tensor(-self._momentum.a[0], dtype=torch.float64)}
        for index, low_pass in self._states.items():
            state[f"{index}.output"] = low_pass.outputs[0]
            state[f"{index}.weights"] = torch.tensor(low_pass.weights[0])
            state[f"{index}.noise_stds"] = torch.tensor(low_pass.noise_stds)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state_dict` of the same parameters and ``momentum_beta``."""
        tensors = dict(state)
        saved = float(tensors.pop("momentum_beta")) if tensors else None
        beta = None if self._momentum is None else -self._momentum.a[0]
        if saved != beta:
            _validate.fail("momentum_beta of the state", f"{beta}, as attached", saved)
        parameters, states = self._parameters(), {}
        for index in dict.fromkeys(name.partition(".")[0] for name in tensors):
            try:
                output, weights, noise_stds = (
                    tensors[f"{index}.{field}"] for field in ("output", "weights", "noise_stds")
                )
                parameter = parameters[index]
            except KeyError as error:
                raise ValueError(
                    f"state must fit the optimizer's parameters, got no {error}"
                ) from None
            if output.shape != parameter.shape:
                _validate.fail(
                    f"state of parameter {index}",
                    f"of shape {tuple(parameter.shape)}",
                    tuple(output.shape),
                )
            assert self._momentum is not None
            states[index] = replace(
                self._momentum,
                outputs=(output.detach().to(parameter.device, copy=True),),
                weights=(weights.cpu().numpy().copy(),),
                noise_stds=noise_stds.cpu().numpy().copy(),
            )
        self._states = states

    def _parameters(self) -> dict[str, Tensor]:
        groups = self._inner.param_groups
        return {
            str(index): parameter
            for index, parameter in enumerate(
                parameter for group in groups for parameter in group["params"]
            )
        }

    def _read_noise_std(self) -> float:
        """Noise on each entry of ``p.grad``; read once a step, after the noise has been added."""
        opacus = self._opacus
        if opacus is None:
            return _validate.positive("mean_noise_std", self.mean_noise_std)
        # AdaClip has moved its bound for the next step by now
        bound, self._clip_bound = self._clip_bound, float(opacus.max_grad_norm)
        if not hasattr(opacus, "unclipped_num_std"):
            bound = self._clip_bound
        std = _effective_multiplier(opacus) * bound
        if opacus.loss_reduction == "mean":
            std /= opacus.expected_batch_size * opacus.accumulated_iterations
            std /= getattr(opacus, "world_size", 1)  # DDP: that batch size is one worker's
        return std

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if any(closure is not None for closure in (*args[1:2], kwargs.get("closure"))):
            raise ValueError(
                "step must be called without a closure: it would compute new "
                "gradients after the restoration"
            )
        noise_std = self._read_noise_std()
        parameters, noisy = self._parameters(), {}
        for index, parameter in parameters.items():
            grad = parameter.grad
            if grad is not None and (_is_matrix(grad) or self._momentum):
                _require_whole(index, grad)
                noisy[index] = grad if grad.dtype == torch.float64 else grad.float()
                _require_noise(index, noisy[index], noise_std)
        levels = {noise_std: noisy}
        states = {}
        if self._momentum:
            levels = {}  # means over different numbers of steps hold different noise
            for index, grad in noisy.items():
                states[index] = self._states.get(index, self._momentum).update(grad, noise_std)
                levels.setdefault(states[index].noise_std, {})[index] = states[index].mean
        reports = {}
        for level, gradients in levels.items():
            restored, report = restore_gradients(gradients, level, self._scheme, **self._options)
            reports.update(report)
            for index, grad in restored.items():
                parameters[index].grad = grad.to(parameters[index].grad.dtype)  # type: ignore
        self.reports = reports
        self._states.update(states)


def _refuse_copy() -> NoReturn:
    raise ValueError(
        "an optimizer with a restoration attached must not be copied or pickled: "
        "torch drops the hook, so the copy would step without restoration; remove() "
        "it, copy, and attach to each (optimizer.state_dict() can be saved as it is)"
    )


def _unwrap(optimizer: Any) -> Any:
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _effective_multiplier(opacus: Any) -> float:
    """Noise on an entry of the clipped sum, relative to the clipping bound."""
    sigma = float(getattr(opacus, "_adjusted_noise_multiplier", opacus.noise_multiplier))
    if not sigma > 0:
        raise ValueError(
            f"noise_multiplier of the DPOptimizer must be > 0, got {sigma:g}: without "
            "noise there is nothing to restore, and no privacy"
        )
    if hasattr(opacus, "unclipped_num_std"):  # AdaClip spends a share on its noisy count
        sigma = (sigma**-2 - (2 * opacus.unclipped_num_std) ** -2) ** -0.5
    return sigma


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and min(tensor.shape) > 1


def _require_whole(index: str, tensor: Tensor) -> None:
    if hasattr(tensor, "full_tensor") or tensor.layout != torch.strided:
        _validate.fail(
            f"parameter {index}",
            "one dense tensor (a shard's singular values are not "
            "the matrix's: use DDP, or train --shard)",
            type(tensor).__name__,
        )


def _require_noise(index: str, grad: Tensor, noise_std: float) -> None:
    norm, least = float(torch.linalg.vector_norm(grad)), noise_std * _least_norm(grad.numel())
    if norm < least:
        raise ValueError(
            f"gradient of parameter {index} {tuple(grad.shape)} must hold noise of "
            f"standard deviation {noise_std:.4g} per entry, whose norm is at least "
            f"{least:.4g}, got norm {norm:.4g}: add the noise before the step, and "
            "state mean_noise_std in the units of p.grad"
        )


@lru_cache(maxsize=1024)
def _least_norm(entries: int) -> float:
    """Norm that standard normal noise, with any signal added, exceeds but once in 1e12 draws.

    With signal the squared norm is noncentral chi-squared, which lies above the central one. A
    tenth is allowed for noise that is stated roughly.
    """
    return 0.9 * math.sqrt(2 * float(gammaincinv(entries / 2, 1e-12)))


def __getattr__(name: str) -> Any:
    if name != "RestorationCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformers import TrainerCallback  # takes seconds, so only for those who ask

    class RestorationCallback(TrainerCallback):
        """:func:`attach_restoration` for the length of a Hugging Face ``Trainer.train()``.

        Takes its arguments but the optimizer; ``handle`` is what it returned. For a trainer that
        adds noise to ``p.grad`` before its optimizer steps (in ``training_step``, say), or whose
        optimizer is Opacus's. The trainer's own clipping would rescale that noise: set
        ``max_grad_norm=0`` in ``TrainingArguments``. The momentum of a resumed run starts anew
        unless its saved ``handle.state_dict()`` is loaded.
        """

        def __init__(self, scheme: str = "optimal", **arguments: Any) -> None:
            self.scheme, self.arguments = scheme, arguments
            self.handle: Restoration | None = None

        def on_train_begin(
            self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any
        ) -> None:
            """Attach."""
            self.on_train_end(args, state, control)  # a run that failed did not end
            if args.max_grad_norm:
                _validate.fail(
                    "max_grad_norm of TrainingArguments",
                    "0 (the trainer's clipping rescales the noise)",
                    args.max_grad_norm,
                )
            self.handle = attach_restoration(optimizer, self.scheme, **self.arguments)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Detach; the handle stays readable."""
            if self.handle is not None:
                self.handle.remove()

    RestorationCallback.__qualname__ = "RestorationCallback"
    globals()[name] = RestorationCallback
    return RestorationCallback
