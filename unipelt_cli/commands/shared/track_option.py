"""The trackers that `--track` names: whether they are there, and whether they may use the network.

Apart from what feeds them, since this must be settled before any library looks at the network.
"""

import importlib.util
import os
from collections.abc import Sequence

from unipelt_cli.errors import ConfigError, nearest

TRACKERS = ("tensorboard", "wandb")


def check_trackers(texts: Sequence[str] | None, offline: bool) -> list[str]:
    """Take the names of trackers apart; they must be known, installed and logged in.

    Raises ConfigError. With `offline` wandb keeps what it is told on the disk.
    """
    names = [name.strip() for text in texts or () for name in text.split(",")]
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--track {name!r}: no such tracker", nearest(name, TRACKERS))
        for package in ("accelerate", name):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"--track {name}: {package} is not installed",
                    "install the extra: pip install 'unipelt[trackers]'",
                )
    if "wandb" in names:
        _settle_wandb(offline)
    return names


def _settle_wandb(offline: bool) -> None:
    """Decide whether wandb uses the network, and see to it that it will not ask for a login."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if offline:
        os.environ["WANDB_MODE"] = "offline"
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    from requests.utils import get_netrc_auth

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    keys = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if not any(map(os.environ.get, keys)) and get_netrc_auth(host) is None:
        raise ConfigError(
            "--track wandb: not logged in there",
            "log in with `wandb login`, set WANDB_API_KEY, or add --offline and sync later",
        )
