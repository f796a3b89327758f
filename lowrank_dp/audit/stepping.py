"""Measurements of the design ``sums`` in each training step: noise, sample, contributions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_dp.audit.canaries import Audited, Clip, Observer, Sums, released
from lowrank_dp.audit.scales import ExpectedScales
from lowrank_dp.grads.clipping import row_gradients
from lowrank_dp.grads.undisturbed import undisturbed
from lowrank_dp.models.precision import autocast_dtype_of
from lowrank_dp.restore import SCHEMES, GradientRestorer
from lowrank_dp.restore.gradients import is_matrix
from lowrank_dp.rng import derive_seed
from lowrank_dp.train.checks import StepChecks
from lowrank_dp.train.prefix import without_states

HEAD = 128  # entries of each tensor that are compared with other tensors and other steps


@dataclass
class Record:
    """Measurements of all steps of all runs. NON-PRIVATE.

    T is the number of steps of all runs, L the number of trained tensors, M the number of products
    of noise matrices with unit vectors, K the number of canaries. Noise is in units of sigma C,
    and contributions are in units of C.

    Attributes:
        names, entries: (L,) name and size of each tensor.
        squares, sums: (T, L) sum of squares, and sum, of the noise in each tensor.
        heads: (T, L, HEAD) first entries of the noise, with zeros after the last entry.
        within: (T, M) squared norms of the products of noise matrices with unit vectors.
        within_names, freedom: (M,) name and degrees of freedom of each product.
        on_grid: (2,) number of entries of the noise near a half-precision number, in units of
            sigma C and in absolute units.
        fine: number of entries that ``on_grid`` was counted among.
        samples: the units of each sample, with repetitions.
        moved: (T, L) squared norm, by tensor, of the difference between the sums with and without
            one canary. With dropout, ``moved`` and ``excess`` have two entries per step.
        excess: (T,) distance of this difference from the canary's clipped gradient by autograd.
        gram: (T, L, K, K) inner products of the canaries' clipped gradients.
        products: (T, L, K) inner products of the canaries' clipped gradients with the noise.
        deviations: (T,) largest difference between the optimizer's gradient and the release.
        scale_deviations: (T,) largest difference, before the step, between a preconditioner's
            scales and the scales that public text or the releases give.
        objection: message of the first check of ``train`` that failed, or "".
    """

    names: list[str] = field(default_factory=list)
    entries: np.ndarray = field(default_factory=lambda: np.zeros(0))
    squares: list[np.ndarray] = field(default_factory=list)
    sums: list[np.ndarray] = field(default_factory=list)
    heads: list[np.ndarray] = field(default_factory=list)
    within: list[np.ndarray] = field(default_factory=list)
    within_names: list[str] = field(default_factory=list)
    freedom: list[int] = field(default_factory=list)
    on_grid: np.ndarray = field(default_factory=lambda: np.zeros(2, dtype=int))
    fine: int = 0
    samples: list[np.ndarray] = field(default_factory=list)
    moved: list[np.ndarray] = field(default_factory=list)
    excess: list[float] = field(default_factory=list)
    gram: list[np.ndarray] = field(default_factory=list)
    products: list[np.ndarray] = field(default_factory=list)
    deviations: list[float] = field(default_factory=list)
    scale_deviations: list[float] = field(default_factory=list)
    objection: str = ""


class SumsObserver(Observer):
    """Observer of one run, which appends measurements to a :class:`Record`.

    Args:
        audited: the run.
        record: the record that the measurements are appended to.
        guards: checks of ``train``, or None. The message of the first failed check is recorded;
            the run does not stop.
    """

    def __init__(self, audited: Audited, record: Record, guards: StepChecks | None) -> None:
        self._audited, self._record, self._guards = audited, record, guards
        self._unit_of = {
            row: unit for unit, rows in enumerate(audited.setup.unit_rows) for row in rows
        }
        self._rows: list[int] = []
        self._own: list[Sums] = []
        self._clean: Sums = {}
        self._scales = ExpectedScales(audited.setup.model, audited.setup.config)
        config = audited.setup.config
        self._restored = not SCHEMES[config.scheme].is_identity
        self._restorer = GradientRestorer(
            config.scheme, low_pass=config.low_pass, **config.restoration
        )

    def _ask_guards(self, check: str, *arguments: Any) -> None:
        if self._guards is not None and not self._record.objection:
            try:
                getattr(self._guards, check)(*arguments)
            except ValueError as error:
                self._record.objection = str(error)

    def sampled(self, rows: Sequence[int], sampler: Any) -> None:
        """Record the units of the sample."""
        self._ask_guards("sampled", rows, sampler)
        self._record.scale_deviations.append(self._scales.deviation())
        self._rows = list(rows)
        self._record.samples.append(np.array([self._unit_of[row] for row in rows], dtype=int))

    def clipped(self, sums: Sums, norms: Tensor, clip: Clip, step: int) -> None:
        """Measure the contribution of one canary beside the step's rows, and of each canary alone.

        The clipping function of the step is called with the clipping norm C, or with a quarter of
        the canary's gradient norm if that quarter is smaller. The canary's gradient is therefore
        always clipped. Contributions are relative to the clipping norm of the call.

        With dropout, the masks of a row depend on the other rows of the micro-batch. The canary is
        therefore added to the step's rows without dropout. A second measurement with dropout adds
        the canary to an empty sample, with the same masks as autograd.
        """
        self._ask_guards("clipped", sums, norms, clip, step)
        audited, model = self._audited, self._audited.setup.model
        chosen = audited.canaries[step % len(audited.canaries)]
        others = [row for row in self._rows if row != chosen]
        masks = derive_seed(audited.seed, f"masks of step {step}")

        def replayed(batches: Iterable[Any], max_norm: float) -> tuple[Sums, Tensor]:
            torch.manual_seed(masks)
            return clip(batches, max_norm)

        with undisturbed(model, torch.device(audited.setup.config.device)):
            if model.training:
                self._compare(chosen, [], replayed, self._gradient(chosen, masks))
            self._own = [self._contribution(row, replayed) for row in audited.canaries]
            model.eval()
            self._compare(chosen, others, clip, self._gradient(chosen, masks))

    def _compare(
        self, chosen: int, others: Sequence[int], clip: Clip, gradient: Mapping[str, Tensor]
    ) -> None:
        """Compare a canary's contribution to the sum of other rows with its clipped gradient."""
        audited, record = self._audited, self._record
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
        max_norm, scale = self._clipping_norm(norm)
        with_it, without = (
            clip(audited.batches(rows), max_norm)[0] for rows in ([*others, chosen], others)
        )
        moved = {name: (total - without[name]).double() * scale for name, total in with_it.items()}
        record.moved.append(np.array([float(m.square().sum()) for m in moved.values()]))
        unit = {name: g / max(norm, max_norm) for name, g in gradient.items()}
        record.excess.append(
            math.sqrt(sum(float((m - unit.get(n, 0.0)).square().sum()) for n, m in moved.items()))
        )

    def _contribution(self, row: int, clip: Clip) -> Sums:
        """Return the clipped sum of a sample of one row, in units of C."""
        batches = self._audited.batches([row])
        max_norm, scale = self._clipping_norm(float(clip(batches, 1.0)[1].sum()))
        return {name: g.double() * scale for name, g in clip(batches, max_norm)[0].items()}

    def _clipping_norm(self, norm: float) -> tuple[float, float]:
        """Return a clipping norm below ``norm``, and the factor that rescales results to C."""
        stated = self._audited.setup.mechanism.max_grad_norm
        max_norm = min(stated, norm / 4) if norm > 0 else stated
        return max_norm, stated / self._audited.max_grad_norm / max_norm

    def _gradient(self, row: int, masks: int) -> dict[str, Tensor]:
        """Return a row's gradient by autograd, in float64, with dropout from the seed ``masks``.

        The whole model runs, without cached outputs of frozen blocks.
        """
        setup = self._audited.setup
        dtype = autocast_dtype_of(setup.config.precision)
        (batch,) = self._audited.batches([row])
        torch.manual_seed(masks)
        (gradient,) = row_gradients(setup.model, without_states(batch), autocast_dtype=dtype)
        return {name: g.double() for name, g in gradient.items()}

    def noised(self, clean: Sums, noisy: Sums, noise: Any, step: int) -> None:
        """Keep the clean sums until the gradients are assigned."""
        self._ask_guards("noised", clean, noisy, noise, step)
        self._clean = {name: total.clone() for name, total in clean.items()}

    def assigned(self, noisy: Sums, step: int) -> None:
        """Record the noise of the step, as contained in the optimizer's gradients."""
        self._ask_guards("assigned", noisy, step)
        audited, record = self._audited, self._record
        config = audited.setup.config
        deviation = self._post_processing(noisy)
        averaged = config.low_pass is not None
        release, found = released(
            audited, noisy, lambda t: not averaged and not (self._restored and is_matrix(t))
        )
        record.deviations.append(max(deviation, found))
        std = audited.noise_multiplier * audited.max_grad_norm
        self._scales.add(noisy, std)
        noise = {name: (release[name] - self._clean[name]) / std for name in self._clean}
        self._note_noise(noise, noisy)
        gram, products = [], []
        for name, z in noise.items():
            stacked = torch.stack([one[name].flatten() for one in self._own])
            gram.append((stacked @ stacked.mT).cpu().numpy())
            products.append((stacked @ z.flatten().double()).cpu().numpy())
        record.gram.append(np.array(gram))
        record.products.append(np.array(products))

    def _post_processing(self, noisy: Sums) -> float:
        """Return the relative distance of the optimizer's gradients from post-processed releases.

        This method averages and restores the releases a second time. Tensors that are neither
        averaged nor restored are left out.
        """
        setup = self._audited.setup
        config, std = setup.config, self._audited.noise_multiplier * self._audited.max_grad_norm
        processed = dict(noisy)
        if config.low_pass is None:
            processed = {n: t for n, t in noisy.items() if self._restored and is_matrix(t)}
        if not processed:
            return 0.0
        expected = self._restorer.restore(processed, std)
        std, most = self._restorer.noise_std(std), 0.0
        for name, total in expected.items():
            grad = setup.trained[name].grad
            through = torch.zeros_like(total) if grad is None else grad * config.batch_size
            most = max(
                most, float((through - total).abs().max()) / (float(total.abs().max()) + std)
            )
        return most

    def _note_noise(self, noise: Sums, noisy: Sums) -> None:
        record = self._record
        std = self._audited.noise_multiplier * self._audited.max_grad_norm
        if not record.names:
            record.names = list(noise)
            record.entries = np.array([z.numel() for z in noise.values()], dtype=float)
            for name, z in noise.items():
                if z.ndim == 2 and min(z.shape) > 1:
                    record.within_names += [f"columns of {name}", f"rows of {name}"]
                    record.freedom += [z.shape[0], z.shape[1]]
        squares, sums, heads, within = [], [], [], []
        for z in noise.values():
            flat = z.double().flatten()
            squares.append(float(flat @ flat))
            sums.append(float(flat.sum()))
            head = flat[:HEAD].cpu().numpy()
            heads.append(np.pad(head, (0, HEAD - len(head))))
            if z.ndim == 2 and min(z.shape) > 1:
                for matrix in (z.double(), z.double().mT):
                    direction = _unit_vector(matrix.shape[1]).to(matrix)
                    within.append(float((matrix @ direction).square().sum()))
        size = np.abs(np.concatenate([z.flatten()[:HEAD].double().cpu() for z in noise.values()]))
        total = np.abs(np.concatenate([r.flatten()[:HEAD].double().cpu() for r in noisy.values()]))
        # the rounding of a large sum to float32 hides a grid of half precision in its noise
        size = size[size * std > total / 128]
        record.fine += len(size)
        record.on_grid += np.array([_near_half(size), _near_half(size * std)])
        record.squares.append(np.array(squares))
        record.sums.append(np.array(sums))
        record.heads.append(np.array(heads))
        record.within.append(np.array(within))


def _unit_vector(size: int) -> Tensor:
    """Return a random unit vector (size,), the same vector in every call."""
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return drawn / torch.linalg.vector_norm(drawn)


def _near_half(size: np.ndarray) -> int:
    """Count the positive numbers within 1/20 of the spacing from a half-precision number."""
    mantissa = np.frexp(size)[0] * 2.0**11
    return int((np.abs(mantissa - np.round(mantissa)) < 0.05).sum())
