"""Differentially private fine-tuning: loop and step of a run, and the snapshots to resume from.

A step (:func:`take_step`) draws a Poisson sample, sums its clipped gradients, adds Gaussian noise,
restores the singular values of each noisy matrix or of its running mean, and calls a torch
optimizer. Everything after the noise is post-processing. A killed run resumes from its last
snapshot with the same draws. Processes that torchrun starts share one run::

    torchrun --nproc-per-node 2 -m lowrank_dp.train --model tiny --task generated ...

    config  configuration of a run      loop    run, from first step to result     step  one step
    records  units of privacy, holdout  setup   data, model, mechanism, optimizer
    state  contents of a snapshot       result  contents of training.json, checkpoint
    guards  errors that stop a run      checks  privacy checks of a step, by noise_checks,
    identity  inputs that fix the sums          sampling_checks, evidence; public_rows
    processes  ranks, their exchanges   layout  replicated or sharded tensors
    prefix  cache of the frozen blocks' outputs
"""

from typing import TYPE_CHECKING

from lowrank_dp._lazy import lazy

if TYPE_CHECKING:
    from lowrank_dp.train.config import TrainConfig
    from lowrank_dp.train.loop import train
    from lowrank_dp.train.result import TrainResult, load_result
    from lowrank_dp.train.setup import Setup
    from lowrank_dp.train.step import take_step
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["Setup", "TrainConfig", "TrainResult", "load_result", "take_step", "train"]
