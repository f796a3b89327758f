"""Restoration schemes: the values that replace the singular values of a noisy matrix.

A scheme is a :class:`Scheme`, listed by name in ``SCHEMES``. Its function ``new_values`` takes
``(s, noise, **options)``: ``s`` (..., k) holds noisy singular values in descending order, and
``noise`` is the :class:`NoiseModel` of their matrix, in the units of ``s``. Every scheme but
``oracle`` reads only these inputs, so its result is exactly as private as the noisy matrix.

Sources: ``optimal`` and ``hard`` are due to Gavish & Donoho (2014, 2017); ``denoise`` and
``partial`` follow Dadsetan & Rudzicz, arXiv 2510.01137 (its first version, and its idea of moving
singular values towards the clean ones); ``truncate`` is the limit of a rank-k update; ``polar`` is
due to this package.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.restore.krylov import MAX_COUNT
from lowrank_dp.spectrum import random_matrix as rmt
from lowrank_dp.spectrum.random_matrix import NoiseModel

Shape = tuple[int, ...]
Options = Mapping[str, Any]
_SHRINKERS = {
    "frobenius": rmt.shrink_frobenius,
    "operator": rmt.shrink_operator,
    "nuclear": rmt.shrink_nuclear,
}
_ODD_POWERS = (1, 3, 5, 7)  # exponents for which `power` needs matrix products only


# --- the functions of the schemes -----------------------------------------------------------------


def none(s: Tensor, noise: NoiseModel) -> Tensor:
    """Return the noisy singular values unchanged: plain DP-SGD."""
    return s


def hard(s: Tensor, noise: NoiseModel, *, threshold: str = "optimal") -> Tensor:
    """Keep the values above the threshold and zero the others.

    ``threshold`` is "optimal" (asymptotically the best threshold for squared error) or "edge".
    """
    return torch.where(s > _threshold(noise, threshold), s, 0.0)


def soft(s: Tensor, noise: NoiseModel, *, threshold: str = "edge") -> Tensor:
    """Subtract the threshold ("edge" or "optimal") and clip at zero."""
    return (s - _threshold(noise, threshold)).clamp(min=0)


def truncate(s: Tensor, noise: NoiseModel, *, k: int) -> Tensor:
    """Keep the k >= 1 largest values at any noise level: the rank-k limit that DP-LoRA imposes.

    A matrix with a side of at most k keeps all its values.
    """
    return torch.where(torch.arange(s.shape[-1], device=s.device) < k, s, 0.0)


def optimal(s: Tensor, noise: NoiseModel, *, loss: str = "frobenius") -> Tensor:
    """Random-matrix shrinkage, asymptotically optimal for ``loss``; 0 at or below the bulk edge.

    ``loss`` is "frobenius", "operator" or "nuclear".
    """
    return _SHRINKERS[loss](s / noise.scale, noise.aspect) * noise.scale


def denoise(
    s: Tensor,
    noise: NoiseModel,
    *,
    kappa: float = 1.0,
    norm_correction: bool = True,
    norm: Tensor | None = None,
) -> Tensor:
    """Shrink, then rescale to the norm of the noisy matrix (first version of arXiv 2510.01137).

    A matrix whose top value is not above ``kappa`` >= 0 times the bulk edge is returned unchanged.
    A kappa below 1 acts as 1, because shrinkage leaves nothing below the edge. ``norm_correction``
    is True or False; False leaves out the rescaling. ``norm`` (...,) is the Frobenius norm of the
    noisy matrix, and must be given if ``s`` is not the complete spectrum.
    """
    shrunk = optimal(s, noise)
    if norm_correction:
        norm = torch.linalg.vector_norm(s, dim=-1) if norm is None else norm
        left = torch.linalg.vector_norm(shrunk, dim=-1)
        shrunk = shrunk * (norm / torch.where(left > 0, left, 1.0)).unsqueeze(-1)
    return torch.where(s[..., :1] > max(1.0, kappa) * noise.edge, shrunk, s)


def partial(
    s: Tensor,
    noise: NoiseModel,
    *,
    alpha: float = 0.5,
    target: str | Tensor = "rmt",
    level: float = 0.0,
) -> Tensor:
    """Move the values a share ``alpha`` of the way to a target t: ``(1 - alpha) s + alpha t``.

    ``alpha`` is in [0, 1]: 0 leaves the values unchanged, and 1 replaces them by the target.
    ``target`` is one of:

    - "rmt": the clean values that the noise model implies, 0 below the bulk edge;
    - "power-law" or "exponential": a decay of that form in the index, fitted to the rmt values
      above the edge (at least two values) and extended below the edge;
    - a tensor (min(m, n),): the singular values of a *public* gradient. Only their profile
      matters: they are scaled to the norm of the rmt values.

    ``level`` >= 0, absolute, takes the place of the edge if it is higher: the rmt values are 0 up
    to it.
    """
    clean = torch.where(s > level, optimal(s, noise, loss="operator"), 0.0)
    if isinstance(target, Tensor):
        profile = target.to(s) / torch.linalg.vector_norm(target.to(s))
        goal = profile * torch.linalg.vector_norm(clean, dim=-1, keepdim=True)
    else:
        goal = clean if target == "rmt" else _fitted_decay(clean, target)
    return (1 - alpha) * s + alpha * goal


def power(s: Tensor, noise: NoiseModel, *, p: float = 3) -> Tensor:
    """Raise the values to the power p > 0, and rescale to the noisy matrix's Frobenius norm."""
    top = s[..., :1]
    sharpened = (s / torch.where(top > 0, top, 1.0)) ** p
    norm, now = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (s, sharpened))
    return sharpened * (norm / torch.where(now > 0, now, 1.0))


def polar(s: Tensor, noise: NoiseModel) -> Tensor:
    """Muon on visible values: ``edge * cos_m * cos_n`` for a value above the edge, 0 for others.

    ``cos_m`` and ``cos_n`` are the cosines that random-matrix theory gives between the noisy and
    the clean singular vectors (:func:`lowrank_dp.spectrum.random_matrix.overlaps`). All visible
    directions get about the same size, and directions whose singular vectors are mostly noise get
    less. The common scale is the bulk edge of the noise, so the result does not depend on the size
    of the gradient. With a running mean of decay 0.9, the edge falls with the noise of the mean, to
    0.23 of the edge of the first step. The size of a step falls by the same factor.
    """
    theta = rmt.clean_value(s / noise.scale, noise.aspect)
    short_side, long_side = rmt.overlaps(theta, noise.aspect)
    return noise.edge * (short_side * long_side).sqrt()


def oracle(s: Tensor, noise: NoiseModel, *, values: Tensor) -> Tensor:
    """NON-PRIVATE upper bound: replace the singular values by ``values`` (..., min(m, n)).

    ``values`` are the singular values of the clean gradient ("profile"), or
    ``diag(u^T clean v)``, the best diagonal of all: see :func:`oracle_values`. For diagnosis only.
    """
    return values.to(s).reshape(s.shape)


# --- the schemes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """Scheme, with the properties that the rest of the package depends on.

    Attributes:
        new_values: the function ``(s, noise, **options)`` described at the top of the module. Its
            name is the scheme's; its keyword-only parameters are the scheme's options.
        checks: option -> function ``(value, shape)`` that returns the checked value or raises
            ``ValueError``; ``shape`` is the shape of the noisy matrices, or None if unknown.
        reads_noise_level: whether the scheme needs a noise level above 0. Such a scheme acts only
            on a matrix whose top value exceeds ``activation_level``.
        is_noise_sized: whether the new values are multiples of the noise level alone.
        private: False if the scheme reads clean gradients.
        is_identity: whether the scheme returns every matrix unchanged.
        reads_norm: whether ``new_values`` takes the norm of the noisy matrix as ``norm``.
        reads_level: whether ``new_values`` takes the level up to which values are noise as
            ``level``, where this level is above the bulk edge.
        per_matrix: options that hold one row for each matrix, in the units of the matrix.
        bulk_factor: options -> factor that multiplies the values up to the edge.
        activation_factor: options -> multiple of the bulk edge that ``activation_level`` is.
        needs_all_values: (shape, options) -> whether the leading singular values do not suffice.
        by_products: (noisy, norm, options) -> the restored matrices (L, m, n) by matrix products
            alone, or None where a decomposition is needed.
        contribution: (s, noise) -> contribution of each value to the result, >= 0. The fast method
            computes singular values until the sum of the contributions, each at most the square of
            the edge, converges.
    """

    new_values: Callable[..., Tensor]
    checks: Mapping[str, Callable[[Any, Shape | None], Any]] = field(default_factory=dict)
    reads_noise_level: bool = False
    is_noise_sized: bool = False
    private: bool = True
    is_identity: bool = False
    reads_norm: bool = False
    reads_level: bool = False
    per_matrix: tuple[str, ...] = ()
    bulk_factor: Callable[[Options], float] = lambda options: 0.0
    activation_factor: Callable[[Options], float] = lambda options: 1.0
    needs_all_values: Callable[[Shape, Options], bool] = lambda shape, options: False
    by_products: Callable[[Tensor, Tensor, Options], Tensor | None] = lambda noisy, norm, options: (
        None
    )
    contribution: Callable[[Tensor, NoiseModel], Tensor] = lambda s, noise: optimal(s, noise) ** 2

    def complete(self, options: Options, shape: Shape | None = None) -> dict[str, Any]:
        """Return the checked ``options``, with defaults for the options that are not given.

        Raises:
            ValueError: on an unknown option, a required option that is missing, or a bad value.
        """
        name, defaults = self.new_values.__name__, self._defaults()
        for option in options:
            if not defaults:
                raise ValueError(f"scheme {name!r} takes no options, got {option!r}")
            _validate.choice(f"option of scheme {name!r}", option, defaults)
        for option, default in defaults.items():
            if default is inspect.Parameter.empty and option not in options:
                raise ValueError(f"{option} must be given for scheme {name!r}")
        return {
            option: self.checks[option](value, shape)
            for option, value in (defaults | dict(options)).items()
        }

    def _defaults(self) -> dict[str, Any]:
        """Option -> default value, or ``inspect.Parameter.empty`` if the option is required."""
        parameters = inspect.signature(self.new_values).parameters
        return {name: parameters[name].default for name in self.checks}


def _one_of(name: str, *choices: str) -> Callable[[Any, Shape | None], str]:
    return lambda value, shape: _validate.choice(name, value, choices)


def _target_reaches_below_edge(options: Options) -> bool:
    return isinstance(options["target"], Tensor) or options["target"] != "rmt"


def _check_target(target: Any, shape: Shape | None) -> str | Tensor:
    if isinstance(target, str):
        return _validate.choice("target", target, ["rmt", "power-law", "exponential"])
    _validate.floating("target", target)
    if not bool((target >= 0).all() and (target > 0).any()):
        raise ValueError("target must be nonnegative and not all zero")
    if shape is not None and target.shape != (min(shape[-2:]),):
        _validate.fail("target", f"a tensor of shape ({min(shape[-2:])},)", tuple(target.shape))
    return target.double() / target.max()  # a scale that every floating-point type can hold


def _check_values(values: Any, shape: Shape | None) -> Tensor:
    _validate.floating("values", values)
    if shape is not None:
        expected = (*shape[:-2], min(shape[-2:]))
        if values.numel() != math.prod(expected) or values.shape[-1] != expected[-1]:
            _validate.fail("values", f"a tensor of shape {expected}", tuple(values.shape))
    return values


def _odd_power(noisy: Tensor, norm: Tensor, options: Options) -> Tensor | None:
    """Compute ``u s^p v^T`` at the norm of ``noisy``, for odd p, by powers of a Gram matrix.

    The result is None for any other p.
    """
    p = options["p"]
    if p not in _ODD_POWERS:
        return None
    unit = noisy / norm.clamp(min=1e-30)[:, None, None]
    tall = unit.shape[-2] > unit.shape[-1]
    gram = unit.mT @ unit if tall else unit @ unit.mT
    result = unit
    for _ in range(int(p) // 2):
        result = result @ gram if tall else gram @ result
        result = result / torch.linalg.matrix_norm(result, keepdim=True).clamp(min=1e-30)
    return result * norm[:, None, None]


SCHEMES: dict[str, Scheme] = {
    "none": Scheme(none, is_identity=True),
    "hard": Scheme(
        hard, {"threshold": _one_of("threshold", "optimal", "edge")}, reads_noise_level=True
    ),
    "soft": Scheme(
        soft, {"threshold": _one_of("threshold", "optimal", "edge")}, reads_noise_level=True
    ),
    "truncate": Scheme(
        truncate,
        {"k": lambda k, shape: _validate.integer("k", k)},
        needs_all_values=lambda shape, options: options["k"] > min(min(shape) // 8, MAX_COUNT),
    ),
    "optimal": Scheme(optimal, {"loss": _one_of("loss", *_SHRINKERS)}, reads_noise_level=True),
    "denoise": Scheme(
        denoise,
        {
            "kappa": lambda kappa, shape: _validate.real("kappa", kappa, low=0),
            "norm_correction": lambda correct, shape: _validate.boolean("norm_correction", correct),
        },
        reads_noise_level=True,
        reads_norm=True,
        activation_factor=lambda options: options["kappa"],
    ),
    "partial": Scheme(
        partial,
        {
            "alpha": lambda alpha, shape: _validate.real("alpha", alpha, low=0, high=1),
            "target": _check_target,
        },
        reads_noise_level=True,
        reads_level=True,
        bulk_factor=lambda options: 1.0 - options["alpha"],
        needs_all_values=lambda shape, options: _target_reaches_below_edge(options),
    ),
    "power": Scheme(
        power,
        {"p": lambda p, shape: _validate.positive("p", p)},
        needs_all_values=lambda shape, options: True,
        by_products=_odd_power,
    ),
    "polar": Scheme(
        polar,
        reads_noise_level=True,
        is_noise_sized=True,
        contribution=lambda s, noise: polar(s, noise) ** 2,
    ),
    "oracle": Scheme(
        oracle,
        {"values": _check_values},
        private=False,
        per_matrix=("values",),
        needs_all_values=lambda shape, options: True,
    ),
}
EDGE_SCHEMES = tuple(name for name, scheme in SCHEMES.items() if scheme.reads_noise_level)
NON_PRIVATE_SCHEMES = tuple(name for name, scheme in SCHEMES.items() if not scheme.private)


def _threshold(noise: NoiseModel, kind: str) -> float:
    return noise.edge if kind == "edge" else rmt.hard_threshold(noise.aspect) * noise.scale


def _fitted_decay(clean: Tensor, kind: str) -> Tensor:
    """Decay at every index, fitted by least squares to the logs of the nonzero ``clean`` values."""
    index = torch.arange(1, clean.shape[-1] + 1, dtype=clean.dtype, device=clean.device)
    x = (index.log() if kind == "power-law" else index).expand_as(clean)
    seen = (clean > 0).to(clean.dtype)
    count = seen.sum(-1, keepdim=True)
    log = torch.where(clean > 0, clean, 1.0).log()
    mean_x, mean_log = ((seen * v).sum(-1, keepdim=True) / count.clamp(min=1) for v in (x, log))
    covariance = (seen * (x - mean_x) * (log - mean_log)).sum(-1, keepdim=True)
    slope = covariance / (seen * (x - mean_x) ** 2).sum(-1, keepdim=True).clamp(min=1e-30)
    fit = torch.exp(mean_log + slope * (x - mean_x))
    return torch.where(count >= 2, fit, clean)
