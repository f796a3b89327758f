"""Training run: start or resume, step, evaluate, snapshot, and save the result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from lowrank_dp import artifacts, evaluation
from lowrank_dp._rounding import rounded_up
from lowrank_dp._terminal import Interrupted, deferred_signals, progress
from lowrank_dp.artifacts import runs
from lowrank_dp.models.precision import autocast_dtype_of
from lowrank_dp.models.scaled import full_weights
from lowrank_dp.rng import derive_seed
from lowrank_dp.train import guards, processes
from lowrank_dp.train.checks import StepChecks
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.config_checks import INCIDENTAL, RESUMABLE
from lowrank_dp.train.request import RunRequest
from lowrank_dp.train.result import TrainResult, load_result, result_of, save_run
from lowrank_dp.train.setup import Setup, prepare
from lowrank_dp.train.state import (
    State,
    digest_of_draws,
    digest_of_identity,
    environment,
    first_state,
    new_stream,
    pack,
    summary,
    unpack,
)
from lowrank_dp.train.step import take_step

OnEvaluation = Callable[[Setup, Mapping[str, float]], None]
MOVEMENT_STEPS = 3  # number of steps after which a weight with gradients must have moved


def train(
    config: TrainConfig,
    output: str | Path,
    *,
    resume: bool = False,
    keep_model: bool = True,
    show_progress: bool = True,
    on_start: Callable[[Setup, int], None] | None = None,
    on_evaluation: OnEvaluation | None = None,
    prefix_shared_by: int | None = None,
    data_dir: str | None = None,
) -> TrainResult:
    """Fine-tune a model, and write a checkpoint to ``output``.

    Args:
        config: configuration of the run.
        output: a new or empty folder. A finished run leaves a Hugging Face folder (safetensors; a
            PEFT adapter for LoRA) with ``training.json``, ``membership.json`` and, for a
            classifier, the head before the first step in ``initial_head.safetensors``.
        resume: continue from the last snapshot in ``output``. An empty folder starts a new run; a
            finished run's result is returned. The configuration must be the one that the run began
            with, apart from ``micro_batch_size`` and the prefix cache's folder and size.
        keep_model: whether to write the checkpoint; False leaves ``training.json`` only.
        show_progress: whether to show progress on stderr: a bar, or lines in a log.
        on_start: called before the first step with the :class:`Setup` and the number of releases
            that the run will have made at its end.
        on_evaluation: function that is called after each evaluation, also after the evaluation
            before the first step. Its arguments are the :class:`Setup`, whose model must not be
            changed, and the new entry of the curve. The next snapshot is saved after the call, so a
            resumed run does not repeat the calls for entries in its snapshot.
        prefix_shared_by: number of runs that share ``config.prefix_cache``. If these runs together
            read fewer rows than filling the cache does, no cache is made. None always makes the
            cache.
        data_dir: folder of the named task ``config.task``, in place of ``LOWRANK_DP_DATA``, as in
            ``data.load_task``. Own data and generated tasks must leave it out.

    Returns:
        The result, as ``training.json`` holds it.

    Raises:
        ValueError: on bad input, or if a guard stops the run; the message is one line. The
            snapshots stay.
        OSError: if the folder can't be written. The last snapshot is intact.
        SystemExit: with 130 or 143 after SIGINT or SIGTERM, once the step is done and saved.
    """
    with (
        processes.processes(config.device),
        _preserved_generators(config),
        guards.memory(config.micro_batch_size),
    ):
        request = RunRequest(prefix_shared_by, None, show_progress, data_dir)
        if processes.rank() > 0:
            return _follow(config, keep_model)
        with runs.open_run(output, resume=resume) as folder:
            if folder.finished:
                result = load_result(output)
                _require_same(config, result.config)
            else:
                setup, state = _begin_or_resume(config, folder, request)
                if on_start is not None:
                    on_start(setup, _releases_at_the_end(config, state, folder))
                _evaluate_before_training(setup, state, folder, on_evaluation)
                with deferred_signals() as signals:
                    _steps(setup, state, folder, show_progress, signals, on_evaluation)
                guards.check_releases(folder.num_releases(), state.step)
                result = result_of(setup, state, folder.num_releases(), _loss_on_members(setup))
                save_run(setup, result, folder, _weights(setup) if keep_model else None)
            processes.broadcast_from_rank0({"result": artifacts.to_jsonable(result)})
            return result


def _follow(config: TrainConfig, keep_model: bool) -> TrainResult:
    """Run the steps of rank 0 from the same state; for every other rank."""
    found, _ = processes.broadcast_from_rank0()
    if "result" not in found:
        differences = config.differences(TrainConfig.from_json(found["config"]))
        if (here := environment(config.device)) != found["environment"]:
            differences.append(f"environment: {here} / {found['environment']}")
        if differences:
            raise ValueError(
                f"every process must have the same configuration and environment; process "
                f"{processes.rank()} and the first differ in {'; '.join(differences)}"
            )
        config = replace(config, **{name: found["config"][name] for name in INCIDENTAL})
        request = RunRequest(**found["request"])
        setup = prepare(config, found["seed"], request)
        document, tensors = processes.broadcast_from_rank0()
        state = unpack(setup, document, tensors)
        # the stream of rank 0, which draws, and its key of the dropout masks
        state.stream, state.mask_key = document["stream"], bytes.fromhex(document["mask_key"])
        _evaluate_before_training(setup, state, None)
        with deferred_signals():  # rank 0, which has the folder, stops all ranks
            _steps(setup, state, None, False, [])
        if setup.layout.collective:
            _loss_on_members(setup)
            if keep_model:
                _weights(setup)
        found, _ = processes.broadcast_from_rank0()
    return artifacts.from_jsonable("result", found["result"], TrainResult)


def _evaluate_before_training(
    setup: Setup,
    state: State,
    folder: runs.RunFolder | None,
    on_evaluation: OnEvaluation | None = None,
) -> None:
    """Evaluate the untrained model of a new run, and save the first snapshot."""
    if not state.curve and (folder is not None or setup.layout.collective):
        _evaluate(setup, state, on_evaluation)
        _snapshot(setup, state, folder)


def _steps(
    setup: Setup,
    state: State,
    folder: runs.RunFolder | None,
    show_progress: bool,
    signals: Sequence[int],
    on_evaluation: OnEvaluation | None = None,
) -> None:
    """Take all steps from ``state.step`` on, which update the model in ``setup``, and ``state``.

    Rank 0 passes its folder and writes to the folder. A rank without a folder writes nothing, and
    evaluates only if the model is sharded. A signal in ``signals`` ends the run after the step.
    """
    config, layout, first_step = setup.config, setup.layout, state.step
    movement = guards.MovementCheck(setup.trained, setup.optimizer, resumed=first_step > 0)
    if config.adds_noise and (folder is not None or layout.collective):
        state.checks = StepChecks(setup, state.sampler, state.noise)
    sums_depend_on = digest_of_identity(setup)
    left = range(state.step, config.steps)
    words = f"training {config.task}" + (f" from step {first_step}" if first_step else "")
    for step in progress(left, words) if show_progress else left:
        if folder is not None:
            folder.begin_release(
                state.stream,
                step,
                *((digest_of_draws(state), sums_depend_on) if config.adds_noise else ()),
            )
        take_step(setup, state)

        if step - first_step < MOVEMENT_STEPS:
            movement.note()
        if step - first_step == MOVEMENT_STEPS - 1:
            movement.check(MOVEMENT_STEPS)
        setup.optimizer.zero_grad()
        # The list is read once per step, since a signal may arrive at any line.
        stopping, _ = processes.broadcast_from_rank0([*signals[:1]])
        if folder is not None or layout.collective:
            last = state.step == config.steps
            evaluating = last or state.step % config.eval_every == 0
            if evaluating:
                _evaluate(setup, state, on_evaluation, generate=last and config.generate)
            if last or stopping or state.step % config.snapshot_every == 0:
                _snapshot(setup, state, folder)
        if stopping:
            stop = Interrupted(
                stopping[0],
                f"step {state.step} of {config.steps} is saved; to resume the run, "
                "repeat the command (train: with --resume)",
            )
            raise stop if folder is not None else SystemExit(stop.code)  # only rank 0 reports


def _snapshot(setup: Setup, state: State, folder: runs.RunFolder | None) -> None:
    """Save the state on rank 0; all ranks of a sharded model take part."""
    packed = pack(setup, state)
    if folder is not None:
        folder.save_snapshot(state.step, *packed)


def _evaluate(
    setup: Setup,
    state: State,
    on_evaluation: OnEvaluation | None,
    *,
    generate: bool = False,
) -> None:
    """Add an entry to the curve, and report the entry; raise Diverged if the run has diverged."""
    with guards.diverging(state.step - 1):
        scores = _scores(setup, generate=generate)
    entry = {
        "step": state.step,
        **scores,
        "seconds": state.seconds,
        "restore_seconds": state.restore_seconds,
    }
    state.curve.append(entry)
    guards.check_loss(entry["loss"], state.curve[0]["loss"], state.step)
    if on_evaluation is not None:
        on_evaluation(setup, entry)


def _scores(setup: Setup, split: str = "validation", *, generate: bool = False) -> dict[str, float]:
    """Return the loss and the task's metrics on a split."""
    config = setup.config
    return evaluation.evaluate(
        setup.model,
        setup.tokenizer,
        setup.task,
        split,
        max_length=setup.max_length,
        pad_to=setup.pad_to,
        batch_size=config.micro_batch_size,
        max_examples=config.eval_examples,
        generate=generate and setup.task.kind == "generation",
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
        encoded=setup.evaluated if split == "validation" else None,
        add_inputs=setup.prefix.for_evaluation,
        autocast_dtype=autocast_dtype_of(config.precision),
    )


def _begin_or_resume(
    config: TrainConfig, folder: runs.RunFolder, request: RunRequest
) -> tuple[Setup, State]:
    """Return a run at its last snapshot or at its beginning; broadcast the state to all ranks."""
    found, tensors = folder.load_snapshot(), dict[str, Tensor]()
    if found is None:
        seed = config.seed if config.seed is not None else derive_seed(None, "run")
        setup, stream = _prepare(config, seed, request), new_stream(config, 0)
        state = first_state(config, stream)
        document = summary(setup, state)
    else:
        document, tensors = found
        _require_same(config, TrainConfig.from_json(document["config"]))
        request = replace(request, training="prefix" in document["identity"])
        setup = _prepare(config, document["seed"], request)
        state = unpack(setup, document, tensors)
    processes.broadcast_from_rank0(
        {**document, "stream": state.stream, "mask_key": state.mask_key.hex()},
        {name: tensor for name, tensor in tensors.items() if not name.startswith("generator.")},
    )
    releases = _releases_at_the_end(config, state, folder)
    spent = setup.epsilon(releases)
    if found and config.epsilon is not None and spent is not None and spent > config.epsilon:
        raise ValueError(
            f"resuming would spend epsilon {rounded_up(spent)}, more than {config.epsilon:g}: "
            f"{releases - config.steps} steps would be drawn anew, and counted again, since the "
            "steps after the snapshot can't be repeated exactly (then / now: "
            f"{state.restarted or 'nothing now, but steps were drawn anew before'}); "
            "resume where nothing differs, or start afresh in another folder"
        )
    if state.restarted:
        warnings.warn(
            f"resuming with new noise from step {state.step} on, and counting its "
            f"releases beside those made: the steps after the snapshot can't be "
            f"repeated exactly (then / now: {state.restarted})",
            stacklevel=2,
        )
    return setup, state


def _prepare(config: TrainConfig, seed: int, request: RunRequest) -> Setup:
    """Broadcast the arguments of the setup to every rank, and load the setup; rank 0 only."""
    processes.broadcast_from_rank0(
        {
            "seed": seed,
            "config": config.as_json(),
            "environment": environment(config.device),
            "request": asdict(request),
        }
    )
    return prepare(config, seed, request)


def _releases_at_the_end(config: TrainConfig, state: State, folder: runs.RunFolder) -> int:
    """Return the number of releases that the run will have made after its last step."""
    return folder.num_releases(state.stream, range(state.step, config.steps))


def _require_same(asked: TrainConfig, begun: TrainConfig) -> None:
    """Refuse a configuration that differs from the begun one in more than ``RESUMABLE``."""
    same = replace(asked, **{name: getattr(begun, name) for name in RESUMABLE})
    if differences := same.differences(begun):
        raise ValueError(
            "resume must be given the configuration that the run began with; asked "
            f"and begun differ in {'; '.join(differences)}"
        )


def _loss_on_members(setup: Setup) -> float:
    """Return the loss on the records that are trained on. NON-PRIVATE."""
    members = {
        example.id
        for unit, member in zip(setup.units, setup.members, strict=True)
        if member
        for example in unit
    }
    return _scores(replace(setup, task=setup.task.select(members)), "train")["loss"]


def _weights(setup: Setup) -> dict[str, Tensor]:
    """Return the model's full state dict, unsharded and without a preconditioner's scales."""
    return full_weights(setup.model, setup.layout.full_tensors(setup.model.state_dict()))


@contextmanager
def _preserved_generators(config: TrainConfig) -> Iterator[None]:
    """Restore torch's global generators, which dropout draws from, after the block."""
    device = torch.device(config.device)  # one that does not exist is refused with the model
    cuda = device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    with torch.random.fork_rng(devices=[device] if cuda else []):
        yield
