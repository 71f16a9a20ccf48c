"""Prometheus finds a run's rates on the page of Ray's metrics of a cluster; a local one has no such page."""

from __future__ import annotations

import re
import secrets
import socket
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

DRIVER = """
import sys, time, ray
from cluster.config import ClusterConfig
from cluster.metrics import rates

ray.init(address=sys.argv[1], log_to_driver=False)
print("port", *(node["MetricsExportPort"] for node in ray.nodes()), flush=True)
found = rates(ClusterConfig(address=sys.argv[1]), "mine")
assert found.gauge is not None and rates(ClusterConfig(), "mine").gauge is None
found.show("sample", {"rows": 64.0, "tokens": 640.0}, 2.0)
time.sleep(120)
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_the_rates_of_a_run_are_on_the_clusters_page_of_metrics(tmp_path, monkeypatch):
    from test_shared_cluster import group

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    port = free_port()
    ray = str(Path(sys.executable).with_name("ray"))
    options = ["--head", "--num-cpus=1", f"--port={port}", f"--metrics-export-port={free_port()}"]
    quiet = ["--include-dashboard=false", "--disable-usage-stats", "--block"]
    with group([ray, "start", *options, *quiet], tmp_path / "ray.log", says="runtime started"):
        driver = [sys.executable, "-c", DRIVER, f"127.0.0.1:{port}"]
        with group(driver, tmp_path / "driver.log", says="port"):
            page = int(re.findall(r"port (\d+)", (tmp_path / "driver.log").read_text())[0])
            found = scraped(page)
    assert found == {("sample", "rows"): 32.0, ("sample", "tokens"): 320.0}


def scraped(port: int) -> dict[tuple[str, str], float]:
    """The run's rates by stage and unit, as soon as they are on the page; Ray sends them there every few seconds."""
    deadline = time.monotonic() + 60
    found: dict[tuple[str, str], float] = {}
    while len(found) < 2 and time.monotonic() < deadline:
        time.sleep(1)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            continue
        for line in re.findall(r"^ray_prefloop_per_second\{.*$", text, flags=re.M):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', line))
            assert tags["run"] == "mine"
            found[tags["stage"], tags["unit"]] = float(line.rpartition(" ")[2])
    return found
