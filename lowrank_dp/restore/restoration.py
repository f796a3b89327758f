"""The singular values of a noisy matrix, replaced by a scheme's values for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.restore.krylov import MIN_SIDE, leading_triplets
from lowrank_dp.restore.schemes import EDGE_SCHEMES, SCHEMES, truncate
from lowrank_dp.spectrum import random_matrix as rmt
from lowrank_dp.spectrum.decomposition import to_unit

_ORDINARY = 1e12  # a float32 holds its square and the inverse of that


@dataclass(frozen=True)
class Report:
    """What was done to one matrix; computed from the noisy matrix and public values alone.

    ``action`` is "restored", "kept" or "zeroed" (nothing above the edge), or "passed" (scheme
    none). ``top`` and ``num_above_edge`` are None where no singular value was needed; on the fast
    path they come from Ritz values, which reach the singular values from below.
    """

    scheme: str
    shape: tuple[int, int]
    noise_std: float
    edge: float
    top: float | None
    num_above_edge: int | None
    action: str
    norm_before: float
    norm_after: float


def restore(
    noisy: Tensor,
    noise_std: float,
    scheme: str = "optimal",
    *,
    method: str = "fast",
    below: str = "keep",
    false_spike_rate: float | None = None,
    **options: Any,
) -> Tensor:
    """Noisy gradient with its singular values restored by ``scheme``.

    Args:
        noisy: (..., m, n), float32 or float64, any device; never mutated. Leading axes are a
            batch of matrices.
        noise_std: standard deviation of each entry's noise, absolute, in ``noisy``'s own units
            (for a DP-SGD sum: ``noise_multiplier * max_grad_norm``). Above 0 for the schemes that
            read it (``EDGE_SCHEMES``), otherwise >= 0.
        scheme: a name in ``SCHEMES``.
        method: "fast" finds the leading singular triplets by block Krylov (odd powers: matrix
            products); "exact" takes the full SVD. Their alignments with the clean gradient agree
            to a per cent. Small matrices, and schemes that need every singular value (oracle,
            partial with another target than "rmt", other powers), take the SVD in both.
        below: what the schemes of ``EDGE_SCHEMES`` do with a matrix that has nothing above the
            edge: "keep" returns it unchanged, "zero" returns zeros.
        false_spike_rate: None (the asymptotic edge), or the probability with which pure noise may
            count as a spike; values up to that higher level are then treated as noise.
        options: the scheme's own: hard and soft ``threshold``; truncate ``k``; optimal ``loss``;
            denoise ``kappa``, ``norm_correction``; partial ``alpha``, ``target``; power ``p``;
            oracle ``values``.

    Raises:
        ValueError: naming the argument, on bad shapes or types, NaN or infinite entries, unknown
            names, or an all-zero matrix that is said to hold noise.

    >>> noisy = torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0]))
    >>> [round(s, 4) for s in restore(noisy, 1.0).diagonal().tolist()]
    [8.0623, 0.0, 0.0, 0.0]
    """
    norm = _finite_norm(noisy)
    plan = _plan(norm, noisy.shape, noise_std, scheme, method, below, false_spike_rate, options)
    return _run(plan, noisy)[0]


def restore_with_report(
    noisy: Tensor,
    noise_std: float,
    scheme: str = "optimal",
    *,
    method: str = "fast",
    below: str = "keep",
    false_spike_rate: float | None = None,
    **options: Any,
) -> tuple[Tensor, list[Report]]:
    """:func:`restore`, and a :class:`Report` for each matrix of the batch in row-major order."""
    norm = _finite_norm(noisy)
    plan = _plan(norm, noisy.shape, noise_std, scheme, method, below, false_spike_rate, options)
    restored, values = _run(plan, noisy)
    before = plan.norm.flatten().tolist()
    after = _norms(restored).flatten().tolist()
    reports = []
    for s, norm_before, norm_after in zip(values, before, after, strict=True):
        top = None if s is None else float(s[0])
        above = None if s is None else int((s > plan.edge).sum())
        action = "passed" if scheme == "none" else "restored"
        if top is not None and scheme in EDGE_SCHEMES and top <= plan.trigger:
            action = "kept" if below == "keep" else "zeroed"
        reports.append(
            Report(
                scheme,
                plan.shape,
                plan.noise_std,
                plan.edge,
                top,
                above,
                action,
                norm_before,
                norm_after,
            )
        )
    return restored, reports


def restored_values(
    singular_values: Tensor,
    shape: tuple[int, int],
    noise_std: float,
    scheme: str = "optimal",
    *,
    below: str = "keep",
    false_spike_rate: float | None = None,
    **options: Any,
) -> Tensor:
    """What :func:`restore` with method "exact" puts in the place of a matrix's singular values.

    For when the decomposition is at hand, to compare schemes on it.

    Args:
        singular_values: (..., min(m, n)), all of the noisy matrix, descending, >= 0.
        shape: (m, n) of the matrix.
        noise_std, scheme, below, false_spike_rate, options: of :func:`restore`.

    Returns:
        New values, in the shape and order of ``singular_values``.

    Raises:
        ValueError: as :func:`restore`; and on values that are not a spectrum of that shape.
    """
    s = _validate.floating("singular_values", singular_values)
    if len(shape) != 2 or s.shape[-1:] != (min(shape),):
        _validate.fail(
            "singular_values",
            f"(..., min(m, n)) for a matrix of shape {tuple(shape)}",
            tuple(s.shape),
        )
    if not bool((s >= 0).all() and (s.diff(dim=-1) <= 0).all()):
        raise ValueError("singular_values must be nonnegative and descending")
    norm = torch.linalg.vector_norm(s, dim=-1)
    plan = _plan(
        norm, (*s.shape[:-1], *shape), noise_std, scheme, "exact", below, false_spike_rate, options
    )
    new = _new_values(plan, s, norm)
    if scheme not in EDGE_SCHEMES:
        return new
    return torch.where(s[..., :1] > plan.trigger, new, s if below == "keep" else 0.0)


@dataclass(frozen=True)
class _Plan:
    """Checked arguments of :func:`restore`, completed with defaults and derived levels."""

    scheme: str
    shape: tuple[int, int]
    noise_std: float
    method: str
    below: str
    norm: Tensor  # (...,) Frobenius norms of the noisy matrices
    options: dict[str, Any]
    edge: float  # values at or below it are treated as noise
    trigger: float  # the top value must exceed it for the scheme to act on a matrix
    tail: float  # what the scheme multiplies values up to the edge by


def _plan(
    norm: Tensor,
    shape: tuple[int, ...],
    noise_std: float,
    scheme: str,
    method: str,
    below: str,
    false_spike_rate: float | None,
    options: Mapping[str, Any],
) -> _Plan:
    """``shape`` (..., m, n) is that of the noisy matrices, ``norm`` (...,) their norms."""
    _validate.choice("scheme", scheme, SCHEMES)
    _validate.choice("method", method, ["fast", "exact"])
    _validate.choice("below", below, ["keep", "zero"])
    full_options = _complete(scheme, options)
    noise_std = _validate.real("noise_std", noise_std, low=0, low_open=scheme in EDGE_SCHEMES)
    if noise_std > 0 and bool((norm == 0).any()):
        raise ValueError(
            f"noisy must have a nonzero entry, got all zeros: noise of noise_std = "
            f"{noise_std:g} was not added to it"
        )
    matrix = (shape[-2], shape[-1])
    # a trial on some spectrum refuses bad options before any work is done
    trial = torch.ones(*shape[:-2] if scheme == "oracle" else (), min(matrix))
    SCHEMES[scheme](trial, matrix, 1.0, **full_options)
    edge = rmt.bulk_edge(matrix, noise_std, false_spike_rate=false_spike_rate)
    trigger = max(edge, full_options.get("kappa", 1.0) * rmt.bulk_edge(matrix, noise_std))
    tail = 1.0 - full_options["alpha"] if scheme == "partial" else 0.0
    return _Plan(scheme, matrix, noise_std, method, below, norm, full_options, edge, trigger, tail)


def _complete(scheme: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with the scheme's defaults filled in; unknown or missing ones are refused."""
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(SCHEMES[scheme]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "norm"
    }
    for name in options:
        if not parameters:
            raise ValueError(f"scheme {scheme!r} takes no options, got {name!r}")
        _validate.choice(f"option of scheme {scheme!r}", name, parameters)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise ValueError(f"{name} must be given for scheme {scheme!r}")
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return defaults | dict(options)


def _finite_norm(noisy: Tensor) -> Tensor:
    """Frobenius norms (...,) of checked matrices: one pass where looking for NaN would take two."""
    _validate.matrix("noisy", noisy, check_finite=False)
    norm = _norms(noisy.detach())
    if not bool(norm.isfinite().all()):
        _validate.matrix("noisy", noisy)  # raises, unless the norm merely overflowed
        raise ValueError(
            f"noisy must have a Frobenius norm that {noisy.dtype} can hold, got infinity"
        )
    return norm


def _norms(matrices: Tensor) -> Tensor:
    """Frobenius norms (...,), also where an entry's square would vanish or overflow."""
    norm = torch.linalg.matrix_norm(matrices)
    if bool(((norm > 1 / _ORDINARY) & (norm < _ORDINARY)).all()):
        return norm
    unit, scale = to_unit(matrices)
    return torch.linalg.matrix_norm(unit) * scale.squeeze(-1)


def _run(plan: _Plan, noisy: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Restored matrices, and the singular values found for each (None where none were needed)."""
    stack, norms = noisy.detach().reshape(-1, *plan.shape), plan.norm.reshape(-1)
    # on a CPU one by one, each done as soon as it has settled; elsewhere as one batch
    # (and for the oracle, whose values are those of the whole batch)
    size = 1 if noisy.device.type == "cpu" and plan.scheme != "oracle" else len(stack)
    if plan.scheme != "none" and not _ordinary(plan, norms):
        parts = [_apply_to_unit(plan, index, matrix) for index, matrix in enumerate(stack.split(1))]
    else:
        parts = [
            _apply(plan, *part) for part in zip(stack.split(size), norms.split(size), strict=True)
        ]
    restored = parts[0][0] if len(parts) == 1 else torch.cat([part for part, _ in parts])
    values = [row for part, s in parts for row in ([None] * len(part) if s is None else s)]
    return restored.reshape(noisy.shape), values


def _ordinary(plan: _Plan, norms: Tensor) -> bool:
    """Whether the squares of all singular values, also over the noise's, are ordinary numbers."""
    relative = norms.double() / (plan.noise_std or 1.0)
    return all(bool(((x > 1 / _ORDINARY) & (x < _ORDINARY)).all()) for x in (norms, relative))


def _apply_to_unit(plan: _Plan, index: int, noisy: Tensor) -> tuple[Tensor, Tensor | None]:
    """``_apply`` to one matrix (1, m, n) of the batch, in units of its largest entry.

    Restoring commutes with the choice of units.
    """
    unit, scale = to_unit(noisy)
    size = float(scale)
    level = edge = trigger = 0.0
    if plan.noise_std > 0:  # beyond either end, more makes no difference
        level = min(max(plan.noise_std / size, 1 / _ORDINARY), _ORDINARY)
        edge, trigger = (x / plan.noise_std * level for x in (plan.edge, plan.trigger))
    options = dict(plan.options)
    if plan.scheme == "oracle":
        options["values"] = options["values"].reshape(-1, min(plan.shape))[index] / size
    norm = torch.linalg.matrix_norm(unit)
    restored, s = _apply(
        replace(plan, noise_std=level, edge=edge, trigger=trigger, norm=norm, options=options),
        unit,
        norm,
    )
    return restored * size, None if s is None else s * size


def _apply(plan: _Plan, noisy: Tensor, norm: Tensor) -> tuple[Tensor, Tensor | None]:
    """Restored matrices (L, m, n) and their singular values (L, k) for a batch (L, m, n)."""
    if plan.scheme == "none":
        return noisy.clone(), None
    if plan.method == "fast" and plan.scheme == "power" and plan.options["p"] in (1, 3, 5, 7):
        return _odd_power(noisy, norm, int(plan.options["p"])), None
    restored, s = _fast(plan, noisy, norm) or _exact(plan, noisy, norm)
    if plan.scheme in EDGE_SCHEMES:
        empty = s[:, 0] <= plan.trigger
        if bool(empty.any()):
            other = noisy if plan.below == "keep" else torch.zeros_like(noisy)
            restored = torch.where(empty[:, None, None], other, restored)
    return restored, s


def _new_values(plan: _Plan, s: Tensor, norm: Tensor) -> Tensor:
    """The scheme's values for ``s`` (L, k), which may be the leading ones only."""
    extra = {"norm": norm} if plan.scheme == "denoise" else {}
    cut = plan.scheme in EDGE_SCHEMES and not _needs_every_value(plan)
    above = s > plan.edge
    new = SCHEMES[plan.scheme](
        torch.where(above, s, 0.0) if cut else s,
        plan.shape,
        plan.noise_std,
        **plan.options,
        **extra,
    )
    return torch.where(above, new, plan.tail * s) if cut else new


def _needs_every_value(plan: _Plan) -> bool:
    if plan.scheme == "partial":
        return isinstance(plan.options["target"], Tensor) or plan.options["target"] != "rmt"
    return plan.scheme in ("power", "oracle")


def _exact(plan: _Plan, noisy: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(noisy, full_matrices=False)
    return (u * _new_values(plan, s, norm).unsqueeze(-2)) @ vh, s


def _fast(plan: _Plan, noisy: Tensor, norm: Tensor) -> tuple[Tensor, Tensor] | None:
    """By leading triplets; None where the exact path is as good or the only one."""
    if plan.method == "exact" or min(plan.shape) < MIN_SIDE or _needs_every_value(plan):
        return None
    if plan.scheme == "truncate":
        if plan.options["k"] > min(plan.shape) // 8:
            return None

        def weight(s: Tensor) -> Tensor:
            return truncate(s, plan.shape, plan.noise_std, k=plan.options["k"]) ** 2
    else:
        aspect, scale = rmt.aspect_and_scale(plan.shape, plan.noise_std)

        def weight(s: Tensor) -> Tensor:
            return rmt.shrink_frobenius(s / scale, aspect) ** 2

    tall = plan.shape[0] > plan.shape[1]
    lead = leading_triplets(
        noisy.mT if tall else noisy, weight, level=None if plan.scheme == "truncate" else plan.edge
    )
    if lead is None:
        return None
    # on top of tail * noisy, the leading values are moved to where the scheme wants them
    change = _new_values(plan, lead.s, norm) - plan.tail * lead.s
    count = int((change != 0).sum(-1).max())
    if count == 0:
        return noisy * plan.tail, lead.s
    gains = change / torch.where(lead.s > 0, lead.s, 1.0)
    restored = lead.combine(gains[:, :count], transpose=tall)
    return (restored.add_(noisy, alpha=plan.tail) if plan.tail else restored), lead.s


def _odd_power(noisy: Tensor, norm: Tensor, p: int) -> Tensor:
    """``u s^p v^T`` at the norm of ``noisy``: the matrix times powers of its Gram matrix."""
    unit = noisy / norm.clamp(min=1e-30)[:, None, None]
    tall = unit.shape[-2] > unit.shape[-1]
    gram = unit.mT @ unit if tall else unit @ unit.mT
    result = unit
    for _ in range(p // 2):
        result = result @ gram if tall else gram @ result
        result = result / torch.linalg.matrix_norm(result, keepdim=True).clamp(min=1e-30)
    return result * norm[:, None, None]
