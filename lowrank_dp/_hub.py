"""Whether the Hugging Face hub may be asked, and whether the hub answers."""

from __future__ import annotations

import contextlib
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any


def offline_requested() -> bool:
    """Whether the environment asks Hugging Face libraries to stay off the network."""
    return any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the hub answers; the Hugging Face libraries retry for half a minute before they say.

    Behind a proxy a direct connection proves nothing, so there the libraries are left to find out.
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
    """``HF_HUB_OFFLINE=1`` for a while: the libraries read that variable at import only."""
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
