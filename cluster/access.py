"""Whether a cluster is there, and who may use it: one that takes work without a token takes it from whoever reaches it.

Only one that refuses Ray's own status command for want of a token is used; whatever else comes back counts against it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from cluster.config import ClusterConfig
from cluster.errors import Unprotected, Unreachable

_LOOK_S, _CONNECT_S = 30.0, 10.0
_REFUSAL = "InvalidAuthToken"  # of Ray, in what its command prints


def refuse_silence(address: str, host: str, port: int) -> None:
    """Find out within seconds, where Ray would try for minutes, that nobody listens there.

    Raises:
        Unreachable: naming `address`.
    """
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        raise Unreachable(address, str(error)) from error


def refuse_unprotected(config: ClusterConfig) -> None:
    """Refuse a cluster that was not seen to ask for a token, unless the config allows it.

    Raises:
        Unprotected: with what was seen.
    """
    if config.address == "local" or config.allow_unauthenticated:
        return
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise Unprotected(config.address, "RAY_AUTH_MODE is not token here")
    if config.address.startswith("ray://"):
        raise Unprotected(config.address, "whether it asks for a token cannot be seen behind ray://")
    if reason := _answer_without_token(config.address):
        raise Unprotected(config.address, reason)


def _answer_without_token(address: str) -> str:
    """What a cluster answers to whoever has no token, in words; empty where it refuses."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "status"]
    if address != "auto":
        command += ["--address", address]
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    try:
        asked = subprocess.run(
            command,
            env=without | {"RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=_LOOK_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"without a token it gave no answer within {_LOOK_S:g} s"
    if asked.returncode == 0:
        return "it answers without a token"
    if _REFUSAL in asked.stdout + asked.stderr:
        return ""
    lines = (asked.stderr or asked.stdout).strip().splitlines() or ["nothing"]
    return f"whether it asks for a token could not be seen: {lines[-1][:200]}"
