"""Rates of a run's stages for Prometheus, through Ray's own metrics; nothing where the cluster gives none out.

Ray's nodes each have a page of metrics that Prometheus reads; ``ray_prefloop_per_second`` is on the page of the node on
which the driver runs, by run, stage and unit. A local cluster has no such page here (`cluster.session`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config import ClusterConfig

NAME = "prefloop_per_second"


@dataclass(frozen=True, slots=True)
class Rates:
    """The gauge of one run.

    Attributes:
        run: its name.
        gauge: Ray's; None where the cluster gives no metrics out.
    """

    run: str
    gauge: Any = None

    def show(self, stage: str, amounts: Mapping[str, float], seconds: float) -> None:
        """What a stage did in some seconds: amounts by unit."""
        if self.gauge is None or seconds <= 0:
            return
        for unit, amount in amounts.items():
            self.gauge.set(amount / seconds, tags={"run": self.run, "stage": stage, "unit": unit})


def rates(config: ClusterConfig, run: str) -> Rates:
    """The gauge of a run on the cluster that this process is connected to."""
    import ray

    on = config.address != "local" and any(node.get("MetricsExportPort") for node in ray.nodes())
    if not on:
        return Rates(run)
    from ray.util.metrics import Gauge

    told = "what a stage of a run works through in a second, by its last shard or optimizer step"
    return Rates(run, Gauge(NAME, description=told, tag_keys=("run", "stage", "unit")))
