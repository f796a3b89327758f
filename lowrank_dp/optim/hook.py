"""Restoration for training loops that add their own noise: Opacus, or any torch optimizer.

:func:`attach_restoration` registers one hook before the step of the optimizer that moves the
weights. At that point ``p.grad`` has been clipped, summed, noised, scaled and (under DDP) reduced.
The restoration therefore reads released gradients only: it is post-processing, and epsilon does not
change. The hook is PyTorch's public ``register_step_pre_hook``. Opacus's own ``attach_step_hook``
is not suitable: the hook has a single slot, which the accountant holds, and under DDP it runs
before the reduction, where only rank 0 holds noise.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lowrank_dp import _validate
from lowrank_dp.optim.inspection import (
    HANDLE,
    STATE,
    effective_multiplier,
    is_adaclip,
    is_opacus,
    opacus_noise_std,
    require_whole,
    unwatch_bound,
    unwrap,
    warn_if_not_restored,
    warn_of_other_momentum,
    watch_bound,
)
from lowrank_dp.optim.noise_level import NOISE_LEVEL
from lowrank_dp.restore import (
    SCHEMES,
    GradientRestorer,
    LowPassFilter,
    Report,
    check_arguments,
    exponential_average,
    require_noise,
)
from lowrank_dp.restore.gradients import is_matrix

# names of a running mean's tensors in a state_dict; those of other filters keep their names
_STATE_KEYS = {"output0": "output", "weights0": "weights", "noise_stds": "noise_stds"}
_FILTER_KEYS = ("low_pass_b", "low_pass_a")
# hook of every optimizer, since torch calls no hook when a plain optimizer loads a state
register_optimizer_step_pre_hook(warn_if_not_restored)


def attach_restoration(
    optimizer: Any,
    scheme: str = "optimal",
    *,
    mean_noise_std: float | None = None,
    momentum_beta: float | None = None,
    low_pass: LowPassFilter | None = None,
    **options: Any,
) -> Restoration:
    """Restore every noisy gradient matrix of ``optimizer`` just before each of its steps.

    The restoration runs once per logical step, not on the micro-batches that Opacus skips.
    Gradients that are matrices with both sides above 1 are restored in float32 or float64 and
    returned in their own type. Gradients of 0, 1, 3 or more axes (biases, convolutions) and
    matrices with a side of 1 are not restored, though their running means are taken. Parameters
    without a gradient are left out.

    By default, each noisy gradient is restored alone, and a matrix without a singular value above
    the edge is kept. ``momentum_beta=0.9`` gives gradients nearer to the clean gradient
    (``momentum`` in ``paper_artifacts``), but needs an optimizer without momentum, and saved few
    steps or none at tuned learning rates (``steps_sst2``, ``steps_sst2_gap``). ``below="zero"`` is
    not the default, since the zeroed gradients still lower the loss (``noise_cost``).

    The running means are part of ``optimizer.state_dict()``, under the key
    ``"lowrank_dp.restoration"`` of its ``"state"``. An optimizer that loads this dictionary
    continues from the saved running means. The restoration may be attached before or after.

    Args:
        optimizer: an Opacus ``DPOptimizer`` of any mode, as ``make_private`` returns it, whose
            noise level is read at every step; or any torch optimizer, whose noise level is
            ``mean_noise_std``. An optimizer wrapped by Accelerate is unwrapped.
        scheme: a name in ``lowrank_dp.restore.SCHEMES``, but not "oracle", which is not private.
        mean_noise_std: standard deviation of the noise on each entry of ``p.grad`` as the
            optimizer sees it, absolute, in the units of ``p.grad``; > 0. For a mean over a batch,
            this is ``noise_multiplier * max_grad_norm / batch_size``. Must not be given with a
            ``DPOptimizer``.
        momentum_beta: in [0, 1): replace every gradient by the bias-corrected running mean of the
            noisy gradients, whose noise is smaller and known, and restore the mean. The running
            mean takes the place of the optimizer's own momentum: set Adam's beta1, or SGD's
            momentum, to 0. If the optimizer has its own momentum, a warning is given.
        low_pass: filter over the noisy gradients, in its initial state, in place of
            ``momentum_beta``, such as ``LowPassFilter(b=(0.15, -0.05), a=(-0.9,))`` (DOPPLER, arXiv
            2408.13460) or ``kalman_filter(0.7)`` (the filter of DiSK, arXiv 2410.03883, without
            its look-ahead). A filter without a steady start gives the warning about momentum;
            DiSK combines the Kalman filter with Adam.
        options: keyword arguments of :func:`lowrank_dp.restore.restore`: ``method``, ``below``,
            ``false_spike_rate``, and the options of the scheme.

    Returns:
        A handle, with ``remove()``, ``state_dict()`` and ``load_state_dict()``. A copy of the
        optimizer by ``copy.deepcopy`` has its own restoration, in the same state;
        :func:`restoration_of` returns its handle. While the restoration is attached, pickling and
        ``copy.copy`` raise ValueError, and so does any copy of a ``DPOptimizer``. A new optimizer
        that loads the ``state_dict()`` of this optimizer needs its own attachment.

    Raises:
        ValueError: on a bad argument, no noise, sharded parameters, a second attachment, AdamBC or
            Muon with ``bias_correction``, or running means of another filter in the loaded state. A
            step raises ValueError if a gradient is too small to contain the stated noise.

    >>> weight = torch.nn.Parameter(torch.zeros(4, 4))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> handle = attach_restoration(optimizer, mean_noise_std=1.0)
    >>> weight.grad = torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0]))
    >>> optimizer.step()
    >>> [abs(round(w, 4)) for w in weight.diagonal().tolist()]
    [8.0623, 0.0, 0.0, 0.0]
    """
    if momentum_beta is not None:
        if low_pass is not None:
            raise ValueError("momentum_beta and low_pass must not both be given")
        return Restoration(
            optimizer,
            scheme,
            mean_noise_std,
            exponential_average(momentum_beta),
            options,
            beta=float(momentum_beta),
        )
    return Restoration(optimizer, scheme, mean_noise_std, low_pass, options)


def restoration_of(optimizer: Any) -> Restoration | None:
    """Return the handle of the restoration that is attached to ``optimizer``, or None.

    Args:
        optimizer: a torch optimizer or an Opacus ``DPOptimizer``, also if wrapped by Accelerate.
    """
    optimizer = unwrap(optimizer)
    return vars(unwrap(getattr(optimizer, "original_optimizer", optimizer))).get(HANDLE)


class Restoration:
    """Handle of an optimizer's restoration, made by :func:`attach_restoration`.

    Attributes:
        mean_noise_std: noise level in the units of ``p.grad``, None with Opacus; assign a new value
            if the noise level changes.
    """

    def __init__(
        self,
        optimizer: Any,
        scheme: str,
        mean_noise_std: float | None,
        low_pass: LowPassFilter | None,
        options: dict[str, Any],
        *,
        beta: float | None = None,
    ) -> None:
        optimizer = unwrap(optimizer)
        self._opacus = optimizer if is_opacus(optimizer) else None
        self._inner = unwrap(optimizer.original_optimizer) if self._opacus else optimizer
        self._check(optimizer, scheme, mean_noise_std)
        self.mean_noise_std = mean_noise_std
        self._low_pass, self._beta = low_pass, beta
        self._clip_bound = 0.0  # AdaClip's bound in the step; set between noise and step
        self._restorer = GradientRestorer(scheme, low_pass=low_pass, **options)
        if self._opacus:
            effective_multiplier(self._opacus)
        else:
            self._read_noise_std()
        for index, parameter in self._parameters().items():
            require_whole(index, parameter)
            if is_matrix(parameter):
                check_arguments(scheme, tuple(parameter.shape), **options)
        if STATE in self._inner.state:  # a state was loaded before the attachment
            self.load_state_dict(self._inner.state[STATE])
            del self._inner.state[STATE]
        if low_pass is not None and not low_pass.steady_start:
            warn_of_other_momentum(self._inner)
        self._register()

    def _register(self) -> None:
        inner = self._inner
        self._hooks = [
            inner.register_step_pre_hook(self._before_step),
            inner.register_state_dict_post_hook(self._save_with),
            inner.register_load_state_dict_pre_hook(self._load_with),
        ]
        # the copy module and pickle look up these attributes of the optimizer
        refusing = {"__getstate__": _refuse_copy, "__deepcopy__": _refuse_copy}
        vars(inner).update({HANDLE: self, **refusing})
        if self._opacus:
            vars(self._opacus).update(refusing)
            if is_adaclip(self._opacus):
                watch_bound(self._opacus, lambda bound: vars(self).update(_clip_bound=bound))
        else:
            vars(inner)["__deepcopy__"] = self._copy_optimizer

    def _unregister(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if restoration_of(self._inner) is self:
            if self._opacus:
                unwatch_bound(self._opacus)
            for optimizer in (self._inner, self._opacus):
                for name in (HANDLE, "__getstate__", "__deepcopy__"):
                    vars(optimizer or self._inner).pop(name, None)

    def _copy_optimizer(self, memo: dict[int, Any]) -> torch.optim.Optimizer:
        """Copy the optimizer, and attach a copy of this restoration to the copy."""
        self._unregister()
        try:
            inner = copy.deepcopy(self._inner, memo)
        finally:
            self._register()
        twin = object.__new__(Restoration)
        vars(twin).update(vars(self))
        twin._inner, twin._restorer = inner, copy.deepcopy(self._restorer, memo)
        twin._register()
        return inner

    def __deepcopy__(self, memo: dict[int, Any]) -> Restoration | None:
        """Return the handle of a deep copy of the optimizer."""
        return restoration_of(copy.deepcopy(self._opacus or self._inner, memo))

    def _check(self, optimizer: Any, scheme: str, mean_noise_std: float | None) -> None:
        if not isinstance(self._inner, torch.optim.Optimizer):
            _validate.fail(
                "optimizer", "an Opacus DPOptimizer or a torch optimizer", type(optimizer).__name__
            )
        if HANDLE in vars(self._inner):
            raise ValueError("optimizer must not have a restoration attached yet: remove() it")
        if not SCHEMES[_validate.choice("scheme", scheme, SCHEMES)].private:
            raise ValueError(
                f"scheme must be a private one, got {scheme!r}, which reads clean "
                "gradients: for diagnosis only, never for training"
            )
        if any(NOISE_LEVEL in group for group in self._inner.param_groups):
            raise ValueError(
                f"optimizer must not correct for the noise, got {type(self._inner).__name__}: the "
                "noise that is left in a restored matrix is not known"
            )
        if self._opacus and mean_noise_std is not None:
            raise ValueError(
                "mean_noise_std must not be given with a DPOptimizer: it is read "
                "from the optimizer at each step"
            )

    @property
    def reports(self) -> dict[str, Report]:
        """Reports (:class:`lowrank_dp.restore.Report`) of the matrices restored in the last step.

        The key is the index of the parameter, counted over all parameter groups as torch does.
        """
        return self._restorer.reports

    @property
    def lacks_running_means(self) -> bool:
        """Whether the restoration has a filter, and has received no gradient yet."""
        return self._low_pass is not None and not self._restorer.filters

    def remove(self) -> None:
        """Detach: later steps use their gradients unchanged. The state stays readable."""
        self._unregister()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running means as tensors under flat names; empty without a filter.

        The state is computed from noisy gradients, so it may be published with the weights. The
        state can be saved by ``torch.save`` and by safetensors.
        """
        state = self._coefficients()
        for name, tensor in self._restorer.tensors().items():
            index, _, key = name.partition(".")
            state[f"{index}.{key if self._beta is None else _STATE_KEYS[key]}"] = tensor
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a :meth:`state_dict` of the same parameters and filter.

        Raises:
            ValueError: if the state belongs to another filter or to other parameters.
        """
        tensors = dict(state)
        self._require_same_filter(tensors)
        parameters = self._parameters()
        loaded: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            index, _, key = name.partition(".")
            if index not in parameters:
                raise ValueError(f"state must fit the optimizer's parameters, got no {index!r}")
            if key.startswith(("input", "output")) and tensor.shape != parameters[index].shape:
                _validate.fail(
                    f"state of parameter {index}",
                    f"of shape {tuple(parameters[index].shape)}",
                    tuple(tensor.shape),
                )
            if self._beta is not None:
                saved = {new: old for old, new in _STATE_KEYS.items()}
                key = saved[key] if key in saved else key
            loaded[f"{index}.{key}"] = tensor
        try:
            self._restorer.load_tensors(loaded, parameters)
        except KeyError as error:
            raise ValueError(f"state must fit the optimizer's parameters, got no {error}") from None

    def _save_with(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """Add the running means to a state_dict of the optimizer."""
        own = self.state_dict()
        return {**saved, "state": {**saved["state"], STATE: own}} if own else saved

    def _load_with(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """Load the running means from a state_dict that the optimizer loads."""
        state = dict(saved["state"])
        means = state.pop(STATE, None)
        if means is not None:
            self.load_state_dict(means)
        elif self._low_pass is not None:
            warnings.warn(
                "the state_dict that the optimizer loads holds no running means of a restoration; "
                "the present running means are kept: load the handle's state_dict() too",
                stacklevel=4,
            )
        return {**saved, "state": state}

    def _coefficients(self) -> dict[str, Tensor]:
        """Return the tensors of a state_dict that identify the filter."""
        if self._low_pass is None:
            return {}
        if self._beta is not None:
            return {"momentum_beta": torch.tensor(self._beta, dtype=torch.float64)}
        coefficients = (self._low_pass.b, (float(self._low_pass.steady_start), *self._low_pass.a))
        return {
            name: torch.tensor(values, dtype=torch.float64)
            for name, values in zip(_FILTER_KEYS, coefficients, strict=True)
        }

    def _require_same_filter(self, tensors: dict[str, Tensor]) -> None:
        """Remove the filter's coefficients from a state_dict; raise ValueError if they differ."""
        own = self._coefficients()
        for name in ("momentum_beta", *_FILTER_KEYS):
            saved = tensors.pop(name).tolist() if name in tensors else None
            attached = own[name].tolist() if name in own else None
            if saved != attached:
                _validate.fail(f"{name} of the state", f"{attached}, as attached", saved)

    def _parameters(self) -> dict[str, Tensor]:
        groups = self._inner.param_groups
        return {
            str(index): parameter
            for index, parameter in enumerate(
                parameter for group in groups for parameter in group["params"]
            )
        }

    def _read_noise_std(self) -> float:
        """Return the noise level of ``p.grad``; call once per step, after the noise is added."""
        opacus = self._opacus
        if opacus is None:
            return _validate.positive("mean_noise_std", self.mean_noise_std)
        bound = self._clip_bound if is_adaclip(opacus) else opacus.max_grad_norm
        return opacus_noise_std(opacus, float(bound))

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
            if grad is not None and (is_matrix(grad) or self._low_pass is not None):
                require_whole(index, grad)
                noisy[index] = grad if grad.dtype == torch.float64 else grad.float()
                require_noise(
                    f"gradient of parameter {index}",
                    noisy[index],
                    noise_std,
                    remedy="add the noise before the step, and state mean_noise_std in the units "
                    "of p.grad",
                )
        for index, grad in self._restorer.restore(noisy, noise_std).items():
            parameters[index].grad = grad.to(parameters[index].grad.dtype)  # type: ignore


def _refuse_copy(memo: Any = None) -> NoReturn:
    raise ValueError(
        "an optimizer with a restoration attached must not be pickled or copied by copy.copy, and "
        "a DPOptimizer not by copy.deepcopy: the copy would step without restoration; save "
        "optimizer.state_dict(), or remove() the restoration first"
    )
