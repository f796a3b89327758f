"""Compute or load a figure's result, and draw the figure.

By default this module does not use the hub: the task is SST-2 if LOWRANK_DP_DATA holds SST-2, else
the generated task, and the model is the packaged MiniLM if installed, else a tiny model.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_dp import _validate, artifacts
from lowrank_dp.figures.catalog import find
from lowrank_dp.figures.reading import saved_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = ("small", "full")


def default_task() -> str:
    """Return "sst2" if the folder LOWRANK_DP_DATA holds SST-2, else "generated"."""
    folder = os.environ.get("LOWRANK_DP_DATA")
    if folder and (Path(folder) / "glue" / "sst2" / "train.jsonl.gz").is_file():
        return "sst2"
    return "generated"


def config_of(name: str, scale: str, **changes: Any) -> Any:
    """Return a figure's config at a scale, with ``changes`` applied as by :func:`configure`.

    Only the changes that the experiment follows (``FigureSpec.options``) are applied. A lengthy
    figure (``FigureSpec.lengthy``) keeps the task of its config; the others take
    :func:`default_task`, unless ``changes`` names a task. Raises ValueError for an unknown name or
    scale.
    """
    spec = find(name)
    config = spec.small if _validate.choice("scale", scale, SCALES) == "small" else spec.full
    changes = ({} if spec.lengthy else {"task": default_task()}) | changes
    return configure(config, **{key: changes[key] for key in spec.options if key in changes})


def configure(config: Any, **changes: Any) -> Any:
    """Return ``config`` with the fields named in ``changes`` replaced, in nested dataclasses too.

    A change is ignored if no field has its name.
    """
    known = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in changes:
            known[field.name] = changes[field.name]
        elif dataclasses.is_dataclass(value):
            known[field.name] = configure(value, **changes)
    return dataclasses.replace(config, **known)


def compute(name: str, config: Any, sources: dict[Any, Any] | None = None) -> Any:
    """Run a figure's experiment and return its result.

    ``sources`` maps a ``GradientConfig`` to its prepared source. A dict that is given to several
    calls keeps the last prepared model for the next figure that measures the same model. Raises
    ValueError for an unknown name, and as the experiment does.
    """
    spec = find(name)
    if not spec.takes_source:
        return spec.run(config)
    from lowrank_dp.experiments import gradients

    sources = {} if sources is None else sources
    if config.gradients not in sources:
        sources.clear()  # keeps one model in memory at a time
        sources[config.gradients] = gradients.prepare(config.gradients)
    return spec.run(config, sources[config.gradients])


def show(
    name: str,
    *,
    artifact_folder: str | Path | None = None,
    recompute: bool = False,
    scale: str = "small",
    sources: dict[Any, Any] | None = None,
) -> tuple[Any, Figure]:
    """Return a figure's result and the drawn figure, for notebooks; save nothing.

    Args:
        name: name in ``figures.NAMES``.
        artifact_folder: folder of saved results; None takes the result of
            :func:`lowrank_dp.figures.saved_results`.
        recompute: run the experiment instead of loading its saved result.
        scale: "small" or "full", for ``recompute``.
        sources: as in :func:`compute`; the first call is given an empty dict.

    Raises:
        FileNotFoundError: if there is no saved result and ``recompute`` is False.
        ValueError: on an unknown name or scale, or a damaged result.
    """
    spec = find(name)
    _validate.choice("scale", scale, SCALES)
    if recompute:
        result = compute(name, config_of(name, scale), sources)
    else:
        folder = saved_results() if artifact_folder is None else artifact_folder
        result = artifacts.load_result(folder, name, spec.result)
    return result, spec.plot(result)
