"""Describe the work of an attack, and estimate its duration."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_dp.mia.options import Options
from lowrank_dp.mia.target import Target

FORWARD_SHARE = 1 / 3  # share of a training step's operations; the backward pass takes 2/3


def plan(targets: Sequence[Target], options: Options) -> list[str]:
    """Describe each piece of work in one line.

    Durations are estimated from the duration of the checkpoint's own training. Signals that are
    saved are counted as if they were measured again. Raises ValueError if shadows are
    unavailable, as `shadows.check_shadows` does.
    """
    lines = []
    for target in targets:
        count = len(target.records.examples) + len(target.population)
        passes = f"{count:,} records through the model"
        seconds = _pass_seconds(target, count)
        if target.base is not None:
            passes += " and the model before fine-tuning"
            seconds *= 2
        passes += f", {_accuracy(target)} {_duration(seconds)}" if target.result else ""
        lines.append(f"plan     {target.folder.name}: {passes}")
        lines.append(f"format   {target.format.description}")
        if options.shadow_dir is not None or options.num_shadows:
            lines.append(_shadow_line(target, options, count))
    return lines


def _shadow_line(target: Target, options: Options, records: int) -> str:
    from lowrank_dp.mia.shadows import check_shadows  # it imports training

    count = check_shadows(target, options)
    if options.shadow_dir is not None:
        return f"plan     {count} shadows found in {options.shadow_dir.name}"
    seconds = target.result.seconds if target.result else 0.0
    seconds += _pass_seconds(target, records)
    return (
        f"plan     {count} shadows of {target.recipe.steps} steps each, "
        f"{_accuracy(target)} {_duration(seconds * count)} at the speed of the checkpoint's own "
        "training; finished shadows are not trained again"
    )


def _pass_seconds(target: Target, count: int) -> float:
    """Estimate the seconds of ``count`` records through one model; 0 if not known."""
    if target.result is None:
        return 0.0
    result = target.result
    # a step takes one record of each sampled unit, also of a unit that has many
    per_record = result.seconds / (result.config.steps * result.config.batch_size)
    return FORWARD_SHARE * per_record * count


def _accuracy(target: Target) -> str:
    """Return "at least" for a run with frozen blocks, else "about".

    A step takes no backward pass through frozen blocks, and no forward pass if their outputs are
    cached, so that a forward pass through all blocks takes more than a third of a step.
    """
    return "at least" if target.recipe.train_layers is not None else "about"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
