"""The privacy checks of a run, in the order of a step.

    sampled   the sample: sampling_checks.SamplingCheck
    clipped   the sum's length; now and then, clipped gradients against autograd
    noised    the noise: noise_checks.NoiseCheck, and the generators
    assigned  what the optimizer gets is what was released

A step whose number is the first, or one that is evaluated, is looked at more closely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lowrank_dp.mechanism import Generator
from lowrank_dp.restore import restore_gradients
from lowrank_dp.train import guards, processes
from lowrank_dp.train.noise_checks import GeneratorCheck, NoiseCheck
from lowrank_dp.train.sampling_checks import SamplingCheck
from lowrank_dp.train.setup import Setup

_ROWS = 2  # of a step, whose gradients are compared with autograd's


class StepChecks:
    """What is remembered of a run's steps so far, to judge the next one.

    Where several processes share the run, the first looks at samples and generators, and each at
    the noise of the sums that it has.
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
        """The rows of the step's sample, over all processes."""
        if processes.rank() == 0:
            self._draws_samples.check(sampler)
            self._sampling.check(rows, one_each=self._setup.config.unit == "group")
        self._rows = list(rows)

    def clipped(self, sums: Mapping[str, Tensor], norms: Tensor) -> None:
        """This process's clipped sums, and its rows' norms before."""
        bound = self._setup.mechanism.max_grad_norm
        if processes.world_size() == 1:
            if len(norms) != len(self._rows):
                raise ValueError(
                    "the step's sum is not over the rows of its sample: a row was "
                    "left out, or counts twice, and the privacy stated would not hold"
                )
            guards.check_sum(sums, float(norms.clamp(max=bound).sum()))
        else:
            guards.check_sum(sums, len(self._rows) * bound)

    def closely(self, step: int) -> bool:
        """Whether this is the first step that is seen, or one that ends with an evaluation."""
        config = self._setup.config
        return self._first or step + 1 == config.steps or (step + 1) % config.eval_every == 0

    def rows_to_compare(self, step: int) -> list[int]:
        """Rows of the sample for :meth:`row_by_row`; none in most steps."""
        config = self._setup.config
        if not self.closely(step) or config.compile or self._setup.layout.collective:
            return []  # another graph would be compiled; all processes would have to take part
        return self._rows[:_ROWS]

    def row_by_row(
        self,
        batch: Mapping[str, Tensor],
        clip: Callable[[Mapping[str, Tensor], float], Mapping[str, Tensor]],
    ) -> None:
        """Rows in ``batch``, clipped as the step does it, against autograd."""
        config, model = self._setup.config, self._setup.model
        training = model.training
        model.eval()
        guards.check_clipping(
            model,
            batch,
            self._setup.mechanism.max_grad_norm,
            clip,
            torch.bfloat16 if config.precision == "bf16" else None,
        )
        model.train(training)

    def noised(
        self, clean: Mapping[str, Tensor], noisy: Mapping[str, Tensor], noise: Generator, step: int
    ) -> None:
        """The sums before and after the noise."""
        if processes.rank() == 0:
            self._draws_noise.check(noise)
        self._noise.check(clean, noisy, spectrum=self.closely(step))

    def assigned(self, noisy: Mapping[str, Tensor], step: int) -> None:
        """The gradients in ``.grad``: released sums, or one of them restored once more."""
        setup, config = self._setup, self._setup.config
        if setup.layout.collective or config.low_pass is not None or config.diagnostic:
            return
        plain = {
            name: total
            for name, total in noisy.items()
            if config.scheme == "none" or total.ndim != 2 or min(total.shape) == 1
        }
        matrices = [name for name in noisy if name not in plain]
        if matrices and self.closely(step):
            name = matrices[step % len(matrices)]
            plain |= restore_gradients(
                {name: noisy[name]}, setup.mechanism.noise_std, config.scheme, **config.restoration
            )[0]
        guards.check_gradient(
            setup.trained,
            {
                name: total.flatten()[: guards.SOME] / config.batch_size
                for name, total in plain.items()
            },
            setup.mechanism.noise_std / config.batch_size,
        )
        self._first = False
