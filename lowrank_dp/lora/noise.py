"""Samples and measured moments of LoRA's implicit noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_dp import _validate
from lowrank_dp.lora.names import NOISE_KINDS
from lowrank_dp.rng import os_seeded_generator
from lowrank_dp.theory import noise_kurtosis

# distribution of the entries of A -> its kurtosis, on which the variance of the noise depends
ENTRY_KURTOSIS = {"gaussian": 3.0, "kaiming": 9 / 5}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CONFIDENCE_95 = 1.959964  # normal quantile of a two-sided 95 % interval


def draw_a(
    rank: int,
    n: int,
    *,
    init: str = "gaussian",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw A (rank, n) with independent entries of mean 0 and variance 1/rank, so E[A^T A] = I.

    Args:
        rank, n: rows and columns, >= 1.
        init: "gaussian", or "kaiming" for the uniform distribution that PEFT uses by default
            (there with variance 1/(3 n), here rescaled).
        generator: a generator on ``device``; None uses a new one seeded from the operating system.
        dtype, device: type (float16, bfloat16, float32 or float64) and device of the result.

    Raises:
        ValueError: on a bad argument.
    """
    rank, n = _validate.integer("rank", rank), _validate.integer("n", n)
    _validate.choice("init", init, ENTRY_KURTOSIS)
    if dtype not in _DTYPES:
        _validate.fail("dtype", f"one of {', '.join(map(str, _DTYPES))}", dtype)
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        _validate.fail("device", "a torch device such as cpu or cuda", device)
    generator = _generator(generator, device)
    if init == "gaussian":
        return torch.randn(rank, n, generator=generator, dtype=dtype, device=device).mul_(
            rank**-0.5
        )
    uniform = torch.rand(rank, n, generator=generator, dtype=dtype, device=device)
    return uniform.mul_(2).sub_(1).mul_((3 / rank) ** 0.5)


def project(
    gradient: Tensor, rank: int, *, init: str = "gaussian", generator: torch.Generator | None = None
) -> Tensor:
    """Project a gradient as LoRA does at B = 0: ``G A^T A`` with one A shared by all rows.

    The mean of the result over A is ``gradient``. A is drawn by :func:`draw_a` and not returned.

    Args:
        gradient: G (m, n), float32 or float64, finite, on any device; m may be 1.
        rank: number of rows of A, >= 1; may exceed n.
        init: distribution of the entries of A, as for :func:`draw_a`; the theory assumes
            "gaussian".
        generator: a generator on the device of the gradient; None uses a new one seeded from the
            operating system.

    Raises:
        ValueError: on a bad argument, naming it.
    """
    _matrix("gradient", gradient)
    a = draw_a(
        rank,
        gradient.shape[1],
        init=init,
        generator=generator,
        dtype=gradient.dtype,
        device=gradient.device,
    )
    return (gradient @ a.T) @ a


def implicit_noise(
    gradient: Tensor, rank: int, kind: str, *, generator: torch.Generator | None = None
) -> Tensor:
    """Add LoRA's implicit noise to a gradient: exact for a fresh A, or Gaussian noise.

    The noise is not a privacy mechanism, because the noise depends on the gradient.

    Args:
        gradient: gradient G (m, n), as for :func:`project`.
        rank: rank of A, >= 1.
        kind: "fresh-a" returns ``G A^T A`` with a fresh A (:func:`project`). "gaussian" returns G
            plus Gaussian noise of the same variance (:func:`matched_noise`).
        generator: random generator on the device of the gradient; None makes a new generator that
            is seeded from the operating system.

    Returns:
        The gradient with noise, (m, n).

    Raises:
        ValueError: on a bad argument, naming it.
    """
    if _validate.choice("kind", kind, NOISE_KINDS) == "fresh-a":
        return project(gradient, rank, generator=generator)
    return gradient + matched_noise(gradient, rank, generator=generator)


def sample_noise(
    q: Tensor, rank: int, num_samples: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw independent samples (num_samples, n) of u = q (A^T A - I) by its exact law.

    No A is formed. With q rotated to the first axis, u / |q| = (s - 1, sqrt(s) g), where s is
    chi^2_rank / rank and g is N(0, I / rank) in the n - 1 dimensions across q. So a sample costs
    O(n) at every rank.

    Args:
        q: (n,), float32 or float64, finite and not all zero, on any device.
        rank: rank of A, >= 1.
        num_samples: number of samples, >= 1.
        generator: a generator on the device of q; None uses a new one seeded from the operating
            system.

    Raises:
        ValueError: on a bad argument, naming it.

    >>> generator = torch.Generator().manual_seed(0)
    >>> sample_noise(torch.tensor([3.0, 4.0]), 8, 1000, generator=generator).shape
    torch.Size([1000, 2])
    """
    _validate.floating("q", q)
    if q.ndim != 1:
        _validate.fail("q", "a tensor of shape (n,)", f"shape {tuple(q.shape)}")
    rank, num_samples = (
        _validate.integer("rank", rank),
        _validate.integer("num_samples", num_samples),
    )
    generator = _generator(generator, q.device)
    q = q.detach()
    largest = q.abs().max()
    if largest == 0:
        raise ValueError("q must have a nonzero entry, got all zeros")
    unit = (q / largest).double()
    norm = torch.linalg.vector_norm(unit) * largest  # |q|; no intermediate value overflows
    unit = (unit / torch.linalg.vector_norm(unit)).to(q)

    # the sampler behind torch.distributions.Gamma, which itself takes no generator
    half = torch.full((num_samples,), rank / 2, dtype=torch.float64, device=q.device)
    s = torch._standard_gamma(half, generator=generator) / half
    noise = torch.randn(num_samples, len(q), generator=generator, dtype=q.dtype, device=q.device)
    spread = (norm * (s / rank).sqrt()).to(q)
    along = (norm * (s - 1)).to(q) - spread * (noise @ unit)
    return noise.mul_(spread[:, None]).addr_(along, unit)


def matched_noise(
    gradient: Tensor, rank: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw independent Gaussian noise (m, n) with the variance of ``G A^T A - G`` in each entry.

    The Gaussian reading replaces the projection by this noise. The variances are the same, but
    entries, rows and calls are independent. Arguments and errors are as for :func:`project`.
    """
    _matrix("gradient", gradient)
    rank = _validate.integer("rank", rank)
    noise = torch.randn(
        gradient.shape,
        generator=_generator(generator, gradient.device),
        dtype=gradient.dtype,
        device=gradient.device,
    )
    rows, largest = _scaled_rows(gradient)
    return noise * (largest * _variance(rows, rank, "gaussian").sqrt())


@dataclass(frozen=True)
class NoiseMoments:
    """Moments of the projection noise over independent draws of A, measured and exact.

    Attributes:
        rank, num_draws, init: the rank of A, the number of draws, the distribution of A.
        variance: mean over draws and entries of u_ij^2 / |g_i|^2; dimensionless.
        variance_exact: expectation of ``variance``; for a Gaussian A the mean over the entries of
            (1 + beta^2) / rank.
        kurtosis: mean over draws and entries of (u_ij / its exact standard deviation)^4.
        kurtosis_exact: expectation of ``kurtosis``; NaN for an A that is not Gaussian.
        variance_ci, kurtosis_ci: half-widths of 95 % intervals by the normal approximation over
            draws of A, because all entries of a draw share one A. The interval of the kurtosis is
            rough at ranks 1 and 2, where its variance is an eighth moment.
    """

    rank: int
    num_draws: int
    init: str
    variance: float
    variance_ci: float
    variance_exact: float
    kurtosis: float
    kurtosis_ci: float
    kurtosis_exact: float


def measure_noise(
    gradient: Tensor,
    rank: int,
    num_draws: int,
    *,
    init: str = "gaussian",
    generator: torch.Generator | None = None,
) -> NoiseMoments:
    """Measure variance and kurtosis of U = G A^T A - G over ``num_draws`` draws of A.

    Args:
        gradient: G (m, n), float32 or float64, finite. Rows of zeros get no noise and are left
            out; at least one row must remain.
        rank: rank of A, >= 1.
        num_draws: number of draws, >= 2.
        init: distribution of the entries of A, "gaussian" or "kaiming".
        generator: a generator on the device of the gradient; None uses a new one seeded from the
            operating system.

    Raises:
        ValueError: on a bad argument, naming it.
    """
    _matrix("gradient", gradient)
    rank, num_draws = (
        _validate.integer("rank", rank),
        _validate.integer("num_draws", num_draws, low=2),
    )
    _validate.choice("init", init, ENTRY_KURTOSIS)
    generator = _generator(generator, gradient.device)
    rows, _ = _scaled_rows(gradient.detach().double())
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = (rows / norms)[norms[:, 0] > 0]
    if not len(rows):
        raise ValueError("gradient must have a nonzero entry, got all zeros")
    variance = _variance(rows, rank, init)
    second, fourth = torch.zeros(2, num_draws, dtype=torch.float64)
    for draw in range(num_draws):
        square = (project(rows, rank, init=init, generator=generator) - rows).square_()
        second[draw] = square.mean()
        fourth[draw] = square.div_(variance).square_().mean()
    beta2 = rows.square().clamp(max=1).cpu().numpy()
    exact = (
        float(np.mean(noise_kurtosis(rank, 1, beta2=beta2))) if init == "gaussian" else float("nan")
    )
    half_width = _CONFIDENCE_95 / num_draws**0.5
    return NoiseMoments(
        rank=rank,
        num_draws=num_draws,
        init=init,
        variance=float(second.mean()),
        variance_ci=half_width * float(second.std()),
        variance_exact=float(variance.mean()),
        kurtosis=float(fourth.mean()),
        kurtosis_ci=half_width * float(fourth.std()),
        kurtosis_exact=exact,
    )


def _scaled_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row of G (m, n) by its largest entry (m, 1), so that no square overflows."""
    largest = gradient.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    return gradient / largest, largest


def _variance(gradient: Tensor, rank: int, init: str) -> Tensor:
    """Var u_ij = (|g_i|^2 + (kurtosis - 2) g_ij^2) / rank, for A with independent entries."""
    square = gradient.square()
    return (square.sum(1, keepdim=True) + (ENTRY_KURTOSIS[init] - 2) * square) / rank


def _matrix(name: str, value: Tensor) -> None:
    _validate.matrix(name, value)
    if value.ndim != 2:
        _validate.fail(name, "a tensor of shape (m, n)", f"shape {tuple(value.shape)}")


def _generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    if generator is None:
        return os_seeded_generator(device)
    if not isinstance(generator, torch.Generator):
        _validate.fail("generator", "a torch.Generator or None", type(generator).__name__)
    if generator.device.type != device.type:
        _validate.fail("generator", f"on the data's device, {device.type}", generator.device.type)
    return generator
