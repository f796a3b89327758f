"""Differentially private fine-tuning with restored gradients, read top to bottom.

One step, in :func:`train`: a Poisson sample; its clipped gradient sum, in micro-batches; Gaussian
noise; the singular values of each noisy matrix, or of its running mean, restored; an ordinary torch
optimizer. Everything after the noise is post-processing. A killed run resumes from its last
snapshot with the same draws. Started by torchrun, its processes share the work at one run::

    torchrun --nproc-per-node 2 -m lowrank_dp.train --model tiny --task generated ...

    config  what is asked, checked          setup   data, model, mechanism, optimizer
    guards  what stops a run                state   what a snapshot holds
    checks  the guards of privacy, by step  noise_checks, sampling_checks, evidence  what they test
    loop  the run, from the first step to the result     step  one step
    processes  several processes     layout  replicated or sharded on them
    result  what a finished run leaves
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
