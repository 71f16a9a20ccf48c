"""A cluster of several nodes: stages spread over them, one is killed, drained, added; the run goes on, and uses it.

Each node is a raylet of its own on this machine; the run knows nothing of that.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from nodes import nodes

pytestmark = pytest.mark.slow

TINY = (
    "prompts.per_round=96",
    "prompts.shard_size=16",
    "evaluate.num_prompts=32",
    "update.global_batch_size=8",
    "update.workers=2",
)


@pytest.fixture
def cluster(tmp_path):
    """Three nodes; the first one holds the cluster's memory, and the run's command is on it."""
    with nodes(tmp_path, count=3, cpus=2) as found:
        yield found


def places_of(run: Path) -> dict[str, int]:
    """Each worker of a run that is up, by the name of its log, with the raylet that it lives under."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            log = (process / "fd" / "1").readlink()
            if log.match(f"{run}/logs/*/*.log") and log.stem.startswith(("sampler-", "scorer-", "trainer-")):
                found[log.stem] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def fates(run: Path, round: int) -> list[str]:
    files = sorted((run / f"round-{round:04d}" / "fates").glob("part-*.parquet"))
    return [row for file in files for row in pq.read_table(file)["prompt_id"].to_pylist()]


def entries(run: Path, table: str) -> int:
    return len(list((run / table / "_shards").glob("part-*.json")))


def raylet_of(node) -> int:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            stat = (process / "stat").read_text()
            if int(stat.rpartition(")")[2].split()[1]) == node.pid and "raylet" in (process / "comm").read_text():
                return int(process.name)
    raise AssertionError("a node without a raylet")


def test_stages_spread_over_nodes_and_the_run_outlives_one_of_them(prefloop, cluster):
    run, seen = prefloop.runs / "spread", {}

    def under_way() -> bool:
        seen.update(places_of(run))
        return entries(run, "round-0001/candidates") >= 2

    def lose_a_node() -> None:
        others = [node for node in cluster.started[1:] if raylet_of(node) in seen.values()]
        assert others, seen
        cluster.kill(others[0])

    done = prefloop.disturbed(
        *TINY,
        "run.name=spread",
        "rounds=2",
        "sample.engines=2",
        f"cluster.address={cluster.address}",
        when=under_way,
        disturb=lose_a_node,
    )
    assert done.code == 0, done.err
    assert "3 nodes, 6 cores" in done.out and "restarted" in done.out
    assert len(set(seen.values())) >= 2, seen
    for number in (1, 2):
        asked = fates(run, number)
        assert len(set(asked)) == len(asked) == 96
    assert json.loads((run / "final.json").read_text())["round"] == 2


def test_a_node_that_is_added_is_used_and_one_that_is_drained_is_left(prefloop, tmp_path):
    run = prefloop.runs / "grown"
    with nodes(tmp_path, count=1, cpus=2) as cluster:

        def grow() -> None:
            cluster.add()

        done = prefloop.disturbed(
            *TINY,
            "run.name=grown",
            "rounds=1",
            "prompts.per_round=192",
            "sample.engines=1",
            "sample.max_engines=4",
            f"cluster.address={cluster.address}",
            when=lambda: entries(run, "round-0001/candidates") >= 1,
            disturb=grow,
        )
        assert done.code == 0, done.err
    came_up = [json.loads(line)["worker"] for line in (run / "logs/attempt-1/workers.jsonl").open()]
    assert {"sampler-0", "sampler-1"} <= set(came_up), came_up
    asked = fates(run, 1)
    assert len(set(asked)) == len(asked) == 192
