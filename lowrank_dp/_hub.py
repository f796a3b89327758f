"""The Hugging Face hub: whether the environment allows it, and whether it can be reached."""

from __future__ import annotations

import contextlib
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any


def offline_requested() -> bool:
    """Tell whether the environment asks Hugging Face libraries to stay off the network."""
    return any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def hub_reachable(timeout: float = 3.0) -> bool:
    """Tell whether the hub accepts a connection within ``timeout`` seconds.

    The Hugging Face libraries retry for half a minute before they fail, so callers ask here first.
    Behind a proxy a direct connection proves nothing, and the answer is True.
    """
    if urllib.request.getproxies().get("https"):
        return True
    hub = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((hub.hostname or "", port), timeout).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def hub_switched_off() -> Iterator[None]:
    """Run a block as under ``HF_HUB_OFFLINE=1``, which the libraries read at import only."""
    import datasets
    import huggingface_hub

    switches: tuple[Any, ...] = datasets.config, huggingface_hub.constants
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    for switch in switches:
        switch.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value
