"""What the driver of a run takes for its shards and workers, with workers that compute nothing; one JSON line a case.

    python benchmarks/scale.py --shards 100 1000 10000 --workers 1 16 1000
    python benchmarks/scale.py --on ray --shards 1000 --workers 1 16 1000

A case collects one round: prompts drawn, sampled, scored and paired, then once more with everything published, as a
run does that goes on. All of the driver's own code is real: the collector, the stages, the flow, the pools and tasks,
the jobs as they are sent, the entries and manifests on disk. Not real are the workers (`scale_workers`): each job that
reaches one publishes an entry of the stage's contract with a part of no rows, and Ray or what stands for it:

`plain`: calls stay in this process and are pickled as Ray would pickle them; a worker's processor time is left out.
`ray`: Ray is real, and the thousand workers are names for two of its actors, each a process: all calls, references and
waits of the driver are there, a thousand processes are not.

`cpu_ms`: processor milliseconds of the driver's process a shard, by step: `begin` draws the prompts and claims the
stages, `flow` hands out and collects, `end` sums up, `again` finds everything published. `kib`: growth of its peak
memory a shard. Of the plain Ray alone: `messages` and `bytes` that went through it a shard, all stages together, of
which none enters Ray's object store as long as each stays under 100 KiB; `named`: references named in waits, for each
message; `most_busy`: jobs that were with workers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import scale_workers as stubs
from cluster.mapper import Patience, Watcher
from cluster.resources import Resources
from pipeline.artifacts import StageFolder
from pipeline.collect import Collector
from pipeline.config_file import load_config
from pipeline.console import Console
from pipeline.policies import Policies
from pipeline.round_context import RoundContext
from pipeline.sources import RewardSource, RoundSources, Sources
from pipeline.timeline import Timeline
from pipeline.workshop import Workshop
from stages.contracts import PROMPTS
from stages.protocols import Weights
from stages.seeds import row_id

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
POLICY = Weights(Path("policy"), row_id("weights") * 2, 0)
ROWS_A_SHARD = 1024

Report = dict[str, Any]


class Silent(Console):
    """A console that says nothing."""

    def line(self, where: str, what: str, text: str) -> None:
        pass


@dataclass
class StubCrew:
    """A crew whose pools and tasks are real, and whose workers compute nothing."""

    kind: stubs.Kind
    workers: int
    log_dir: Path
    timeline: Timeline = field(default_factory=Timeline)
    stages_overlap: bool = True

    def __post_init__(self) -> None:
        self._patience, self._watcher = Patience(0, 600.0), Watcher(on_work=self.timeline.note)
        self.tasks = self.kind.tasks(
            resources=Resources(0.5, 0), log_dir=self.log_dir, patience=self._patience, watcher=self._watcher
        )
        self._pools: dict[str, Any] = {}

    def pool(self, name: str) -> Any:
        if name not in self._pools:
            self._pools[name] = self.kind.pool(
                dict,
                name=name,
                size=self.workers,
                resources=Resources(0, 0),
                log_dir=self.log_dir,
                patience=self._patience,
                watcher=self._watcher,
            )
            self._pools[name].wait_until_up()
        return self._pools[name]

    def scorers(self, *_: Any, **__: Any) -> Any:
        return self.pool("scorer")

    def samplers(self, *_: Any, **__: Any) -> Any:
        return self.pool("sampler")

    def told(self) -> str:
        return ""


def collector(folder: Path, crew: StubCrew, *, shards: int, rows: int) -> Collector:
    """A round's collector, as a run makes it; where a run has engines that are told of weights, the crew stands."""
    sets = [f"run.dir={folder}", f"prompts.per_round={shards * rows}", f"prompts.shard_size={rows}"]
    config = load_config(QUICKSTART, sets)
    assert config.score is not None
    reward = RewardSource(config.score.rewards[1], "exact_match", "score.rewards.1", None, "0" * 64)
    sources = Sources(POLICY, "", None, None, (RoundSources(None, None, (reward,)),))
    shop = Workshop(config, sources, crew, Silent(), folder, crew)  # type: ignore[arg-type]
    pool = StageFolder(folder / "prompts", PROMPTS)
    if not pool.is_closed():
        pool.begin({})
        pool.publish(0, PROMPTS.schema.empty_table())
        pool.close(1)
    at = RoundContext(shop, 1, Policies(POLICY, POLICY), folder / "round-0001", "")
    return Collector(at, pool=pool)


@dataclass
class Meter:
    """Processor time of the driver by step, without the stub workers' share of it."""

    clock: Callable[[], float]
    spent: dict[str, float] = field(default_factory=dict)

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        began, outside = self.clock(), stubs.outside_s()
        value = work()
        self.spent[name] = self.clock() - began - (stubs.outside_s() - outside)
        return value


def measure(on: str, shards: int, workers: int, rows: int, folder: Path, *, at_once: int = 1) -> Report:
    """One case, in this process."""
    stubs.PLAIN.at_once = at_once
    kind, began = stubs.KINDS[on], time.perf_counter()
    ready: AbstractContextManager[Any] = stubs.real_ray(folder / "logs") if on == "ray" else nullcontext()
    with ready:
        crew = StubCrew(kind, workers, folder / "logs")
        for name in ("sampler", "scorer"):
            crew.pool(name)
        warm = collector(folder / "warm", crew, shards=4, rows=rows)
        warm.collect(POLICY)
        stubs.counted.clear()
        meter, before = Meter(kind.clock), peak_kib()
        of_round = collector(folder / "run", crew, shards=shards, rows=rows)
        flow = meter.step("begin", lambda: of_round.begin(POLICY))
        started = time.perf_counter()
        meter.step("flow", lambda: flow.run(Silent()))
        flow_s = time.perf_counter() - started
        meter.step("end", of_round.end)
        told, grown = carried(shards) if on == "plain" else {}, peak_kib() - before
        meter.step("again", lambda: collector(folder / "run", crew, shards=shards, rows=rows).collect(POLICY))
        stored = stubs.object_store_bytes() if on == "ray" else 0
    return {
        "on": on,
        "shards": shards,
        "workers": workers,
        "rows_a_shard": rows,
        "at_once": at_once if on == "plain" else None,
        "cpu_ms": {name: round(1000 * spent / shards, 4) for name, spent in meter.spent.items()},
        "kib": round(grown / shards, 3),
        "peak_mib": round(peak_kib() / 1024),
        **told,
        "object_store_bytes": stored,
        "flow_s": round(flow_s, 2),
        "seconds": round(time.perf_counter() - began, 1),
        "load": round(os.getloadavg()[0], 1),
    }


def carried(shards: int) -> Report:
    """What went through the plain Ray so far."""
    counted = stubs.counted
    return {
        "messages": round(counted["messages"] / shards, 2),
        "bytes": round(counted["bytes"] / shards),
        "largest_bytes": counted["largest"],
        "named": round(counted["named"] / counted["messages"], 1),
        "most_busy": counted["most_busy"],
    }


def peak_kib() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", nargs="+", choices=stubs.KINDS, default=["plain"])
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 16, 1000])
    parser.add_argument("--rows", type=int, nargs="+", default=[ROWS_A_SHARD], help="prompts a shard")
    parser.add_argument(
        "--at-once", type=int, default=1, help="jobs that end while a plain driver waits: 1 leaves it idle"
    )
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where rounds are written for a while")
    asked = parser.parse_args()
    cases = [(o, s, w, r) for o in asked.on for s in asked.shards for w in asked.workers for r in asked.rows]
    for on, shards, workers, rows in cases:
        if len(cases) == 1:
            with TemporaryDirectory(dir=asked.folder) as folder:
                print(json.dumps(measure(on, shards, workers, rows, Path(folder), at_once=asked.at_once)), flush=True)
            continue
        own = ["--on", on, "--shards", str(shards), "--workers", str(workers), "--rows", str(rows)]
        own += ["--at-once", str(asked.at_once)]
        words = [sys.executable, "-m", "benchmarks.scale", *own, "--folder", str(asked.folder)]
        subprocess.run(words, check=True, cwd=QUICKSTART.parents[1])


if __name__ == "__main__":
    main()
