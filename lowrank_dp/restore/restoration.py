"""Restoration of a noisy matrix: its singular values are replaced by a scheme's values.

The noisy matrix is decomposed as ``u diag(s) v^T``. Its restoration is
``u diag(new_values(s)) v^T``: the noisy singular vectors stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.restore.krylov import MIN_SIDE, Leading, leading_triplets
from lowrank_dp.restore.norms import finite_norms, frobenius_norms, is_ordinary, refuse_zeros
from lowrank_dp.restore.plan import Plan, check_arguments, make_plan
from lowrank_dp.restore.schemes import SCHEMES
from lowrank_dp.spectrum.decomposition import to_unit
from lowrank_dp.spectrum.random_matrix import check_sides

# half-precision types, and the type in which their restoration is computed
_COMPUTED_IN = {"float16": torch.float32, "bfloat16": torch.float32}
_MOST_AXES = 3  # number of axes of a batch of matrices; convolutions have gradients of more axes
Matrices = TypeVar("Matrices", Tensor, np.ndarray)


@dataclass(frozen=True)
class Report:
    """Report on one restored matrix, computed from the noisy matrix and public values alone.

    Attributes:
        scheme: name of the scheme.
        shape: (m, n) of the matrix.
        noise_std: standard deviation of the noise on each entry, absolute.
        edge: level up to which singular values are treated as noise, absolute.
        top: largest singular value; None if the scheme needed no singular value.
        num_above_edge: number of singular values above the edge; None if ``top`` is None. On the
            fast path, ``top`` and this number come from Ritz values, which approach the singular
            values from below.
        action: "restored"; "kept" or "zeroed" if no value is above the level at which the scheme
            acts, which is the edge (for ``denoise``, ``kappa`` times the edge if kappa > 1);
            "passed" for the scheme none.
        norm_before, norm_after: Frobenius norms of the noisy and of the restored matrix.
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
    noisy: Matrices,
    noise_std: float,
    scheme: str = "optimal",
    *,
    method: str = "fast",
    below: str = "keep",
    false_spike_rate: float | None = None,
    **options: Any,
) -> Matrices:
    """Restore the singular values of a noisy gradient by ``scheme``.

    Args:
        noisy: a torch tensor on any device, or a numpy array; float16, bfloat16, float32 or
            float64; never mutated. Half precision is restored in float32. The number of axes
            decides:

            - two axes (m, n): the matrix is restored, also if a side is 1;
            - three axes (L, m, n): each matrix of the batch is restored;
            - four or more axes: the array is returned unchanged, as the gradient of a convolution
              (``attach_restoration`` does the same). Flatten a batch of matrices to three axes;
            - fewer than two axes: ValueError.
        noise_std: standard deviation of the noise on each entry, absolute, in the units of
            ``noisy`` (for a DP-SGD sum: ``noise_multiplier * max_grad_norm``); > 0 for the schemes
            that read the noise level (``EDGE_SCHEMES``), and >= 0 for the others.
        scheme: a name in ``SCHEMES``.
        method: "fast" finds the leading singular triplets by block Krylov iteration (odd powers:
            by matrix products); "exact" takes the full SVD. "fast" may miss values close to the
            edge, or find them roughly; if it misses all of them, ``below`` applies. So no bound
            holds for the difference of the two results. The alignments with the clean gradient
            mostly agree to one per cent for soft, denoise, optimal (losses "frobenius", "nuclear")
            and hard (threshold "optimal"). In simulations with signals close to the edge, the
            alignment of "fast" was up to 7% lower. The other options in ``EDGE_SCHEMES`` give
            values close to the edge a large weight. Their alignments differed by up to 40%, and
            "fast" more often had the larger one.
            "truncate" may keep other directions where the k-th value is close to the next value.
            Both methods take the SVD of small matrices, and for schemes that need every singular
            value (oracle, partial with a target other than "rmt", other powers).
        below: treatment of a matrix without a value above the edge (for ``denoise``, above
            ``kappa`` times the edge if kappa > 1) by the schemes in ``EDGE_SCHEMES``: "keep"
            returns the matrix unchanged, "zero" returns zeros.
        false_spike_rate: None for the asymptotic edge, or the probability, in (0, 1), with which
            pure noise may count as a spike. Values up to the corresponding level are then treated
            as noise, or values up to the asymptotic edge if that is higher (rates above about one
            in seven). Only for the schemes in ``EDGE_SCHEMES``.
        options: options of the scheme: hard and soft ``threshold`` ("optimal", "edge"); truncate
            ``k`` (integer >= 1); optimal ``loss`` ("frobenius", "operator", "nuclear"); denoise
            ``kappa`` (>= 0), ``norm_correction`` (bool); partial ``alpha`` (in [0, 1]), ``target``
            ("rmt", "power-law", "exponential", tensor); power ``p`` (> 0); oracle ``values``.

    Returns:
        The restored matrices, in the shape, type and device of ``noisy``; a numpy array for a numpy
        array.

    Raises:
        ValueError: naming the argument, on a bad shape or type, NaN or infinite entries, an
            unknown name, a bad option, or an all-zero matrix with ``noise_std`` > 0; and if a
            restored entry is too large for the type of ``noisy``.

    >>> noisy = torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0]))
    >>> [round(s, 4) for s in restore(noisy, 1.0).diagonal().tolist()]
    [8.0623, 0.0, 0.0, 0.0]
    """
    arguments = {"method": method, "below": below, "false_spike_rate": false_spike_rate}
    tensor = _as_tensor(noisy)
    if tensor.ndim > _MOST_AXES:
        restored = _unrestored(tensor, noise_std, scheme, arguments | options)
    else:
        restored = _restore(tensor, noise_std, scheme, arguments | options)[0]
    return _in_kind(restored, noisy)


def _unrestored(noisy: Tensor, noise_std: float, scheme: str, arguments: dict[str, Any]) -> Tensor:
    """Check the arguments, and return a copy of a gradient that schemes do not restore."""
    check_arguments(scheme, **arguments)
    reads = SCHEMES[scheme].reads_noise_level
    _validate.real("noise_std", noise_std, low=0, low_open=reads)
    return _validate.floating("noisy", noisy).detach().clone()


def _as_tensor(noisy: Any) -> Tensor:
    """Return ``noisy`` as a tensor of float32 or float64; a numpy array is copied."""
    if isinstance(noisy, np.ma.MaskedArray):
        _validate.fail("noisy", "an array without a mask", "a masked array")
    if isinstance(noisy, np.ndarray):
        if noisy.dtype.kind != "f" or noisy.dtype.itemsize > 8:
            _validate.fail("noisy", "an array of float16, float32 or float64", str(noisy.dtype))
        own = np.float64 if noisy.dtype.itemsize == 8 else np.float32
        return torch.from_numpy(np.array(noisy, dtype=own, order="C"))
    if isinstance(noisy, Tensor):
        name = str(noisy.dtype).removeprefix("torch.")
        if name not in (*_COMPUTED_IN, "float32", "float64"):
            _validate.fail("noisy", "a tensor of float16, bfloat16, float32 or float64", name)
        if noisy.layout != torch.strided or noisy.is_meta:
            _validate.fail(
                "noisy",
                "a dense tensor with values",
                "a meta tensor" if noisy.is_meta else str(noisy.layout),
            )
        return noisy.to(_COMPUTED_IN.get(name, noisy.dtype))
    _validate.fail("noisy", "a torch tensor or a numpy array", type(noisy).__name__)


def _in_kind(restored: Tensor, noisy: Any) -> Any:
    """Return restored matrices in the type of ``noisy``: torch or numpy, and its precision."""
    result: Any = restored
    if isinstance(noisy, np.ndarray):
        with np.errstate(over="ignore"):
            result = restored.numpy().astype(noisy.dtype, copy=False)
        fits = bool(np.isfinite(result).all())
    elif restored.dtype != noisy.dtype:
        result = restored.to(noisy.dtype)
        fits = bool(result.isfinite().all())
    else:
        fits = True
    if not fits:
        raise ValueError(
            f"noisy must have a type that can hold its restoration, got {noisy.dtype}, in which a "
            "restored entry overflows: convert it to float32"
        )
    return result


def restore_with_report(
    noisy: Matrices, noise_std: float, scheme: str = "optimal", **arguments: Any
) -> tuple[Matrices, list[Report]]:
    """Restore as :func:`restore` does, and return a :class:`Report` per matrix.

    The reports are in the order of the batch. A gradient of four or more axes has no report.
    ``arguments`` are the keyword arguments of :func:`restore`; the errors are the same.
    """
    tensor = _as_tensor(noisy)
    if tensor.ndim > _MOST_AXES:
        return _in_kind(_unrestored(tensor, noise_std, scheme, arguments), noisy), []
    restored, plan, norms, values = _restore(tensor, noise_std, scheme, arguments)
    before, after = norms.flatten().tolist(), frobenius_norms(restored).flatten().tolist()
    reports = []
    for s, norm_before, norm_after in zip(values, before, after, strict=True):
        top = None if s is None else float(s[0])
        above = None if s is None else int((s > plan.edge).sum())
        action = "passed" if plan.scheme.is_identity else "restored"
        if s is not None and bool(plan.leaves_alone(s[0])):
            action = "kept" if plan.below == "keep" else "zeroed"
        reports.append(
            Report(
                scheme,
                plan.shape,
                plan.noise.noise_std,
                plan.edge,
                top,
                above,
                action,
                norm_before,
                norm_after,
            )
        )
    return _in_kind(restored, noisy), reports


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
    """Compute the singular values of :func:`restore` with method "exact" from the noisy ones.

    Schemes can thus be compared on one decomposition.

    Args:
        singular_values: (..., min(m, n)), all values of the noisy matrix, descending, >= 0.
        shape: (m, n) of the matrix.
        noise_std, scheme, below, false_spike_rate, options: as for :func:`restore`.

    Returns:
        New values, in the shape and order of ``singular_values``.

    Raises:
        ValueError: as :func:`restore`; and on values that are not a spectrum of that shape.
    """
    s = _validate.floating("singular_values", singular_values)
    sides = check_sides(shape)
    if len(shape) != 2 or s.shape[-1:] != (min(sides),):
        _validate.fail(
            "singular_values",
            f"(..., min(m, n)) for a matrix of shape {tuple(shape)}",
            tuple(s.shape),
        )
    if not bool((s >= 0).all() and (s.diff(dim=-1) <= 0).all()):
        raise ValueError("singular_values must be nonnegative and descending")
    plan = make_plan(
        (*s.shape[:-1], *sides),
        noise_std,
        scheme,
        below=below,
        false_spike_rate=false_spike_rate,
        **options,
    )
    rows = s.reshape(-1, 1, s.shape[-1])  # the norms of these matrices are those of the spectra
    norms = frobenius_norms(rows)
    refuse_zeros(norms, plan.noise.noise_std)
    if is_ordinary(norms, plan.noise.noise_std):
        return _of_spectra(plan, rows, norms).reshape(s.shape)
    new = []
    for i in range(len(rows)):
        unit, scale = to_unit(rows[i : i + 1])
        part = plan.of_matrices(i, i + 1).in_units_of(float(scale))
        new.append(_of_spectra(part, unit, frobenius_norms(unit)) * scale)
    return torch.cat(new).reshape(s.shape)


def _of_spectra(plan: Plan, rows: Tensor, norms: Tensor) -> Tensor:
    """Return the new values (L, k) for spectra (L, 1, k), whose squares are ordinary numbers."""
    s = rows[:, 0]
    other = s if plan.below == "keep" else torch.zeros_like(s)
    return torch.where(plan.leaves_alone(s[:, :1]), other, plan.new_values(s, norms))


# --- one batch ------------------------------------------------------------------------------------


def _restore(
    noisy: Tensor, noise_std: float, scheme: str, arguments: dict[str, Any]
) -> tuple[Tensor, Plan, Tensor, list[Tensor | None]]:
    """Restored matrices, the plan, the norms (...,) of the noisy matrices, and values.

    The values are the singular values found for each matrix, None where none were needed.
    """
    norms = finite_norms(noisy)
    plan = make_plan(noisy.shape, noise_std, scheme, **arguments)
    refuse_zeros(norms, plan.noise.noise_std)
    if plan.scheme.is_identity:
        return noisy.detach().clone(), plan, norms, [None] * norms.numel()
    stack, flat = noisy.detach().reshape(-1, *plan.shape), norms.reshape(-1)
    ordinary = is_ordinary(flat, plan.noise.noise_std)
    # On a CPU, each matrix alone stops as soon as it has settled; elsewhere, one batch is faster.
    size = 1 if noisy.device.type == "cpu" or not ordinary else len(stack)
    parts = []
    for first in range(0, len(stack), size):
        matrices, norm = stack[first : first + size], flat[first : first + size]
        part = plan.of_matrices(first, first + size)
        parts.append(_apply(part, matrices, norm) if ordinary else _apply_in_units(part, matrices))
    restored = parts[0][0] if len(parts) == 1 else torch.cat([part for part, _ in parts])
    values = [row for part, s in parts for row in ([None] * len(part) if s is None else s)]
    return restored.reshape(noisy.shape), plan, norms, values


def _apply_in_units(plan: Plan, noisy: Tensor) -> tuple[Tensor, Tensor | None]:
    """Apply the plan to one matrix (1, m, n) in units near its largest entry.

    Restoration commutes with the choice of units.
    """
    unit, scale = to_unit(noisy)
    size = float(scale)
    restored, s = _apply(plan.in_units_of(size), unit, torch.linalg.matrix_norm(unit))
    return restored * size, None if s is None else s * size


def _apply(plan: Plan, noisy: Tensor, norm: Tensor) -> tuple[Tensor, Tensor | None]:
    """Restored matrices (L, m, n) and their singular values (L, k) for a batch (L, m, n)."""
    if plan.method == "fast":
        restored = plan.scheme.by_products(noisy, norm, plan.options)
        if restored is not None:
            return restored, None
    restored, s = _by_triplets(plan, noisy, norm) or _exact(plan, noisy, norm)
    untouched = plan.leaves_alone(s[:, 0])
    if bool(untouched.any()):
        other = noisy if plan.below == "keep" else torch.zeros_like(noisy)
        restored = torch.where(untouched[:, None, None], other, restored)
    return restored, s


def _exact(plan: Plan, noisy: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Restore matrices (L, m, n) by a full SVD; also return their singular values (L, k)."""
    u, s, vh = torch.linalg.svd(noisy, full_matrices=False)
    return (u * plan.new_values(s, norm).unsqueeze(-2)) @ vh, s


def _by_triplets(plan: Plan, noisy: Tensor, norm: Tensor) -> tuple[Tensor, Tensor] | None:
    """Restore as :func:`_exact`, from leading triplets; None if an SVD is needed or cheaper.

    Matrices whose triplets were not found take an SVD. Values that were not computed are 0.
    """
    if plan.method == "exact" or min(plan.shape) < MIN_SIDE or plan.needs_all_values:
        return None
    tall = plan.shape[0] > plan.shape[1]
    groups = leading_triplets(
        noisy.mT if tall else noisy,
        lambda s: _weight(plan, s),
        level=plan.edge if plan.scheme.reads_noise_level else None,
        count=plan.count,
    )
    if not groups:
        return None
    if len(groups[0].index) == len(noisy):  # on a CPU, the one matrix, which is not copied
        return _combined(plan, noisy, norm, groups[0], tall), groups[0].s
    restored, s = torch.empty_like(noisy), noisy.new_zeros(len(noisy), min(plan.shape))
    left = torch.ones_like(norm, dtype=torch.bool)
    for lead in groups:
        at = lead.index
        restored[at] = _combined(plan, noisy[at], norm[at], lead, tall)
        s[at, : lead.s.shape[-1]] = lead.s
        left[at] = False
    if bool(left.any()):
        restored[left], s[left] = _exact(plan, noisy[left], norm[left])
    return restored, s


def _combined(plan: Plan, noisy: Tensor, norm: Tensor, lead: Leading, tall: bool) -> Tensor:
    """Return ``bulk_factor * noisy``, plus the change of each leading value to the new value."""
    change = plan.new_values(lead.s, norm) - plan.bulk_factor * lead.s
    count = int((change != 0).sum(-1).max())
    if count == 0:
        return noisy * plan.bulk_factor
    gains = change / torch.where(lead.s > 0, lead.s, 1.0)
    restored = lead.combine(gains[:, :count], transpose=tall)
    return restored.add_(noisy, alpha=plan.bulk_factor) if plan.bulk_factor else restored


def _weight(plan: Plan, s: Tensor) -> Tensor:
    """Return each singular value's part in the sum that must settle, such as its new value squared.

    A part is at most the square of the edge, or of the k-th value for the scheme truncate. Without
    this limit, one value far above the others would settle the sum before the others are found.
    """
    if plan.scheme.reads_noise_level:
        return plan.scheme.contribution(s, plan.noise).clamp(max=plan.edge**2)
    smallest = s[:, min(plan.count, s.shape[-1]) - 1]
    new = plan.scheme.new_values(s, plan.noise, **plan.options)
    return new.minimum(smallest[:, None]) ** 2
