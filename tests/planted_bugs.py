"""Privacy bugs that are planted into ``train``, each as a function of a pytest monkeypatch.

Each bug replaces a function that ``train`` calls, so everything around it is as in a real run. The
tests show that train's own guards stop each bug by name; ``benchmarks/audit_bugs.py`` shows which
audit sees which bug with the guards out of the way.
"""

import math
from dataclasses import replace
from itertools import chain, cycle

import numpy as np
import torch

from lowrank_dp.artifacts import runs
from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.restore import GradientRestorer
from lowrank_dp.train import setup as preparation
from lowrank_dp.train import step as step_module
from lowrank_dp.train.layout import Replicated

STEPS = 30
HEAD = ("classifier.weight", "classifier.bias")
ADD_NOISE, CLIP, DRAW = GaussianMechanism.add_noise, step_module.clipped_sum_over, step_module._draw
NOISED, ASSIGN, PREPARE = Replicated.add_noise, Replicated.assign, preparation.make_mechanism

# Noise: functions of (standard normal noise by name, step, memory) -> what is added in its place


def noise_bug(change):
    def plant(patch):
        memory = {"step": 0}

        def add_noise(self, sums, generator=None):
            noise = ADD_NOISE(
                replace(self, noise_multiplier=1 / self.max_grad_norm),
                {name: torch.zeros_like(total) for name, total in sums.items()},
                generator,
            )
            changed = change(noise, memory, self)
            memory["step"] += 1
            return {name: total + self.noise_std * changed[name] for name, total in sums.items()}

        patch.setattr(GaussianMechanism, "add_noise", add_noise)

    return plant


def without(chosen):
    return noise_bug(
        lambda noise, memory, mechanism: {
            name: torch.zeros_like(z) if chosen(name) else z for name, z in noise.items()
        }
    )


def each(function):
    return noise_bug(
        lambda noise, memory, mechanism: {name: function(z) for name, z in noise.items()}
    )


def repeated(lag):
    def change(noise, memory, mechanism):
        memory[memory["step"]] = memory.get(memory["step"] - lag, noise)
        return memory[memory["step"]]

    return noise_bug(change)


def negated(noise, memory, mechanism):
    memory["last"] = (
        noise if memory["step"] % 2 == 0 else {name: -z for name, z in memory["last"].items()}
    )
    return memory["last"]


def one_for_two(noise, memory, mechanism):
    first, second = [
        name
        for name in noise
        if name.endswith("self.query.weight") or name.endswith("self.key.weight")
    ]
    return {**noise, second: noise[first].clone()}


def rank_one(noise, memory, mechanism):
    changed = {}
    for name, z in noise.items():
        if z.ndim == 2:
            z = torch.outer(z[:, 0], z[0])
            z = z / z.square().mean().sqrt()
        changed[name] = z
    return changed


def laplace(z):
    return torch.distributions.Laplace(0.0, 0.5**0.5).sample(z.shape)


def uniform(z):
    return (torch.rand(z.shape) - 0.5) * 12**0.5


def seeded_by_step(patch):
    steps = cycle(range(STEPS))  # the same seeds in every run of a process
    patch.setattr(
        GaussianMechanism,
        "add_noise",
        lambda self, sums, generator=None: ADD_NOISE(
            self, sums, torch.Generator().manual_seed(next(steps))
        ),
    )


def seeded_anew(patch):
    steps = cycle(range(STEPS))
    patch.setattr(
        GaussianMechanism,
        "add_noise",
        lambda self, sums, generator=None: ADD_NOISE(
            self, sums, generator.manual_seed(next(steps))
        ),
    )


def set_back(patch):
    states = []

    def add_noise(self, sums, generator=None):
        states.append(generator.get_state())
        generator.set_state(states[0])
        return ADD_NOISE(self, sums, generator)

    patch.setattr(GaussianMechanism, "add_noise", add_noise)


def twice(patch):
    patch.setattr(
        GaussianMechanism,
        "add_noise",
        lambda self, sums, generator=None: ADD_NOISE(
            self, ADD_NOISE(self, sums, generator), generator
        ),
    )


def some_clean(patch):
    def add_noise(self, sums, generator=None):
        return {
            name: 0.9 * total + 0.1 * sums[name]
            for name, total in ADD_NOISE(self, sums, generator).items()
        }

    patch.setattr(GaussianMechanism, "add_noise", add_noise)


# Clipping: functions of (each row's gradient, the bound) -> sum


def clip_bug(total_of):
    def plant(patch):
        def clip(model, batches, bound, **arguments):
            rows, norms = [], []
            for batch in batches:
                for row in range(len(batch["labels"])):
                    alone = {key: value[row : row + 1] for key, value in batch.items()}
                    gradient, norm = CLIP(model, [alone], math.inf, **arguments)
                    rows.append(gradient)
                    norms.append(norm)
            if not rows:
                return CLIP(model, [], bound, **arguments)
            return total_of(rows, bound), torch.cat(norms)

        patch.setattr(step_module, "clipped_sum_over", clip)

    return plant


def norm_of(gradient, names=None):
    return math.sqrt(sum(float(gradient[name].square().sum()) for name in names or gradient))


def added(rows):
    return {name: sum(row[name] for row in rows) for name in rows[0]}


def by_factor(factor):
    return clip_bug(
        lambda rows, bound: added(
            [{name: g * factor(row, bound) for name, g in row.items()} for row in rows]
        )
    )


def by_layer(rows, bound):
    return added(
        [
            {name: g * min(1, bound / max(1e-9, float(g.norm()))) for name, g in row.items()}
            for row in rows
        ]
    )


def after_summing(rows, bound):
    total = added(rows)
    return {name: g * min(1, bound / norm_of(total)) for name, g in total.items()}


def bound_times(factor):
    def plant(patch):
        patch.setattr(
            step_module,
            "clipped_sum_over",
            lambda model, batches, bound, **arguments: CLIP(
                model, batches, bound * factor, **arguments
            ),
        )

    return plant


def first_batch_twice(patch):
    def clip(model, batches, bound, **arguments):
        batches = [*batches]
        return CLIP(model, chain(batches[:1], batches), bound, **arguments)

    patch.setattr(step_module, "clipped_sum_over", clip)


def first_row_left_out(patch):
    def clip(model, batches, bound, **arguments):
        batches = [*batches]
        rest = {key: value[1:] for key, value in batches[0].items()}
        batches[:1] = [rest] if len(rest["labels"]) else []
        return CLIP(model, batches, bound, **arguments)

    patch.setattr(step_module, "clipped_sum_over", clip)


# Sampling: functions of (rows of an honest draw, number of rows, numpy generator) -> rows


def sample_bug(change):
    def plant(patch):
        random, memory = np.random.default_rng(0), {}

        def draw(unit_rows, mechanism, generator, one_each):
            honest = DRAW(unit_rows, mechanism, generator, one_each)
            return [int(row) for row in change(honest, len(unit_rows), random, memory)]

        patch.setattr(step_module, "_draw", draw)

    return plant


def epochs(honest, count, random, memory):
    if not memory.get("left"):
        memory["left"] = random.permutation(count).tolist()
    return [memory["left"].pop() for _ in range(min(len(honest), len(memory["left"])))]


def first_again(honest, count, random, memory):
    return memory.setdefault("rows", honest)


def own_sampler(patch):
    def draw(unit_rows, mechanism, generator, one_each):
        return DRAW(unit_rows, mechanism, torch.Generator(), one_each)

    patch.setattr(step_module, "_draw", draw)


# Head, optimizer, restoration


def head_outside(patch):
    def clip(model, batches, bound, **arguments):
        sums, norms = CLIP(model, batches, bound, **arguments)
        return {name: total for name, total in sums.items() if name not in HEAD}, norms

    patch.setattr(step_module, "clipped_sum_over", clip)


def remember_clean(patch):
    kept = {}

    def add_noise(self, clean, mechanism, generator):
        kept.update({name: total.clone() for name, total in clean.items()})
        return NOISED(self, clean, mechanism, generator)

    patch.setattr(Replicated, "add_noise", add_noise)
    return kept


def clean_to_optimizer(patch):
    kept = remember_clean(patch)
    patch.setattr(
        Replicated,
        "assign",
        lambda self, trained, gradient: ASSIGN(
            self, trained, {name: kept[name] / 10 for name in gradient}
        ),
    )


def clean_added_later(patch):
    kept = remember_clean(patch)
    patch.setattr(
        Replicated,
        "assign",
        lambda self, trained, gradient: ASSIGN(
            self, trained, {name: g + kept[name] / 10 for name, g in gradient.items()}
        ),
    )


def clean_restored(patch):
    kept = remember_clean(patch)
    restore = GradientRestorer.restore
    patch.setattr(
        GradientRestorer,
        "restore",
        lambda self, noisy, *arguments, **options: restore(
            self, {name: kept[name] for name in noisy}, *arguments, **options
        ),
    )


# Accounting and ledger


def other_mechanism(**factors):
    def plant(patch):
        def changed(config, num_units):
            mechanism, delta = PREPARE(config, num_units)
            return replace(
                mechanism,
                **{name: factor * getattr(mechanism, name) for name, factor in factors.items()},
            ), delta

        patch.setattr(preparation, "make_mechanism", changed)

    return plant


def calibrated_for_fewer_steps(patch):
    right = GaussianMechanism.calibrate.__func__
    patch.setattr(
        GaussianMechanism,
        "calibrate",
        classmethod(
            lambda cls, epsilon, delta, steps, *arguments, **options: right(
                cls, epsilon, delta, steps // 2, *arguments, **options
            )
        ),
    )


def ledger_not_written(patch):
    patch.setattr(runs.RunFolder, "begin_release", lambda *arguments: None)


def ledger_halved(patch):
    right = runs.RunFolder.num_releases
    patch.setattr(runs.RunFolder, "num_releases", lambda *arguments: right(*arguments) // 2)


SIZE, CLIPPED = "noise has a standard deviation", "clipped gradients of single rows are not those"
BUGS = {
    "no noise": (without(lambda name: True), SIZE),
    "no noise on the head": (without(HEAD.__contains__), f"{SIZE} in classifier"),
    "no noise on the head's bias": (without("classifier.bias".__eq__), f"{SIZE} in classifier"),
    "no noise on one matrix": (without("bert.pooler.dense.weight".__eq__), f"{SIZE} in .*pool"),
    "no noise on biases": (without(lambda name: name.endswith("bias")), f"{SIZE} in .*bias"),
    "noise over sqrt 2": (each(lambda z: z / 2**0.5), SIZE),
    "noise without C": (
        noise_bug(
            lambda noise, memory, mechanism: {
                name: z / mechanism.max_grad_norm for name, z in noise.items()
            }
        ),
        SIZE,
        {"max_grad_norm": 2.0},
    ),
    "noise over the batch size": (each(lambda z: z / 10), SIZE),
    "noise twice": (twice, SIZE),
    "noise and a share of clean sums": (some_clean, SIZE),
    "noise with a mean": (each(lambda z: z + 0.1), "has a mean that is not 0"),
    "one noise for all steps": (repeated(1), "repeats that of the step before"),
    "one noise for every second step": (repeated(2), "repeats that of 2 steps before"),
    "one noise for every tenth step": (repeated(10), "repeats that of 10 steps before"),
    "noise and its negative": (noise_bug(negated), "repeats that of the step before"),
    "one noise for two matrices": (noise_bug(one_for_two), "noise of .* and of .* is the same"),
    "noise of rank one": (noise_bug(rank_one), "correlated"),
    "every row of the noise the same": (
        each(lambda z: z[:1].expand_as(z)),
        "correlated|has a mean",
    ),
    "uniform noise": (each(uniform), "noise is not normal"),
    "Laplace noise": (each(laplace), "noise is not normal"),
    "noise in float16": (each(lambda z: z.half().float()), "half precision"),
    "noise seeded by the step": (seeded_by_step, "generator of the noise has not moved on"),
    "generator seeded by the step": (seeded_anew, "generator of the noise was seeded anew"),
    "generator set back": (set_back, "generator of the noise .* was set back"),
    "no clipping": (bound_times(math.inf), CLIPPED),
    "C doubled": (bound_times(2), CLIPPED),
    "clipped by layer": (clip_bug(by_layer), CLIPPED),
    "clip factor inverted": (by_factor(lambda row, bound: norm_of(row) / bound), CLIPPED),
    "clipped after summing": (clip_bug(after_summing), CLIPPED),
    "norm of the head alone": (
        by_factor(lambda row, bound: min(1, bound / norm_of(row, HEAD))),
        CLIPPED,
    ),
    "a batch counted twice": (first_batch_twice, "a row was left out, or counts twice"),
    "a row left out": (first_row_left_out, "a row was left out, or counts twice"),
    "samples of a fixed size": (
        sample_bug(lambda honest, count, random, memory: random.choice(count, 10, replace=False)),
        "the sample is of a fixed size",
    ),
    "no sampling": (
        sample_bug(lambda honest, count, random, memory: range(count)),
        "the sample has another size",
    ),
    "the same rows each step": (sample_bug(first_again), "depends on the sample .* before"),
    "rows with replacement": (
        sample_bug(lambda honest, count, random, memory: random.choice(count, len(honest))),
        "the sample has a unit twice",
    ),
    "the rate doubled": (
        sample_bug(
            lambda honest, count, random, memory: np.flatnonzero(random.random(count) < 0.5)
        ),
        "the sample has another size",
    ),
    "a row that is always in": (
        sample_bug(lambda honest, count, random, memory: {*honest, 3}),
        "takes a unit more or less often",
    ),
    "shuffled epochs": (sample_bug(epochs), "the sample (has|is|depends)"),
    "samples from another generator": (own_sampler, "generator of the samples has not moved on"),
    "head outside the mechanism": (head_outside, "classifier.* neither clipped nor noised"),
    "clean sums to the optimizer": (clean_to_optimizer, "not what the mechanism released"),
    "clean sums added after the noise": (clean_added_later, "not what the mechanism released"),
    "clean sums restored": (
        clean_restored,
        "not what the mechanism released",
        {"scheme": "optimal"},
    ),
    "another rate accounted for": (other_mechanism(sample_rate=0.5), "sample_rate of the mech"),
    "another bound accounted for": (other_mechanism(max_grad_norm=0.5), "max_grad_norm of the"),
    "less noise than asked for": (other_mechanism(noise_multiplier=0.8), "noise_multiplier of the"),
    "calibrated for fewer steps": (
        calibrated_for_fewer_steps,
        "gives epsilon .* more than 8",
        {"epsilon": 8.0, "noise_multiplier": None},
    ),
    "ledger not written": (ledger_not_written, "ledger holds 0 releases, and 30 steps were made"),
    "ledger halved": (ledger_halved, "ledger holds 15 releases, and 30 steps were made"),
}
