"""Ray, started for one run and stopped with it; engine noise goes to files.

A local cluster listens on 127.0.0.1 only and has no dashboard.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig


@dataclass(frozen=True, slots=True)
class Devices:
    """What a cluster has.

    Attributes:
        cpus: cores.
        gpus: GPUs.
    """

    cpus: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker asks Ray for; shares of a core or GPU are allowed."""

    cpus: float
    gpus: float


@contextmanager
def session(config: ClusterConfig, *, log_dir: Path) -> Iterator[Devices]:
    """A connection to Ray for the length of the block; a local Ray is started and stopped with it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS"] = "0"
    import ray

    local = config.address == "local"
    options = {"num_cpus": usable_cpus(), "num_gpus": config.devices, "_node_ip_address": "127.0.0.1"} if local else {}
    ray.init(
        address=config.address,
        include_dashboard=False if local else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": _worker_environment()},
        **options,
    )
    log_dir.mkdir(parents=True, exist_ok=True)
    try:
        have = ray.cluster_resources()
        yield Devices(cpus=int(have.get("CPU", 0)), gpus=int(have.get("GPU", 0)))
    finally:
        ray.shutdown()


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


def _worker_environment() -> dict[str, str]:
    return {
        "HF_HUB_OFFLINE": "1",  # workers read folders that the driver resolved; none asks a hub
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
