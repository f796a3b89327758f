"""Schemes: pure functions ``(s, shape, noise_std, **options) -> s`` on singular values.

``s`` (..., k) holds noisy singular values in descending order, ``shape`` is (..., m, n) of the
matrix they belong to, ``noise_std`` the standard deviation of one entry's noise in the same units.
All but ``oracle`` read nothing else, so what they return is exactly as private as what they read.

Sources: ``optimal`` and ``hard``, Gavish & Donoho (2014, 2017); ``denoise`` and ``partial``,
Dadsetan & Rudzicz, arXiv 2510.01137 (its first version, and its idea of moving singular values
towards the clean ones); ``truncate`` is the limit of a rank-k update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.spectrum import random_matrix as rmt

Shape = tuple[int, ...]
_SHRINKERS = {
    "frobenius": rmt.shrink_frobenius,
    "operator": rmt.shrink_operator,
    "nuclear": rmt.shrink_nuclear,
}


def none(s: Tensor, shape: Shape, noise_std: float) -> Tensor:
    """Leave the noisy singular values alone: plain DP-SGD."""
    return s


def hard(s: Tensor, shape: Shape, noise_std: float, *, threshold: str = "optimal") -> Tensor:
    """Keep values above the threshold, zero the rest.

    ``threshold``: "optimal" (the asymptotically best one for squared error) or "edge".
    """
    return torch.where(s > _threshold(shape, noise_std, threshold), s, 0.0)


def soft(s: Tensor, shape: Shape, noise_std: float, *, threshold: str = "edge") -> Tensor:
    """Subtract the threshold ("edge" or "optimal") and clip at zero."""
    return (s - _threshold(shape, noise_std, threshold)).clamp(min=0)


def truncate(s: Tensor, shape: Shape, noise_std: float, *, k: int) -> Tensor:
    """Keep the k largest values whatever the noise: the rank-k limit that DP-LoRA imposes.

    A matrix with a side of k or less keeps all of them.
    """
    k = _validate.integer("k", k)
    return torch.where(torch.arange(s.shape[-1], device=s.device) < k, s, 0.0)


def optimal(s: Tensor, shape: Shape, noise_std: float, *, loss: str = "frobenius") -> Tensor:
    """Random-matrix shrinkage, asymptotically optimal for ``loss``; 0 at or below the bulk edge.

    ``loss``: "frobenius", "operator" or "nuclear".
    """
    shrink = _SHRINKERS[_validate.choice("loss", loss, _SHRINKERS)]
    aspect, scale = rmt.aspect_and_scale(shape, noise_std)
    return shrink(s / scale, aspect) * scale


def denoise(
    s: Tensor,
    shape: Shape,
    noise_std: float,
    *,
    kappa: float = 1.0,
    norm_correction: bool = True,
    norm: Tensor | None = None,
) -> Tensor:
    """First version of arXiv 2510.01137: shrink, then rescale to the noisy matrix's norm.

    A matrix whose top value is not above ``kappa`` times the edge is left alone (kappa below 1
    acts as 1: shrinkage leaves nothing there). ``norm`` (...,) is the noisy matrix's Frobenius
    norm, for when ``s`` is not the complete spectrum.
    """
    trigger = max(1.0, _validate.real("kappa", kappa, low=0)) * rmt.bulk_edge(shape, noise_std)
    shrunk = optimal(s, shape, noise_std)
    if norm_correction:
        norm = torch.linalg.vector_norm(s, dim=-1) if norm is None else norm
        left = torch.linalg.vector_norm(shrunk, dim=-1)
        shrunk = shrunk * (norm / torch.where(left > 0, left, 1.0)).unsqueeze(-1)
    return torch.where(s[..., :1] > trigger, shrunk, s)


def partial(
    s: Tensor, shape: Shape, noise_std: float, *, alpha: float = 0.5, target: str | Tensor = "rmt"
) -> Tensor:
    """Move the values a share ``alpha`` of the way to a target: ``(1-alpha) s + alpha t``.

    ``target``: "rmt" (the clean value that the model of noise implies, 0 below the edge);
    "power-law" or "exponential" (that decay in the index, fitted to the rmt values above the
    edge, at least two of them, and carried on below it); or the profile of a *public* gradient, a
    tensor (min(m, n),) of which only the shape is used: it is scaled to the rmt values' norm.
    """
    alpha = _validate.real("alpha", alpha, low=0, high=1)
    clean = optimal(s, shape, noise_std, loss="operator")
    if not isinstance(target, str):
        _validate.floating("target", target)
        if not bool((target >= 0).all() and (target > 0).any()):
            raise ValueError("target must be nonnegative and not all zero")
        if target.shape != s.shape[-1:]:
            expected = f"a tensor of shape {tuple(s.shape[-1:])}"
            _validate.fail("target", expected, tuple(target.shape))
        profile = target.to(s) / torch.linalg.vector_norm(target.to(s))
        goal = profile * torch.linalg.vector_norm(clean, dim=-1, keepdim=True)
    elif _validate.choice("target", target, ["rmt", "power-law", "exponential"]) == "rmt":
        goal = clean
    else:
        goal = _fitted_decay(clean, target)
    return (1 - alpha) * s + alpha * goal


def power(s: Tensor, shape: Shape, noise_std: float, *, p: float = 3) -> Tensor:
    """``s ** p``, rescaled to the noisy matrix's Frobenius norm; p > 0."""
    p = _validate.positive("p", p)
    top = s[..., :1]
    sharpened = (s / torch.where(top > 0, top, 1.0)) ** p
    norm, now = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (s, sharpened))
    return sharpened * (norm / torch.where(now > 0, now, 1.0))


def oracle(s: Tensor, shape: Shape, noise_std: float, *, values: Tensor) -> Tensor:
    """NON-PRIVATE ceiling: put ``values`` (..., min(m, n)) in place of the singular values.

    Give the clean gradient's singular values ("profile"), or ``diag(u^T clean v)``, the best
    diagonal there is: see :func:`oracle_values`. For diagnosis only.
    """
    _validate.floating("values", values)
    if values.numel() != s.numel() or values.shape[-1] != s.shape[-1]:
        _validate.fail("values", f"a tensor of shape {tuple(s.shape)}", tuple(values.shape))
    return values.to(s).reshape(s.shape)


SCHEMES: dict[str, Callable[..., Tensor]] = {
    "none": none,
    "hard": hard,
    "soft": soft,
    "truncate": truncate,
    "optimal": optimal,
    "denoise": denoise,
    "partial": partial,
    "power": power,
    "oracle": oracle,
}
# what the schemes that read the noise level need to know; the others act on every matrix alike
EDGE_SCHEMES = ("hard", "soft", "optimal", "denoise", "partial")
NON_PRIVATE_SCHEMES = ("oracle",)


def _threshold(shape: Shape, noise_std: float, kind: str) -> float:
    if _validate.choice("threshold", kind, ["optimal", "edge"]) == "edge":
        return rmt.bulk_edge(shape, noise_std)
    aspect, scale = rmt.aspect_and_scale(shape, noise_std)
    return rmt.hard_threshold(aspect) * scale


def _fitted_decay(clean: Tensor, kind: str) -> Tensor:
    """Least-squares decay through the logs of the nonzero ``clean`` values, at every index."""
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
