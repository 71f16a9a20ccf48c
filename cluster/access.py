"""Who may use a cluster: one that takes work without a token takes it from anybody who reaches its port."""

from __future__ import annotations

import os
import subprocess
import sys

from cluster.config import ClusterConfig
from cluster.errors import Unprotected

_LOOK_S = 30.0


def refuse_unprotected(config: ClusterConfig) -> None:
    """Refuse a cluster that answers to whoever asks, unless the config allows it.

    Ray's own status command asks it without a token; behind ``ray://`` only this side's settings can be seen.

    Raises:
        Unprotected: if the cluster asks for no token, or none would be shown.
    """
    if config.address == "local" or config.allow_unauthenticated:
        return
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise Unprotected(config.address, "RAY_AUTH_MODE is not token here")
    if not config.address.startswith("ray://") and _answers_without_token(config.address):
        raise Unprotected(config.address, "it answers without a token")


def _answers_without_token(address: str) -> bool:
    command = [sys.executable, "-m", "ray.scripts.scripts", "status"]
    if address != "auto":
        command += ["--address", address]
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    try:
        asked = subprocess.run(
            command, env=without | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, timeout=_LOOK_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0
