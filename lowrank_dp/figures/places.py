"""Folder of a figure's result: the folder of saved results, or a folder of trials.

A saved result is replaced only if its configuration is the same, or if the user asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_dp import artifacts
from lowrank_dp.artifacts.jsonable import to_jsonable
from lowrank_dp.figures.catalog import find
from lowrank_dp.figures.making import config_of, configure, default_task
from lowrank_dp.figures.spec import OPTIONS

TRIALS = "trials"  # folder beside the folder of the results


@dataclass(frozen=True)
class Request:
    """Options of a request for figures.

    Attributes:
        scale: scale of the experiments, "small" or "full".
        changes: config field -> value, for fields that the user gave (task, model) or that have a
            default (seed, device).
        given: names of the options that the user gave, ``only`` and ``scale`` included.
        only: names of the requested figures; empty for all figures.
        folder: folder of the saved results.
        own_folder: whether the user gave ``folder``.
        update: whether a saved result of another configuration is replaced.
        panels: whether each panel is also saved as a separate file.
    """

    scale: str
    changes: dict[str, Any]
    given: frozenset[str]
    only: tuple[str, ...]
    folder: Path
    own_folder: bool = False
    update: bool = False
    panels: bool = False


@dataclass(frozen=True)
class Place:
    """Config and folder of one figure's result.

    Attributes:
        config: config of the experiment to run; None draws the saved result.
        folder: folder of the result.
        is_trial: whether ``folder`` is a folder of trials. The figure is then saved there, too.
        note: message for the user, or "".
    """

    config: Any
    folder: Path
    is_trial: bool = False
    note: str = ""


def place_of(name: str, request: Request) -> Place:
    """Decide whether a figure is computed or drawn, and in which folder its result is written.

    A result whose configuration differs from the configuration of the saved result is written to
    :func:`trial_folder`. The saved result is drawn, and nothing computed, in two cases. Case one:
    no option changes the configuration, and the default configuration differs from the saved one.
    Case two: the computation is lengthy, and the scale is small. With ``update``, the result is
    computed and written to ``folder``.

    Raises:
        ValueError: for an unknown name or scale, for an option that the experiment of a requested
            figure does not follow, and for ``update`` with the small scale of a requested figure
            whose computation is lengthy.
        FileNotFoundError: if the saved result should be drawn, and no result is saved.
    """
    spec, folder = find(name), request.folder
    only_drawn = spec.lengthy and request.scale == "small"
    if name in request.only:
        _require_followed(name, spec.options, request.given)
        if only_drawn and request.update:
            raise ValueError(
                f"--update must not be given with the small scale of {name}, whose saved result is "
                "that of the full scale: leave --update out for a trial, or give --scale full"
            )
        only_drawn = only_drawn and not request.given - {"only", "scale"}  # else it is a trial
    if only_drawn:
        if not (folder / f"{name}.json").exists():
            raise FileNotFoundError(
                f"no result {name}.json in {folder}: name the folder of a checkout's saved results "
                "by --artifacts, or compute the result by --scale full"
            )
        return Place(
            None,
            folder,
            note=f"{name}: drawn from the saved result; --scale full computes it, which takes "
            "minutes to hours",
        )
    config = config_of(name, request.scale, **request.changes)
    if request.update:
        return Place(config, folder)
    if not (folder / f"{name}.json").exists():
        if request.own_folder or config == published_config(name):
            return Place(config, folder)
        return trial_of(name, config, request, "its configuration is not the published one")
    other = _other_result(folder, name, config)
    if not other:
        return Place(config, folder)
    if request.given - {"only"}:
        return trial_of(name, config, request, f"{folder / name}.json holds {other}")
    note = f"{name}: not computed but drawn, from {other}; --update computes and replaces it"
    return Place(None, folder, note=note)


def _require_followed(name: str, followed: Sequence[str], given: frozenset[str]) -> None:
    """Raise ValueError for a given option that the experiment of a figure does not follow."""
    ignored = [option for option in OPTIONS if option in given and option not in followed]
    if ignored:
        raise ValueError(
            f"--{ignored[0]} must not be given with --only {name}, whose experiment sets "
            f"{ignored[0]} itself: leave --{ignored[0]} out"
        )


def trial_of(name: str, config: Any, request: Request, why: str) -> Place:
    """Return the place of a result that must not replace the saved result."""
    folder = trial_folder(name, request)
    note = f"{name}: a trial, written to {folder}, since {why}; --update replaces the saved result"
    return Place(config, folder, is_trial=True, note=note)


def trial_folder(name: str, request: Request) -> Path:
    """Return the folder of trials of a request; its name states scale, task, model and seed."""
    from lowrank_dp.models import default_model

    changes = request.changes
    own = find(name).lengthy  # the figure has a task and a model of its own
    task = changes.get("task") or ("" if own else default_task())
    parts = [request.scale, task, changes.get("model") or ("" if own else default_model())]
    parts.append(f"seed{changes.get('seed', 0)}")
    if changes.get("device", "cpu") != "cpu":
        parts.append(changes["device"])
    words = (re.sub(r"[^\w.-]+", "-", part).strip("-") for part in parts)
    return request.folder.parent / TRIALS / "_".join(word for word in words if word)


def published_config(name: str) -> Any:
    """Return the configuration of the result that the repository ships."""
    spec, defaults = find(name), {"seed": 0, "device": "cpu"}
    if not spec.lengthy:
        return config_of(name, "small", task="sst2", **defaults)
    return config_of(name, "full", **defaults)


def replaces_other_data(name: str, result: Any, folder: Path) -> str:
    """Describe a saved result with the same config and other models or data; "" if there is none.

    A config may leave the model open, so that the installed model is used. Only the result then
    states the model and the data.
    """
    try:
        saved: Any = artifacts.load_result(folder, name, type(result))
    except (ValueError, OSError):
        return ""
    for field in ("description", "descriptions"):
        before, now = getattr(saved, field, ()), getattr(result, field, ())
        if _clauses(before) - _clauses(now):
            return f"a result on other models or data ({before}), computed on {now}"
    return ""


def _clauses(description: str | Sequence[str]) -> set[str]:
    """Split descriptions at "; ". A later version of the package may add clauses."""
    parts = [description] if isinstance(description, str) else description
    return {clause for part in parts for clause in part.split("; ")}


def _other_result(folder: Path, name: str, config: Any) -> str:
    """Describe a saved result whose configuration is not ``config``; "" if none differs.

    A seed that the experiment does not follow may differ.
    """
    spec = find(name)
    try:
        saved: Any = artifacts.load_result(folder, name, spec.result)
    except (ValueError, OSError):
        return "a result of another command or version"
    seed = {} if "seed" in spec.options else {"seed": 0}
    if configure(saved.config, **seed) == configure(config, **seed):
        return ""
    return f"a result of another configuration ({_first_difference(saved.config, config)})"


def _first_difference(saved: Any, asked: Any) -> str:
    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {path: value}
        inner = (flat(item, f"{path}.{key}" if path else key) for key, item in value.items())
        return {key: item for part in inner for key, item in part.items()}

    before, now = flat(to_jsonable(saved)), flat(to_jsonable(asked))
    name = next(name for name in (*before, *now) if before.get(name) != now.get(name))
    return f"{name} {before.get(name)!r}, asked {now.get(name)!r}"
