"""Checks that the noise added in every step is Gaussian, with the stated scale.

The checks read clean sums, in the training process only. A message reveals nothing about a sum but
the name of its tensor. An honest run is stopped with probability ``FALSE_ALARMS`` at most, whatever
its tensors and for any number of steps up to the stated one: the bound is split evenly over the
families of checks (:mod:`lowrank_dp.train.evidence`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from lowrank_dp.rng import KEY_BYTES, Generator, SecureRandom, state_of
from lowrank_dp.spectrum.random_matrix import bulk_edge
from lowrank_dp.train import evidence
from lowrank_dp.train.evidence import Watch

FALSE_ALARMS = 5e-7  # bound on the probability that the noise of an honest run stops it
_FAMILIES = 13  # number of checks that share FALSE_ALARMS
_HEAD = 128  # entries of each tensor that are compared with other tensors and with earlier steps
_KEPT = 256  # entries of each step that are kept for the whole run
_LAGS = 4  # number of earlier steps that each tensor is compared with
_EPS = 2.0**-24  # relative rounding error of a float32
_INNER, _OUTER = 0.6744897501960817, 2.0  # |z| <= _INNER with probability 1/2
_OUTER_RATE = 0.04550026389635842  # probability of |z| > _OUTER


class NoiseCheck:
    """Refuse noise that is not independent N(0, noise_std^2) in every entry of every step.

    The checks compare these statistics of the noise with their distributions:

    - of every tensor: the sum of squares (chi-squared) and the mean;
    - of every matrix: the sums of squares of the products of the matrix with a random direction of
      its rows and of its columns, which are larger or smaller if entries are correlated;
    - of the first ``_HEAD`` entries of every tensor: the products with those of other tensors and
      with those of the last steps, and the shape of the distribution;
    - of some entries of all tensors: the products with those of every earlier step.

    Args:
        noise_std: standard deviation of the noise on each entry, absolute.
        steps: largest number of steps of the run.
    """

    def __init__(self, noise_std: float, steps: int) -> None:
        self._std, self._steps = noise_std, steps
        self._share = FALSE_ALARMS / _FAMILIES
        self._watches: dict[str, Watch] = {}
        self._directions: dict[tuple[int, torch.device], Tensor] = {}
        self._last: list[np.ndarray] = []
        self._kept: list[np.ndarray] = []
        self._products = np.zeros((0, 0))
        self._seen = 0

    def check(
        self, clean: Mapping[str, Tensor], noisy: Mapping[str, Tensor], *, spectrum: bool = False
    ) -> None:
        """Check the noise of one step, and the noise of the run so far.

        Args:
            clean, noisy: sums before and after the noise, by parameter name.
            spectrum: whether to check one matrix's largest singular value too, which takes longer.

        Raises:
            ValueError: if the noise is not as stated.
        """
        names = [name for name, total in clean.items() if total.numel()]
        if not names:  # a sharded model may have fewer parameters than ranks
            return
        names.sort(key=lambda name: -clean[name].numel())
        moments = (
            torch.stack([self._moments(clean[name], noisy[name]) for name in names]).cpu().numpy()
        )
        heads = [
            torch.stack([_head(tensors[name]) for name in names]).cpu().numpy()
            for tensors in (clean, noisy)
        ]
        self._seen += 1
        totals = [clean[name] for name in names]
        entries = np.array([total.numel() for total in totals], dtype=float)
        rounding = 2 * _EPS * (moments[:, 4] + np.sqrt(entries))  # norm of the rounding errors
        self._check_size(names, entries, rounding, moments[:, 0])
        if spectrum:
            self._check_spectrum(clean, noisy)
        self._check_means(names, totals, rounding, moments)
        sizes = np.array([min(clean[name].numel(), _HEAD) for name in names])
        real = np.arange(_HEAD) < sizes[:, None]  # entries that are not filled up
        noise = (heads[1] - heads[0]) / self._std
        self._check_distribution(noise[real], heads[1][real] / self._std)
        self._check_tensors(names, noise)
        self._check_steps(names, noise, real)

    def _moments(self, clean: Tensor, noisy: Tensor) -> Tensor:
        """Return five statistics of one tensor's noise, in units of ``noise_std``.

        The statistics are the sum of squares, the sum, the sums of squares of the products with a
        direction of the columns and of the rows (0 for a vector), and the norm of the clean sum.
        """
        noise = torch.sub(noisy, clean).mul_(1 / self._std)
        flat = noise.flatten()
        found = [flat @ flat, flat.sum()]
        if clean.ndim == 2 and min(clean.shape) > 1:
            m, n = clean.shape
            found += [
                (noise @ self._direction(n, noise)).square().sum(),
                (self._direction(m, noise) @ noise).square().sum(),
            ]
        else:
            found += [flat.new_zeros(())] * 2
        norm = torch.linalg.vector_norm(clean.to(noise.dtype))
        return torch.stack([*found, norm / self._std]).double()

    def _direction(self, size: int, like: Tensor) -> Tensor:
        """Return a random unit vector, which is the same in every step."""
        key = size, like.device
        if key not in self._directions:
            drawn = torch.randn(size, generator=torch.Generator().manual_seed(size))
            self._directions[key] = (drawn / torch.linalg.vector_norm(drawn)).to(like)
        return self._directions[key]

    def _watch(self, name: str, kind: evidence.Evidence, streams: int) -> Watch:
        """Return the watch of a family of checks; the first call makes the watch."""
        if name not in self._watches:
            self._watches[name] = Watch(kind, streams, self._steps, self._share)
        return self._watches[name]

    def _check_size(
        self, names: list[str], entries: np.ndarray, rounding: np.ndarray, squares: np.ndarray
    ) -> None:
        """Check the sum of squares of every tensor, and of all tensors together."""
        slack = 2 * rounding * np.sqrt(squares) + rounding**2 + 1e-6 * entries
        found = self._watch("size", evidence.squares, len(names) + 1).add(
            *(np.append(x, x.sum()) for x in (squares, entries)),
            mean=1.0,
            slack=np.append(slack, slack.sum()),
        )
        if found is not None:
            where = names[found] if found < len(names) else "all tensors together"
            self._refuse(
                f"noise has a standard deviation in {where} that differs from the stated "
                f"{self._std:.4g} by more than chance allows"
            )

    def _check_means(
        self, names: list[str], clean: list[Tensor], rounding: np.ndarray, moments: np.ndarray
    ) -> None:
        """Check the mean of every tensor, and the rows and the columns of every matrix."""
        entries = np.array([total.numel() for total in clean], dtype=float)
        found = self._watch("mean", evidence.normal, len(names)).add(
            moments[:, 1] / np.sqrt(entries), np.ones(len(names)), slack=rounding
        )
        if found is not None:
            self._refuse(f"noise of {names[found]} has a mean that is not 0")
        matrices = [i for i, total in enumerate(clean) if total.ndim == 2 and min(total.shape) > 1]
        for column, axis, what in ((2, 0, "rows"), (3, 1, "columns")):
            if matrices:
                totals, error = moments[matrices, column], rounding[matrices]
                found = self._watch(what, evidence.squares, len(matrices)).add(
                    totals,
                    np.array([clean[i].shape[axis] for i in matrices]),
                    mean=1.0,
                    slack=2 * error * np.sqrt(totals) + error**2 + 1e-6 * totals,
                )
                if found is not None:
                    self._refuse(
                        f"noise of {names[matrices[found]]} is not independent between "
                        f"its entries: its {what} are correlated"
                    )

    def _check_distribution(self, noise: np.ndarray, noisy: np.ndarray) -> None:
        """Check that entries of the noise are normal, and have low bits."""
        size = np.abs(noise)
        count = np.array([size.size])
        for name, rate, hits in (
            ("inner", 0.5, size < _INNER),
            ("outer", _OUTER_RATE, size > _OUTER),
        ):
            if (
                self._watch(name, evidence.successes(rate), 1).add(np.array([hits.sum()]), count)
                is not None
            ):
                self._refuse(
                    "noise is not normal: its entries have another distribution than the "
                    "Gaussian that the accounting assumes"
                )
        # the rounding of a large sum to float32 would hide a grid of half precision in its noise
        fine = size > np.abs(noisy) / 128
        for name, factor in (("grid", 1.0), ("scaled grid", self._std)):
            on_grid = _near_half_precision(size[fine] * factor)
            if (
                self._watch(name, evidence.successes(0.15, more_only=True), 1).add(
                    np.array([on_grid.sum()]), np.array([on_grid.size])
                )
                is not None
            ):
                self._refuse(
                    "noise was drawn or rounded in half precision: its low bits would "
                    "reveal the sum"
                )

    def _check_tensors(self, names: list[str], noise: np.ndarray) -> None:
        """Check the product of each tensor's noise with that of every shorter one."""
        streams = max(1, len(names) * (len(names) - 1) // 2)
        norms = np.linalg.norm(noise, axis=1)
        products = np.triu(noise @ noise.T / np.where(norms > 0, norms, 1.0), 1)
        if self._products.shape != products.shape:
            self._products = np.zeros_like(products)
        self._products += products
        run = math.log(2 * streams / self._share)
        for total, count, level in (
            (products, 1, run + math.log(self._steps)),
            (self._products, self._seen, run),
        ):
            # evidence is at most total^2 / (2 count), so that it is computed for few pairs
            rows, columns = np.nonzero(total**2 >= 2 * count * level)
            found = evidence.normal(total[rows, columns], np.full(len(rows), count)) >= level
            if found.any():
                i = int(np.argmax(found))
                self._refuse(
                    f"noise of {names[rows[i]]} and of {names[columns[i]]} is the same "
                    "or correlated"
                )

    def _check_steps(self, names: list[str], noise: np.ndarray, real: np.ndarray) -> None:
        """Check the products of the noise with that of the last and of all earlier steps."""
        for lag, before in enumerate(self._last, 1):
            norms = np.linalg.norm(before, axis=1)
            products = (noise * before).sum(1) / np.where(norms > 0, norms, 1.0)
            found = self._watch(f"lag {lag}", evidence.normal, len(names)).add(
                products, np.ones(len(names))
            )
            if found is not None:
                self._refuse(f"noise of {names[found]} repeats that of {_ago(lag)}")
        self._last = [noise, *self._last[: _LAGS - 1]]
        kept = noise[real][:_KEPT].astype(np.float32)
        if self._kept:
            earlier = np.stack(self._kept)
            products = earlier @ kept / np.linalg.norm(earlier, axis=1).clip(1e-30)
            level = math.log(self._steps**2 / self._share)
            steps = np.nonzero(evidence.normal(products, np.ones(len(products))) >= level)[0]
            if len(steps):
                self._refuse(f"noise repeats that of {_ago(len(self._kept) - int(steps[-1]))}")
        self._kept.append(kept)

    def _check_spectrum(self, clean: Mapping[str, Tensor], noisy: Mapping[str, Tensor]) -> None:
        """Refuse a largest singular value of one matrix that independent noise does not reach.

        Independent noise exceeds ``noise_std * (sqrt(m) + sqrt(n) + t)`` with probability
        exp(-t^2/2) at most (Gordon's bound with Gaussian concentration).
        """
        matrices = [name for name, total in clean.items() if total.ndim == 2]
        if not matrices:
            return
        # the smallest matrix that is large enough for a sharp edge
        name = max(matrices, key=lambda name: (min(*clean[name].shape, 256), -clean[name].numel()))
        noise = (noisy[name].double() - clean[name].double()) / self._std
        rounding = 2 * _EPS * float(torch.linalg.matrix_norm(noisy[name].double())) / self._std
        short = noise if noise.shape[0] <= noise.shape[1] else noise.mT
        top = math.sqrt(max(0.0, float(torch.linalg.eigvalsh(short @ short.mT)[-1])))
        deviations = math.sqrt(2 * math.log(self._steps / self._share))
        most = bulk_edge((noise.shape[0], noise.shape[1]), 1.0) + deviations
        if not top <= most + rounding:
            self._refuse(
                f"noise of {name} has a singular value above {most * self._std:.4g}, "
                "which independent noise stays below: its entries are correlated"
            )

    def _refuse(self, what: str) -> NoReturn:
        """Raise ``ValueError`` with the fault of the noise and the number of steps seen."""
        raise ValueError(
            f"{what} (step {self._seen} of those checked): the privacy stated would not hold"
        )


class GeneratorCheck:
    """Refuse draws that do not come from the run's own generator, or that repeat.

    Args:
        what: name of the draws, for messages.
        generator: the run's own generator of the draws.
    """

    def __init__(self, what: str, generator: Generator) -> None:
        self._what = what
        self._origin, state = _origin_and_state(generator)
        self._states = {state}

    def check(self, generator: Generator) -> None:
        """Check the generator after a step has drawn from it; raise ``ValueError`` on a fault."""
        origin, state = _origin_and_state(generator)
        if origin != self._origin:
            raise ValueError(
                f"the generator of the {self._what} was seeded anew within the run: "
                "its draws may repeat, and the privacy stated would not hold"
            )
        if state in self._states:
            raise ValueError(
                f"the generator of the {self._what} has not moved on in this step, or "
                "was set back: draws repeat, or come from another generator, and the "
                "privacy stated would not hold"
            )
        self._states.add(state)


def _origin_and_state(generator: Generator) -> tuple[int | bytes, bytes]:
    """Return a generator's seed or key, and a digest of its state."""
    state = state_of(generator).numpy().tobytes()
    origin = state[:KEY_BYTES] if isinstance(generator, SecureRandom) else generator.initial_seed()
    return origin, hashlib.blake2b(state, digest_size=16).digest()


def _head(tensor: Tensor) -> Tensor:
    """Return the first ``_HEAD`` entries of a tensor, filled up with zeros."""
    some = tensor.detach().flatten()[:_HEAD].double()
    return torch.nn.functional.pad(some, (0, _HEAD - len(some)))


def _near_half_precision(size: np.ndarray) -> np.ndarray:
    """Return whether numbers > 0 are within 1/20 of the spacing of a number with 11 bits."""
    mantissa = np.frexp(size)[0] * 2.0**11
    return np.abs(mantissa - np.round(mantissa)) < 0.05


def _ago(steps: int) -> str:
    """Return how long ago a step was, in words."""
    return "the step before" if steps == 1 else f"{steps} steps before"
