"""State how a result was made: versions, machine, commit and command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import lowrank_dp

_VERSIONS = ("torch", "numpy", "scipy", "transformers", "peft", "opacus", "dp-accounting")


def provenance(*, seed: int | None = None, device: str = "cpu") -> dict[str, Any]:
    """Describe this process: versions, machine, commit, command and time (UTC).

    Args:
        seed: random seed of the experiment; None if it uses no random numbers or no fixed seed, or
            several seeds, which its config states.
        device: device of the experiment.

    Returns:
        A dict in JSON's own types, with the name of the GPU if ``device`` is one. The dict names no
        folder of this machine.
    """
    versions = {name: metadata.version(name) for name in _VERSIONS if _installed(name)}
    return {
        "lowrank_dp": lowrank_dp.__version__,
        "git_commit": _git_commit(),
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "device": device,
        **_gpu(device),
        "seed": seed,
        "command": _command(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _gpu(device: str) -> dict[str, str]:
    """Return the name of the device, if the device is a GPU of this machine."""
    if not device.startswith("cuda"):
        return {}
    import torch  # here, since a result without models needs no torch

    return {"gpu": torch.cuda.get_device_name(device)} if torch.cuda.is_available() else {}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _git_commit() -> str:
    """Return the commit of the package's checkout, or "unknown" without one.

    "+changes" follows if the working tree differs from the commit. An installed package can lie
    inside another project's checkout, whose commit says nothing about the package.
    """
    try:
        _git("ls-files", "--error-unmatch", "--", "__init__.py")  # fails for an untracked package
        commit = _git("rev-parse", "HEAD").strip()
        return commit + ("+changes" if _git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    folder = Path(lowrank_dp.__file__).parent
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout


def _command() -> str:
    """Return the command line without the folders of this machine."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = module.name.removesuffix(".__main__") if module and module.name else None
    program = f"python -m {name}" if name else _script(sys.argv[0])
    return " ".join([program, shlex.join(map(_without_folders, sys.argv[1:]))]).rstrip()


def _script(path: str) -> str:
    """Return a script's path below the working folder; for other scripts, the file name alone."""
    script, here = Path(path).absolute(), Path.cwd()
    return f"python {script.relative_to(here)}" if script.is_relative_to(here) else script.name


def _without_folders(word: str) -> str:
    """Shorten ``/folder/name`` to ``name``, also in ``--option=/folder/name``."""
    option, equals, value = word.partition("=")
    if equals and os.path.isabs(value):
        return option + equals + Path(value).name
    return Path(word).name if os.path.isabs(word) else word
