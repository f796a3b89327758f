"""Compare checkpoints on the same records: directly, and at matched loss or utility.

A method that learns less leaks less, so AUCs at equal numbers of steps confound leakage with
learning. For a method with checkpoints at several numbers of steps, the AUC is interpolated over
the training loss and over the held-out metric, and compared at a value that all methods reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_dp import artifacts
from lowrank_dp.artifacts import files
from lowrank_dp.evaluation import HIGHER_IS_BETTER
from lowrank_dp.mia import metrics
from lowrank_dp.mia.options import Options
from lowrank_dp.mia.report import Report
from lowrank_dp.mia.requirements import check_named
from lowrank_dp.mia.shadows import SHADOW_MAY_DIFFER
from lowrank_dp.mia.target import Target
from lowrank_dp.restore import SCHEMES
from lowrank_dp.train import TrainConfig


@dataclass(frozen=True)
class Point:
    """Training outcome and leakage of one checkpoint.

    Attributes:
        name: name of the checkpoint's folder.
        method: the method's name, as in `method_names`.
        steps: number of training steps.
        train_loss: loss on the members after training.
        utility: value of ``Comparison.utility_name`` on held-out examples.
        auc: AUC of the primary attack.
    """

    name: str
    method: str
    steps: int
    train_loss: float
    utility: float
    auc: metrics.Auc


@dataclass(frozen=True)
class Comparison:
    """Checkpoints in the order given, compared by one attack.

    Attributes:
        attack: the common primary attack.
        utility_name: metric of held-out examples, the same for all checkpoints (`utility_metric`).
        points: one per checkpoint.
        paired: paired differences of AUC of the second, third, ... checkpoint minus the first.
        at_loss, at_utility: a common value of loss and of utility, with each method's interpolated
            AUC; None if the methods' ranges do not overlap.
    """

    attack: str
    utility_name: str
    points: tuple[Point, ...]
    paired: tuple[metrics.AucDifference, ...]
    at_loss: tuple[float, Mapping[str, float]] | None
    at_utility: tuple[float, Mapping[str, float]] | None


def check_comparable(targets: Sequence[Target], options: Options) -> None:
    """Raise ValueError if targets can't be compared, whatever their attacks find.

    The targets must have the same records and members, a training.json each, and the named attacks.
    """
    _require_same_records(targets)
    for target in targets:
        check_named(target, options)
    utility_metric(*targets)


def compare(targets: Sequence[Target], reports: Sequence[Report]) -> Comparison:
    """Compare reports on the same records by their common primary attack.

    Raises ValueError if records, membership or primary attack differ, or without training.json.
    """
    _require_same_records(targets)
    first, utility_name = reports[0], utility_metric(*targets)
    for target, report in zip(targets, reports, strict=True):
        if report.primary != first.primary:
            raise ValueError(
                f"{target.folder} has the primary attack {report.primary}, and "
                f"{targets[0].folder} {first.primary}: name one with --primary"
            )
    names = method_names([target.trained.config for target in targets])
    points = tuple(
        _point(target, report, name, utility_name)
        for target, report, name in zip(targets, reports, names, strict=True)
    )
    counted = [report.counted[report.primary] for report in reports]
    paired = tuple(
        metrics.paired_auc_difference(values, counted[0][0], truth) for values, truth in counted[1:]
    )
    return Comparison(
        first.primary,
        utility_name,
        points,
        paired,
        matched(points, "train_loss"),
        matched(points, "utility"),
    )


def method_names(configs: Sequence[TrainConfig]) -> list[str]:
    """Name the method of each configuration, such as "lora r=8, DP, sigma 0.6, optimal".

    Two runs are of one method if their configurations are equal, apart from the number of steps and
    from fields that do not affect the distribution of the weights. Where the short names of two
    methods are equal, the fields in which their configurations differ are added: "full, DP,
    epsilon 3, optimizer='sgd'".
    """
    free = ("steps", *SHADOW_MAY_DIFFER)
    keys = [{k: v for k, v in config.recipe().items() if k not in free} for config in configs]
    short = [_short_name(config) for config in configs]
    names = []
    for key, name in zip(keys, short, strict=True):
        alike = [other for other, its in zip(keys, short, strict=True) if its == name]
        differing = [k for k, v in key.items() if any(other[k] != v for other in alike)]
        names.append(", ".join([name, *(f"{k}={key[k]!r}" for k in differing)]))
    return names


def _short_name(config: TrainConfig) -> str:
    """Describe the main fields of a configuration in words."""
    words = [config.method if config.method == "full" else f"{config.method} r={config.rank}"]
    if config.implicit_noise != "none":
        words.append(f"implicit noise {config.implicit_noise} r={config.rank}")
    if config.noise_free:
        words.append("clipped, noise-free (NON-PRIVATE)")
    elif not config.non_private:
        noise = (
            f"epsilon {config.epsilon:g}"
            if config.epsilon is not None
            else f"sigma {config.noise_multiplier:g}"
        )
        words.append(f"DP, {noise}")
    if not SCHEMES[config.scheme].is_identity or config.low_pass is not None:
        words.append(("running mean + " if config.low_pass is not None else "") + config.scheme)
    return ", ".join(words)


def utility_metric(*targets: Target) -> str:
    """Name the first metric of the task that every learning curve ends with, else "loss".

    Every learning curve has a loss. A run without text generation has no metric of its texts.
    Raises ValueError without training.json.
    """
    ends = [target.trained.curve[-1] for target in targets]
    names = targets[0].records.task.metrics
    return next((name for name in names if all(name in end for end in ends)), "loss")


def _require_same_records(targets: Sequence[Target]) -> None:
    first, ids = targets[0], [example.id for example in targets[0].records.examples]
    for target in targets[1:]:
        same = [example.id for example in target.records.examples] == ids
        if not same or not np.array_equal(target.records.is_member, first.records.is_member):
            raise ValueError(
                f"{target.folder} must have the records and members of {first.folder} to be "
                "compared: train both with one --seed"
            )


def _point(target: Target, report: Report, method: str, utility_name: str) -> Point:
    result = target.trained
    auc = next(attack.auc for attack in report.attacks if attack.name == report.primary)
    return Point(
        target.folder.name,
        method,
        result.config.steps,
        result.train_loss,
        float(result.curve[-1][utility_name]),
        auc,
    )


def matched(points: Sequence[Point], by: str) -> tuple[float, dict[str, float]] | None:
    """Interpolate each method's AUC at one value of ``by``, a field of `Point`.

    The value is the middle of the overlap of the methods' ranges; the AUC is interpolated linearly
    between a method's points and never extrapolated. Returns None for fewer than two methods and
    for ranges that do not overlap.
    """
    methods: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        methods.setdefault(point.method, []).append((getattr(point, by), point.auc.value))
    if len(methods) < 2:
        return None
    low = max(min(value for value, _ in found) for found in methods.values())
    high = min(max(value for value, _ in found) for found in methods.values())
    if low > high:
        return None
    middle = (low + high) / 2
    read = {}
    for name, found in methods.items():
        values, aucs = zip(*sorted(found), strict=True)
        read[name] = float(np.interp(middle, values, aucs))
    return middle, read


def save(comparison: Comparison, folder: Path) -> None:
    """Write ``compare.json`` and the table as CSV, Markdown and LaTeX."""
    files.write_json(folder / "compare.json", as_json(comparison))
    columns, rows = table(comparison)
    artifacts.save_table(columns, rows, folder, "compare", caption=" ".join(notes(comparison)))


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Tabulate the comparison, one row per checkpoint; return columns and rows."""
    name = comparison.utility_name
    direction = "higher is better" if HIGHER_IS_BETTER[name] else "lower is better"
    columns = [
        "checkpoint",
        "method",
        "steps",
        "train loss",
        f"{name} ({direction})",
        f"AUC of {comparison.attack} [95%]",
        "difference from the first (p)",
        "AUC at matched train loss",
        f"AUC at matched {name}",
    ]
    missing = "no overlap" if _has_two_methods(comparison) else "one method"
    rows = []
    for i, point in enumerate(comparison.points):
        paired = comparison.paired[i - 1] if i else None
        rows.append(
            [
                point.name,
                point.method,
                str(point.steps),
                f"{point.train_loss:.3g}",
                f"{point.utility:.3g}",
                f"{point.auc.value:.3f} [{point.auc.ci[0]:.3f}, {point.auc.ci[1]:.3f}]",
                "" if paired is None else f"{paired.difference:+.3f} ({paired.p_value:.2g})",
                *(
                    f"{found[1][point.method]:.3f} at {found[0]:.3g}" if found else missing
                    for found in (comparison.at_loss, comparison.at_utility)
                ),
            ]
        )
    return columns, rows


def notes(comparison: Comparison) -> list[str]:
    """Return the remarks below the table: the attack, its limits, and missing overlaps."""
    lines = [f"Attack {comparison.attack}; one run per checkpoint, not a ranking. NON-PRIVATE."]
    if not _has_two_methods(comparison):
        lines.append(
            "One method: AUCs at matched loss or metric need checkpoints of two methods or more."
        )
    elif comparison.at_loss is None or comparison.at_utility is None:
        lines.append(
            "No overlap: give each method at several --steps, so that their ranges of "
            "training loss and of the metric meet."
        )
    return lines


def _has_two_methods(comparison: Comparison) -> bool:
    return len({point.method for point in comparison.points}) > 1


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison in JSON's types."""
    return artifacts.to_jsonable(comparison)
