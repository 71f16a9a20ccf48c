"""Ray, started for one run and stopped with it; engine noise goes to files.

A local cluster has no dashboard and no pages of metrics, and takes no work from anybody without this session's token:
Ray's ports listen on every interface, whatever its node address says.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cluster.access import refuse_unprotected
from cluster.config import ClusterConfig
from cluster.errors import NodeLost, NotEnough, Unreachable
from cluster.resources import Devices, Node, Resources, place

_CONNECT_S = 10.0


def set_environment(config: ClusterConfig) -> None:
    """What Ray reads from the environment when it is first imported: call this before that.

    A local cluster gets a token of its own, without which it takes no work.
    """
    assert "ray" not in sys.modules, "Ray reads its environment when it is imported"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    if config.address == "local":
        # Ray ends a worker that had nothing to do for a second, and the next task waits for another's imports. Where
        # more stay, its warning of too many, 4 times this number, is for nobody.
        os.environ["RAY_worker_maximum_startup_concurrency"] = str(max(8, os.cpu_count() or 1))  # noqa: SIM112
        os.environ["RAY_idle_worker_killing_time_threshold_ms"] = "600000"  # noqa: SIM112 (so Ray spells it)
        # Two pages of metrics would be there for whoever reaches the machine; Ray goes on without them.
        os.environ["AUTOSCALER_METRIC_PORT"] = os.environ["DASHBOARD_METRIC_PORT"] = "-1"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def session(
    config: ClusterConfig, *, log_dir: Path, search_path: Sequence[Path], shipped: Sequence[Path]
) -> Iterator[Devices]:
    """A connection to Ray for the length of the block; a local Ray is started and stopped with it.

    Args:
        log_dir: made if need be.
        search_path: folders in which local workers look for modules, before all others.
        shipped: modules and packages that a cluster's workers get a copy of.

    Raises:
        Unreachable: if there is no cluster at the address.
        NodeLost: in the block, if the local Ray dies.
    """
    import ray

    from cluster.node import watched_node

    local = config.address == "local"
    options: dict[str, Any] = {}
    environment: dict[str, Any] = {"env_vars": _worker_environment(search_path if local else ())}
    if local:
        options = {
            "num_cpus": usable_cpus(),
            "num_gpus": config.devices,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        _refuse_silence(config.address)
        refuse_unprotected(config)
        if shipped:
            environment["py_modules"] = [str(path) for path in shipped]
    log_dir.mkdir(parents=True, exist_ok=True)
    try:
        ray.init(
            address=config.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=environment,
            **options,
        )
    except (ConnectionError, ValueError) as error:
        raise Unreachable(config.address, str(error).strip().splitlines()[0]) from error
    try:
        have = ray.cluster_resources()
        with watched_node() if local else nullcontext():
            yield Devices(int(have.get("CPU", 0)), int(have.get("GPU", 0)), len(_nodes()))
    except NodeLost:  # a farewell would wait for it; what is left of it ends with this process
        raise
    except BaseException as error:
        ray.shutdown()
        if isinstance(error.__cause__, KeyboardInterrupt):  # raised while Ray waited, which makes a SystemError of it
            raise error.__cause__ from None
        raise
    ray.shutdown()


def refuse_unless_it_fits(wanted: Sequence[tuple[int, Resources]]) -> None:
    """Refuse workers that the cluster can never hold, instead of waiting for them.

    Args:
        wanted: how many workers, and what each asks for.

    Raises:
        NotEnough: with what the workers ask for and what each node has.
    """
    nodes = _nodes()
    if place(nodes, [each for count, each in wanted for _ in range(count)]) is None:
        asked = ", ".join(f"{count} x ({told(each.cpus, each.gpus)})" for count, each in wanted)
        there = "; ".join(told(node.cpus, node.gpus) for node in nodes) or "no node"
        raise NotEnough(f"each worker whole on one node: {asked}", f"nodes with {there}")


def what_is_free() -> str:
    """In words, what the cluster has and how much of it nobody holds now."""
    import ray

    have, free = ray.cluster_resources(), ray.available_resources()
    there = told(have.get("CPU", 0), have.get("GPU", 0))
    return f"{there}, of which {told(free.get('CPU', 0), free.get('GPU', 0))} are free"


def _nodes() -> list[Node]:
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(found["CPU"], found.get("GPU", 0)) for found in alive if found.get("CPU", 0) > 0]


def told(cpus: float, gpus: float) -> str:
    """``0.5 cores and 1 GPU``."""
    return f"{cpus:g} core{'s' * (cpus != 1)} and {gpus:g} GPU{'s' * (gpus != 1)}"


def _refuse_silence(address: str) -> None:
    """Find out within seconds, where Ray would try for minutes, that nobody listens at ``[ray://]host:port``."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise Unreachable(address, str(error)) from error


def usable_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def redirect_output(log: Path) -> None:
    """Send this process's standard output and error, those of C libraries too, to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _worker_environment(search_path: Sequence[Path]) -> dict[str, str]:
    inherited = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return {
        "PYTHONPATH": os.pathsep.join([*map(str, search_path), *inherited]),
        "HF_HUB_OFFLINE": "1",  # workers read folders that the driver resolved; none asks a hub
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
