"""Identity of a run: digests and versions of everything that its sums depend on.

Two sums that differ, released with the same noise, reveal their difference. A resumed run therefore
continues its noise stream only if every entry of its identity is unchanged.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowrank_dp
from lowrank_dp._json import json_digest
from lowrank_dp.train.config import TrainConfig
from lowrank_dp.train.processes import world_size

_LIBRARIES = ("transformers", "peft", "numpy", "scipy", "cryptography")
_SWITCHES = ("MKL_", "ONEDNN_", "DNNL_", "ATEN_", "CUBLAS_", "CUDNN_", "NVIDIA_TF32")
# entries of /proc/cpuinfo by which numerical libraries choose kernels, on x86 and on Arm
_PROCESSOR = (
    *("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"),
)
_CPUINFO = Path("/proc/cpuinfo")
_PATHS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "transformers_version")


def digests(
    model: torch.nn.Module, tokenizer: Any, rows: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Return SHA-256 digests of a run's model and data, before its first step and before sharding.

    Returns:
        "weights": names, types, shapes and bytes of all parameters and buffers, trained or frozen.
        "configuration": of the model and its adapter, including the attention implementation,
            without the folders that they came from.
        "tokenizer": its serialised form.
        "rows": the encoded rows that are trained on.
    """
    settings: list[Any] = [settings_of(getattr(model, "config", None))]
    settings += [settings_of(config) for config in getattr(model, "peft_config", {}).values()]
    settings.append(str(getattr(getattr(model, "config", None), "_attn_implementation", None)))
    return {
        "weights": digest_of_tensors(chain(model.named_parameters(), model.named_buffers())),
        "configuration": json_digest(settings, default=_plain),
        "tokenizer": json_digest(_vocabulary(tokenizer), default=_plain),
        "rows": json_digest(rows, default=_plain),
    }


def versions_and_machine(device: str) -> dict[str, str]:
    """Return the versions, settings and machine properties that decide how a sum is rounded.

    The number of threads, the processor, torch's settings and environment variables of the
    numerical libraries choose kernels, and so the order and the precision of additions.
    """
    kind = torch.device(device).type
    found = {name: metadata.version(name) for name in _LIBRARIES} | _torch_settings()
    found |= {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_SWITCHES) and not name.endswith("_NUM_THREADS")
    }
    found |= {
        "lowrank_dp": f"{lowrank_dp.__version__} ({_source()[:12]})",
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(),
        "processes": str(world_size()),
    }
    if kind == "cuda" and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(torch.device(device))
    return found


def describe_processor(cpuinfo: str) -> str:
    """Return the model name of the processor, and a digest of what libraries choose kernels by.

    The digest covers the vendor, family, model, stepping, cache size and instructions of all cores.
    Other entries, such as the clock rate, may change while a machine runs.

    Args:
        cpuinfo: text of ``/proc/cpuinfo``.

    Returns:
        The description; empty if the text has none of these entries.
    """
    found: dict[str, set[str]] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in _PROCESSOR:
            found.setdefault(name.strip(), set()).add(value.strip())
    if not found:
        return ""
    name = " and ".join(sorted(found.get("model name", {"processor without a name"})))
    return f"{name} ({json_digest({key: sorted(found[key]) for key in sorted(found)})[:12]})"


@lru_cache(maxsize=1)
def _processor() -> str:
    """Describe this machine's processor, by ``platform`` where the system has no /proc/cpuinfo."""
    cpuinfo = _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.exists() else ""
    return describe_processor(cpuinfo) or f"{platform.machine()} {platform.processor()}".strip()


def not_repeatable(config: TrainConfig) -> str:
    """Return why a step replayed with equal inputs may round differently; empty if it may not."""
    if config.compile:
        return "a compiled step can't be replayed to the bit"
    on_gpu = torch.device(config.device).type == "cuda"
    if on_gpu and not torch.are_deterministic_algorithms_enabled():
        return (
            "a GPU adds in an order that changes, so that a step can't be replayed to the bit "
            "without torch.use_deterministic_algorithms(True)"
        )
    return ""


def _torch_settings() -> dict[str, str]:
    """Return the settings of torch that choose kernels."""
    backends = torch.backends
    settings = {
        "default dtype": torch.get_default_dtype(),
        "float32 matrix products": [  # "none" is the default, which is "ieee"
            part.matmul.fp32_precision.replace("none", "ieee")
            for part in (backends.mkldnn, backends.cuda)
        ],
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "mkldnn": backends.mkldnn.enabled,
        "attention kernels": [
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
        ],
    }
    return {name: str(value) for name, value in settings.items()}


def changed(before: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """Return ``name: before / now`` for each entry that differs; digests are not shown."""

    def words(name: str) -> str:
        values = [str(part.get(name, "not set")) for part in (before, now)]
        if all(len(value) == 64 for value in values):
            return f"{name}: other content than before"
        return f"{name}: {' / '.join(values)}"

    return [words(name) for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Convert a value that JSON lacks: a set to a sorted list, any other value by ``str``."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def settings_of(config: Any) -> dict[str, Any]:
    """Return the settings of a model's or an adapter's configuration, without paths."""
    document = config.to_dict() if hasattr(config, "to_dict") else {}
    return {str(name): value for name, value in document.items() if name not in _PATHS}


def _vocabulary(tokenizer: Any) -> list[Any]:
    """Return the parts of a tokenizer that decide the tokens of a text."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    whole = fast.to_str() if fast is not None else sorted(tokenizer.get_vocab().items())
    return [
        whole,
        str(tokenizer.special_tokens_map),
        tokenizer.padding_side,
        tokenizer.model_max_length,
    ]


@lru_cache(maxsize=1)
def _source() -> str:
    """Return the SHA-256 of this package's source, which may change without its version."""
    folder, digest = Path(lowrank_dp.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}{os.linesep}".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
