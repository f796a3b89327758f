"""Provenance of a result: versions, machine, commit and command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import lowrank_dp

_VERSIONS = ("torch", "numpy", "scipy", "transformers", "peft", "opacus", "dp-accounting")


def provenance(*, seed: int | None = None, device: str = "cpu") -> dict[str, Any]:
    """Where and with what a result was computed: versions, machine, commit, command, time (UTC)."""
    versions = {name: metadata.version(name) for name in _VERSIONS if _installed(name)}
    return {
        "lowrank_dp": lowrank_dp.__version__,
        "git_commit": _git_commit(),
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "device": device,
        "seed": seed,
        "command": _command(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _git_commit() -> str:
    """Commit of the checkout the package runs from, "+changes" if it differs, else "unknown"."""
    folder = Path(lowrank_dp.__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "."],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("+changes" if changed else "")


def _command() -> str:
    """The command line, without the folders of the machine it ran on."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = module.name.removesuffix(".__main__") if module and module.name else None
    program = f"python -m {name}" if name else Path(sys.argv[0]).name
    return " ".join([program, *map(_without_folders, sys.argv[1:])])


def _without_folders(word: str) -> str:
    """``/folder/name`` as ``name``, also in ``--option=/folder/name``."""
    option, equals, value = word.partition("=")
    if equals and os.path.isabs(value):
        return option + equals + Path(value).name
    return Path(word).name if os.path.isabs(word) else word
