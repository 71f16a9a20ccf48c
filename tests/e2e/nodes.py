"""A Ray cluster of several nodes on this machine: each a raylet of its own, killed, drained and added one by one."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))
HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


@dataclass
class Nodes:
    """The nodes of one cluster, the head first.

    Attributes:
        cpus: of each, as Ray counts them.
    """

    folder: Path
    cpus: float
    port: int = field(default_factory=free_port)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def add(self) -> subprocess.Popen[str]:
        """Start another node, and wait until it is there."""
        log = self.folder / f"node-{len(self.started)}.log"
        place = ["--head", f"--port={self.port}", "--include-dashboard=false"]
        if self.started:
            place = [f"--address={self.address}"]
        options = [f"--num-cpus={self.cpus:g}", f"--node-ip-address={HOST}", "--disable-usage-stats", "--block"]
        with log.open("w") as out:
            process = subprocess.Popen(
                [RAY, "start", *place, *options],
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.started.append(process)
        until = time.monotonic() + 90
        while "runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        return process

    def kill(self, node: subprocess.Popen[str]) -> None:
        """All of a node's processes at once, as a power failure does."""
        for pid in _session_of(node.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()

    def ids(self) -> set[str]:
        """Of the nodes that are there, as Ray names them."""
        code = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print(*(n['NodeID'] for n in ray.nodes()))"
        asked = [sys.executable, "-c", code, self.address]
        return set(subprocess.run(asked, check=True, capture_output=True, text=True, timeout=60).stdout.split())

    def drain(self, node_id: str) -> None:
        """Ray's notice that a node will be taken away."""
        deadline = ["--deadline-remaining-seconds=300", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
        command = [RAY, "drain-node", f"--address={self.address}", f"--node-id={node_id}", *deadline]
        subprocess.run([*command, "--reason-message=a test"], check=True, capture_output=True, timeout=60)

    def close(self) -> None:
        for node in reversed(self.started):
            self.kill(node)


def _session_of(leader: int) -> list[int]:
    """The processes of a session, whatever they descend from."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ProcessLookupError):
            if os.getsid(int(entry.name)) == leader:
                found.append(int(entry.name))
    return found


@contextmanager
def nodes(folder: Path, *, count: int, cpus: float) -> Iterator[Nodes]:
    """A cluster that asks for a token, for the length of the block; the token is in the environment."""
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    cluster = Nodes(folder, cpus)
    try:
        for _ in range(count):
            cluster.add()
        yield cluster
    finally:
        cluster.close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
