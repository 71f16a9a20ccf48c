"""What machines have, what workers ask for, and whether the one holds the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_EXACT = 1e-6  # shares are sums of decimal fractions


@dataclass(frozen=True, slots=True)
class Devices:
    """What a cluster has.

    Attributes:
        cpus: cores.
        gpus: GPUs.
        num_nodes: machines that they are on.
    """

    cpus: int
    gpus: int
    num_nodes: int = 1

    @property
    def cpus_of_a_node(self) -> int:
        """Cores of one machine, where all are alike."""
        return self.cpus // self.num_nodes

    @property
    def cpus_to_deal(self) -> int:
        """Cores to deal out: of several machines one may be lost, and the others shall hold all workers then."""
        return self.cpus if self.num_nodes == 1 else self.cpus - self.cpus_of_a_node


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker asks Ray for; shares of a core or GPU are allowed."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Node:
    """What one machine of a cluster has."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker is: a node's number, and the numbers of the GPUs on it that it shares or holds."""

    node: int
    gpus: tuple[int, ...]


def place(nodes: Sequence[Node], wanted: Sequence[Resources]) -> list[Place] | None:
    """A place for each worker, or None where they do not all fit.

    As Ray does it: a worker is on one node; a share of a GPU is of one GPU; more than one GPU are whole ones. Large
    workers are placed first, each on the first node that holds it.
    """
    cpus = [float(node.cpus) for node in nodes]
    gpus = [[1.0] * int(node.gpus) for node in nodes]
    places: dict[int, Place] = {}
    for worker in sorted(range(len(wanted)), key=lambda i: (-wanted[i].gpus, -wanted[i].cpus, i)):
        ask = wanted[worker]
        for node in range(len(nodes)):
            chosen = _gpus_for(ask.gpus, gpus[node])
            if chosen is not None and cpus[node] + _EXACT >= ask.cpus:
                break
        else:
            return None
        cpus[node] -= ask.cpus
        for gpu in chosen:
            gpus[node][gpu] -= min(1.0, ask.gpus)
        places[worker] = Place(node, chosen)
    return [places[worker] for worker in range(len(wanted))]


def _gpus_for(share: float, free: Sequence[float]) -> tuple[int, ...] | None:
    """The first GPUs of a node with room for a share, or None."""
    if share <= 0:
        return ()
    each, count = (share, 1) if share < 1 else (1.0, round(share))
    room = [gpu for gpu, left in enumerate(free) if left + _EXACT >= each]
    return tuple(room[:count]) if len(room) >= count else None
