"""Access to the Hugging Face hub: checks, and a context that switches the hub off."""

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


def hub_reachable() -> bool:
    """Return whether the hub accepts a connection within three seconds.

    The Hugging Face libraries retry for a long time before they fail, so callers call this function
    first. Behind an HTTPS proxy, a direct connection shows nothing, and the result is True.
    """
    if urllib.request.getproxies().get("https"):
        return True
    hub = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((hub.hostname or "", port), timeout=3.0).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def hub_switched_off() -> Iterator[None]:
    """Run a block with the hub switched off, as ``HF_HUB_OFFLINE=1`` would switch it off.

    The libraries read the environment variable at import only, so the block sets their constants.
    """
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
