"""Privacy checks of every training step, in the order of the step.

    sampled   the sample: ``sampling_checks.SamplingCheck``, and its generator
    clipped   the norm of the clipped sum; in some steps, clipped gradients against autograd
    noised    the noise: ``noise_checks.NoiseCheck``, and its generator
    assigned  the optimizer's gradients against the released sums

The first step, the last step and every step before an evaluation are examined more closely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lowrank_dp.models.precision import autocast_dtype_of
from lowrank_dp.restore import SCHEMES, restore_gradients
from lowrank_dp.restore.gradients import is_matrix
from lowrank_dp.rng import Generator
from lowrank_dp.train import guards, prefix, processes
from lowrank_dp.train.noise_checks import GeneratorCheck, NoiseCheck
from lowrank_dp.train.sampling_checks import SamplingCheck
from lowrank_dp.train.setup import Setup

_ROWS = 2  # rows of a step whose clipped gradients are compared with those of autograd


class StepChecks:
    """Checks of a run's steps, each of which takes all steps so far into account.

    If several processes share the run, rank 0 checks samples and generators, and each rank checks
    the noise of its own sums.

    Args:
        setup: setup of the run; its mechanism must be the one that the configuration asks for.
        sampler, noise: generators of the samples and of the noise, in the state in which the next
            step begins.

    Raises:
        ValueError: if the mechanism or the scheme differs from the configuration. Each check raises
            ``ValueError`` if the stated privacy would not hold.
    """

    def __init__(self, setup: Setup, sampler: Generator, noise: Generator) -> None:
        config, mechanism = setup.config, setup.mechanism
        guards.check_mechanism(config, mechanism, len(setup.unit_rows), setup.delta)
        self._setup = setup
        self._first = True
        self._noise = NoiseCheck(mechanism.noise_std, config.steps)
        self._sampling = SamplingCheck(setup.unit_rows, mechanism.sample_rate, config.steps)
        self._draws_noise = GeneratorCheck("noise", noise)
        self._draws_samples = GeneratorCheck("samples", sampler)
        self._rows: list[int] = []

    def sampled(self, rows: Sequence[int], sampler: Generator) -> None:
        """Check the rows of the step's sample, over all ranks."""
        if processes.rank() == 0:
            self._draws_samples.check(sampler)
            self._sampling.check(rows, one_each=self._setup.config.unit == "group")
        self._rows = list(rows)

    def clipped(
        self,
        sums: Mapping[str, Tensor],
        norms: Tensor,
        clip: Callable[[Iterable[Any], float], tuple[Mapping[str, Tensor], Tensor]],
        step: int,
    ) -> None:
        """Check this rank's clipped sums.

        Args:
            sums: clipped sums by parameter name.
            norms: gradient norms of this rank's rows before clipping.
            clip: the step's clipping function: ``clip(batches, max_norm)`` returns the clipped sums
                and the norms.
            step: number of the step, from 0.
        """
        max_norm = self._setup.mechanism.max_grad_norm
        if processes.world_size() == 1:
            if len(norms) != len(self._rows):
                raise ValueError(
                    "the step's sum is not over the rows of its sample: a row was "
                    "left out, or counts twice, and the privacy stated would not hold"
                )
            guards.check_sum(sums, float(norms.clamp(max=max_norm).sum()))
        else:
            guards.check_sum(sums, len(self._rows) * max_norm)
        if rows := self.rows_to_compare(step):
            batch = next(self._setup.batches(rows))
            config, cached = self._setup.config, self._setup.prefix.training is not None
            half = cached and config.prefix_dtype == "bf16"

            def clip_batch(_: Any, max_norm: float) -> Mapping[str, Tensor]:
                return clip([batch], max_norm)[0]

            # without cached outputs, so that autograd runs the whole model on the row itself
            self._compare_rows(prefix.without_states(batch), clip_batch, half=half)
            if half:  # the rounding of the outputs would hide a small error of the clipping
                self._compare_rows(batch, clip_batch)

    def closely(self, step: int) -> bool:
        """Return whether the step is the first one seen, the last, or one before an evaluation."""
        config = self._setup.config
        return self._first or step + 1 == config.steps or (step + 1) % config.eval_every == 0

    def rows_to_compare(self, step: int) -> list[int]:
        """Return the rows of the sample to compare with autograd; none in most steps.

        A compiled step compares no row, since the comparison would compile another graph. A sharded
        model compares no row, since all ranks would have to take part.
        """
        config = self._setup.config
        if not self.closely(step) or config.compile or self._setup.layout.collective:
            return []
        return self._rows[:_ROWS]

    def _compare_rows(
        self,
        batch: Mapping[str, Tensor],
        clip: Callable[[Mapping[str, Tensor], float], Mapping[str, Tensor]],
        *,
        half: bool = False,
    ) -> None:
        """Compare the clipped sum of a batch with autograd, without dropout.

        Set ``half`` if ``clip`` reads outputs of frozen blocks in half precision; autograd runs
        the frozen blocks in full precision.
        """
        config, model = self._setup.config, self._setup.model
        training = model.training
        model.eval()
        guards.check_clipping(
            model,
            batch,
            self._setup.mechanism.max_grad_norm,
            clip,
            autocast_dtype_of(config.precision),
            half=half,
        )
        model.train(training)

    def noised(
        self, clean: Mapping[str, Tensor], noisy: Mapping[str, Tensor], noise: Generator, step: int
    ) -> None:
        """Check the sums before and after the noise."""
        if processes.rank() == 0:
            self._draws_noise.check(noise)
        self._noise.check(clean, noisy, spectrum=self.closely(step))

    def assigned(self, noisy: Mapping[str, Tensor], step: int) -> None:
        """Check ``.grad`` against the released sums.

        The gradient of a tensor that the scheme leaves unchanged is compared with the released sum.
        In a step that is examined closely, one matrix is restored again for the comparison.
        Gradients of a sharded model, of a running mean and of a diagnostic run are not compared.
        """
        setup, config = self._setup, self._setup.config
        closely, self._first = self.closely(step), False
        if setup.layout.collective or config.low_pass is not None or config.diagnostic:
            return
        expected = {
            name: total
            for name, total in noisy.items()
            if SCHEMES[config.scheme].is_identity or not is_matrix(total)
        }
        matrices = [name for name in noisy if name not in expected]
        if matrices and closely:
            name = matrices[step % len(matrices)]
            expected |= restore_gradients(
                {name: noisy[name]}, setup.mechanism.noise_std, config.scheme, **config.restoration
            )[0]
        guards.check_gradient(
            setup.trained,
            {
                name: total.flatten()[: guards.COMPARED_ENTRIES] / config.batch_size
                for name, total in expected.items()
            },
            setup.mechanism.noise_std / config.batch_size,
        )
