"""What can go wrong with the machines, as opposed to the work."""

from __future__ import annotations

from pathlib import Path


class ClusterError(RuntimeError):
    """The base of the errors here."""


class TakenAway(KeyboardInterrupt):
    """This process has had notice to end, and what was under way is saved, or was given its time."""


class WorkerLost(ClusterError):
    """A worker, or the whole training group, died and was not to be had again.

    Args:
        name: of the worker, as its log file is called.
        log: its log file.
        reason: what Ray said, or the worker's last words.
    """

    def __init__(self, name: str, log: Path, reason: str) -> None:
        super().__init__(name, log, reason)
        self.name, self.log, self.reason = name, log, reason

    def __str__(self) -> str:
        return f"{self.name} was lost: {self.reason} (log: {self.log})"


class NotEnough(ClusterError):
    """The cluster does not have what the run asks for, and never will.

    Args:
        wanted: resources asked for.
        got: resources there.
    """

    def __init__(self, wanted: str, got: str) -> None:
        super().__init__(wanted, got)
        self.wanted, self.got = wanted, got


class KeptWaiting(ClusterError):
    """The cluster has what a worker asks for, but it was not to be had within ``start_timeout_s``.

    Args:
        name: of the workers that waited.
        wanted: what they asked for.
        waited_s: seconds.
        got: what the cluster has, and what of it was free.
    """

    def __init__(self, name: str, wanted: str, waited_s: float, got: str) -> None:
        super().__init__(name, wanted, waited_s, got)
        self.name, self.wanted, self.waited_s, self.got = name, wanted, waited_s, got


class Unreachable(ClusterError):
    """There is no Ray cluster at the address.

    Args:
        address: as configured.
        reason: what Ray said.
    """

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(address, reason)
        self.address, self.reason = address, reason


class Unprotected(ClusterError):
    """The cluster takes work from whoever reaches it.

    Args:
        address: as configured.
        reason: how that was seen.
    """

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(address, reason)
        self.address, self.reason = address, reason


class NodeLost(ClusterError):
    """The local Ray itself died under the driver.

    Args:
        reason: what ended, and how.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def last_words(log: Path, *, limit_bytes: int = 20_000) -> str:
    """The last line of a log that names an error, or its last line."""
    if not log.exists():
        return "no log"
    with log.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - limit_bytes))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line]
    return (named or lines or ["an empty log"])[-1][:300]
