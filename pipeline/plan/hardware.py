"""The machines that a plan is held against: those named on the command line, or what is here, found without Ray."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.resources import Devices, Node
from cluster.session import usable_cpus
from stages.errors import ConfigError

_CORES_A_GPU = 8  # assumed where GPUs are named and cores are not
_UNITS = {"GB": 10**9, "GIB": 1 << 30}
_SIZE = r"(?P<size>\d+(?:\.\d+)?)(?P<unit>gi?b)"
_GPUS = re.compile(rf"(?:(?P<nodes>\d+)x)?(?P<count>\d+)x{_SIZE}", re.IGNORECASE)
_CORES = re.compile(rf"(?:cpu:(?P<count>\d+)|(?P<before>\d+)cpu)(?:x{_SIZE})?", re.IGNORECASE)
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True, slots=True)
class Hardware:
    """Equal machines.

    Attributes:
        told: in words.
        num_nodes: how many machines.
        node: cores and GPUs of each.
        gpu_bytes: memory of each GPU; None without GPUs.
        ram_bytes: memory of each machine; None where it is not known.
    """

    told: str
    num_nodes: int
    node: Node
    gpu_bytes: int | None
    ram_bytes: int | None

    @property
    def nodes(self) -> list[Node]:
        return [self.node] * self.num_nodes

    @property
    def devices(self) -> Devices:
        """The sums over all machines."""
        num_nodes = self.num_nodes
        return Devices(int(self.node.cpus) * num_nodes, int(self.node.gpus) * num_nodes, num_nodes)


def named(text: str) -> Hardware:
    """The hardware that ``--devices`` names: GPUs with their memory, or cores.

    Raises:
        ConfigError: for text of another form.
    """
    if match := _GPUS.fullmatch(text.strip()):
        nodes, count = int(match["nodes"] or 1), int(match["count"])
        if nodes and count:
            machines = f"{nodes} machines with {count} GPUs each" if nodes > 1 else f"{count} GPU{'s' * (count > 1)}"
            told = f"{machines}, {match['size']} {match['unit']} a GPU; {_CORES_A_GPU} cores a GPU assumed"
            return Hardware(told, nodes, Node(_CORES_A_GPU * count, count), _bytes(match), None)
    if match := _CORES.fullmatch(text.strip()):
        count = int(match["count"] or match["before"])
        if count:
            size = _bytes(match) if match["size"] else None
            told = f"{count} core{'s' * (count > 1)}, no GPU" + (f", {match['size']} {match['unit']}" if size else "")
            return Hardware(told, 1, Node(count, 0), None, size)
    raise ConfigError(
        f"--devices {text}",
        wanted="GPUs with the memory of each, or cores",
        got=repr(text),
        fix="8x80GB: eight GPUs; 2x8x80GB: two machines of eight; cpu:16 or cpu:16x64GB: cores and memory, no GPU",
    )


def here(config: ClusterConfig) -> Hardware:
    """This machine, as a local run would have it."""
    gpus = _visible_gpus()
    if config.devices is not None:
        gpus = gpus[: config.devices]
    cpus, ram = usable_cpus(), _ram_bytes()
    told = f"this machine: {cpus} core{'s' * (cpus != 1)}, {ram / (1 << 30):.0f} GiB, "
    told += f"{len(gpus)} GPU{'s' * (len(gpus) > 1)} of {min(gpus) / (1 << 30):.0f} GiB" if gpus else "no GPU"
    return Hardware(told, 1, Node(cpus, len(gpus)), min(gpus, default=None), ram)


def _bytes(match: re.Match[str]) -> int:
    return int(float(match["size"]) * _UNITS[match["unit"].upper()])


def _visible_gpus() -> list[int]:
    """Bytes of each NVIDIA GPU that this process may use, as the driver's own tool tells them."""
    asked = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = [[part.strip() for part in line.split(",")] for line in answer.splitlines() if line.count(",") == 2]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else {name.strip() for name in visible.split(",")}
    return [
        int(mib) << 20
        for index, uuid, mib in gpus
        if mib.isdigit() and (wanted is None or index in wanted or uuid in wanted)
    ]


def _ram_bytes() -> int:
    """Memory of this machine, or of the container that it is."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _CGROUP_LIMITS:
        limit = file.read_text().strip() if file.exists() else "max"
        sizes += [int(limit)] if limit.isdigit() else []
    return min(sizes)
