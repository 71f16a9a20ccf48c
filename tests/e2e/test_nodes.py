"""A cluster of several nodes: stages spread over them, one is killed, drained, added; the run goes on, and uses it.

Each node is a raylet of its own on this machine; the run knows nothing of that.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from nodes import nodes

pytestmark = pytest.mark.long

TINY = (
    "prompts.per_round=96",
    "prompts.shard_size=16",
    "evaluate.num_prompts=32",
    "update.global_batch_size=8",
    "update.workers=2",
)


@pytest.fixture
def cluster(tmp_path):
    """Three nodes; the first one holds the cluster's memory."""
    with nodes(tmp_path, count=3, cpus=2) as found:
        yield found


def parent(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])


def places_of(run: Path) -> dict[str, int]:
    """Each worker of a run that is up, by the name of its log, with the raylet that it lives under."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            log = (process / "fd" / "1").readlink()
            if log.match(f"{run}/logs/*/*.log") and log.stem.startswith(("sampler-", "scorer-", "trainer-")):
                found[log.stem] = parent(process)
    return found


def fates(run: Path, round: int) -> list[str]:
    files = sorted((run / f"round-{round:04d}" / "fates").glob("part-*.parquet"))
    return [row for file in files for row in pq.read_table(file)["prompt_id"].to_pylist()]


def entries(run: Path, table: str) -> int:
    return len(list((run / table / "_shards").glob("part-*.json")))


def commands_raylet(among) -> int:
    """The raylet that the run's command is connected to, with which it lives and dies: its mailbox is there."""
    mailboxes = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(b"ray::Mailbox"):
                mailboxes.append(parent(process))
    (found,) = set(mailboxes) & {raylet_of(node) for node in among}
    return found


def raylet_of(node) -> int:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if parent(process) == node.pid and "raylet" in (process / "comm").read_text():
                return int(process.name)
    raise AssertionError("a node without a raylet")


def test_stages_spread_over_nodes_and_the_run_outlives_one_of_them(prefloop, cluster):
    run, seen = prefloop.runs / "spread", {}

    def under_way() -> bool:
        seen.update(places_of(run))
        return entries(run, "round-0001/candidates") >= 2

    def lose_a_node() -> None:
        others = [
            node
            for node in cluster.started[1:]
            if raylet_of(node) in set(seen.values()) - {commands_raylet(cluster.started)}
        ]
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
    run, seen = prefloop.runs / "grown", []
    with nodes(tmp_path, count=1, cpus=2) as cluster:

        def grow_and_shrink() -> None:
            before = cluster.ids()
            added = raylet_of(cluster.add())
            (node,) = cluster.ids() - before
            seen.append(wait_for(lambda: added in places_of(run).values()))
            cluster.drain(node)
            seen.append(wait_for(lambda: added not in places_of(run).values()))

        done = prefloop.disturbed(
            *TINY,
            "run.name=grown",
            "rounds=1",
            "prompts.per_round=768",
            "sample.num_generations=64",
            "sample.engines=1",
            "sample.max_engines=4",
            f"cluster.address={cluster.address}",
            when=lambda: entries(run, "round-0001/candidates") >= 1,
            disturb=grow_and_shrink,
        )
        assert done.code == 0, done.err
    assert seen == [True, True], "a sampler came up on the node, and left it"
    assert "drained    node" in done.out and "restarted" not in done.out
    asked = fates(run, 1)
    assert len(set(asked)) == len(asked) == 768


def wait_for(holds, at_most_s=90.0) -> bool:
    until = time.monotonic() + at_most_s
    while not holds() and time.monotonic() < until:
        time.sleep(0.1)
    return bool(holds())
